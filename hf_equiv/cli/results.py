"""The commands on what runs have made: verify, publish, report. What each does is in modules of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_equiv.cli.options import output_options, visibility


@click.command()
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
    from hf_equiv.cli import environment, output, progress

    with output.result_stream() as out:
        from hf_equiv.verify.dataset import verify_results

        environment.calm(quiet=as_json or quiet)
        with progress.counter("verifying", quiet=as_json or quiet) as count:
            report = verify_results(where, observer=count, **given)
        if as_json:
            output.print_json(report.to_json(), out)
        elif not quiet or not report.holds:
            output.print_dataset_report(report, where, out)
    return 0 if report.holds else 1


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="USER/NAME")
@visibility("dataset")
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

    A dry run also says whether the Hub would refuse; its exit code is 0 all the same.

    \b
    hf-equiv publish runs/match/builtin/1a2b3c4d me/matches --dry-run
    hf-equiv publish runs/match/builtin/1a2b3c4d me/matches
    hf-equiv publish runs/walk/builtin/5e6f7a8b me/matches --collection "Level sets"
    hf-equiv publish DIR somebody/matches --create-pr
    """  # noqa: D301, DOC201
    from hf_equiv.cli import publish_command

    return publish_command.run(directory, repo_id, **given)


@click.command()
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
    from hf_equiv.cli import report_command

    return report_command.run(paths, **given)
