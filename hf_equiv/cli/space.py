"""Define the commands for the app: serve it here, or deploy it to a Space on the Hub."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from hf_equiv.cli.options import flag, group, option, output_options, visibility
from hf_equiv.cli.streams import to_stderr


@click.group()
def space() -> None:
    """Serve the app in a browser, on this machine or as a Space on the Hub."""


_app_options = group(
    option("--dataset", "Published matches to show, or a run of yours; in a Space, '' shows none.", "USER/NAME[@REV]"),
    click.option("--model", "models", metavar="M", multiple=True, help="Checkpoint to offer beside builtin; repeat."),
)


@space.command("run")
@option("--host", "Address to listen at; 0.0.0.0 for all.", default="127.0.0.1")
@option("--port", "Port.", "N", click.IntRange(0, 65535), 7860)
@_app_options
@flag("--share", "Also open a public link of Gradio, for 72 hours at most.")
def space_run(host: str, port: int, dataset: str | None, models: tuple[str, ...], share: bool) -> int:
    """Serve the app on this machine until Ctrl-C; it needs gradio (in a clone: pip install ".[space]")."""
    check_port(host, port)
    from hf_equiv.hub.space_files import DATASET, MODELS

    if any("," in model for model in models):
        raise ValueError(f"`models` must be names without commas; got {', '.join(models)}. Repeat the flag.")
    check_results(dataset)
    check_models(models)
    os.environ |= ({} if dataset is None else {DATASET: dataset}) | ({MODELS: ",".join(models)} if models else {})
    load_app().main(host=host, port=port, share=share)
    return 0


def check_port(host: str, port: int) -> None:
    """Refuse a port that another program has taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"`port` must be free; got {port} of {host}: {why}. Choose another.") from error


def check_results(dataset: str | None) -> None:
    """Refuse a folder without runs, and a name that neither a folder nor a dataset of the Hub can have."""
    from hf_equiv.hub.load import split_name
    from hf_equiv.runs.directory import folders_in

    if not dataset:
        return
    if not Path(dataset).is_dir():
        split_name(dataset)
    elif not folders_in(Path(dataset)):
        raise ValueError(f"`dataset` must hold runs; got {dataset!r} without any run.json. Name a run directory.")


def check_models(models: Sequence[str]) -> None:
    """Refuse checkpoints that do not exist, before the app loads the first of them for a visitor."""
    from hf_equiv.models.checkpoint import HubFiles, find_checkpoint

    for model in models:
        find_checkpoint(HubFiles(model))


def load_app() -> ModuleType:
    """Import the app of this installation, a module with `build_demo` and `main`."""
    from hf_equiv.hub.space_files import APP, app_folder

    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the app needs gradio, which is not installed. Run pip install gradio.")
    folder = app_folder()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # as in a Space, where files beside the app can be imported
    return importlib.import_module(Path(APP).stem)


@space.command("deploy")
@click.argument("repo_id", metavar="USER/NAME")
@_app_options
@visibility("Space")
@option("--hardware", "cpu-basic (free), zero-a10g, … Default: unchanged.", "H")
@option("--wheel", "Upload hf_equiv from this wheel.", "FILE", click.Path(path_type=Path, dir_okay=False))
@flag("--force", "Replace the app of a Space that holds another one.")
@flag("--dry-run", "List files, variables, visibility and hardware; write nothing.")
@click.option("--wait/--no-wait", default=True, help="Wait until the Space runs.")
@option("--timeout", "Seconds to wait.", "S", click.FloatRange(min=0), 600.0)
@output_options
def space_deploy(repo_id: str, as_json: bool, quiet: bool, **given: Any) -> int:
    """Put the app into a Space on the Hub, in one commit, and wait until it runs.

    A new Space is private unless --public is given. An existing Space gets the current app and keeps the files and
    text that its owner added. Without --wheel, hf_equiv is pinned if it was installed from a package index, else the
    installed files are uploaded. No secret is ever set: a private dataset needs a read token, which you add yourself.

    \b
    hf-equiv space deploy me/same-embedding --dry-run
    hf-equiv space deploy me/same-embedding --dataset me/matches --model facebook/deit-tiny-patch16-224 --public

    Exit code 1: deployed, but the Space does not run; the message says where the log is.
    """  # noqa: D301, DOC201 (this is the help text, and click looks for the backspace itself)
    from hf_equiv.cli import output, progress

    with progress.steps(quiet=as_json or quiet, amount=progress.sent) as tell:
        from hf_equiv.hub.space import SpaceError, deploy_space

        failed: SpaceError | None = None
        try:
            done = deploy_space(repo_id, progress=tell, **given)
        except SpaceError as error:
            failed, done = error, error.deployment
    if as_json:
        output.print_json(asdict(done) | {"error": None if failed is None else str(failed)})
    elif not quiet:
        output.print_text("deployment", done=done)
    if failed is not None:
        to_stderr(f"error: {failed}")
    return 0 if failed is None else 1
