"""Check `run.json` against the folder it is in: files, model, what is listed, card (private helper of `verify`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hf_equiv import card, metrics, rundir, shards
from hf_equiv.results import SCHEMA_VERSION, Status
from hf_equiv.rowcheck import Findings
from hf_equiv.run import summarize_run
from hf_equiv.shards import MATCH, Layout, Row

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder


def check_model(encoder: Encoder, settings: Row, found: Findings) -> None:
    """The weights and the scaling of pixels must be those that the run states."""
    loaded = encoder.provenance["model_revision"]
    if loaded != settings["model_revision"]:
        other = f"other weights were loaded: {loaded}; the run states {settings['model_revision']}"
        found.say("run.json", None, "model_revision", settings["model_revision"], loaded, other)
    stated, here = (json.loads(text) for text in (settings["processor"], encoder.provenance["processor"]))
    for key in ("image_mean", "image_std"):
        if stated.get(key) != here.get(key):
            found.add("run.json", None, f"processor.{key}", stated.get(key), here.get(key), "pixels are scaled")


def check_files(folder: Path, record: Row, found: Findings) -> None:
    """Every file must have the SHA-256 that is stated, and a finished run must state one for every file."""
    stated: Mapping[str, str] = record["files"]
    for name, digest in stated.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            found.say(name, None, "sha256", digest, None, "the file is outside the run directory")
            continue
        path = folder / name
        now = shards.sha256_file(path) if path.is_file() else None
        if now != digest:
            how = "is missing" if now is None else "changed: its SHA-256 is not what run.json states"
            found.say(name, None, "sha256", digest, now, f"the file {how}")
    if not record["complete"]:
        return
    for path in sorted(rundir.own_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name == "README.md" and record.get("card") == "dataset":
            continue  # the card of a dataset is its owner's to edit; its numbers are checked
        if name not in stated:
            found.say(name, None, "sha256", None, shards.sha256_file(path), "run.json does not list this file")


def check_listed(record: Row, layout: Layout, rows: Sequence[Row], found: Findings) -> bool:
    """Every pair or image that is listed must have its rows, as many as were asked for; errors need their reason.

    Returns:
        Whether all is there, so that a summary can be made.
    """
    listed = [item[layout.item] for item in record[layout.listed]]
    there = {row[layout.item]: row["status"] for row in rows}
    what, missing = ("row", "missing") if layout is MATCH else ("image", "its rows are missing")
    for name in dict.fromkeys(listed):
        if name not in there:
            why = "" if record["complete"] else f"; the run is not finished: run the same {layout.analysis} command"
            told = f"{what} {name!r} is listed and {missing} from {layout.folder}/{why}"
            found.say("run.json", name, layout.item, "a row", "no row", told)
        if listed.count(name) > 1:
            found.say("run.json", name, layout.item, "once", "twice", f"{what} {name!r} is listed twice")
    count = record["settings"].get(f"num_{layout.listed}", len(listed))
    if count != len(listed):
        told = f"the settings ask for {count} {layout.listed}; {len(listed)} are listed"
        found.say("run.json", None, f"settings.num_{layout.listed}", count, len(listed), told)
    version = record["settings"].get("schema_version", record["schema_version"])
    if version != record["schema_version"] or not 1 <= version <= SCHEMA_VERSION:
        found.add("run.json", None, "settings.schema_version", version, record["schema_version"])
    if not set(listed) <= set(there):
        return False
    if not record["complete"]:
        told = f"all rows are there, but the run is not closed: run the same {layout.analysis} command"
        found.say("run.json", None, "complete", False, True, told)
    failed = {name for name, status in there.items() if status == Status.ERROR}
    for name in sorted(failed ^ set(record.get("errors", {}))) if record["complete"] else ():
        told = "states no error" if name in failed else "states an error of a row that has none"
        found.say("run.json", name, "errors", name not in failed, name in failed, f"run.json {told}: {name!r}")
    return True


def leaves(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """The values of two nested mappings, side by side, with their path."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from leaves(f"{path}.{key}", a.get(key), b.get(key))
    else:
        yield path, a, b


def check_card(folder: Path, record: Row, made: Row, found: Findings) -> None:
    """The numbers of README.md must be those of the rows; a card of another schema may be put in other words."""
    path = folder / "README.md"
    if record["schema_version"] != SCHEMA_VERSION or not path.is_file():
        return
    wanted = card.run_card(record["settings"], made).splitlines()
    there = set(path.read_text(encoding="utf-8", errors="replace").splitlines())
    for line in wanted:
        if line.startswith("| ") and line not in there and not line.startswith("| |"):
            told = f"the card does not say what the rows say: {line}"
            found.say("README.md", None, line.split(" | ")[0].removeprefix("| "), None, line, told)


def check_summary(encoder: Encoder, folder: Path, rows: Sequence[Row], record: Row, found: Findings) -> None:
    """The stated summary must follow from the rows, which have been verified; the baseline within float noise.

    The verdict must follow from the rows and the stated baseline, so that noise cannot turn a digit of its text.
    """
    ids = [pair["pair_id"] for pair in record["pairs"]]
    order = {name: index for index, name in enumerate(ids)}
    rows, rtol = sorted(rows, key=lambda row: order[row["pair_id"]]), record["settings"]["rtol"]
    made = summarize_run(encoder, folder, rows, rtol, ids)
    stated = record["summary"] if isinstance(record["summary"], dict) else {}
    before = len(found.problems)
    for key in sorted({*made, *stated} - {"verdict"}):
        for path, a, b in leaves(key, stated.get(key), made.get(key)):
            numbers = isinstance(a, int | float) and isinstance(b, int | float)
            if a != b and not (numbers and abs(a - b) <= max(1e-5 * abs(b), 1e-6 if "baseline" in path else 0.0)):
                found.add("run.json", None, f"summary.{path}", a, b)
    baseline = stated.get("baseline") if len(found.problems) == before else made["baseline"]
    verdict = metrics.summarize(rows, baseline, rtol)["verdict"]
    if stated.get("verdict") != verdict:
        found.add("run.json", None, "summary.verdict", stated.get("verdict"), verdict)
    if len(found.problems) == before:
        check_card(folder, record, stated, found)
