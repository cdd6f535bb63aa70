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

from hf_equiv.checks import NORMS, check_positive, check_radius
from hf_equiv.data import ImageSet, count_pairs, draw_pairs, load_images
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.solvers import LBFGS, Adam, GradientDescent

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
        dtype: `float32` or `float64`.
        source: images to start from (with `target`); see `load_images`.
        target: images whose embedding is wanted: one for all sources, or as many as there are sources.
        data: images to draw pairs from, instead of `source` and `target`.
        pairs: how many pairs to draw from `data`.
        image_column: image column of a dataset.
        label_column: class column of a dataset.
        solver: `lbfgs`, `adam` or `gd`.
        radius: half-width (linf) or radius (l2) of the ball about the source, pixels in [0, 1]; None for no ball.
        norm: `linf` or `l2`.
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
    source: str | None = None
    target: str | None = None
    data: str | None = None
    pairs: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    solver: str = "lbfgs"
    radius: float | None = None
    norm: str = "linf"
    rtol: float = 1e-5
    max_evals: int = 1000
    refine: bool = True
    labels: tuple[str, ...] | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse what no run could do, before a checkpoint is loaded.

        Raises:
            ValueError: with the option and what it must be.
        """
        for name, value, allowed in (
            ("solver", self.solver, tuple(SOLVERS)),
            ("norm", self.norm, NORMS),
            ("dtype", self.dtype, tuple(DTYPES)),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {value!r}.")
        check_positive(self.rtol, "rtol")
        if self.max_evals < 1:
            raise ValueError(f"`max_evals` must be at least 1; got {self.max_evals}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must be 0 or more; got {self.seed}.")
        if self.norm == "linf" or (self.radius is not None and not self.radius > 0):
            check_radius(self.radius, self.norm, 1)
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"`labels` must be at least two different names; got {', '.join(self.labels)!r}.")
        if (self.source is None) != (self.target is None):
            given, other = ("source", "target") if self.target is None else ("target", "source")
            raise ValueError(
                f"`{given}` must come with `{other}`; got `{given}` alone. Give both, or --data W --pairs N."
            )
        if self.data is not None and self.source is not None:
            raise ValueError("`data` must not be combined with `source` and `target`. Give one or the other.")
        if self.pairs is not None and self.data is None:
            raise ValueError("`pairs` must come with `data`: pairs are drawn from a set. Add --data W.")
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"`pairs` must be at least 1; got {self.pairs}.")


@dataclass(frozen=True, slots=True)
class Pair:
    """One row to make: place in the list, ids and classes, and where the two images are in their sets."""

    index: int
    pair_id: str
    source: int
    target: int
    source_id: str
    target_id: str
    source_class: str | None
    target_class: str | None

    def record(self) -> dict[str, Any]:
        """The part of the pair that is written into rows and into `run.json`."""
        keys = ("pair_id", "source_id", "target_id", "source_class", "target_class")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class MatchPlan:
    """A settled run: the encoder, the images, the list of pairs, and settings without any local path.

    Attributes:
        settings: everything that changes a number, with ids and revisions in place of paths; kept in `run.json`.
        provenance: the provenance columns, equal in every row.
        drawn: whether pairs were drawn from a set; then an unreadable image becomes a row of status `error`.
    """

    config: RunConfig
    encoder: Encoder
    sources: ImageSet
    targets: ImageSet
    pairs: tuple[Pair, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    drawn: bool

    @property
    def hash8(self) -> str:
        """First eight hex digits of the SHA-256 of the settings."""
        text = json.dumps(self.settings, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def default_out(self) -> Path:
        """`runs/match/MODEL-slug/HASH8`."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "--", self.settings["model_id"]).strip(".-") or "model"
        return Path("runs") / "match" / slug / self.hash8

    def pixels(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Source and target as the encoder sees them, each (3, H, W) on the k/255 grid, on the CPU.

        Returns:
            The two images.

        Raises:
            ValueError: an image cannot be read, or the two are the same.
        """
        source = _pixels(self.encoder, self.sources, pair.source)
        target = _pixels(self.encoder, self.targets, pair.target)
        if torch.equal(source, target):
            raise ValueError(
                f"source and target must be different images; {pair.source_id!r} and {pair.target_id!r} are the same "
                "pixels for the model. Choose another target."
            )
        return source, target


def make_plan(
    config: RunConfig, encoder: Encoder, *, cache_dir: str | None = None, local_files_only: bool = False
) -> MatchPlan:
    """Open the images, settle the pairs, and check everything that can be checked without matching.

    Images that were named as source or target are read once here, so that a bad one is refused before any work; of
    images drawn from a set a bad one costs its own row only.

    Args:
        config: the run as the user states it.
        encoder: the loaded checkpoint.
        cache_dir: where downloads are kept.
        local_files_only: never ask the Hub.

    Returns:
        The plan, ready for `run_match`.

    Raises:
        ValueError: bad options or images, source equal to target, or counts that do not fit.
        FileNotFoundError: a path does not exist.
    """
    config.check()
    channels, height, width = encoder.input_shape
    check_radius(config.radius, config.norm, channels * height * width)
    if config.labels is not None:
        _check_labels(encoder, config.labels)

    def load(what: str) -> ImageSet:
        return load_images(
            what,
            image_column=config.image_column,
            label_column=config.label_column,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    if config.data is not None:
        sources = targets = load(config.data)
        indices = draw_pairs(sources, config.pairs or min(10, max(1, count_pairs(sources))), config.seed)
    elif config.source is not None and config.target is not None:
        sources, targets = load(config.source), load(config.target)
        indices = _given_pairs(sources, targets)
    else:
        sources = targets = load("builtin")
        indices = [(targets.ids.index("cat"), targets.ids.index("coffee"))]
    pairs = _name_pairs(sources, targets, indices)
    same = sources is targets or (sources.data_id, sources.data_revision) == (targets.data_id, targets.data_revision)
    data_id = sources.data_id if same else f"{sources.data_id} + {targets.data_id}"
    revision = sources.data_revision if same else f"{sources.data_revision} + {targets.data_revision}"
    solver = SOLVERS[config.solver]()
    known = {k: _text(v) for k, v in encoder.provenance.items()}
    settings: dict[str, Any] = {
        **{k: known[k] for k in ("model_id", "model_revision", "readout", "dtype", "attention", "processor")},
        "normalize": config.normalize,
        "data_id": data_id,
        "data_revision": revision,
        "drawn": config.data is not None,
        "num_pairs": len(pairs),
        "image_column": config.image_column,
        "label_column": config.label_column,
        "solver": config.solver,
        "solver_parameters": _text(asdict(solver)),
        "radius": config.radius,
        "norm": config.norm,
        "rtol": config.rtol,
        "max_evals": config.max_evals,
        "refine": config.refine,
        "labels": list(config.labels) if config.labels else None,
        "seed": config.seed,
        "schema_version": SCHEMA_VERSION,
    }
    shared = ("data_id", "data_revision", "norm", "radius", "rtol", "solver", "seed", "schema_version")
    provenance = known | {key: settings[key] for key in shared}
    plan = MatchPlan(config, encoder, sources, targets, pairs, settings, provenance, config.data is not None)
    if not plan.drawn:
        for pair in pairs:
            plan.pixels(pair)
    return plan


def _given_pairs(sources: ImageSet, targets: ImageSet) -> list[tuple[int, int]]:
    if len(targets) == 1:
        return [(i, 0) for i in range(len(sources))]
    if len(sources) == len(targets):
        return [(i, i) for i in range(len(sources))]
    raise ValueError(
        f"`target` must be one image, or as many as sources; got {len(sources)} source(s) and {len(targets)} targets. "
        "Use --data W --pairs N to draw pairs."
    )


def _name_pairs(sources: ImageSet, targets: ImageSet, indices: Sequence[tuple[int, int]]) -> tuple[Pair, ...]:
    pairs, used = [], set()
    for index, (i, j) in enumerate(indices):
        name = f"{sources.ids[i]}->{targets.ids[j]}"
        if name in used:
            name += f"#{index}"
        used.add(name)
        pairs.append(Pair(index, name, i, j, sources.ids[i], targets.ids[j], sources.labels[i], targets.labels[j]))
    return tuple(pairs)


def _pixels(encoder: Encoder, images: ImageSet, index: int) -> Tensor:
    image = images[index].image
    try:
        return encoder.preprocess([image])[0].detach().cpu()
    except (ValueError, MemoryError) as error:
        raise ValueError(f"image {images.ids[index]!r} cannot be preprocessed: {error}") from error


def _check_labels(encoder: Encoder, labels: Sequence[str]) -> None:
    """One zero-shot classification of a grey image, so that a model without text tower refuses at once."""
    grey = torch.full((1, *encoder.input_shape), 128 / 255, device=encoder.device, dtype=encoder.dtype)
    with torch.no_grad():
        encoder.classify(grey, labels)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
