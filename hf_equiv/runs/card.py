"""Write the README.md of a run directory: a short dataset card that `datasets` and the dataset viewer understand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_equiv.formatting import form, fraction, printable, text_templates
from hf_equiv.runs.directory import check_command
from hf_equiv.runs.schema import MATCH, Layout

_OPTIONS = "solver k directions radii regional linearity heading step num_steps rtol radius norm max_evals stop".split()
_OPTIONS += ["through"]
NO_PHOTOS = "\nThe photos are withheld: image columns are empty.\n"
_ESCAPES = str.maketrans({"|": "&#124;", "<": "&lt;", ">": "&gt;", "`": "&#96;"})
_BLOCK = re.compile(r"^(\d*)(?=[#\[]|~~~|[-+*.)]\s|[-+*=_.)](?:\s*[-*=_])*$)")  # what makes a line begin a block


def escape(value: Any) -> Any:
    """Escape a value for Markdown: it cannot end a line, a table cell or a code span, or begin a tag, link or block."""
    if hasattr(value, "__html__"):
        return value
    text = printable(value).lstrip().translate(_ESCAPES).replace("](", "]&#40;")
    return _BLOCK.sub(r"\1\\", text.replace("://", ":&#47;/").replace("www.", "www&#46;"))


def code(text: str) -> str:
    """Return a line of a code block, which ends neither the block nor the generated part."""
    return printable(text).replace("```", "`` `").replace("<!--", "<!- -")


_TEMPLATES = text_templates(autoescape=False, finalize=escape)  # escapes every value but the result of `tojson`
_TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False}


def run_card(
    layout: Layout,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
    figures: Sequence[str],
    command: str | None = None,
) -> str:
    """Return the card of a run from its settings and summary; `figures` are names of files inside `figures/`."""
    return _TEMPLATES.get_template("run_card.md.jinja").render(
        model_id=printable(settings["model_id"]),
        layout=layout,
        settings=settings,
        summary=summary,
        figures=figures,
        numbers=match_numbers(summary) if layout is MATCH else [],
        options=_options(settings),
        command=command,
        check=check_command(".", settings),
        code=code,
    )


def match_numbers(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table of a match run's card: names and numbers as text."""
    median, baseline = summary["median"], summary["baseline"]
    unrelated = "distance of source and target" if summary["pairs"] == 1 else "median distance of unrelated images"
    return [
        ("pairs", str(summary["pairs"])),
        ("converged", str(summary["counts"].get("converged", 0))),
        ("median embedding error, float image", form(median["embedding_error"], ".2e")),
        ("median embedding error, 8-bit PNG read back", form(median["embedding_error_8bit"], ".2e")),
        ("median PSNR to the source [dB]", form(median["psnr_db"], ".2f")),
        ("share classified as the target", form(summary["same_top1"], ".3f")),
        ("evaluations (forward + backward), median", form(median["num_evals"], ".0f")),
        ("evaluations of the 8-bit refinement, median", form(median["num_evals_refine"], ".0f")),
        (unrelated, form(baseline["distance"]["median"] if baseline else None, ".3g")),
    ] + [
        (f"median embedding error after {one['transformation']}", form(one["error"], ".2e"))
        for one in summary.get("through", ())
    ]


def _options(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the options of a run that are in force, as text."""
    bounded = settings.get("radius") is not None or settings.get("regional") is not None
    return [
        (key.replace("_", " "), _option(settings[key]))
        for key in _OPTIONS
        if settings.get(key) not in (None, False) and (key != "norm" or bounded)
    ]


def _option(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}:{n}" for k, n in value.items())
    if isinstance(value, list) and value:
        if isinstance(value[0], str):
            return ", ".join(value)
        return f"{value[0]:g} to {value[-1]:g} ({len(value)})"
    return fraction(value, ".6g") if isinstance(value, float) else str(value)
