"""Plan a run before anything is computed: encoder, images, settings, and the command that repeats it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from PIL.Image import Image
from torch import Tensor

from hf_equiv.analyses.pairs import Item, Reader, say_equal
from hf_equiv.analyses.stages import Draft
from hf_equiv.data.image_set import ImageSet
from hf_equiv.data.sources import load_images
from hf_equiv.data.text_set import TextSet, is_text_file
from hf_equiv.formatting import JOINED, fraction, many, read_fraction
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.runs.directory import default_folder
from hf_equiv.runs.schema import LAYOUTS, Layout, Row

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder


@dataclass(frozen=True)
class Plan:
    """A planned run of any verb."""

    config: Any  # the run as the user states it, of the class `CONFIG` of the verb
    encoder: Encoder
    images: ImageSet  # images to start from or to analyse
    targets: ImageSet | TextSet | None  # the targets of these images, if any; may be the same set
    items: tuple[Item, ...]  # the pairs or images, in order
    settings: Row  # everything that changes a number, with ids and revisions in place of paths; kept in `run.json`
    provenance: Row  # the provenance columns, equal in every row
    reader: Reader  # keeps the images that were read for the plan
    drafts: tuple[Draft, ...] = ()  # cheaper forms of the encoder that matches start with

    def __repr__(self) -> str:
        """State the verb, the number of items, the images and the model in one line."""
        what = f"{self.config.analysis}, {many(len(self.items), self.layout.listed.removesuffix('s'))}"
        return f"Plan({what} of {self.images.data_id!r}; {self.encoder!r})"

    @property
    def layout(self) -> Layout:
        """The folder and columns of the rows."""
        return LAYOUTS[self.config.analysis]

    @property
    def default_out(self) -> Path:
        """`runs/VERB/MODEL-slug/HASH8`."""
        return default_folder(self.config.analysis, self.settings)

    @property
    def choices(self) -> tuple[str, ...]:
        """A sentence on each default that was chosen for the images, such as the split."""
        return tuple(dict.fromkeys(self.images.choices + (self.targets.choices if self.targets else ())))

    @property
    def command(self) -> str:
        """Command line that repeats the run, each local checkpoint, file or folder by its name without a path."""
        config, settings = self.config, self.settings
        revision = str(settings["model_revision"])
        stated = replace(  # the loaded encoder overrides the readout and dtype of the config
            config,
            model=str(settings["model_id"]),
            revision=None if all(one.startswith("sha256:") for one in revision.split(JOINED)) else revision,
            readout=settings["readout"],
            dtype=config.half or settings["dtype"],
            source=_public_name(config.source, self.images),
            target=_public_name(config.target, self.targets or self.images),
            data=_public_name(config.data, self.images),
            **{name: self.targets.data_id for name in _text_files(config) if self.targets is not None},
        )
        return command_line(stated)

    @property
    def item_bytes(self) -> int:
        """The most bytes that the images and float images of one item take."""
        return int(self.config.item_bytes(self.encoder, self.settings))

    def photo(self, item: Item) -> Image:
        """Return the image of an item as it was read, upright RGB, before the image processor."""
        return self.images[item.source].image

    def pixels(self, item: Item) -> tuple[Tensor, Tensor | None]:
        """Return an image and its target, each (3, H, W) on the k/255 grid, on the CPU; unusable images raise."""
        source = self.reader.pixels(self.images, item.source)
        if not isinstance(self.targets, ImageSet) or item.target is None:
            return source, None
        target = self.reader.pixels(self.targets, item.target)
        if torch.equal(source, target):
            raise ValueError(say_equal(self.images.ids[item.source], self.targets.ids[item.target]))
        return source, target


@dataclass(frozen=True, slots=True)
class Loaded:
    """An item with its images as PNG files, and their pixels (3, H, W) as read back, on the encoder's device."""

    item: Item
    png: bytes
    image: Tensor
    target_png: bytes | None = None
    target: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """The rows of one item, its float images by name, the evaluations that no column states, and why it failed."""

    rows: Sequence[Row]
    floats: Mapping[str, Tensor]
    cost: Row | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RunRows:
    """The rows of a run in order, read back from disk."""

    rows: Sequence[Any]  # without images
    shown: Sequence[Row] = ()  # the first ones, with images
    costs: Mapping[str, Row] | None = None
    folder: Path | None = None
    baseline: Row | None = None  # distances of unrelated images that the run states, if no encoder can measure them


Tell = Callable[..., None]  # receives the stage of the current items, the steps done, all steps, and more


def make_plan(config: Any, encoder: Encoder, *, cache_dir: str | None = None, local_files_only: bool = False) -> Plan:
    """Plan a run: open the images, list the pairs or images, and refuse bad options before any work.

    Every image is read once. Named images that are bad are refused in one message; an unreadable image of `data` fails
    only its own rows.

    Args:
        config: the options of a `MatchConfig`, `SpectrumConfig`, `LipschitzConfig` or `WalkConfig`; its class names the
            verb.
        encoder: the encoder to analyse.
        cache_dir: cache of Hub datasets; None for the Hub's default.
        local_files_only: whether to use cached files only.

    Returns:
        The plan, for `run_analysis`.

    Raises:
        ValueError: a bad option, or images that cannot be used.
        OSError: images that do not exist or cannot be fetched.
    """
    config.check()
    own = config.settings(encoder)
    _refuse_constant(encoder)
    columns: Row = {name: getattr(config, name) for name in ("image_column", "label_column")}
    load = partial(load_images, **columns, cache_dir=cache_dir, local_files_only=local_files_only)
    images, targets = config.open_images(load)
    sets = [images] if targets is None or targets is images else [images, targets]
    given = [name for name, column in columns.items() if column is not None]
    if given and not any(one.tabular for one in sets):
        told = f"{images.data_id!r} has no columns. Leave it out."
        raise ValueError(f"`{given[0]}` must come with a parquet file or a dataset; {told}")
    reader = Reader(encoder)
    return _settle(config, encoder, images, targets, config.list_items(reader, images, targets), reader, own)


def with_config(plan: Plan, config: Any) -> Plan:
    """Return a plan for the same images, which are not read again, with other options of the same or a similar verb."""
    config.check()
    own = config.settings(plan.encoder)
    return _settle(config, plan.encoder, plan.images, plan.targets, plan.items, plan.reader, own)


def _settle(
    config: Any, encoder: Encoder, images: ImageSet, targets: ImageSet | TextSet | None, items: tuple[Item, ...],
    reader: Reader, own: Row,
) -> Plan:  # fmt: skip
    """Return a plan with its settings; `own` are those of its verb."""
    config = replace(config, normalize=encoder.normalize)
    sets: list[ImageSet | TextSet] = [images] if targets is None or targets is images else [images, targets]
    names = list(dict.fromkeys((one.data_id, one.data_revision) for one in sets))
    data_id, data_revision = (" + ".join(parts) for parts in zip(*names, strict=True))
    settings = settings_of(config, encoder, items, own, data_id, data_revision)
    known = {key: _text(value) for key, value in encoder.provenance.items()}
    shared = {key: settings[key] for key in ("data_id", "data_revision", "seed", "schema_version")}
    shared |= {key: own.get(key) for key in ("norm", "rtol", "solver")}
    shared["radius"] = own.get("radius", own.get("regional"))
    provenance = known | shared
    return Plan(config, encoder, images, targets, items, settings, provenance, reader, config.drafts(encoder))


def settings_of(
    config: Any, encoder: Encoder, items: Sequence[Item], own: Row, data_id: str, data_revision: str
) -> Row:
    """Return the settings of a run; `own` are those of its verb."""
    model = ("model_id", "model_revision", "readout", "dtype", "attention", "processor")
    return {
        **{key: _text(encoder.provenance[key]) for key in model},
        "normalize": config.normalize,
        "data_id": data_id,
        "data_revision": data_revision,
        "seed": config.seed,
        "schema_version": SCHEMA_VERSION,
        "image_column": config.image_column,
        "label_column": config.label_column,
        **({} if config.import_ is None else {"import": config.import_}),
        **config.settings_of_items(items),
        **own,
    }


def command_line(config: Any) -> str:
    """Return the command line of a config, without the options that have their default."""
    words = ["hf-equiv", config.analysis, *config.models]
    for field in fields(config):
        value = getattr(config, field.name)
        flag = "--" + field.name.rstrip("_").replace("_", "-")
        if value == field.default or field.name == "model":
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, float):
            words += [flag, fraction(value)]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def read_command(command: str, kind: Any) -> Any:
    """Return the config, of the class `kind`, of a `command_line`; a ValueError names a wrong word."""
    program, analysis, model, *words = split = shlex.split(command)
    if shlex.join(split) != command:  # people paste it into a shell
        raise ValueError(f"`command` must be quoted as `shlex.join` does it; got {command!r}.")
    if (program, analysis) != ("hf-equiv", kind.analysis):
        raise ValueError(f"`command` must begin with hf-equiv {kind.analysis}; got {program} {analysis}.")
    more = list(takewhile(lambda word: not word.startswith("--"), words))
    types, left = get_type_hints(kind), iter(words[len(more) :])
    values: dict[str, Any] = {"model": JOINED.join([model, *more])}
    for flag in left:
        name = "import_" if flag == "--import" else flag.removeprefix("--").replace("-", "_")
        if types.get(name.removeprefix("no_")) is bool:
            values[name.removeprefix("no_")] = not name.startswith("no_")
            continue
        text = next(left, None)
        if name not in types or text is None:
            raise ValueError(f"`command` must hold options of {kind.analysis} with their values; got {flag}.")
        known = get_args(types[name]) or (types[name],)
        if tuple[str, ...] in known or tuple[float, ...] in known:
            values[name] = tuple(map(str if tuple[str, ...] in known else float, text.split(",")))
        else:
            values[name] = int(text) if int in known else read_fraction(text) if float in known else text
    return kind(**values)


def _refuse_constant(encoder: Encoder) -> None:
    """Refuse a readout that does not depend on the pixels."""
    grey = torch.full((2, *encoder.input_shape), 0.5, device=encoder.device, dtype=encoder.dtype)
    grey[1] += torch.linspace(-0.5, 0.5, grey[1].numel()).view_as(grey[1]).to(grey)
    with torch.no_grad():
        z = encoder(grey)
    if torch.equal(z[0], z[1]):
        raise ValueError(
            f"`readout` must depend on the image; {encoder.readout!r} of '{encoder.model_id}' is the same for all (a "
            "class token that no layer has changed yet). Use readout='auto'."
        )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _text_files(config: Any) -> list[str]:
    """Return the options of a config that name a file of texts."""
    return [name for name in ("target_text", "texts") if is_text_file(getattr(config, name, None) or "")]


def _public_name(given: str | None, images: ImageSet | TextSet) -> str | None:
    """Return the option of a set of images with the name of the set in place of a local path."""
    local = given is not None and given != "builtin" and Path(given).expanduser().exists()
    return images.data_id if local else given
