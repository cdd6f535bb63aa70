"""Make the rows of a run block by block, resume an earlier run, and summarise the rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_equiv import bars
from hf_equiv.analyses import lipschitz, match, spectrum, walk
from hf_equiv.analyses.measures import open_png
from hf_equiv.analyses.pairs import Item
from hf_equiv.analyses.plan import Loaded, Made, Plan, RunRows
from hf_equiv.checks import check_count
from hf_equiv.data.image_file import encode_png
from hf_equiv.formatting import many, one_line, some
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
`BATCH`, the unit of the batch size: `items`, `derivatives` of one item, or `both`, but one item on a CPU;
`SHOWN`, the number of first items whose images summary and figures need;
`make_rows(plan, part, batch, tell)`, which yields each of some items with its rows, of one if `BATCH` is `derivatives`;
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
    """A finished run.

    Attributes:
        analysis: `match`, `spectrum`, `lipschitz` or `walk`.
        out: its directory.
        rows: its rows, without images, in the order of the pairs or images.
        summary: counts, medians and verdict, as in `run.json`.
        errors: reason of each row of status `error`, by pair or image id.
        refine_evals: evaluations of the 8-bit refinement, by pair id.
        main: whether this is the main process, the only one that reports.
    """

    analysis: str
    out: Path
    rows: tuple[Row, ...]
    summary: Row
    errors: Mapping[str, str]
    refine_evals: Mapping[str, float]
    main: bool = True

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row["status"] not in VERBS[self.analysis].SUCCEEDED)

    @property
    def completed(self) -> bool:
        """Whether no row failed."""
        return not self.failed

    def __repr__(self) -> str:
        """State the verb, the directory, the rows and the verdict in one line."""
        rows = many(len(self.rows), "row") + (f", {len(self.failed)} failed" if self.failed else "")
        return f"RunOutcome({self.analysis} in {str(self.out)!r}: {rows}; {self.summary.get('verdict', '')})"


def run_analysis(
    plan: Plan,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: str = "missing",
    batch_size: int | None = None,
    observer: Observer | bool | None = None,
) -> RunOutcome:
    """Carry out a plan: make the missing rows of each pair or image, then summary, figures and card.

    Rows are on disk after each batch, and finished rows also after an interruption. The same call resumes a run that
    was stopped at any moment. A pair or image that fails gets a row of status `error`, and the others go on.

    Args:
        plan: the run, as `make_plan` returns it.
        out: its directory; None for `runs/VERB/MODEL/HASH8`.
        overwrite: `missing` (make missing rows and remake those of status `error`), `always` (replace an earlier run)
            or `never` (refuse one).
        batch_size: pairs at once, and on a GPU also derivatives; it is halved when memory runs out, and on a CPU it
            changes no number.
        observer: receives a `RunProgress` after each batched evaluation; an exception that it raises ends the run. By
            default a bar in a terminal or notebook; False for none.

    Returns:
        The rows and summary of the run.

    Raises:
        ValueError: the directory holds another run, or an option is bad.

    Example:
        >>> from hf_equiv import Encoder, MatchConfig, make_plan, run_analysis
        >>> config, encoder = MatchConfig(data="builtin", pairs=2), Encoder.from_pretrained("builtin")
        >>> plan = make_plan(config, encoder)  # doctest: +SKIP
        >>> run_analysis(plan, "runs/mine").completed  # doctest: +SKIP
        True
    """
    job = _Job(plan, Path(out or plan.default_out), batch_size)
    _remember(plan)
    with bars.shown(observer, plan.config.analysis, _read) as hook:
        main = carry_out(job, overwrite, hook or (lambda _: None))
    record, found = directory.read_record(job.folder), job.found or read_back(job.folder, plan.layout, job.names, 0)
    refine_evals = {name: cost["refine"] for name, cost in (found.costs or {}).items()}
    errors, rows = record.get("errors", {}), tuple(found.rows)
    return RunOutcome(plan.layout.analysis, job.folder, rows, record["summary"], errors, refine_evals, main)


def _read(p: RunProgress) -> tuple[float, str]:
    """Read the progress of a run for a bar."""
    return p.done / max(1, p.total), ", ".join(filter(None, (p.stage, p.message or some(p.pair_ids, 1))))


def _remember(plan: Plan) -> None:
    """Remember on this machine the paths that the run does not record."""
    from hf_equiv.models.places import remember
    from hf_equiv.models.recorded import each_model, is_local  # both bring transformers along

    config, targets = plan.config, plan.targets or plan.images
    models = zip(getattr(plan.encoder, "parts", (plan.encoder,)), each_model(plan.settings), strict=True)
    named = [(one.revision, one.model_id) for one, own in models if is_local(own)]
    named += [(plan.images.data_revision, config.source or config.data), (targets.data_revision, config.target)]
    for revision, path in named:
        if path is not None and path != "builtin" and Path(path).expanduser().exists():
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
        self.size = self.at_once if by_items or (self.verb.BATCH == "both" and not on_cpu) else 1
        self.found: RunRows | None = None

    def make(self, block: Sequence[Item], tell: Observer) -> Iterator[tuple[Item, Made]]:
        """Yield each item with its rows; an item that cannot be read or computed has an error row."""
        loaded = list[Loaded]()
        for item in block:
            try:
                loaded.append(_load(self.plan, item))
            except (ValueError, OSError) as error:
                yield item, _failed(self.plan, item, one_line(error))
        if loaded:
            yield from self._compute(loaded, tell)

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

    def _compute(self, part: Sequence[Loaded], tell: Observer) -> Iterator[tuple[Item, Made]]:
        plan, size, names = self.plan, self.at_once, tuple(one.item.name for one in part)
        if len(part) > size:
            yield from self._compute(part[:size], tell)
            yield from self._compute(part[size:], tell)
            return

        def stage(name: str, step: int = 0, steps: int = 0, **more: Any) -> None:
            tell(RunProgress(name, step=step, steps=steps, **{"pair_ids": names} | more))

        left = {one.item.name: one for one in part}
        try:
            for one, own in self.verb.make_rows(plan, part, size, stage):
                del left[one.item.name]
                yield one.item, _with_ids(plan, one, own)
            return
        except (RuntimeError, ValueError, OSError, MemoryError) as error:  # NaN, no JVP, a heading that leads nowhere
            why, full = one_line(error), ran_out(error)
        # outside the `except` block, the memory that the error kept alive is free
        tried = len(left) if self.verb.BATCH == "items" else size
        if full and tried > 1:
            half = self.at_once = fewer_at_once(tried)
            told = f"out of memory with {tried} at once; going on with {half} (--batch-size {half})"
            tell(RunProgress("info", message=told))
            yield from self._compute([*left.values()], tell)
        elif len(part) > 1:
            for one in left.values():
                yield from self._compute([one], tell)
        else:
            what = plan.layout.item.removesuffix("_id")
            why = f"out of memory with a single {what}: {why}" if full else why
            yield part[0].item, _failed(plan, part[0].item, why, part[0])


def _with_ids(plan: Plan, one: Loaded, own: Made) -> Made:
    base, failed = _base_row(plan, one.item, one), any(row["status"] == Status.ERROR for row in own.rows)
    error = (own.error or Status.ERROR.advice) if failed else None
    return replace(own, rows=[base | row for row in own.rows], error=error)


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
