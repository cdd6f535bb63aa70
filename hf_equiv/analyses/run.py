"""Make the rows of a run block by block, resume an earlier run, and summarise the rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_equiv.analyses import lipschitz, match, spectrum, walk
from hf_equiv.analyses.measures import open_png
from hf_equiv.analyses.pairs import Item
from hf_equiv.analyses.plan import Loaded, Made, Plan, RunRows
from hf_equiv.checks import check_count
from hf_equiv.data.image_file import encode_png
from hf_equiv.formatting import one_line
from hf_equiv.results import Status
from hf_equiv.runs import card, directory, shards
from hf_equiv.runs.execute import Observer, RunProgress, carry_out
from hf_equiv.runs.processes import fewer_at_once, ran_out
from hf_equiv.runs.schema import Layout, Row

VERBS: Mapping[str, Any] = {"match": match, "spectrum": spectrum, "lipschitz": lipschitz, "walk": walk}
"""The four analyses. Each module holds:

`CONFIG`, the class of its options: beside those of `config.BaseConfig` it has `settings(encoder)`, the settings with
defaults filled in, unless they do not fit the encoder; `open_images(load)`, the images and their targets, which may be
the same set; `list_items(reader, images, targets)`; `settings_of_items(items)`; and `item_bytes(encoder, settings)`,
the most bytes of the images and float images of one item;
`SUCCEEDED`, the statuses of rows that are a success;
`BATCH`, the unit of the batch size: `items`, `derivatives` of one item, or `nothing`;
`SHOWN`, the number of first items whose images summary and figures need;
`make_rows(plan, part, batch, tell)`, which makes the rows of some items, one item unless `BATCH` is `items`;
`summarize(encoder, settings, made)`, which sums up the rows of a run;
`draw_figures(settings, summary, made)`, which draws the figures of a run, as bytes by file name.

For `verify`: `follow(settings, rows)` gives the columns that follow from other columns of the rows of one item;
`remake(encoder, settings, rows, floats)` recomputes the rows, and takes out the float images that it needs; `faults` of
a row lists images that do not fit, each with column, requirement and finding, and `left_open` what was compared by a
laxer rule; `tolerances(made, settings)` returns how far the columns of a row may be from the recomputed ones (see
`verify.rows.agrees`).
"""

BATCH, CPU_BATCH = 32, 8  # items in one pass on a GPU and on a CPU, where there are always `BATCH` derivatives


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """A finished run."""

    analysis: str  # `match`, `spectrum`, `lipschitz` or `walk`
    out: Path  # its directory
    rows: tuple[Row, ...]  # its rows, without images, in the order of the pairs or images
    summary: Row  # counts, medians and verdict, as in `run.json`
    errors: Mapping[str, str]  # reason of each row of status `error`, by pair or image id
    refine_evals: Mapping[str, float]  # evaluations of the 8-bit refinement, by pair id
    main: bool = True  # whether this is the main process, the only one that reports

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row["status"] not in VERBS[self.analysis].SUCCEEDED)

    @property
    def completed(self) -> bool:
        """Whether no row failed."""
        return not self.failed


def run_analysis(
    plan: Plan,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: str = "missing",
    batch_size: int | None = None,
    observer: Observer | None = None,
) -> RunOutcome:
    """Carry out a plan: make the missing rows of each pair or image, then summary, figures and card."""
    # Rows are on disk after each batch, and the same call resumes a run that was stopped at any moment. A pair or image
    # that fails gets a row of status `error`, and the others go on. `overwrite` may be `missing` (make missing rows and
    # remake those of status `error`), `always` (replace an earlier run) or `never` (refuse one). `batch_size` is the
    # number of pairs at once, and on a GPU also the number of derivatives; it is halved when memory runs out, and on a
    # CPU it changes no number. `observer` receives a `RunProgress` after each batched evaluation; an exception that it
    # raises ends the run.
    job = _Job(plan, Path(out or plan.default_out), batch_size)
    _remember(plan)
    main = carry_out(job, overwrite, observer or (lambda _: None))
    record, found = directory.read_record(job.folder), job.found or read_back(job.folder, plan.layout, job.names, 0)
    refine_evals = {name: cost["refine"] for name, cost in (found.costs or {}).items()}
    errors, rows = record.get("errors", {}), tuple(found.rows)
    return RunOutcome(plan.layout.analysis, job.folder, rows, record["summary"], errors, refine_evals, main)


def _remember(plan: Plan) -> None:
    """Remember on this machine the paths that the run does not record."""
    from hf_equiv.models.encoder import is_local  # both bring transformers along
    from hf_equiv.models.places import remember

    config, targets = plan.config, plan.targets or plan.images
    named = [(plan.encoder.revision, plan.encoder.model_id)] if is_local(plan.settings) else []
    named += [(plan.images.data_revision, config.source or config.data), (targets.data_revision, config.target)]
    for revision, path in named:
        if path is not None and Path(path).expanduser().exists():
            remember(revision, path)


class _Job:
    """The work of `carry_out`; when memory runs out, it goes on with fewer items at once."""

    def __init__(self, plan: Plan, folder: Path, batch_size: int | None) -> None:
        self.plan, self.folder, self.verb = plan, folder, VERBS[plan.config.analysis]
        self.names = [item.name for item in plan.items]
        on_cpu, by_items = plan.encoder.device.type == "cpu", self.verb.BATCH == "items"
        if batch_size is not None:
            check_count(batch_size, "batch_size")
        self.at_once = batch_size or (CPU_BATCH if on_cpu else BATCH)
        if on_cpu and not by_items:  # the last bits of a derivative depend on how many there are in a pass
            self.at_once = BATCH
        self.size = self.at_once if by_items else 1
        self.found: RunRows | None = None

    def make(self, block: Sequence[Item], tell: Observer) -> tuple[list[Row], dict[str, Tensor], Row, dict[str, str]]:
        """Return rows, float images, costs and errors; an item that cannot be read or computed has an error row."""
        made, loaded = dict[str, Made](), list[Loaded]()
        for item in block:
            try:
                loaded.append(_load(self.plan, item))
            except (ValueError, OSError) as error:
                made[item.name] = _failed(self.plan, item, one_line(error))
        if loaded:
            made |= {one.item.name: own for one, own in zip(loaded, self._compute(loaded, tell), strict=True)}
        rows = [row for item in block for row in made[item.name].rows]
        floats = {name: image for one in made.values() for name, image in one.floats.items()}
        costs = {name: one.cost for name, one in made.items() if one.cost is not None}
        errors = {name: one.error for name, one in made.items() if one.error is not None}
        for name, why in errors.items():
            tell(RunProgress("note", pair_ids=(name,), message=f"{name}: {why}"))
        return rows, floats, costs, errors

    def finish(self) -> Row:
        """Write figures and card, and return the summary."""
        plan, verb = self.plan, self.verb
        self.found = read_back(self.folder, plan.layout, self.names, verb.SHOWN)
        summary: Row = verb.summarize(plan.encoder, plan.settings, self.found)
        figures = verb.draw_figures(plan.settings, summary, self.found)
        for name, data in figures.items():
            shards.write_atomic(self.folder / "figures" / name, data)
        text = card.run_card(plan.layout, plan.settings, summary, sorted(figures), plan.command)
        shards.write_atomic(self.folder / directory.CARD, text.encode())
        return summary

    def _compute(self, part: Sequence[Loaded], tell: Observer) -> list[Made]:
        plan, size, names = self.plan, self.at_once, tuple(one.item.name for one in part)
        if len(part) > size:
            return [*self._compute(part[:size], tell), *self._compute(part[size:], tell)]

        def stage(name: str, step: int = 0, steps: int = 0, **more: Any) -> None:
            tell(RunProgress(name, pair_ids=names, step=step, steps=steps, **more))

        try:
            made = self.verb.make_rows(plan, part, size, stage)
            return [_with_ids(plan, one, own) for one, own in zip(part, made, strict=True)]
        except (RuntimeError, ValueError, OSError, MemoryError) as error:  # NaN, no JVP, a heading that leads nowhere
            why, full = one_line(error), ran_out(error)
        # outside the `except` block, the memory that the error kept alive is free
        tried = {"items": len(part), "derivatives": size}.get(self.verb.BATCH, 1)
        if full and tried > 1:
            half = self.at_once = fewer_at_once(tried)
            told = f"out of memory with {tried} at once; going on with {half} (--batch-size {half})"
            tell(RunProgress("info", message=told))
            return self._compute(part, tell)
        if len(part) > 1:
            return [made for one in part for made in self._compute([one], tell)]
        what = plan.layout.item.removesuffix("_id")
        why = f"out of memory with a single {what}: {why}" if full else why
        return [_failed(plan, part[0].item, why, part[0])]


def _with_ids(plan: Plan, one: Loaded, own: Made) -> Made:
    base, failed = _base_row(plan, one.item, one), any(row["status"] == Status.ERROR for row in own.rows)
    return replace(own, rows=[base | row for row in own.rows], error=Status.ERROR.advice if failed else None)


def _failed(plan: Plan, item: Item, why: str, one: Loaded | None = None) -> Made:
    return Made([_base_row(plan, item, one) | {"status": str(Status.ERROR)}], {}, error=why)


def _load(plan: Plan, item: Item) -> Loaded:
    """Read the images of an item and put them through PNG, so that the pixels analysed are those stored."""

    def stored(pixels: Tensor) -> tuple[bytes, Tensor]:
        png = encode_png(pixels)
        return png, open_png(plan.encoder, png)

    source, target = plan.pixels(item)
    return Loaded(item, *stored(source), *(() if target is None else stored(target)))


def _base_row(plan: Plan, item: Item, one: Loaded | None) -> Row:
    """Return a row with the columns that all rows of an item share, and the others empty."""
    layout, ids = plan.layout, dict(item.columns)
    row: Row = dict.fromkeys((*layout.images, *layout.features)) | ids | plan.provenance
    if one is not None:
        row[layout.images[0]] = one.png
        row |= {"target": one.target_png} if "target" in layout.images else {}
    row |= {"toward_id": ids["target_id"]} if "toward_id" in layout.features else {}
    return row | ({"heading": plan.settings["heading"]} if "heading" in layout.features else {})


def read_back(folder: Path, layout: Layout, names: Sequence[str], shown: int) -> RunRows:
    """Read the rows of a run in the order of its items, and the images of the first `shown` items."""
    order = {name: place for place, name in enumerate(names)}

    def place(row: Row) -> int:
        return order[row[layout.item]]

    rows: list[Row] = []
    pictures: list[Row] = []
    for path in shards.shard_files(folder, layout):
        wanted = shards.shard_index(path) < shown
        for row in shards.read_shard(path, images=wanted, layout=layout):
            if wanted and place(row) < shown:
                pictures.append(row)
            rows.append({key: value for key, value in row.items() if key not in layout.images})
    return RunRows(sorted(rows, key=place), sorted(pictures, key=place), shards.read_costs(folder), folder)
