"""Keep the settings of the Space, the checkpoints that visitors may use, and the results that are shown."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
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
from hf_equiv.cli.environment import usable_cores
from hf_equiv.formatting import cut, one_line
from hf_equiv.models.places import BUILTINS

try:
    import spaces

    on_gpu = spaces.GPU(duration=120)
except ImportError:

    def on_gpu(work):
        """Return the work unchanged, since this machine is not ZeroGPU."""
        return work


HERE = Path(__file__).parent
BUILTIN_RESULTS = "built-in checkpoint, four photos"
_DATASET_AT = os.environ.get("HF_EQUIV_DATASET", "").strip()
DATASET = Path(_DATASET_AT).resolve().name if _DATASET_AT and Path(_DATASET_AT).is_dir() else _DATASET_AT
"""The owner's results as visitors see them: a dataset of the Hub, or the last part of a local folder's path."""
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
"""Options of an event that runs outside the queue, so that visitors look around while others compute."""
LIVE = "element.setAttribute('aria-live', 'polite');"
"""Script of an element whose changes are read out by screen readers."""

WORKERS = 1 if torch.cuda.is_available() else min(2, usable_cores())
torch.set_num_threads(max(1, usable_cores() // WORKERS))

_DATASET_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
_DAMAGE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, TemplateError)
_loading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

_KEPT, _AT_ONCE, _AWAITED = 4, 2, 8  # datasets of visitors in memory, being opened at the same time, not yet opened
_strangers: OrderedDict[str, Future[Showcase]] = OrderedDict()
_opening, _seats = threading.Lock(), threading.BoundedSemaphore(16)  # each seat is a thread that waits
_openers = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="open dataset")

HOUR = 3600.0
"""Seconds for which uploads and lookalikes of visitors are kept."""
_PREFIX = "hf_equiv_space_"
_base = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
_base.mkdir(parents=True, exist_ok=True)
FOLDER = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_base))
"""Folder of the temporary files of this process; `sweep` deletes them when they are an hour old."""
os.environ["GRADIO_TEMP_DIR"] = str(FOLDER)


def refused(text: str) -> gr.Error:
    """Return an error for the visitor; the page would take `<` and `>` for HTML. No other error shows its text."""
    return gr.Error(cut(text, 800).replace("<", "(").replace(">", ")"), print_exception=False)


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
    with _loading[model]:  # a slow download delays only those who want this checkpoint
        try:
            return _load(MODELS.get(model, model), revision, readout, normalize, dtype)
        except (OSError, ValueError) as error:
            raise refused(f"{model!r} could not be loaded: {error}") from error


def recorded_encoder(row: dict[str, Any], dataset: str | None) -> Encoder:
    """Return the checkpoint that a row of a dataset names.

    Only the owner's results may choose the revision on the Hub: anybody can put weights into a pull request to a
    repository, and its commit then belongs to that repository. A revision of a built-in checkpoint is one of those that
    ship with the package. Rows record only the name of a local folder. `check_shown` refuses an encoder that does not
    match the row.
    """
    local = str(row["model_revision"]).startswith("sha256:")
    built_in = MODELS.get(row["model_id"], row["model_id"]) in BUILTINS
    trusted = built_in or (bool(DATASET) and dataset == DATASET and not local)
    return encoder_of(
        row["model_id"], row["model_revision"] if trusted else None, row["readout"],
        normalize=bool(row["settings"]["normalize"]), trusted=trusted,
        dtype=torch.float64 if row["dtype"] == "float64" else torch.float32,
    )  # fmt: skip


@lru_cache(maxsize=2)
def _own_results(name: str) -> Showcase:
    with telling(name):
        return open_showcase(HERE / "results") if name == BUILTIN_RESULTS else open_showcase(_DATASET_AT, local=True)


def results(name: str) -> Showcase:
    """Open the results that ship with the app, the owner's dataset, or a public dataset of the Hub."""
    if name in (BUILTIN_RESULTS, DATASET):
        return _own_results(name)
    with _opening:
        if name not in _strangers:
            if sum(not opened.done() for opened in _strangers.values()) >= _AWAITED:
                raise refused("Other datasets are being opened. Try again in a minute.")
            _strangers[name] = _openers.submit(_open_strange, name)
        opened = _strangers[name]
        _strangers.move_to_end(name)
        ready = [other for other, found in _strangers.items() if found.done()]
        for other in ready[: max(0, len(ready) - _KEPT)]:
            del _strangers[other]
    if not opened.done():
        if not _seats.acquire(blocking=False):
            raise refused(f"{name!r} is being opened. Try again in a minute.")
        wait([opened])
        _seats.release()
    if opened.exception() is not None:
        with _opening:
            _strangers.pop(name, None)  # Retry on the next request.
    return opened.result()


def _open_strange(name: str) -> Showcase:
    """Open a public dataset, never one that needs the owner's token; the rows stay in memory, and no file is kept."""
    with telling(name), tempfile.TemporaryDirectory(dir=FOLDER, ignore_cleanup_errors=True) as cache:
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
    """Write a file for a visitor to gradio's upload folder."""
    return save_bytes_to_cache(data, name, cache_dir=get_upload_folder())


def sweep(kept: Container[str]) -> None:
    """Delete files of visitors that are an hour old, but not those `kept`, and the folders of earlier processes."""
    os.utime(FOLDER)  # heartbeat for another process that serves the app
    old = time.time() - HOUR
    for folder in FOLDER.parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder != FOLDER and folder.stat().st_mtime < old:
                shutil.rmtree(folder)
    for file in FOLDER.rglob("*"):
        with suppress(OSError):
            if file.is_file() and file.stat().st_mtime < old and str(file) not in kept:
                file.unlink()


def keep_swept(kept: Container[str], every: float = 600.0) -> None:
    """Sweep now and every ten minutes."""

    def work() -> None:
        while True:
            sweep(kept)
            time.sleep(every)

    threading.Thread(target=work, daemon=True, name="sweep").start()
