"""Make one page from runs: whether checkpoints are exposed, and how that was measured."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_equiv.analyses.figures import difference_png
from hf_equiv.checks import check_count
from hf_equiv.data.image_set import ImageSet
from hf_equiv.data.sources import load_images
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.places import BUILTINS
from hf_equiv.models.recorded import is_local
from hf_equiv.report import claims, collect, render
from hf_equiv.report.collect import Checkpoint, Place, Run
from hf_equiv.report.defences import DEFENCE_PAIRS, measure_defences, read_defences
from hf_equiv.report.figures import draw_figures
from hf_equiv.report.measure import LABELLED_PHOTOS, measure_run, measure_transfer, measured_earlier
from hf_equiv.report.numbers import IDENTICAL_DB, CheckpointNumbers, checkpoint_numbers
from hf_equiv.runs import directory, shards
from hf_equiv.runs.schema import IMAGE_COLUMNS, Row

Tell = Callable[[str, int, int], None]

SHOWN = 12  # matches shown as pictures
SECOND = "facebook/deit-tiny-patch16-224"  # the encoder proposed for a second opinion on the built-in one
WITHHELD = "the photos are withheld from this data set"


@dataclass(frozen=True)
class Picture:
    """A figure or image as a PNG file; `alt` describes it to readers who cannot see it."""

    name: str
    png: bytes = field(repr=False)
    alt: str


@dataclass(frozen=True)
class Report:
    """A finished report.

    Attributes:
        html: the page as one file that loads nothing from elsewhere.
        markdown: the same as Markdown, with its pictures beside it.
        pictures: those pictures, PNG bytes by file name.
        folder: name of the folder of the pictures.
        models: every number of the page as records, one for each checkpoint.
        problems: parts that could not be measured, and files that are not as recorded.
    """

    html: str = field(repr=False)
    markdown: str = field(repr=False)
    pictures: dict[str, bytes] = field(repr=False)
    folder: str
    models: tuple[CheckpointNumbers, ...] = field(repr=False)
    problems: tuple[str, ...]

    @property
    def numbers(self) -> Row:
        """Every number of the page as plain data (`models`, with intervals, n and the answer), and `problems`."""
        models = [model.to_json() | {"answer": claims.answer(model)} for model in self.models]
        return {"models": models, "problems": list(self.problems)}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page, the Markdown beside it, and the pictures into their folder.

        Each file is written whole or not at all. Pictures that only an earlier page had are removed.

        Args:
            path: file of the page, the `out` of `make_report`.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in (path.parent / self.folder).glob("model*-*.png"):
            if old.name not in self.pictures:
                old.unlink()
        for name, png in self.pictures.items():
            shards.write_atomic(path.parent / self.folder / name, png)
        shards.write_atomic(path.with_suffix(".md"), self.markdown.encode())
        shards.write_atomic(path, self.html.encode())


@dataclass(frozen=True)
class Asked:
    """Hold the options of a report. A string in `others` is the reason why that model could not be loaded."""

    place: Place
    names: Sequence[str]  # of the paths, in the report
    out: str | None  # the page, in the report
    models: Sequence[str | Encoder]
    others: Mapping[str, Encoder | str]
    defences: tuple[str, ...]
    defence_pairs: int
    survival: bool
    labelled: ImageSet | None
    cache: Path | None
    tell: Tell


def make_report(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    transfer: Sequence[str] = (),
    defences: Sequence[str] = (),
    defence_pairs: int = DEFENCE_PAIRS,
    label_data: str | os.PathLike[str] | None = None,
    survival: bool = True,
    model: str | os.PathLike[str] | Encoder | Sequence[str | os.PathLike[str] | Encoder] = (),
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    observer: Tell | None = None,
) -> Report:
    """Report whether checkpoints are exposed and whether their runs support the paper, with intervals and controls.

    Runs are grouped by model, revision, readout and dtype. Numbers come from the rows; controls, survival, transfer,
    retrieval and the kNN probe are measured anew with the recorded model, on the match run of most pairs (ties: no
    ball first, then the largest radius). If a model cannot be loaded, these parts say so, or show what an earlier
    report to the same `out` measured. Rows whose files differ from the `run.json` of a finished run are left out; the
    page says how many.

    Cost: about 22 forwards per pair (38 with a head), 3 per pair and transfer model, 1 per labelled photo; 450
    evaluations for each defence and `defence_pairs`, and for their detector; 3000 more for `smooth`.

    Args:
        paths: a run directory, a folder of them, a dataset USER/NAME on the Hub; or several of these.
        transfer: names of other models that see the same matches.
        defences: what every image passes before the encoder, such as `jpeg:75` or `smooth:0.25`; new matches are made
            for each. See `hf_equiv.report.defences`.
        defence_pairs: pairs that defences are tried on, the first ones.
        label_data: photos with classes for the kNN probe; see `load_images`.
        survival: whether to try JPEG, resizing and blur.
        model: local checkpoints, whose paths runs do not record, or encoders; the one of the recorded revision is
            used.
        out: path of the page; measurements are kept in the folder of its pictures.
        device: device of the encoder; by default CUDA if there is one.
        cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.
        observer: called with (what is measured, done, in all).

    Returns:
        The report; equal runs and options give equal bytes.

    Raises:
        ValueError: a path is no run directory, is damaged, or was written by a newer version; no file of rows is as
            recorded; no such label data.

    Example:
        >>> report = make_report("runs")  # doctest: +SKIP
        >>> report.write("report.html")  # doctest: +SKIP
    """
    place = Place(device, None if cache_dir is None else os.fspath(cache_dir), local_files_only)
    places = [collect.locate(path, place) for path in _several(paths)]
    runs, names = _runs(places), [collect.address_of(name, folder) for name, folder in places]
    read_defences(defences)  # refuse bad ones at once
    check_count(defence_pairs, "defence_pairs")
    labelled = None if label_data is None else _labelled(label_data, place)
    others: dict[str, Encoder | str] = {name: collect.load_other(name, place) for name in dict.fromkeys(transfer)}
    folder = f"{'report' if out is None else Path(out).stem}_files"
    cache = None if out is None else Path(out).parent / folder
    tell = observer or (lambda what, done, total: None)
    given = [model] if isinstance(model, str | os.PathLike | Encoder) else model
    models = [one if isinstance(one, Encoder) else os.fspath(one) for one in given]
    page = None if out is None else os.path.relpath(out)
    return _report(
        runs,
        Asked(place, names, page, models, others, tuple(defences), defence_pairs, survival, labelled, cache, tell),
        folder,
    )


def _report(runs: Sequence[Run], asked: Asked, folder: str) -> Report:
    checkpoints = collect.group_runs(runs)
    prefixes = ["model"] if len(checkpoints) == 1 else [f"model{k}" for k, _ in enumerate(checkpoints, 1)]
    pages = [_model_page(checkpoint, asked, prefix) for checkpoint, prefix in zip(checkpoints, prefixes, strict=True)]
    say = render.findings()
    problems = [say("changed_files", run) for run in runs if run.changed]
    problems += [other for other in asked.others.values() if isinstance(other, str)]
    failed = [(page["numbers"].title, page["reason"]) for page in pages]
    problems += [f"{title}: {reason}" for title, reason in failed if reason not in ("", WITHHELD)]
    whole = {
        "title": f"{'Is' if len(pages) == 1 else 'Are'} {_listed([one.title for one in checkpoints])} exposed?",
        "say": say, "models": pages, "several": len(pages) > 1, "same": _alike(checkpoints), "labelled": asked.labelled,
    }  # fmt: skip
    return Report(
        html=render.to_html(whole),
        markdown=render.to_markdown(whole, folder),
        pictures={one.name: one.png for page in pages for one in page["pictures"]},
        folder=folder,
        models=tuple(page["numbers"] for page in pages),
        problems=tuple(dict.fromkeys(problems)),
    )


def _several(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    return tuple(os.fspath(path) for path in ([given] if isinstance(given, str | os.PathLike) else given))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _runs(places: Sequence[tuple[str, Path]]) -> tuple[Run, ...]:
    if not places:
        raise ValueError("`paths` must name a run directory. Make one with hf-equiv match MODEL.")
    runs = collect.find_runs(places)
    if any(run.changed for run in runs) and not any(run.rows for run in runs):
        raise ValueError(
            f"`paths` must hold rows that are as recorded; in {', '.join(run.name for run in runs if run.changed)} no "
            "file of rows is as run.json states (SHA-256). hf-equiv verify names every problem."
        )
    return runs


def _labelled(label_data: str | os.PathLike[str], place: Place) -> ImageSet:
    found = load_images(
        label_data, limit=LABELLED_PHOTOS, cache_dir=place.cache_dir, local_files_only=place.local_files_only
    )
    if not any(label is not None for label in found.labels):
        raise ValueError(f"`label_data` must hold photos with classes; {found.data_id!r} has none.")
    return found


def _measure(checkpoint: Checkpoint, asked: Asked) -> tuple[Row | None, list[Row], Row | None, str]:
    """Measure the match run of most pairs: alone, in others, behind defences; last comes the reason of a failure."""
    run = checkpoint.main
    if run is None:
        return None, [], None, ""
    encoder, reason = collect.load_own(checkpoint, asked.models, asked.place)
    if encoder is None:
        measured = measured_earlier(run, asked.cache)
    else:
        measured = measure_run(
            run, encoder, survival=asked.survival, labelled=asked.labelled, cache=asked.cache,
            tell=partial(asked.tell, checkpoint.title),
        )  # fmt: skip
    if measured is None:
        return None, [], None, reason
    if not measured["pairs"]:
        return measured, [], None, WITHHELD
    moved = [
        measure_transfer(run, other, cache=asked.cache, tell=partial(asked.tell, f"{checkpoint.title} in {name}"))
        for name, other in asked.others.items()
        if not isinstance(other, str) and _differ(other, run.settings)
    ]
    defended = None
    if encoder is not None and asked.defences:
        defended = measure_defences(
            run, encoder, asked.defences, asked.defence_pairs, labelled=asked.labelled, cache=asked.cache,
            tell=partial(asked.tell, f"{checkpoint.title} behind defences"),
        )  # fmt: skip
    return measured, moved, defended, reason


def _differ(other: Encoder, own: Row) -> bool:
    return (other.revision, other.readout, other.normalize) != (own["model_revision"], own["readout"], own["normalize"])


# These functions return the template values except the numbers.


def _model_page(checkpoint: Checkpoint, asked: Asked, prefix: str) -> Row:
    measured, moved, defended, reason = _measure(checkpoint, asked)
    numbers = checkpoint_numbers(checkpoint, measured, moved, defended)
    text = claims.texts(numbers)
    figures = {
        name: Picture(f"{prefix}-{name}.png", png, text(f"alt_{name.split('-')[0]}"))
        for name, png in draw_figures(checkpoint, numbers, measured).items()
    }
    gallery = _gallery(checkpoint, numbers, prefix)
    other = SECOND if numbers.model_id in BUILTINS else "builtin"
    shown = [one for shot in gallery["shots"] for one in shot["pictures"].values()] if gallery else []
    versions = sorted({str(row["versions"]) for run in checkpoint.runs for row in run.rows if row["versions"]})
    return {
        "prefix": prefix,
        "asked": asked,
        "reason": reason,  # of what is not measured now
        "earlier": bool(reason and measured and measured["pairs"]),  # the measurements are of an earlier report
        "can_measure": not reason or bool(_unknown_path(checkpoint)),
        "numbers": numbers,
        "near": claims.near_budget(numbers),
        "answer": claims.answer(numbers),
        "budget": claims.exposure(numbers).budget,
        "to_finish": collect.to_finish(checkpoint.runs),
        "again": partial(_again, checkpoint, asked),
        "report_again": partial(_report_again, checkpoint, asked),
        "second": _report_again(checkpoint, asked, "--transfer", other),
        "runs": checkpoint.runs,
        "claims": claims.claims(numbers),
        "defended": [text("defended", one) for one in numbers.defences if one.adaptive.taken],
        **{part: claims.say(part, numbers) for part in claims.FINDINGS},
        "first": checkpoint.main,
        "gallery": gallery,
        "figures": figures,
        "pictures": [*figures.values(), *shown],
        "commands": collect.commands_of(checkpoint.runs),
        "versions": "; ".join(versions).replace('"', "").strip("{}"),
    }


def _again(checkpoint: Checkpoint, asked: Asked, verb: str, count: int | None = None, **changed: Any) -> str:
    """Return the commands of one more run, beside or in the folder of the others, and of this report on all."""
    command = collect.again(checkpoint, verb, count, **changed)
    mark = f"{verb}-{hashlib.sha256(command.encode()).hexdigest()[:4]}"
    inside = Path(asked.names[0]).is_dir() and not (Path(asked.names[0]) / directory.RECORD).exists()
    out = f"{asked.names[0]}{'/' if inside else '-'}{mark}"
    names = asked.names if inside else [*asked.names, out]
    return f"{command} --out {shlex.quote(out)}; {_report_again(checkpoint, replace(asked, names=names))}"


def _report_again(checkpoint: Checkpoint, asked: Asked, *options: str) -> str:
    """Return the command of this report with more options."""
    local = ["--model", model] if (model := _unknown_path(checkpoint)) else []  # other paths are remembered
    page = [] if asked.out is None else ["--out", asked.out]
    return shlex.join(["hf-equiv", "report", *asked.names, *local, *options, *page])


def _unknown_path(checkpoint: Checkpoint) -> str:
    """Return PATH/NAME for a local model whose path is not known here, else nothing."""
    model = collect.model_of(settings) if is_local(settings := checkpoint.runs[0].settings) else ""
    return model if model.startswith("PATH/") else ""


def _gallery(checkpoint: Checkpoint, numbers: CheckpointNumbers, prefix: str) -> Row | None:
    """Show matches of the run behind the answer: the middle one by PSNR, then the others in their order."""
    budget = claims.exposure(numbers).budget
    if budget is None:
        return None
    run = next(one for one in checkpoint.matches if one.name == budget.run)
    ordered = sorted(run.good, key=lambda row: IDENTICAL_DB if row["psnr_db"] is None else row["psnr_db"])
    ids = list(dict.fromkeys(row["pair_id"] for row in (ordered[(len(ordered) - 1) // 2], *run.good)))
    shots: list[Row] = []
    rows = [row for row, _ in collect.read_pictures(run, ids[:SHOWN])]
    for row in sorted(rows, key=lambda row: ids.index(row["pair_id"])):
        columns = IMAGE_COLUMNS[:2] if budget.of_texts else IMAGE_COLUMNS
        if None not in (row[name] for name in columns):
            difference, gain = difference_png(row["source"], row["match"])
            files = {"source": row["source"], "match": row["match"], "difference": difference}
            files |= {} if budget.of_texts else {"target": row["target"]}
            place = f"{prefix}-pair{len(shots) + 1}"
            pictures = {
                name: Picture(f"{place}-{name}.png", png, f"{name} of {row['pair_id']}") for name, png in files.items()
            }
            shots.append({"row": row, "gain": gain, "pictures": pictures})
    told = claims.texts(numbers)("pictured", shots[0]["row"]) if shots else ""
    return {"run": run, "shots": shots, "left_out": len(ids) - len(shots), "told": told}


def _alike(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether the checkpoints were measured on the same pairs with the same budget."""
    settings = ("data_revision", "seed", "radius", "norm", "solver", "max_evals", "rtol", "refine")
    firsts = [checkpoint.main for checkpoint in checkpoints if checkpoint.main]
    return len({(len(run.good), *(run.settings.get(key) for key in settings)) for run in firsts}) <= 1
