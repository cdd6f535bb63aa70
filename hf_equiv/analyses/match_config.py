"""The options of `match`."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hf_equiv.analyses.config import DTYPES, BaseConfig, Load
from hf_equiv.analyses.pairs import Item, Reader, name_pairs
from hf_equiv.analyses.stages import HALF, Draft
from hf_equiv.checks import NORMS, check_choice, check_count, check_positive, check_radius, check_rtol
from hf_equiv.data.image_set import ImageSet
from hf_equiv.data.resampling import view_of
from hf_equiv.data.sources import DEFAULT_PAIRS
from hf_equiv.data.text_set import TextSet, load_texts
from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.solvers import Adam, GradientDescent
from hf_equiv.runs.schema import Row
from hf_equiv.through.transformations import read_transformations

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

SOLVERS: dict[str, Any] = {"lbfgs": LBFGS, "adam": Adam, "gd": GradientDescent}
_GOAL, _GOAL_THROUGH = 1e-5, 0.05  # `rtol` by default, and where the match is to survive transformations
TEXTS = Path(__file__).parents[1] / "assets" / "texts.txt"  # a text is ranked among these and the others of its run
_FULL_BYTES = 10_000_000  # about those of a PNG file of 6 megapixels


@dataclass(frozen=True)
class MatchConfig(BaseConfig):
    """Options of `match`; `dtype` may also be `bfloat16` (`bf16`) or `float16`, for the early iterations only.

    Attributes:
        pairs: number of pairs to draw from `data`.
        solver: `lbfgs`, `adam` or `gd`.
        radius: radius of the ball about the source: half-width (linf) or L2 length.
        norm: norm of the ball, `linf` or `l2`; None for `linf`, and without a ball.
        rtol: embedding error ‖f(x)−z‖/‖z‖ at which a match is finished; None for 1e-5, and with `through` for 0.05,
            because a nearer match survives less.
        max_evals: evaluations allowed per image.
        refine: refine the match on the 8-bit lattice; otherwise it is rounded.
        labels: class names for zero-shot classification.
        through: transformations that the match should survive, such as `jpeg:60-95` and `resize:0.5`.
        compile: match with `torch.compile`; the plain encoder still computes every number.
        full_size: also write each match as a file of the size of its source photo.
        target_text: text whose embedding the images should have, or a .txt file with one for each source; in place of
            `target`, for models of images and texts.
        texts: .txt file of texts to draw pairs with the images of `data` from.
    """

    analysis: ClassVar[str] = "match"

    pairs: int | None = None
    solver: str = "lbfgs"
    radius: float | None = None
    norm: str | None = None
    rtol: float | None = None
    max_evals: int = 1000
    refine: bool = True
    labels: tuple[str, ...] | None = None
    through: tuple[str, ...] | None = None
    compile: bool = False
    full_size: bool = False
    target_text: str | None = None
    texts: str | None = None

    @property
    def wants_text(self) -> bool:
        """Whether the targets are texts."""
        return self.target_text is not None or self.texts is not None

    @property
    def goal(self) -> float:
        """`rtol`, or its default."""
        return self.rtol or (_GOAL if self.through is None else _GOAL_THROUGH)

    @property
    def ball_norm(self) -> str:
        """`norm`, or `linf` if none was stated."""
        return self.norm or "linf"

    def check(self) -> None:
        """Refuse options that no run can have, before a checkpoint is loaded."""
        check_choice(self.solver, "solver", SOLVERS)
        check_choice(self.ball_norm, "norm", NORMS)
        check_choice(self.half or self.dtype, "dtype", (*DTYPES, *HALF))
        check_rtol(self.goal if self.rtol is None else self.rtol)
        check_count(self.max_evals, "max_evals")
        super().check()
        if self.norm is not None and self.radius is None:
            raise ValueError(f"`norm` must come with `radius`; got {self.norm!r} alone. Add a radius or leave it out.")
        if self.ball_norm == "linf":
            check_radius(self.radius, self.ball_norm, 1)
        elif self.radius is not None:  # its limit depends on the image size of the checkpoint
            check_positive(self.radius, "radius")
        if self.full_size and not self.refine:
            raise ValueError("`full_size` must come with the 8-bit refinement; got `no_refine`. Leave one of them out.")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"`labels` must be at least two different names; got {', '.join(self.labels)!r}.")
        if self.through is not None:
            read_transformations(self.through)
        if self.texts is not None and self.data is None:
            raise ValueError("`texts` must come with `data`: pairs are drawn of both. Or use `target_text`.")
        if self.target is not None and self.wants_text:
            raise ValueError("`target` must not be combined with a text as target. Give one or the other.")
        target = self.target or self.target_text
        if self.data is not None and (self.source is not None or target is not None):
            raise ValueError("`data` must not be combined with `source` and `target`. Give one or the other.")
        if (self.source is None) != (target is None):
            given, other = ("source", "target") if target is None else ("target", "source")
            raise ValueError(
                f"`{given}` must come with `{other}`; got `{given}` alone. Give both, or --data W --pairs N."
            )
        if self.pairs is not None and self.data is None:
            raise ValueError("`pairs` must come with `data`: pairs are drawn from a set. Add --data W.")
        if self.streaming and self.data is None:
            raise ValueError("`streaming` must come with `data`, a Hub dataset of which to fetch the first images.")
        if self.pairs is not None:
            check_count(self.pairs, "pairs")

    def drafts(self, encoder: Encoder) -> tuple[Draft, ...]:
        """Return the cheaper forms of the encoder: half precision first, then compiled."""
        drafts = []
        if self.half is not None:
            dtype, rtol = HALF[self.half]
            drafts.append(Draft(encoder.in_dtype(dtype), rtol, 0.2))
        if self.compile:
            name = os.environ.get("CXX") or "g++"
            if shutil.which(name) is None:
                raise ValueError(
                    f"`compile` must have a C++ compiler; {name!r} was not found. Install one, name it in the "
                    "environment variable CXX, or leave `compile` out."
                )
            drafts.append(Draft(torch.compile(encoder.__call__), 0.0, 1.0))
        return tuple(drafts)

    def open_images(self, load: Load) -> tuple[ImageSet, ImageSet | TextSet]:
        """Open the set to draw from, or sources and targets."""
        text = self.target_text or self.texts
        if text is not None:
            return load(self.data or self.source, streaming=self.streaming), load_texts(text)
        if self.data is not None:
            most = max(100, 4 * (self.pairs or DEFAULT_PAIRS))
            images = load(self.data, most=most, streaming=self.streaming)
            return images, images
        if self.source is not None and self.target is not None:
            return load(self.source), load(self.target)
        photos = load("builtin")
        return photos.select([0]), photos.select([1])  # cat -> coffee

    def list_items(self, reader: Reader, images: ImageSet, targets: ImageSet | TextSet | None) -> tuple[Item, ...]:
        """Read each image once and list the pairs."""
        if isinstance(targets, TextSet):
            reader.check_texts(targets)
        drawn = self.data is not None
        return name_pairs(reader, images, targets or images, drawn=drawn, n=self.pairs, seed=self.seed)

    def settings_of_items(self, items: Sequence[Item]) -> Row:
        """Return the settings that state the number of pairs."""
        texts = [text for item in items if (text := item.columns.get("target_text")) is not None]
        named = {"target_texts": list(dict.fromkeys(texts))} if self.wants_text else {}
        return {"drawn": self.data is not None, "num_pairs": len(items), **named}

    def settings(self, encoder: Encoder) -> Row:
        """Return the other settings of this verb, with defaults filled in; refuse those that do not fit the encoder."""
        from hf_equiv.models.zero_shot import PROMPT  # brings transformers along

        if self.full_size and hasattr(encoder, "parts"):
            raise ValueError(
                "`full_size` must come with one model; got several, whose image processors would see the file "
                "differently. Leave it out."
            )
        check_radius(self.radius, self.ball_norm, math.prod(encoder.input_shape))
        usual: list[str] = []
        if self.wants_text:
            if hasattr(encoder, "parts") or not encoder.normalize:
                raise ValueError(
                    "`target_text` must come with one encoder of unit embeddings, since texts are compared by their "
                    "direction. Load it with `normalize=True`."
                )
            with suppress(OSError, ValueError):  # a tokenizer of another language
                encoder.embed_texts(texts := load_texts(os.fspath(TEXTS)).texts)
                usual = list(texts)
        if self.labels is not None:  # refuse a model without text tower at once
            grey = torch.full((1, *encoder.input_shape), 128 / 255, device=encoder.device, dtype=encoder.dtype)
            with torch.no_grad():
                encoder.classify(grey, self.labels)
        if self.full_size and hasattr(encoder, "preprocess"):  # refuse a processor that cannot be followed at once
            view_of(encoder, *(2 * side for side in encoder.input_shape[:0:-1]))
        start = ([f"{self.half} start"] if self.half else []) + (["compiled"] if self.compile else [])
        return {
            "solver": ", ".join([self.solver, *start]),
            "solver_parameters": json.dumps(asdict(SOLVERS[self.solver]()), sort_keys=True, default=str),
            "radius": self.radius,
            "norm": self.ball_norm,
            "rtol": self.goal,
            "max_evals": self.max_evals,
            "refine": self.refine,
            "labels": list(self.labels) if self.labels else None,
            **({"prompt": PROMPT} if self.labels else {}),
            **({"through": list(self.through)} if self.through else {}),
            **({"full_size": True} if self.full_size else {}),
            **({"usual_texts": usual} if self.wants_text else {}),
        }

    def item_bytes(self, encoder: Encoder, settings: Row) -> int:
        """Return the bytes of three images and a float image, and about those of a file of full size."""
        return math.prod(encoder.input_shape) * (3 + encoder.dtype.itemsize) + self.full_size * _FULL_BYTES
