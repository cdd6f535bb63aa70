"""Progress of the work on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_equiv.cli.environment import is_first
from hf_equiv.cli.output import to_stderr
from hf_equiv.formatting import cut, size

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from hf_equiv.runs.execute import Observer, RunProgress

LINE_EVERY = 15.0
"""Seconds between plain lines when stderr is no terminal."""


def say(lines: Iterable[str], *, quiet: bool) -> None:
    """Print what a person should know before a run; of several processes the first does."""
    for line in lines if is_first() and not quiet else ():
        to_stderr(line)


def exit_code(done: bool, why: str, *, quiet: bool) -> int:
    """Return 0 or 1, and explain the 1 where a launcher would report it as a crash."""
    if not done and os.environ.get("WORLD_SIZE", "1") != "1":
        say([f"exit code 1: {why} All rows are on disk; the launcher reports the code as a failure."], quiet=quiet)
    return 0 if done else 1


def _bars(*columns: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), *columns, console=Console(stderr=True),
        transient=True, refresh_per_second=4,
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
        with _bars(TextColumn("{task.fields[state]}"), TimeElapsedColumn(), TimeRemainingColumn()) as bars:
            yield _Bars(bars, what)
    else:  # the bar of the first process counts the rows of all
        lines = _Lines(what)
        yield lambda p: lines(p) if p.stage == "note" else None


class _Pace:
    """Rows a minute and time left, from the rows made since the first call.

    Failed rows are left out, because an image that cannot be read takes no time.
    """

    def __init__(self) -> None:
        self.start: tuple[float, int] | None = None
        self.failed = 0

    def tell(self, done: int, total: int) -> str:
        """Return the pace in words; nothing before the first row, and no time left after the last."""
        now = time.monotonic()
        self.start = self.start or (now, done)
        made, seconds = done - self.start[1] - self.failed, now - self.start[0]
        if made <= 0 or seconds <= 0:
            return ""
        rate, left = 60 * made / seconds, seconds * (total - done) / made
        pace = f"{float(f'{rate:.3g}'):,.0f}" if rate >= 100 else f"{rate:.3g}"
        return f"{pace} a minute" + (f", {_duration(left)} left" if done < total else "")


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{hours:.1f} h"


class _Bars:
    """One bar for the run, and one for each image of the batch."""

    def __init__(self, bars: Progress, what: str) -> None:
        self.bars = bars
        self.whole = bars.add_task(what, total=None, state="")
        self.stage = ""
        self.images: dict[str, Any] = {}
        self.pace = _Pace()

    def __call__(self, p: RunProgress) -> None:
        if p.stage in ("note", "info"):
            self.pace.failed += p.stage == "note"
            self.bars.console.print(_message(p), highlight=False, markup=False)
            return
        pace = self.pace.tell(p.done, p.total).split(", ")[0]
        state = f"{p.done} of {p.total}" + (f", {pace}" if pace else "")
        self.bars.update(self.whole, total=p.total, completed=p.done, state=state)
        if p.stage != self.stage or set(p.pair_ids) != set(self.images):
            self._show(p.stage, () if p.stage == "saved" else p.pair_ids)
        if p.steps:
            for task in self.images.values():
                self.bars.update(task, total=p.steps, completed=p.step, state=f"{p.step} of {p.steps}")
        if p.stage == "saved" or p.errors is None or p.num_evals is None or p.active is None:
            return
        for name, error, evals, active in zip(
            p.pair_ids, p.errors.tolist(), p.num_evals.tolist(), p.active.tolist(), strict=True
        ):
            state = f"error {error:.1e}  {evals:.0f} evaluations{'' if active else '  done'}"
            self.bars.update(self.images[name], state=state, total=None if active else 1, completed=int(not active))

    def _show(self, stage: str, names: Iterable[str]) -> None:
        for task in self.images.values():
            self.bars.remove_task(task)
        self.stage = stage
        self.images = {
            name: self.bars.add_task(f"  {stage} {escape(cut(name, 36))}", total=None, state="") for name in names
        }


class _Lines:
    """A line at the start, after each shard, and every few seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.last = time.monotonic()
        self.pace = _Pace()

    def __call__(self, p: RunProgress) -> None:
        if p.stage in ("note", "info"):
            self.pace.failed += p.stage == "note"
            line = _message(p)
        elif p.stage == "saved":
            pace = self.pace.tell(p.done, p.total)
            line = f"{p.done} of {p.total} {self.what} on disk" + (f" ({pace})" if pace else "")
        elif time.monotonic() - self.last < LINE_EVERY:
            return
        elif p.errors is not None and p.num_evals is not None:
            known = p.errors[p.errors.isfinite()]
            worst = f"{float(known.max()):.1e}" if len(known) else "–"
            line = f"{p.done} of {p.total}: {p.stage} {len(p.pair_ids)} images, worst error {worst}, "
            line += f"{float(p.num_evals.max()):.0f} evaluations"
        elif p.steps:
            line = f"{p.done} of {p.total}: {p.pair_ids[0]}, {p.stage} {p.step} of {p.steps}"
        else:
            return
        to_stderr(f"rank {p.rank}: {line}" if p.processes > 1 else line)
        self.last = time.monotonic()


def _message(p: RunProgress) -> str:
    return f"error: {p.message}" if p.stage == "note" else p.message


# --- other work ---


@contextlib.contextmanager
def steps(*, quiet: bool, amount: Callable[[int, int], str]) -> Iterator[Callable[[int, int, str], None]]:
    """Show the current step of the work and its amount: a bar on a terminal, lines elsewhere."""
    if quiet:
        yield lambda done, total, step: None
    elif sys.stderr.isatty():
        with _bars(TextColumn("{task.fields[amount]}"), TimeElapsedColumn()) as bars:
            task = bars.add_task("", total=None, amount="")

            def show(done: int, total: int, step: str) -> None:  # before anything is done the bar only shows activity
                bars.update(task, description=escape(cut(step, 60)), completed=done, total=total if done else None)
                bars.update(task, amount=amount(done, total))

            yield show
    else:
        last, latest = 0.0, ""

        def line(done: int, total: int, step: str) -> None:
            nonlocal last, latest
            if step != latest or time.monotonic() - last >= LINE_EVERY:
                latest, last = step, time.monotonic()
                to_stderr(", ".join(filter(None, (step, amount(done, total)))))

        yield line


def count(done: int, total: int) -> str:
    """Return the amount of counted work."""
    return f"{done} of {total}"


def sent(done: int, total: int) -> str:
    """Return the amount of an upload: the total before the first bytes are sent, then the part."""
    if not total or done >= total:
        return ""
    return f"{size(done)} of {size(total)}" if done else size(total)
