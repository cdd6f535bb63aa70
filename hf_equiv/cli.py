"""The command line. Heavy modules are imported inside the commands, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from hf_equiv.options import (
    IMAGES,
    Radii,
    Radius,
    model_options,
    once,
    output_options,
    run_options,
    source_options,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hf-equiv", prog_name="hf-equiv")
def cli() -> None:
    """Find images that share an embedding, for any vision checkpoint, and check what was found.

    \b
    hf-equiv match builtin                          cat -> coffee with the model that ships here
    hf-equiv match facebook/deit-tiny-patch16-224 --source dog.jpg --target car.jpg
    hf-equiv spectrum builtin                       rank, null space and named zeros of the Jacobian
    hf-equiv lipschitz builtin                      how fast the embedding moves, by kind of direction
    hf-equiv walk builtin                           through images that share an embedding
    hf-equiv verify runs/match/builtin/1a2b3c4d     recompute every row from its PNG files
    hf-equiv publish runs/match/builtin/1a2b3c4d me/matches    to the Hub, as a private dataset
    hf-equiv report runs                            one page: the paper's claims, with intervals and controls
    hf-equiv env facebook/dinov2-small              what the checkpoint offers

    Exit codes: 0 done; 1 some row did not converge or complete, or a check did not hold; 2 bad input.
    """  # noqa: D301 (click looks for the backspace itself)


@cli.command()
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
    from hf_equiv import matchcommand

    return matchcommand.run(model, **given)


@cli.command()
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
    from hf_equiv import geometrycommand

    return geometrycommand.run("spectrum", model, **given)


@cli.command()
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
    help="Radii of the secants (L2, pixels in [0, 1]): a:b, or a,b,c,… ascending, four a decade. Default: 1e-4:1.",
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
    from hf_equiv import geometrycommand

    return geometrycommand.run("lipschitz", model, **given)


@cli.command()
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
    from hf_equiv import geometrycommand

    return geometrycommand.run("walk", model, **given)


@cli.command()
@click.argument("where", metavar="DIR|USER/NAME[@REV]")
@click.option("--revision", metavar="REV", help="Branch, tag, commit or refs/pr/N of the dataset on the Hub.")
@click.option("--model", metavar="PATH", help="Where the checkpoint is, if the run used a local folder.")
@click.option("--device", metavar="DEV", help="cpu, cuda or cuda:K.")
@click.option("--cache-dir", metavar="DIR", help="Where Hub downloads are kept.")
@click.option("--local-files-only", is_flag=True, help="Never ask the Hub.")
@click.option("--allow-withheld", is_flag=True, help="Rows whose photos are withheld are no problem.")
@output_options
def verify(where: str, as_json: bool, quiet: bool, **given: Any) -> int:
    """Recompute every row of a run directory, or of a dataset on the Hub, from its images.

    Checks the SHA-256 of each file, that no row is missing or doubled, and every number within max(3 x the float noise
    floor, 1e-6), with the model at its recorded revision; of a dataset every run, and the card. Each problem is named;
    the exit code is 1 if there is one. Rows whose photos are withheld cannot be recomputed, which counts as a problem
    unless --allow-withheld is given.
    """  # noqa: DOC201 (this is the help text)
    from hf_equiv import display, environment, progress

    with display.result_stream() as out:
        from hf_equiv.datasetcheck import verify_results

        environment.calm(quiet=as_json or quiet)
        with progress.counter("verifying", quiet=as_json or quiet) as count:
            report = verify_results(where, observer=count, **given)
        if as_json:
            display.print_json(report.to_json(), out)
        elif not quiet or not report.holds:
            display.print_dataset_report(report, where, out)
    return 0 if report.holds else 1


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="USER/NAME")
@click.option(
    "--private/--public", "private", default=None,
    help="Visibility. Default: that of the dataset; a new one is private.",
)  # fmt: skip
@click.option("--create-pr", is_flag=True, help="Open a pull request; for that you need not own the dataset.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, made if missing; or refs/pr/N.")
@click.option("--dry-run", is_flag=True, help="List files, licence decision and card; write nothing.")
@click.option("--license", metavar="ID", help="Licence of the images where it is not known, such as cc-by-4.0.")
@click.option("--i-have-the-right", is_flag=True, help="Publish photos whose licence is not known to be free.")
@click.option("--withhold-photos", is_flag=True, help="Leave the photos out although they are free.")
@click.option("--collection", metavar="T", help="Title or slug of a collection to add the dataset to.")
@click.option("--message", metavar="M", help="Title of the commit.")
@output_options
def publish(directory: Path, repo_id: str, **given: Any) -> int:
    """Publish a run directory as a dataset on the Hub, in one commit.

    Private unless --public is given. The first run of a dataset is at its root, others are added in runs/NAME/; a run
    of the same settings is updated. Photos go along if they are free: the built-in ones, or of a Hub dataset with a
    free licence. Otherwise rows and ids are published with empty image columns.

    \b
    hf-equiv publish runs/match/builtin/1a2b3c4d me/matches --dry-run
    hf-equiv publish runs/match/builtin/1a2b3c4d me/matches
    hf-equiv publish runs/walk/builtin/5e6f7a8b me/matches --collection "Level sets"
    hf-equiv publish DIR somebody/matches --create-pr
    """  # noqa: D301, DOC201
    from hf_equiv import publishcommand

    return publishcommand.run(directory, repo_id, **given)


@cli.command()
@click.argument("paths", metavar="DIR|USER/NAME...", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.html",
    help="The page; FILE.md and FILE_files/ come beside it. Default: reports/MODEL.html.",
)  # fmt: skip
@click.option(
    "--transfer", metavar="MODEL2", multiple=True, help="Also ask this model whether the matches match there; repeat."
)
@click.option("--label-data", metavar="W", help="Photos with classes for a nearest-neighbour probe of the embedding.")
@click.option("--no-survival", is_flag=True, help="Do not try JPEG, resizing and blur (half of the time).")
@click.option(
    "--model", metavar="PATH", multiple=True, help="Where the checkpoint is, if a run used a local folder; repeat."
)
@click.option("--device", metavar="DEV", help="cpu, cuda or cuda:K.")
@click.option("--cache-dir", metavar="DIR", help="Where Hub downloads are kept.")
@click.option("--local-files-only", is_flag=True, help="Never ask the Hub.")
@output_options
def report(paths: tuple[str, ...], **given: Any) -> int:
    """Report what runs say of the paper's claims: one HTML page with figures, intervals and controls.

    Each DIR is a run directory or a folder of them, or USER/NAME a dataset on the Hub. Runs are grouped by checkpoint;
    several are set side by side. Match runs with different --radius make a curve of error against budget.

    \b
    hf-equiv report runs
    hf-equiv report runs/match/builtin/1a2b3c4d --transfer facebook/deit-tiny-patch16-224
    hf-equiv report alice/deit-matches bob/dinov2-matches --out side-by-side.html

    Exit code 1: a part that needs the model could not be measured, or a file is not as recorded; the page says which.
    """  # noqa: D301, DOC201 (this is the help text, and click looks for the backspace itself)
    from hf_equiv import reportcommand

    return reportcommand.run(paths, **given)


@cli.command()
@click.argument("model", required=False)
@model_options
@output_options
def env(model: str | None, **given: Any) -> int:
    """Show versions and, for a MODEL, its embedding size, readouts, processor and head."""
    as_json, quiet = given.pop("as_json"), given.pop("quiet")
    from hf_equiv import display, environment

    with display.result_stream() as out:
        environment.calm(quiet=as_json or quiet)
        facts: dict[str, Any] = {"versions": environment.versions(), "device": environment.device()}
        if model is not None:
            facts["model"] = environment.describe(environment.load_encoder(model, **given))
        if as_json:
            display.print_json(facts, out)
        else:
            display.print_facts(facts, out)
    return 0


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 not all held, 2 bad input, 130 interrupted."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    debug = os.environ.get("HF_EQUIV_DEBUG", "") not in ("", "0")
    try:
        return int(cli.main(arguments, prog_name="hf-equiv", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        message = error.format_message()
        if "extra argument" in message:  # most often a pattern that the shell has expanded
            message += ". A flag takes one name: of several images, name the folder."
        return _fail(message)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted.", 130)
    except click.Abort as error:
        return _fail(str(error.__cause__ or error.__context__ or "") or "interrupted.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, ImportError, OSError) as error:
        if debug:
            raise
        return _fail(_message(error))
    except Exception as error:
        if debug:
            raise
        return _fail(f"{type(error).__name__}: {_message(error)} (HF_EQUIV_DEBUG=1 shows where)")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error) or type(error).__name__


def _fail(message: str, code: int = 2) -> int:
    """Print an error on one line, and the items of a list on one line each."""
    from hf_equiv.wording import in_flags

    lines = (" ".join(item.split()) for item in in_flags(message).split("\n- "))
    click.echo("error: " + "\n- ".join(lines), err=True)
    return code
