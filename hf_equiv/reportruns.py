"""The run directories a report is made from: found, read, and grouped by checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_equiv import rundir, shards
from hf_equiv.layouts import LAYOUTS, row_name
from hf_equiv.results import Status
from hf_equiv.shards import MATCH, Layout, Row

_SETTINGS = ("model_id", "model_revision", "readout", "normalize", "dtype", "data_id", "data_revision", "seed")
_OWN_SETTINGS = {
    "match": ("solver", "radius", "norm", "rtol", "max_evals", "refine"),
    "spectrum": (),
    "lipschitz": ("regional",),
    "walk": ("heading", "rtol"),
}
"""What a report reads of the settings."""


@dataclass(frozen=True)
class Run:
    """One run directory, its rows without images.

    Attributes:
        name: what the report calls it; never an absolute path.
        folder: where it is.
        record: its `run.json`.
        layout: folder and columns of the rows.
        rows: in the order of the list in the record; those of status `error` included, those of changed files left out.
        changed: files of rows and float images that are missing, or are not as the record states (SHA-256): nothing is
            read from them.
    """

    name: str
    folder: Path
    record: Row
    layout: Layout
    rows: tuple[Row, ...]
    changed: tuple[str, ...]

    @property
    def analysis(self) -> str:
        """The verb: match, spectrum, lipschitz or walk."""
        return self.layout.analysis

    @property
    def settings(self) -> Row:
        """Everything that changes a number of the run."""
        return dict(self.record["settings"])

    @property
    def good(self) -> tuple[Row, ...]:
        """The rows that hold numbers."""
        return tuple(row for row in self.rows if row["status"] != Status.ERROR)

    @property
    def listed(self) -> int:
        """Pairs or images that the run is to have."""
        return len(self.record[self.layout.listed])

    @property
    def there(self) -> int:
        """Pairs or images that have rows."""
        return len({row[self.layout.item] for row in self.rows})

    @property
    def left_out(self) -> int:
        """Pairs or images that count nowhere, since the file of their rows is not as recorded."""
        return self.listed - self.there if self.changed else 0

    @property
    def partial(self) -> bool:
        """Whether the run is unfinished."""
        return not self.record["complete"] or (self.there < self.listed and not self.changed)


@dataclass(frozen=True)
class Checkpoint:
    """One encoder, as a map from pixels to embeddings, and everything that was run on it.

    Attributes:
        title: model id; with readout or revision where another checkpoint of the report has the same id.
        model_id: Hub id, folder name or `builtin`.
        revision: commit, or SHA-256 of the weights.
        readout: which output is the embedding.
        normalize: whether embeddings are scaled to length 1.
        dtype: that the numbers are stated in, float32 or float64.
        runs: match runs first.
    """

    title: str
    model_id: str
    revision: str
    readout: str
    normalize: bool
    dtype: str
    runs: tuple[Run, ...]

    def of(self, analysis: str) -> tuple[Run, ...]:
        """The runs of one verb."""
        return tuple(run for run in self.runs if run.analysis == analysis)

    @property
    def matches(self) -> tuple[Run, ...]:
        """Match runs with at least one match: without a ball first, then by falling radius, then by falling size."""
        usable = [run for run in self.of(MATCH.analysis) if run.good]

        def order(run: Run) -> tuple[bool, float, int, str]:
            radius = run.settings["radius"]
            return radius is not None, -(radius or 0.0), -len(run.good), run.name

        return tuple(sorted(usable, key=order))

    @property
    def settings(self) -> Row:
        """The settings of the first run: what the encoder is loaded by."""
        return (self.matches or self.runs)[0].settings


def find_runs(paths: Sequence[tuple[str, Path]]) -> tuple[Run, ...]:
    """Read every run directory in some folders, each once.

    A folder with a `run.json` is a run, and so are those in its `runs/` (a published dataset); of another folder all
    run directories at any depth are taken.

    Args:
        paths: (what to call it, folder).

    Returns:
        The runs, in the order of the folders, sorted inside each.

    Raises:
        ValueError: no run in a folder, a damaged one, or one that was written by a newer version.
    """
    found: dict[Path, Run] = {}
    for name, folder in paths:
        if not folder.is_dir():
            raise ValueError(
                f"{name!r} must be a run directory, a folder of them, or a dataset USER/NAME; it does not exist. Check "
                "the name."
            )
        if (folder / rundir.RECORD).is_file():
            inside = [folder, *sorted(p.parent for p in folder.glob(f"runs/*/{rundir.RECORD}"))]
        else:
            inside = rundir.folders_in(folder)
        if not inside:
            raise ValueError(
                f"{name!r} must be a run directory or a folder of them; it has no {rundir.RECORD}, nor has any folder "
                "in it. Make a run first: hf-equiv match MODEL."
            )
        for place in inside:
            below = place.relative_to(folder).as_posix()
            if place.resolve() not in found:
                found[place.resolve()] = read_run(place, name if below == "." else f"{name.rstrip('/')}/{below}")
    return tuple(found.values())


def read_run(folder: Path, name: str) -> Run:
    """Read one run directory.

    Args:
        folder: where it is.
        name: what to call it.

    Returns:
        The run, its rows without images. Rows of a finished run are left out where their file is not as its `run.json`
        states.

    Raises:
        ValueError: it is damaged, of an unknown kind, or was written by a newer version.
    """
    record = rundir.read_record(folder)
    analysis = record.get("analysis", MATCH.analysis)
    if analysis not in LAYOUTS:
        raise ValueError(f"{name!r} holds a run of {analysis!r}, which this version of hf_equiv does not know.")
    layout = LAYOUTS[analysis]
    try:
        order = {item[layout.item]: k for k, item in enumerate(record[layout.listed])}
        complete, digests = bool(record["complete"]), dict(record.get("files") or {})
        for key in (*_SETTINGS, *_OWN_SETTINGS[analysis]):
            record["settings"][key]
    except (KeyError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name + '/' + rundir.RECORD!r} is damaged ({told}).") from error
    changed = _changed(folder, layout, digests) if complete else ()
    try:
        whole = (p for p in shards.shard_files(folder, layout) if _inside(folder, p) not in changed)
        rows = [row for path in whole for row in shards.read_shard(path, layout=layout)]
    except ValueError as error:
        raise ValueError(f"{name!r} is damaged: {error} hf-equiv verify names every problem.") from error
    unlisted = sorted({str(row[layout.item]) for row in rows} - set(order))
    if unlisted:
        raise ValueError(f"{name!r} is damaged: row {unlisted[0]!r} is not listed in its {rundir.RECORD}.")
    once: dict[str, Row] = {}
    for row in rows:
        once.setdefault(row_name(analysis, row), row)  # a doubled row counts once
    rows = sorted(once.values(), key=lambda row: order[row[layout.item]])
    return Run(name, folder, record, layout, tuple(rows), changed)


def group_runs(runs: Sequence[Run]) -> tuple[Checkpoint, ...]:
    """Group runs by encoder: model, revision, readout, whether embeddings are scaled, and dtype.

    Args:
        runs: as from `find_runs`.

    Returns:
        The checkpoints, in the order in which they appear.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        s = run.settings
        key = (s["model_id"], s["model_revision"], s["readout"], s["normalize"], s["dtype"])
        groups.setdefault(key, []).append(run)
    order = list(LAYOUTS)
    made = []
    for key, own in groups.items():
        model, revision, readout, normalize, dtype = key
        others = [other for other in groups if other[0] == model and other != key]
        title = str(model)
        if any(other[1] != revision for other in others):
            title += f" @ {str(revision).removeprefix('sha256:')[:8]}"
        apart = [f"{readout}{', normalised' if normalize else ''}"] if any(o[2:4] != key[2:4] for o in others) else []
        apart += [str(dtype)] if any(other[4] != dtype for other in others) else []
        title += f" ({', '.join(apart)})" if apart else ""
        own = _once(own)
        own.sort(key=lambda run: order.index(run.analysis))
        made.append(Checkpoint(title, model, revision, readout, normalize, dtype, tuple(own)))
    return tuple(made)


def _once(runs: Sequence[Run]) -> list[Run]:
    """Leave out copies: of runs of equal settings the one with most rows, of those the first."""
    best: dict[str, Run] = {}
    for run in runs:
        mark = json.dumps([run.analysis, run.settings], sort_keys=True, default=str)
        if mark not in best or len(run.rows) > len(best[mark].rows):
            best[mark] = run
    return list(best.values())


def read_pictures(run: Run, ids: Sequence[str], *, floats: bool = False) -> Iterator[tuple[Row, Tensor | None]]:
    """Read rows with their images as PNG bytes, shard by shard, and the float match where asked for.

    Files that are not as recorded are left out.

    Args:
        run: a match run.
        ids: of the pairs.
        floats: also read `float/`; a file that is not there counts as no float match.

    Yields:
        (row, float match (3, H, W) or None), in the order of the shards.
    """
    wanted = set(ids)
    for path in shards.shard_files(run.folder, run.layout):
        if _inside(run.folder, path) in run.changed:
            continue
        beside = run.folder / "float" / f"{path.stem}.safetensors"
        there = floats and beside.is_file() and _inside(run.folder, beside) not in run.changed
        tensors = shards.read_floats(beside)[0] if there else {}
        for row in shards.read_shard(path, images=True, layout=run.layout):
            if row[run.layout.item] in wanted:
                yield row, tensors.get(row[run.layout.item])


def _inside(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _changed(folder: Path, layout: Layout, digests: dict[str, str]) -> tuple[str, ...]:
    """Rows and float files that are not as the record states; the card and the figures hold no number of a report."""
    names = {name for name in digests if name.endswith((".parquet", ".safetensors"))}
    names |= {_inside(folder, path) for path in shards.shard_files(folder, layout)}
    names |= {_inside(folder, path) for path in (folder / "float").glob("[!.]*.safetensors")}
    return tuple(
        name for name in sorted(names)
        if not (folder / name).is_file() or shards.sha256_file(folder / name) != digests.get(name)
    )  # fmt: skip
