"""This machine and its checkpoints: versions, devices, processes, and the facts of `hf-equiv env`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

PACKAGES = (
    "hf_equiv", "torch", "transformers", "accelerate", "datasets", "huggingface_hub", "safetensors", "torchmetrics",
    "numpy", "Pillow", "matplotlib", "torchvision", "gradio",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages in use; None for a missing one."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device() -> dict[str, Any]:
    """Return the devices that PyTorch finds here."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"default": "cuda" if gpus else "cpu", "gpus": gpus, "cpu_threads": torch.get_num_threads()}


def describe(encoder: Encoder) -> dict[str, Any]:
    """Return the facts of a checkpoint as a map from pixels to embeddings."""
    try:
        works, why = bool(encoder.jvp_probe()), None
    except (RuntimeError, ValueError, NotImplementedError) as error:
        works, why = False, " ".join(str(error).split())
    names = encoder.label_names if encoder.has_head else None
    return {
        "model_id": encoder.provenance["model_id"],
        "revision": encoder.revision,
        "readout": encoder.readout,
        "readouts": list(encoder.readouts),
        "D": encoder.embedding_dim,
        "N": math.prod(encoder.input_shape),
        "input_shape": list(encoder.input_shape),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "attention": encoder.provenance["attention"],
        "head": None if names is None else {"classes": len(names), "first": list(names[:3])},
        "processor": encoder.provenance["processor"],
        "jvp": works,
        "jvp_error": why,
    }


def load_encoder(model: str, *, dtype: str, device: str | None, **options: Any) -> Encoder:
    """Load the encoder that the model options name."""
    import torch

    from hf_equiv.models.encoder import Encoder

    dtypes = {"float32": torch.float32, "float64": torch.float64}
    if dtype not in dtypes:
        raise ValueError(f"`dtype` must be one of {', '.join(dtypes)}; got {dtype!r}.")
    return Encoder.from_pretrained(model, dtype=dtypes[dtype], device=own_device(device), **options)


def own_device(device: str | None) -> str | None:
    """Return the GPU of this process, where a launcher has started several; otherwise `device`."""
    import torch

    rank = os.environ.get("LOCAL_RANK", "")
    if device not in (None, "cuda") or not rank.isdecimal() or not torch.cuda.is_available():
        return device
    return f"cuda:{rank}"


def is_first() -> bool:
    """Return whether this process is the first of a launcher, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def calm(*, quiet: bool) -> None:
    """Silence warnings of libraries, and their progress bars where they would not be seen on a terminal."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if quiet or not sys.stderr.isatty():
        for module, switch in (
            ("huggingface_hub.utils", "disable_progress_bars"),
            ("datasets", "disable_progress_bars"),
            ("transformers.utils.logging", "disable_progress_bar"),
        ):
            with contextlib.suppress(ImportError, AttributeError):
                getattr(__import__(module, fromlist=[switch]), switch)()
