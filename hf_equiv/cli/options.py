"""Types and groups of options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

F = TypeVar("F", bound=Callable[..., Any])


IMAGES = (
    "W is an image file, a folder, a parquet file, a Hub dataset id[:config][:split], or 'builtin'. Split by default: "
    "validation, else test, else train."
)


class Radius(click.ParamType[float | None]):
    """A number or a fraction such as 8/255; `none` for no ball."""

    name = "R"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Parse the option."""
        if not isinstance(value, str):
            return None if value is None else float(value)
        if value.strip().lower() == "none":
            return None
        over, _, under = value.partition("/")
        try:
            return float(over) / float(under) if under else float(over)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"`radius` must be a number or a fraction such as 8/255; got {value!r}.") from None


class Radii(click.ParamType[tuple[float, ...] | None]):
    """Numbers a,b,c, or a range a:b with four a decade."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...] | None:
        """Parse the option."""
        if not isinstance(value, str):
            return None if value is None else tuple(value)
        try:
            low, colon, high = value.partition(":")
            if not colon:
                return tuple(float(item) for item in value.split(","))
            ends = math.log10(float(low)), math.log10(float(high))
            if not ends[0] < ends[1]:
                raise ValueError
            steps = max(1, round(4 * (ends[1] - ends[0])))
            return tuple(10 ** (ends[0] + (ends[1] - ends[0]) * i / steps) for i in range(steps + 1))
        except ValueError:
            raise ValueError(f"`radii` must be numbers a,b,c or a range a:b with a below b; got {value!r}.") from None


def once(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str | None:
    """Refuse an option that is given twice."""
    if len(values) > 1:
        raise click.UsageError(
            f"{option.opts[0]} may be given once; got {', '.join(values)}. Put the images into a folder and name that."
        )
    return values[0] if values else None


def visibility(what: str) -> Callable[[F], F]:
    """`--private` and `--public` as the keyword `private`: True, False, or None without a flag; both are refused."""

    def apply(command: F) -> F:
        @click.option("--private", "hide", is_flag=True, help=f"Not visible to others. Default of a new {what}.")
        @click.option("--public", "show", is_flag=True, help="Visible to everybody. Default: unchanged.")
        @wraps(command)
        def asked(*arguments: Any, hide: bool, show: bool, **given: Any) -> Any:
            if hide and show:
                raise click.UsageError("--private and --public exclude each other; got both. Leave one out.")
            return command(*arguments, private=hide if hide or show else None, **given)

        return cast("F", asked)

    return apply


def group(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator."""

    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


model_options = group(
    click.option("--revision", metavar="REV", help="Commit, branch or tag of the model on the Hub."),
    click.option(
        "--readout", default="auto", show_default=True, metavar="NAME",
        help="Which output is the embedding: auto, cls, mean, pooler, tokens, logits, hidden:K, projection.",
    ),
    click.option("--normalize", is_flag=True, help="Divide embeddings by their L2 norm."),
    click.option("--device", metavar="DEV", help="cpu, cuda or cuda:K. Default: cuda if there is one."),
    click.option("--dtype", default="float32", show_default=True, metavar="TYPE",
                 help="float32 or float64; match also takes bf16 and float16, for its early iterations only."),
    click.option("--cache-dir", metavar="DIR", help="Where Hub downloads are kept."),
    click.option("--local-files-only", is_flag=True, help="Never ask the Hub; use what is in the cache."),
)  # fmt: skip


run_options = group(
    click.option(
        "--out", type=click.Path(path_type=Path), metavar="DIR", help="Run directory. Default: runs/VERB/MODEL/HASH8."
    ),
    click.option(
        "--overwrite", type=click.Choice(["missing", "always", "never"]), default="missing", show_default=True,
        help="Make what is not there, and rows of status error again; replace an earlier run; or refuse to touch one.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of every random draw."),
    click.option(
        "--batch-size", type=int, metavar="B",
        help="Pairs matched at once; on a GPU also derivatives per pass. Default: 8, on a GPU 32; halved when memory "
        "runs out.",
    ),
    click.option(
        "--streaming", is_flag=True,
        help="Fetch only the first images of the Hub dataset in --data: --limit, or 4 a pair, at least 100. Done "
        "unasked above 5 GB.",
    ),
    click.option("--image-column", metavar="NAME", help="Image column of a parquet file or dataset."),
    click.option("--label-column", metavar="NAME", help="Class column of a parquet file or dataset."),
    click.option("--dry-run", is_flag=True, help="Say what would be done and how long it takes; write nothing."),
)  # fmt: skip


output_options = group(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."),
    click.option("-q", "--quiet", is_flag=True, help="No progress, no table; one line on stderr if something failed."),
)


source_options = group(
    click.option("--source", metavar="W", multiple=True, callback=once, help=f"Images to analyse. {IMAGES}"),
    click.option("--data", metavar="W", multiple=True, callback=once, help="A set to draw --limit images from."),
    click.option("--limit", type=int, metavar="N", help="How many images to draw from --data. Default: all."),
)
