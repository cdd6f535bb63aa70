"""Recompute every row of a run directory from its stored images, and list the problems."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_equiv.analyses.measures import largest
from hf_equiv.analyses.run import VERBS, read_back
from hf_equiv.hub_client import RevisionNotFoundError
from hf_equiv.models.encoder import Encoder, load_recorded
from hf_equiv.results import SCHEMA_VERSION, Status
from hf_equiv.runs import card, directory, shards
from hf_equiv.runs.directory import WITHHELD
from hf_equiv.runs.schema import LAYOUTS, MATCH, PROVENANCE_FEATURES, Layout, Row, row_name
from hf_equiv.verify.rows import UNVERIFIED, Problem, agrees, check_item, check_stated, differs, problem


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The findings of `verify_run`; the JSON form has the fields up to `problems`, and `withheld` if not 0."""

    rows: int  # rows in the directory
    verified: int  # rows that were recomputed without a problem
    failed: int  # rows with a problem, and pairs or images without a row
    worst_embedding_error: float | None  # largest recomputed error of a float match, or drift of a frame
    worst_embedding_error_8bit: float | None  # the same for the stored PNG
    problems: tuple[Problem, ...]  # problems of rows and of files
    error_rows: int = 0  # rows of status `error`, which hold no numbers and are not counted in `verified`
    withheld: int = 0  # rows that cannot be recomputed, since their photos are withheld
    analysis: str = MATCH.analysis  # the verb of the run: match, spectrum, lipschitz or walk
    name: str = ""  # ANALYSIS-MODELSLUG-HASH8
    place: str = ""  # "" for the root of a dataset, else `runs/NAME`
    model: str = ""  # the recorded checkpoint
    revision: str = ""  # its recorded revision

    @property
    def holds(self) -> bool:
        """Whether there is a row to check, and nothing was found wrong."""
        return not self.problems and self.error_rows < max(self.rows, 1)

    @property
    def unverified(self) -> tuple[str, ...]:
        """The columns of such a run that cannot be computed from stored images."""
        columns = {*LAYOUTS[self.analysis].features, *PROVENANCE_FEATURES}
        return tuple(name for name in UNVERIFIED if name.partition(" ")[0] in columns)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data; rows of status `error` are neither verified nor failed."""
        keys = ("rows", "verified", "failed", "worst_embedding_error", "worst_embedding_error_8bit", "problems")
        data = asdict(self) | {"problems": [asdict(problem) for problem in self.problems]}
        return {key: data[key] for key in (*keys, *(["withheld"] if self.withheld else []))}


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

    Each row is recomputed by the function that made it, and compared column by column: relative errors and cosines
    within max(3 × noise floor, 1e-6), so that rows made on a GPU verify on a CPU, singular values within their error
    bounds, secants within their noise floors. `VerifyReport.unverified` names the columns that images cannot prove.
    Files, list, errors, summary and card must agree with the rows. Only a model from the Hub needs a network.

    Args:
        folder: run directory.
        model: folder of the checkpoint if it was local, since its path is not recorded.
        device: device of the encoder; by default CUDA if there is one.
        cache_dir: the Hub's cache.
        local_files_only: whether to use cached files only.
        allow_withheld: whether a run without photos, whose rows cannot be recomputed, holds if all else does.
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
    layout = directory.check_record(folder, record)
    encoder, problems = None, list[Problem]()
    if not directory.is_withheld(record):
        checkpoint, cache = (None if path is None else os.fspath(path) for path in (model, cache_dir))
        encoder, problems = _load(record["settings"], checkpoint, cache, device, local_files_only)
    for name, stated, now, fault in directory.file_faults(folder, record):
        problems.append(problem(name, None, "sha256", stated, now, f"the file {fault}"))
    rows, made, found = _check_shards(folder, record, layout, encoder, observer)
    problems += [*found, *_check_list(record, layout, rows)]
    if record["complete"] and not any(problem.pair_id is not None for problem in problems):
        problems += _check_summary(encoder, folder, record, layout)
    return _report(record, layout, rows, made, problems, allow_withheld)


def _load(
    settings: Row, model: str | None, cache_dir: str | None, device: str | None, local_files_only: bool
) -> tuple[Encoder | None, list[Problem]]:
    """Load the model that the run states; a commit that is gone from the Hub is a problem."""
    stated = settings["model_revision"]
    try:
        encoder = load_recorded(settings, model, device, cache_dir, local_files_only)
    except RevisionNotFoundError:
        told = f"model {settings['model_id']!r} has no revision {stated!r}: nothing was recomputed"
        return None, [problem("run.json", None, "model_revision", stated, None, told)]
    loaded, problems = encoder.provenance["model_revision"], []
    if loaded != stated:
        told = f"other weights were loaded: {loaded}; the run states {stated}"
        problems.append(problem("run.json", None, "model_revision", stated, loaded, told))
    scaling, here = (json.loads(text) for text in (settings["processor"], encoder.provenance["processor"]))
    for key in ("image_mean", "image_std"):
        a, b = scaling.get(key), here.get(key)
        if a != b:
            problems.append(differs("run.json", None, f"processor.{key}", a, b, "pixels are scaled by another"))
    return encoder, problems


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
    plain, png = ("drift", "drift_8bit") if layout.analysis == "walk" else ("embedding_error", "embedding_error_8bit")
    return VerifyReport(
        rows=len(rows),
        verified=len((names & again) - bad - empty),
        failed=len(bad if withheld else bad | (names - again - empty)),
        worst_embedding_error=largest(row.get(plain) for row in made),
        worst_embedding_error_8bit=largest(row.get(png) for row in made),
        problems=tuple(problems),
        error_rows=len(empty),
        withheld=withheld,
        analysis=layout.analysis,
        name=directory.run_name(record),
        model=str(record["settings"]["model_id"]),
        revision=str(record["settings"]["model_revision"]),
    )


def _read_shard(
    folder: Path, path: Path, record: Row, layout: Layout
) -> tuple[list[Row], dict[str, Tensor], list[Problem]]:
    """Return the rows of a shard, with the `cost` that the float file states, its float images, and problems."""
    file, rows, problems = path.relative_to(folder).as_posix(), list[Row](), list[Problem]()
    float_file, floats, costs = shards.float_file(path).relative_to(folder).as_posix(), dict[str, Tensor](), Row()
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
    return [row | {"cost": costs.get(row[layout.item])} for row in rows], floats, problems


def _check_shards(
    folder: Path, record: Row, layout: Layout, encoder: Encoder | None, observer: Callable[[int, int], None] | None
) -> tuple[list[Row], list[Row], list[Problem]]:
    """Return the rows, each once, and the recomputed rows, both without images; and problems."""
    settings, done = record["settings"], 0
    listed = {item[layout.item]: item for item in record[layout.listed]}
    rows: list[Row] = []
    made: list[Row] = []
    problems: list[Problem] = []
    places: dict[tuple[Any, ...], str] = {}
    for path in shards.shard_files(folder, layout):
        file = path.relative_to(folder).as_posix()
        shard, floats, unreadable = _read_shard(folder, path, record, layout)
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
            problems += check_stated(file, layout, record, listed.get(name), own)
            again, found = check_item(file, layout, encoder, settings, own, floats)
            problems += found
            made += again
            rows += [{key: value for key, value in row.items() if key not in layout.images} for row in own]
            done += 1
            if observer is not None:
                observer(done, len(listed))
    return rows, made, problems


def _check_list(record: Row, layout: Layout, rows: Sequence[Row]) -> Iterator[Problem]:
    """Check that all listed pairs or images have rows, that the list has the requested length, and the errors."""
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
    total, key = len(record[layout.listed]), f"num_{layout.listed}"
    asked = record["settings"].get(key, total)
    if asked != total:
        told = f"the settings ask for {asked} {layout.listed}; {total} are listed"
        yield problem("run.json", None, f"settings.{key}", asked, total, told)
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


def _check_summary(encoder: Encoder | None, folder: Path, record: Row, layout: Layout) -> Iterator[Problem]:
    """Check that the summary follows from the rows, and the numbers of the card from the summary."""
    verb, settings = VERBS[layout.analysis], record["settings"]
    stated = record["summary"] if isinstance(record["summary"], dict) else {}
    rows = read_back(folder, layout, [item[layout.item] for item in record[layout.listed]], verb.SHOWN)
    made, baseline = verb.summarize(encoder, settings, rows), stated.get("baseline")
    # If the stated baseline is right or cannot be recomputed, use it: rounding then does not change the verdict text.
    if layout is MATCH:
        if encoder is None or all(_near(*leaf) for leaf in _leaves("summary.baseline", baseline, made["baseline"])):
            made = verb.summarize(None, settings, replace(rows, baseline=baseline))
        if encoder is None:  # the float files, which hold the evaluations of refining, may be withheld
            made["median"]["num_evals_refine"] = (stated.get("median") or {}).get("num_evals_refine")
    wrong = [leaf for leaf in _leaves("summary", stated, made) if not _near(*leaf)]
    for path, a, b in wrong:
        yield differs("run.json", None, path, a, b)
    if layout is MATCH and not wrong:
        yield from _check_card(folder, record, stated)


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
    """Return the first cell of a table line, or another line unchanged."""
    return line.split(" | ")[0].removeprefix("| ")
