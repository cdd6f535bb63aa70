"""Define and check the options that several verbs share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_equiv.analyses.pairs import Item, Reader, name_images
from hf_equiv.analyses.stages import HALF, Draft
from hf_equiv.checks import check_choice, check_count
from hf_equiv.data.image_set import ImageSet
from hf_equiv.formatting import JOINED
from hf_equiv.runs.schema import Row

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Load = Callable[..., ImageSet]  # `load_images`, with the columns and the cache of the run filled in


@dataclass(frozen=True)
class BaseConfig:
    """Options that change a number of a run, as the user states them.

    Attributes:
        model: Hub id, folder or `builtin`, or the name of an imported model; the encoder of the plan overrides it.
            Several are joined by " + ", as are their revisions and readouts.
        import_: function `package:function` that made the encoder, if the user imported it.
        revision: commit, branch or tag of the Hub repository.
        readout: output of the checkpoint that is the embedding; `auto` takes the usual one.
        normalize: divide the embedding by its L2 norm; the encoder of the plan overrides it.
        dtype: `float32` or `float64`.
        source: images to start from or to analyse; see `load_images`.
        target: images to match or to walk to: one for all sources, or as many as sources.
        data: a set to draw from, instead of `source`.
        streaming: fetch only the first images of the Hub dataset `data`; done unasked above 5 GB of files.
        image_column: image column of a parquet file or dataset.
        label_column: class column of a parquet file or dataset.
        seed: seed of every random draw.
    """

    analysis: ClassVar[str]

    model: str = "builtin"
    import_: str | None = None
    revision: str | None = None
    readout: str = "auto"
    normalize: bool = False
    dtype: str = "float32"
    source: str | None = None
    target: str | None = None
    data: str | None = None
    streaming: bool = False
    image_column: str | None = None
    label_column: str | None = None
    seed: int = 0

    @property
    def models(self) -> list[str]:
        """The name of each model."""
        return self.model.split(JOINED)

    @property
    def half(self) -> str | None:
        """Half-precision type of the early iterations, if one is asked for; every number is float32."""
        name = {"bf16": "bfloat16"}.get(self.dtype, self.dtype)
        return name if name in HALF else None

    def check(self) -> None:
        """Refuse options that no run can have, before a checkpoint is loaded."""
        check_count(self.seed, "seed", 0)

    def drafts(self, encoder: Any) -> tuple[Draft, ...]:
        """Return the cheaper forms of the encoder that a match starts with, in the order of use."""
        return ()


@dataclass(frozen=True)
class ImageConfig(BaseConfig):
    """Options that the analyses of single images share: spectrum, lipschitz and walk.

    Attributes:
        limit: images to draw from `data`; None for all.
    """

    wants_target: ClassVar[str]  # names the options that need a target, for an error message

    limit: int | None = None

    @property
    def needs_target(self) -> bool:
        """Whether each image needs a target."""
        return False

    def check(self) -> None:
        """Refuse options that no run can have, before a checkpoint is loaded."""
        if self.half is not None:
            raise ValueError(
                f"`dtype` must be one of {', '.join(DTYPES)}; got {self.dtype!r}. Half precision is for the early "
                "iterations of `match` alone: derivatives would drown in its rounding."
            )
        check_choice(self.dtype, "dtype", DTYPES)
        super().check()
        if self.data is not None and self.source is not None:
            raise ValueError("`data` must not be combined with `source`. Give one or the other.")
        if self.limit is not None and self.data is None:
            raise ValueError("`limit` must come with `data`: it draws from a set. Add --data W.")
        if self.streaming and (self.data is None or self.limit is None):
            raise ValueError("`streaming` must come with `data` and `limit`, the number of images to fetch.")
        if self.limit is not None:
            check_count(self.limit, "limit")
        if self.target is not None and not self.needs_target:
            raise ValueError(f"`target` must come with {self.wants_target}; got {self.target!r} without. Leave it out.")

    def open_images(self, load: Load) -> tuple[ImageSet, ImageSet | None]:
        """Open the images and their targets; the built-in photos are the default."""
        named = self.data or self.source
        images = load(named or "builtin", limit=self.limit, seed=self.seed, streaming=self.streaming)
        if not self.needs_target:
            return images, None
        if self.target is None:
            return self.usual_targets(images, load)
        targets = load(self.target)
        return images.select([0]) if named is None and len(targets) == 1 else images, targets  # the cat

    def usual_targets(self, images: ImageSet, load: Load) -> tuple[ImageSet, ImageSet]:
        """Return the images and their targets where none are named: the built-in cat and coffee."""
        return images.select([0]), images.select([1])

    def list_items(self, reader: Reader, images: ImageSet, targets: ImageSet | None) -> tuple[Item, ...]:
        """Read each image once and list the images with their targets."""
        return name_images(reader, images, targets, drawn=self.data is not None)

    def settings_of_items(self, items: Sequence[Item]) -> Row:
        """Return the settings that name the images of the run."""
        names, targets = [item.name for item in items], [item.columns["target_id"] for item in items]
        target_ids = _digest(targets) if self.needs_target else None
        return {"num_images": len(items), "image_ids": _digest(names), "target_ids": target_ids}


def _digest(names: Sequence[str | None]) -> str:
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:16]
