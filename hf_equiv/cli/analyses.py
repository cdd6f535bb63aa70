"""The commands that make run directories: match, spectrum, lipschitz, walk. What each does is in modules of its own."""

from __future__ import annotations

from typing import Any

import click

from hf_equiv.cli.options import IMAGES, Radii, Radius, model_options, once, output_options, run_options, source_options


@click.command()
@click.argument("model")
@click.option("--source", metavar="W", multiple=True, callback=once, help=f"Images to start from. {IMAGES}")
@click.option(
    "--target", metavar="W", multiple=True, callback=once,
    help="The image whose embedding is wanted; or as many as there are sources: first to first, sorted by path.",
)  # fmt: skip
@click.option(
    "--data", metavar="W", multiple=True, callback=once,
    help="Images to draw pairs from, of different classes where there are classes.",
)  # fmt: skip
@click.option(
    "--pairs", type=int, metavar="N", help="How many pairs to draw from --data. Default: 10, or all there are."
)
@click.option(
    "--solver", type=click.Choice(["lbfgs", "adam", "gd"]), default="lbfgs", show_default=True,
    help="Of the float match; the PNG is refined after any of them, unless --no-refine is given.",
)  # fmt: skip
@click.option(
    "--radius",
    type=Radius(),
    help="Stay in a ball about the source: 8/255, 0.03. Default: no ball. "
    "A PNG moves in whole levels: below 1/255 (linf) it is the source.",
)
@click.option("--norm", type=click.Choice(["linf", "l2"]), help="Norm of the ball of --radius. Default: linf.")
@click.option("--rtol", type=float, default=1e-5, show_default=True, help="Embedding error at which a match is done.")
@click.option(
    "--max-evals",
    type=int,
    default=1000,
    show_default=True,
    help="Forward+backward passes per match; the 8-bit refinement comes on top.",
)
@click.option(
    "--compile", is_flag=True, help="Match with the model compiled by torch.compile; needs a C++ compiler, and minutes."
)
@click.option("--no-refine", is_flag=True, help="Round the match to 8 bit instead of refining it there.")
@click.option(
    "--labels",
    metavar="A,B,C",
    help="Class names for zero-shot labels (CLIP, SigLIP), each read as 'a photo of a NAME.'.",
)
@model_options
@run_options
@output_options
def match(model: str, **given: Any) -> int:
    """Turn source images into images with the embedding of target images.

    MODEL is a Hub id, a folder or 'builtin'. Without --source, --target or --data, the built-in photos are used:
    cat -> coffee.

    \b
    hf-equiv match builtin
    hf-equiv match builtin --source cat.jpg --target coffee.jpg --radius 8/255
    hf-equiv match facebook/deit-tiny-patch16-224 --data photos/ --pairs 20
    hf-equiv match openai/clip-vit-base-patch32 --data cifar10:test --pairs 50 --labels cat,dog,ship

    The run directory is a dataset: matches/*.parquet (PNG images and all numbers), float/, figures/pairs.png. Stopped
    runs go on with the same command.
    """  # noqa: D301, DOC201 (this is the help text, and click looks for the backspace itself)
    from hf_equiv.cli import match_command

    return match_command.run(model, **given)


@click.command()
@click.argument("model")
@source_options
@click.option(
    "--k", type=int, metavar="K", help="Only the K largest singular values. Default: all, with rank and zeros."
)
@click.option("--vectors", is_flag=True, help="Keep the singular vectors of the first K (or 8); six are drawn.")
@model_options
@run_options
@output_options
def spectrum(model: str, **given: Any) -> int:
    """Measure how fast an embedding moves, and along how many pixel directions.

    The singular values of the Jacobian at each image, each with an error bound; rank, nullity, and the zeros that the
    architecture causes, by name. MODEL is a Hub id, a folder or 'builtin'. Without --source or --data, the built-in
    photos are used.

    \b
    hf-equiv spectrum builtin
    hf-equiv spectrum facebook/deit-tiny-patch16-224 --data photos/ --limit 20 --k 8 --vectors

    The run directory is a dataset: spectra/*.parquet, figures/spectra.png. Stopped runs go on with the same command.
    """  # noqa: D301, DOC201
    from hf_equiv.cli import geometry_command

    return geometry_command.run("spectrum", model, **given)


@click.command()
@click.argument("model")
@source_options
@click.option(
    "--target", metavar="W", multiple=True, callback=once,
    help="Image of the directions `toward` and `match`. Default: the next image of the set; for a single image a "
    "built-in photo.",
)  # fmt: skip
@click.option(
    "--directions", metavar="LIST",
    help="Kinds and counts. Default: random:64,top:8,row:8,null:64,gradient,toward. Also match: to a match of the "
    "target, made on the way.",
)  # fmt: skip
@click.option(
    "--radii",
    type=Radii(),
    help="Radii of the secants (L2, pixels in [0, 1]): a:b, or a,b,c,… ascending, four a decade. Default: 1e-5:1.",
)
@click.option(
    "--regional", type=Radius(), metavar="R", help="Also search the ball of radius R for the largest constant."
)
@click.option("--norm", type=click.Choice(["linf", "l2"]), help="Norm of the ball of --regional. Default: l2.")
@click.option("--linearity", is_flag=True, help="Also measure how far the first-order model holds (to 10 %).")
@model_options
@run_options
@output_options
def lipschitz(model: str, **given: Any) -> int:
    """Measure local directional Lipschitz constants, and say which are above the float noise.

    For each direction the exact |Jv|, secants over a ladder of radii, the measured noise floor, and a value only where
    a plateau stands above it. MODEL is a Hub id, a folder or 'builtin'. Without --source or --data, the built-in photos
    are used.

    \b
    hf-equiv lipschitz builtin --directions random:16,top:4,null:16,gradient
    hf-equiv lipschitz facebook/deit-tiny-patch16-224 --source dog.jpg --target car.jpg --regional 0.5 --linearity

    The run directory is a dataset: lipschitz/*.parquet, figures/secants.png and constants.png. Stopped runs go on with
    the same command.
    """  # noqa: D301, DOC201
    from hf_equiv.cli import geometry_command

    return geometry_command.run("lipschitz", model, **given)


@click.command()
@click.argument("model")
@source_options
@click.option("--target", metavar="W", multiple=True, callback=once, help="Image of headings toward, nearest, connect.")
@click.option(
    "--heading", type=click.Choice(["random", "away", "toward", "nearest", "connect"]), default="random",
    show_default=True, help="random direction; away from the start; toward the target; from a match of the target back "
    "to the source (nearest) or on to the target itself (connect).",
)  # fmt: skip
@click.option("--step", type=float, default=1.0, show_default=True, help="Longest step, L2 in pixels in [0, 1].")
@click.option("--num-steps", type=int, default=100, show_default=True, help="Points after the start.")
@click.option(
    "--stop", type=float, help="toward, nearest, connect: at which share of the distance to the image that leads along "
    "the level set the walk is over. On a trained ViT 0.1 takes thousands of evaluations.  [default: 0.01]",
)  # fmt: skip
@click.option("--rtol", type=float, default=1e-5, show_default=True, help="Largest drift of the embedding, relative.")
@model_options
@run_options
@output_options
def walk(model: str, **given: Any) -> int:
    """Walk through images that share an embedding, each point corrected back.

    Drift, distances, label and frame of every point. MODEL is a Hub id, a folder or 'builtin'. Without --source or
    --data, the built-in photos are used.

    \b
    hf-equiv walk builtin --num-steps 40
    hf-equiv walk builtin --source cat.jpg --target coffee.jpg --heading connect

    The run directory is a dataset: paths/*.parquet with the frames, float/ (the frames as they were found),
    figures/walk.gif, frames.png and drift.png. Stopped runs go on with the same command.
    """  # noqa: D301, DOC201
    from hf_equiv.cli import geometry_command

    return geometry_command.run("walk", model, **given)
