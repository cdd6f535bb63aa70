"""What a user asks of a match run, and what of it no run could do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_equiv.checks import NORMS, check_positive, check_radius, check_rtol
from hf_equiv.solvers import LBFGS, Adam, GradientDescent
from hf_equiv.stages import HALF

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
