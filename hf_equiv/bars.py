"""Show a progress bar in a terminal or a notebook, unless the caller has a hook of its own or wants no bar."""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from hf_equiv.results import Progress

Hook = Callable[..., None]
Read = Callable[..., tuple[float, str]]  # turns the arguments of a hook into the share done, in [0, 1], and a text

_WORST = 1e3  # embedding error of an image that has none yet, as the start of its share


@contextmanager
def shown(progress: Hook | bool | None, title: str, read: Read) -> Iterator[Hook | None]:
    """Yield the caller's hook, or one that moves a bar, or None without a bar.

    None asks for a bar where somebody watches: stderr is a terminal, or this is a notebook. False asks for no bar, True
    for one anywhere.

    Raises:
        TypeError: `progress` is something else.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        told = f"got {type(progress).__name__}. Leave it out for a bar in a terminal or notebook"
        raise TypeError(f"`progress` must be a function, True, False or None; {told}.")
    bar = None if callable(progress) or not _is_wanted(progress) else _open(title)
    if bar is None:
        yield progress if callable(progress) else None
        return

    begun = False

    def move(*state: Any) -> None:
        nonlocal begun
        share, text = read(*state)
        if not begun:  # what an earlier run has done says nothing about the pace of this one
            begun, bar.initial = True, 100 * share
        bar.set_postfix_str(text, refresh=False)
        bar.update(max(0.0, 100 * share - bar.n))

    try:
        yield move
    finally:
        bar.total = bar.n  # a notebook paints a bar red that closes early, but a match may end at any evaluation
        bar.close()


def _is_wanted(progress: bool | None) -> bool:
    if progress is not None:
        return progress
    if multiprocessing.parent_process() is not None:  # a forked notebook has no connection of its own to the page
        return False
    return "ipykernel" in sys.modules or bool(sys.stderr is not None and sys.stderr.isatty())


def _open(title: str) -> Any:
    with suppress(ImportError):  # the numerics need torch alone
        from tqdm.auto import tqdm

        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(total=100.0, desc=title, leave=False, bar_format=layout, dynamic_ncols=True)
    return None


def count(done: int, total: int) -> tuple[float, str]:
    """Read the hook of counted work."""
    return done / max(1, total), f"{done} of {total}"


def errors_to(rtol: float) -> Read:
    """Return the reader of a match: the share is that of the way from the first error to `rtol`, on a log scale."""
    first: torch.Tensor | None = None

    def read(state: Progress) -> tuple[float, str]:
        nonlocal first
        errors, active = state.errors.cpu(), state.active.cpu()
        logs = errors.nan_to_num(nan=_WORST).clamp(rtol, _WORST).log()
        first = logs if first is None else first
        shares = ((first - logs) / (first - math.log(rtol)).clamp(min=1e-9)).clamp(0, 1)
        shares[~active] = 1.0
        known = errors[errors.isfinite()]
        told = [f"error {float(known.max()):.1e}"] if len(known) else []
        told += [f"{float(state.num_evals.sum()):.0f} evaluations"]
        told += [f"{int((~active).sum())} of {len(active)} done"] if len(active) > 1 else []
        return float(shares.mean()), ", ".join(told)

    return read
