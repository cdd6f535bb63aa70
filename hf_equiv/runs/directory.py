"""A run directory: settings, lock, what is finished, what is left, the closing `run.json` and dataset card."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.runs import shards
from hf_equiv.runs.schema import LAYOUTS, Layout, MATCH, Row
from pathlib import Path
from typing import Any

RECORD = "run.json"


OVERWRITE = ("missing", "always", "never")


_OWN_FOLDERS = ("matches", "spectra", "lipschitz", "paths", "float", "figures")


_LOCK = ".lock"


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
    command: str | None = None,
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
    } | ({} if command is None else {"command": command})
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    shards.write_atomic(folder / RECORD, text.encode())


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


def settings_hash(settings: dict[str, Any]) -> str:
    """First eight hex digits of the SHA-256 of settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def default_folder(analysis: str, settings: dict[str, Any]) -> Path:
    """`runs/VERB/MODEL-slug/HASH8`."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", settings["model_id"]).strip(".-") or "model"
    return Path("runs") / analysis / slug / settings_hash(settings)


# A finished run directory that may be published, and what is said of a folder that is none.


CARD = "README.md"


@dataclass(frozen=True)
class LocalRun:
    """A finished run directory whose files are those that its `run.json` states.

    Attributes:
        folder: where it is.
        record: its `run.json`.
        versions: of the packages that made the rows; None where no row states them.
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
        """Of its rows."""
        return LAYOUTS[analysis_of(self.record)]


def analysis_of(record: Mapping[str, Any]) -> str:
    """The verb of a run."""
    return str(record.get("analysis", MATCH.analysis))


def run_name(record: Mapping[str, Any]) -> str:
    """`ANALYSIS-MODELSLUG-HASH8`: runs of equal settings have equal names.

    Args:
        record: `run.json` of a run.

    Returns:
        The name of its folder in `runs/`.
    """
    place = default_folder(analysis_of(record), record["settings"])
    return "-".join(place.parts[1:])


def read_run(folder: Path) -> LocalRun:
    """Open a run directory that may be published: finished, known, and as its `run.json` states.

    Args:
        folder: run directory.

    Returns:
        The run.

    Raises:
        ValueError: it is no run, a folder of runs, not finished, of a newer version, or its files are not those that it
            states.
    """
    if inside := runs_inside(folder):
        items = "".join(f"\n- {path.as_posix()}{note}" for path, note in inside)
        raise ValueError(f"{folder_of_runs(folder, inside)} Publish each by itself:{items}")
    record = read_record(folder)
    where = repr(str(folder))
    analysis = analysis_of(record)
    if analysis not in LAYOUTS:
        raise ValueError(f"{where} holds a run of {analysis!r}, which this version of hf_equiv does not know.")
    check_record(folder, record, LAYOUTS[analysis])
    if not record["complete"]:
        raise ValueError(
            f"{where} must be a finished run; rows are missing. Run the same {analysis} command again: it makes what "
            "is left."
        )
    if "verdict" not in (record["summary"] or ()):
        raise ValueError(f"{str(folder / RECORD)!r} is damaged: it lacks summary.verdict.")
    _check_files(folder, record)
    layout = LAYOUTS[analysis]
    versions: str | None = None
    for path in shards.shard_files(folder, layout)[:1]:
        versions = next((row["versions"] for row in shards.read_shard(path, layout=layout)), None)
    return LocalRun(folder, record, versions)


def runs_inside(folder: Path) -> list[tuple[Path, str]]:
    """The runs in a folder that is none itself, each with a note in brackets where it cannot be published yet."""
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
    """What is wrong with publishing such a folder."""
    several = "1 run" if len(inside) == 1 else f"{len(inside)} runs"
    return (
        f"{folder.as_posix()!r} must be one run directory; it is a folder of {several}. A dataset takes any number of "
        "runs, one after the other."
    )


def _check_files(folder: Path, record: Row) -> None:
    """Every file must be listed with its SHA-256, and lie inside the folder."""
    stated: dict[str, str] = dict(record["files"])
    own = {path.relative_to(folder).as_posix(): path for path in own_files(folder)}
    if record.get("card") == "dataset":  # the card of a dataset is its owner's
        own.pop(CARD, None)
    wrong = [f"{name} is missing" for name in stated if name not in own]
    wrong += [f"{name} is not listed" for name in own if name not in stated]
    wrong += [f"{name} has changed" for name, path in own.items() if stated.get(name) != shards.sha256_file(path)
              and name in stated]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{str(folder)!r} must be as its run.json states; {', '.join(wrong[:3])}{more}. `hf-equiv verify` shows "
            "what does not hold; run the analysis again with --overwrite always to make it anew."
        )


RUNS = "runs"


WITHHELD = "withheld"


OWN_FOLDERS = (*(layout.folder for layout in LAYOUTS.values()), "float", "figures")


def is_withheld(record: Mapping[str, Any]) -> bool:
    """Whether the photos of a run are left out."""
    return record.get("photos") == WITHHELD
