"""Load the encoder that the record of a run states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_equiv.formatting import JOINED
from hf_equiv.models import places
from hf_equiv.models.encoder import Encoder, restated
from hf_equiv.models.joint import JointEncoder, each
from hf_equiv.models.wrapping import KIND


def each_model(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of a run for each of its models, of which there is one or, joined, several."""
    count = len(str(settings["model_revision"]).split(JOINED))
    names = [name for name in ("model_id", "model_revision", "readout", "attention") if count > 1 and name in settings]
    texts = [each(name, str(settings[name]), count) for name in names]
    return [dict(settings) | dict(zip(names, own, strict=True)) for own in zip(*texts, strict=True)] or [dict(settings)]


def is_local(settings: Mapping[str, Any]) -> bool:
    """Return whether a run used a checkpoint of a folder, which no record names by its path."""
    return any(
        str(own["model_revision"]).startswith("sha256:") and own["model_id"] not in places.BUILTINS
        for own in each_model(settings)
    )


def load_recorded(
    settings: dict[str, Any], model: str | Encoder | None, device: str | None, cache_dir: str | None,
    local_files_only: bool,
) -> Encoder:  # fmt: skip
    """Load the model of a run, or its models, at the recorded revision, with the readout and dtype."""
    if len(several := each_model(settings)) == 1:
        return _load_one(settings, model, device, cache_dir, local_files_only)
    given: Sequence[str | Encoder | None] = [None] * len(several)
    if isinstance(model, JointEncoder):
        given = model.parts
    elif isinstance(model, str):
        given = each("model", model, len(several), alike=False)
    elif model is not None:
        raise ValueError(f"`model` must be a JointEncoder of {len(several)} models; got {model!r}. Leave it out.")
    place = device, cache_dir, local_files_only
    return JointEncoder([_load_one(own, one, *place) for own, one in zip(several, given, strict=True)])


def _load_one(
    settings: dict[str, Any], model: str | Encoder | None, device: str | None, cache_dir: str | None,
    local_files_only: bool,
) -> Encoder:  # fmt: skip
    if isinstance(model, JointEncoder):
        raise ValueError(f"`model` must be one model, as in the run; got {model!r}. Leave it out.")
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
