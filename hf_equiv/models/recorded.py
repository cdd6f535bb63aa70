"""Load the encoder that the record of a run states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_equiv.models import places
from hf_equiv.models.encoder import Encoder, restated
from hf_equiv.models.wrapping import KIND


def is_local(settings: Mapping[str, Any]) -> bool:
    """Return whether a run used a checkpoint of a folder, which no record names by its path."""
    return str(settings["model_revision"]).startswith("sha256:") and settings["model_id"] not in places.BUILTINS


def load_recorded(
    settings: dict[str, Any], model: str | Encoder | None, device: str | None, cache_dir: str | None,
    local_files_only: bool,
) -> Encoder:  # fmt: skip
    """Load the model of a run at its recorded revision, with its readout and dtype."""
    dtype = getattr(torch, settings["dtype"].removeprefix("torch."), settings["dtype"])
    if isinstance(model, Encoder):  # of the user, who imported or wrapped it
        return restated(model, settings["readout"], settings["normalize"], dtype, device)
    if model is None and settings.get("attention") == KIND:
        made = settings.get("import") or f"a wrapped {settings['model_id']}"
        raise ValueError(
            f"this run used {made}, a model of Python code, which is run only if you ask for it. Read that code, then "
            "name its function with --import PACKAGE:FUNCTION, or in Python pass the encoder."
        )
    # No run records the path of a local checkpoint, so `model` may name its folder. By default it is the folder that
    # was last used on this machine, or one of that name here. The caller checks its weights.
    name, revision, local = settings["model_id"], settings["model_revision"], is_local(settings)
    place = places.recall(revision) if model is None and local else None
    if place is not None and Path(place).is_dir():
        model = place
    elif model is None and local:
        if Path(name) not in Path().iterdir() or not Path(name).is_dir():  # a stranger's run opens no other folder
            where = "is not in the current folder" if place is None else f"is no longer at {place!r}"
            told = f"this run used the local checkpoint {name!r} ({revision[:19]}…), which {where}"
            raise ValueError(f"{told}. Name it with --model PATH.")
        model = f"./{name}"
    encoder = Encoder.from_pretrained(
        model or name,
        revision=None if local or model is not None else revision,
        readout=settings["readout"],
        normalize=settings["normalize"],
        dtype=dtype,
        device=device,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if place is not None and encoder.revision != revision and model == place:
        told = f"the local checkpoint {name!r} at {place!r} has changed since the run: its weights are now"
        raise ValueError(
            f"{told} {encoder.revision[:19]}…, the run used {revision[:19]}…. Name a copy with --model PATH."
        )
    return encoder
