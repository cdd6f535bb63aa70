"""Show the progress of work on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_equiv.cli.environment import calm, is_first
from hf_equiv.cli.output import SafeConsole
from hf_equiv.cli.streams import to_stderr
from hf_equiv.formatting import cut, many, short

if TYPE_CHECKING:
    from hf_equiv.runs.execute import Observer, RunProgress

LINE_EVERY = 15.0
"""Seconds between plain lines when stderr is not a terminal."""


def say(lines: Iterable[str], *, quiet: bool) -> None:
    """Print notes before a run, in the first process only."""
    for line in lines if is_first() and not quiet else ():
        to_stderr(line)


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=SafeConsole(stderr=True), transient=True,
        refresh_per_second=4,
    )  # fmt: skip


# --- a run ---


@contextlib.contextmanager
def run_progress(*, quiet: bool, what: str = "rows") -> Iterator[Observer]:
    """Show a run: a bar and one line per image on a terminal, a plain line now and then elsewhere."""
    if quiet:
        yield lambda _: None
    elif not sys.stderr.isatty():
        yield _Lines(what)
    elif is_first():
        with _bars() as bars:
            yield _Bars(bars, what)
    else:  # the bar of the first process counts the rows of all processes
        lines = _Lines(what)
        yield lambda p: lines(p) if p.stage == "note" else None


class _Bars:
    """One bar for the run, and one for each image of the batch."""

    def __init__(self, bars: Progress, what: str) -> None:
        self.bars = bars
        self.whole = bars.add_task(what, total=None, state="")
        self.images: dict[str, Any] = {}

    def __call__(self, p: RunProgress) -> None:
        if p.stage in ("note", "info"):
            self.bars.console.print(_message(p))
            return
        self.bars.update(self.whole, total=p.total, completed=p.done, state=count(p.done, p.total))
        names = () if p.stage == "saved" else p.pair_ids
        for name in set(self.images) - set(names):
            self.bars.remove_task(self.images.pop(name))
        for place, name in enumerate(names):
            if name not in self.images:
                self.images[name] = self.bars.add_task("", total=None, state="")
            shown: dict[str, Any] = {}
            if p.steps:
                shown = {"total": p.steps, "completed": p.step, "state": count(p.step, p.steps)}
            elif p.errors is not None and p.num_evals is not None and p.active is not None:
                done = not p.active[place]
                state = f"error {short(float(p.errors[place]))}  {p.num_evals[place]:.0f} evaluations"
                state += "  done" if done else ""
                shown = {"total": 1 if done else None, "completed": int(done), "state": state}
            self.bars.update(self.images[name], description=f"  {p.stage} {escape(cut(name, 36))}", **shown)


class _Lines:
    """A line at the start, after each shard, and every few seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.last = time.monotonic()
        self.start: tuple[float, int] | None = None
        self.failed = 0

    def __call__(self, p: RunProgress) -> None:
        if p.stage in ("note", "info"):
            self.failed += p.stage == "note"
            line = _message(p)
        elif p.stage == "saved":
            line = f"{count(p.done, p.total)} {self.what} on disk{self._pace(p.done, p.total)}"
        elif time.monotonic() - self.last < LINE_EVERY:
            return
        elif p.errors is not None and p.num_evals is not None:
            known = p.errors[p.errors.isfinite()]
            worst, images = short(float(known.max()) if len(known) else None), many(len(p.pair_ids), "image")
            line = f"{count(p.done, p.total)}: {p.stage} {images}, worst error {worst}, "
            line += f"{float(p.num_evals.max()):.0f} evaluations"
        elif p.steps:
            line = f"{count(p.done, p.total)}: {p.pair_ids[0]}, {p.stage} {count(p.step, p.steps)}"
        else:
            return
        to_stderr(f"rank {p.rank}: {line}" if p.processes > 1 else line)
        self.last = time.monotonic()

    def _pace(self, done: int, total: int) -> str:
        """Return rows a minute and the time left; failed rows are left out, since they take no time."""
        now = time.monotonic()
        self.start = self.start or (now, done)
        made, seconds = done - self.start[1] - self.failed, now - self.start[0]
        if made <= 0 or seconds <= 0:
            return ""
        rate = 60 * made / seconds
        pace = f"{float(f'{rate:.3g}'):,.0f}" if rate >= 100 else f"{rate:.3g}"
        return f" ({pace} a minute" + (f", {duration(seconds * (total - done) / made)} left)" if done < total else ")")


def duration(seconds: float) -> str:
    """Return a time for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _message(p: RunProgress) -> str:
    return f"error: {p.message}" if p.stage == "note" else p.message


# --- other work ---


@contextlib.contextmanager
def steps(*, quiet: bool, amount: Callable[[int, int], str]) -> Iterator[Callable[[int, int, str], None]]:
    """Show the current step of the work and its amount: a bar on a terminal, lines elsewhere."""
    last, latest = 0.0, ""

    def line(done: int, total: int, step: str) -> None:
        nonlocal last, latest
        if step != latest or time.monotonic() - last >= LINE_EVERY:
            latest, last = step, time.monotonic()
            to_stderr(", ".join(filter(None, (step, amount(done, total)))))

    with calm(quiet=quiet or amount is sent):  # hide the Hub client's bars during an upload
        if quiet:
            yield lambda done, total, step: None
        elif not sys.stderr.isatty():
            yield line
        else:
            with _bars() as bars:
                task = bars.add_task("", total=None, state="")
                yield lambda done, total, step: bars.update(  # before anything is done the bar only shows activity
                    task, description=escape(cut(step, 60)), completed=done, total=total if done else None,
                    state=amount(done, total),
                )  # fmt: skip


def count(done: int, total: int) -> str:
    """Return the amount of counted work."""
    return f"{done} of {total}"


def sent(done: int, total: int) -> str:
    """Return the amount of an upload: the total before the first bytes are sent, then the part."""
    if not total or done >= total:
        return ""
    return f"{decimal(done)} of {decimal(total)}" if done else decimal(total)
