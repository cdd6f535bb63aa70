"""Recompute every row of a run directory from its stored images, and name what does not hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_equiv import rundir, shards
from hf_equiv.geometrycheck import ImageCheck
from hf_equiv.geometrysummary import summarize_analysis
from hf_equiv.hub_files import is_missing_revision
from hf_equiv.layouts import LAYOUTS, ROW_KEYS, row_name
from hf_equiv.publishing import WITHHELD
from hf_equiv.recordcheck import check_files, check_listed, check_model, check_summary, leaves
from hf_equiv.recordedmodel import load_recorded
from hf_equiv.results import Status
from hf_equiv.rowcheck import Findings, Problem, check_row, check_stated
from hf_equiv.shards import MATCH, PROVENANCE_FEATURES, Layout, Row
from hf_equiv.withheldcheck import check_stated_summary, check_without_images

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder


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
    record = rundir.read_record(folder)
    settings = record["settings"]
    found, layout = Findings(), _layout(folder, record)
    rundir.check_record(folder, record, layout)
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
            rows.append({k: v for k, v in row.items() if k not in shards.IMAGE_COLUMNS})
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
