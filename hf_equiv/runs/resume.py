"""Rows of status `error` are taken out of a run that goes on, so that they are made again; safe to kill.

A shard without those rows is written as a whole under the place of its first row. Killed in between, the run directory
shows every other row once, and the next call takes out what is left.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from hf_equiv.results import Status
from hf_equiv.runs import directory, shards
from hf_equiv.runs.directory import RECORD, _OWN_FOLDERS, _unwritable, finished_ids, read_record, write_record
from hf_equiv.runs.schema import Layout, MATCH, Row
from pathlib import Path
from typing import Any

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


_CHANGED = {"data_revision": "the photos changed", "model_revision": "the weights changed"}


def prepare(folder: Path, settings: Row, items: Sequence[Row], overwrite: str, layout: Layout = MATCH) -> int:
    """Make `folder` ready for a run of these settings, by the rule of `overwrite`; run under `locked`.

    `missing` goes on with a run of the same settings, also if images have changed that could not be read; rows of
    status `error` are taken out, to be made again. `always` deletes an earlier run (and nothing else); `never` refuses
    to touch one.

    Returns:
        The number of pairs or images whose rows were taken out.

    Raises:
        ValueError: the folder holds another run, or files that are not a run's.
    """
    record = folder / RECORD
    if record.exists():
        if overwrite == "never":
            raise ValueError(f"{str(folder)!r} holds a run already and --overwrite is never. Give another --out.")
        if overwrite == "always":
            _delete_run(folder)
        else:
            refuse_other_settings(folder, settings, layout, items)
    else:
        _refuse_foreign(folder)
    _sweep(folder, layout)
    if not record.exists() or overwrite == "always":
        write_record(folder, settings, items, complete=False, layout=layout)
        return 0
    before, failed = read_record(folder), failed_ids(folder, layout)
    torn = not before["complete"] and names_another(folder, layout, settings["data_revision"])
    if failed or torn or before["settings"] != settings:
        write_record(folder, before["settings"], before[layout.listed], complete=False, layout=layout)
        places = {item[layout.item]: place for place, item in enumerate(items)}
        take_out(folder, layout, places, settings["data_revision"])
        write_record(folder, settings, items, complete=False, layout=layout)
    return len(failed)


def refuse_early(
    folder: Path, settings: Row, overwrite: str, layout: Layout = MATCH, items: Sequence[Row] | None = None
) -> int:
    """Apply the rules of `prepare` without leaving anything, for a dry run; the folder must be one that can be made.

    Returns:
        The number of pairs or images whose rows are there already and would be kept: those of status `error` are not.

    Raises:
        ValueError: as `prepare` and `locked`.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".hf-equiv-", dir=there):
            pass
    except OSError as error:
        raise ValueError(_unwritable(folder, error)) from error
    if not (folder / RECORD).exists():
        _refuse_foreign(folder)
        return 0
    if overwrite == "never":
        raise ValueError(f"{str(folder)!r} holds a run already and --overwrite is never. Give another --out.")
    if overwrite == "always":
        return 0
    refuse_other_settings(folder, settings, layout, items)
    return len(finished_ids(folder, layout) - failed_ids(folder, layout))


def refuse_other_settings(folder: Path, settings: Row, layout: Layout, items: Sequence[Row] | None = None) -> None:
    """Refuse a folder whose run has other settings than these, naming each.

    Args:
        folder: run directory.
        settings: everything that changes a number.
        layout: folder and columns.
        items: the pairs or images as `run.json` would list them: those that could not be read may have changed. None
            if they may not.

    Raises:
        ValueError: it has.
    """
    record = read_record(folder)
    there, asked = record["settings"], settings
    if record.get("analysis", MATCH.analysis) != layout.analysis:
        there, asked = {"analysis": record.get("analysis", MATCH.analysis)}, {"analysis": layout.analysis}
    other = [key for key in sorted({*there, *asked}) if there.get(key) != asked.get(key)]
    if other == ["data_revision"] and items is not None and is_mended(record[layout.listed], items):
        return
    if not other and items is not None and have_changed(record[layout.listed], items):
        raise ValueError(
            f"{str(folder)!r} holds a run of other images under the same names: the files have changed. Put them back, "
            "give another --out, or --overwrite always to replace it."
        )
    if other:
        told = ", ".join(
            f"{_CHANGED.get(key, key)} ({_short(there.get(key))} there, {_short(asked.get(key))} asked)"
            for key in other
        )
        raise ValueError(
            f"{str(folder)!r} holds a run of other settings: {told}. Give another --out, or --overwrite always to "
            "replace it."
        )


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and not a run directory (no {RECORD}). Give another --out.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _delete_run(folder: Path) -> None:
    """Delete rows and figures; the old record is replaced afterwards, so a kill in between leaves a run directory."""
    for name in _OWN_FOLDERS:
        place = folder / name
        if place.is_symlink():
            raise ValueError(
                f"{str(place)!r} is a link, which --overwrite always does not follow. Remove what it points to, or "
                "give another --out."
            )
        if place.exists():
            shutil.rmtree(place)
    (folder / "README.md").unlink(missing_ok=True)


def _sweep(folder: Path, layout: Layout) -> None:
    """Clear up after a killed run: temporary files, a merge half done, float files whose rows were not written."""
    for place in (folder, *(folder / name for name in _OWN_FOLDERS)):
        for leftover in place.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    shards.settle(folder, layout)
    for shard in shards.shard_files(folder, layout) if layout is MATCH else ():
        if not (folder / "float" / f"{shard.stem}.safetensors").is_file():
            shard.unlink()  # a run that was copied in part: without its float matches a row cannot be checked
    stems = {p.stem for p in shards.shard_files(folder, layout)}
    for orphan in (folder / "float").glob("*.safetensors"):
        if orphan.stem not in stems:
            orphan.unlink(missing_ok=True)


# Runs beside a new one that differ from it by the state of their images alone.


def other_states(folder: Path, settings: Row, items: Sequence[Row], layout: Layout) -> tuple[str, ...]:
    """Say which run beside a new run directory is the same but for the state of the data.

    The hash in the name of the default directory holds this state: when a photo has been mended, the same command
    begins another run.

    Args:
        folder: run directory that is about to be made.
        settings: everything that changes a number.
        items: the pairs or images as `run.json` would list them.
        layout: folder and columns.

    Returns:
        One sentence, of the run whose rows can be kept if there is one, else of the latest; none if there is no such
        run, or if `folder` holds a run already.
    """
    if (folder / directory.RECORD).exists():
        return ()
    found: list[tuple[bool, float, Path]] = []
    for path in folder.parent.glob(f"*/{directory.RECORD}"):
        try:
            record = directory.read_record(path.parent)
            directory.check_record(path.parent, record, layout)
            changed = path.stat().st_mtime
        except (ValueError, OSError):  # damaged, or gone since: no business of the new run
            continue
        if record["settings"] | {"data_revision": settings["data_revision"]} == settings:
            found.append((is_mended(record[layout.listed], items), changed, path.parent))
    if not found:
        return ()
    mended, _, place = max(found)
    same = f"{place} holds the same run over another state of the data"
    if mended:
        return (f"{same}: --out {shlex.quote(str(place))} would keep its rows; this run begins anew",)
    return (f"{same}, of which not only unusable images have changed; this run begins anew",)
