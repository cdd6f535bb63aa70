"""Open results to look at one by one: the rows of runs in a folder or dataset. Check the files of a match."""

from __future__ import annotations

import os
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_equiv.analyses import match, measures
from hf_equiv.data.tables import refuse_swollen
from hf_equiv.hub.load import download_results, split_name
from hf_equiv.hub_client import api_of, explained
from hf_equiv.models.encoder import Encoder
from hf_equiv.png_file import SIGNATURE
from hf_equiv.runs import directory
from hf_equiv.runs.schema import IMAGE_COLUMNS, LAYOUTS, Layout, Row
from hf_equiv.runs.shards import check_pictures, read_rows, shard_files
from hf_equiv.verify.rows import agrees

_EXPANSION = 2  # a dataset may be this many times larger in memory than on disk: PNG files are packed already
_MOST_SIDE = 2048
_LONGEST_TEXT = 10_000
_MOST_LABELS = 1000  # each label is a forward pass of the text tower


@dataclass(frozen=True)
class Showcase:
    """Rows to show, with their pictures as PNG bytes, a `key` of their own and the `settings` of their run."""

    name: str  # name of the folder, or USER/NAME
    matches: tuple[Row, ...] = ()  # matches with pictures, the most similar to their source first
    spectra: tuple[Row, ...] = ()
    constants: tuple[Row, ...] = ()
    paths: dict[str, tuple[Row, ...]] = field(default_factory=dict)  # points of each walk in order, by its name
    films: dict[str, bytes] = field(default_factory=dict)  # GIF files of walks as their runs have drawn them
    withheld: int = 0  # number of matches without pictures


class Comparison(NamedTuple):
    """A stated number, the number recomputed from the PNG files, and whether they agree by the rules of `verify`."""

    name: str
    stated: Any
    now: Any
    holds: bool


def open_showcase(
    where: str | os.PathLike[str],
    *,
    most: int = 200,  # most matches, and most rows of any other run
    most_bytes: int | None = None,  # limit of the files without float images; in memory the rows may take twice as much
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local: bool = True,  # whether the name may be a local folder
) -> Showcase:
    """Open a folder of runs, a run directory, or a dataset `USER/NAME[@REV]` of the Hub."""
    name = os.fspath(where)
    if local and Path(name).is_dir():
        folder = Path(name)
        name = folder.name
    else:
        name, revision = split_name(name)
        if most_bytes is not None:
            _refuse_large(name, revision, most_bytes, token)
        folder, _ = download_results(name, revision=revision, token=token, cache_dir=cache_dir, with_float=False)
    places = directory.folders_in(folder)
    if not places:
        raise ValueError(f"{name!r} must hold runs; got no run.json in it. Name a run directory, or a folder of them.")
    found: dict[str, list[Row]] = {analysis: [] for analysis in LAYOUTS}
    paths: dict[str, tuple[Row, ...]] = {}
    films: dict[str, bytes] = {}
    withheld, left = 0, None if most_bytes is None else _EXPANSION * most_bytes
    for number, place in enumerate(places):
        layout, rows, left = _read_run(place, most, left)
        if layout.analysis == "walk":
            walks = {_free(walk, paths, number): points for walk, points in _walks(rows).items()}
            paths |= walks
            if walks and (drawn := place / "figures" / "walk.gif").is_file():
                films[next(iter(walks))] = drawn.read_bytes()
            continue
        taken = {row["key"] for row in found[layout.analysis]}
        needed = [column for column in layout.images if column not in layout.added]
        shown = [row for row in rows if all(row[column] for column in needed)]
        found[layout.analysis] += [row | {"key": _free(row[layout.item], taken, number)} for row in shown]
        withheld += len(rows) - len(shown) if layout.analysis == "match" else 0
    matches = sorted(found["match"][:most], key=lambda row: -(row["psnr_db"] or 0.0))
    if len({row["key"] for row in matches}) < len(matches):
        raise ValueError("a run must have each pair once; got one twice.")
    return Showcase(name, tuple(matches), tuple(found["spectrum"]), tuple(found["lipschitz"]), paths, films, withheld)


def _read_run(place: Path, most: int, left: int | None) -> tuple[Layout, list[Row], int | None]:
    """Return the layout of a run, its first rows without an error, each with its settings, and the bytes left."""
    record = directory.read_record(place)
    layout = directory.check_record(place, record)
    if left is not None:
        left = refuse_swollen(shard_files(place, layout), left)
    rows = list(read_rows(place, images=True, layout=layout, first=most))
    for row in rows:
        if any(len(value) > _LONGEST_TEXT for value in row.values() if isinstance(value, str)):
            raise ValueError(f"the texts of a row must have at most {_LONGEST_TEXT:,} characters to be shown.")
        _check_sizes([row[column] for column in layout.images])
        check_pictures(row, layout)
    return layout, [row | {"settings": record["settings"]} for row in rows if row["status"] != "error"], left


def _walks(rows: Sequence[Row]) -> dict[str, tuple[Row, ...]]:
    """Return the points of each walk that has all its frames, in order, by the name of the walk."""
    walks: dict[str, list[Row]] = {}
    for row in rows:
        if row["step"] is not None:
            aim = f" to {row['target_id']}" if row["target_id"] else ""
            walks.setdefault(f"{row['image_id']}{aim}, {row['heading']}", []).append(row)
    whole = {name: path for name, path in walks.items() if all(row["frame"] for row in path)}
    return {name: tuple(sorted(path, key=lambda row: row["step"])) for name, path in whole.items()}


def _free(name: str, taken: Container[str], number: int) -> str:
    return f"{name} ({number})" if name in taken else name


def check_shown(encoder: Encoder, row: Row) -> list[Comparison]:
    """Encode the three PNG files of a match again and compare each number with its row, as `hf-equiv verify` does."""
    settings = row["settings"]
    own = encoder.provenance | {"normalize": encoder.normalize}
    stated = row | {"normalize": bool(settings["normalize"])}
    for key in ("model_id", "model_revision", "readout", "dtype", "normalize"):
        if stated[key] != own[key]:
            raise ValueError(f"`encoder` must have the {key} of the row, {stated[key]!r}; got {own[key]!r}.")
    three = [measures.open_png(encoder, row[column]) for column in IMAGE_COLUMNS]
    if any(tuple(image.shape) != tuple(encoder.input_shape) for image in three):
        raise ValueError(f"the pictures must be {encoder.input_shape[1]} × {encoder.input_shape[2]} pixels.")
    labels = settings["labels"]
    if labels and not (isinstance(labels, list) and len(labels) <= _MOST_LABELS):
        raise ValueError(f"`labels` must be a list of at most {_MOST_LABELS} names.")
    made = measures.measure_match(encoder, *three, seed=settings["seed"], pair_id=row["pair_id"], labels=labels)
    limits = match.tolerances(made, settings)
    keys = [key for key in measures.MEASURES if (row[key], made[key]) != (None, None)]
    return [Comparison(key, row[key], made[key], agrees(row[key], made[key], limits.get(key))) for key in keys]


def prove(encoder: Encoder, row: Row) -> dict[str, Any]:
    """Check a match, and return whether it holds, the seconds that this took, and each number, stated and now."""
    start, found = time.perf_counter(), check_shown(encoder, row)
    numbers = {c.name: {"stated": c.stated, "now": c.now, "holds": c.holds} for c in found}
    return {"holds": all(c.holds for c in found), "seconds": time.perf_counter() - start, "numbers": numbers}


def _refuse_large(name: str, revision: str | None, most_bytes: int, token: str | bool | None) -> None:
    with explained(name, revision=revision, token=token):
        info = api_of(token).dataset_info(name, revision=revision, files_metadata=True)
    size = sum(s.size or 0 for s in info.siblings or () if not s.rfilename.startswith("float/"))
    if size > most_bytes:
        raise ValueError(
            f"{name!r} must be at most {most_bytes / 2**20:.0f} MiB to be shown; it has {size / 2**20:.0f}."
        )


def _check_sizes(pictures: Iterable[bytes | None]) -> None:
    """Refuse all but PNG files of one moderate size, by their first bytes: nothing is decoded."""
    sizes = set()
    for data in filter(None, pictures):
        if not data.startswith(SIGNATURE):
            raise ValueError("the pictures of a run must be PNG files.")
        sizes.add((int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")))
    if len(sizes) > 1 or any(not 0 < side <= _MOST_SIDE for size in sizes for side in size):
        told = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(f"the pictures of a row must have one size, at most {_MOST_SIDE} pixels a side; got {told}.")
