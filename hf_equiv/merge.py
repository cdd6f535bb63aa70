"""Put the small shards of a finished run into few files, the same whoever made the shards, and safe to kill.

The rows of `file_items` consecutive pairs or images go into one file. It is written whole under a hidden name; then the
shards that it replaces are deleted; then it gets its name. Killed in between, the run directory shows each row at most
once, and `settle` completes the exchange: no row is lost or doubled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from hf_equiv import shards
from hf_equiv.shards import Layout, Row

FILE_ITEMS = 500
"""Most pairs or images of a merged file."""

FILE_BYTES = 100_000_000
"""Most bytes of a merged file and its float file, as far as images are counted, unless one item has more."""

_STAGED = ".merged"


def items_per_file(item_bytes: int) -> int:
    """How many pairs or images go into one file; it depends on their size alone, never on how they were made.

    Args:
        item_bytes: bytes of the images of one, at most.

    Returns:
        The number, at least 1.

    Example:
        >>> items_per_file(1_000_000)
        100
    """
    return max(1, min(FILE_ITEMS, FILE_BYTES // max(1, item_bytes)))


def merge_shards(folder: Path, layout: Layout, names: Sequence[str], file_items: int) -> None:
    """Merge the shards of a run whose rows are all there; what is merged already is left alone.

    Args:
        folder: run directory; nobody else may write into it.
        layout: folder and columns.
        names: ids of all pairs or images, in order.
        file_items: how many of them go into one file.
    """
    files: dict[int, list[Path]] = {}
    for path in shards.shard_files(folder, layout):
        files.setdefault(shards.shard_index(path) // file_items, []).append(path)
    for number, parts in sorted(files.items()):
        first = number * file_items
        wanted = list(names[first : first + file_items])
        there = [name for path in parts for name in _ids(path, layout)]
        merged = len(parts) == 1 and shards.shard_index(parts[0]) == first and there == wanted
        if merged or sorted(there) != sorted(wanted):  # or cut by another version, at other places
            continue
        _stage(folder, layout, first, wanted, parts)
        settle(folder, layout)


def settle(folder: Path, layout: Layout) -> None:
    """Complete every exchange of shards for a merged file that was begun."""
    for staged in sorted((folder / layout.folder).glob(f".part-*.parquet{_STAGED}")):
        first, merged = shards.shard_index(staged), set(_ids(staged, layout))
        for path in shards.shard_files(folder, layout):
            inside = first <= shards.shard_index(path) < first + len(merged)
            if inside and merged.issuperset(_ids(path, layout)):
                path.unlink()
                (folder / "float" / f"{path.stem}.safetensors").unlink(missing_ok=True)
        float_file, shard = shards.shard_paths(folder, first, layout)
        if (hidden := _hidden(float_file)).exists():
            os.replace(hidden, float_file)
        os.replace(staged, shard)
    for leftover in (folder / "float").glob(f".part-*{_STAGED}"):  # its rows were never staged
        leftover.unlink()


def _stage(folder: Path, layout: Layout, first: int, names: Sequence[str], parts: Sequence[Path]) -> None:
    rows: dict[str, list[Row]] = {name: [] for name in names}
    floats: dict[str, Tensor] = {}
    costs: Row = {}
    errors: dict[str, str] = {}
    for path in parts:
        for row in shards.read_shard(path, images=True, layout=layout):
            rows[row[layout.item]].append(row)
        errors |= shards.read_errors(path)
        float_file = folder / "float" / f"{path.stem}.safetensors"
        if float_file.is_file():
            tensors, spent = shards.read_floats(float_file)
            floats, costs = floats | tensors, costs | spent
    float_file, shard = shards.shard_paths(folder, first, layout)
    if floats or layout is shards.MATCH:
        shards.write_atomic(_hidden(float_file), shards.float_bytes(floats, costs))
    data = shards.shard_bytes([row for name in names for row in rows[name]], layout, errors)
    shards.write_atomic(_hidden(shard), data)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}{_STAGED}")


def _ids(path: Path, layout: Layout) -> list[str]:
    """Ids of the pairs or images of a shard, in order, each once."""
    return list(dict.fromkeys(row[layout.item] for row in shards.read_shard(path, layout=layout)))
