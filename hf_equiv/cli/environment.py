"""Describe this machine and its checkpoints: versions, devices, processes, and the facts of `hf-equiv env`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_equiv.formatting import JOINED, excerpt, many, printable

if TYPE_CHECKING:
    import torch

    from hf_equiv.models.encoder import Encoder

PACKAGES = (
    "hf_equiv", "torch", "transformers", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy",
    "scikit-image", "Pillow", "matplotlib", "torchvision", "gradio",
)  # fmt: skip


def machine() -> dict[str, dict[str, Any]]:
    """Return the versions of Python and of the packages, None for a missing one, and the devices that PyTorch finds."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = {"default": "cuda" if gpus else "cpu", "gpus": gpus, "cpu_threads": torch.get_num_threads()}
    return {"versions": versions, "device": device}


def describe(encoder: Encoder) -> dict[str, Any]:
    """Return the facts of a checkpoint as a map from pixels to embeddings."""
    why = None
    try:
        encoder.jvp_probe()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = " ".join(str(error).split())
    record, names = encoder.provenance, encoder.label_names
    return {
        "model_id": record["model_id"],
        "revision": encoder.revision,
        "readout": encoder.readout,
        "readouts": list(encoder.readouts),
        "D": encoder.embedding_dim,
        "N": math.prod(encoder.input_shape),
        "input_shape": list(encoder.input_shape),
        "dtype": record["dtype"],
        "attention": record["attention"],
        "head": None if names is None else {"classes": len(names), "first": list(names[:3])},
        "processor": record["processor"],
        "jvp": why is None,
        "jvp_error": why,
    }


def load_encoder(model: str, *, dtype: str, device: str | None, import_: str | None = None, **options: Any) -> Encoder:
    """Load the encoder that the model options name, or several joined; under a launcher, on this process's GPU."""
    import torch

    from hf_equiv.analyses.config import DTYPES
    from hf_equiv.checks import check_choice
    from hf_equiv.models.encoder import Encoder, restated
    from hf_equiv.models.joint import JointEncoder
    from hf_equiv.models.places import BUILTINS

    check_choice(dtype, "dtype", DTYPES)
    rank = os.environ.get("LOCAL_RANK", "")
    if device in (None, "cuda") and rank.isdecimal() and torch.cuda.is_available():
        device = f"cuda:{rank}"
    if len(names := model.split(JOINED)) > 1:
        if import_ is not None:
            raise ValueError(f"`import` must come with one MODEL; got {len(names)}. Join encoders in Python instead.")
        return JointEncoder.from_pretrained(names, dtype=DTYPES[dtype], device=device, **options)
    if import_ is None:
        return Encoder.from_pretrained(model, dtype=DTYPES[dtype], device=device, **options)
    if options["revision"] is not None or model in BUILTINS:
        name, got = ("revision", options["revision"]) if options["revision"] else ("model", model)
        raise ValueError(f"`{name}` must not be {got!r} with an imported model. Leave out --import, or correct it.")
    made = import_encoder(import_)
    return restated(made, options["readout"], options["normalize"] or made.normalize, DTYPES[dtype], device, model)


def import_encoder(where: str) -> Encoder:
    """Run a function of the user, `package:function`, and return the encoder that it makes."""
    import torch

    from hf_equiv.models.encoder import Encoder
    from hf_equiv.models.wrapping import KIND

    package, _, function = where.partition(":")
    if (here := os.getcwd()) not in sys.path:  # last, so that a file here replaces no installed package
        sys.path.append(here)
    try:
        make = getattr(import_module(package), function)
    except (ImportError, AttributeError, ValueError) as error:
        told = f"`import` must be PACKAGE:FUNCTION that Python can import; got {where!r} ({excerpt(error)})"
        raise ValueError(f"{told}. Run the command in the folder of its file, or install its package.") from error
    made = make()
    if isinstance(made, torch.nn.Module):
        made = Encoder.wrap(made, device="cpu")
    if not isinstance(made, Encoder) or made.provenance["attention"] != KIND:
        told = f"`import` must name a function that returns Encoder.wrap(…) or a torch module; {where!r} returns"
        raise TypeError(f"{told} {made!r:.80}. Name a checkpoint as MODEL.")
    return made


# --- cores and threads ---

notes: list[str] = []
"""What `prepare_threads` found, for the start of a run."""

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return the number of cores that this process may use, which in a container can be few of those it sees."""
    affinity = getattr(os, "sched_getaffinity", None)
    seen = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(seen, _quota())))


def _quota() -> float:
    """Return the cores that the control group of a container grants, of version 1 or 2."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (float(text) for name in names for text in (_CGROUP / name).read_text().split())
            if quota > 0:
                return quota / period
    return math.inf


def _others() -> float:
    """Return about how many threads of other programs want a core now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):  # the load average decays slowly
        load = min(load, int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1.0)
    return load


def prepare_threads() -> None:
    """Set how many threads compute and how they wait, before PyTorch is imported and OpenMP reads it."""
    # Threads wait for each other by spinning. If another program has the core of one, the others spin in vain: on two
    # cores beside 12 busy threads an evaluation of the built-in checkpoint took 2.4 s, with sleeping threads 0.03 s.
    cores, machine, others = usable_cores(), os.cpu_count() or 1, _others()
    if cores < machine:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if others + (int(threads) if threads.isdecimal() else cores) < machine + 1:
        return
    told = f"warning: other programs keep about {many(round(others), 'thread')} busy on {many(machine, 'core')}"
    policy = os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    notes.append(f"{told}. OMP_WAIT_POLICY is {policy}; with passive, threads sleep while they wait and lose little.")


def place(device: torch.device) -> list[str]:
    """Say on which device a run computes, with how many threads, and whether others want the same cores."""
    import torch

    if device.type != "cpu":
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        return [f"computing on {device}{name}"]
    threads, cores = many(torch.get_num_threads(), "thread"), many(usable_cores(), "core")
    return [f"computing on the CPU: {threads} on {cores}", *notes]


def is_first() -> bool:
    """Return whether this process is the first of a launcher, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def calm(*, quiet: bool) -> Iterator[None]:
    """Keep libraries off stdout, silence their progress bars without a terminal, and print their messages as a line."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if quiet or not sys.stderr.isatty():
        for module in ("huggingface_hub.utils", "datasets"):
            import_module(module).disable_progress_bars()
        import_module("transformers.utils.logging").disable_progress_bar()
    client = logging.getLogger("huggingface_hub")
    record, warning, level = logging.getLogRecordFactory(), warnings.formatwarning, client.level
    if quiet:
        client.setLevel(logging.ERROR)  # no messages on retries

    def printable_record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = record(*arguments, **options)
        # the query of a signed URL carries its token
        made.msg, made.args = printable(re.sub(r"(://[^\s?]+)\?\S+", r"\1", made.getMessage())), None
        return made

    logging.setLogRecordFactory(printable_record)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(message)}\n"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        client.setLevel(level)
        logging.setLogRecordFactory(record)
        warnings.formatwarning = warning
