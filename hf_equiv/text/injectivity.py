"""Measure how near the embeddings of different texts come to each other, beside the rounding of the encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_equiv import bars
from hf_equiv.text.encoder import TextEncoder

PRECISIONS: dict[str, Callable[[TextEncoder], TextEncoder]] = {
    "float32": lambda f: f.in_dtype(torch.float32),
    "bfloat16": lambda f: f.in_dtype(torch.bfloat16),
    "int8": lambda f: f.in_dtype(torch.float32).quantized(8),
    "int4": lambda f: f.in_dtype(torch.float32).quantized(4),
}
"""Forms of an encoder: the two types of its arithmetic, and weights rounded to 8 and 4 bits with float32 arithmetic."""

_NOISY = 64  # texts whose embeddings are compared with float64
_BLOCK = 256  # rows of a block of distances


@dataclass(frozen=True, slots=True)
class NearestTexts:
    """The two of some texts whose embeddings are nearest to each other, in one precision.

    Attributes:
        precision: a key of `PRECISIONS`.
        distance: ‖f(a) − f(b)‖ of the nearest pair, in units of the mean norm of an embedding.
        pair: the two texts.
        noise: the largest ‖f(a) − f₆₄(a)‖ of 64 texts in the same units, with f₆₄ the same weights in float64.
        median: the median distance of all pairs, in the same units.
        num_pairs: pairs of texts of different tokens that were compared.
        seconds: wall time.
    """

    precision: str
    distance: float
    pair: tuple[str, str]
    noise: float
    median: float
    num_pairs: int
    seconds: float

    @property
    def collides(self) -> bool:
        """Whether the nearest embeddings are no further apart than rounding moves both of them."""
        return self.distance <= 2 * self.noise


def find_nearest_texts(
    f: TextEncoder,
    texts: Sequence[str],
    *,
    precisions: Sequence[str] = tuple(PRECISIONS),
    progress: bars.Hook | bool | None = None,
) -> tuple[NearestTexts, ...]:
    """Find the two texts whose embeddings are nearest, in several precisions.

    For the texts a of a set, computes min ‖f(a) − f(b)‖ over all pairs of different tokens, and the rounding noise of f
    beside it. A distance above twice the noise shows that f tells these texts apart: no collision among them. It says
    nothing of other texts, nor of token embeddings that belong to no text, where level sets are large.

    Cost: one embedding of each text in each precision, one by one, and N²·D/2 products.

    Args:
        f: the text encoder.
        texts: at least two texts; those with the tokens of an earlier one are left out.
        precisions: keys of `PRECISIONS`.
        progress: called with the texts done and all, or True or False for a bar.

    Returns:
        One record for each precision.

    Raises:
        TypeError: no strings.
        ValueError: an unknown precision, a text that the encoder refuses, or fewer than two different texts.

    References:
        Nikolaou et al. (2025), arXiv:2510.15511.
    """
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise ValueError(f"`precisions` must be among {', '.join(PRECISIONS)}; got {unknown[0]!r}.")
    if isinstance(texts, str):
        raise TypeError("`texts` must be a sequence of strings; got a single one. Pass [text, …].")
    kept = [*{tuple(f.tokenize(text)): text for text in reversed(texts)}.values()][::-1]
    if len(kept) < 2:
        raise ValueError(f"`texts` must hold at least two texts of different tokens; got {len(kept)}. Add some.")
    with bars.shown(progress, "embed", bars.count) as hook:
        total = len(kept) * len(precisions)
        return tuple(
            _nearest(PRECISIONS[name](f), name, kept, partial(_tell, hook, i * len(kept), total))
            for i, name in enumerate(precisions)
        )


def _tell(hook: bars.Hook | None, before: int, total: int, done: int) -> None:
    if hook is not None:
        hook(before + done, total)


def _nearest(f: TextEncoder, precision: str, texts: Sequence[str], tell: Callable[[int], None]) -> NearestTexts:
    began, rows = time.perf_counter(), []
    for done, text in enumerate(texts, 1):
        rows.append(f.encode([text])[0].double())
        tell(done)
    z = torch.stack(rows)
    unit = float(z.norm(dim=1).mean())
    some = range(0, len(texts), max(1, len(texts) // _NOISY))
    exact = f.in_dtype(torch.float64).encode([texts[i] for i in some])
    noise = float((z[list(some)] - exact).norm(dim=1).max())
    distance, pair, median = _distances(z)
    return NearestTexts(
        precision, distance / unit, (texts[pair[0]], texts[pair[1]]), noise / unit, median / unit,
        len(texts) * (len(texts) - 1) // 2, time.perf_counter() - began,
    )  # fmt: skip


def _distances(z: Tensor) -> tuple[float, tuple[int, int], float]:
    """Return the smallest distance of two rows (N, D), their places, and the median of a sample of all distances."""
    best, pair, sample = float("inf"), (0, 1), []
    for first in range(0, len(z), _BLOCK):
        rows = z[first : first + _BLOCK]
        table = torch.cdist(rows, z[first:], compute_mode="donot_use_mm_for_euclid_dist")  # exact for near rows
        later = torch.ones_like(table).triu(1).bool()
        table = table.masked_fill(~later, float("inf"))
        sample.append(table[later][:: 1 + len(z) // 2000])
        if len(sample[-1]) and float(table.min()) < best:
            best, place = float(table.min()), int(table.argmin())
            pair = (first + place // table.shape[1], first + place % table.shape[1])
    return best, pair, float(torch.cat(sample).median())
