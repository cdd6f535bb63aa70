"""`make_report`: one page that answers the paper's claims for one or several checkpoints, from their runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_equiv.data.image_set import ImageSet
from hf_equiv.data.sources import load_images
from hf_equiv.report.claims import RULES
from hf_equiv.report.collect import Checkpoint, Place, find_runs, group_runs, load_other, load_own, locate
from hf_equiv.report.measure import LABELLED_PHOTOS, measure_run, measure_transfer
from hf_equiv.report.numbers import checkpoint_numbers
from hf_equiv.report.render import Block, Bullets, Heading, Page, Text, code, plain, to_html, to_markdown
from hf_equiv.report.sections import (
    Material,
    comparison,
    gallery_section,
    heads_section,
    left_out,
    linearity_section,
    lipschitz_section,
    made_section,
    matching_section,
    near_section,
    probe_section,
    retrieval_section,
    spectrum_section,
    summary_section,
    survival_section,
    transfer_section,
    walks_section,
)
from hf_equiv.report.statistics import RESAMPLES
from hf_equiv.runs import shards

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

Row = dict[str, Any]


Tell = Callable[[str, int, int], None]


SECTIONS: tuple[Callable[[Material], list[Block]], ...] = (
    summary_section, matching_section, gallery_section, near_section, heads_section, survival_section,
    transfer_section, retrieval_section, probe_section, spectrum_section, lipschitz_section, linearity_section,
    walks_section, made_section,
)  # fmt: skip
"""Of one checkpoint, in their order."""


WITHHELD = "the photos are withheld from this data set"


PAPER = "Salman, Shams and Liu (2024), Intriguing Equivalence Structures of the Embedding Space of Vision Transformers"


@dataclass(frozen=True)
class Report:
    """A finished report.

    Attributes:
        html: the page as one file that loads nothing from elsewhere.
        markdown: the same as Markdown, with its pictures beside it.
        pictures: those pictures, PNG bytes by file name.
        folder: what their folder is called.
        numbers: every number of the page: `models`, one for each checkpoint, with intervals and n.
        problems: parts that could not be measured, and files that are not as recorded.
    """

    html: str
    markdown: str
    pictures: dict[str, bytes] = field(repr=False)
    folder: str
    numbers: Row
    problems: tuple[str, ...]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page, the Markdown beside it, and the pictures into their folder; each file whole or not at all.

        Pictures of an earlier page at the same place are removed where this one has none of the name.

        Args:
            path: of the page; `out` of `make_report`, so that the Markdown finds its pictures.
        """
        path = Path(path)
        for old in (path.parent / self.folder).glob("model*-*.png"):
            if old.name not in self.pictures:
                old.unlink()
        for name, png in self.pictures.items():
            shards.write_atomic(path.parent / self.folder / name, png)
        shards.write_atomic(path.with_suffix(".md"), self.markdown.encode())
        shards.write_atomic(path, self.html.encode())


def make_report(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    transfer: Sequence[str] = (),
    label_data: str | os.PathLike[str] | None = None,
    survival: bool = True,
    model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    observer: Tell | None = None,
) -> Report:
    """Report what the runs of one or several checkpoints say of the paper's claims, with intervals and controls.

    Runs are grouped by model, revision, readout and dtype. Numbers come from the rows; controls, survival, transfer,
    retrieval and the kNN probe are measured anew with the recorded model, on the match run without a ball (or of the
    largest one). Where a model cannot be loaded, these parts say so and the rest is reported.

    Rows and float images of files that are not as the `run.json` of a finished run states count nowhere; the page says
    how many.

    Cost: about 22 forwards per pair (38 with a head), 3 per pair and transfer model, 1 per labelled photo.

    Args:
        paths: a run directory, a folder of them, a dataset USER/NAME on the Hub; or several of these.
        transfer: other models that are asked whether the matches match there, too.
        label_data: photos with classes for the kNN probe; see `load_images`.
        survival: whether to try JPEG, resizing and blur.
        model: where local checkpoints are, whose paths runs do not record; the one of the recorded revision is used.
        out: where the page will be: names the folder of its pictures, where measurements are kept.
        device: where to compute; by default CUDA if there is one.
        cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.
        observer: called with (what is measured, done, in all).

    Returns:
        The report; the same for the same runs and options, to the byte.

    Raises:
        ValueError: a path is no run directory, is damaged, or was written by a newer version; no file of rows is as
            recorded; no such label data.

    Example:
        >>> report = make_report("runs")  # doctest: +SKIP
        >>> report.write("report.html")  # doctest: +SKIP

    References:
        Salman, Shams, Liu (2024), arXiv:2401.15568.
    """
    tell = observer or (lambda what, done, total: None)
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    out = None if out is None else Path(out)
    place = Place(device, cache_dir, local_files_only)
    paths = _several(paths)
    if not paths:
        raise ValueError("`paths` must name a run directory. Make one with hf-equiv match MODEL.")
    runs = find_runs([locate(path, place) for path in paths])
    if any(run.changed for run in runs) and not any(run.rows for run in runs):
        raise ValueError(
            f"`paths` must hold rows that are as recorded; in {', '.join(run.name for run in runs if run.changed)} no "
            "file of rows is as run.json states (SHA-256). hf-equiv verify names every problem."
        )
    checkpoints = group_runs(runs)
    labelled = None
    if label_data is not None:
        labelled = load_images(
            label_data, limit=LABELLED_PHOTOS, cache_dir=cache_dir, local_files_only=local_files_only
        )
        if not any(label is not None for label in labelled.labels):
            raise ValueError(f"`label_data` must hold photos with classes; {labelled.data_id!r} has none.")
    folder = pictures_folder(out)
    keep = None if out is None else out.parent / folder
    models = _several(model)
    others: dict[str, Encoder | str] = {name: load_other(name, place) for name in dict.fromkeys(transfer)}
    problems = [f"{run.name}: {', '.join(run.changed)} not as recorded (SHA-256); {left_out(run)}" for run in runs
                if run.changed]  # fmt: skip
    problems += [other for other in others.values() if isinstance(other, str)]
    materials: list[Material] = []
    for k, checkpoint in enumerate(checkpoints, 1):
        measured, moved, reason = _measure(checkpoint, models, others, place, survival, labelled, keep, tell)
        if reason not in ("", WITHHELD):
            problems.append(f"{checkpoint.title}: {reason}")
        prefix = "model" if len(checkpoints) == 1 else f"model{k}"
        note = "; ".join(other.rstrip(".") for other in others.values() if isinstance(other, str))
        if transfer and not note:
            note = "transfer: the model named is the one that the matches were made for"
        asked = None if labelled is None else labelled.data_id
        numbers = checkpoint_numbers(checkpoint, measured, moved)
        materials.append(Material(checkpoint, numbers, measured, reason, survival, bool(transfer), asked, prefix, note))
    page = _page(materials, labelled)
    markdown, pictures = to_markdown(page, folder)
    told = {"models": [m.numbers for m in materials], "problems": list(dict.fromkeys(problems))}
    return Report(to_html(page), markdown, pictures, folder, told, tuple(dict.fromkeys(problems)))


def _several(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """One path or several, as text."""
    return tuple(os.fspath(path) for path in ([given] if isinstance(given, str | os.PathLike) else given))


def pictures_folder(out: Path | None) -> str:
    """What the folder of the pictures is called beside the page."""
    return f"{out.stem if out is not None else 'report'}_files"


def _measure(
    checkpoint: Checkpoint, models: Sequence[str], others: Mapping[str, Encoder | str], place: Place, survival: bool,
    labelled: ImageSet | None, keep: Path | None, tell: Tell,
) -> tuple[Row | None, list[Row], str]:  # fmt: skip
    """Measure the first match run of a checkpoint: with its own encoder, with others, and why not where it fails."""
    if not checkpoint.matches:
        return None, [], ""
    run = checkpoint.matches[0]
    encoder, reason = load_own(checkpoint, models, place)
    if encoder is None:
        return None, [], reason

    def count(what: str) -> Callable[[int, int], None]:
        return lambda done, total: tell(what, done, total)

    measured = measure_run(run, encoder, survival=survival, labelled=labelled, cache=keep, tell=count(checkpoint.title))
    if not measured["pairs"]:
        return measured, [], WITHHELD
    moved = [
        measure_transfer(run, other, cache=keep, tell=count(f"{checkpoint.title} in {name}"))
        for name, other in others.items()
        if not isinstance(other, str) and _differ(other, encoder)
    ]
    return measured, moved, ""


def _differ(other: Encoder, encoder: Encoder) -> bool:
    """Whether another encoder is not the very one that the matches were made for."""
    return (other.revision, other.readout, other.normalize) != (encoder.revision, encoder.readout, encoder.normalize)


def _page(materials: Sequence[Material], labelled: ImageSet | None) -> Page:
    titles = [plain(m.checkpoint.title) for m in materials]
    several = len(materials) > 1
    blocks: list[Block] = [
        Text(
            "An image encoder turns a photo into a list of numbers, its embedding, and whatever is built on it (a "
            "classifier, an image search) sees only the embedding. This page reports how far two photos can differ and "
            "still have the same embedding, how little has to change to get another photo's embedding, and why.",
            "lead",
        ),
        Text(
            f"It checks the claims of {PAPER} (arXiv:2401.15568) on "
            f"{'these checkpoints' if several else 'one checkpoint'}. A match is a photo, changed by a solver until "
            "its "
            "embedding is that of another photo, the target. Distances between embeddings are relative: 0 is the same "
            "embedding, 1 the length of the target's, and two unrelated photos are often further apart than 1."
        ),
    ]
    if several:
        blocks += comparison(materials)
        blocks.append(
            Text(
                "The paper calls its claims generic: true of any model and any photos. "
                f"This page has {len(materials)} checkpoints; the claims tables below give a verdict for each.",
                "quiet",
            )
        )
    for m in materials:
        blocks.append(Heading(plain(m.checkpoint.title), 2, m.prefix))
        for section in SECTIONS:
            blocks += section(m)
    blocks += [
        Heading("How to read the numbers", 2, "method"),
        Bullets(
            (
                f"Medians have 95 % percentile bootstrap intervals: {RESAMPLES:,} resamples of the pairs (photos, "
                "walks, "
                "directions), seed 0. Shares have Wilson's 95 % score interval. A single value has no interval.",
                "Unrelated photos: the source of one pair against the target of every other.",
                "Random step: the source moved by the L2 length of its match in a random direction, rounded to 8 bit; "
                "median of 4.",
                "Half-level noise: uniform within half an 8-bit level on every pixel value of the target; median of 8.",
                "Resizing is bicubic with antialiasing, JPEG is Pillow's with its usual chroma subsampling, the blur "
                "has a "
                "standard deviation of one pixel.",
                *RULES,
            )
        ),
        Text(
            "The verdicts are about these photos and this checkpoint. They do not show that a claim holds in general. "
            "The page contains photos of the data sets it names: see to their licence before you pass it on.",
        ),
        Heading("How to cite", 2, "cite"),
        Text(
            f"The paper: {PAPER}, arXiv:2401.15568. The measurements: hf_equiv, with the model revision, the data "
            "revision and the seed given above. All numbers of this page: " + code("hf-equiv report … --json") + "."
        ),
    ]
    if labelled is not None:
        blocks.append(
            Text(
                f"Labelled photos: {plain(labelled.data_id)} at {plain(labelled.data_revision)[:19]}, "
                f"{len(labelled)} photos.",
                "quiet",
            )
        )
    return Page(f"Images that share an embedding: {', '.join(titles)}", tuple(blocks))
