"""Show the progress of work on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from hf_equiv.cli.environment import calm, is_first
from hf_equiv.cli.output import SafeConsole
from hf_equiv.cli.streams import to_stderr
from hf_equiv.formatting import cut, cut_name, duration, many, short

if TYPE_CHECKING:
    from hf_equiv.runs.execute import Observer, RunProgress

LINE_EVERY = 15.0  # seconds between plain lines when stderr is not a terminal
SEARCH, SEARCH_IN_BALL = 300, 800  # usual evaluations of a float match; those in a small ball do not converge
MATCHING = 0.75  # a first guess, for the time left, of the share of a match before its refinement


def say(lines: Iterable[str], *, quiet: bool) -> None:
    """Print notes before a run, in the first process only."""
    for line in lines if is_first() and not quiet else ():
        to_stderr(line)


_STATE, _STAGE, _BAR = 30, 13, 9  # columns for the longest state, the stage and the bar; the others are for names
_NARROW = 72  # columns below which there is no bar


def _bars() -> Progress:
    console = SafeConsole(stderr=True)
    bar = [BarColumn(bar_width=_BAR - 1)] if console.width >= _NARROW else []
    parts = TextColumn("{task.description}"), *bar, TextColumn("{task.fields[state]}")
    return Progress(*parts, console=console, transient=True, refresh_per_second=4)


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
        self.pace = _Pace()
        self.room = min(36, bars.console.width - _STATE - _STAGE - (_BAR if bars.console.width >= _NARROW else 0))

    def __call__(self, p: RunProgress) -> None:
        left = self.pace.left(p)
        if p.stage in ("note", "info"):
            self.bars.console.print(_message(p))
            return
        clock = f"{duration(round(self.pace.elapsed))} so far" if left is None else f"{duration(round(left))} left"
        state = f"{count(p.done, p.total)}, {clock}"
        self.bars.update(self.whole, total=p.total, completed=p.done + self.pace.share, state=state)
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
                state = f"error {short(float(p.errors[place]))}, {p.num_evals[place]:.0f} evals"
                state += ", done" if done else ""
                shown = {"total": 1 if done else None, "completed": int(done), "state": state}
            description = f"  {p.stage} {escape(cut_name(name, self.room)) if self.room >= 12 else ''}"
            self.bars.update(self.images[name], description=description, **shown)


class _Pace:
    """The time left, from the rows made so far and the share that is done of those in work."""

    def __init__(self) -> None:
        self.start: tuple[float, int] | None = None
        self.failed = 0  # rows that take no time
        self.parts: dict[str, float] = {}  # the part that is done of each row in work
        self.share = 0.0  # their sum
        self.saved: set[str] = set()
        self.elapsed = 0.0
        self.guessed = True  # whether the guess for a match still holds for one in work

    def left(self, p: RunProgress) -> float | None:
        """Count a state in, and return the seconds left if they are known."""
        now = time.monotonic()
        self.start = self.start or (now, p.done)
        self.elapsed = now - self.start[0]
        self.failed += p.stage == "note"
        if p.stage == "saved":
            self.saved |= {*p.pair_ids}
        elif p.steps:
            self.parts = {p.pair_ids[0]: p.step / p.steps}
        elif p.stage in ("through", "match") and p.num_evals is not None and p.active is not None:
            parts = (p.num_evals / SEARCH).masked_fill(~p.active.to(p.num_evals.device), 1.0).clamp(max=MATCHING)
            self.parts = dict(zip(p.pair_ids, parts.tolist(), strict=True))
            self.guessed = bool((parts < MATCHING).any())
        self.share = sum(part for name, part in self.parts.items() if name not in self.saved)
        made = self.made(p.done) + self.share
        known = made > 0 and self.elapsed > 0 and (self.guessed or self.made(p.done) > 0)
        return self.elapsed * (p.total - p.done - self.share) / made if known else None

    def made(self, done: int) -> int:
        """Return the number of rows that took time."""
        return done - (self.start[1] if self.start else done) - self.failed


class _Lines:
    """A line at the start, after each shard, and every few seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.last = time.monotonic()
        self.pace = _Pace()

    def __call__(self, p: RunProgress) -> None:
        left = self.pace.left(p)
        told = f", {duration(round(left))} left" if left is not None else ""
        if p.stage in ("note", "info"):
            line = _message(p)
        elif p.stage == "saved":
            line = f"{count(p.done, p.total)} {self.what} on disk{told if p.done < p.total else ''}"
        elif time.monotonic() - self.last < LINE_EVERY:
            return
        elif p.errors is not None and p.num_evals is not None:
            known = p.errors[p.errors.isfinite()]
            worst, images = short(float(known.max()) if len(known) else None), many(len(p.pair_ids), "image")
            line = f"{count(p.done, p.total)}: {p.stage} {images}, worst error {worst}, "
            line += f"{float(p.num_evals.max()):.0f} evaluations{told}"
        elif p.steps:
            line = f"{count(p.done, p.total)}: {p.pair_ids[0]}, {p.stage} {count(p.step, p.steps)}{told}"
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
                task, room = bars.add_task("", total=None, state=""), max(8, bars.console.width - 30)
                yield lambda done, total, step: bars.update(  # before anything is done the bar only shows activity
                    task, description=escape(cut(step, room)), completed=done, total=total if done else None,
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
