"""What a match run will do, settled before anything is computed: settings, pairs, and where the rows go."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.analyses.config import SOLVERS, AnalysisConfig, RunConfig, default_directions, parse_directions
from hf_equiv.analyses.pairs import Pair, Subject, read_pair, read_subject, settle_pairs, settle_subjects
from hf_equiv.checks import check_radius
from hf_equiv.data.image_set import ImageSet
from hf_equiv.data.sources import BUILTIN_PHOTOS, DEFAULT_PAIRS, load_images
from hf_equiv.geometry.levelset import STOP, TO_AN_IMAGE
from hf_equiv.geometry.secants import RADII
from hf_equiv.matching.stages import HALF, Draft
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.runs.directory import default_folder, settings_hash
from hf_equiv.runs.schema import LAYOUTS, Layout

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder


def drafts_of(encoder: Encoder, half: str | None, *, compiled: bool) -> tuple[Draft, ...]:
    """Make the drafts of an encoder: half precision first, then compiled.

    Args:
        encoder: f.
        half: a key of `HALF`, or None.
        compiled: whether to compile the encoder.

    Returns:
        The drafts in the order of use.

    Raises:
        ValueError: there is no C++ compiler to compile with.
    """
    drafts = []
    if half is not None:
        dtype, rtol = HALF[half]
        drafts.append(Draft(encoder.in_dtype(dtype), rtol, 0.2))
    if compiled:
        name = os.environ.get("CXX") or "g++"
        if shutil.which(name) is None:
            raise ValueError(
                f"`compile` must have a C++ compiler; {name!r} was not found. Install one, name it in the environment "
                "variable CXX, or leave `compile` out."
            )
        drafts.append(Draft(torch.compile(encoder.__call__), 0.0, 1.0))
    return tuple(drafts)


@dataclass(frozen=True)
class MatchPlan:
    """A settled run: the encoder, the images, the list of pairs, and settings without any local path.

    Attributes:
        settings: everything that changes a number, with ids and revisions in place of paths; kept in `run.json`.
        provenance: the provenance columns, equal in every row.
        drafts: cheaper forms of the encoder that matches start with.
    """

    config: RunConfig
    encoder: Encoder
    sources: ImageSet
    targets: ImageSet
    pairs: tuple[Pair, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    drafts: tuple[Draft, ...] = ()

    @property
    def hash8(self) -> str:
        """First eight hex digits of the SHA-256 of the settings."""
        return settings_hash(self.settings)

    @property
    def default_out(self) -> Path:
        """`runs/match/MODEL-slug/HASH8`."""
        return default_folder("match", self.settings)

    @property
    def choices(self) -> tuple[str, ...]:
        """A sentence on each thing about the images that was settled because nobody had named it."""
        return tuple(dict.fromkeys(self.sources.choices + self.targets.choices))

    def pixels(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Source and target as the encoder sees them, each (3, H, W) on the k/255 grid, on the CPU.

        Returns:
            The two images.

        Raises:
            ValueError: an image cannot be read, or the two are the same.
        """
        return read_pair(self.encoder, self.sources, self.targets, pair)


def make_plan(
    config: RunConfig, encoder: Encoder, *, cache_dir: str | None = None, local_files_only: bool = False
) -> MatchPlan:
    """Open the images, settle the pairs, and check everything that can be checked without matching.

    Every image of the pairs is read once here. Named ones that are bad are refused before any work, all in one message;
    one that was drawn from `data` costs its own rows only, which get status `error`. Drawn pairs never have two photos
    of equal pixels.

    Args:
        config: the run as the user states it.
        encoder: the loaded checkpoint.
        cache_dir: where downloads are kept.
        local_files_only: never ask the Hub.

    Returns:
        The plan, ready for `run_match`.

    Raises:
        ValueError: bad options or images, a named source equal to its target, or counts that do not fit.
        FileNotFoundError: a path does not exist.
    """
    from hf_equiv.models.zero_shot import PROMPT  # brings transformers along

    config.check()
    channels, height, width = encoder.input_shape
    check_radius(config.radius, config.ball_norm, channels * height * width)
    if config.labels is not None:
        _check_labels(encoder, config.labels)

    def load(what: str) -> ImageSet:
        return load_images(
            what,
            most=max(100, 4 * (config.pairs or DEFAULT_PAIRS)) if config.data is not None else None,
            streaming=config.streaming,
            image_column=config.image_column,
            label_column=config.label_column,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    if config.data is not None:
        sources = targets = load(config.data)
    elif config.source is not None and config.target is not None:
        sources, targets = load(config.source), load(config.target)
    else:
        sources, targets = (load("builtin").select([k]) for k in (0, 1))  # cat -> coffee
    refuse_columns(config.image_column, config.label_column, sources, targets)
    pairs = settle_pairs(encoder, sources, targets, drawn=config.data is not None, n=config.pairs, seed=config.seed)
    same = sources is targets or (sources.data_id, sources.data_revision) == (targets.data_id, targets.data_revision)
    data_id = sources.data_id if same else f"{sources.data_id} + {targets.data_id}"
    revision = sources.data_revision if same else f"{sources.data_revision} + {targets.data_revision}"
    solver = SOLVERS[config.solver]()
    known = {k: _text(v) for k, v in encoder.provenance.items()}
    settings: dict[str, Any] = {
        **encoder_settings(encoder, normalize=config.normalize),
        "data_id": data_id,
        "data_revision": revision,
        "drawn": config.data is not None,
        "num_pairs": len(pairs),
        "image_column": config.image_column,
        "label_column": config.label_column,
        "solver": ", ".join(
            [
                config.solver,
                *([f"{config.half} start"] if config.half else []),
                *(["compiled"] if config.compile else []),
            ]
        ),
        "solver_parameters": _text(asdict(solver)),
        "radius": config.radius,
        "norm": config.ball_norm,
        "rtol": config.rtol,
        "max_evals": config.max_evals,
        "refine": config.refine,
        "labels": list(config.labels) if config.labels else None,
        **({"prompt": PROMPT} if config.labels else {}),
        "seed": config.seed,
        "schema_version": SCHEMA_VERSION,
    }
    shared = ("data_id", "data_revision", "norm", "radius", "rtol", "solver", "seed", "schema_version")
    provenance = known | {key: settings[key] for key in shared}
    drafts = drafts_of(encoder, config.half, compiled=config.compile)
    return MatchPlan(config, encoder, sources, targets, pairs, settings, provenance, drafts)


def encoder_settings(encoder: Encoder, *, normalize: bool = False) -> dict[str, Any]:
    """What of the encoder changes a number; a readout that no pixel changes is refused."""
    known = {k: _text(v) for k, v in encoder.provenance.items()}
    _refuse_constant(encoder)
    keys = ("model_id", "model_revision", "readout", "dtype", "attention", "processor")
    return {**{k: known[k] for k in keys}, "normalize": normalize}


def _refuse_constant(encoder: Encoder) -> None:
    """Refuse a readout that no pixel changes."""
    grey = torch.full((2, *encoder.input_shape), 0.5, device=encoder.device, dtype=encoder.dtype)
    grey[1] += torch.linspace(-0.5, 0.5, grey[1].numel()).view_as(grey[1]).to(grey)
    with torch.no_grad():
        z = encoder(grey)
    if torch.equal(z[0], z[1]):
        raise ValueError(
            f"`readout` must depend on the image; {encoder.readout!r} of '{encoder.model_id}' is the same for all (a "
            "class token that no layer has changed yet). Use readout='auto'."
        )


def refuse_columns(image_column: str | None, label_column: str | None, *sets: ImageSet) -> None:
    """Refuse columns where no set is a table."""
    given = {"image_column": image_column, "label_column": label_column}
    columns = [name for name, value in given.items() if value is not None]
    if columns and not any(images.tabular for images in sets):
        raise ValueError(
            f"`{columns[0]}` must come with a parquet file or a dataset; {sets[0].data_id!r} has no columns. "
            "Leave it out."
        )


def _check_labels(encoder: Encoder, labels: Sequence[str]) -> None:
    """One zero-shot classification of a grey image, so that a model without text tower refuses at once."""
    grey = torch.full((1, *encoder.input_shape), 128 / 255, device=encoder.device, dtype=encoder.dtype)
    with torch.no_grad():
        encoder.classify(grey, labels)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


# What a spectrum, lipschitz or walk run will do, settled before anything is computed: images, options, folder.


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
