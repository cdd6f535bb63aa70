"""Recompute every row of a run directory from its stored images, and name what does not hold."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_equiv.analyses import measures
from hf_equiv.analyses.run import summarize_analysis, summarize_run
from hf_equiv.hub_client import RevisionNotFoundError
from hf_equiv.models.encoder import load_recorded
from hf_equiv.results import SCHEMA_VERSION, Status
from hf_equiv.runs import card, directory, shards
from hf_equiv.runs.directory import WITHHELD
from hf_equiv.runs.schema import LAYOUTS, MATCH, PROVENANCE_FEATURES, Layout, Row, row_name
from hf_equiv.verify import rows as checks
from hf_equiv.verify.rows import UNVERIFIED, Problem, agrees, differs, problem

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

Floats = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify_run` found.

    Attributes:
        rows: rows in the directory.
        verified: rows that were made again without a problem.
        error_rows: rows of status `error`, which hold no numbers; not counted in `verified`, nor in the JSON form.
        withheld: rows that cannot be made again, since their photos are withheld; in the JSON form if there are any.
        failed: rows with a problem, and pairs or images without a row.
        worst_embedding_error: largest recomputed error of a float match, or drift of a frame; None elsewhere.
        worst_embedding_error_8bit: the same of the stored PNG.
        problems: everything that does not hold, of rows and of files.
        analysis: the verb of the run: match, spectrum, lipschitz or walk; not in the JSON form.
    """

    rows: int
    verified: int
    failed: int
    worst_embedding_error: float | None
    worst_embedding_error_8bit: float | None
    problems: tuple[Problem, ...]
    error_rows: int = 0
    withheld: int = 0
    analysis: str = MATCH.analysis

    @property
    def holds(self) -> bool:
        """Whether there is a row to check, and nothing was found wrong."""
        return not self.problems and self.error_rows < max(self.rows, 1)

    @property
    def unverified(self) -> tuple[str, ...]:
        """The columns of such a run that no stored image can show."""
        columns = {*LAYOUTS[self.analysis].features, *PROVENANCE_FEATURES}
        return tuple(name for name in UNVERIFIED if name.partition(" ")[0] in columns)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; rows of status `error` are those that are neither verified nor failed."""
        data = asdict(self) | {"problems": [asdict(problem) for problem in self.problems]}
        left_out = {"error_rows", "analysis"} | ({"withheld"} if not self.withheld else set())
        return {key: value for key, value in data.items() if key not in left_out}


def verify_run(
    folder: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_withheld: bool = False,
    observer: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a run directory: every file's SHA-256, every row's presence, every number from the stored images.

    Each row is made again by the function that made it, and compared column by column: relative errors and cosines
    within max(3 × noise floor, 1e-6), so that rows made on a GPU verify on a CPU, singular values within their error
    bounds, secants within their noise floors. `VerifyReport.unverified` names the columns that no image can show.
    Files, list, errors, summary and card must agree with the rows. Only a model from the Hub needs a network.

    Args:
        folder: run directory.
        model: where the checkpoint is, if that was a local folder, whose path is not recorded.
        device: where to compute; by default CUDA if there is one.
        cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.
        allow_withheld: whether a run without photos, whose rows cannot be made again, holds if all else does.
        observer: called with (pairs or images checked, pairs or images in total).

    Returns:
        The report; a directory that holds gives no problems.

    Raises:
        ValueError: the folder is no run directory, was written by a newer version, or its model is not to be found.
        OSError: the model's files cannot be fetched or read.

    Example:
        >>> report = verify_run("runs/match/builtin/1a2b3c4d")  # doctest: +SKIP
        >>> report.holds, report.worst_embedding_error_8bit  # doctest: +SKIP
        (True, 2.1e-05)
    """
    folder = Path(folder)
    record = directory.read_record(folder)
    settings, layout = record["settings"], directory.check_record(folder, record)
    encoder, problems = None, list[Problem]()
    if not directory.is_withheld(record):
        checkpoint, cache = (None if path is None else os.fspath(path) for path in (model, cache_dir))
        encoder, problems = _load(settings, checkpoint, cache, device, local_files_only)
    problems += _check_files(folder, record)
    rows, made, found = _check_shards(folder, record, layout, encoder, observer)
    problems += [*found, *_check_list(record, layout, rows)]
    if record["complete"] and not any(problem.pair_id is not None for problem in problems):
        problems += _check_summary(encoder, folder, record, layout, rows)
    return _report(record, layout, rows, made, problems, allow_withheld)


def _load(
    settings: Row, model: str | None, cache_dir: str | None, device: str | None, local_files_only: bool
) -> tuple[Encoder | None, list[Problem]]:
    """Load the model that the run states; where its commit is gone from the Hub, that is a problem."""
    try:
        encoder = load_recorded(settings, model, device, cache_dir, local_files_only)
    except RevisionNotFoundError:
        told = f"model {settings['model_id']!r} has no revision {settings['model_revision']!r}: nothing was recomputed"
        return None, [problem("run.json", None, "model_revision", settings["model_revision"], None, told)]
    return encoder, [*_check_model(encoder, settings)]


def _report(
    record: Row, layout: Layout, rows: Sequence[Row], made: Sequence[Row], problems: list[Problem], allow_withheld: bool
) -> VerifyReport:
    names, again = ({row_name(layout.analysis, row) for row in some} for some in (rows, made))
    empty = {row_name(layout.analysis, row) for row in rows if row["status"] == Status.ERROR}
    bad = {problem.pair_id for problem in problems if problem.pair_id is not None}
    withheld = len(names - empty) if directory.is_withheld(record) else 0
    if withheld and not allow_withheld:
        told = f"{withheld} of {len(rows)} rows cannot be recomputed: photos are withheld"
        problems = [*problems, problem("run.json", None, "photos", WITHHELD, None, told)]
    return VerifyReport(
        rows=len(rows),
        verified=len((names & again) - bad - empty),
        failed=len(bad if withheld else bad | (names - again - empty)),
        worst_embedding_error=_worst(made, "embedding_error", "drift"),
        worst_embedding_error_8bit=_worst(made, "embedding_error_8bit", "drift_8bit"),
        problems=tuple(problems),
        error_rows=len(empty),
        withheld=withheld,
        analysis=layout.analysis,
    )


def _worst(made: Sequence[Row], *keys: str) -> float | None:
    return max((row[key] for row in made for key in keys if row.get(key) is not None), default=None)


def _check_model(encoder: Encoder, settings: Row) -> Iterator[Problem]:
    """Check that the weights and the scaling of pixels are those that the run states."""
    stated, loaded = settings["model_revision"], encoder.provenance["model_revision"]
    if loaded != stated:
        told = f"other weights were loaded: {loaded}; the run states {stated}"
        yield problem("run.json", None, "model_revision", stated, loaded, told)
    processor, here = (json.loads(text) for text in (settings["processor"], encoder.provenance["processor"]))
    for key in ("image_mean", "image_std"):
        if processor.get(key) != here.get(key):
            why = "pixels are scaled by another"
            yield differs("run.json", None, f"processor.{key}", processor.get(key), here.get(key), why)


def _check_files(folder: Path, record: Row) -> Iterator[Problem]:
    """Check that every file has the stated SHA-256, and that a finished run states one for every file."""
    stated: Mapping[str, str] = record["files"]
    for name, digest in stated.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            yield problem(name, None, "sha256", digest, None, "the file is outside the run directory")
            continue
        path = folder / name
        now = shards.sha256_file(path) if path.is_file() else None
        if now != digest:
            how = "is missing" if now is None else "changed: its SHA-256 is not what run.json states"
            yield problem(name, None, "sha256", digest, now, f"the file {how}")
    for path in sorted(directory.own_files(folder)) if record["complete"] else ():
        name = path.relative_to(folder).as_posix()
        edited = (
            name == "README.md" and record.get("card") == "dataset"
        )  # the owner may edit it; its numbers are checked
        if name not in stated and not edited:
            yield problem(name, None, "sha256", None, shards.sha256_file(path), "run.json does not list this file")


def _shards(folder: Path, record: Row, layout: Layout) -> Iterator[tuple[str, list[Row], Floats, list[Problem]]]:
    """Read each shard: its rows, with the `cost` that the float file states, its float images, and problems."""
    for path in shards.shard_files(folder, layout):
        file, rows, problems = path.relative_to(folder).as_posix(), list[Row](), list[Problem]()
        float_file = checks.float_name(file)
        floats: Floats = {}
        costs: Row = {}
        try:
            for name in shards.unknown_columns(path, layout):
                told = f"column {name!r} is not one of a {layout.analysis} run"
                problems.append(problem(file, None, name, None, name, told))
            rows = shards.read_shard(path, images=True, layout=layout)
        except ValueError as error:
            problems.append(problem(file, None, "file", "a shard of rows", None, str(error)))
        try:
            if (folder / float_file).is_file() or float_file in record["files"]:
                floats, costs = shards.read_floats(folder / float_file)
        except ValueError as error:
            problems.append(problem(float_file, None, "file", "float images", None, str(error)))
        ids = {row[layout.item] for row in rows}
        for name in sorted({*floats, *costs} if rows else ()):
            if name not in ids and name.rpartition("/")[0] not in ids:
                told = f"{name!r} belongs to no row of {file}"
                problems.append(problem(float_file, name, layout.images[0], None, "a float image", told))
        yield file, [row | {"cost": costs.get(row[layout.item])} for row in rows], floats, problems


def _check_shards(
    folder: Path, record: Row, layout: Layout, encoder: Encoder | None, observer: Callable[[int, int], None] | None
) -> tuple[list[Row], list[Row], list[Problem]]:
    """Go through the shards, pair by pair or image by image.

    Returns:
        The rows, each once; those that could be made again; both without images; problems.
    """
    settings, done = record["settings"], 0
    listed = {item[layout.item]: item for item in record[layout.listed]}
    rows: list[Row] = []
    made: list[Row] = []
    problems: list[Problem] = []
    places: dict[tuple[Any, ...], str] = {}
    for file, shard, floats, unreadable in _shards(folder, record, layout):
        problems += unreadable
        items: dict[str, list[Row]] = {}
        for row in shard:
            name, key = row_name(layout.analysis, row), tuple(row[k] for k in layout.key)
            if key in places:
                told = f"row {name!r} is there twice; the other is in {places[key]}"
                problems.append(problem(file, name, layout.item, "one row", "two rows", told))
                continue
            places[key] = file
            items.setdefault(row[layout.item], []).append(row)
        for name, own in items.items():
            if settings.get("radii", ()) is None:  # early runs state their one ladder in the rows only
                settings = settings | {"radii": own[0]["radii"]}
            problems += checks.check_stated(file, layout, record, listed.get(name), own)
            again, found = checks.check_item(file, layout, encoder, settings, own, floats)
            made += again
            problems += found
            rows += [{key: value for key, value in row.items() if key not in layout.images} for row in own]
            done += 1
            if observer is not None:
                observer(done, len(listed))
    return rows, made, problems


def _check_list(record: Row, layout: Layout, rows: Sequence[Row]) -> Iterator[Problem]:
    """Check that all listed pairs or images have rows, that as many are listed as were asked for, and the errors."""
    listed = Counter(item[layout.item] for item in record[layout.listed])
    there = {row[layout.item]: row["status"] for row in rows}
    command = f"run the same {layout.analysis} command"
    for name, count in listed.items():
        if name not in there:
            why = "" if record["complete"] else f"; the run is not finished: {command}"
            told = f"{name!r} is listed and missing from {layout.folder}/{why}"
            yield problem("run.json", name, layout.item, "a row", "no row", told)
        if count > 1:
            yield problem("run.json", name, layout.item, "once", "twice", f"{name!r} is listed {count} times")
    total = len(record[layout.listed])
    asked = record["settings"].get(f"num_{layout.listed}", total)
    if asked != total:
        told = f"the settings ask for {asked} {layout.listed}; {total} are listed"
        yield problem("run.json", None, f"settings.num_{layout.listed}", asked, total, told)
    version = record["settings"].get("schema_version", record["schema_version"])
    if version != record["schema_version"] or not 1 <= version <= SCHEMA_VERSION:
        yield differs("run.json", None, "settings.schema_version", version, record["schema_version"])
    if not set(listed) <= set(there):
        return
    if not record["complete"]:
        told = f"all rows are there, but the run is not closed: {command}"
        yield problem("run.json", None, "complete", False, True, told)
        return
    failed = {name for name, status in there.items() if status == Status.ERROR}
    for name in sorted(failed ^ set(record.get("errors", {}))):
        told = "states no error" if name in failed else "states an error of a row that has none"
        yield problem("run.json", name, "errors", name not in failed, name in failed, f"run.json {told}: {name!r}")


def _check_summary(
    encoder: Encoder | None, folder: Path, record: Row, layout: Layout, rows: Sequence[Row]
) -> Iterator[Problem]:
    """Check that the summary follows from the rows, and the numbers of the card from the summary."""
    order = {item[layout.item]: index for index, item in enumerate(record[layout.listed])}
    rows = sorted(rows, key=lambda row: order[row[layout.item]])
    stated = record["summary"] if isinstance(record["summary"], dict) else {}
    made, right = _summarize(encoder, folder, record, layout, rows, stated), True
    for path, a, b in _leaves("summary", stated, made):
        if not _near(path, a, b):
            right = False
            yield differs("run.json", None, path, a, b)
    if right and layout is MATCH:
        yield from _check_card(folder, record, stated)


def _summarize(
    encoder: Encoder | None, folder: Path, record: Row, layout: Layout, rows: Sequence[Row], stated: Row
) -> Row:
    """Make the summary again, with the stated baseline where that is right or cannot be recomputed."""
    rtol, baseline = record["settings"].get("rtol"), stated.get("baseline")
    if layout is not MATCH:
        return summarize_analysis(layout.analysis, rows, record["settings"])
    refining = (stated.get("median") or {}).get("num_evals_refine")
    if encoder is not None:
        made = summarize_run(encoder, folder, rows, rtol, [pair["pair_id"] for pair in record["pairs"]])
        refining = made["median"]["num_evals_refine"]
        if not all(_near(*leaf) for leaf in _leaves("summary.baseline", baseline, made["baseline"])):
            baseline = made["baseline"]
    made = measures.summarize(rows, baseline, rtol)  # so that noise of the baseline changes no digit of the verdict
    made["median"]["num_evals_refine"] = refining
    return made


def _near(path: str, a: Any, b: Any) -> bool:
    if not (isinstance(a, int | float) and isinstance(b, int | float)):
        return bool(a == b)
    return agrees(a, b, max(1e-5 * abs(b), 1e-6) if ".baseline." in path else 1e-9 * abs(b))


def _leaves(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the values of two nested mappings side by side, with their path."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _leaves(f"{path}.{key}", a.get(key), b.get(key))
    else:
        yield path, a, b


def _check_card(folder: Path, record: Row, summary: Row) -> Iterator[Problem]:
    """Check the numbers of README.md; cards of another schema may have other words."""
    path = folder / "README.md"
    if record["schema_version"] != SCHEMA_VERSION or not path.is_file():
        return
    there = set(path.read_text(encoding="utf-8", errors="replace").splitlines())
    for line in card.run_card(MATCH, record["settings"], summary, ()).splitlines():
        if line.startswith("| ") and line not in there and not line.startswith("| |"):
            told = f"the card does not say what the rows say: {line}"
            yield problem("README.md", None, subject(line), None, line, told)


def subject(line: str) -> str:
    """Return the first cell of a line of a table; another line as it is."""
    return line.split(" | ")[0].removeprefix("| ")
