"""The command line: its commands, exit codes and errors. Commands import heavy modules, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from hf_equiv.cli import environment
from hf_equiv.cli.analyses import lipschitz, match, spectrum, walk
from hf_equiv.cli.audit import audit
from hf_equiv.cli.options import helped, model_options, output_options, with_flags
from hf_equiv.cli.results import publish, report, verify
from hf_equiv.cli.space import space
from hf_equiv.cli.streams import open_streams, to_stderr

_SHARED = ("match", "spectrum", "lipschitz", "walk", "audit")
"""Commands whose work several processes share; all others run in the first process only."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.version_option(package_name="hf-equiv", prog_name="hf-equiv")
@click.pass_context
def cli(context: click.Context) -> None:
    """Find images that share an embedding, for any vision checkpoint, and verify the results.

    \b
    hf-equiv match builtin                          cat -> coffee with the built-in model
    hf-equiv audit MODEL --data photos/             is that model exposed? all runs and one page
    hf-equiv match facebook/deit-tiny-patch16-224 --source dog.jpg --target car.jpg
    hf-equiv verify runs/match/builtin/1a2b3c4d     recompute every row from its PNG files
    hf-equiv publish runs/match/builtin/1a2b3c4d me/matches    to the Hub, as a private dataset
    hf-equiv report runs                            one page: the paper's claims, with intervals and controls
    hf-equiv space run                              try it in a browser, on this machine

    MODEL is a Hub id, a folder or 'builtin'. Without images, builtin takes the built-in photos; for every other MODEL,
    name yours with --data. A run directory is a dataset; the same command continues a stopped run.

    Exit codes: 0 done; 1 some row did not converge or complete, or a check did not hold; 2 bad input; 130 stopped by
    Ctrl-C; run the same command to continue.
    """  # noqa: D301 (click looks for the backspace itself)
    if context.invoked_subcommand not in _SHARED and not environment.is_first():
        context.exit()


@helped(dtype="float32 or float64.")
@cli.command()
@click.argument("model", required=False)
@model_options
@output_options
def env(model: str | None, as_json: bool, quiet: bool, **given: Any) -> int:
    """Show versions and, for a MODEL, its embedding size, readouts, processor and head."""
    from hf_equiv.cli import output

    with environment.calm(quiet=as_json or quiet):
        facts = environment.machine()
        if model is not None:
            facts["model"] = environment.describe(environment.load_encoder(model, **given))
    if as_json:
        output.print_json(facts)
    elif not quiet:
        output.print_text("facts", facts=facts)
    return 0


for command in (audit, match, spectrum, lipschitz, walk, verify, publish, report, space):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 not all held, 2 bad input, 130 interrupted."""
    environment.prepare_threads()
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    open_streams()
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        return int(cli.main(typed, prog_name="hf-equiv", standalone_mode=False, obj=typed) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)  # the help text of a command
        return 2
    except click.ClickException as error:
        message = error.format_message()
        if isinstance(error, click.NoSuchOption) and error.ctx is not None:
            message = _hint(error, error.ctx)
        if "extra argument" in message:  # usually a pattern that the shell has expanded
            message += ". A flag takes one name: for several images, name the folder."
        return _fail(message)
    except (KeyboardInterrupt, click.Abort) as error:  # click turns the first into the second
        to_stderr(str(error) or str(error.__cause__ or error.__context__ or "") or "interrupted.")
        return 130
    except Exception as error:
        if os.environ.get("HF_EQUIV_DEBUG", "0") not in ("", "0"):
            raise
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if _lacks_memory(error):
            message = f"memory ran out ({message}). Close other programs, take a smaller model, or pass --batch-size 1."
        elif not isinstance(error, (ValueError, TypeError, ImportError, OSError)):
            message = f"{type(error).__name__}: {message} (HF_EQUIV_DEBUG=1 shows where)"
        command: Any = cli
        for word in typed:
            command = getattr(command, "commands", {}).get(word, command)
        return _fail(with_flags(message, command.params))


def _hint(error: click.NoSuchOption, context: click.Context) -> str:
    """Name the flags that click finds similar to an unknown one, or else the commands that have it."""
    told, typed = error.format_message(), error.option_name
    if other := [name for name, one in cli.commands.items() if any(typed in option.opts for option in one.params)]:
        told = f"No such option {typed!r}. It is an option of {', '.join(other)}."
    return f"{told} See {context.command_path} --help."


def _lacks_memory(error: Exception) -> bool:
    """Return whether memory ran out, in Python, in a library that could not be loaded, or in a tensor."""
    told = str(error).lower()
    signs = ("can't allocate memory", "cannot allocate memory", "out of memory", "failed to map segment")
    return isinstance(error, MemoryError) or any(sign in told for sign in signs)


def _fail(message: str) -> int:
    """Print an error on one line, or on several if it lists items."""
    head, *items = (" ".join(item.split()) for item in message.split("\n- "))
    for line in (f"error: {head}", *(f"- {item}" for item in items)):
        to_stderr(line)
    return 2
