"""What a match run will do, settled before anything is computed: settings, pairs, and where the rows go."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv.checks import check_radius
from hf_equiv.data import DEFAULT_PAIRS, load_images
from hf_equiv.imageset import ImageSet
from hf_equiv.pairs import Pair, read_pair, settle_pairs
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.runconfig import SOLVERS, RunConfig
from hf_equiv.stages import Draft, drafts_of

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder


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
    from hf_equiv.zero_shot import PROMPT  # brings transformers along

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


def settings_hash(settings: dict[str, Any]) -> str:
    """First eight hex digits of the SHA-256 of settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def default_folder(analysis: str, settings: dict[str, Any]) -> Path:
    """`runs/VERB/MODEL-slug/HASH8`."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", settings["model_id"]).strip(".-") or "model"
    return Path("runs") / analysis / slug / settings_hash(settings)


def _check_labels(encoder: Encoder, labels: Sequence[str]) -> None:
    """One zero-shot classification of a grey image, so that a model without text tower refuses at once."""
    grey = torch.full((1, *encoder.input_shape), 128 / 255, device=encoder.device, dtype=encoder.dtype)
    with torch.no_grad():
        encoder.classify(grey, labels)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
