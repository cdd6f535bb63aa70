"""How far the work is: bars on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_equiv.cli.output import in_flags, to_stderr
from hf_equiv.formatting import cut, size

if TYPE_CHECKING:
    from torch import Tensor

    from hf_equiv.runs.execute import Observer, RunProgress

LINE_EVERY = 15.0
"""Seconds between plain progress lines when stderr is no terminal."""


@contextlib.contextmanager
def run_progress(*, quiet: bool, what: str = "matches") -> Iterator[Observer]:
    """Show a run: a bar and one line per image on a terminal, a plain line now and then elsewhere."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty() and not is_first():
        yield _notes  # one bar is enough: it counts the rows of all processes
    elif sys.stderr.isatty():
        with Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            refresh_per_second=4,
        ) as bars:  # fmt: skip
            yield _Bars(bars, what)
    else:
        yield _Lines(what)


def is_first() -> bool:
    """Whether this is the process of a launcher that speaks, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(lines: Iterable[str], *, quiet: bool) -> None:
    """Say what a person should know before a run; of several processes one does."""
    if not quiet and is_first():
        for line in lines:
            to_stderr(in_flags(line))


def exit_code(done: bool, why: str, *, quiet: bool) -> int:
    """0, or 1 with a line on what that means to a launcher, if there is one."""
    if not done and os.environ.get("WORLD_SIZE", "1") != "1":
        say([f"exit code 1: {why}. All rows are there; a launcher calls the code a failure."], quiet=quiet)
    return 0 if done else 1


def _notes(p: RunProgress) -> None:
    if p.stage == "note":
        to_stderr(f"rank {p.rank}: error: {in_flags(p.message)}")


class _Pace:
    """Rows a minute and time left, from what was done since the run began here.

    Rows that failed are left out: an image that cannot be read takes no time.
    """

    def __init__(self) -> None:
        self.start: tuple[float, int] | None = None
        self.failed = 0

    def tell(self, done: int, total: int) -> str:
        """In words, or nothing before the first row and after the last."""
        now = time.monotonic()
        self.start = self.start or (now, done)
        made, seconds = done - self.start[1] - self.failed, now - self.start[0]
        if made <= 0 or seconds <= 0:
            return ""
        left = seconds * (total - done) / made
        return f"{_rate(60 * made / seconds)} a minute" + (f", {_duration(left)} left" if done < total else "")


def _rate(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{hours:.1f} h"


class _Bars:
    """One bar for the run, one line for each image of the batch."""

    def __init__(self, bars: Progress, what: str) -> None:
        self.bars = bars
        self.whole = bars.add_task(what, total=None, state="")
        self.images: dict[str, Any] = {}
        self.stage = ""
        self.pace = _Pace()

    def __call__(self, p: RunProgress) -> None:
        if p.stage in ("note", "info"):
            self.pace.failed += p.stage == "note"
            told = f"{'error: ' * (p.stage == 'note')}{in_flags(p.message)}"
            self.bars.console.print(escape(told), highlight=False)
            return
        pace = self.pace.tell(p.done, p.total)
        state = f"{p.done} of {p.total}" + (f", {pace.split(', ')[0]}" if pace else "")
        self.bars.update(self.whole, total=p.total, completed=p.done, state=state)
        if p.stage == "saved":
            self._clear()
            return
        if p.stage != self.stage or set(p.pair_ids) != set(self.images):
            self._clear()
            self.stage = p.stage
            self.images = {
                name: self.bars.add_task(f"  {p.stage} {escape(cut(name, 36))}", total=None, state="")
                for name in p.pair_ids
            }
        if p.steps:
            for task in self.images.values():
                self.bars.update(task, total=p.steps, completed=p.step, state=f"{p.step} of {p.steps}")
        if p.errors is None or p.num_evals is None or p.active is None:
            return
        for name, error, evals, active in zip(
            p.pair_ids, p.errors.tolist(), p.num_evals.tolist(), p.active.tolist(), strict=True
        ):
            state = f"error {error:.1e}  {evals:.0f} evaluations{'' if active else '  done'}"
            self.bars.update(self.images[name], state=state, total=None if active else 1, completed=int(not active))

    def _clear(self) -> None:
        for task in self.images.values():
            self.bars.remove_task(task)
        self.images = {}
        self.stage = ""


class _Lines:
    """A line at the start, after each shard, and every few seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.last = time.monotonic()
        self.pace = _Pace()

    def __call__(self, p: RunProgress) -> None:
        now, who = time.monotonic(), f"rank {p.rank}: " if p.processes > 1 else ""
        if p.stage == "note":
            self.pace.failed += 1
            to_stderr(f"{who}error: {in_flags(p.message)}")
        elif p.stage == "info":
            to_stderr(f"{who}{in_flags(p.message)}")
        elif p.stage == "saved":
            pace = self.pace.tell(p.done, p.total)
            done = f"{p.done} of {p.total} {'rows' if self.what == 'matches' else self.what} on disk"
            to_stderr(f"{who}{done}{f' ({pace})' if pace else ''}")
        elif now - self.last >= LINE_EVERY and p.errors is not None and p.num_evals is not None:
            to_stderr(
                f"{who}{p.done} of {p.total}: {p.stage} {len(p.pair_ids)} images, worst error {_level(p.errors)}, "
                f"{float(p.num_evals.max()):.0f} evaluations"
            )
        elif now - self.last >= LINE_EVERY and p.steps:
            to_stderr(f"{who}{p.done} of {p.total}: {p.pair_ids[0]}, {p.stage} {p.step} of {p.steps}")
        else:
            return
        self.last = now


def _level(errors: Tensor) -> str:
    known = errors[errors.isfinite()]
    return f"{float(known.max()):.1e}" if len(known) else "–"


@contextlib.contextmanager
def counter(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a simple count on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with Progress(
        TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    ) as bars:  # fmt: skip
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextlib.contextmanager
def staged_counter(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a count for each part of the work, one after the other; on no terminal a line now and then."""
    last = time.monotonic()

    def line(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            to_stderr(f"{what}: {done} of {total}")

    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield line
    else:
        with Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        ) as bars:  # fmt: skip
            tasks: dict[str, Any] = {}

            def bar(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(escape(cut(what, 40)), total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield bar


@contextlib.contextmanager
def transfer(*, quiet: bool, what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show what is being done, with the bytes sent: a bar on a terminal, and lines elsewhere."""
    if quiet:
        yield lambda done, total, now: None
    elif sys.stderr.isatty():
        with Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[sent]}"),
            TimeElapsedColumn(), console=Console(stderr=True), transient=True,
        ) as bars:  # fmt: skip
            task = bars.add_task(what, total=None, sent="")

            def show(done: int, total: int, now: str) -> None:
                # before the first bytes are known to be there the bar says only that something is being done
                bars.update(task, description=escape(now), completed=done, total=total if done else None)
                bars.update(task, sent=_sent(done, total))

            yield show
    else:
        yield _Steps()


class _Steps:
    """A line for each thing that is done, and within one now and then."""

    def __init__(self) -> None:
        self.what, self.last = "", 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if what == self.what and now - self.last < LINE_EVERY:
            return
        self.what, self.last = what, now
        to_stderr(", ".join(part for part in (what, _sent(done, total)) if part))


def _sent(done: int, total: int) -> str:
    """Bytes on the way in words: what there is before the first are there, then how many are."""
    if not total or done >= total:
        return ""
    return f"{size(done)} of {size(total)}" if done else size(total)
