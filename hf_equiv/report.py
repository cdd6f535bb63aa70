"""`make_report`: one page that answers the paper's claims for one or several checkpoints, from their run directories."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_equiv import rundir, shards
from hf_equiv.data import ImageSet, load_images
from hf_equiv.recordedmodel import load_recorded
from hf_equiv.reportnumbers import checkpoint_numbers
from hf_equiv.reportpage import Block, Bullets, Heading, Page, Text, code, plain, to_html, to_markdown
from hf_equiv.reportruns import Checkpoint, Run, find_runs, group_runs
from hf_equiv.reportsections import Material, checkpoint_sections, comparison
from hf_equiv.reportstats import RESAMPLES
from hf_equiv.reportwords import RULES
from hf_equiv.reportwork import LABELLED_PHOTOS, measure_run, measure_transfer

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder

Row = dict[str, Any]
Tell = Callable[[str, int, int], None]
PAPER = "Salman, Shams and Liu (2024), Intriguing equivalence structures of the embedding space of vision transformers"


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

    def write(self, path: Path) -> None:
        """Write the page to `path`, the Markdown beside it, and the pictures into their folder."""
        for name, png in self.pictures.items():
            shards.write_atomic(path.parent / self.folder / name, png)
        shards.write_atomic(path.with_suffix(".md"), self.markdown.encode())
        shards.write_atomic(path, self.html.encode())


def make_report(
    paths: Sequence[str | Path],
    *,
    transfer: Sequence[str] = (),
    label_data: str | None = None,
    survival: bool = True,
    model: str | Sequence[str] = (),
    out: Path | None = None,
    device: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    observer: Tell | None = None,
) -> Report:
    """Report what the runs of one or several checkpoints say of the paper's claims, with intervals and controls.

    Runs are grouped by model, revision and readout. Numbers come from the rows; controls, survival, transfer, retrieval
    and the kNN probe are measured anew with the recorded model, on the match run without a ball (or of the largest
    one). Where a model cannot be loaded, these parts say so and the rest is reported.

    Cost: about 22 forwards per pair (38 with a head), 3 per pair and transfer model, 1 per labelled photo.

    Args:
        paths: run directories, folders of them, or datasets USER/NAME on the Hub.
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
        ValueError: a path is no run directory, is damaged, or was written by a newer version; no such label data.

    Example:
        >>> report = make_report(["runs"])  # doctest: +SKIP
        >>> report.write(Path("report.html"))  # doctest: +SKIP

    References:
        Salman, Shams, Liu (2024), arXiv:2401.15568.
    """
    tell = observer or (lambda what, done, total: None)
    where = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    if not paths:
        raise ValueError("`paths` must name a run directory. Make one with hf-equiv match MODEL.")
    runs = find_runs([_locate(str(path), **where) for path in paths])
    checkpoints = group_runs(runs)
    labelled = None
    if label_data is not None:
        labelled = load_images(label_data, limit=LABELLED_PHOTOS, **where)
        if not any(label is not None for label in labelled.labels):
            raise ValueError(f"`label_data` must hold photos with classes; {labelled.data_id!r} has none.")
    folder = pictures_folder(out)
    keep = None if out is None else out.parent / folder
    models = (model,) if isinstance(model, str) else tuple(model)
    others: dict[str, Encoder | str] = {}
    materials: list[Material] = []
    problems = [f"{run.name}: {', '.join(run.changed)} not as recorded (SHA-256)" for run in runs if run.changed]
    for k, checkpoint in enumerate(checkpoints, 1):
        measured: Row | None = None
        moved: list[Row] = []
        reason = ""
        if checkpoint.matches:
            run = checkpoint.matches[0]

            def say(what: str) -> Callable[[int, int], None]:
                return lambda done, total: tell(what, done, total)

            encoder, reason = _recorded(checkpoint, models, device, **where)
            if encoder is not None:
                measured = measure_run(
                    run, encoder, survival=survival, labelled=labelled, cache=keep, tell=say(checkpoint.title)
                )
                if not measured["pairs"]:
                    reason = "the photos are withheld from this data set"
            for name in transfer if measured else ():
                if name not in others:
                    others[name] = _other(name, device, **where)
                other = others[name]
                if isinstance(other, str):
                    problems.append(other)
                else:
                    tell_it = say(f"{checkpoint.title} in {name}")
                    moved.append(measure_transfer(run, other, cache=keep, tell=tell_it))
            if encoder is None:
                problems.append(f"{checkpoint.title}: {reason}")
        numbers = checkpoint_numbers(checkpoint, measured, moved)
        prefix = "model" if len(checkpoints) == 1 else f"model{k}"
        asked = None if labelled is None else labelled.data_id
        materials.append(Material(checkpoint, numbers, measured, reason, survival, bool(transfer), asked, prefix))
    page = _page(materials, labelled)
    markdown, pictures = to_markdown(page, folder)
    told = {"models": [m.numbers for m in materials], "problems": list(dict.fromkeys(problems))}
    return Report(to_html(page), markdown, pictures, folder, told, tuple(dict.fromkeys(problems)))


def pictures_folder(out: Path | None) -> str:
    """What the folder of the pictures is called beside the page."""
    return f"{out.stem if out is not None else 'report'}_files"


def default_out(paths: Sequence[str | Path]) -> Path:
    """`reports/MODEL.html` in the current folder, after the models of the runs; `reports/report.html` if unknown."""
    slugs: dict[str, None] = {}
    for path in map(Path, paths):
        for record in [path / rundir.RECORD, *sorted(path.rglob(rundir.RECORD))] if path.is_dir() else ():
            if record.is_file():
                name = rundir.read_record(record.parent)["settings"]["model_id"]
                slugs[re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip(".-") or "model"] = None
        if not path.exists() and str(path).count("/") == 1:
            slugs[str(path).replace("/", "--")] = None
    return Path("reports") / f"{'-and-'.join(list(slugs)[:4]) or 'report'}.html"


def _locate(name: str, *, cache_dir: str | None, local_files_only: bool) -> tuple[str, Path]:
    """A folder, or the dataset USER/NAME downloaded; what it is called in the report is never an absolute path."""
    path = Path(name).expanduser()
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        from hf_equiv.hub import download_results

        folder, _ = download_results(name, cache_dir=cache_dir, local_files_only=local_files_only)
        return name, Path(folder)
    return (path.name if path.is_absolute() or ".." in path.parts else name), path


def _recorded(
    checkpoint: Checkpoint, models: Sequence[str], device: str | None, *, cache_dir: str | None, local_files_only: bool
) -> tuple[Encoder | None, str]:
    """The encoder of a checkpoint's runs; or None and why not."""
    reasons = []
    local = checkpoint.revision.startswith("sha256:") and checkpoint.model_id != "builtin"
    for model in [*models, None] if local else [None]:
        try:
            encoder = load_recorded(checkpoint.settings, model, device, cache_dir, local_files_only)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            reasons.append(" ".join(str(error).split()) or type(error).__name__)
            continue
        if encoder.revision == checkpoint.revision:
            return encoder, ""
        reasons.append(
            f"the weights of {encoder.model_id!r} have the revision {encoder.revision[:19]}; the run used "
            f"{checkpoint.revision[:19]}"
        )
    return None, f"its model could not be loaded: {reasons[-1].rstrip('.')}"


def _other(name: str, device: str | None, *, cache_dir: str | None, local_files_only: bool) -> Encoder | str:
    from hf_equiv.encoder import Encoder

    try:
        return Encoder.from_pretrained(name, device=device, cache_dir=cache_dir, local_files_only=local_files_only)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return f"transfer to {name}: {' '.join(str(error).split())}"


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
            f"{'these checkpoints' if several else 'one checkpoint'}. A match is a photo, changed by a solver until its "
            "embedding is that of another photo, the target. Distances between embeddings are relative: 0 is the same "
            "embedding, 1 the length of the target's, and two unrelated photos are often further apart than 1."
        ),
    ]
    if several:
        blocks += comparison(materials)
        blocks.append(Text(
            "The paper calls its claims generic: true of any model and any photos. "
            f"This page has {len(materials)} checkpoints; the claims tables below give a verdict for each.", "quiet",
        ))  # fmt: skip
    for m in materials:
        blocks += checkpoint_sections(m)
    blocks += [
        Heading("How to read the numbers", 2, "method"),
        Bullets((
            f"Medians have 95 % percentile bootstrap intervals: {RESAMPLES:,} resamples of the pairs (photos, walks, "
            "directions), seed 0. Shares have Wilson's 95 % score interval. A single value has no interval.",
            "Unrelated photos: the source of one pair against the target of every other.",
            "Random step: the source moved by the L2 length of its match in a random direction, rounded to 8 bit; "
            "median of 4.",
            "Half-level noise: uniform within half an 8-bit level on every pixel value of the target; median of 8.",
            "Resizing is bicubic with antialiasing, JPEG is Pillow's with its usual chroma subsampling, the blur has a "
            "standard deviation of one pixel.",
            *RULES,
        )),
        Text(
            "The verdicts are about these photos and this checkpoint. They do not show that a claim holds in general. "
            "The page contains photos of the data sets it names: see to their licence before you pass it on.",
        ),
        Heading("How to cite", 2, "cite"),
        Text(f"The paper: {PAPER}, arXiv:2401.15568. The measurements: hf_equiv, with the model revision, the data "
             "revision and the seed given above. All numbers of this page: " + code("hf-equiv report … --json") + "."),
    ]  # fmt: skip
    if labelled is not None:
        blocks.append(Text(f"Labelled photos: {plain(labelled.data_id)} at {plain(labelled.data_revision)[:19]}, "
                           f"{len(labelled)} photos.", "quiet"))  # fmt: skip
    return Page(f"Images that share an embedding: {', '.join(titles)}", tuple(blocks))


def usable(runs: Sequence[Run]) -> bool:
    """Whether any run holds a number."""
    return any(run.good for run in runs)
