"""Define the commands that make run directories: match, spectrum, lipschitz, walk. All four share one body."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import timeit
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_equiv.cli.options import (
    COUNT,
    IMAGES,
    POSITIVE,
    SHARE,
    analysis_options,
    flag,
    helped,
    images_option,
    models_argument,
    names,
    option,
    radii,
    radius,
    source_options,
)
from hf_equiv.cli.streams import to_stderr
from hf_equiv.formatting import finite

if TYPE_CHECKING:
    from hf_equiv.analyses.plan import Plan
    from hf_equiv.analyses.run import RunOutcome
    from hf_equiv.models.encoder import Encoder

_NORM = click.Choice(["linf", "l2"])

_WORDS = {"match": ("rows", "rows_to_make", "did not converge")}
"""The name of the items of an analysis, its key in a dry run, and its words for a failure."""

_USUAL_WORDS = ("images", "images_to_do", "were not completed")

_DTYPES = "float32 or float64."
_DERIVATIVES = {
    "dtype": _DTYPES,
    "batch_size": "Derivatives in one pass on a GPU. Default: 32, and on a CPU always 32.",
}
"""Help of shared options where it differs from that of `match`."""


@click.command()
@models_argument
@images_option("--source", f"Images to start from: {IMAGES}")
@images_option(
    "--target", "Image of the wanted embedding, or one for each source in the order of their paths; W as above."
)
@option(
    "--target-text", "Text of the wanted embedding, or a .txt file with one for each source (CLIP, SigLIP).", "TEXT"
)
@images_option("--data", "Set of images, W as above, to draw pairs from: of different classes if there are classes.")
@option("--texts", "A .txt file of texts to draw pairs with the images of --data from.", "FILE")
@option("--pairs", "Number of pairs to draw from --data. Default: 10, or as many as exist.", "N", COUNT)
@option("--solver", "Solver of the float match.", type=click.Choice(["lbfgs", "adam", "gd"]), default="lbfgs")
@option("--radius", "Radius of a ball about the source: 8/255, 0.03. Default: no ball.", "R", radius)
@option("--norm", "Norm of the ball of --radius. Default: linf.", type=_NORM)
@option("--rtol", "Embedding error at which a match has converged. Default: 1e-5, with --through 0.05.", "X", SHARE)
@option("--max-evals", "Evaluations per match, without those of the 8-bit refinement.", "N", COUNT, 1000)
@flag("--compile", "Compile the model with torch.compile; needs a C++ compiler and minutes.")
@click.option("--no-refine", "refine", flag_value=False, type=bool, default=True, show_default=False,
              help="Round the match to 8 bit without refining it there.")  # fmt: skip
@flag("--full-size", "Also write each match as a PNG of the size of its source photo.")
@option("--labels", "Class names for zero-shot labels (CLIP, SigLIP).", "A,B,C", names)
@option(
    "--through",
    "What the match should survive: jpeg:75, resize:0.5, blur:1, noise:2/255; jpeg:60-95 is a range.",
    "LIST",
    names,
)
@analysis_options
def match(**given: Any) -> int:
    """Turn source images into images with the embedding of target images; by default cat -> coffee.

    \b
    hf-equiv match builtin
    hf-equiv match builtin --source cat.jpg --target coffee.jpg --radius 8/255
    hf-equiv match facebook/deit-tiny-patch16-224 --data photos/ --pairs 20
    hf-equiv match builtin --through jpeg:60-95,resize:0.5
    hf-equiv match openai/clip-vit-base-patch32 --data cifar10:test --pairs 50 --labels cat,dog,ship
    hf-equiv match builtin builtin-64 --source cat.jpg --target coffee.jpg
    hf-equiv match openai/clip-vit-base-patch32 --source cat.jpg --target-text "a photo of an espresso"

    With several models, one image of the largest input size matches in all of them. Errors are those of the worst
    model; column 'models' has all.

    PNG pixels move in whole levels: with a --radius below 1/255 (linf) the match is the source.

    Files: matches/*.parquet (PNG images and all numbers), float/, figures/pairs.png.
    """  # noqa: D301, DOC201 (this is the help text, and click looks for the backspace itself)
    return _run("match", given)


@helped(**_DERIVATIVES)
@click.command()
@models_argument
@source_options
@option("--k", "Compute only the K largest singular values. Default: all, with rank and zeros.", "K", COUNT)
@flag("--vectors", "Keep the first K singular vectors (default 8) and draw six of them.")
@analysis_options
def spectrum(**given: Any) -> int:
    """Measure how fast an embedding moves, and along how many pixel directions.

    Computes the singular values of the Jacobian at each image, each with an error bound; rank, nullity, and the zeros
    that the architecture causes, by name.

    \b
    hf-equiv spectrum builtin
    hf-equiv spectrum facebook/deit-tiny-patch16-224 --data photos/ --limit 20 --k 8 --vectors

    Files: spectra/*.parquet, figures/spectra.png, figures/invariance.png (without --k).
    """  # noqa: D301, DOC201
    return _run("spectrum", given)


@helped(**_DERIVATIVES)
@click.command()
@click.argument("model")
@source_options
@images_option("--target", "Image of the directions toward and match. Default: the next image, or a built-in photo.")
@option("--directions", "Kinds and counts. Default: random:64,top:8,row:8,null:64,gradient,toward.", "LIST")
@option("--radii", "L2 radii of the secants: a:b with four a decade, or a,b,c,… Default: 1e-5:1.", "LIST", radii)
@option("--regional", "Also search the ball of radius R for the largest constant.", "R", radius)
@option("--norm", "Norm of the ball of --regional. Default: l2.", type=_NORM)
@flag("--linearity", "Also measure how far the first-order model holds (to 10 %).")
@analysis_options
def lipschitz(**given: Any) -> int:
    """Measure local directional Lipschitz constants, and say which are above the float noise.

    Computes for each direction the exact |Jv|, secants over a ladder of radii and the float noise, and states a value
    only where a plateau stands above the noise. The direction 'match' leads to a match of the target, which is made
    first.

    \b
    hf-equiv lipschitz builtin --directions random:16,top:4,null:16,gradient
    hf-equiv lipschitz facebook/deit-tiny-patch16-224 --source dog.jpg --target car.jpg --regional 0.5 --linearity

    Files: lipschitz/*.parquet, figures/secants.png and constants.png.
    """  # noqa: D301, DOC201
    return _run("lipschitz", given)


@helped(dtype=_DTYPES, batch_size="Walks side by side on a GPU. Default: 32, and on a CPU always one.")
@click.command()
@click.argument("model")
@source_options
@images_option("--target", "Image of the headings toward, nearest and connect.")
@option(
    "--heading", "Direction of the walk.",
    type=click.Choice(["random", "away", "toward", "nearest", "connect"]), default="random",
)  # fmt: skip
@option("--step", "Longest step, L2, pixels in [0, 1].", "X", POSITIVE, 1.0)
@option("--num-steps", "Points after the start.", "N", COUNT, 100)
@option("--stop", "Share of the distance to the image at which a walk to it ends. Default: 0.01.", "X", SHARE)
@option("--rtol", "Largest drift of the embedding, relative.", "X", POSITIVE, 1e-5)
@analysis_options
def walk(**given: Any) -> int:
    """Walk through images that share an embedding, correcting each point.

    Records drift, distances, label and frame of every point. Headings: random, one random direction; away, from the
    start; toward, to the target; nearest, from a match of the target back to the source; connect, from that match on to
    the target. The last three end at --stop: on a trained ViT, 0.1 takes thousands of evaluations.

    \b
    hf-equiv walk builtin --num-steps 40
    hf-equiv walk builtin --source cat.jpg --target coffee.jpg --heading connect

    Files: paths/*.parquet with the frames, float/ (the float frames), figures/walk.gif, frames.png and drift.png.
    """  # noqa: D301, DOC201
    return _run("walk", given)


def _run(name: str, given: dict[str, Any]) -> int:
    """Make the plan of a verb, then run it or print what a run would do; return the exit code."""
    from hf_equiv.analyses.plan import make_plan
    from hf_equiv.analyses.run import VERBS
    from hf_equiv.cli import environment, output, progress
    from hf_equiv.runs import resume

    quiet = given["as_json"] or given["quiet"]
    config = config_of(VERBS[name].CONFIG, given)
    with environment.calm(quiet=quiet):
        plan = make_plan(config, load(config, given), **where_of(given))
    folder: Path = given["out"] or plan.default_out
    progress.say(plan.choices, quiet=quiet or given["dry_run"])
    if given["out"] is None:
        progress.say(resume.other_states(folder, plan), quiet=quiet)
    if not given["dry_run"]:
        return _carry_out(plan, folder, given)
    if environment.is_first():
        facts = _estimate(plan, folder, resume.refuse_early(folder, plan, given["overwrite"]), given["batch_size"])
        output.print_plan(facts, _result(plan, folder, [], None) if given["as_json"] else None)
    return 0


def config_of(kind: type, given: dict[str, Any]) -> Any:
    """Return the checked config that the options name; only the built-in checkpoints have photos by default."""
    from hf_equiv.models.places import BUILTINS

    config = kind(**{option.name: given[option.name] for option in fields(kind) if option.name in given})
    config.check()
    if not BUILTINS.keys() >= {*config.models} and config.source is None and config.data is None:
        told = f"`data` must name photos for a checkpoint other than builtin; got none for {config.model!r}"
        raise ValueError(f"{told}. Add --data W with your photos, or --data builtin for the built-in ones.")
    return config


def where_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that say where to look for files of the Hub."""
    return {key: given[key] for key in ("cache_dir", "local_files_only")}


def load(config: Any, given: dict[str, Any]) -> Encoder:
    """Load the encoder of a config, unless another run is writing into its folder."""
    from hf_equiv.cli import environment
    from hf_equiv.runs.directory import refuse_busy

    if given["out"] is not None and not given["dry_run"] and environment.is_first():
        refuse_busy(given["out"])
    options = {key: given[key] for key in ("import_", "revision", "readout", "normalize", "device")}
    options["normalize"] = options["normalize"] or getattr(config, "wants_text", False)  # texts have unit embeddings
    dtype = "float32" if config.half else config.dtype
    return environment.load_encoder(config.model, dtype=dtype, **options, **where_of(given))


def _carry_out(plan: Plan, folder: Path, given: dict[str, Any]) -> int:
    """Run a plan with progress, and print its rows, summary and verdict; return the exit code."""
    from hf_equiv.cli import environment, output, progress
    from hf_equiv.runs.directory import check_command

    quiet, total = given["as_json"] or given["quiet"], len(plan.items)
    what, _, failed = _WORDS.get(plan.config.analysis, _USUAL_WORDS)
    progress.say(environment.place(plan.encoder.device), quiet=quiet)
    with interruptible({folder: plan}, folder, what):
        outcome = compute(plan, folder, given)
    if not outcome.main:
        return 0
    failures = output.failures(outcome)
    if given["as_json"]:
        output.print_json(_result(plan, folder, outcome.rows, outcome.summary))
    elif not quiet:
        output.print_outcome(outcome, failures, check_command(str(folder), plan.settings))
    count = len({item for ids in failures.values() for item in ids})
    told = f"{count} of {total} {what} in {folder} {failed}."
    if quiet and failures:
        to_stderr(f"{told} {' '.join(output.reasons(failures))}")
    if failures and os.environ.get("WORLD_SIZE", "1") != "1":  # a launcher has started several processes
        told = f"exit code 1: {told} All rows are on disk; the launcher reports the code as a failure."
        progress.say([told], quiet=quiet)
    return 1 if failures else 0


def compute(plan: Plan, folder: Path, given: dict[str, Any]) -> RunOutcome:
    """Run a plan with progress."""
    from hf_equiv.analyses.run import run_analysis
    from hf_equiv.cli import environment, progress

    quiet = given["as_json"] or given["quiet"]
    what, *_ = _WORDS.get(plan.config.analysis, _USUAL_WORDS)
    how = {key: given[key] for key in ("overwrite", "batch_size")}
    with environment.calm(quiet=quiet), progress.run_progress(quiet=quiet, what=what) as observer:
        return run_analysis(plan, folder, observer=observer, **how)


@contextlib.contextmanager
def interruptible(runs: Mapping[Path, Plan], out: Path, what: str) -> Iterator[None]:
    """Let an interruption say how many pairs or images are kept, and which command continues."""
    from hf_equiv.runs.shards import ids_of

    try:
        yield
    except KeyboardInterrupt:
        kept = sum(len(ids_of(folder, plan.layout)) for folder, plan in runs.items() if folder.is_dir())
        total = sum(len(plan.items) for plan in runs.values())
        told = f"interrupted; {kept} of {total} {what} are kept in {out}; unfinished ones start again."
        page = f" For a page of those: hf-equiv report {shlex.quote(str(out))}." if len(runs) > 1 and kept else ""
        raise KeyboardInterrupt(f"{told}{page} {_continued()}") from None


def _result(plan: Plan, folder: Path, rows: Sequence[Any], summary: Any) -> dict[str, Any]:
    return {
        "analysis": plan.config.analysis,
        "model": plan.settings["model_id"],
        "revision": plan.settings["model_revision"],
        "out": str(folder),
        "rows": [
            {key: finite(value) if isinstance(value, float) else value for key, value in row.items()} for row in rows
        ],
        "summary": summary,
    }


def _continued() -> str:
    """Name the command that continues an interrupted run: the same without --overwrite, which would start again."""
    typed = shlex.join(["hf-equiv", *(click.get_current_context().obj or [])])
    command = re.sub(r" --overwrite[ =]\w+", "", typed)
    return f"To continue{'' if command == typed else ' without --overwrite'}: {command}"


def _estimate(plan: Plan, folder: Path, there: int, batch_size: int | None) -> dict[str, Any]:
    """Return the facts of a dry run; the time comes from a timed evaluation and a rough count of them."""
    from hf_equiv.analyses import run

    encoder, settings, items = plan.encoder, plan.settings, plan.items
    match = plan.config.analysis == "match"
    what, to_do, _ = _WORDS.get(plan.config.analysis, _USUAL_WORDS)
    left, failing, evaluations = len(items) - there, sum(bool(item.unusable) for item in items), count_evaluations(plan)
    facts: dict[str, Any] = {
        "model": settings["model_id"],
        "revision": settings["model_revision"],
        "embedding": f"{settings['readout']}, D = {encoder.embedding_dim}, N = {math.prod(encoder.input_shape)}",
        "images": settings["data_id"] if match else f"{len(items)} of {settings['data_id']}",
        **({"pairs": len(items)} if match else {}),
        f"{what}_there": there,
        to_do: left,
        f"{what}_of_status_error": failing,
        "unusable_images": {image: why for item in items for image, why in item.unusable},
        "choices": list(plan.choices),
        "out": str(folder),
    }
    size = batch_size or (run.CPU_BATCH if encoder.device.type == "cpu" else run.BATCH)
    facts |= {"batch_size": size} if match else {"evaluations_per_image": round(evaluations)}
    return facts | costs(plan, {plan.config.analysis: round(max(0, left - failing) * evaluations)})


def costs(plan: Plan, evaluations: dict[str, int]) -> dict[str, Any]:
    """Return the facts of a dry run on time: the best of three timed evaluations of a batch, times their number."""
    import torch

    from hf_equiv.analyses.run import CPU_BATCH

    encoder, batch = plan.encoder, min(len(plan.items), CPU_BATCH)
    x = torch.full((batch, *encoder.input_shape), 0.5, device=encoder.device, dtype=encoder.dtype, requires_grad=True)
    times = timeit.repeat(lambda: torch.autograd.grad(encoder(x).square().sum(), x), number=1, repeat=3)
    return {
        "evaluations": evaluations,
        "device": str(encoder.device),
        "seconds_per_evaluation": round(min(times) / batch, 4),
        "estimated_seconds": round(sum(evaluations.values()) * min(times) / batch, 1),
    }


def count_evaluations(plan: Plan) -> float:
    """Return a rough number of evaluations for one item."""
    from hf_equiv.cli.progress import SEARCH, SEARCH_IN_BALL
    from hf_equiv.jacobian import jacobian_cost
    from hf_equiv.through.match import SHARE

    settings, name = plan.settings, plan.config.analysis
    jacobian = jacobian_cost(plan.encoder.embedding_dim)
    if name == "match":
        search = SEARCH if settings["radius"] is None else SEARCH_IN_BALL
        search += SHARE * settings["max_evals"] if settings.get("through") else 0
        return min(settings["max_evals"], search) + (jacobian if settings["refine"] else 0)
    if name == "spectrum":
        k = settings["k"]
        return 8 + (jacobian if k is None else min(jacobian, 4 / 3 * (2 * k + 7)))
    if name == "lipschitz":
        forwards = 2 * len(settings["radii"]) + (30 if settings["linearity"] else 0)
        secants = sum(settings["directions"].values()) * (forwards + 4) / 3
        extra = (250 if settings["regional"] else 0) + (SEARCH if "match" in settings["directions"] else 0)
        return jacobian + secants + extra
    point = {"random": 15, "away": 15, "nearest": 100}.get(settings["heading"], 30)  # evaluations, an upper estimate
    start = SEARCH if settings["solver"] else 0
    return jacobian + settings["num_steps"] * point * min(1, settings["step"]) + start
