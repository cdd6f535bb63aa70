"""Recompute every row of a run directory from its stored images, and name what does not hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_equiv.analyses import measures
from hf_equiv.analyses.run import summarize_analysis, summarize_run
from hf_equiv.hub_client import is_missing_revision
from hf_equiv.models.encoder import load_recorded
from hf_equiv.results import SCHEMA_VERSION, Status
from hf_equiv.runs import card, directory, schema, shards
from hf_equiv.runs.directory import WITHHELD
from hf_equiv.runs.schema import LAYOUTS, MATCH, PROVENANCE_FEATURES, ROW_KEYS, Layout, Row, row_name
from hf_equiv.verify.rows import Findings, ImageCheck, Problem, check_empty, check_limits, check_row, check_stated

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

# Check `run.json` against the folder it is in: files, model, what is listed, card (private helper of `verify`).


def check_model(encoder: Encoder, settings: Row, found: Findings) -> None:
    """The weights and the scaling of pixels must be those that the run states."""
    loaded = encoder.provenance["model_revision"]
    if loaded != settings["model_revision"]:
        other = f"other weights were loaded: {loaded}; the run states {settings['model_revision']}"
        found.say("run.json", None, "model_revision", settings["model_revision"], loaded, other)
    stated, here = (json.loads(text) for text in (settings["processor"], encoder.provenance["processor"]))
    for key in ("image_mean", "image_std"):
        if stated.get(key) != here.get(key):
            found.add("run.json", None, f"processor.{key}", stated.get(key), here.get(key), "pixels are scaled")


def check_files(folder: Path, record: Row, found: Findings) -> None:
    """Every file must have the SHA-256 that is stated, and a finished run must state one for every file."""
    stated: Mapping[str, str] = record["files"]
    for name, digest in stated.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            found.say(name, None, "sha256", digest, None, "the file is outside the run directory")
            continue
        path = folder / name
        now = shards.sha256_file(path) if path.is_file() else None
        if now != digest:
            how = "is missing" if now is None else "changed: its SHA-256 is not what run.json states"
            found.say(name, None, "sha256", digest, now, f"the file {how}")
    if not record["complete"]:
        return
    for path in sorted(directory.own_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name == "README.md" and record.get("card") == "dataset":
            continue  # the card of a dataset is its owner's to edit; its numbers are checked
        if name not in stated:
            found.say(name, None, "sha256", None, shards.sha256_file(path), "run.json does not list this file")


def check_listed(record: Row, layout: Layout, rows: Sequence[Row], found: Findings) -> bool:
    """Every pair or image that is listed must have its rows, as many as were asked for; errors need their reason.

    Returns:
        Whether all is there, so that a summary can be made.
    """
    listed = [item[layout.item] for item in record[layout.listed]]
    there = {row[layout.item]: row["status"] for row in rows}
    what, missing = ("row", "missing") if layout is MATCH else ("image", "its rows are missing")
    for name in dict.fromkeys(listed):
        if name not in there:
            why = "" if record["complete"] else f"; the run is not finished: run the same {layout.analysis} command"
            told = f"{what} {name!r} is listed and {missing} from {layout.folder}/{why}"
            found.say("run.json", name, layout.item, "a row", "no row", told)
        if listed.count(name) > 1:
            found.say("run.json", name, layout.item, "once", "twice", f"{what} {name!r} is listed twice")
    count = record["settings"].get(f"num_{layout.listed}", len(listed))
    if count != len(listed):
        told = f"the settings ask for {count} {layout.listed}; {len(listed)} are listed"
        found.say("run.json", None, f"settings.num_{layout.listed}", count, len(listed), told)
    version = record["settings"].get("schema_version", record["schema_version"])
    if version != record["schema_version"] or not 1 <= version <= SCHEMA_VERSION:
        found.add("run.json", None, "settings.schema_version", version, record["schema_version"])
    if not set(listed) <= set(there):
        return False
    if not record["complete"]:
        told = f"all rows are there, but the run is not closed: run the same {layout.analysis} command"
        found.say("run.json", None, "complete", False, True, told)
    failed = {name for name, status in there.items() if status == Status.ERROR}
    for name in sorted(failed ^ set(record.get("errors", {}))) if record["complete"] else ():
        told = "states no error" if name in failed else "states an error of a row that has none"
        found.say("run.json", name, "errors", name not in failed, name in failed, f"run.json {told}: {name!r}")
    return True


def leaves(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """The values of two nested mappings, side by side, with their path."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from leaves(f"{path}.{key}", a.get(key), b.get(key))
    else:
        yield path, a, b


def check_card(folder: Path, record: Row, made: Row, found: Findings) -> None:
    """The numbers of README.md must be those of the rows; a card of another schema may be put in other words."""
    path = folder / "README.md"
    if record["schema_version"] != SCHEMA_VERSION or not path.is_file():
        return
    wanted = card.run_card(MATCH, record["settings"], made, ()).splitlines()
    there = set(path.read_text(encoding="utf-8", errors="replace").splitlines())
    for line in wanted:
        if line.startswith("| ") and line not in there and not line.startswith("| |"):
            told = f"the card does not say what the rows say: {line}"
            found.say("README.md", None, line.split(" | ")[0].removeprefix("| "), None, line, told)


def check_summary(encoder: Encoder, folder: Path, rows: Sequence[Row], record: Row, found: Findings) -> None:
    """The stated summary must follow from the rows, which have been verified; the baseline within float noise.

    The verdict must follow from the rows and the stated baseline, so that noise cannot turn a digit of its text.
    """
    ids = [pair["pair_id"] for pair in record["pairs"]]
    order = {name: index for index, name in enumerate(ids)}
    rows, rtol = sorted(rows, key=lambda row: order[row["pair_id"]]), record["settings"]["rtol"]
    made = summarize_run(encoder, folder, rows, rtol, ids)
    stated = record["summary"] if isinstance(record["summary"], dict) else {}
    before = len(found.problems)
    for key in sorted({*made, *stated} - {"verdict"}):
        for path, a, b in leaves(key, stated.get(key), made.get(key)):
            numbers = isinstance(a, int | float) and isinstance(b, int | float)
            if a != b and not (numbers and abs(a - b) <= max(1e-5 * abs(b), 1e-6 if "baseline" in path else 0.0)):
                found.add("run.json", None, f"summary.{path}", a, b)
    baseline = stated.get("baseline") if len(found.problems) == before else made["baseline"]
    verdict = measures.summarize(rows, baseline, rtol)["verdict"]
    if stated.get("verdict") != verdict:
        found.add("run.json", None, "summary.verdict", stated.get("verdict"), verdict)
    if len(found.problems) == before:
        check_card(folder, record, stated, found)


# Check rows that cannot be recomputed, for want of images or of the model (private to `verify`).


_STATUSES = {
    "spectrum": (Status.COMPLETED, Status.ERROR),
    "lipschitz": (Status.RESOLVED, Status.UNDETERMINED, Status.ERROR),
    "walk": (Status.COMPLETED, Status.DRIFT_EXCEEDED, Status.BOX_BLOCKED, Status.ERROR),
}


def check_without_images(
    file: str, row: Row, record: Row, listed: Row | None, layout: Layout, found: Findings, *, withheld: bool
) -> None:
    """Check a row against `run.json` and against itself; where photos are withheld, there must be none."""
    settings, name = record["settings"], row_name(layout.analysis, row)
    if layout is MATCH:
        check_stated(file, row, settings, listed, found)
    else:
        stated = {k: v for k, v in settings.items() if k in PROVENANCE_FEATURES}
        check_stated(file, row, stated, listed, found, name)
    for column in layout.images if withheld else ():
        if row[column] is not None:
            told = f"row {name!r}, {column}: run.json says that photos are withheld, but there is one"
            found.say(file, name, column, None, "an image", told)
    if layout is not MATCH:
        if row["status"] not in _STATUSES[layout.analysis]:
            found.add(file, name, "status", row["status"], None, "no status of this analysis")
        return
    if row["status"] == Status.ERROR:
        check_empty(file, row, found)
        return
    check_limits(file, row, settings, found)
    if None not in (row["match_label"], row["target_label"]) and row["same_top1"] is not None:
        same = row["match_label"] == row["target_label"]
        if row["same_top1"] != same:
            found.add(file, name, "same_top1", row["same_top1"], same, "the two labels")


def check_stated_summary(record: Row, layout: Layout, rows: Sequence[Row], found: Findings) -> None:
    """The summary must follow from the rows, but for what needs images: the baseline, and the refinements' cost."""
    order = {item[layout.item]: i for i, item in enumerate(record[layout.listed])}
    rows = sorted(rows, key=lambda row: order[row[layout.item]])
    stated = record["summary"] if isinstance(record["summary"], dict) else {}
    if layout is MATCH:
        made = measures.summarize(rows, stated.get("baseline"), record["settings"]["rtol"])
        made["median"]["num_evals_refine"] = stated.get("median", {}).get("num_evals_refine")
    else:
        made = summarize_analysis(layout.analysis, rows, record["settings"])
    for path, a, b in leaves("summary", stated, made):
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        if a != b and not (numbers and abs(a - b) <= 1e-9 * abs(b)):
            found.add("run.json", None, path, a, b)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify_run` found.

    Attributes:
        rows: rows in the directory.
        verified: rows whose match was recomputed without a problem.
        error_rows: rows of status `error`, which hold no match; not counted in `verified`, nor in the JSON form.
        withheld: rows that cannot be recomputed, since their photos are withheld; in the JSON form if there are any.
        failed: rows with one, and pairs without a row.
        worst_embedding_error: largest recomputed error of a float match, or drift of a frame; None elsewhere.
        worst_embedding_error_8bit: the same of the stored PNG.
        problems: everything that does not hold, of rows and of files.
        analysis: what was run: match, spectrum, lipschitz or walk; not in the JSON form.
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

    Of a spectrum each singular value must hold within its own error bound; of a lipschitz run ‖Jv‖, the secants and
    what is read from them; of a walk drift, distances and labels of the stored frames.

    Relative errors and cosines must agree within max(3 × the recomputed noise floor, 1e-6), so that rows made on a GPU
    verify on a CPU; what follows from pixels alone must agree to rounding, and the noise floor itself to a factor of
    ten. Of `run.json` the files, the list, the errors and the summary are checked, and that rows agree with it.

    What nothing in the folder can show: how the match was made (solver and its parameters, attention kernel, versions,
    seconds, and evaluations beyond what the float file states), and that the images are those of the data set named.
    No network is used unless the model comes from the Hub. Of a run whose photos are withheld, the files, the list, the
    statuses and the summary are checked; that its rows cannot be recomputed is a problem unless `allow_withheld`.

    Args:
        folder: run directory.
        model: where the checkpoint is, if the recorded name does not find it (a local folder's path is not recorded).
        device: where to compute; by default CUDA if there is one.
        cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.
        allow_withheld: a run without photos holds if all else does.
        observer: called with (rows checked, rows in total).

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
    folder, model = Path(folder), None if model is None else os.fspath(model)
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    record = directory.read_record(folder)
    settings = record["settings"]
    found, layout = Findings(), _layout(folder, record)
    directory.check_record(folder, record, layout)
    if record.get("photos") == WITHHELD:
        check_files(folder, record, found)
        return _without_encoder(folder, record, layout, found, allow_withheld=allow_withheld)
    try:
        encoder = load_recorded(settings, model, device, cache_dir, local_files_only)
    except OSError as error:
        if not is_missing_revision(error):
            raise
        check_files(folder, record, found)
        gone = f"model {settings['model_id']!r} has no revision {settings['model_revision']!r}: nothing was recomputed"
        found.say("run.json", None, "model_revision", settings["model_revision"], None, gone)
        return _without_encoder(folder, record, layout, found)
    check_model(encoder, settings, found)
    check_files(folder, record, found)
    if layout is not MATCH:
        return _verify_analysis(folder, record, layout, encoder, observer, found)
    rows: list[Row] = []
    places: dict[str, str] = {}
    listed = {pair["pair_id"]: pair for pair in record["pairs"]}
    for file, shard in _shards(folder, found, layout):
        floats, costs = _floats(folder, file, found)
        for name in sorted({*floats, *costs} - {row["pair_id"] for row in shard}):
            float_file = f"float/{Path(file).stem}.safetensors"
            found.say(float_file, name, "match", None, "a float match", f"{name!r} belongs to no row of {file}")
        for row in shard:
            name = row["pair_id"]
            if name in places:
                twice = f"row {name!r} is there twice; the other is in {places[name]}"
                found.say(file, name, "pair_id", "one row", "two rows", twice)
                continue
            places[name] = file
            rows.append({k: v for k, v in row.items() if k not in schema.IMAGE_COLUMNS})
            check_stated(file, row, settings, listed.get(name), found)
            check_row(file, row, floats.get(name), costs.get(name), encoder, settings, found)
            if observer is not None:
                observer(len(rows), len(record["pairs"]))
    if check_listed(record, layout, rows, found) and record["complete"] and not found.bad_rows:
        check_summary(encoder, folder, rows, record, found)
    failed, empty = len(found.bad_rows), {row["pair_id"] for row in rows if row["status"] == Status.ERROR}
    return VerifyReport(
        rows=len(rows),
        verified=len(set(places) - found.bad_rows - empty),
        failed=failed,
        worst_embedding_error=found.worst.get("embedding_error"),
        worst_embedding_error_8bit=found.worst.get("embedding_error_8bit"),
        problems=tuple(found.problems),
        error_rows=len(empty),
    )


def _without_encoder(
    folder: Path, record: Row, layout: Layout, found: Findings, *, allow_withheld: bool | None = None
) -> VerifyReport:
    """Check what can be checked of rows that cannot be recomputed; `allow_withheld` is None where photos are there."""
    rows: list[Row] = []
    places: dict[Any, str] = {}
    listed = {item[layout.item]: item for item in record[layout.listed]}
    for file, shard in _shards(folder, found, layout):
        for row in shard:
            name = row_name(layout.analysis, row)
            if (key := tuple(row[k] for k in ROW_KEYS[layout.analysis])) in places:
                twice = f"row {name!r} is there twice; the other is in {places[key]}"
                found.say(file, name, layout.item, "one row", "two rows", twice)
                continue
            places[key] = file
            item = listed.get(row[layout.item])
            check_without_images(file, row, record, item, layout, found, withheld=allow_withheld is not None)
            rows.append({k: v for k, v in row.items() if k not in layout.images})
    if check_listed(record, layout, rows, found) and record["complete"] and not found.bad_rows:
        check_stated_summary(record, layout, rows, found)
    empty = sum(row["status"] == Status.ERROR for row in rows)
    withheld = 0 if allow_withheld is None else len(rows) - empty
    if withheld and not allow_withheld:
        told = f"{withheld} of {len(rows)} rows cannot be recomputed: photos are withheld"
        found.say("run.json", None, "photos", WITHHELD, None, told)
    failed = len(rows) if allow_withheld is None else len(found.bad_rows)
    return VerifyReport(
        rows=len(rows), verified=0, failed=failed, worst_embedding_error=None, worst_embedding_error_8bit=None,
        problems=tuple(found.problems), error_rows=empty, withheld=withheld, analysis=layout.analysis,
    )  # fmt: skip


def _layout(folder: Path, record: Row) -> Layout:
    name = record.get("analysis", MATCH.analysis)
    if name not in LAYOUTS:
        raise ValueError(f"{str(folder)!r} holds a run of {name!r}, which this version of hf_equiv does not know.")
    return LAYOUTS[name]


def _verify_analysis(
    folder: Path, record: Row, layout: Layout, encoder: Encoder, observer: Callable[[int, int], None] | None,
    found: Findings,
) -> VerifyReport:  # fmt: skip
    """Check a spectrum, lipschitz or walk run, image by image; each has its rows in one shard."""
    settings, analysis = record["settings"], layout.analysis
    listed = {item["image_id"]: item for item in record["images"]}
    rows: list[Row] = []
    names, places = set[str](), dict[str, str]()
    for file, shard in _shards(folder, found, layout):
        float_file = folder / "float" / f"{Path(file).stem}.safetensors"
        floats = _floats(folder, file, found)[0] if float_file.is_file() else {}
        for image_id in dict.fromkeys(row["image_id"] for row in shard):
            own = [row for row in shard if row["image_id"] == image_id]
            if image_id in places:
                twice = f"the rows of {image_id!r} are there twice; the others are in {places[image_id]}"
                found.say(file, image_id, "image_id", "once", "twice", twice)
                continue
            places[image_id] = file
            keys = [tuple(row[key] for key in ROW_KEYS[analysis]) for row in own]
            for row, key in zip(own, keys, strict=True):
                if keys.count(key) > 1:
                    doubled = f"row {row_name(analysis, row)!r} is there twice"
                    found.say(file, row_name(analysis, row), "image_id", "one row", "two rows", doubled)
                stated = {k: v for k, v in settings.items() if k in PROVENANCE_FEATURES}
                item = listed.get(image_id)
                item = item and item | {"toward_id": item.get("target_id")}
                check_stated(file, row, stated, item, found, row_name(analysis, row))
            if analysis == "lipschitz" and settings.get("radii") is None:  # early run: all images have one ladder
                settings = settings | {"radii": own[0]["radii"]}
            ImageCheck(analysis, file, encoder, settings, floats, found).run(own)
            rows += [{k: v for k, v in row.items() if k not in layout.images} for row in own]
            names |= {row_name(analysis, row) for row in own}
            if observer is not None:
                observer(len(places), len(listed))
    if check_listed(record, layout, rows, found) and record["complete"] and not found.bad_rows:
        order = {image_id: i for i, image_id in enumerate(listed)}
        made = summarize_analysis(analysis, sorted(rows, key=lambda row: order[row["image_id"]]), record["settings"])
        for path, a, b in leaves("summary", record["summary"], made):
            if a != b:
                found.add("run.json", None, path, a, b)
    empty = {row_name(analysis, row) for row in rows if row["status"] == Status.ERROR}
    return VerifyReport(
        rows=len(rows),
        verified=len(names - found.bad_rows - empty),
        failed=len(found.bad_rows),
        worst_embedding_error=found.worst.get("embedding_error"),
        worst_embedding_error_8bit=found.worst.get("embedding_error_8bit"),
        problems=tuple(found.problems),
        error_rows=len(empty),
        analysis=analysis,
    )


def _shards(folder: Path, found: Findings, layout: Layout) -> Iterator[tuple[str, list[Row]]]:
    for path in shards.shard_files(folder, layout):
        file = path.relative_to(folder).as_posix()
        try:
            for name in shards.unknown_columns(path, layout):
                found.say(file, None, name, None, name, f"column {name!r} is not one of a {layout.analysis} run")
            yield file, shards.read_shard(path, images=True, layout=layout)
        except ValueError as error:
            found.say(file, None, "file", "a shard of rows", None, str(error))


def _floats(folder: Path, file: str, found: Findings) -> tuple[dict[str, Tensor], Row]:
    path = folder / "float" / f"{Path(file).stem}.safetensors"
    try:
        return shards.read_floats(path)
    except ValueError as error:
        found.say(path.relative_to(folder).as_posix(), None, "file", "float matches", None, str(error))
        return {}, {}
