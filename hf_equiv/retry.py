"""Rows of status `error` are taken out of a run that goes on, so that they are made again; safe to kill.

A shard without those rows is written as a whole under the place of its first row. Killed in between, the run directory
shows every other row once, and the next call takes out what is left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_equiv import shards
from hf_equiv.results import Status
from hf_equiv.shards import MATCH, Layout, Row


def failed_ids(folder: Path, layout: Layout) -> set[str]:
    """Ids of the pairs or images of which a row has status `error`."""
    return {row[layout.item] for row in shards.read_rows(folder, layout=layout) if row["status"] == Status.ERROR}


def is_mended(before: Sequence[Row], now: Sequence[Row]) -> bool:
    """Whether images that could not be read when the run was planned can be read now, and no others of it have changed.

    Args:
        before: the pairs or images as `run.json` lists them.
        now: as it would list them now.

    Returns:
        Whether it is so: then only rows of status `error` have to be made again.
    """
    if [_named(item) for item in before] != [_named(item) for item in now]:
        return False
    pixels = [(old.get("pixels", ""), new["pixels"]) for old, new in zip(before, now, strict=True)]
    return all(old in (None, new) for old, new in pixels) and any(old != new for old, new in pixels)


def have_changed(before: Sequence[Row], now: Sequence[Row]) -> bool:
    """Whether images that could be read when the run was planned are others now.

    The revision of a set need not tell: a table may hold the paths of files that are not part of it.

    Returns:
        Whether any has.
    """
    old = {_key(item): item.get("pixels") for item in before}
    return any(None not in (old.get(_key(item)), item["pixels"]) and old[_key(item)] != item["pixels"] for item in now)


def names_another(folder: Path, layout: Layout, data_revision: str) -> bool:
    """Whether a row states another revision of the images: `take_out` was killed, and a file is torn again."""
    return any(row["data_revision"] != data_revision for row in shards.read_rows(folder, layout=layout))


def take_out(folder: Path, layout: Layout, places: Mapping[str, int], data_revision: str) -> None:
    """Take the rows of failed pairs or images out of their shards; the others state the revision of the images now.

    Args:
        folder: run directory; nobody else may write into it.
        layout: folder and columns.
        places: place in the run's list, by id.
        data_revision: of the set as it is now, in which the images of the rows that stay are the same.
    """
    failed = failed_ids(folder, layout)
    for path in shards.shard_files(folder, layout):
        rows = shards.read_shard(path, layout=layout)
        if all(row[layout.item] not in failed and row["data_revision"] == data_revision for row in rows):
            continue
        kept = [row for row in shards.read_shard(path, images=True, layout=layout) if row[layout.item] not in failed]
        if kept:
            first = min(places[row[layout.item]] for row in kept)
            _write(folder, layout, path, first, [row | {"data_revision": data_revision} for row in kept])
        else:
            path.unlink()
            _float_file(folder, path).unlink(missing_ok=True)


def _write(folder: Path, layout: Layout, path: Path, first: int, rows: list[Row]) -> None:
    """Replace a shard by some of its rows, under the place of the first of them, which no other shard has."""
    old_floats, (new_floats, shard) = _float_file(folder, path), shards.shard_paths(folder, first, layout)
    floats, costs = shards.read_floats(old_floats) if old_floats.is_file() else ({}, {})
    names = {row[layout.item] for row in rows}
    own = {name: x for name, x in floats.items() if (name if layout is MATCH else name.rpartition("/")[0]) in names}
    if own:  # of a match run every row that is kept has one
        shards.write_atomic(new_floats, shards.float_bytes(own, costs))
    os.replace(path, shard)  # as it is, in one step: at no moment is a row there twice, or not at all
    shards.write_atomic(shard, shards.shard_bytes(rows, layout, {}))
    if old_floats != new_floats or not own:
        old_floats.unlink(missing_ok=True)


def _key(item: Row) -> str:
    return str(item.get("pair_id", item.get("image_id")))


def _named(item: Row) -> Row:
    return {key: value for key, value in item.items() if key != "pixels"}


def _float_file(folder: Path, path: Path) -> Path:
    return folder / "float" / f"{path.stem}.safetensors"
