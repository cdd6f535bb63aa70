"""The README.md of a run directory: a short dataset card that `datasets` and the dataset viewer understand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hf_equiv.runs.schema import Layout
from typing import Any

_ANALYSES = {
    "spectrum": (
        "Jacobian spectra",
        "Each row holds an image and the singular values of J = ∂f/∂x at it, in embedding length per pixel length with "
        "pixels in [0, 1]; an error bound for each value; the rank with its threshold; and the zeros that the "
        "architecture causes, by name.",
    ),
    "lipschitz": (
        "Directional Lipschitz constants",
        "Each row holds an image and one direction in pixel space: the local constant `value` read from a ladder of "
        "central secants (null unless it stands above the float noise), the exact `jvp` beside it, and the ladder with "
        "its noise floor. `regional_*`, `num_evals` and `seconds` are of the image.",
    ),
    "walk": (
        "Level-set walks",
        "Each row holds one point of a walk through images that share an embedding: `frame` as 8-bit PNG, the drift "
        "‖f(x)−z‖/‖z‖ of the float frame (`float/*.safetensors`), that of the PNG (`drift_8bit`), and distances, label "
        "and probability of the float frame. `num_evals` and `seconds` are of the whole walk.",
    ),
}


def one_line(text: str) -> str:
    """A name on one line: line breaks and other control characters in a file's name would begin lines of a card."""
    return "".join(c if c.isprintable() else " " for c in text)


def analysis_card(
    layout: Layout, settings: Mapping[str, Any], summary: Mapping[str, Any], figures: Sequence[str]
) -> str:
    """Write the card of a spectrum, lipschitz or walk run.

    Args:
        layout: of its rows.
        settings: of the run, as in `run.json`.
        summary: as from `summarize_analysis`.
        figures: file names inside `figures/`.

    Returns:
        Markdown with the YAML header that declares the configuration.
    """
    title, told = _ANALYSES[layout.analysis]
    own = ("k", "directions", "radii", "regional", "linearity", "heading", "step", "num_steps", "rtol", "stop")
    options = ", ".join(
        f"{key.replace('_', ' ')} {_option(settings[key])}" for key in own if settings.get(key) not in (None, False)
    )
    data = one_line(settings["data_id"])
    pictures = "\n\n".join(f"![{name.split('.')[0]}](figures/{name})" for name in figures)
    counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items())
    return f"""---
pretty_name: {title} of {settings["model_id"]}
task_categories:
- image-classification
tags:
- hf_equiv
- {layout.analysis}
configs:
- config_name: {layout.folder}
  default: true
  data_files:
  - split: train
    path: {layout.folder}/*.parquet
---

# {title} of `{settings["model_id"]}`

{told}

{summary["verdict"]}

{pictures}

{summary["rows"]} rows of {summary["images"]} images ({counts}). Model `{settings["model_id"]}` at
`{settings["model_revision"]}`, readout `{settings["readout"]}`, {settings["dtype"]}; images from
`{data}`{"; " + options if options else ""}. `run.json` holds the settings and the SHA-256 of every file.

```python
from datasets import load_dataset

rows = load_dataset("PATH_OR_NAME_OF_THIS_DATASET", "{layout.folder}", split="train")
```

Recompute every row with `hf-equiv verify DIR`.
"""


def _option(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}:{n}" for k, n in value.items())
    return f"{value[0]:g} to {value[-1]:g} ({len(value)})" if isinstance(value, list) else str(value)


def run_card(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Write the card of a match run.

    Args:
        settings: of the run, as in `run.json`.
        summary: as from `metrics.summarize`.

    Returns:
        Markdown with the YAML header that declares the configuration `matches`.
    """
    ball = "the pixel box only" if settings["radius"] is None else f"{settings['norm']} ball, {settings['radius']:.6g}"
    middle, data = summary["median"], one_line(settings["data_id"])
    lines = [
        ("pairs", summary["pairs"]),
        ("converged", summary["counts"].get("converged", 0)),
        ("median embedding error, float image", _number(middle["embedding_error"], ".2e")),
        ("median embedding error, 8-bit PNG read back", _number(middle["embedding_error_8bit"], ".2e")),
        ("median PSNR to the source [dB]", _number(middle["psnr_db"], ".2f")),
        ("share classified as the target", _number(summary["same_top1"], ".3f")),
        ("evaluations (forward + backward), median", _number(middle["num_evals"], ".0f")),
        ("evaluations of the 8-bit refinement, median", _number(middle["num_evals_refine"], ".0f")),
        (_unrelated_name(summary), _number(_unrelated(summary), ".3g")),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in lines)
    return f"""---
pretty_name: Embedding matches of {settings["model_id"]}
task_categories:
- image-classification
tags:
- hf_equiv
- embedding-matching
configs:
- config_name: matches
  default: true
  data_files:
  - split: train
    path: matches/*.parquet
---

# Embedding matches of `{settings["model_id"]}`

Each row holds a source image, a target image, and a match: an image made from the source whose embedding is the
target's.

{summary["verdict"]}

![pairs](figures/pairs.png)

| | |
| --- | --- |
{table}

Model `{settings["model_id"]}` at `{settings["model_revision"]}`, readout `{settings["readout"]}`, {settings["dtype"]};
images from `{data}`; solver `{settings["solver"]}`, tolerance {settings["rtol"]:g}, within {ball}.
Embedding error is ‖f(x)−z‖/‖z‖. `embedding_error` is the float image's (`float/*.safetensors`); every other measure is
of the stored PNG, read back. `num_evals` counts the float match; `seconds` is the whole row, refinement included.
`run.json` holds the settings and the SHA-256 of every file.

```python
from datasets import load_dataset

rows = load_dataset("PATH_OR_NAME_OF_THIS_DATASET", "matches", split="train")
```

Recompute every row from its images with `hf-equiv verify DIR`.
"""


def _unrelated_name(summary: Mapping[str, Any]) -> str:
    return "distance of source and target" if summary["pairs"] == 1 else "median distance of unrelated images"


def _unrelated(summary: Mapping[str, Any]) -> float | None:
    return summary["baseline"]["distance"]["median"] if summary["baseline"] else None


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
