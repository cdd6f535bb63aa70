"""What a spectrum, lipschitz or walk run will do, settled before anything is computed: images, options, folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_equiv import checks
from hf_equiv.analysisconfig import AnalysisConfig, default_directions, parse_directions
from hf_equiv.data import load_images
from hf_equiv.imageset import ImageSet
from hf_equiv.layouts import LAYOUTS
from hf_equiv.levelset import STOP, TO_AN_IMAGE
from hf_equiv.pairs import Subject, read_subject, settle_subjects
from hf_equiv.photofiles import BUILTIN_PHOTOS
from hf_equiv.plan import default_folder, encoder_settings, refuse_columns, settings_hash
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.secants import RADII
from hf_equiv.shards import Layout

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder


@dataclass(frozen=True)
class AnalysisPlan:
    """A settled run: the encoder, the images, and settings without any local path.

    Attributes:
        settings: everything that changes a number, with ids and revisions in place of paths; kept in `run.json`.
        provenance: the provenance columns, equal in every row.
    """

    config: AnalysisConfig
    encoder: Encoder
    images: ImageSet
    targets: ImageSet | None
    subjects: tuple[Subject, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def layout(self) -> Layout:
        """Folder and columns of the rows."""
        return LAYOUTS[self.config.analysis]

    @property
    def hash8(self) -> str:
        """First eight hex digits of the SHA-256 of the settings."""
        return settings_hash(self.settings)

    @property
    def default_out(self) -> Path:
        """`runs/VERB/MODEL-slug/HASH8`."""
        return default_folder(self.config.analysis, self.settings)

    @property
    def choices(self) -> tuple[str, ...]:
        """A sentence on each thing about the images that was settled because nobody had named it."""
        return tuple(dict.fromkeys(self.images.choices + (self.targets.choices if self.targets else ())))

    @property
    def item_bytes(self) -> int:
        """Bytes of the images and float images of one subject, at most."""
        config, size = self.config, math.prod(self.encoder.input_shape)
        whole = size * self.encoder.dtype.itemsize
        if config.analysis == "spectrum":
            return size + whole * (config.k or 8) * config.vectors
        if config.analysis == "lipschitz":
            return (size + whole) * sum(self.settings["directions"].values())  # the image is in every row
        return (size + whole) * (config.num_steps + 1) + 2 * whole

    def pixels(self, subject: Subject) -> tuple[Tensor, Tensor | None]:
        """The image and its target as the encoder sees them, each (3, H, W) on the k/255 grid, on the CPU."""
        target = None
        if self.targets is not None and subject.target is not None:
            target = read_subject(self.encoder, self.targets, subject.target)
        return read_subject(self.encoder, self.images, subject.index), target


def make_analysis_plan(
    config: AnalysisConfig, encoder: Encoder, *, cache_dir: str | None = None, local_files_only: bool = False
) -> AnalysisPlan:
    """Open the images, read each once, and check everything that can be checked without computing.

    Args:
        config: the run as the user states it.
        encoder: the loaded checkpoint.
        cache_dir: where downloads are kept.
        local_files_only: never ask the Hub.

    Returns:
        The plan, ready for `run_analysis`.

    Raises:
        ValueError: bad options or images.
        FileNotFoundError: a path does not exist.
    """
    config.check()
    if config.k is not None and config.k > encoder.embedding_dim:
        raise ValueError(f"`k` must be at most the embedding size {encoder.embedding_dim}; got {config.k}.")
    if config.analysis == "lipschitz" and config.directions is not None:
        asked = parse_directions(config.directions).get("top", 0)
        if asked > encoder.embedding_dim:
            raise ValueError(
                f"top:K of `directions` must ask for at most {encoder.embedding_dim}, the embedding size; got {asked}."
            )
    checks.check_radius(config.regional, config.ball_norm, math.prod(encoder.input_shape), "regional")

    def load(what: str, limit: int | None = None, *, streaming: bool = False) -> ImageSet:
        return load_images(
            what, limit=limit, seed=config.seed, image_column=config.image_column, label_column=config.label_column,
            cache_dir=cache_dir, local_files_only=local_files_only, streaming=streaming,
        )  # fmt: skip

    images = load(config.data or config.source or "builtin", config.limit, streaming=config.streaming)
    targets: ImageSet | None = None
    if config.target is not None:
        targets = load(config.target)
        if config.source is None and config.data is None and len(targets) == 1:
            images = images.select([0])  # the cat
    elif config.needs_target and config.analysis == "walk":
        targets, images = images.select([1]), images.select([0])  # cat -> coffee
    elif config.needs_target and len(images) == 1:
        other = BUILTIN_PHOTOS.index("cat" if images.ids[0] == "coffee" else "coffee")
        targets = load_images("builtin").select([other])
    elif config.needs_target:
        targets = images
    refuse_columns(config.image_column, config.label_column, *(s for s in (images, targets) if s is not None))
    subjects = settle_subjects(encoder, images, targets, drawn=config.data is not None)
    same = targets is None or (targets.data_id, targets.data_revision) == (images.data_id, images.data_revision)
    two = (images,) if same or targets is None else (images, targets)
    own = _own_settings(config, encoder)
    settings: dict[str, Any] = {
        **encoder_settings(encoder, normalize=config.normalize),
        "data_id": " + ".join(s.data_id for s in two),
        "data_revision": " + ".join(s.data_revision for s in two),
        "num_images": len(subjects),
        "image_ids": _digest(s.image_id for s in subjects),
        "target_ids": None if targets is None else _digest(s.target_id for s in subjects),
        "image_column": config.image_column,
        "label_column": config.label_column,
        **own,
        "seed": config.seed,
        "schema_version": SCHEMA_VERSION,
    }
    provenance: dict[str, Any] = encoder_settings(encoder) | {"versions": encoder.provenance["versions"]}
    provenance |= {key: settings[key] for key in ("data_id", "data_revision", "seed", "schema_version")}
    provenance |= {
        "norm": own.get("norm"),
        "radius": own.get("regional"),
        "rtol": own.get("rtol"),
        "solver": own.get("solver"),
    }
    del provenance["normalize"]
    return AnalysisPlan(config, encoder, images, targets, subjects, settings, provenance)


def _digest(names: Iterable[str | None]) -> str:
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:16]


def _own_settings(config: AnalysisConfig, encoder: Encoder) -> dict[str, Any]:
    """The options of this analysis, with defaults filled in."""
    if config.analysis == "spectrum":
        return {"k": config.k, "vectors": config.vectors}
    if config.analysis == "lipschitz":
        kinds = parse_directions(config.directions) if config.directions else default_directions(encoder)
        return {
            "directions": kinds,
            "radii": list(config.radii or RADII),
            "regional": config.regional,
            "norm": None if config.regional is None else config.ball_norm,
            "linearity": config.linearity,
            **({"solver": "lbfgs", "rtol": config.rtol} if "match" in kinds else {}),
        }
    return {
        "heading": config.heading,
        "step": config.step,
        "num_steps": config.num_steps,
        "rtol": config.rtol,
        **({"stop": config.stop or STOP} if config.heading in TO_AN_IMAGE else {}),
        "solver": "lbfgs" if config.heading in ("nearest", "connect") else None,  # they start from a match
    }
