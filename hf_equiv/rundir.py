"""A run directory: settings, lock, what is finished, what is left, the closing `run.json` and dataset card."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_equiv import merge, retry, shards
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.shards import MATCH, Layout, Row

RECORD = "run.json"
OVERWRITE = ("missing", "always", "never")
_OWN_FOLDERS = ("matches", "spectra", "lipschitz", "paths", "float", "figures")
_LOCK = ".lock"
_CHANGED = {"data_revision": "the photos changed", "model_revision": "the weights changed"}


def read_record(folder: Path) -> Row:
    """Read `run.json`.

    Returns:
        The record.

    Raises:
        ValueError: there is none, it is damaged, or it was written by a newer version.
    """
    path = folder / RECORD
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} must be a run directory; it does not exist. Check the path.")
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} must be a run directory; it has no {RECORD}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, _ = int(record["schema_version"]), record["settings"]["model_id"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({type(error).__name__}: {error}).") from error
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{str(folder)!r} was written with schema_version {version}; this version of hf_equiv knows up to "
            f"{SCHEMA_VERSION}. Upgrade hf_equiv."
        )
    return dict(record)


def folders_in(folder: Path) -> list[Path]:
    """Run directories at any depth inside a folder, sorted; hidden folders are left out."""
    found = (path for path in folder.rglob(RECORD) if path.is_file())
    inside = ((path.parent, path.relative_to(folder).parts) for path in found)
    return sorted(place for place, parts in inside if not any(part.startswith(".") for part in parts))


def check_record(folder: Path, record: Row, layout: Layout) -> None:
    """Refuse a `run.json` without what every run states; `read_record` asks for less, since any run may be replaced.

    Raises:
        ValueError: something is missing.
    """
    wanted = ["model_id", "model_revision", "readout", "dtype", "normalize", "data_id", "data_revision", "seed"]
    kinds = _OWN.get(layout.analysis, {})
    wanted += (
        ["rtol", "max_evals", "radius", "norm", "refine", "labels", "drawn"]
        if layout is MATCH
        else sorted(kinds.keys() - _MAY_LACK)
    )
    settings, summary = record["settings"], record.get("summary")
    missing = [f"settings.{key}" for key in wanted if key not in settings]
    missing += [f"a right settings.{k}" for k, kind in kinds.items() if k in settings and not _is(settings[k], kind)]
    missing += [key for key, kind in ((layout.listed, list), ("files", dict)) if not isinstance(record.get(key), kind)]
    missing += [f"{layout.listed}.{layout.item}"] if not missing and not all(
        isinstance(item, dict) and layout.item in item for item in record[layout.listed]
    ) else []  # fmt: skip
    missing += ["complete"] if "complete" not in record else []
    if record.get("complete") and "summary" not in record and summary is None:
        missing.append("summary")
    if missing:
        raise ValueError(f"{str(folder / RECORD)!r} is damaged: it lacks {', '.join(missing)}.")


_OWN: dict[str, dict[str, Any]] = {
    "spectrum": {"k": int | None, "vectors": bool},
    "lipschitz": {"directions": dict, "regional": float | None, "norm": str | None, "linearity": bool},
    "walk": {"heading": str, "step": float, "num_steps": int, "rtol": float, "stop": float, "solver": str | None},
}
"""The settings of each analysis, and what they are."""

_MAY_LACK = {"stop"}  # of walks that lead to no image, and of early ones


def _is(value: Any, kind: Any) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(n, int) for n in value.values())
    return isinstance(float(value) if isinstance(value, int) and isinstance(1.0, kind) else value, kind)


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
    before, failed = read_record(folder), retry.failed_ids(folder, layout)
    torn = not before["complete"] and retry.names_another(folder, layout, settings["data_revision"])
    if failed or torn or before["settings"] != settings:
        write_record(folder, before["settings"], before[layout.listed], complete=False, layout=layout)
        places = {item[layout.item]: place for place, item in enumerate(items)}
        retry.take_out(folder, layout, places, settings["data_revision"])
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
    return len(finished_ids(folder, layout) - retry.failed_ids(folder, layout))


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
    if other == ["data_revision"] and items is not None and retry.is_mended(record[layout.listed], items):
        return
    if not other and items is not None and retry.have_changed(record[layout.listed], items):
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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the directory's lock, so that two runs never write into it at once; its file goes when the run ends.

    Raises:
        ValueError: another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(_unwritable(folder, error)) from error
    try:
        _flock(descriptor, folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                (folder / _LOCK).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def finished_ids(folder: Path, layout: Layout = MATCH) -> set[str]:
    """Ids of the pairs or images whose rows are on disk."""
    return {row[layout.item] for row in shards.read_rows(folder, layout=layout)}


def own_files(folder: Path) -> list[Path]:
    """The files of a run directory but `run.json`: those of its folders, sorted, and the card."""
    inside = sorted(path for name in _OWN_FOLDERS for path in (folder / name).rglob("*"))
    return [p for p in [*inside, folder / "README.md"] if p.is_file() and not p.name.startswith(".")]


def write_record(
    folder: Path,
    settings: Row,
    items: Sequence[Row],
    *,
    complete: bool,
    summary: Row | None = None,
    errors: Mapping[str, str] | None = None,
    layout: Layout = MATCH,
) -> None:
    """Write `run.json`: settings, the pairs or images, and once complete the summary and SHA-256 of every file."""
    files: dict[str, str] = {}
    if complete:
        files = {p.relative_to(folder).as_posix(): shards.sha256_file(p) for p in own_files(folder)}
    record = {
        "analysis": layout.analysis,
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        "settings": settings,
        layout.listed: list(items),
        "summary": summary,
        "errors": dict(errors or {}),
        "files": files,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    shards.write_atomic(folder / RECORD, text.encode())


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
    merge.settle(folder, layout)
    for shard in shards.shard_files(folder, layout) if layout is MATCH else ():
        if not (folder / "float" / f"{shard.stem}.safetensors").is_file():
            shard.unlink()  # a run that was copied in part: without its float matches a row cannot be checked
    stems = {p.stem for p in shards.shard_files(folder, layout)}
    for orphan in (folder / "float").glob("*.safetensors"):
        if orphan.stem not in stems:
            orphan.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> str:
    return f"run directory {str(folder)!r} cannot be written: {error.strerror}. Give another --out."


def _flock(descriptor: int, folder: Path) -> None:
    """Lock the open file, unless another run has it or has just removed it."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock: there the check is left out
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder / _LOCK)):
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError):
        raise ValueError(
            f"{str(folder)!r} is being written by another run. Wait for it, stop it, or give another --out."
        ) from None
