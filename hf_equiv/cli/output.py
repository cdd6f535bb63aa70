"""Results for a person or a program: tables, sentences and JSON on stdout, errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from hf_equiv.cli.options import flag_note
from hf_equiv.formatting import cut, form, short, size

if TYPE_CHECKING:
    from hf_equiv.analyses.run import RunOutcome
    from hf_equiv.hub.publish import Published
    from hf_equiv.hub.space import SpaceDeployment
    from hf_equiv.report.page import Report
    from hf_equiv.verify.dataset import DatasetReport

MAX_ROWS = 20


def _console() -> Console:
    """Return a console that prints text as it is; lines are as wide as they need to be."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, soft_wrap=True)


def to_stderr(text: str) -> None:
    """Print a line on stderr."""
    sys.stderr.write(f"{text}\n")  # in one piece, since other processes write there too
    sys.stderr.flush()


def print_json(value: Any) -> None:
    """Print one JSON object; NaN is refused rather than written."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def some(names: Iterable[str], count: int) -> str:
    """Return the first names on one line."""
    shown = [cut(name, 60) for name in names]
    return ", ".join(shown[:count] + (["…"] if len(shown) > count else []))


def _print_text(template: str, **values: Any) -> None:
    """Print a text template of the package."""
    import jinja2

    folder = Path(__file__).parents[1] / "templates"
    texts = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    texts.filters |= {"short": short, "size": size, "flags": _with_flags, "plain": _plain}
    click.echo(texts.get_template(f"{template}.txt.jinja").render(values), nl=False)


def _with_flags(text: str) -> str:
    return text + flag_note(text, click.get_current_context().command.params)


# --- the result of a run ---


def _labels(row: Mapping[str, Any]) -> str:
    if row["match_label"] is None:
        return "–"
    return " / ".join(_first(row[f"{name}_label"] or "–") for name in ("source", "match", "target"))


def _first(label: str) -> str:
    return label.split(",")[0]


def _rank(row: Mapping[str, Any]) -> str:
    if row["rank"] is None or len(row["singular_values"]) < row["rank"]:  # with --k there are fewer values
        return form(row["rank"], "d")
    return f"{row['rank']} of {len(row['singular_values'])}"


def _zeros(row: Mapping[str, Any]) -> str:
    return ", ".join(zero["cause"] for zero in (row["structural_zeros"] or []) + (row["near_structural"] or [])) or "–"


def _quantile(k: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda found: form(found["quantiles"][k] if found["quantiles"] else None, ".4g")


_COLUMNS: dict[str, dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "match": {
        "source -> target": lambda row: cut(row["pair_id"].replace("->", " -> "), 44),
        "status": lambda row: row["status"],
        "error": lambda row: short(row["embedding_error"]),
        "as PNG": lambda row: short(row["embedding_error_8bit"]),
        "PSNR dB": lambda row: form(row["psnr_db"], ".1f"),
        "evals": lambda row: form(row["num_evals"], ".0f"),
        "refine": lambda row: form(row["refine_evals"], ".0f"),
        "seconds": lambda row: form(row["seconds"], ".1f"),
        "seen as (source / match / target)": _labels,
    },
    "spectrum": {
        "image": lambda row: cut(row["image_id"], 36),
        "status": lambda row: row["status"],
        "largest": lambda row: form(row["sigma_max"], ".4g"),
        "rank": _rank,
        "nullity": lambda row: form(row["nullity"], ",d"),
        "eff. rank": lambda row: form(row["effective_rank"], ".1f"),
        "error bound": lambda row: short(max((b for b in row["error_bound"] or [] if b is not None), default=None)),
        "zeros": _zeros,
        "seconds": lambda row: form(row["seconds"], ".1f"),
    },
    "lipschitz": {
        "direction": lambda found: found["kind"],
        "resolved": lambda found: f"{found['resolved']} of {found['count']}",
        **{name: _quantile(k) for k, name in enumerate(("least", "25 %", "median", "75 %", "largest"))},
        "largest |Jv|": lambda found: form(found["largest_jvp"], ".3g"),
        "linear to": lambda found: form(found["linearity_radius"], ".2g"),
    },
    "walk": {
        "image": lambda walk: cut(walk["image_id"], 36),
        "status": lambda walk: walk["status"],
        "steps": lambda walk: str(walk["steps"]),
        "L2 before": lambda walk: form(walk["start_l2"], ".3g"),
        "L2": lambda walk: form(walk["l2"], ".3g"),
        "length": lambda walk: form(walk["arc_length"], ".3g"),
        "PSNR dB": lambda walk: form(walk["psnr_db"], ".1f"),
        "drift": lambda walk: short(walk["largest_drift"]),
        "as PNG": lambda walk: short(walk["largest_drift_8bit"]),
        "remaining": lambda walk: form(walk["remaining"], ".3g"),
        "evals": lambda walk: form(walk["num_evals"], ".0f"),
        "seen as": lambda walk: " > ".join(map(_first, walk["labels"])) or "–",
    },
}


def _lines(outcome: RunOutcome) -> list[Mapping[str, Any]]:
    """Return one mapping for each line of the table of a run."""
    analysis = outcome.analysis
    if analysis == "match":
        return [row | {"refine_evals": outcome.refine_evals.get(row["pair_id"])} for row in outcome.rows]
    if analysis == "lipschitz":
        return [found | {"kind": kind} for kind, found in outcome.summary.get("kinds", {}).items()]
    return list(outcome.rows if analysis == "spectrum" else outcome.summary.get("walks", []))


def print_outcome(outcome: RunOutcome, failures: Mapping[str, Any], check: str) -> None:
    """Print a finished run: a table, the verdict, the failures, its files, and the command that verifies it."""
    from hf_equiv.runs.schema import LAYOUTS

    console, lines = _console(), _lines(outcome)
    table, columns = Table(box=None, pad_edge=False, header_style="bold"), list[list[str]]()
    for name, cell in _COLUMNS[outcome.analysis].items():
        cells, text = [cell(line) for line in lines[:MAX_ROWS]], not columns or name.startswith(("seen as", "zeros"))
        if set(cells) <= {"–"} and text:
            continue
        left = text or name == "status"
        table.add_column(name, justify="left" if left else "right", no_wrap=not text, overflow="fold")
        columns.append(cells)
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    if len(lines) > MAX_ROWS:
        console.print(f"… and {len(lines) - MAX_ROWS} more")
    console.print()
    for sentence in (outcome.summary["verdict"], *reasons(failures)):
        console.print(sentence, soft_wrap=not console.is_terminal)
    console.print()
    if (outcome.out / "figures").is_dir():
        console.print(f"pictures:  {outcome.out}/figures")
    console.print(f"rows:      {outcome.out}/{LAYOUTS[outcome.analysis].folder}\ncheck it:  {check}")


def failures(outcome: RunOutcome) -> dict[str, list[str]]:
    """Return the ids of the pairs or images that failed, by status and cause."""
    from hf_equiv.results import Status
    from hf_equiv.runs.schema import LAYOUTS

    found: dict[str, list[str]] = {}
    for row in outcome.failed:
        status, name = row["status"], row[LAYOUTS[outcome.analysis].item]
        why = outcome.errors.get(name) if status == Status.ERROR else None
        ids = found.setdefault(f"{status}: {why or Status(status).advice}", [])
        ids += [name] if name not in ids else []
    return dict(sorted(found.items()))


def reasons(failures: Mapping[str, list[str]]) -> list[str]:
    """Return one sentence for each cause, with the number and the first of its pairs or images."""
    return [f"{why} ({len(ids)}: {some(ids, 3)})" for why, ids in failures.items()]


def print_summary(report: Report, path: Path) -> None:
    """Print a few sentences of a report on each checkpoint, and the files that it is in."""
    from hf_equiv.report.claims import say

    console = _console()
    for model in report.models:
        console.print(cut(model.title, 100), style="bold")
        for sentence in say("summary", model):
            console.print(f"- {sentence}", soft_wrap=not console.is_terminal)
        console.print()
    for problem in report.problems:
        console.print(f"not complete: {problem}")
    console.print(f"report:    {path}\nmarkdown:  {path.with_suffix('.md')}")


# --- verify, publish, deploy ---


def print_verification(report: DatasetReport, where: str) -> None:
    """Print the problems and the verdict of each run of a dataset, those of its card, and the verified commit."""
    _print_text("verification", report=report, place=where)


def print_publication(done: Published) -> None:
    """Print what was published, or what a dry run would publish."""
    from hf_equiv.runs.schema import LAYOUTS

    config = LAYOUTS[done.run.split("-")[0]].folder
    _print_text("publication", done=done, sent=_sent(done), commit=str(done.commit)[:8], config=config)


def print_deployment(done: SpaceDeployment) -> None:
    """Print what was deployed, or what a dry run would deploy."""
    _print_text("deployment", done=done, sent=_sent(done), commit=str(done.commit)[:8])


def _sent(done: Published | SpaceDeployment) -> str:
    """Return the amount of a commit in words."""
    new = len(done.uploaded)
    told = f"{new} of {done.files} files" if new < done.files else f"{done.files} files"
    told += f", {size(sum(count for _, count in done.uploaded))}"
    return told + (f", {len(done.deleted)} removed" if done.deleted else "")


def print_facts(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Print nested facts as an indented list, each setting of the image processor on a line."""
    processor = json.loads(facts.get("model", {}).get("processor", "{}"))
    _print_text("facts", facts=facts, processor=processor)


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
