"""Make the rows of a run block by block, go on where an earlier run stopped, and sum the rows up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_equiv.analyses import lipschitz, match, spectrum, walk
from hf_equiv.analyses.pairs import Item
from hf_equiv.analyses.plan import Loaded, Made, Plan, RunRows, Verb
from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.formatting import one_line
from hf_equiv.results import Status
from hf_equiv.runs import card, directory, shards
from hf_equiv.runs.execute import Job, Observer, RunProgress, carry_out
from hf_equiv.runs.processes import PassSize, ran_out
from hf_equiv.runs.schema import Row

VERBS: dict[str, Verb] = {verb.config.analysis: verb for verb in (match.VERB, spectrum.VERB, lipschitz.VERB, walk.VERB)}
"""The four analyses by name."""

BATCH, CPU_BATCH = 32, 8
"""Items in one pass through the model, on a GPU and on a CPU; derivatives in one pass are always `BATCH` on a CPU."""


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
        main: whether this is the main process; of several, only one reports.
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
        """The rows whose status is a failure."""
        return tuple(row for row in self.rows if row["status"] not in VERBS[self.analysis].succeeded)

    @property
    def completed(self) -> bool:
        """Whether no row has a status that is a failure."""
        return not self.failed

    @property
    def converged(self) -> bool:  # old name
        """Whether no row has a status that is a failure."""
        return self.completed


def run_analysis(
    plan: Plan,
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: str = "missing",
    batch_size: int | None = None,
    observer: Observer | None = None,
) -> RunOutcome:
    """Carry out a plan: make the rows of each pair or image, then summary, figures and card.

    Rows are on disk after each batch; on a full disk an OSError says so and they are kept. A run that was stopped, at
    any moment, is finished by the same call: rows that are there are kept, the others are made. A pair or image that
    cannot be worked on gets a row of status `error`, and the others go on.

    Args:
        plan: from `make_plan`.
        out: run directory; by default `plan.default_out`.
        overwrite: `missing` makes the rows that are not there, and those of status `error` again; `always` replaces an
            earlier run; `never` refuses to touch one.
        batch_size: pairs matched at once, 8 by default and 32 on a GPU, where it is also the number of derivatives per
            pass. It is halved when memory runs out, and on a CPU it changes no number.
        observer: called with a `RunProgress` after every batched evaluation; an exception that it raises ends the run.

    Returns:
        The rows as read back from disk, and the summary.

    Raises:
        ValueError: the directory holds another run, or is being written.
    """
    verb, layout = VERBS[plan.config.analysis], plan.layout
    folder, sizes = Path(out or plan.default_out), PassSize(_batch_size(verb, plan.encoder.device, batch_size))
    closed: list[RunRows] = []

    def make(folder: Path, block: Sequence[Item], errors: dict[str, str], tell: Observer) -> None:
        made = _Block(plan, verb, sizes, errors, tell).make(block)
        rows = [row for item in block for row in made[item.name].rows]
        floats = {name: image for one in made.values() for name, image in one.floats.items()}
        costs = {name: one.cost for name, one in made.items() if one.cost is not None}
        shards.write_shard(folder, block[0].index, rows, floats, costs, layout, errors)

    def finish(folder: Path) -> Row:
        closed.append(_read_back(folder, plan, verb.shown))
        return _close(plan, verb, folder, closed[0])

    job = Job(plan, sizes.images if verb.batch == "items" else 1, make, finish)
    main = carry_out(job, folder, overwrite, observer or (lambda _: None))
    record = directory.read_record(folder)
    found = closed[0] if closed else _read_back(folder, plan, 0)
    refine_evals = {name: cost["refine"] for name, cost in (found.costs or {}).items()}
    errors = record.get("errors", {})
    return RunOutcome(layout.analysis, folder, found.rows, record["summary"], errors, refine_evals, main)


def _batch_size(verb: Verb, device: torch.device, asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {asked}.")
    if device.type != "cpu":
        return asked or BATCH
    # on a CPU the last bits of a derivative depend on how many there are in a pass, and rows must not
    return asked or CPU_BATCH if verb.batch == "items" else BATCH


class _Block:
    """Makes the rows of some items; when memory runs out, it works on fewer at once, also later."""

    def __init__(self, plan: Plan, verb: Verb, sizes: PassSize, errors: dict[str, str], tell: Observer) -> None:
        self.plan, self.verb, self.sizes, self.errors, self.tell = plan, verb, sizes, errors, tell
        self.made: dict[str, Made] = {}

    def make(self, block: Sequence[Item]) -> dict[str, Made]:
        """Return the rows by item; an item that cannot be read or computed has one of status `error`."""
        loaded = []
        for item in block:
            try:
                loaded.append(_load(self.plan, item))
            except (ValueError, OSError) as error:
                self._fail(item, one_line(error))
        self._compute_all(loaded, self.sizes.images)
        return self.made

    def _compute_all(self, part: Sequence[Loaded], size: int) -> None:
        at = 0
        while at < len(part):
            few = part[at : at + min(size, self.sizes.images)]
            self._compute(few)
            at += len(few)

    def _compute(self, part: Sequence[Loaded]) -> None:
        size = self.sizes.images
        try:
            made = self.verb.make_rows(self.plan, part, size, self.tell)
        except (RuntimeError, ValueError, OSError, MemoryError) as error:  # NaN, no JVP, a heading that leads nowhere
            why, full = one_line(error), ran_out(error)
        else:
            for one, own in zip(part, made, strict=True):
                self._keep(one, own)
            return
        # here the failed attempt is gone, with the memory that its error kept alive
        at_once = {"items": len(part), "derivatives": size}.get(self.verb.batch, 1)
        if full and at_once > 1:
            self.tell(RunProgress("info", message=self.sizes.halve(at_once)))
            self._compute_all(part, self.sizes.images)
        elif len(part) > 1:
            self._compute_all(part, 1)
        else:
            what = self.plan.layout.item.removesuffix("_id")
            self._fail(part[0].item, f"out of memory with a single {what}: {why}" if full else why, part[0])

    def _keep(self, one: Loaded, own: Made) -> None:
        base = _base_row(self.plan, one.item, one)
        self.made[one.item.name] = Made([base | row for row in own.rows], own.floats, own.cost)
        if any(row["status"] == Status.ERROR for row in own.rows):
            self._note(one.item, Status.ERROR.advice)

    def _fail(self, item: Item, why: str, one: Loaded | None = None) -> None:
        self.made[item.name] = Made([_base_row(self.plan, item, one) | {"status": str(Status.ERROR)}], {})
        self._note(item, why)

    def _note(self, item: Item, why: str) -> None:
        self.errors[item.name] = why
        self.tell(RunProgress("note", pair_ids=(item.name,), message=f"{item.name}: {why}"))


def _load(plan: Plan, item: Item) -> Loaded:
    """Read the images of an item and put them through PNG, so that the pixels analysed are those stored."""
    dtype = torch.float64 if plan.encoder.dtype == torch.float64 else torch.float32

    def stored(pixels: Tensor) -> tuple[bytes, Tensor]:
        png = encode_png(pixels)
        return png, decode_png(png, dtype).to(plan.encoder.device)

    source, target = plan.pixels(item)
    return Loaded(item, *stored(source), *(() if target is None else stored(target)))


def _base_row(plan: Plan, item: Item, one: Loaded | None) -> Row:
    """Return the columns that all rows of an item share, the others empty."""
    layout, ids = plan.layout, item.record()
    row: Row = dict.fromkeys((*layout.images, *layout.features)) | ids | plan.provenance
    if one is not None:
        row[layout.images[0]] = one.png
        row |= {"target": one.target_png} if "target" in layout.images else {}
    row |= {"toward_id": ids["target_id"]} if "toward_id" in layout.features else {}
    return row | ({"heading": plan.settings["heading"]} if "heading" in layout.features else {})


def _read_back(folder: Path, plan: Plan, shown: int) -> RunRows:
    """Read the rows of a run, in the order of the items; those of the first `shown` items also with their images."""
    order = {item.name: item.index for item in plan.items}
    layout = plan.layout

    def place(row: Row) -> int:
        return order[row[layout.item]]

    rows, pictures = [], []
    for path in shards.shard_files(folder, layout):
        wanted = shards.shard_index(path) < shown
        for row in shards.read_shard(path, images=wanted, layout=layout):
            if wanted and place(row) < shown:
                pictures.append(row)
            rows.append({key: value for key, value in row.items() if key not in layout.images})
    costs = shards.read_costs(folder)
    return RunRows(tuple(sorted(rows, key=place)), tuple(sorted(pictures, key=place)), costs, folder)


def _close(plan: Plan, verb: Verb, folder: Path, made: RunRows) -> Row:
    """Write figures and card, and return the summary."""
    summary = verb.summarize(plan.encoder, plan.settings, made)
    figures = verb.figures(plan, summary, made)
    for name, data in figures.items():
        shards.write_atomic(folder / "figures" / name, data)
    text = card.run_card(plan.layout, plan.settings, summary, sorted(figures), plan.command)
    shards.write_atomic(folder / "README.md", text.encode())
    return summary


def summarize_run(encoder: Any, folder: Path, rows: Sequence[Row], rtol: float, pair_ids: Sequence[str]) -> Row:
    """Sum up the rows of a match run, with the baseline from the stored images of its first pairs."""
    order = {name: place for place, name in enumerate(pair_ids[: match.BASELINE_PAIRS])}
    stored = shards.read_rows(folder, images=True, first=len(order))
    shown = sorted((row for row in stored if row["pair_id"] in order), key=lambda row: order[row["pair_id"]])
    made = RunRows(tuple(rows), tuple(shown), shards.read_costs(folder), folder)
    return match.summarize(encoder, {"rtol": rtol}, made)


def summarize_analysis(analysis: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Row:
    """Sum up the rows of a spectrum, lipschitz or walk run, those of one image side by side."""
    return VERBS[analysis].summarize(None, settings, RunRows(tuple(map(dict, rows))))


# old names

AnalysisOutcome = RunOutcome
FAILED = {name: tuple(status for status in Status if status not in verb.succeeded) for name, verb in VERBS.items()}
run_match = run_analysis


def __getattr__(name: str) -> Any:
    if name != "plots":
        raise AttributeError(name)
    return import_module("hf_equiv.analyses.figures")
