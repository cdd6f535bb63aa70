"""What a user asks of a spectrum, lipschitz or walk run, and what of it no run could do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_equiv import checks
from hf_equiv.levelset import HEADINGS, TO_AN_IMAGE
from hf_equiv.runconfig import DTYPES
from hf_equiv.stages import HALF

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder

ANALYSES = ("spectrum", "lipschitz", "walk")
DIRECTIONS = "random:64,top:8,row:8,null:64,gradient,toward"
SINGLE = ("gradient", "toward", "match")
"""Kinds of which there is one."""

_COUNTED = ("random", "top", "row", "null")


@dataclass(frozen=True, slots=True)
class AnalysisConfig:
    """Everything that changes a number of a run, as the user states it.

    Attributes:
        analysis: `spectrum`, `lipschitz` or `walk`.
        model: Hub id, folder or `builtin`.
        revision: commit, branch or tag of the Hub repository.
        readout: which output of the checkpoint is the embedding.
        normalize: divide the embedding by its L2 norm.
        dtype: `float32` or `float64`.
        source: images to analyse, see `load_images`; by default the built-in photos.
        data: a set of images to draw `limit` from, instead of `source`.
        limit: how many images of `data`; None for all.
        streaming: of a Hub dataset in `data`, fetch only the first `limit` images. Done unasked where its files are
            larger than 5 GB.
        target: what walks head for: one image for all, or as many as there are; for lipschitz that of the directions
            `toward` and `match`.
        image_column: image column of a parquet file or dataset.
        label_column: class column of a parquet file or dataset.
        seed: of every random draw.
        k: spectrum: how many singular values; None for all.
        vectors: spectrum: keep the singular vectors of the first `k`, or 8.
        directions: lipschitz: kinds with counts, `random:64,top:8,gradient`; `None` for all, fewer where D is small.
        radii: lipschitz: the ladder, ascending, L2 in pixel units.
        regional: lipschitz: radius of the ball to search for the largest constant; None for no search.
        norm: lipschitz: of that ball, `l2` or `linf`; None for `l2`, and without a ball.
        linearity: lipschitz: measure how far the first-order model holds along every direction.
        heading: walk: `random`, `away`, `toward`, `nearest` or `connect`.
        step: walk: longest step, L2 in pixel units.
        num_steps: walk: points after the start.
        rtol: walk: largest drift ‖f(x)−z‖/‖z‖.
        stop: walk towards an image: ‖P_null d‖/‖d‖ at which it is over; None for 0.01, and for other headings.
    """

    analysis: str
    model: str = "builtin"
    revision: str | None = None
    readout: str = "auto"
    normalize: bool = False
    dtype: str = "float32"
    source: str | None = None
    data: str | None = None
    limit: int | None = None
    streaming: bool = False
    target: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    seed: int = 0
    k: int | None = None
    vectors: bool = False
    directions: str | None = None
    radii: tuple[float, ...] | None = None
    regional: float | None = None
    norm: str | None = None
    linearity: bool = False
    heading: str = "random"
    step: float = 1.0
    num_steps: int = 100
    rtol: float = 1e-5
    stop: float | None = None

    def check(self) -> None:
        """Refuse what no run could do, before a checkpoint is loaded.

        Raises:
            ValueError: with the option and what it must be.
        """
        if self.dtype in ("bf16", *HALF):
            raise ValueError(
                f"`dtype` must be one of {', '.join(DTYPES)}; got {self.dtype!r}. Half precision is for the early "
                "iterations of `match` alone: derivatives would drown in its rounding."
            )
        for name, allowed in (("analysis", ANALYSES), ("dtype", DTYPES), ("heading", HEADINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must be 0 or more; got {self.seed}.")
        if self.data is not None and self.source is not None:
            raise ValueError("`data` must not be combined with `source`. Give one or the other.")
        if self.limit is not None and self.data is None:
            raise ValueError("`limit` must come with `data`: it draws from a set. Add --data W.")
        if self.streaming and (self.data is None or self.limit is None):
            raise ValueError(
                "`streaming` must come with `data` and `limit`: how many images of a Hub dataset to fetch."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1; got {self.limit}.")
        if self.k is not None:
            checks.check_count(self.k, "k")
        checks.check_count(self.num_steps, "num_steps")
        measures = (self.step, "step"), (self.rtol, "rtol"), (self.regional, "regional"), (self.stop, "stop")
        for number, name in measures:
            if number is not None:
                checks.check_positive(number, name)
        if self.stop is not None and self.stop >= 1:
            raise ValueError(
                f"`stop` must be below 1; got {self.stop:g}. It is the share of the way that is left at the end."
            )
        if self.norm is not None and self.regional is None:
            raise ValueError(
                f"`norm` must come with `regional`; got {self.norm!r} alone. Add a radius or leave it out."
            )
        if self.radii is not None:
            checks.check_radii(torch.tensor(self.radii, dtype=torch.float64))
        if self.directions is not None:
            parse_directions(self.directions)
        if self.stop is not None and self.heading not in TO_AN_IMAGE:
            raise ValueError(
                f"`stop` must come with heading {', '.join(map(repr, TO_AN_IMAGE))}; got {self.stop:g} with "
                f"{self.heading!r}, which has no end. Leave it out."
            )
        self._check_target()

    @property
    def ball_norm(self) -> str:
        """`norm`, or `l2` where none was stated."""
        return self.norm or "l2"

    def _check_target(self) -> None:
        if self.analysis == "walk" and self.target is None and self.needs_target and (self.source or self.data):
            raise ValueError(f"`target` must come with heading {self.heading!r}. Add --target W, the image to go to.")
        if self.target is not None and not self.needs_target:
            heading, direction = "heading 'toward', 'nearest' or 'connect'", "direction 'toward' or 'match'"
            where = heading if self.analysis == "walk" else direction
            raise ValueError(f"`target` must come with {where}; got {self.target!r} without. Leave it out.")

    @property
    def needs_target(self) -> bool:
        """Whether each image is set against another one."""
        if self.analysis == "walk":
            return self.heading not in ("random", "away")
        kinds = parse_directions(self.directions or DIRECTIONS) if self.analysis == "lipschitz" else {}
        return "toward" in kinds or "match" in kinds


def parse_directions(text: str) -> dict[str, int]:
    """Read `random:64,top:8,gradient`.

    Args:
        text: kinds with a count; `gradient`, `toward` and `match` without.

    Returns:
        Kind to count, in the order given.

    Raises:
        ValueError: an unknown kind, a missing or bad count, a kind given twice.

    Example:
        >>> parse_directions("random:4,gradient")
        {'random': 4, 'gradient': 1}
    """
    kinds: dict[str, int] = {}
    for item in text.split(","):
        name, colon, count = item.strip().partition(":")
        single = name in SINGLE
        if name not in _COUNTED and not single:
            raise ValueError(
                "`directions` must be a list of random:N, top:N, row:N, null:N, gradient, toward, match; "
                f"got {item.strip()!r}."
            )
        if name in kinds or (single and colon) or (not single and not (count.isdecimal() and int(count) > 0)):
            raise ValueError(
                "`directions` must name each kind once, with a count as in random:64 (none for gradient, toward and "
                f"match); got {text!r}."
            )
        kinds[name] = int(count) if count else 1
    return kinds


def default_directions(encoder: Encoder) -> dict[str, int]:
    """The usual directions, with no more rows than a small embedding has (two may be structural zeros)."""
    rows = max(1, encoder.embedding_dim - 2)
    return {k: min(n, rows) if k in ("top", "row") else n for k, n in parse_directions(DIRECTIONS).items()}
