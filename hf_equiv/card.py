"""The README.md of a run directory: a short dataset card that `datasets` and the dataset viewer understand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def run_card(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Write the card of a match run.

    Args:
        settings: of the run, as in `run.json`.
        summary: as from `metrics.summarize`.

    Returns:
        Markdown with the YAML header that declares the configuration `matches`.
    """
    ball = "the pixel box only" if settings["radius"] is None else f"{settings['norm']} ball, {settings['radius']:.6g}"
    middle = summary["median"]
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
images from `{settings["data_id"]}`; solver `{settings["solver"]}`, tolerance {settings["rtol"]:g}, within {ball}.
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
