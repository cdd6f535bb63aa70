"""An encoder that costs nothing, with everything a run asks of one; and photos drawn by formula."""

import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_equiv.analyses import lipschitz
from hf_equiv.geometry.regional import regional_lipschitz
from hf_equiv.runs import shards

SIZE = 16
LABELS = ("apple", "boat", "chair", "dune")


class TinyEncoder:
    """f(x) = B·tanh(A·(x − ½)): smooth, D = 12, N = 768, with a linear head of four classes."""

    def __init__(
        self, seed: int = 0, *, head: bool = True, delay: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = 3 * SIZE * SIZE
        self._a = torch.randn(24, n, generator=generator, dtype=torch.float64) * 3 / n**0.5
        self._b = torch.randn(12, 24, generator=generator, dtype=torch.float64) / 24**0.5
        self._head = torch.randn(len(LABELS), 12, generator=generator, dtype=torch.float64)
        self.seed, self.delay, self.dtype = seed, delay, dtype
        self.has_head, self.label_names = head, LABELS if head else None
        self.model_id, self.revision = "builtin", f"sha256:{seed:064d}"
        self.readout, self.readouts, self.embedding_dim, self.input_shape = "cls", ("cls",), 12, (3, SIZE, SIZE)
        self.normalize, self.device = False, torch.device("cpu")
        self.provenance = {
            "model_id": self.model_id,
            "model_revision": self.revision,
            "readout": self.readout,
            "dtype": str(dtype).removeprefix("torch."),
            "attention": "none",
            "processor": json.dumps({"resize": SIZE}),
            "versions": json.dumps({"torch": torch.__version__}),
        }

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.delay:  # a sleep of no time gives the core away
            time.sleep(self.delay)
        # one image at a time: the result does not depend on the batch, to the bit
        rows = [self._embed(x.to(self.dtype)) for x in pixels]
        return torch.stack(rows)

    def _embed(self, x: Tensor) -> Tensor:
        return self._b.to(x.dtype) @ torch.tanh(self._a.to(x.dtype) @ (x.flatten() - 0.5))

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        arrays = [np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(torch.float32) / 255

    def classify(self, pixels: Tensor, labels: list[str] | None = None) -> Tensor:
        if labels is not None:
            raise ValueError("`labels` must be None for this encoder")
        return self(pixels) @ self._head.T.to(self.dtype)

    def noise_floor(self, pixels: Tensor) -> Tensor:
        exact = torch.stack([self._embed(x.double()) for x in pixels])
        return (self(pixels).double() - exact).norm(dim=1) / exact.norm(dim=1)


def draw_photo(k: int, size: int = 40) -> Image.Image:
    """A smooth colour picture, different for each k."""
    y, x = np.mgrid[0:size, 0:size] / size
    bands = [np.sin(2 * np.pi * ((k % 5 + 1) * x + (k % 3) * y + c / 3 + k / 7)) for c in range(3)]
    return Image.fromarray(np.uint8(np.rint(127.5 + 110 * np.stack(bands, axis=2))))


def save_photos(folder: Path, count: int = 6, classes: int = 3) -> Path:
    """Save `count` photos in class sub-folders."""
    for k in range(count):
        place = folder / f"class{k % classes}"
        place.mkdir(parents=True, exist_ok=True)
        draw_photo(k).save(place / f"photo{k}.png")
    return folder


def shorten_searches() -> None:
    """Search the balls of runs in a few steps; the default number is tested in `geometry/test_regional.py`."""
    lipschitz.regional_lipschitz = partial(regional_lipschitz, num_steps=5, batch_size=2)


class Known:
    """An encoder given by a function of one image; `head` gives class scores of one image."""

    def __init__(self, f, head=None) -> None:
        self.f, self.head, self.has_head = f, head, head is not None
        self.device, self.label_names = torch.device("cpu"), ("dark", "bright")

    def __call__(self, pixels):
        return torch.stack([self.f(x) for x in pixels])

    def classify(self, pixels, labels=None):
        return torch.stack([self.head(x) for x in pixels])


def pixels_of_photo(k: int, side: int = SIZE) -> Tensor:
    return torch.from_numpy(np.array(draw_photo(k, side))).permute(2, 0, 1).float() / 255


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = len, more: Iterable[str] = ()) -> None:
    """Bring the hashes of run.json up to date, with those of more files, and change it, as a careful forger would."""
    record = json.loads((folder / "run.json").read_text())
    names = [name for name in [*record["files"], *more] if (folder / name).is_file()]
    record["files"] = {name: shards.sha256_file(folder / name) for name in names}
    change(record)
    (folder / "run.json").write_text(json.dumps(record))
