"""What the Space has: its settings, the checkpoints that visitors may use, the results that are shown."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from showcase import Showcase, open_showcase

from hf_equiv import Encoder

try:  # before torch, as ZeroGPU asks
    import spaces

    on_gpu = spaces.GPU(duration=120)
except ImportError:  # anywhere else

    def on_gpu(work):
        """Run where we are."""
        return work


HERE = Path(__file__).parent


BUILTIN_RESULTS = "built-in checkpoint, four photos"


DATASET = os.environ.get("HF_EQUIV_DATASET", "").strip()


MODELS = ["builtin", *(m.strip() for m in os.environ.get("HF_EQUIV_MODELS", "").split(",") if m.strip())]


MODELS = {Path(m).name if Path(m).is_dir() else m: m for m in MODELS}
"""Checkpoints by the name that visitors see: a folder of this machine by its own name alone."""


MAX_EVALS = int(os.environ.get("HF_EQUIV_MAX_EVALS", "400"))


TIME_LIMIT = float(os.environ.get("HF_EQUIV_TIME_LIMIT", "120"))


MAX_DOWNLOAD = 300 * 2**20


HANDED_OUT = 300.0  # s


RTOL = 1e-5


LIVE = "element.setAttribute('aria-live', 'polite');"
"""Script of an element that outlives its content: screen readers read out what changes in it."""


WORKERS = 1 if torch.cuda.is_available() else max(1, min(2, os.cpu_count() or 1))


torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))


_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
"""A dataset of the Hub, as a visitor may name it."""


_loading = threading.Lock()


@lru_cache(maxsize=4)
def _load(model: str, revision: str | None, readout: str, normalize: bool, dtype: torch.dtype) -> Encoder:
    return Encoder.from_pretrained(model, revision=revision, readout=readout, normalize=normalize, dtype=dtype)


def encoder_of(
    model: str, revision: str | None = None, readout: str = "auto", *, normalize: bool = False,
    dtype: torch.dtype = torch.float32, trusted: bool = False,
) -> Encoder:  # fmt: skip
    """A checkpoint of the allow-list, or of the owner's own results, loaded once."""
    if not (trusted or model in MODELS):
        raise gr.Error(f"This Space offers {', '.join(MODELS)}; {model!r} is not among them.", print_exception=False)
    with _loading:
        try:
            return _load(MODELS.get(model, model), revision, readout, normalize, dtype)
        except (OSError, ValueError) as error:
            raise gr.Error(f"{model!r} could not be loaded: {error}", print_exception=False) from error


def recorded_encoder(row: dict[str, Any], settings: dict[str, Any], dataset: str | None) -> Encoder:
    """The checkpoint that a row of a dataset names; of a local folder the name alone is recorded.

    The revision is the row's for the owner's own results alone: anybody may put weights of theirs into a pull request
    to a repository, and its commit is one of that repository.

    Returns:
        The encoder; `check_shown` refuses one that is not the row's.
    """
    local = str(row["model_revision"]).startswith("sha256:")
    trusted = bool(DATASET) and dataset == DATASET and not local
    return encoder_of(
        row["model_id"], row["model_revision"] if trusted else None, row["readout"],
        normalize=bool(settings["normalize"]), trusted=trusted,
        dtype=torch.float64 if row["dtype"] == "float64" else torch.float32,
    )  # fmt: skip


@lru_cache(maxsize=8)
def results(name: str) -> Showcase:
    """The results of a name: those that ship with the app, the owner's dataset, or a public dataset of the Hub."""
    if name == BUILTIN_RESULTS:
        return open_showcase(HERE / "results")
    with telling(name):
        if name == DATASET:
            return open_showcase(name, local=True)
        # a visitor sees what anybody sees, never what the owner's token opens; the files go, the rows are in memory
        with tempfile.TemporaryDirectory(prefix="hf_equiv_", ignore_cleanup_errors=True) as cache:
            return open_showcase(name, token=False, most_bytes=MAX_DOWNLOAD, local=False, cache_dir=cache)


@contextmanager
def telling(name: str | None) -> Iterator[None]:
    """Say what is wrong with somebody's dataset, whatever is in its files."""
    try:
        yield
    except RepositoryNotFoundError as error:
        said = plain(f"{name!r} cannot be shown: on the Hub there is no such dataset, or it is private.")
        raise gr.Error(said, print_exception=False) from error
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        text = re.sub(r"(?<![\w.:/])/(?:[^/'\"\s]+/)+", "", str(error))  # where this machine keeps them is not theirs
        raise gr.Error(plain(f"{name!r} cannot be shown: {text}"), print_exception=False) from error


def named_results(name: str | None) -> Showcase:
    """The same, of what a visitor has typed: a folder of this machine is none of their business."""
    name = (name or "").strip() or BUILTIN_RESULTS
    if name not in (BUILTIN_RESULTS, DATASET) and not _NAME.fullmatch(name):
        raise gr.Error("Name a dataset of the Hub as USER/NAME.", print_exception=False)
    return results(name)


def plain(text: str) -> str:
    """Words of a visitor for a message, which the page would take for HTML."""
    return text.replace("<", "(").replace(">", ")")


def row_of(name: str | None, key: str) -> dict[str, Any]:
    """One match by its key."""
    shown = named_results(name)
    for column in ("key", "pair_id"):
        for row in shown.matches:
            if key == row[column]:
                return row
    raise gr.Error(plain(f"There is no match {str(key)[:200]!r} in {shown.name!r}."), print_exception=False)


def file_of(data: bytes, name: str, *, seconds: float | None = HANDED_OUT) -> str:
    """Bytes as a file that gradio may hand out; it makes a copy of its own, so ours can go soon (None: never)."""
    folder = Path(tempfile.mkdtemp(prefix="hf_equiv_"))
    (folder / name).write_bytes(data)
    if seconds is not None:
        away = threading.Timer(seconds, shutil.rmtree, [folder], {"ignore_errors": True})
        away.daemon = True
        away.start()
    return str(folder / name)


@lru_cache(maxsize=4)
def home_of(kind: str) -> str:
    """Whose rows a tab shows: the owner's dataset if it has some of this kind, else those that ship with the app."""
    if DATASET:
        try:
            if getattr(results(DATASET), kind):
                return DATASET
        except gr.Error as error:
            logging.getLogger("hf_equiv").warning("the results of %r are left out: %s", DATASET, error)
    return BUILTIN_RESULTS
