"""Results to look at, one by one: the rows of runs in a folder or a dataset, and whether a picture keeps its word."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_equiv.analyses import match as matches
from hf_equiv.analyses import measures
from hf_equiv.data.image_file import decode_png
from hf_equiv.data.tables import refuse_swollen
from hf_equiv.hub.load import download_results, run_folders, split_name
from hf_equiv.hub_client import api_of, explained
from hf_equiv.runs import directory
from hf_equiv.runs.schema import LAYOUTS
from hf_equiv.runs.shards import read_rows, shard_files
from hf_equiv.verify.rows import agrees

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

Row = dict[str, Any]


@dataclass(frozen=True)
class Showcase:
    """Rows to show, with their pictures as PNG bytes.

    Attributes:
        name: the folder's name, or `USER/NAME`.
        revision: commit of the dataset; None for a folder.
        matches: rows of matches whose pictures are there, each with `key`, unique among them; those that look most
            like their source first.
        spectra: rows of spectra, each with `key`: its image, with the number of its run where an earlier run has the
            same.
        constants: rows of Lipschitz constants, likewise.
        paths: the points of every walk, in order, by a name of the walk.
        settings: what `run.json` says of the run of each key of `matches`, of each key of `paths`, and of `spectra`
            and `constants` under `spectrum KEY` and `lipschitz KEY`.
        withheld: how many rows of matches have no pictures.
    """

    name: str
    revision: str | None = None
    matches: tuple[Row, ...] = ()
    spectra: tuple[Row, ...] = ()
    constants: tuple[Row, ...] = ()
    paths: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    settings: dict[str, Row] = field(default_factory=dict)
    withheld: int = 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One number of a row beside what was computed now.

    Attributes:
        name: column.
        stated: what the row says.
        now: what the PNG files give now.
        holds: whether the two agree, by the tolerances of `hf-equiv verify`: numbers of embeddings within
            max(3 × noise floor, 1e-6), those of pixels within 1e-8, probabilities within 1e-4, labels as they are.
    """

    name: str
    stated: Any
    now: Any
    holds: bool


_LARGER = 2
"""How much larger than its files a dataset may be in memory: PNG files are packed already."""


_MOST_SIDE = 2048
"""Largest side of a picture; encoders look at a few hundred pixels."""


_MOST_LABELS = 1000
"""Class names that a check reads at most: each is a forward pass of the text tower."""


def open_showcase(
    where: str | os.PathLike[str],
    *,
    most: int = 200,
    most_bytes: int | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local: bool = True,
) -> Showcase:
    """Open a folder of runs, a run directory, or a dataset `USER/NAME[@REV]` of the Hub.

    Args:
        where: the folder or dataset.
        most: rows of matches at most; of walks and images as many.
        most_bytes: refuse a dataset whose files without the float images are larger, or more than twice as large
            once they are read.
        token: for private datasets; False to ask as nobody.
        cache_dir: where downloads are kept.
        local: whether a folder may be opened; False for names that strangers give.

    Returns:
        What is there to show.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no run there.
        RepositoryNotFoundError: no such dataset, or it is private.
    """
    name, revision = os.fspath(where), None
    if local and Path(name).is_dir():
        folder = Path(name)
        places: Iterable[Path] = run_folders(folder).values() or _inside(folder)
        name = folder.name
    else:
        name, revision = split_name(name)
        if most_bytes is not None:
            _refuse_large(name, revision, most_bytes, token)
        folder, revision = download_results(name, revision=revision, token=token, cache_dir=cache_dir, with_float=False)
        places = run_folders(folder).values()
    places = list(places)
    if not places:
        raise ValueError(f"{name!r} must hold runs; got no run.json in it. Name a run directory, or a folder of them.")
    matches: list[Row] = []
    rows: dict[str, list[Row]] = {"spectrum": [], "lipschitz": []}
    paths: dict[str, tuple[Row, ...]] = {}
    settings: dict[str, Row] = {}
    withheld = 0
    for k, place in enumerate(places):
        record = directory.read_record(place)
        analysis = record.get("analysis")
        if analysis not in LAYOUTS:
            raise ValueError(f"a run must be a {', '.join(LAYOUTS)}; got {analysis!r}.")
        layout = LAYOUTS[analysis]
        directory.check_record(place, record, layout)
        if most_bytes is not None:
            for shard in shard_files(place, layout):
                refuse_swollen(shard, _LARGER * most_bytes)
        found = list(read_rows(place, images=True, layout=layout, first=most))
        for row in found:
            _check_pictures([row[column] for column in layout.images])
        if analysis == "match":
            shown = [row for row in found if row["match"] and row["source"] and row["target"]]
            withheld += sum(1 for row in found if row["status"] != "error") - len(shown)
            for row in shown[: max(0, most - len(matches))]:
                key = f"{k}.{row['pair_id']}"
                if key in settings:
                    raise ValueError(f"a run must have each pair once; {row['pair_id']!r} is there twice.")
                matches.append(row | {"key": key})
                settings[key] = record["settings"]
        elif analysis == "walk":
            for key, path in _walks(found):
                if all(row["frame"] for row in path) and len(paths) < most:
                    name_of = key if key not in paths else f"{key} ({k})"
                    paths[name_of], settings[name_of] = path, record["settings"]
        else:
            made = [row for row in found if row["status"] != "error" and row["image"]]
            taken = {row["key"] for row in rows[analysis]}
            for row in made:
                key = row["image_id"] if row["image_id"] not in taken else f"{row['image_id']} ({k})"
                rows[analysis].append(row | {"key": key})
                settings[f"{analysis} {key}"] = record["settings"]
    matches.sort(key=lambda row: -(row["psnr_db"] or 0.0))
    return Showcase(
        name, revision, tuple(matches), tuple(rows["spectrum"]), tuple(rows["lipschitz"]), paths, settings, withheld
    )


def check_shown(encoder: Encoder, row: Row, settings: Row, *, match: bytes | None = None) -> tuple[Comparison, ...]:
    """Encode the three PNG files of a match again and set what comes out beside its row.

    All that `hf-equiv verify` compares, of one row and of the 8-bit match alone: every column of
    `metrics.MEASURES` that the row or the encoder has.

    Args:
        encoder: the checkpoint that made the row, in its dtype and with its readout.
        row: of a match, with its images as PNG bytes.
        settings: of its run, as `run.json` has them.
        match: the PNG to check in place of the row's own.

    Returns:
        One comparison for each number and label that is stated or computed.

    Raises:
        ValueError: `encoder` is another model than the row names, or a picture is no PNG of its size.
    """
    dtype_name = str(encoder.dtype).removeprefix("torch.")
    for key, stated, own in (
        ("model_id", row["model_id"], encoder.model_id),
        ("model_revision", row["model_revision"], encoder.revision),
        ("readout", row["readout"], encoder.readout),
        ("dtype", row["dtype"], dtype_name),
        ("normalize", bool(settings["normalize"]), encoder.normalize),
    ):
        if stated != own:
            raise ValueError(f"`encoder` must have the {key} of the row, {stated!r}; got {own!r}.")
    dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32
    three = [decode_png(png or b"", dtype) for png in (row["source"], match or row["match"], row["target"])]
    if any(tuple(image.shape) != tuple(encoder.input_shape) for image in three):
        raise ValueError(f"the pictures must be {encoder.input_shape[1]} × {encoder.input_shape[2]} pixels.")
    labels = settings["labels"]
    if labels and not (isinstance(labels, list) and len(labels) <= _MOST_LABELS):
        raise ValueError(f"`labels` must be a list of at most {_MOST_LABELS} names.")
    made = measures.measure_match(encoder, *three, seed=settings["seed"], pair_id=row["pair_id"], labels=labels)
    limits = matches.tolerances(made, settings)
    found = []
    for key in measures.MEASURES:
        stated, now = row[key], made[key]
        if stated is None and now is None:
            continue
        found.append(Comparison(key, stated, now, agrees(stated, now, limits.get(key))))
    return tuple(found)


def _refuse_large(name: str, revision: str | None, most_bytes: int, token: str | bool | None) -> None:
    with explained(name, revision=revision, token=token):
        info = api_of(token).dataset_info(name, revision=revision, files_metadata=True)
    size = sum(s.size or 0 for s in info.siblings or () if not s.rfilename.startswith("float/"))
    if size > most_bytes:
        raise ValueError(
            f"{name!r} must be at most {most_bytes / 2**20:.0f} MiB to be shown; it has {size / 2**20:.0f}."
        )


def _check_pictures(pictures: Iterable[Any]) -> None:
    """Refuse what is no PNG file of a common, moderate size, by the first bytes: nothing is decoded."""
    sizes = set()
    for data in pictures:
        if data is None:
            continue
        if not isinstance(data, bytes) or not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 24:
            raise ValueError("the pictures of a run must be PNG files.")
        sizes.add((int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")))
    if len(sizes) > 1 or any(not 0 < side <= _MOST_SIDE for size in sizes for side in size):
        told = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(f"the pictures of a row must have one size, at most {_MOST_SIDE} pixels a side; got {told}.")


def _inside(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"*/{directory.RECORD}"))


def _walks(rows: list[Row]) -> list[tuple[str, tuple[Row, ...]]]:
    """The points of each walk in order, with a name."""
    walks: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] != "error" and row["step"] is not None:
            aim = f" to {row['target_id']}" if row["target_id"] else ""
            walks.setdefault(f"{row['image_id']}{aim}, {row['heading']}", []).append(row)
    return [(name, tuple(sorted(path, key=lambda row: row["step"]))) for name, path in walks.items()]
