"""Go on with a run: the rows that are kept, made again, or refused.

A run goes on under the same settings. Rows of status `error` are taken out of their shards and made again; images that
could not be read may have changed meanwhile, all others may not. After a kill in between, every other row is on disk
once, and the next call takes out the rest.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_equiv.results import Status
from hf_equiv.runs import directory, shards
from hf_equiv.runs.directory import CARD, OWN_FOLDERS, RECORD, analysis_of, read_record
from hf_equiv.runs.schema import MATCH, Layout, Row

_CHANGED = {"data_revision": "the photos changed", "model_revision": "the weights changed"}


def prepare(
    folder: Path,
    settings: Row,
    items: Sequence[Row],
    overwrite: str,
    layout: Layout = MATCH,
    command: str | None = None,
) -> int:
    """Make a locked folder ready for a run of these settings, and return the number of pairs or images to try again.

    `missing` goes on with a run of the same settings, `always` deletes an earlier run (and nothing else), `never`
    refuses to touch one.
    """
    there = _check(folder, settings, overwrite, layout, items)
    if there and overwrite == "always":
        _delete_run(folder)
        there = False
    _sweep(folder, layout)

    def write(settings: Row, items: Sequence[Row]) -> None:
        directory.write_record(folder, settings, items, complete=False, layout=layout, command=command)

    if not there:
        write(settings, items)
        return 0
    before, failed = read_record(folder), failed_ids(folder, layout)
    torn = not before["complete"] and _names_another(folder, layout, settings["data_revision"])
    if failed or torn or before["settings"] != settings:
        write(before["settings"], before[layout.listed])
        places = {item[layout.item]: place for place, item in enumerate(items)}
        take_out(folder, layout, places, settings["data_revision"])
        write(settings, items)
    return len(failed)


def refuse_early(
    folder: Path, settings: Row, overwrite: str, layout: Layout = MATCH, items: Sequence[Row] | None = None
) -> int:
    """Apply the rules of `prepare` and `locked` for a dry run, which leaves no file.

    Returns:
        The number of pairs or images whose rows would be kept.

    Raises:
        ValueError: as `prepare` and `locked`.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".hf-equiv-", dir=there):
            pass
    except OSError as error:
        raise directory.unwritable(folder, error) from error
    if not _check(folder, settings, overwrite, layout, items) or overwrite == "always":
        return 0
    return len(directory.finished_ids(folder, layout) - failed_ids(folder, layout))


def _check(folder: Path, settings: Row, overwrite: str, layout: Layout, items: Sequence[Row] | None) -> bool:
    """Tell whether the folder holds a run, and refuse it where `overwrite` forbids to use it."""
    if not (folder / RECORD).exists():
        if folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise ValueError(f"{str(folder)!r} is not empty and not a run directory (no {RECORD}). Give another --out.")
        return False
    if overwrite == "never":
        raise ValueError(f"{str(folder)!r} holds a run already and --overwrite is never. Give another --out.")
    if overwrite == "missing":
        refuse_other_settings(folder, settings, layout, items)
    return True


def refuse_other_settings(folder: Path, settings: Row, layout: Layout, items: Sequence[Row] | None = None) -> None:
    """Refuse a folder whose run has other settings than these, and name each.

    Args:
        folder: run directory.
        settings: everything that changes a number.
        layout: folder and columns.
        items: the pairs or images as `run.json` would list them: those that could not be read may have changed. None
            if no image may have changed.

    Raises:
        ValueError: a setting differs, or images have changed.
    """
    record = read_record(folder)
    there, asked = record["settings"], settings
    if analysis_of(record) != layout.analysis:
        there, asked = {"analysis": analysis_of(record)}, {"analysis": layout.analysis}
    other = [key for key in sorted({*there, *asked}) if there.get(key) != asked.get(key)]
    if other == ["data_revision"] and items is not None and _is_mended(record[layout.listed], items):
        return
    if other:
        told = ", ".join(
            f"{_CHANGED.get(key, key)} ({_short(there.get(key))} there, {_short(asked.get(key))} asked)"
            for key in other
        )
        raise ValueError(
            f"{str(folder)!r} holds a run of other settings: {told}. Give another --out, or --overwrite always to "
            "replace it."
        )
    if items is not None and _have_changed(record[layout.listed], items, layout):
        raise ValueError(
            f"{str(folder)!r} holds a run of other images under the same names: the files have changed. Put them back, "
            "give another --out, or --overwrite always to replace it."
        )


def other_states(folder: Path, settings: Row, items: Sequence[Row], layout: Layout) -> tuple[str, ...]:
    """Find the latest earlier run next to a new one whose only difference is that the images changed.

    The name of the default directory contains the revision of the images, so a mended photo begins another run.

    Returns:
        One sentence if there is such a run; none if `folder` holds a run already.
    """
    found: list[tuple[bool, float, Path]] = []
    for path in folder.parent.glob(f"*/{RECORD}") if not (folder / RECORD).exists() else ():
        try:
            record = read_record(path.parent)
            if record["settings"] | {"data_revision": settings["data_revision"]} == settings:
                found.append((_is_mended(record[layout.listed], items), path.stat().st_mtime, path.parent))
        except (ValueError, KeyError, OSError):  # a damaged or deleted run does not concern the new one
            continue
    if not found:
        return ()
    mended, _, place = max(found)
    cure = f": --out {shlex.quote(str(place))} would keep its rows" if mended else ", in which readable images changed"
    return (f"{place} holds the same run over another state of the data{cure}; this run begins anew",)


def _is_mended(before: Sequence[Row], now: Sequence[Row]) -> bool:
    """Tell whether the only change is that images can be read now which could not when `run.json` listed them."""
    if [item | {"pixels": None} for item in before] != [item | {"pixels": None} for item in now]:
        return False
    pixels = [(old.get("pixels", ""), new["pixels"]) for old, new in zip(before, now, strict=True)]
    return all(old in (None, new) for old, new in pixels) and any(old != new for old, new in pixels)


def _have_changed(before: Sequence[Row], now: Sequence[Row], layout: Layout) -> bool:
    """Tell whether readable images have changed; a table of paths has the same revision whatever the files hold."""
    old = {item[layout.item]: item.get("pixels") for item in before}
    pixels = [(old.get(item[layout.item]), item["pixels"]) for item in now]
    return any(None not in pair and pair[0] != pair[1] for pair in pixels)


def failed_ids(folder: Path, layout: Layout) -> set[str]:
    """Return the ids of the pairs or images with a row of status `error`."""
    return {row[layout.item] for row in shards.read_rows(folder, layout=layout) if row["status"] == Status.ERROR}


def _names_another(folder: Path, layout: Layout, data_revision: str) -> bool:
    """Tell whether a row states another revision of the images: `take_out` was killed, and a file is torn again."""
    return any(row["data_revision"] != data_revision for row in shards.read_rows(folder, layout=layout))


def take_out(folder: Path, layout: Layout, places: Mapping[str, int], data_revision: str) -> None:
    """Take the rows of failed pairs or images out of their shards, and state the revision of the images in the others.

    A shard without those rows takes the place in the run's list of its first pair or image, given by `places`. Only one
    process may do this, under the lock of the directory.
    """
    failed = failed_ids(folder, layout)
    for path in shards.shard_files(folder, layout):
        rows = shards.read_shard(path, layout=layout)
        kept = list(dict.fromkeys(row[layout.item] for row in rows if row[layout.item] not in failed))
        if all(row[layout.item] not in failed and row["data_revision"] == data_revision for row in rows):
            continue
        if not kept:
            path.unlink()
            shards.float_file(path).unlink(missing_ok=True)
            continue
        rows, floats, costs, _ = shards.read_items([path], layout, kept)
        shard = shards.shard_path(folder, min(places[name] for name in kept), layout)
        if floats:  # in a match run every row that is kept has one
            shards.write_atomic(shards.float_file(shard), shards.float_bytes(floats, costs))
        os.replace(path, shard)  # in one step: no row is on disk twice or not at all
        rows = [row | {"data_revision": data_revision} for row in rows]
        shards.write_atomic(shard, shards.shard_bytes(rows, layout, {}))
        if shard != path or not floats:
            shards.float_file(path).unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _delete_run(folder: Path) -> None:
    """Delete rows, figures and card; the old record is replaced afterwards, so a kill leaves a run directory."""
    for place in (folder / name for name in OWN_FOLDERS):
        if place.is_symlink():
            raise ValueError(
                f"{str(place)!r} is a link, which --overwrite always does not follow. Remove what it points to, or "
                "give another --out."
            )
        if place.exists():
            shutil.rmtree(place)
    (folder / CARD).unlink(missing_ok=True)


def _sweep(folder: Path, layout: Layout) -> None:
    """Clean up after a killed run: temporary files, an unfinished merge, and shards or float files without the other."""
    for place in (folder, *(folder / name for name in OWN_FOLDERS)):
        for leftover in place.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    shards.settle(folder, layout)
    for shard in shards.shard_files(folder, layout) if layout is MATCH else ():
        if not shards.float_file(shard).is_file():
            shard.unlink()  # a run that was copied in part: a row cannot be checked without its float match
    stems = {p.stem for p in shards.shard_files(folder, layout)}
    for orphan in (folder / "float").glob("*.safetensors"):
        if orphan.stem not in stems:
            orphan.unlink(missing_ok=True)
