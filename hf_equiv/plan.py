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

from hf_equiv.checks import NORMS, check_positive, check_radius, check_rtol
from hf_equiv.data import DEFAULT_PAIRS, load_images
from hf_equiv.imageset import ImageSet
from hf_equiv.pairs import Pair, read_pair, settle_pairs
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.solvers import LBFGS, Adam, GradientDescent
from hf_equiv.stages import HALF, Draft, drafts_of

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder

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
