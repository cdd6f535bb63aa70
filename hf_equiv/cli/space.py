"""`hf-equiv space run` and `hf-equiv space deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_equiv.cli.options import output_options, visibility


@click.group()
def space() -> None:
    """Serve the app that shows all this in a browser, here or as a Space on the Hub."""


_DATASET = click.option(
    "--dataset", metavar="USER/NAME[@REV]", help="Published matches to show; in a Space, '' shows none."
)


_MODELS = click.option(
    "--model", "models", metavar="M", multiple=True,
    help="Checkpoint that may be chosen beside the built-in one; repeat for more.",
)  # fmt: skip


@space.command("run")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=int, default=7860, show_default=True, help="Port to listen at.")
@_DATASET
@_MODELS
@click.option("--share", is_flag=True, help="Also through a public link of Gradio's, for 72 hours at most.")
def space_run(**given: Any) -> int:
    """Serve the app on this machine until Ctrl-C; it needs pip install "hf_equiv[space]"."""
    from hf_equiv.cli import space_command

    return space_command.run(**given)


@space.command("deploy")
@click.argument("repo_id", metavar="USER/NAME")
@_DATASET
@_MODELS
@visibility("Space")
@click.option("--hardware", metavar="H", help="cpu-basic (free), zero-a10g, … Default: that of the Space.")
@click.option(
    "--wheel", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Bring hf_equiv along from this wheel. Default: pinned if it was installed from a package index, else the "
    "files installed here.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Deploy into a Space that holds another app, too.")
@click.option("--dry-run", is_flag=True, help="List files, variables, visibility and hardware; write nothing.")
@click.option("--wait/--no-wait", default=True, help="Whether to wait until the Space runs. Default: wait.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait.")
@output_options
def space_deploy(repo_id: str, **given: Any) -> int:
    """Put the app into a Space on the Hub, in one commit, and wait until it runs.

    Private unless --public is given. Of a Space that is there the app is brought up to date; files and text that its
    owner added stay. No secret is ever set: a private dataset needs a read token, which you add yourself.

    \b
    hf-equiv space deploy me/same-embedding --dry-run
    hf-equiv space deploy me/same-embedding --dataset me/matches --model facebook/deit-tiny-patch16-224 --public

    Exit code 1: deployed, but the Space does not run; the message says where the log is.
    """  # noqa: D301, DOC201
    from hf_equiv.cli import space_command

    return space_command.deploy(repo_id, **given)
