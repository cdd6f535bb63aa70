"""Define the commands for finished runs: verify, publish, report."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hf_equiv.cli.options import (
    COUNT,
    flag,
    import_option,
    names,
    option,
    output_options,
    place_options,
    visibility,
)  # fmt: skip
from hf_equiv.cli.streams import to_stderr


@click.command()
@click.argument("where", metavar="DIR|USER/NAME[@REV]")
@option("--revision", "Branch, tag, commit or refs/pr/N of the dataset on the Hub.", "REV")
@option("--model", "Folder of a local checkpoint, if the run was made elsewhere or the folder has moved.", "PATH")
@import_option
@place_options
@flag("--allow-withheld", "Accept rows whose photos are withheld.")
@output_options
def verify(where: str, import_: str | None, as_json: bool, quiet: bool, **given: Any) -> int:
    """Recompute every row of a run directory, or of a dataset on the Hub, from its images.

    Checks the SHA-256 of each file, that no row is missing or doubled, and every number within max(3 x the float noise
    floor, 1e-6), with the model at its recorded revision. Makes settings, summary, card and figures again. Checks every
    run of a dataset, and its card. Each problem is named; the exit code is 1 if there is one. What images cannot prove
    is printed as not verified. Rows whose photos are withheld cannot be recomputed, which counts as a
    problem unless --allow-withheld is given.
    """  # noqa: DOC201 (this is the help text)
    from hf_equiv.cli import environment, output, progress
    from hf_equiv.runs.directory import refuse_folder_of_runs

    refuse_folder_of_runs(Path(where), _same_for(Path(where)))
    with progress.steps(quiet=as_json or quiet, amount=progress.count) as tell:
        from hf_equiv.verify.dataset import verify_results

        if import_ is not None:
            given["model"] = environment.import_encoder(import_)
        report = verify_results(where, observer=lambda done, total: tell(done, total, "verifying"), **given)
    if as_json:
        output.print_json(report.to_json())
    elif not quiet or not report.holds:
        output.print_text("verification", report=report, place=where)
    return 0 if report.holds else 1


def _same_for(directory: Path) -> Callable[[str], str]:
    """Return a function that names the typed command with another run in place of a directory."""
    typed: list[str] = click.get_current_context().obj or []
    return lambda run: shlex.join(["hf-equiv", *(run if Path(word) == directory else word for word in typed)])


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="USER/NAME")
@visibility("dataset")
@flag("--create-pr", "Open a pull request; you need not own the dataset.")
@option("--revision", "Branch to commit to, created if missing; or refs/pr/N.", "BRANCH")
@flag("--dry-run", "List files, licence decision and card; write nothing.")
@option("--license", "Licence of the images if unknown, such as cc-by-4.0.", "ID")
@flag("--i-have-the-right", "Publish photos whose licence is not known to be free.")
@flag("--withhold-photos", "Leave the photos out although they are free.")
@option("--collection", "Title or slug of a collection to add the dataset to.", "T")
@option("--message", "Title of the commit.", "M")
@output_options
def publish(directory: Path, repo_id: str, as_json: bool, quiet: bool, **given: Any) -> int:
    """Publish a run directory as a dataset on the Hub, in one commit.

    A new dataset is private unless --public is given. The first run of a dataset lies at its root, others in
    runs/NAME/; a run of the same settings is updated. Photos are published if they are free: the built-in ones, and
    those of a Hub dataset with a free licence. Otherwise rows and ids are published with empty image columns.

    A dry run also says whether the Hub would refuse; nothing else in it needs the network. Its exit code is always 0.

    \b
    hf-equiv publish runs/match/builtin/1a2b3c4d me/matches --dry-run
    hf-equiv publish runs/walk/builtin/5e6f7a8b me/matches --collection "Level sets"
    hf-equiv publish DIR somebody/matches --create-pr
    """  # noqa: D301, DOC201, DOC501 (this is the help text, and click looks for the backspace itself)
    from hf_equiv.cli import output, progress
    from hf_equiv.runs.directory import check_command, read_record, refuse_folder_of_runs

    refuse_folder_of_runs(directory, _same_for(directory))
    try:
        with progress.steps(quiet=as_json or quiet, amount=progress.sent) as tell:
            from hf_equiv.hub.publish import publish_results
            from hf_equiv.runs.schema import LAYOUTS

            done = publish_results(directory, repo_id, progress=tell, **given)
    except KeyboardInterrupt:
        told = "interrupted. Run the same command to continue: it sends no uploaded file and makes no commit twice."
        raise KeyboardInterrupt(told) from None
    if as_json:
        output.print_json(asdict(done))
    elif not quiet:
        name = done.repo_id + ("" if done.revision == "main" else f"@{done.revision}")
        check = check_command(name, read_record(directory)["settings"])
        output.print_text("publication", done=done, config=LAYOUTS[done.run.split("-")[0]].folder, check=check)
    return 0


@click.command()
@click.argument("paths", metavar="DIR|USER/NAME...", nargs=-1, required=True)
@option("--out", "The page. Default: reports/MODEL.html.", "FILE.html", click.Path(path_type=Path, dir_okay=False))
@option("--transfer", "Also test whether the matches match for this model; repeat.", "MODEL2", multiple=True)
@option("--defences", "Try jpeg:75,smooth:0.25, also on matches made for them, in 450 evaluations each.", "LIST",
        names)  # fmt: skip
@option("--defence-pairs", "Pairs that defences are tried on.", "N", COUNT, 5)
@option("--label-data", "Photos with classes for a nearest-neighbour probe of the embedding.", "W")
@click.option("--no-survival", "survival", flag_value=False, type=bool, default=True, show_default=False,
              help="Skip JPEG, resizing and blur (half of the time).")  # fmt: skip
@option("--model", "Folder of a local checkpoint, as for hf-equiv verify; repeat.", "PATH", multiple=True)
@import_option
@place_options
@output_options
def report(
    paths: tuple[str, ...], out: Path | None, import_: str | None, as_json: bool, quiet: bool, **given: Any
) -> int:  # fmt: skip
    """Report whether encoders are exposed, how, and what helps: one HTML page from runs, with the evidence.

    Each DIR is a run directory or a folder of them, each USER/NAME a dataset on the Hub. Runs are grouped by
    checkpoint; several checkpoints are set side by side. Match runs with different --radius make a curve of error
    against budget. FILE.md and FILE_files/ are written beside FILE.html.

    \b
    hf-equiv report runs
    hf-equiv report runs/match/builtin/1a2b3c4d --transfer facebook/deit-tiny-patch16-224
    hf-equiv report alice/deit-matches bob/dinov2-matches --out side-by-side.html

    Exit code 1: a part that needs the model could not be measured, or a file is not as recorded; the page says which.
    """  # noqa: D301, DOC201
    from hf_equiv.cli import environment, output, progress

    with progress.steps(quiet=as_json or quiet, amount=progress.count) as tell:
        from hf_equiv.report.collect import default_out
        from hf_equiv.report.page import make_report

        if import_ is not None:
            given["model"] = (*given["model"], environment.import_encoder(import_))
        path, given["defences"] = out or default_out(paths), given["defences"] or ()
        _refuse_unwritable(path)
        page = make_report(paths, out=path, observer=lambda step, done, total: tell(done, total, step), **given)
        page.write(path)
    if as_json:
        output.print_json({"analysis": "report", "out": str(path), **page.numbers})
    elif not quiet:
        output.print_summary(page, path)
    for problem in page.problems if as_json or quiet else ():
        to_stderr(f"not complete: {problem}")
    return 1 if page.problems else 0


def _refuse_unwritable(path: Path) -> None:
    """Refuse a page that cannot be written before anything is measured, without leaving a file."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"`out` must be a file name ending in .html; got {str(path)!r}.")
    try:
        with tempfile.TemporaryFile(dir=next(place for place in path.absolute().parents if place.exists())):
            pass
    except OSError as error:
        raise ValueError(f"`out` {str(path)!r} cannot be written: {error.strerror}. Name another place.") from error
