"""Handle a run directory: `run.json`, the lock, the files, and the check before publishing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from hf_equiv.formatting import many, some, utf8
from hf_equiv.limits import MAX_RECORD
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.runs import shards
from hf_equiv.runs.schema import LAYOUTS, MATCH, Layout, Row

try:
    import fcntl
except ImportError:  # Windows has no flock, and runs there are not protected from each other
    fcntl = None  # type: ignore[assignment]

RECORD = "run.json"
CARD = "README.md"
RUNS = "runs"
WITHHELD = "withheld"
OVERWRITE = ("missing", "always", "never")
OWN_FOLDERS = (*(layout.folder for layout in LAYOUTS.values()), "float", "figures")
_LOCK = ".lock"
_DEEPEST = 50  # most levels of lists and objects in `run.json`; a run writes six

_COMMON: dict[str, tuple[type, ...]] = {"normalize": (bool,), "seed": (int,)}
_COMMON |= dict.fromkeys(("model_id", "model_revision", "readout", "dtype", "data_id", "data_revision"), (str,))
_OTHERS: dict[str, tuple[type, ...]] = dict.fromkeys(("processor", "attention"), (str,))
_NUMBER = (int, float)
_NONE = type(None)
HEAD: dict[str, tuple[type, ...]] = {
    "schema_version": (int,), "settings": (dict,), "analysis": (str,), "complete": (bool,),
    "files": (dict,), "errors": (dict,), "closed_with": (dict,), "command": (str, _NONE),
} | dict.fromkeys(("photos", "license", "rights", "versions", "card"), (str, _NONE))  # fmt: skip
"""The types of the keys of `run.json`; only the first two must be there in every version."""

_SETTINGS: dict[str, dict[str, tuple[type, ...]]] = {
    "match": {"solver": (str,), "rtol": _NUMBER, "max_evals": (int,), "radius": (*_NUMBER, _NONE)}
    | {"norm": (str, _NONE), "refine": (bool,), "labels": (list, _NONE), "drawn": (bool,), "through": (list,)}
    | {"full_size": (bool,), "target_texts": (list,), "usual_texts": (list,)},
    "spectrum": {"k": (int, _NONE), "vectors": (bool,)},
    "lipschitz": {"directions": (dict,), "regional": (*_NUMBER, _NONE), "norm": (str, _NONE), "linearity": (bool,)},
    "walk": {"heading": (str,), "num_steps": (int,), "solver": (str, _NONE)}
    | dict.fromkeys(("step", "rtol", "stop"), _NUMBER),
}
"""The settings of each analysis with their types in `run.json`."""

_OPTIONAL = ("stop", "through", "full_size", "target_texts", "usual_texts")
"""The settings of runs that asked for them; early walks have no `stop`."""

_INSIDE: dict[str, tuple[type, ...]] = {"directions": (int,), "radii": _NUMBER}
_INSIDE |= dict.fromkeys(("labels", "through", "target_texts", "usual_texts"), (str,))
"""The types of the values in lists and objects of the settings."""


def analysis_of(record: Mapping[str, Any]) -> str:
    """Return the verb of a run."""
    return str(record.get("analysis", MATCH.analysis))


def is_withheld(record: Mapping[str, Any]) -> bool:
    """Return whether the photos of a run are left out."""
    return record.get("photos") == WITHHELD


def is_summed_up(record: Mapping[str, Any]) -> bool:
    """Return whether a run has a summary with its verdict."""
    return isinstance(record["summary"], dict) and "verdict" in record["summary"]


def slug(model: str) -> str:
    """Return the name of a model as a part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "--", model).strip(".-") or "model"


def default_folder(analysis: str, settings: Row) -> Path:
    """Return `runs/VERB/MODEL-slug/HASH8`."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return Path("runs") / analysis / slug(settings["model_id"]) / hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(record: Mapping[str, Any]) -> str:
    """Name the folder of a run in `runs/` of a dataset: `ANALYSIS-MODELSLUG-HASH8`, equal for equal settings."""
    return "-".join(default_folder(analysis_of(record), record["settings"]).parts[1:])


def check_command(where: str, settings: Mapping[str, Any]) -> str:
    """Return the command that verifies a run, with the function that made its model if the user imported one."""
    own = ["--import", str(settings["import"])] if settings.get("import") else []
    return shlex.join(["hf-equiv", "verify", where, *own])


def read_record(folder: Path) -> Row:
    """Read `run.json`; raise a ValueError if it is missing, damaged, or of a newer version."""
    path = folder / RECORD
    if not path.is_file():
        why = f"it has no {RECORD}" if folder.is_dir() else "it does not exist. Check the path"
        raise ValueError(f"{str(folder)!r} must be a run directory; {why}.")
    try:
        with path.open("rb") as stream:
            record = parse_record(stream.read(MAX_RECORD + 1))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}. Restore it, or make the run again elsewhere.") from error
    if (stated := record["schema_version"]) > SCHEMA_VERSION:
        raise ValueError(
            f"{str(folder)!r} was written with schema_version {stated}; this version of hf_equiv knows up to "
            f"{SCHEMA_VERSION}. Upgrade hf_equiv."
        )
    return record


def parse_record(data: bytes) -> Row:
    """Read the text of a `run.json` of any version; a ValueError names its faults."""
    if len(data) > MAX_RECORD:
        raise ValueError(f"it must have at most {MAX_RECORD:,} bytes")
    try:
        record = json.loads(data.decode("utf-8-sig"), parse_int=_whole, object_pairs_hook=each_key_once)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # no Infinity, no half of a character
        if _depth(record) > _DEEPEST:  # `verify` would go through it by a function that calls itself
            raise RecursionError
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    wrong = _wrong_types(record, HEAD, ("schema_version", "settings"))
    wrong = wrong or _wrong_types(record["settings"], _COMMON | _OTHERS, ("model_id", "model_revision"), "settings.")
    layout = None if wrong else LAYOUTS.get(analysis_of(record))
    if layout is not None:
        needed = (layout.listed, "files", "complete", "summary") if record["schema_version"] <= SCHEMA_VERSION else ()
        wrong += _wrong_types(record, {layout.listed: (list,)}, needed)
        if not wrong and not all(_is_entry(item, layout) for item in record.get(layout.listed, ())):
            wrong.append(f"a valid value of {layout.listed}.{layout.item}")
        texts = ("files", "errors", "closed_with")
        wrong += [f"a valid value of {key}" for key in texts if not _holds(record.get(key), (str,))]
    if wrong:
        raise ValueError(f"it lacks {', '.join(wrong)}")
    return dict(record)


def each_key_once(pairs: Sequence[tuple[str, Any]]) -> Row:
    """Make an object of JSON; refuse a key that is there twice, since readers differ in the value they take."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return made


def _whole(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _wrong_types(found: Any, kinds: Mapping[str, Any], needed: Iterable[str], inside: str = "") -> list[str]:
    """Name the keys that are missing or have a wrong type."""
    if not isinstance(found, dict):
        return [f"a JSON object {inside.rstrip('.')}".rstrip()]
    wrong = [
        f"a valid value of {inside}{key}" for key, types in kinds.items() if key in found and not _is(found[key], types)
    ]
    return [f"{inside}{key}" for key in needed if key not in found] + wrong


def check_record(folder: Path, record: Row) -> Layout:
    """Return the layout of a run, and refuse a `run.json` of an unknown analysis or without a key of every run."""
    layout = LAYOUTS.get(analysis_of(record))
    if layout is None:
        told = f"holds a run of {analysis_of(record)!r}, which this version of hf_equiv does not know"
        raise ValueError(f"{str(folder)!r} {told}. Upgrade hf_equiv.")
    settings, kinds = record["settings"], _SETTINGS[layout.analysis]
    needed = [key for key in (*_COMMON, *kinds) if key not in _OPTIONAL]
    missing = _wrong_types(settings, kinds, needed, "settings.")
    missing += [f"a valid value of settings.{k}" for k, types in _INSIDE.items() if not _holds(settings.get(k), types)]
    missing += [] if _is_object(settings.get("processor", "{}")) else ["a valid value of settings.processor"]
    if missing:
        why = f"is damaged: it lacks {', '.join(missing)}. Restore it, or make the run again elsewhere"
        raise ValueError(f"{str(folder / RECORD)!r} {why}.")
    return layout


def _is_object(text: str) -> bool:
    """Return whether a text is a JSON object."""
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(text), dict)
    return False


def _holds(value: Any, types: tuple[type, ...]) -> bool:
    return all(_is(one, types) for one in _inside(value))


def _depth(value: Any) -> int:
    return 1 + max(map(_depth, _inside(value)), default=0)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _is_entry(item: Any, layout: Layout) -> bool:
    """Return whether an entry of the list of pairs or images has an id, and all its values are text."""
    texts = isinstance(item, dict) and all(v is None or isinstance(v, str) for v in item.values())
    return texts and item.get(layout.item) is not None


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return type(value) in types  # not `isinstance`, since a bool is an int


def write_record(folder: Path, plan: Any, summary: Row | None = None, errors: Mapping[str, str] | None = None) -> None:
    """Write `run.json`: settings, pairs or images; with a summary, also the SHA-256 of the files of a finished run."""
    files = own_files(folder) if summary is not None else []
    record = {
        "analysis": plan.layout.analysis,
        "schema_version": SCHEMA_VERSION,
        "complete": summary is not None,
        "command": plan.command,
        "settings": plan.settings,
        plan.layout.listed: [item.entry() for item in plan.items],
        "summary": summary,
        "errors": dict(errors or {}),
        "files": {path.relative_to(folder).as_posix(): shards.sha256_file(path) for path in files},
        **({} if summary is None else {"closed_with": software()}),
    }
    save_record(folder, record)


def software() -> dict[str, str]:
    """Return the versions of the packages that write summary, card and figures."""
    return {name: version(name) for name in ("hf_equiv", "matplotlib", "numpy", "pillow")}


def record_text(record: Row) -> str:
    """Return the text of `run.json`."""
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def save_record(folder: Path, record: Row) -> None:
    """Write `run.json`."""
    shards.write_atomic(folder / RECORD, record_text(record).encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of a run directory, so that two runs never write into it at once; yield a check that it is held."""

    def is_held() -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / _LOCK))
        except OSError:
            return False

    def check() -> None:
        if not is_held():
            raise shards.gone(folder)

    refuse_odd_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644))
    except OSError as error:
        raise unwritable(folder, error) from error
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not is_held():
                    raise BlockingIOError  # another run has just deleted it
        except BlockingIOError:
            raise ValueError(
                f"{str(folder)!r} is being written by another run. Wait for it, stop it, or give another --out."
            ) from None
        except OSError as error:
            raise unwritable(folder, error, "locked") from error
        try:
            yield check
        finally:
            with contextlib.suppress(OSError):  # Windows does not delete an open file
                if is_held():
                    (folder / _LOCK).unlink()


def refuse_busy(folder: Path) -> None:
    """Refuse a run directory, or a folder of them, into which another run is writing."""
    for path in filter(Path.exists, (folder / _LOCK, *folder.glob(f"*/{_LOCK}"))):
        with locked(path.parent):
            pass


def refuse_odd_name(folder: Path) -> None:
    """Refuse a folder whose name is no UTF-8, which safetensors does not open."""
    if utf8(str(folder)) != str(folder):
        raise ValueError(f"`out` must be a name in UTF-8; got {str(folder)!r}. Give another --out.")


def unwritable(folder: Path, error: OSError, what: str = "written") -> ValueError:
    """Return the error for a run directory that cannot be written or locked."""
    cure = "Give another --out" + (" on a file system with locks" if what == "locked" else "")
    return ValueError(f"run directory {str(folder)!r} cannot be {what}: {error.strerror}. {cure}.")


def own_files(folder: Path) -> list[Path]:
    """Return the files of a run directory except `run.json`: the files in its folders, sorted, and the card."""
    inside = sorted(path for name in OWN_FOLDERS for path in (folder / name).rglob("*"))
    return [p for p in [*inside, folder / CARD] if p.is_file() and not p.name.startswith(".")]


def folders_in(folder: Path) -> list[Path]:
    """Return the run directories at any depth inside a folder, sorted, without hidden folders."""
    found = sorted(path.parent for path in folder.rglob(RECORD) if path.is_file())
    return [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


@dataclass(frozen=True)
class LocalRun:
    """A finished run directory with its `run.json`, and the versions of the packages that made its rows."""

    folder: Path
    record: Row
    layout: Layout
    versions: str | None

    @property
    def name(self) -> str:
        """`ANALYSIS-MODELSLUG-HASH8`."""
        return run_name(self.record)


def read_run(folder: Path) -> LocalRun:
    """Open a run directory; raise a ValueError unless it may be published: finished, with the files as recorded."""
    refuse_folder_of_runs(folder)
    record = read_record(folder)
    layout = check_record(folder, record)
    if not record["complete"]:
        raise ValueError(
            f"{str(folder)!r} must be a finished run; rows are missing. Run the same {layout.analysis} command again: "
            "it makes the missing rows."
        )
    if not is_summed_up(record):
        raise ValueError(f"{str(folder / RECORD)!r} is damaged: it lacks summary.verdict.")
    wrong = [f"{name} {fault}" for name, _, _, fault in file_faults(folder, record)]
    if wrong:
        raise ValueError(
            f"{str(folder)!r} must be as its run.json states; {some(wrong, 3)}. `hf-equiv verify` shows "
            "every difference; run the analysis again with --overwrite always to make it anew."
        )
    versions = (row["versions"] for row in shards.read_rows(folder, layout=layout))
    return LocalRun(folder, record, layout, next(versions, None))


def refuse_folder_of_runs(folder: Path, command: Callable[[str], str] = str) -> None:
    """Refuse a folder of runs that is no run itself, and list the runs; `command` turns each path into a line."""
    if (folder / RECORD).exists() or not folder.is_dir():
        return
    lines = []
    for path in folders_in(folder):
        try:
            record = read_record(path)
            note = "" if record.get("complete") else f" (not finished: run the same {analysis_of(record)} command)"
        except ValueError:
            note = f" (its {RECORD} cannot be read)"
        lines.append(f"\n- {command(path.as_posix())}{note}")
    if lines:
        raise ValueError(
            f"{folder.as_posix()!r} must be one run directory; it is a folder of {many(len(lines), 'run')}. Name one "
            f"after the other:{''.join(lines)}"
        )


def file_faults(folder: Path, record: Row) -> Iterator[tuple[str, str | None, str | None, str]]:
    """Yield the files that are not as `run.json` states: name, stated SHA-256, SHA-256 of the file, and the fault."""
    stated: dict[str, str] = record["files"]
    own = {path.relative_to(folder).as_posix(): path for path in own_files(folder)}
    for name, digest in stated.items():
        now = shards.sha256_file(own[name]) if name in own else None
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            yield name, digest, None, "is outside the run directory"
        elif now != digest:
            yield name, digest, now, "is missing" if now is None else "has changed"
    edited = {CARD} if record.get("card") == "dataset" else set()  # the card of a dataset belongs to its owner
    for name in own if record["complete"] else ():
        if name not in {*stated, *edited}:
            yield name, None, shards.sha256_file(own[name]), "is not listed in run.json"
