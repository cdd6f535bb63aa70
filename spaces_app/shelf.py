"""Keep the settings of the Space, the checkpoints that visitors may use, and the results that are shown."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from huggingface_hub.errors import RepositoryNotFoundError
from jinja2 import TemplateError
from showcase import Showcase, open_showcase

from hf_equiv import Encoder
from hf_equiv.formatting import cut, one_line

try:
    import spaces

    on_gpu = spaces.GPU(duration=120)
except ImportError:

    def on_gpu(work):
        """Return the work unchanged, since this machine is not ZeroGPU."""
        return work


HERE = Path(__file__).parent
BUILTIN_RESULTS = "built-in checkpoint, four photos"
DATASET = os.environ.get("HF_EQUIV_DATASET", "").strip()
MODELS = {
    Path(model).name if Path(model).is_dir() else model: model
    for model in ["builtin", *map(str.strip, os.environ.get("HF_EQUIV_MODELS", "").split(","))]
    if model
}
"""Checkpoints by the name that visitors see; for a local folder, the last part of its path."""
MAX_EVALS = int(os.environ.get("HF_EQUIV_MAX_EVALS", "400"))
TIME_LIMIT = float(os.environ.get("HF_EQUIV_TIME_LIMIT", "120"))
RTOL = 1e-5
MAX_DOWNLOAD = 300 * 2**20  # most bytes of a visitor's dataset

HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of an event that is not part of the API."""
QUICK = HIDDEN | {"queue": False}
"""Options of an event that waits for nobody: visitors look around while others compute."""
LIVE = "element.setAttribute('aria-live', 'polite');"
"""Script of an element whose changes are read out by screen readers."""

WORKERS = 1 if torch.cuda.is_available() else max(1, min(2, os.cpu_count() or 1))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

_DATASET_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
_DAMAGE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, TemplateError)
_loading = threading.Lock()


def refused(text: str) -> gr.Error:
    """Return an error for the visitor; the page would take `<` and `>` for HTML. No other error shows its text."""
    return gr.Error(cut(text, 800).replace("<", "(").replace(">", ")"), print_exception=False)


def warn(text: str) -> None:
    """Show a warning to the visitor, with the text of `refused`."""
    gr.Warning(refused(text).message)


@lru_cache(maxsize=4)
def _load(model: str, revision: str | None, readout: str, normalize: bool, dtype: torch.dtype) -> Encoder:
    return Encoder.from_pretrained(model, revision=revision, readout=readout, normalize=normalize, dtype=dtype)


def encoder_of(
    model: str, revision: str | None = None, readout: str = "auto", *, normalize: bool = False,
    dtype: torch.dtype = torch.float32, trusted: bool = False,
) -> Encoder:  # fmt: skip
    """Return a checkpoint of the allow-list or, if `trusted`, of the owner's own results; it is loaded once."""
    if not (trusted or model in MODELS):
        raise refused(f"This Space offers {', '.join(MODELS)}; {model!r} is not among them.")
    with _loading:
        try:
            return _load(MODELS.get(model, model), revision, readout, normalize, dtype)
        except (OSError, ValueError) as error:
            raise refused(f"{model!r} could not be loaded: {error}") from error


def recorded_encoder(row: dict[str, Any], dataset: str | None) -> Encoder:
    """Return the checkpoint that a row of a dataset names.

    Only the owner's results may choose the revision: anybody can put weights into a pull request to a repository, and
    its commit then belongs to that repository. Rows record only the name of a local folder. `check_shown` refuses an
    encoder that does not match the row.
    """
    local = str(row["model_revision"]).startswith("sha256:")
    trusted = bool(DATASET) and dataset == DATASET and not local
    return encoder_of(
        row["model_id"], row["model_revision"] if trusted else None, row["readout"],
        normalize=bool(row["settings"]["normalize"]), trusted=trusted,
        dtype=torch.float64 if row["dtype"] == "float64" else torch.float32,
    )  # fmt: skip


@lru_cache(maxsize=8)
def results(name: str) -> Showcase:
    """Open the results that ship with the app, the owner's dataset, or a public dataset of the Hub."""
    if name == BUILTIN_RESULTS:
        return open_showcase(HERE / "results")
    with telling(name):
        if name == DATASET:
            return open_showcase(name, local=True)
        # a visitor sees only public datasets, none that need the owner's token; the rows stay in memory
        with tempfile.TemporaryDirectory(prefix="hf_equiv_", ignore_cleanup_errors=True) as cache:
            return open_showcase(name, token=False, most_bytes=MAX_DOWNLOAD, local=False, cache_dir=cache)


@contextmanager
def telling(name: str | None) -> Iterator[None]:
    """Turn any error in reading a dataset into a message for the visitor, without folder names of this machine."""
    try:
        yield
    except gr.Error:
        raise
    except RepositoryNotFoundError as error:
        raise refused(f"{name!r} cannot be shown: on the Hub there is no such dataset, or it is private.") from error
    except _DAMAGE as error:
        raise refused(f"{name!r} cannot be shown: {one_line(error)}") from error


def named_results(name: str | None) -> Showcase:
    """Open the results that a visitor names, who may not open folders of this machine."""
    name = (name or "").strip() or BUILTIN_RESULTS
    if name not in (BUILTIN_RESULTS, DATASET) and not _DATASET_NAME.fullmatch(name):
        raise refused("Name a dataset of the Hub as USER/NAME.")
    return results(name)


@lru_cache(maxsize=4)
def home_of(kind: str) -> str:
    """Name the results of a tab: the owner's dataset if it has rows of this kind, else those that ship with the app."""
    if DATASET:
        try:
            if getattr(results(DATASET), kind):
                return DATASET
        except gr.Error as error:
            logging.getLogger("hf_equiv").warning("the results of %r are left out: %s", DATASET, error)
    return BUILTIN_RESULTS


def file_of(data: bytes, name: str) -> str:
    """Write a file to gradio's upload folder, which the app's `delete_cache` empties."""
    return save_bytes_to_cache(data, name, cache_dir=get_upload_folder())
