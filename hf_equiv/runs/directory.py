"""A run directory: `run.json`, the lock, the files, and the check before publishing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.runs import shards
from hf_equiv.runs.schema import LAYOUTS, MATCH, Layout, Row

RECORD = "run.json"
CARD = "README.md"
RUNS = "runs"
WITHHELD = "withheld"
OVERWRITE = ("missing", "always", "never")
OWN_FOLDERS = (*(layout.folder for layout in LAYOUTS.values()), "float", "figures")
_LOCK = ".lock"

_COMMON = ("model_id", "model_revision", "readout", "dtype", "normalize", "data_id", "data_revision", "seed")
_ANY: tuple[type, ...] = ()
_NONE = type(None)
_SETTINGS: dict[str, dict[str, tuple[type, ...]]] = {
    "match": dict.fromkeys(("solver", "rtol", "max_evals", "radius", "norm", "refine", "labels", "drawn"), _ANY),
    "spectrum": {"k": (int, _NONE), "vectors": (bool,)},
    "lipschitz": {
        "directions": (dict,),
        "regional": (int, float, _NONE),
        "norm": (str, _NONE),
        "linearity": (bool,),
    },
    "walk": {
        "heading": (str,),
        "step": (int, float),
        "num_steps": (int,),
        "rtol": (int, float),
        "stop": (int, float),
        "solver": (str, _NONE),
    },
}
"""The settings of each analysis with their types in `run.json`; `_ANY` allows all types."""

_OPTIONAL = {"stop"}  # absent from early walks, and from walks that lead to no image


def analysis_of(record: Mapping[str, Any]) -> str:
    """Return the verb of a run."""
    return str(record.get("analysis", MATCH.analysis))


def is_withheld(record: Mapping[str, Any]) -> bool:
    """Tell whether the photos of a run are left out."""
    return record.get("photos") == WITHHELD


def settings_hash(settings: Row) -> str:
    """Return the first eight hex digits of the SHA-256 of settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def default_folder(analysis: str, settings: Row) -> Path:
    """Return `runs/VERB/MODEL-slug/HASH8`."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", settings["model_id"]).strip(".-") or "model"
    return Path("runs") / analysis / slug / settings_hash(settings)


def run_name(record: Mapping[str, Any]) -> str:
    """Name the folder of a run in `runs/` of a dataset: `ANALYSIS-MODELSLUG-HASH8`, equal for equal settings."""
    return "-".join(default_folder(analysis_of(record), record["settings"]).parts[1:])


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


def check_record(folder: Path, record: Row, layout: Layout) -> None:
    """Refuse a `run.json` that lacks a key of every run; `read_record` asks for less, to let any run be replaced."""
    settings, kinds = record["settings"], _SETTINGS[layout.analysis]
    wanted = [*_COMMON, *(key for key in kinds if key not in _OPTIONAL)]
    missing = [f"settings.{key}" for key in wanted if key not in settings]
    missing += [
        f"a right settings.{key}" for key, types in kinds.items() if key in settings and not _is(settings[key], types)
    ]
    missing += [key for key, kind in ((layout.listed, list), ("files", dict)) if not isinstance(record.get(key), kind)]
    if not missing and not all(isinstance(item, dict) and layout.item in item for item in record[layout.listed]):
        missing.append(f"{layout.listed}.{layout.item}")
    if "complete" not in record:
        missing.append("complete")
    elif record["complete"] and "summary" not in record:
        missing.append("summary")
    if missing:
        raise ValueError(f"{str(folder / RECORD)!r} is damaged: it lacks {', '.join(missing)}.")


def _is(value: Any, types: tuple[type, ...]) -> bool:
    whole = not isinstance(value, dict) or all(type(count) is int for count in value.values())
    return types == _ANY or (type(value) in types and whole)  # `type`, since a bool is an int too


def write_record(
    folder: Path,
    settings: Row,
    items: Sequence[Row],
    *,
    complete: bool,
    summary: Row | None = None,
    errors: Mapping[str, str] | None = None,
    layout: Layout = MATCH,
    command: str | None = None,
) -> None:
    """Write `run.json`: settings, pairs or images, and for a complete run the summary and the SHA-256 of its files."""
    files = {p.relative_to(folder).as_posix(): shards.sha256_file(p) for p in own_files(folder)} if complete else {}
    record = {
        "analysis": layout.analysis,
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        **({} if command is None else {"command": command}),
        "settings": settings,
        layout.listed: list(items),
        "summary": summary,
        "errors": dict(errors or {}),
        "files": files,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    shards.write_atomic(folder / RECORD, text.encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory, so that two runs never write into it at once."""
    # The lock file is deleted at the end, which no library does safely: a lock on a deleted file is no lock.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        _flock(descriptor, folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                (folder / _LOCK).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, folder: Path) -> None:
    """Lock the open file, unless another run has locked it or has just deleted it."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock, and runs there are not protected from each other
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder / _LOCK)):
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError):
        raise ValueError(
            f"{str(folder)!r} is being written by another run. Wait for it, stop it, or give another --out."
        ) from None


def unwritable(folder: Path, error: OSError) -> ValueError:
    """Say that a run directory cannot be written."""
    return ValueError(f"run directory {str(folder)!r} cannot be written: {error.strerror}. Give another --out.")


def finished_ids(folder: Path, layout: Layout = MATCH) -> set[str]:
    """Return the ids of the pairs or images whose rows are on disk."""
    return {row[layout.item] for row in shards.read_rows(folder, layout=layout)}


def own_files(folder: Path) -> list[Path]:
    """Return the files of a run directory except `run.json`: those of its folders, sorted, and the card."""
    inside = sorted(path for name in OWN_FOLDERS for path in (folder / name).rglob("*"))
    return [p for p in [*inside, folder / CARD] if p.is_file() and not p.name.startswith(".")]


def folders_in(folder: Path) -> list[Path]:
    """Return the run directories at any depth inside a folder, sorted, without hidden folders."""
    found = sorted(path.parent for path in folder.rglob(RECORD) if path.is_file())
    return [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


@dataclass(frozen=True)
class LocalRun:
    """A finished run directory with the files that its `run.json` states.

    Attributes:
        folder: run directory.
        record: its `run.json`.
        versions: versions of the packages that made the rows; None where no row states them.
    """

    folder: Path
    record: Row
    versions: str | None

    @property
    def name(self) -> str:
        """`ANALYSIS-MODELSLUG-HASH8`."""
        return run_name(self.record)

    @property
    def layout(self) -> Layout:
        """Layout of the rows."""
        return LAYOUTS[analysis_of(self.record)]


def read_run(folder: Path) -> LocalRun:
    """Open a run directory that may be published.

    Returns:
        The run.

    Raises:
        ValueError: the folder is no run or a folder of runs; the run is not finished, made by a newer version, or its
            files are not those of `run.json`.
    """
    if inside := runs_inside(folder):
        items = "".join(f"\n- {path.as_posix()}{note}" for path, note in inside)
        raise ValueError(f"{folder_of_runs(folder, inside)} Publish each by itself:{items}")
    record = read_record(folder)
    where, analysis = repr(str(folder)), analysis_of(record)
    if analysis not in LAYOUTS:
        raise ValueError(f"{where} holds a run of {analysis!r}, which this version of hf_equiv does not know.")
    layout = LAYOUTS[analysis]
    check_record(folder, record, layout)
    if not record["complete"]:
        raise ValueError(
            f"{where} must be a finished run; rows are missing. Run the same {analysis} command again: it makes the "
            "missing rows."
        )
    if "verdict" not in (record["summary"] or ()):
        raise ValueError(f"{str(folder / RECORD)!r} is damaged: it lacks summary.verdict.")
    _check_files(folder, record)
    first = (row["versions"] for path in shards.shard_files(folder, layout)[:1]
             for row in shards.read_shard(path, layout=layout))  # fmt: skip
    return LocalRun(folder, record, next(first, None))


def runs_inside(folder: Path) -> list[tuple[Path, str]]:
    """Return the runs in a folder that is no run itself, each with a note in brackets if it cannot be published yet."""
    if (folder / RECORD).exists() or not folder.is_dir():
        return []
    found = []
    for path in folders_in(folder):
        try:
            record = read_record(path)
            note = "" if record.get("complete") else f" (not finished: run the same {analysis_of(record)} command)"
        except ValueError:
            note = f" (its {RECORD} cannot be read)"
        found.append((path, note))
    return found


def folder_of_runs(folder: Path, inside: Sequence[tuple[Path, str]]) -> str:
    """Say why a folder of runs cannot be published."""
    several = "1 run" if len(inside) == 1 else f"{len(inside)} runs"
    return (
        f"{folder.as_posix()!r} must be one run directory; it is a folder of {several}. A dataset takes any number of "
        "runs, one after the other."
    )


def _check_files(folder: Path, record: Row) -> None:
    """Refuse a run directory whose files are not those that `run.json` lists with their SHA-256."""
    stated: dict[str, str] = dict(record["files"])
    own = {path.relative_to(folder).as_posix(): path for path in own_files(folder)}
    if record.get("card") == "dataset":  # the card of a dataset belongs to its owner
        own.pop(CARD, None)
    wrong = [f"{name} is missing" for name in stated if name not in own]
    wrong += [f"{name} is not listed" for name in own if name not in stated]
    wrong += [f"{name} has changed" for name, path in own.items()
              if name in stated and stated[name] != shards.sha256_file(path)]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{str(folder)!r} must be as its run.json states; {', '.join(wrong[:3])}{more}. `hf-equiv verify` shows "
            "every difference; run the analysis again with --overwrite always to make it anew."
        )
