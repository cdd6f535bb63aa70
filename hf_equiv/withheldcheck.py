"""Check rows that cannot be recomputed, for want of images or of the model (private to `verify`)."""

from __future__ import annotations

from collections.abc import Sequence

from hf_equiv import metrics
from hf_equiv.geometrysummary import summarize_analysis
from hf_equiv.layouts import row_name
from hf_equiv.recordcheck import leaves
from hf_equiv.results import Status
from hf_equiv.rowcheck import Findings, check_empty, check_limits, check_stated
from hf_equiv.shards import MATCH, PROVENANCE_FEATURES, Layout, Row

_STATUSES = {
    "spectrum": (Status.COMPLETED, Status.ERROR),
    "lipschitz": (Status.RESOLVED, Status.UNDETERMINED, Status.ERROR),
    "walk": (Status.COMPLETED, Status.DRIFT_EXCEEDED, Status.BOX_BLOCKED, Status.ERROR),
}


def check_without_images(
    file: str, row: Row, record: Row, listed: Row | None, layout: Layout, found: Findings, *, withheld: bool
) -> None:
    """Check a row against `run.json` and against itself; where photos are withheld, there must be none."""
    settings, name = record["settings"], row_name(layout.analysis, row)
    if layout is MATCH:
        check_stated(file, row, settings, listed, found)
    else:
        stated = {k: v for k, v in settings.items() if k in PROVENANCE_FEATURES}
        check_stated(file, row, stated, listed, found, name)
    for column in layout.images if withheld else ():
        if row[column] is not None:
            told = f"row {name!r}, {column}: run.json says that photos are withheld, but there is one"
            found.say(file, name, column, None, "an image", told)
    if layout is not MATCH:
        if row["status"] not in _STATUSES[layout.analysis]:
            found.add(file, name, "status", row["status"], None, "no status of this analysis")
        return
    if row["status"] == Status.ERROR:
        check_empty(file, row, found)
        return
    check_limits(file, row, settings, found)
    if None not in (row["match_label"], row["target_label"]) and row["same_top1"] is not None:
        same = row["match_label"] == row["target_label"]
        if row["same_top1"] != same:
            found.add(file, name, "same_top1", row["same_top1"], same, "the two labels")


def check_stated_summary(record: Row, layout: Layout, rows: Sequence[Row], found: Findings) -> None:
    """The summary must follow from the rows, but for what needs images: the baseline, and the refinements' cost."""
    order = {item[layout.item]: i for i, item in enumerate(record[layout.listed])}
    rows = sorted(rows, key=lambda row: order[row[layout.item]])
    stated = record["summary"] if isinstance(record["summary"], dict) else {}
    if layout is MATCH:
        made = metrics.summarize(rows, stated.get("baseline"), record["settings"]["rtol"])
        made["median"]["num_evals_refine"] = stated.get("median", {}).get("num_evals_refine")
    else:
        made = summarize_analysis(layout.analysis, rows, record["settings"])
    for path, a, b in leaves("summary", stated, made):
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        if a != b and not (numbers and abs(a - b) <= 1e-9 * abs(b)):
            found.add("run.json", None, path, a, b)
