"""The checkpoint that a run directory was made with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_equiv.shards import Row

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder


def load_recorded(
    settings: Row, model: str | None, device: str | None, cache_dir: str | None, local_files_only: bool
) -> Encoder:
    """Load the model of a run at its recorded revision, with its readout and dtype.

    Args:
        settings: of the run, as in `run.json`.
        model: where the checkpoint is, if the recorded name does not find it (a local folder's path is not recorded).
        device: where to compute; by default CUDA if there is one.
        cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.

    Returns:
        The encoder; whether a named `model` is the recorded one is for the caller to check.

    Raises:
        ValueError: the run used a local checkpoint that is not in the current folder.
    """
    from hf_equiv.encoder import Encoder

    name, revision = settings["model_id"], settings["model_revision"]
    local = str(revision).startswith("sha256:") and name != "builtin"
    if model is None and local:
        if not Path(name).is_dir():
            raise ValueError(
                f"this run used the local checkpoint {name!r} ({revision[:19]}…), which is not in the current folder. "
                "Name it with --model PATH."
            )
        model = f"./{name}"
    return Encoder.from_pretrained(
        model or name,
        revision=None if local or name == "builtin" or model is not None else revision,
        readout=settings["readout"],
        normalize=settings["normalize"],
        dtype=getattr(torch, settings["dtype"].removeprefix("torch.")),
        device=device,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
