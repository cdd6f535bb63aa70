"""Resume a run: keep its finished rows, remake failed ones, and refuse other settings.

Rows of status `error` are taken out of their shards and remade. Images that could not be read may have changed
meanwhile; all others must be the same. After a kill every other row is on disk once, and the next call takes out the
rest.
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

from hf_equiv.formatting import cut, fraction
from hf_equiv.runs import directory, shards
from hf_equiv.runs.directory import CARD, OWN_FOLDERS, RECORD, analysis_of, read_record
from hf_equiv.runs.schema import MATCH, Layout, Row

_CHANGED = {"data_revision": "the photos changed", "model_revision": "the weights changed"}


def prepare(folder: Path, plan: Any, overwrite: str) -> int:
    """Make a locked folder ready for a run, and return the number of pairs or images to try again."""
    # `missing` resumes a run of the same settings, `always` deletes an earlier run and nothing else, `never` refuses.
    there, layout, revision = _holds_run(folder, plan, overwrite), plan.layout, plan.settings["data_revision"]
    if there and overwrite == "always":
        _delete_run(folder)
        there = False
    _sweep(folder, layout)
    if not there:
        directory.write_record(folder, plan)
        return 0
    before, failed = read_record(folder), shards.ids_of(folder, layout, failed=True)
    stale = any(_is_stale(row, failed, layout, revision) for row in shards.read_rows(folder, layout=layout))
    if stale or before["settings"] != plan.settings:
        directory.save_record(folder, before | {"complete": False, "summary": None, "errors": {}, "files": {}})
        take_out(folder, layout, {item.name: item.index for item in plan.items}, revision)
        directory.write_record(folder, plan)
    return len(failed)


def refuse_early(folder: Path, plan: Any, overwrite: str) -> int:
    """Apply the rules of `prepare` and `locked` without leaving a file, and return the number of rows to keep."""
    directory.refuse_odd_name(folder)
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".hf-equiv-", dir=there):
            pass
    except OSError as error:
        raise directory.unwritable(folder, error) from error
    if not _holds_run(folder, plan, overwrite) or overwrite == "always":
        return 0
    return len(shards.ids_of(folder, plan.layout) - shards.ids_of(folder, plan.layout, failed=True))


def _holds_run(folder: Path, plan: Any, overwrite: str) -> bool:
    """Return whether the folder holds a run; refuse it if `overwrite` forbids its use."""
    if not (folder / RECORD).exists():
        if folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise ValueError(f"{str(folder)!r} is not empty and not a run directory (no {RECORD}). Give another --out.")
        return False
    if overwrite == "never":
        raise ValueError(f"{str(folder)!r} holds a run already and --overwrite is never. Give another --out.")
    if overwrite == "missing":
        refuse_other_settings(folder, plan, mendable=True)
    return True


def refuse_other_settings(folder: Path, plan: Any, *, mendable: bool) -> None:
    """Refuse a folder whose run has other settings or images; `mendable` ones could not be read before."""
    record, listed = read_record(folder), plan.layout.listed
    there, asked = record["settings"], plan.settings
    if analysis_of(record) != plan.layout.analysis:
        there, asked = {"analysis": analysis_of(record)}, {"analysis": plan.layout.analysis}
    other = [key for key in sorted({*there, *asked}) if there.get(key) != asked.get(key)]
    told = ""
    if other and not (mendable and other == ["data_revision"] and _is_mended(record.get(listed, ()), plan)):
        values = {k: [_shown(of.get(k)) for of in (there, asked)] for k in other}
        changes = (f"{_CHANGED.get(k, k)} ({old} there, {new} asked)" for k, (old, new) in values.items())
        told = f"other settings: {', '.join(changes)}. Give"
    elif not other and _have_changed(record.get(listed, ()), plan):
        told = "other images under the same names: the files have changed. Put them back, give"
    if told:
        raise ValueError(f"{str(folder)!r} holds a run of {told} another --out, or --overwrite always to replace it.")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return fraction(value)
    return cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 60)


def other_states(folder: Path, plan: Any) -> tuple[str, ...]:
    """Describe the latest earlier run next to a new one whose only difference is that the images changed."""
    # The name of the default directory depends on the revision of the images, so a repaired photo begins another run.
    found: list[tuple[bool, float, Path]] = []
    for path in folder.parent.glob(f"*/{RECORD}") if not (folder / RECORD).exists() else ():
        try:
            record = read_record(path.parent)
            if record["settings"] | {"data_revision": plan.settings["data_revision"]} == plan.settings:
                found.append((_is_mended(record[plan.layout.listed], plan), path.stat().st_mtime, path.parent))
        except (ValueError, KeyError, OSError):  # a damaged or deleted run does not concern the new one
            continue
    if not found:
        return ()
    mended, _, place = max(found)
    cure = f": --out {shlex.quote(str(place))} would keep its rows" if mended else ", in which readable images changed"
    return (f"{place} holds the same run over another state of the data{cure}; this run begins anew",)


def _is_mended(before: Sequence[Row], plan: Any) -> bool:
    """Return whether the only change is that images unreadable when `run.json` listed them are readable now."""
    now = [item.entry() for item in plan.items]
    if [item | {"pixels": None} for item in before] != [item | {"pixels": None} for item in now]:
        return False
    pixels = [(old.get("pixels", ""), new["pixels"]) for old, new in zip(before, now, strict=True)]
    return all(old in (None, new) for old, new in pixels) and any(old != new for old, new in pixels)


def _have_changed(before: Sequence[Row], plan: Any) -> bool:
    """Return whether readable images have changed; the revision of a table of paths does not depend on the files."""
    old = {item[plan.layout.item]: item.get("pixels") for item in before}
    pixels = [(old.get(item.name), item.pixels) for item in plan.items]
    return any(None not in pair and pair[0] != pair[1] for pair in pixels)


def _is_stale(row: Row, failed: set[str], layout: Layout, data_revision: str) -> bool:
    return row[layout.item] in failed or row["data_revision"] != data_revision


def take_out(folder: Path, layout: Layout, places: Mapping[str, int], data_revision: str) -> None:
    """Remove the rows of failed items from their shards, and update the revision of the images in the others."""
    # A shard without those rows takes the place in the run's list of its first item, given by `places`. Only one
    # process may do this, under the lock of the directory.
    failed = shards.ids_of(folder, layout, failed=True)
    for path in shards.shard_files(folder, layout):
        rows = shards.read_shard(path, layout=layout)
        if not any(_is_stale(row, failed, layout, data_revision) for row in rows):
            continue
        kept = list(dict.fromkeys(row[layout.item] for row in rows if row[layout.item] not in failed))
        if not kept:
            path.unlink()
            shards.float_file(path).unlink(missing_ok=True)
            continue
        rows, floats, costs, _ = shards.read_items([path], layout, kept)
        shard = shards.shard_path(folder, min(places[name] for name in kept), layout)
        if floats:  # every kept row of a match run has a float image
            shards.write_atomic(shards.float_file(shard), shards.float_bytes(floats, costs))
        os.replace(path, shard)  # one step, so that each row is on disk exactly once
        rows = [row | {"data_revision": data_revision} for row in rows]
        shards.write_atomic(shard, shards.shard_bytes(rows, layout, {}))
        if shard != path or not floats:
            shards.float_file(path).unlink(missing_ok=True)


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
    """Clean up after a killed run: temporary files, an unfinished merge, shards and float files without a partner."""
    for place in (folder, *(folder / name for name in OWN_FOLDERS)):
        for leftover in place.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    shards.settle(folder, layout)
    for shard in shards.shard_files(folder, layout) if layout is MATCH else ():
        if not shards.float_file(shard).is_file():
            shard.unlink()  # the run was copied in part; a row cannot be checked without its float match
    stems = {p.stem for p in shards.shard_files(folder, layout)}
    for orphan in (folder / "float").glob("*.safetensors"):
        if orphan.stem not in stems:
            orphan.unlink(missing_ok=True)
