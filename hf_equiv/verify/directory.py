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

from hf_equiv.analyses.figures import same_picture
from hf_equiv.analyses.measures import largest
from hf_equiv.analyses.plan import RunRows
from hf_equiv.analyses.run import VERBS, read_back
from hf_equiv.formatting import many
from hf_equiv.hub import card as hub_card
from hf_equiv.hub.dataset_files import BESIDE_RUNS, FOR_LOADING
from hf_equiv.hub_client import RevisionNotFoundError
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.recorded import load_recorded
from hf_equiv.png_file import SIGNATURE
from hf_equiv.results import Status
from hf_equiv.runs import card, directory, shards
from hf_equiv.runs.directory import CARD, WITHHELD
from hf_equiv.runs.schema import MATCH, Layout, Row, row_name
from hf_equiv.verify.record import alike, check_keys, check_list, check_settings, leaves, left_open
from hf_equiv.verify.rows import Problem, agrees, check_item, check_pixels, check_stated, differs, problem
from hf_equiv.verify.unverified import SUBJECTS, UNVERIFIED, unverified_of

_PICTURES = {".png": SIGNATURE, ".gif": b"GIF8"}
BY_SOFTWARE = ("settings.attention", "settings.processor", "settings.solver_parameters", "settings.prompt")
"""Settings that another version of hf_equiv, torch or transformers may choose otherwise."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The findings of `verify_run`; the JSON form has those up to `problems`, `withheld` if not 0, and `unverified`."""

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
    unverified: tuple[str, ...] = ()  # columns, settings, keys and files that stored images cannot prove

    def __repr__(self) -> str:
        """State the run, the rows verified and the problems in one line."""
        told = f"{self.verified} of {self.rows} rows verified, {many(len(self.problems), 'problem')}"
        return f"VerifyReport({self.name}: {told}, {'holds' if self.holds else 'does not hold'})"

    @property
    def holds(self) -> bool:
        """Whether there is a row to check, and nothing was found wrong."""
        return not self.problems and self.error_rows < max(self.rows, 1)

    @property
    def left_open(self) -> str:
        """The subjects of `unverified`, and its other entries."""
        subjects = [subject for subject, own in SUBJECTS.items() if {*own} & {*self.unverified}]
        return ", ".join(subjects + [name for name in self.unverified if name not in UNVERIFIED])

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data; rows of status `error` are neither verified nor failed."""
        keys = ("rows", "verified", "failed", "worst_embedding_error", "worst_embedding_error_8bit", "problems")
        data = asdict(self) | {"problems": [asdict(problem) for problem in self.problems]}
        data = {key: data[key] for key in (*keys, *(["withheld"] if self.withheld else []))}
        return data | {"unverified": list(self.unverified)}


def verify_run(
    folder: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | Encoder | None = None,
    device: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_withheld: bool = False,
    observer: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a run directory: every file's SHA-256, every row's presence, every number from the stored images.

    Each row is recomputed by the function that made it, and compared column by column: relative errors and cosines
    within max(3 × noise floor, 1e-6), so that rows made on a GPU verify on a CPU, singular values within their error
    bounds, secants within their noise floors. Settings, summary, card and figures are made again as well, and list,
    errors and files must agree with the rows. `VerifyReport.unverified` names what images cannot prove. Only a model
    from the Hub needs a network.

    Args:
        folder: run directory.
        model: folder of the checkpoint if it was local, since its path is not recorded; or the encoder, if it was
            wrapped or imported.
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
        cache = None if cache_dir is None else os.fspath(cache_dir)
        checkpoint = model if model is None or isinstance(model, Encoder) else os.fspath(model)
        encoder, problems = _load(record["settings"], checkpoint, cache, device, local_files_only)
    for name, stated, now, fault in directory.file_faults(folder, record):
        problems.append(problem(name, None, "sha256", stated, now, f"the file {fault}"))
    rows, made, found = _check_shards(folder, record, layout, encoder, observer)
    versions = next((row["versions"] for row in rows), None)
    problems += [*found, *check_list(record, layout, rows), *check_keys(record, layout, versions)]
    problems += _check_files(folder, layout) if record["complete"] else ()
    elsewhere = list[str]()
    if not any(problem.pair_id is not None for problem in problems):
        found, elsewhere = _check_whole(encoder, folder, record, layout, rows)
        problems += found
        elsewhere += sorted({name for row in made for name in row.get("left_open", ())})
    return _report(record, layout, rows, made, problems, allow_withheld, elsewhere)


def _load(
    settings: Row, model: str | Encoder | None, cache_dir: str | None, device: str | None, local_files_only: bool
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
    here = json.loads(encoder.provenance["processor"])
    try:
        scaling = dict(json.loads(settings.get("processor", "")))
    except (ValueError, TypeError, RecursionError):  # text of a stranger
        scaling = {}
    for key in ("image_mean", "image_std"):
        a, b = scaling.get(key), here.get(key)
        if a != b:
            problems.append(differs("run.json", None, f"processor.{key}", a, b, "pixels are scaled by another"))
    return encoder, problems


def _report(
    record: Row,
    layout: Layout,
    rows: Sequence[Row],
    made: Sequence[Row],
    problems: list[Problem],
    allow_withheld: bool,
    elsewhere: Sequence[str],
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
        unverified=(*unverified_of(record, layout), *elsewhere),
    )


def _read_shard(
    folder: Path, path: Path, record: Row, layout: Layout
) -> tuple[list[Row], dict[str, Tensor], list[Problem]]:
    """Return the rows of a shard, with the `cost` that the float file states, its float images, and problems."""
    file, rows, problems = path.relative_to(folder).as_posix(), list[Row](), list[Problem]()
    float_file, floats, costs = shards.float_file(path).relative_to(folder).as_posix(), dict[str, Tensor](), Row()
    try:
        for name, told in shards.faults_of_schema(path, layout, record.get("errors")):
            problems.append(problem(file, None, name, None, name, told))
        if not any(one.column in layout.all_features for one in problems):  # text is no number
            rows = shards.read_shard(path, images=True, layout=layout)
    except (OSError, ValueError) as error:
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
    order = {name: place for place, name in enumerate(listed)}
    rows: list[Row] = []
    made: list[Row] = []
    problems: list[Problem] = []
    places: dict[tuple[Any, ...], str] = {}
    for path in shards.shard_files(folder, layout):
        file = path.relative_to(folder).as_posix()
        shard, floats, unreadable = _read_shard(folder, path, record, layout)
        problems += unreadable
        at = [order[row[layout.item]] for row in shard if row[layout.item] in order]
        if not unreadable and (at != sorted(at) or path != shards.shard_path(folder, min(at, default=-1), layout)):
            told = "its rows must have the order of the list in run.json, and its name the place of the first one there"
            problems.append(problem(file, None, "file", file, None, told))
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
            problems += [*found, *check_pixels(file, layout, listed.get(name, {}), own[0], floats)]
            made += again
            rows += [{key: value for key, value in row.items() if key not in layout.images} for row in own]
            done += 1
            if observer is not None:
                observer(done, len(listed))
    return rows, made, problems


def _check_whole(
    encoder: Encoder | None, folder: Path, record: Row, layout: Layout, rows: Sequence[Row]
) -> tuple[list[Problem], list[str]]:
    """Check settings, summary, card and figures of right rows; return the problems, and the parts left open."""
    if rows and record["settings"].get("radii", ()) is None:  # as in `_check_shards`
        record = record | {"settings": record["settings"] | {"radii": rows[0]["radii"]}}
    problems, elsewhere = list[Problem](), list(left_open(record, layout, rows))
    here = encoder is not None and {row["versions"] for row in rows} == {encoder.provenance["versions"]}
    if any(path.name.startswith(".") and path.name not in BESIDE_RUNS for path in folder.rglob(".*")):
        elsewhere.append("hidden files")
    elsewhere += [f"content of {name}" for name in sorted(BESIDE_RUNS - {CARD}) if (folder / name).exists()]
    for one in check_settings(record, layout, encoder):
        if here or one.column not in BY_SOFTWARE:
            problems.append(one)
        else:
            elsewhere.append(f"{one.column} (of other versions)")
    found, others = _check_summary(encoder, folder, record, layout) if record["complete"] else ([], [])
    return problems + found, elsewhere + others


def _check_summary(
    encoder: Encoder | None, folder: Path, record: Row, layout: Layout
) -> tuple[list[Problem], list[str]]:
    """Check summary, card and figures against the rows; return the problems, and the parts of other versions."""
    verb, settings = VERBS[layout.analysis], record["settings"]
    stated = record["summary"] if isinstance(record["summary"], dict) else {}
    rows = read_back(folder, layout, [item[layout.item] for item in record[layout.listed]], verb.SHOWN)
    made, baseline = verb.summarize(encoder, settings, rows), stated.get("baseline")
    # If the stated baseline is right or cannot be recomputed, use it: rounding then does not change the verdict text.
    if layout is MATCH:
        if encoder is None or all(_near(*leaf) for leaf in leaves("summary.baseline", baseline, made["baseline"])):
            made = verb.summarize(None, settings, replace(rows, baseline=baseline))
        if encoder is None:  # the float files, which hold the evaluations of refining, may be withheld
            made["median"]["num_evals_refine"] = (stated.get("median") or {}).get("num_evals_refine")
    wrong = [leaf for leaf in leaves("summary", stated, made) if not _near(*leaf)]
    found = [differs("run.json", None, path, a, b) for path, a, b in wrong]
    if found:
        return found, []
    figures = list(_check_figures(folder, layout, settings, stated, rows))
    lines = list(_check_card(folder, layout, record, stated))
    if record.get("closed_with") == directory.software():
        return lines + figures, []
    found = [one for one in lines if one.column == "header" or str(one.recomputed).startswith("| ")]
    elsewhere = [f"{one.file} (drawn by other versions)" for one in figures if one.column == "figure"]
    elsewhere += [] if len(found) == len(lines) else [f"other words of {CARD} (of other versions)"]
    return found + [one for one in figures if one.column != "figure"], elsewhere


def _near(path: str, a: Any, b: Any) -> bool:
    if not (isinstance(a, int | float) and isinstance(b, int | float) and type(a) in (type(b), int)):
        return alike(a, b)
    return agrees(a, b, max(1e-5 * abs(b), 1e-6) if ".baseline." in path else 1e-9 * abs(b))


def _check_figures(folder: Path, layout: Layout, settings: Row, summary: Row, rows: RunRows) -> Iterator[Problem]:
    """Draw the figures of the rows again and compare them."""
    made = VERBS[layout.analysis].draw_figures(settings, summary, rows)
    there = {path.name: path for path in (folder / "figures").glob("[!.]*") if path.is_file()}
    for name in sorted({*made, *there}):
        data = there[name].read_bytes() if name in there else b""
        if name not in there:
            told = "the figure is missing"
        elif name not in made:
            told = "the rows give no such figure"
        elif not same_picture(data, made[name]):
            told = "this is not the figure that the rows give"
        else:
            continue
        signature = _PICTURES.get(Path(name).suffix)
        is_picture = name not in there or (signature is not None and data.startswith(signature))
        yield problem(f"figures/{name}", None, "figure" if is_picture else "file", "a figure", None, told)


def _check_card(folder: Path, layout: Layout, record: Row, summary: Row) -> Iterator[Problem]:
    """Write the card of the run again, and check its header and every line."""
    path = folder / CARD
    if record.get("card") == "dataset":  # that of all its runs
        return
    stated = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    shown = sorted(path.name for path in (folder / "figures").glob("[!.]*"))
    made = card.run_card(layout, record["settings"], summary, shown, record.get("command"))
    made += card.NO_PHOTOS if directory.is_withheld(record) else ""
    if hub_card.split_header(stated)[0] != hub_card.split_header(made)[0]:
        told = "the YAML header is not that of the run: `load_dataset` may read other files"
        yield problem(CARD, None, "header", None, None, told)
    yield from compare_lines(stated, made, "the rows say", "the rows do not say")


def compare_lines(stated: str, made: str, says: str, never_says: str) -> Iterator[Problem]:
    """Compare two cards line by line."""
    lines = [[line for line in text.split("\n") if line.strip()] for text in (stated, made)]
    there, wanted = map(Counter, lines)
    for line in (wanted - there).elements():
        yield problem(CARD, None, first_cell(line), None, line, f"the card does not say what {says}: {line}")
    for line in (there - wanted).elements():
        yield problem(CARD, None, first_cell(line), line, None, f"the card says what {never_says}: {line}")
    if there == wanted and stated != made:  # a number under another heading, or a table that is none any more
        line = next((a for a, b in zip(*lines, strict=True) if a != b), "")
        told = f"the lines of the card are in another order{f', from this one on: {line}' if line else ' or apart'}"
        yield problem(CARD, None, first_cell(line), line, None, told)


def _check_files(folder: Path, layout: Layout) -> Iterator[Problem]:
    """Check that there are only the files that a run writes, beside a licence and the other runs of a dataset."""
    own = {path for shard in shards.shard_files(folder, layout) for path in (shard, shards.float_file(shard))}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts) and path.name not in FOR_LOADING
        beside = name.parts[0] == directory.RUNS or name.as_posix() in (directory.RECORD, *BESIDE_RUNS)
        beside = beside or (name.parts[0] == "figures" and len(name.parts) == 2)  # compared with those of the rows
        apart = not path.is_dir() or (path.is_symlink() and path.name not in directory.OWN_FOLDERS)
        if apart and not hidden and not beside and path not in own:
            told = f"this is no file of a {layout.analysis} run"
            yield problem(name.as_posix(), None, "file", name.as_posix(), None, told)


def first_cell(line: str) -> str:
    """Return the first cell of a table line, or another line unchanged."""
    return line.split(" | ")[0].removeprefix("| ")
