"""Bound the memory of Jacobians, and go on in smaller parts where memory runs out."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

MEMORY = 4 * 2**30  # most bytes of the Jacobians held at once, by default

S = TypeVar("S")
T = TypeVar("T")


def images_within(memory: int, dim: int, image: Tensor) -> int:
    """Return how many images like this one have Jacobians (`dim`, N) within `memory` bytes; 0 if not even one."""
    return memory // (dim * image.numel() * image.element_size())


def check_memory(image: Tensor, dim: int) -> None:
    """Require that the Jacobian of an image and D×D work fit into the memory of the machine or GPU."""
    size = image.numel()
    need = dim * size * image.element_size() + 4 * 8 * dim * dim
    if image.is_cuda:
        free = int(torch.cuda.mem_get_info(image.device)[0])
        free += torch.cuda.memory_reserved(image.device) - torch.cuda.memory_allocated(image.device)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > 0.8 * free:
        raise ValueError(
            f"`images` must have a Jacobian that fits into memory; {dim}×{size} takes {need / 2**30:.0f} GiB of "
            f"{free / 2**30:.0f}. Use a readout with fewer dimensions, such as 'cls' or 'mean'; for singular values "
            "alone, pass `k=`."
        )


def unless_memory(*kinds: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the errors that an `except` clause names, or none while the error at hand is a lack of memory."""
    return () if isinstance(sys.exception(), MemoryError | torch.OutOfMemoryError) else kinds


def halved(
    call: Callable[[Sequence[S]], T], items: Sequence[S]
) -> Iterator[tuple[Sequence[S], T | torch.OutOfMemoryError]]:
    """Yield some items with the result of `call`: all at once, or in halves where memory runs out.

    An item that alone runs out of memory comes with its error.
    """
    found: T | torch.OutOfMemoryError
    try:
        found = call(items)
    except torch.OutOfMemoryError as error:
        found = error.with_traceback(None)  # which keeps memory alive
    if isinstance(found, torch.OutOfMemoryError) and len(items) > 1:
        yield from halved(call, items[: len(items) // 2])
        yield from halved(call, items[len(items) // 2 :])
    else:
        yield items, found


class Parts:
    """Calls of f on all images of a batch at once, in smaller parts once memory has run out."""

    most: int | None = None  # images in a part

    def __call__(self, call: Callable[[slice], tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
        """Return the tensors of `call` for `count` images; NaN for one that alone runs out of memory, unless all do."""
        size, made = self.most or count, list[tuple[Tensor, ...] | torch.OutOfMemoryError]()
        for start in range(0, count, size):
            places = range(start, min(start + size, count))
            made += (found for _, found in halved(lambda some: call(slice(some[0], some[-1] + 1)), places))
        good = [found for found in made if isinstance(found, tuple)]
        if not good:
            raise next(found for found in made if not isinstance(found, tuple))
        if len(made) == 1:
            return good[0]
        self.most = max(len(found[0]) for found in good)
        none = tuple(like.new_full((1, *like.shape[1:]), math.nan) for like in good[0])
        columns = zip(*(found if isinstance(found, tuple) else none for found in made), strict=True)
        return tuple(torch.cat(column) for column in columns)
