"""Option types and groups of options that several commands share. Nothing heavy is imported here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from hf_equiv.formatting import JOINED, read_fraction

F = TypeVar("F", bound=Callable[..., Any])

IMAGES = (
    "an image file, a folder, a parquet file, a Hub dataset id[:config][:split] (by default its validation split, else "
    "test, else train), or 'builtin'."
)
COUNT = click.IntRange(min=1)
POSITIVE = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(min=0, max=1, min_open=True, max_open=True)


def radius(text: str) -> float | None:
    """Parse a number or a fraction such as 8/255; `none` means no ball."""
    if text.strip().lower() == "none":
        return None
    try:
        return read_fraction(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number or a fraction such as 8/255.") from None


def radii(text: str) -> tuple[float, ...]:
    """Parse numbers a,b,c, or a range a:b with four numbers a decade."""
    try:
        if ":" not in text:
            return tuple(float(item) for item in text.split(","))
        low, high = (math.log10(float(end)) for end in text.split(":"))
        steps = max(1, round(4 * (high - low)))
        if low < high:
            return tuple(10 ** (low + (high - low) * i / steps) for i in range(steps + 1))
    except ValueError:
        pass
    raise click.BadParameter(f"{text!r} is not a list of numbers a,b,c or a range a:b with a below b.")


def names(text: str) -> tuple[str, ...]:
    """Parse names a,b,c."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def once(context: click.Context, option: click.Parameter, values: tuple[Any, ...]) -> Any:
    """Return the value of an option declared `multiple`; refuse two values instead of silently taking the last."""
    if len(set(values)) > 1 and option.secondary_opts:
        flags = " and ".join(option.opts + option.secondary_opts)
        raise click.UsageError(f"{flags} exclude each other; got both. Leave one out.")
    if len(set(values)) > 1:
        told = f"{option.opts[0]} may be given once; got {', '.join(values)}."
        raise click.UsageError(f"{told} Put the images into a folder and name that.")
    return values[0] if values else None


def with_flags(message: str, options: Iterable[click.Parameter]) -> str:
    """Put flags in place of the parameters that a message of the library names: `rtol`, `license='mit'`."""
    flags = {str(option.name).rstrip("_"): option.opts[0] for option in options if isinstance(option, click.Option)}

    def typed(found: re.Match[str]) -> str:
        name, value = found[1], (found[2] or "").strip("'")
        return found[0] if name not in flags else f"{flags[name]} {value.removeprefix('True')}".rstrip()

    return re.sub(r"`(\w+)(?:=([^`]*))?`", typed, message)


def option(
    name: str, text: str, metavar: str | None = None, type: Any = None, default: Any = None, **more: Any
) -> Callable[[F], F]:
    """Return an option with a value, as a decorator."""
    return click.option(name, help=text, metavar=metavar, type=type, default=default, **more)


def flag(name: str, text: str) -> Callable[[F], F]:
    """Return an option without a value, as a decorator."""
    return click.option(name, is_flag=True, help=text)


def images_option(name: str, text: str) -> Callable[[F], F]:
    """Return an option that names images."""
    return option(name, text, "W", multiple=True, callback=once)


def joined(_context: click.Context, _argument: click.Parameter, names: tuple[str, ...]) -> str:
    """Join the names of models; refuse files, which a shell puts in place of *.png after a flag."""
    if any(Path(name).is_file() for name in names[1:]):
        raise click.UsageError(f"Got unexpected extra arguments ({' '.join(names[1:])})")
    return JOINED.join(names)


models_argument = click.argument("model", metavar="MODEL...", nargs=-1, required=True, callback=joined)


def helped(**texts: str) -> Callable[[click.Command], click.Command]:
    """Replace the help of shared options, given by their names, for one command."""

    def apply(command: click.Command) -> click.Command:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                parameter.help = texts.get(parameter.name or "", parameter.help)
        return command

    return apply


def visibility(kind: str) -> Callable[[F], F]:
    """Return `--private/--public` as the keyword `private`: True, False, or None without a flag."""
    text = f"Who sees it. Default: a new {kind} is private, an existing one is left as it is."
    return click.option(
        "--private/--public", "private", is_flag=True, multiple=True, default=None, callback=once, help=text
    )


def group(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Join several options into one decorator."""

    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


place_options = group(
    option("--device", "cpu, cuda or cuda:K. Default: cuda if there is one.", "DEV"),
    option("--cache-dir", "Folder of Hub downloads.", "DIR"),
    flag("--local-files-only", "Use cached files only; never ask the Hub."),
)
import_option = click.option(
    "--import", "import_", metavar="PACKAGE:FUNCTION",
    help="Run this function of yours, and take the Encoder or torch module that it returns; MODEL is its name.",
)  # fmt: skip
model_options = group(
    import_option,
    option("--revision", "Commit, branch or tag of the model on the Hub.", "REV"),
    option("--readout", "auto, cls, mean, pooler, tokens, logits, hidden:K or projection.", "NAME", default="auto"),
    flag("--normalize", "Divide embeddings by their L2 norm."),
    option("--dtype", "float32 or float64; bf16 or float16 for early iterations only.", "TYPE", default="float32"),
    place_options,
)
output_options = group(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."),
    click.option("-q", "--quiet", is_flag=True, help="No progress, no table; one line on stderr if something failed."),
)
run_options = group(
    option(
        "--overwrite",
        "missing: make missing rows and rows of status error; always: replace an earlier run; never: refuse one.",
        type=click.Choice(["missing", "always", "never"]),
        default="missing",
    ),
    option("--seed", "Seed of all random draws.", "N", click.IntRange(min=0), 0),
    option("--batch-size", "Pairs in one pass. Default: 8, on a GPU 32.", "B", COUNT),
    flag("--streaming", "Fetch only the first images of the Hub dataset in --data. Default above 5 GB."),
    option("--image-column", "Image column of a parquet file or dataset.", "NAME"),
    option("--label-column", "Class column of a parquet file or dataset.", "NAME"),
    flag("--dry-run", "Show the plan and an estimate of the time; write nothing."),
    output_options,
)
analysis_options = group(
    model_options,
    option("--out", "Run directory. Default: runs/VERB/MODEL/HASH8.", "DIR", click.Path(path_type=Path)),
    run_options,
)
source_options = group(
    images_option("--source", f"Images to analyse: {IMAGES}"),
    images_option("--data", "Set of images, W as above, from which --limit images are drawn."),
    option("--limit", "Number of images to draw from --data. Default: all.", "N", COUNT),
)
