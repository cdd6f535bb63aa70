"""What a user asks of a match run, and what of it no run could do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_equiv import checks
from hf_equiv.checks import NORMS, check_positive, check_radius, check_rtol
from hf_equiv.geometry.levelset import HEADINGS, TO_AN_IMAGE
from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.solvers import Adam, GradientDescent
from hf_equiv.matching.stages import HALF

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

SOLVERS: dict[str, type[LBFGS] | type[Adam] | type[GradientDescent]] = {
    "lbfgs": LBFGS,
    "adam": Adam,
    "gd": GradientDescent,
}


DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that changes a number of a match run, as the user states it.

    Attributes:
        model: Hub id, folder or `builtin`.
        revision: commit, branch or tag of the Hub repository.
        readout: which output of the checkpoint is the embedding; `auto` takes what users compare.
        normalize: divide the embedding by its L2 norm.
        dtype: `float32` or `float64`; `bfloat16` (or `bf16`) and `float16` are for the early iterations of a match
            only: its end, and every number, is float32.
        compile: match with the encoder compiled by `torch.compile`; every number is still that of the plain encoder.
        source: images to start from (with `target`); see `load_images`.
        target: images whose embedding is wanted: one for all sources, or as many as there are sources.
        data: images to draw pairs from, instead of `source` and `target`.
        pairs: how many pairs to draw from `data`.
        streaming: of a Hub dataset in `data`, fetch only the first images: 4 for each pair, at least 100. Done unasked
            where its files are larger than 5 GB.
        image_column: image column of a parquet file or dataset.
        label_column: class column of a parquet file or dataset.
        solver: `lbfgs`, `adam` or `gd`.
        radius: half-width (linf) or radius (l2) of the ball about the source, pixels in [0, 1]; None for no ball.
        norm: of the ball, `linf` or `l2`; None without a ball, and for `linf`.
        rtol: embedding error ‖f(x)−z‖/‖z‖ at which a match is finished.
        max_evals: evaluations allowed per image.
        refine: refine the match on the 8-bit lattice; otherwise it is rounded.
        labels: class names for zero-shot classification.
        seed: seed of the pair draw and of the half-step noise on targets.
    """

    model: str = "builtin"
    revision: str | None = None
    readout: str = "auto"
    normalize: bool = False
    dtype: str = "float32"
    compile: bool = False
    source: str | None = None
    target: str | None = None
    data: str | None = None
    pairs: int | None = None
    streaming: bool = False
    image_column: str | None = None
    label_column: str | None = None
    solver: str = "lbfgs"
    radius: float | None = None
    norm: str | None = None
    rtol: float = 1e-5
    max_evals: int = 1000
    refine: bool = True
    labels: tuple[str, ...] | None = None
    seed: int = 0

    @property
    def half(self) -> str | None:
        """Type of the early iterations, where it is another than that of the numbers."""
        name = {"bf16": "bfloat16"}.get(self.dtype, self.dtype)
        return name if name in HALF else None

    @property
    def ball_norm(self) -> str:
        """`norm`, or `linf` where none was stated."""
        return self.norm or "linf"

    def check(self) -> None:
        """Refuse what no run could do, before a checkpoint is loaded.

        Raises:
            ValueError: with the option and what it must be.
        """
        for name, value, allowed in (
            ("solver", self.solver, tuple(SOLVERS)),
            ("norm", self.ball_norm, NORMS),
            ("dtype", self.half or self.dtype, (*DTYPES, *HALF)),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {value!r}.")
        check_rtol(self.rtol)
        if self.max_evals < 1:
            raise ValueError(f"`max_evals` must be at least 1; got {self.max_evals}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must be 0 or more; got {self.seed}.")
        if self.norm is not None and self.radius is None:
            raise ValueError(f"`norm` must come with `radius`; got {self.norm!r} alone. Add a radius or leave it out.")
        if self.ball_norm == "linf":
            check_radius(self.radius, self.ball_norm, 1)
        elif self.radius is not None:  # how long it may be depends on the image size of the checkpoint
            check_positive(self.radius, "radius")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"`labels` must be at least two different names; got {', '.join(self.labels)!r}.")
        if self.data is not None and (self.source is not None or self.target is not None):
            raise ValueError("`data` must not be combined with `source` and `target`. Give one or the other.")
        if (self.source is None) != (self.target is None):
            given, other = ("source", "target") if self.target is None else ("target", "source")
            raise ValueError(
                f"`{given}` must come with `{other}`; got `{given}` alone. Give both, or --data W --pairs N."
            )
        if self.pairs is not None and self.data is None:
            raise ValueError("`pairs` must come with `data`: pairs are drawn from a set. Add --data W.")
        if self.streaming and self.data is None:
            raise ValueError("`streaming` must come with `data`: a Hub dataset of which to fetch the first images.")
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"`pairs` must be at least 1; got {self.pairs}.")


# What a user asks of a spectrum, lipschitz or walk run, and what of it no run could do.


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
