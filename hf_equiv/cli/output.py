"""Print results for a person or a program: tables, sentences and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_equiv.cli import environment
from hf_equiv.cli.options import with_flags
from hf_equiv.cli.streams import writing
from hf_equiv.formatting import cut, duration, printable, some, text_templates

if TYPE_CHECKING:
    from hf_equiv.analyses.run import RunOutcome
    from hf_equiv.report.page import Report

MAX_ROWS = 20

_GAP = 2  # columns between two columns of a table

_OF_WORDS = ("source", "image", "direction", "seen as", "zeros")
"""Prefixes of the table columns that hold text. All other columns except `status` hold numbers."""


_NO_WIDTH, _LEAST_WIDTH = 10_000, 24  # columns of a file, and of the narrowest terminal that tables are made for


class SafeConsole(Console):
    """A console that makes text printable, and reads no markup or emoji names in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string to be printed."""
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """Let `writing` handle a closed pipe."""
        raise


def _console() -> SafeConsole:
    """Return a console for stdout that does not break lines; a file has no width."""
    if not sys.stdout.isatty():
        return SafeConsole(width=_NO_WIDTH, soft_wrap=True)
    console = SafeConsole(soft_wrap=True)
    console.width = max(_LEAST_WIDTH, console.width)
    return console


def print_json(value: Any) -> None:
    """Print one JSON object in ASCII, which any terminal and any encoding takes; NaN is refused, not written."""
    with writing(sys.stdout) as stream:
        stream.write(json.dumps(value, allow_nan=False) + "\n")


def print_text(template: str, **values: Any) -> None:
    """Print a text template of the package."""
    with writing(sys.stdout) as stream:
        stream.write(_templates().get_template(f"{template}.txt.jinja").render(values))


@cache
def _templates() -> Any:
    texts = text_templates()
    texts.filters |= {"flags": _flagged, "loads": json.loads, "plain": _plain}
    return texts


def _flagged(text: str) -> str:
    return with_flags(text, click.get_current_context().command.params)


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def print_plan(facts: dict[str, Any], result: dict[str, Any] | None) -> None:
    """Print the facts of a dry run: in words without those that are empty, or beside an empty `result` as JSON."""
    if result is not None:
        print_json(result | {"dry_run": facts})
        return
    of_time = {"parts", "evaluations", "device", "seconds_per_evaluation", "estimated_seconds"}
    if_any = ("_error", "_images", "choices")
    words = facts | {"unusable_images": some(facts["unusable_images"], 10), "choices": "; ".join(facts["choices"])}
    told = {key: value for key, value in words.items() if key not in of_time and (value or not key.endswith(if_any))}
    for name, part in facts.get("parts", {}).items():
        seconds = facts["evaluations"][name] * facts["seconds_per_evaluation"]
        told[name] = part + (f", about {duration(max(1, round(seconds)))}" if facts["evaluations"][name] else "")
    print_text("facts", facts={"would do": told | {"time": time_in_words(facts)}})


def time_in_words(facts: dict[str, Any]) -> str:
    """Return the estimated time of a dry run with its reasons."""
    where = "this busy machine" if facts["device"] == "cpu" and environment.notes else facts["device"]
    count, each = sum(facts["evaluations"].values()), 1000 * facts["seconds_per_evaluation"]
    total = duration(round(facts["estimated_seconds"]))
    return f"about {total}: roughly {count:,} evaluations, {each:.3g} ms each as timed now on {where}"


def print_outcome(outcome: RunOutcome, failures: Mapping[str, Any], check: str) -> None:
    """Print a finished run: a table, the verdict, the failures, its files, and the command that verifies it."""
    from hf_equiv.runs.schema import LAYOUTS

    console, lines = _console(), _lines(outcome)
    with writing(sys.stdout):
        for table in _tables(outcome.analysis, lines[:MAX_ROWS], console.width):
            console.print(table, soft_wrap=False)
            if len(lines) > MAX_ROWS:
                console.print(f"… and {len(lines) - MAX_ROWS} more")
            console.print()
        for sentence in (outcome.summary["verdict"], *reasons(failures)):
            console.print(sentence, soft_wrap=not console.is_terminal)
        console.print()
        if (outcome.out / "figures").is_dir():
            console.print(f"pictures:  {outcome.out}/figures")
        console.print(f"rows:      {outcome.out}/{LAYOUTS[outcome.analysis].folder}")
        console.print(f"check it:  {check}")


def _lines(outcome: RunOutcome) -> list[Mapping[str, Any]]:
    """Return one mapping for each line of the table of a run."""
    if outcome.analysis == "match":
        return [row | {"refine_evals": outcome.refine_evals.get(row["pair_id"])} for row in outcome.rows]
    if outcome.analysis == "lipschitz":
        return [found | {"kind": kind} for kind, found in outcome.summary.get("kinds", {}).items()]
    return list(outcome.rows if outcome.analysis == "spectrum" else outcome.summary.get("walks", []))


def _tables(analysis: str, lines: Iterable[Mapping[str, Any]], width: int) -> Iterator[Table]:
    """Yield the table of a run, in several parts where it is wider than the terminal: no number is ever cut."""
    template = _templates().get_template("run_table.txt.jinja")
    columns: dict[str, list[str]] = {}
    for line in lines:
        for cell in template.render(analysis=analysis, line=line).strip().splitlines():
            name, _, text = cell.partition(": ")
            columns.setdefault(name, []).append(text)
    names = [name for name, cells in columns.items() if {*cells} != {"–"}]
    if not names:
        return
    first, *others = names
    part, used = [first], _room(first, columns, width)
    for name in others:
        room = _GAP + _room(name, columns, width)
        if used + room > width and len(part) > 1:
            yield _table(part, columns)
            part, used = [first], _room(first, columns, width)
        part.append(name)
        used += room
    yield _table(part, columns)


def _room(name: str, columns: Mapping[str, Sequence[str]], width: int) -> int:
    """Return the least width of a column: that of its longest number; words can be folded."""
    longest = max(cell_len(text) for text in (name, *columns[name]))
    return min(longest, width // 3) if name.startswith(_OF_WORDS) else longest


def _table(names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for name in names:
        words = name.startswith(_OF_WORDS)
        left = words or name == "status"
        table.add_column(name, justify="left" if left else "right", no_wrap=not words, overflow="fold")
    for row in zip(*(columns[name] for name in names), strict=True):
        table.add_row(*row)
    return table


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
    """Return one sentence for each cause, with the number of its pairs or images and the first ones."""
    return [f"{_flagged(why)} ({len(ids)}: {some(ids, 3)})" for why, ids in failures.items()]


def print_summary(report: Report, path: Path) -> None:
    """Print a few sentences of a report on each checkpoint, and the names of its files."""
    from hf_equiv.report.claims import say
    from hf_equiv.runs.schema import LAYOUTS

    console = _console()
    with writing(sys.stdout):
        for model in report.models:
            console.print(cut(model.title, 100), style="bold")
            for sentence in say("summary", model):
                console.print(f"- {sentence}", soft_wrap=not console.is_terminal)
            console.print()
            for run in model.runs:
                if not run["complete"]:
                    what = LAYOUTS[run["analysis"]].listed
                    console.print(f"partial:   {run['name']} holds {run['there']} of {run['listed']} {what}")
        for problem in report.problems:
            console.print(f"not complete: {problem}")
        console.print(f"report:    {path}")
        console.print(f"markdown:  {path.with_suffix('.md')}")
