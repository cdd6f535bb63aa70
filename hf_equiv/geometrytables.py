"""What a person sees of a finished spectrum, lipschitz or walk run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from hf_equiv.display import console_of, cut, form, to_stderr
from hf_equiv.wording import in_flags

if TYPE_CHECKING:
    from hf_equiv.geometryrun import AnalysisOutcome


def print_analysis(outcome: AnalysisOutcome, folder: str, check: str, out: Any) -> None:
    """Print the result of a spectrum, lipschitz or walk run: a table, the summary in words, and where the files are.

    Args:
        outcome: of the run.
        folder: of its rows.
        check: the command that verifies it.
        out: stream.
    """
    console = console_of(out)
    table = Table(box=None, pad_edge=False, header_style="bold")
    head, lines = _TABLES[outcome.analysis](outcome)
    for k, name in enumerate(head):
        table.add_column(name, justify="left" if k == 0 else "right", no_wrap=True)
    for line in lines[:20]:
        table.add_row(*(escape(cell) for cell in line))
    console.print(table)
    if len(lines) > 20:
        console.print(f"… and {len(lines) - 20} more")
    console.print()
    console.print(outcome.summary["verdict"], highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for reason in _analysis_failures(outcome):
        console.print(reason, highlight=False, markup=False, soft_wrap=not console.is_terminal)
    console.print()
    figures = outcome.out / "figures"
    for name, value in (("pictures", figures if figures.is_dir() else None), ("rows", outcome.out / folder),
                        ("check it", check)):  # fmt: skip
        if value is not None:
            console.print(f"{name + ':':<10}{value}", highlight=False, markup=False, soft_wrap=True)


def print_analysis_failures(outcome: AnalysisOutcome) -> None:
    """Say on stderr, in one line, how many images failed and why."""
    to_stderr(f"Not every image in {outcome.out} was completed. {' '.join(_analysis_failures(outcome))}")


def _analysis_failures(outcome: AnalysisOutcome) -> list[str]:
    """One sentence for each status that is no success, and for each distinct cause of an error."""
    from hf_equiv.geometryrun import FAILED
    from hf_equiv.results import Status

    reasons: dict[str, set[str]] = {}
    for row in outcome.rows:
        if row["status"] in FAILED[outcome.analysis]:
            why = outcome.errors.get(row["image_id"]) if row["status"] == Status.ERROR else None
            reasons.setdefault(f"{row['status']}: {why or Status(row['status']).advice}", set()).add(row["image_id"])
    return [
        in_flags(why) + (f" ({', '.join(sorted(ids)[:3])}{' …' if len(ids) > 3 else ''})")
        for why, ids in sorted(reasons.items())
    ]


Lines = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _spectrum_table(outcome: AnalysisOutcome) -> Lines:
    from hf_equiv.metrics import short

    lines: list[tuple[str, ...]] = []
    for row in outcome.rows:
        named = [zero["cause"] for zero in (row["structural_zeros"] or []) + (row["near_structural"] or [])]
        bound = [b for b in row["error_bound"] or [] if b is not None]
        lines.append(
            (
                cut(row["image_id"], 36),
                row["status"],
                form(row["sigma_max"], ".4g"),
                _rank(row),
                form(row["nullity"], ",d"),
                form(row["effective_rank"], ".1f"),
                short(max(bound)) if bound else "–",
                ", ".join(named) or "–",
                form(row["seconds"], ".1f"),
            )
        )
    head = ("image", "status", "largest", "rank", "nullity", "eff. rank", "error bound", "zeros", "seconds")
    return head, lines


def _rank(row: dict[str, Any]) -> str:
    if row["rank"] is None:
        return "–"
    values = len(row["singular_values"])
    return f"{row['rank']} of {values}" if values >= row["rank"] else str(row["rank"])  # with --k there are fewer


def _lipschitz_table(outcome: AnalysisOutcome) -> Lines:
    lines: list[tuple[str, ...]] = []
    for kind, found in outcome.summary.get("kinds", {}).items():
        numbers = [form(q, ".4g") for q in found["quantiles"] or [None] * 5]
        share = f"{found['resolved']} of {found['count']}"
        reach = form(found["linearity_radius"], ".2g")
        lines.append((kind, share, *numbers, form(found["largest_jvp"], ".3g"), reach))
    return ("direction", "resolved", "least", "25 %", "median", "75 %", "largest", "largest |Jv|", "linear to"), lines


def _walk_table(outcome: AnalysisOutcome) -> Lines:
    from hf_equiv.metrics import short

    lines: list[tuple[str, ...]] = [
        (
            cut(walk["image_id"], 36),
            walk["status"],
            str(walk["steps"]),
            form(walk["start_l2"], ".3g"),
            form(walk["l2"], ".3g"),
            form(walk["arc_length"], ".3g"),
            form(walk["psnr_db"], ".1f"),
            short(walk["largest_drift"]),
            "–" if walk["largest_drift_8bit"] is None else short(walk["largest_drift_8bit"]),
            form(walk["remaining"], ".3g"),
            " > ".join(label.split(",")[0] for label in walk["labels"]) or "–",
            form(walk["num_evals"], ".0f"),
        )
        for walk in outcome.summary.get("walks", [])
    ]
    head = (
        "image",
        "status",
        "steps",
        "L2 before",
        "L2",
        "length",
        "PSNR dB",
        "drift",
        "as PNG",
        "remaining",
        "seen as",
        "evals",
    )
    return head, lines


_TABLES: dict[str, Callable[[AnalysisOutcome], Lines]] = {
    "spectrum": _spectrum_table,
    "lipschitz": _lipschitz_table,
    "walk": _walk_table,
}
