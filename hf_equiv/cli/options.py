"""Option types and groups of options that several commands share. Nothing heavy is imported here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

IMAGES = (
    "W is an image file, a folder, a parquet file, a Hub dataset id[:config][:split], or 'builtin'. Default split: "
    "validation, else test, else train."
)
COUNT = click.IntRange(min=1)
POSITIVE = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(min=0, max=1, min_open=True, max_open=True)


class Radius(click.ParamType[float | None]):
    """A number or a fraction such as 8/255; `none` for no ball."""

    name = "R"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Parse the option."""
        if not isinstance(value, str) or value.strip().lower() == "none":
            return None if isinstance(value, str) else value
        over, _, under = value.partition("/")
        try:
            return float(over) / float(under or 1)
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is not a number or a fraction such as 8/255.", param, ctx)


class Radii(click.ParamType[tuple[float, ...]]):
    """Numbers a,b,c, or a range a:b with four numbers a decade."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse the option."""
        try:
            if ":" not in value:
                return tuple(float(item) for item in value.split(","))
            low, high = (math.log10(float(end)) for end in value.split(":"))
            steps = max(1, round(4 * (high - low)))
            if low < high:
                return tuple(10 ** (low + (high - low) * i / steps) for i in range(steps + 1))
        except ValueError:
            pass
        self.fail(f"{value!r} is not a list of numbers a,b,c or a range a:b with a below b.", param, ctx)


def once(context: click.Context, option: click.Parameter, values: tuple[Any, ...]) -> Any:
    """Return the value of an option declared `multiple`; refuse two values, of which the last would win silently."""
    if len(set(values)) > 1 and option.secondary_opts:
        flags = " and ".join(option.opts + option.secondary_opts)
        raise click.UsageError(f"{flags} exclude each other; got both. Leave one out.")
    if len(set(values)) > 1:
        given = ", ".join(values)
        raise click.UsageError(
            f"{option.opts[0]} may be given once; got {given}. Put the images into a folder and name that."
        )
    return values[0] if values else None


def flag_note(message: str, options: Iterable[click.Parameter]) -> str:
    """Return a note on the parameters in a message whose flags have other names; empty where there are none."""
    flags = {option.name: option.opts[0] for option in options}
    names = dict.fromkeys(name for name in re.findall(r"`(\w+)", message) if flags.get(name, name).lstrip("-") != name)
    return f" ({', '.join(f'`{name}` is {flags[name]}' for name in names)}.)" if names else ""


def images_option(flag: str, text: str) -> Callable[[F], F]:
    """An option that names images."""
    return click.option(flag, metavar="W", multiple=True, callback=once, help=text)


def visibility(kind: str) -> Callable[[F], F]:
    """`--private/--public` as the keyword `private`: True, False, or None without a flag."""
    return click.option(
        "--private/--public", "private", is_flag=True, multiple=True, default=None, callback=once,
        help=f"Who sees it. Default: a new {kind} is private, an existing one is left as it is.",
    )  # fmt: skip


def group(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Join several options into one decorator."""

    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


place_options = group(
    click.option("--device", metavar="DEV", help="cpu, cuda or cuda:K. Default: cuda if there is one."),
    click.option("--cache-dir", metavar="DIR", help="Where Hub downloads are kept."),
    click.option("--local-files-only", is_flag=True, help="Use cached files only; never ask the Hub."),
)


model_options = group(
    click.option("--revision", metavar="REV", help="Commit, branch or tag of the model on the Hub."),
    click.option(
        "--readout", default="auto", metavar="NAME",
        help="Output that is the embedding: auto, cls, mean, pooler, tokens, logits, hidden:K, projection.",
    ),
    click.option("--normalize", is_flag=True, help="Divide embeddings by their L2 norm."),
    click.option(
        "--dtype", default="float32", metavar="TYPE",
        help="float32 or float64; match also takes bf16 and float16, for its early iterations only.",
    ),
    place_options,
)  # fmt: skip


output_options = group(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."),
    click.option("-q", "--quiet", is_flag=True, help="No progress, no table; one line on stderr if something failed."),
)


analysis_options = group(
    model_options,
    click.option(
        "--out", type=click.Path(path_type=Path), metavar="DIR", help="Run directory. Default: runs/VERB/MODEL/HASH8."
    ),
    click.option(
        "--overwrite", type=click.Choice(["missing", "always", "never"]), default="missing",
        help="missing: make missing rows and rows of status error; always: replace an earlier run; never: refuse "
        "to touch one.",
    ),
    click.option("--seed", type=click.IntRange(min=0), metavar="N", default=0, help="Seed of all random draws."),
    click.option(
        "--batch-size", type=COUNT, metavar="B",
        help="Pairs matched at once; on a GPU also derivatives per pass. Default: 8, on a GPU 32; halved when memory "
        "runs out.",
    ),
    click.option(
        "--streaming", is_flag=True,
        help="Fetch only the first images of the Hub dataset in --data: --limit, or 4 per pair, at least 100. Default "
        "above 5 GB.",
    ),
    click.option("--image-column", metavar="NAME", help="Image column of a parquet file or dataset."),
    click.option("--label-column", metavar="NAME", help="Class column of a parquet file or dataset."),
    click.option("--dry-run", is_flag=True, help="Show the plan and an estimate of the time; write nothing."),
    output_options,
)  # fmt: skip


source_options = group(
    images_option("--source", f"Images to analyse. {IMAGES}"),
    images_option("--data", "Set of images from which --limit images are drawn."),
    click.option("--limit", type=COUNT, metavar="N", help="Number of images to draw from --data. Default: all."),
)
