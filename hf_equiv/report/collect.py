"""Find the run directories of a report, read them, group them by checkpoint, and load the models."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_equiv.analyses.plan import command_line, read_command
from hf_equiv.analyses.run import VERBS
from hf_equiv.data.sources import DEFAULT_PAIRS
from hf_equiv.formatting import JOINED, one_line
from hf_equiv.hub.load import download_results, split_name
from hf_equiv.models import places
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.recorded import each_model, is_local, load_recorded
from hf_equiv.results import Status
from hf_equiv.runs import directory, shards
from hf_equiv.runs.schema import LAYOUTS, MATCH, Layout, Row, row_name

_ENCODER = ("model_id", "model_revision", "readout", "normalize", "dtype")
_OPTIONS = "solver", "radius", "norm", "rtol", "max_evals", "refine", "labels", "through"  # settings of `match`
AUDIT_LEVELS = (16, 8, 4, 2)  # radii of the sweep of an audit, in levels of 255
_BALLS = {f"match-{k}" for k in AUDIT_LEVELS}
_AUDIT = {"match", *_BALLS, "spectrum", "lipschitz"}  # folders of an audit
_NOT_OF_AUDIT = {"--source", "--solver", "--radius", "--rtol", "--max-evals", "--no-refine", "--compile"}  # of `match`
_MANY = 50  # pairs that a command proposes where more would tell more
_FAILURES = (ValueError, OSError, RuntimeError, ImportError)  # causes of a missing model; other errors are bugs


@dataclass(frozen=True)
class Run:
    """One run directory, with its rows (without images) in the order of its record."""

    name: str  # its name in the report, never an absolute path
    folder: Path
    record: Row
    layout: Layout
    rows: tuple[Row, ...]
    changed: tuple[str, ...]  # files of rows and float images that are not as recorded (SHA-256); none is read

    @property
    def analysis(self) -> str:
        """The verb: match, spectrum, lipschitz or walk."""
        return self.layout.analysis

    @property
    def settings(self) -> Row:
        """The settings that change a number of the run."""
        return dict(self.record["settings"])

    @property
    def good(self) -> tuple[Row, ...]:
        """The rows that hold numbers."""
        return tuple(row for row in self.rows if row["status"] != Status.ERROR)

    @property
    def listed(self) -> int:
        """The number of pairs or images in the finished run."""
        return len(self.record[self.layout.listed])

    @property
    def there(self) -> int:
        """The number of pairs or images that have rows."""
        return len({row[self.layout.item] for row in self.rows})

    @property
    def left_out(self) -> int:
        """The number of pairs or images left out because the file of their rows is not as recorded."""
        return self.listed - self.there if self.changed else 0

    @property
    def partial(self) -> bool:
        """Whether the run is unfinished."""
        return not self.record["complete"] or (self.there < self.listed and not self.changed)


def commands_of(runs: Iterable[Run]) -> list[str]:
    """Return the commands that repeat the runs and those that verify them, as they can be typed in this folder."""
    again = [_command(run) for run in runs]
    check = [directory.check_command(address_of(run.name, run.folder), run.settings) for run in runs]
    return list(dict.fromkeys([command for command in again if command] + check))


def to_finish(runs: Sequence[Run]) -> list[str]:
    """Return the commands that finish runs: that of the audit whose folder they fill, or else their own."""
    commands = [(_command(run) or "", run.folder) for run in runs if run.partial]
    named, folders = {run.folder.name: run for run in runs}, {run.folder.parent for run in runs}
    if len(folders) == 1 and MATCH.analysis in named and _BALLS & named.keys() and named.keys() <= _AUDIT:
        command = _command(named[MATCH.analysis]) or ""
        if not _NOT_OF_AUDIT & set(shlex.split(command)) and (commands or named.keys() < _AUDIT):
            commands = [(command.replace("hf-equiv match ", "hf-equiv audit ", 1), folders.pop())]
    return [f"{command} --out {shlex.quote(os.path.relpath(out))}" for command, out in commands if command]


def _command(run: Run) -> str | None:
    """Return the command of a run, with the paths of local files on this machine; None if it states none."""
    settings = run.settings
    try:  # a stranger's line may be any command of a shell
        config = read_command(run.record.get("command") or "", VERBS[run.analysis].CONFIG)
    except ValueError:
        return None
    revisions = dict(zip(*(str(settings[key]).split(" + ") for key in ("data_id", "data_revision")), strict=False))
    given = {key: getattr(config, key) for key in ("source", "target", "data")}
    here = {key: places.from_here(name, revisions.get(name, "")) for key, name in given.items() if name is not None}
    models = [
        places.from_here(name, own["model_revision"]) if is_local(own) else name
        for name, own in zip(config.models, each_model(settings), strict=True)
    ]
    return command_line(replace(config, model=JOINED.join(models), **here))


def address_of(name: str, folder: Path) -> str:
    """Return the path of a folder from the current one, or the name of its dataset on the Hub, for a command."""
    on_hub = "@" in name and not Path(name).exists()
    return name.split("@")[0] if on_hub else os.path.relpath(folder)


@dataclass(frozen=True)
class Checkpoint:
    """One encoder, as a map from pixels to embeddings, and its runs, match runs first."""

    title: str  # the model id, with readout or revision where another checkpoint of the report has the same id
    runs: tuple[Run, ...]

    def of(self, analysis: str) -> tuple[Run, ...]:
        """Return the runs of one verb."""
        return tuple(run for run in self.runs if run.analysis == analysis)

    @property
    def matches(self) -> tuple[Run, ...]:
        """The match runs with a match: without a ball first, then by falling radius, then by falling size."""
        good = [run for run in self.of(MATCH.analysis) if run.good]
        good.sort(key=lambda run: (-(run.settings["radius"] or math.inf), -len(run.good), run.name))
        return tuple(good)

    @property
    def main(self) -> Run | None:
        """The match run that the page is about: of the runs with most pairs, the first one of `matches`."""
        return max(self.matches, key=lambda run: run.there, default=None)


def find_runs(paths: Sequence[tuple[str, Path]]) -> tuple[Run, ...]:
    """Read every run in folders given as (name in the report, folder) once: a run, a dataset, or runs at any depth."""
    found: dict[Path, Run] = {}
    for name, folder in paths:
        inside = directory.folders_in(folder)
        if not inside:
            raise ValueError(
                f"{name!r} must be a run directory or a folder of them; it has no {directory.RECORD}, nor has any "
                "folder in it. Make a run first: hf-equiv match MODEL."
            )
        for place in inside:
            below = place.relative_to(folder).as_posix()
            if place.resolve() not in found:
                found[place.resolve()] = _read_run(place, name if below == "." else f"{name.rstrip('/')}/{below}")
    return tuple(found.values())


def _read_run(folder: Path, name: str) -> Run:
    record = directory.read_record(folder)
    layout = directory.check_record(folder, record)
    order = {item[layout.item]: k for k, item in enumerate(record[layout.listed])}
    faults = directory.file_faults(folder, record) if record["complete"] else ()
    changed = tuple(sorted(name for name, *_ in faults if name.endswith((".parquet", ".safetensors"))))
    once: dict[str, Row] = {}
    try:
        for path in shards.shard_files(folder, layout):
            for row in shards.read_shard(path, layout=layout) if _inside(folder, path) not in changed else ():
                once.setdefault(row_name(layout.analysis, row), row)  # a doubled row counts once
    except ValueError as error:
        raise ValueError(f"{name!r} is damaged: {error} hf-equiv verify names every problem.") from error
    unlisted = sorted({str(row[layout.item]) for row in once.values()} - set(order))
    if unlisted:
        raise ValueError(f"{name!r} is damaged: row {unlisted[0]!r} is not listed in its {directory.RECORD}.")
    rows = sorted(once.values(), key=lambda row: order[row[layout.item]])
    return Run(name, folder, record, layout, tuple(rows), changed)


def _inside(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def read_pictures(run: Run, ids: Sequence[str], *, floats: bool = False) -> Iterator[tuple[Row, Tensor | None]]:
    """Yield rows in this order, with images as PNG bytes, and the float match (3, H, W) if asked for and stored."""
    for path in shards.shard_files(run.folder, run.layout):
        if _inside(run.folder, path) in run.changed:
            continue
        beside = shards.float_file(path)
        there = floats and beside.is_file() and _inside(run.folder, beside) not in run.changed
        tensors = shards.read_floats(beside)[0] if there else {}
        rows = {row[run.layout.item]: row for row in shards.read_shard(path, images=True, layout=run.layout)}
        for name in ids:
            if name in rows:
                shards.check_pictures(rows[name], run.layout)
                yield rows[name], tensors.get(name)


def group_runs(runs: Sequence[Run]) -> tuple[Checkpoint, ...]:
    """Group runs by model, revision, readout, scaling and dtype; of runs with equal settings the largest is kept."""
    groups: dict[tuple[Any, ...], dict[str, Run]] = {}
    for run in runs:
        own = groups.setdefault(tuple(run.settings[key] for key in _ENCODER), {})
        mark = json.dumps([run.analysis, run.settings], sort_keys=True, default=str)
        if mark not in own or len(run.rows) > len(own[mark].rows):
            own[mark] = run
    ordered = [sorted(own.values(), key=lambda run: list(LAYOUTS).index(run.analysis)) for own in groups.values()]
    return tuple(Checkpoint(_title(key, groups), tuple(own)) for key, own in zip(groups, ordered, strict=True))


def _title(key: tuple[Any, ...], groups: Iterable[tuple[Any, ...]]) -> str:
    """Name a checkpoint by its model, and by the settings that no other checkpoint of this model has."""
    model, revision, readout, normalize, dtype = key
    kin = [other for other in groups if other[0] == model]
    title = str(model)
    if len({other[1] for other in kin}) > 1:
        title += f" @ {revision.removeprefix('sha256:')[:8]}"
    apart = [readout + (", normalised" if normalize else "")] if len({other[2:4] for other in kin}) > 1 else []
    apart += [dtype] if len({other[4] for other in kin}) > 1 else []
    return title + (f" ({', '.join(apart)})" if apart else "")


@dataclass(frozen=True)
class Place:
    """Where to look for models and data, and the device (by default CUDA if there is one)."""

    device: str | None
    cache_dir: str | None
    local_files_only: bool


def locate(name: str, place: Place) -> tuple[str, Path]:
    """Return the name in the report and the folder of a path, or of a dataset USER/NAME[@REVISION], downloaded."""
    path = Path(name).expanduser()
    if path.exists():
        outside = path.is_absolute() or ".." in path.parts or name == "."
        return (path.resolve().name if outside else path.as_posix()), path
    repo, revision = split_name(name)
    folder, commit = download_results(
        repo, revision=revision, cache_dir=place.cache_dir, local_files_only=place.local_files_only
    )
    return f"{repo}@{commit[:8]}", folder


def load_own(checkpoint: Checkpoint, models: Sequence[str | Encoder], place: Place) -> tuple[Encoder | None, str]:
    """Load the encoder of a checkpoint's runs, or return why that failed; `models` are folders and encoders to try."""
    settings = (checkpoint.main or checkpoint.runs[0]).settings
    revision = settings["model_revision"]
    reasons: list[str] = []
    for model in [*models, None] if is_local(settings) else [None]:
        try:
            encoder = load_recorded(settings, model, place.device, place.cache_dir, place.local_files_only)
        except _FAILURES as error:
            reasons.append(one_line(error))
            continue
        if encoder.revision == revision:
            return encoder, ""
        told = f"the weights of {encoder.model_id!r} have the revision {encoder.revision[:19]}"
        reasons.append(f"{told}; the run used {revision[:19]}")
    return None, f"its model could not be loaded: {reasons[0].rstrip('.')}"


def load_other(name: str, place: Place) -> Encoder | str:
    """Load another checkpoint by name; if that fails, return the reason."""
    try:
        return Encoder.from_pretrained(name, **asdict(place))
    except _FAILURES as error:
        told = one_line(error).rstrip(".")
        return f"transfer to {Path(name).name if Path(name).is_dir() else name}: {told}"


def again(checkpoint: Checkpoint, verb: str, count: int | None = None, **changed: Any) -> str:
    """Return a command with the model, data, seed and options of a checkpoint's runs, for `count` pairs or photos.

    Without a count it is for 50 of them. If the runs used the built-in photos, or drew all pairs of a smaller set, PATH
    then stands for the reader's own.
    """
    run, match = checkpoint.main or checkpoint.runs[0], verb == MATCH.analysis
    settings, typed = run.settings, str(run.record.get("command"))
    whole = run.layout is MATCH and "--pairs" not in typed and run.listed < DEFAULT_PAIRS
    local = str(settings["model_revision"]).startswith("sha256:")
    stated: Row = {"model": model_of(settings), "import_": settings.get("import")}
    stated["revision"] = None if local else settings["model_revision"]
    names = ("readout", "normalize", "dtype", "image_column", "label_column", "seed", *(_OPTIONS if match else ()))
    given = {name: settings[name] for name in names if name in settings}
    stated |= {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    stated |= changed
    if match and stated.get("radius") is None:
        stated["norm"] = None
    if match and stated.get("rtol") == VERBS["match"].CONFIG(through=stated.get("through")).goal:
        stated["rtol"] = None  # the default
    ids, revisions = (str(settings[key]).split(" + ") for key in ("data_id", "data_revision"))
    sets = [_data_of(name, revision) for name, revision in zip(ids, revisions, strict=False)]
    if len(sets) > 1 and not settings.get("drawn", True):
        stated |= {"source": sets[0]} | ({"target": sets[1]} if match else {})
    else:
        own = "PATH" if count is None and (whole or sets[0] == "builtin") else sets[0]
        stated |= {"data": own, "pairs" if match else "limit": count or _MANY}
    return command_line(VERBS[verb].CONFIG(**stated))


def model_of(settings: Row) -> str:
    """Return the model of a run for a command: a local one by its path, or PATH/NAME if that is not known."""
    models = [(str(own["model_id"]), str(own["model_revision"]), is_local(own)) for own in each_model(settings)]
    return JOINED.join(
        _path(name, revision) if local and "import" not in settings else name for name, revision, local in models
    )


def _data_of(name: str, revision: str) -> str:
    return _path(name, revision) if revision.startswith("sha256:") and name != "builtin" else name


def _path(name: str, revision: str) -> str:
    here = places.from_here(name, revision)
    return here if here != name else f"PATH/{name}"


def default_out(paths: Sequence[str | Path]) -> Path:
    """Name the page after the models of the runs: `reports/MODEL.html`, or `reports/report.html` without any."""
    names: list[str] = []
    for path in map(Path, paths):
        for record in sorted(path.rglob(directory.RECORD)) if path.is_dir() else ():
            names.append(str(directory.read_record(record.parent)["settings"]["model_id"]))
        if not path.exists():
            names.append(str(path).split("@")[0])
    slugs = dict.fromkeys(map(directory.slug, names))
    return Path("reports") / f"{'-and-'.join(list(slugs)[:4])[:120] or 'report'}.html"
