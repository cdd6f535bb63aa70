"""When memory runs out: work on fewer images at once, and go on."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size


@dataclass
class PassSize:
    """How many images, tangents or cotangents go through the model at once; halved for good when memory runs out.

    Attributes:
        images: as things stand.
    """

    images: int

    def halve(self, tried: int) -> str:
        """Go on with half of what was tried; the memory that the failed attempt held is given back.

        Args:
            tried: how many were in the pass that did not fit.

        Returns:
            What to tell the user.
        """
        self.images = max(1, min(self.images, tried // 2))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"out of memory with {tried} at once; going on with {self.images} (--batch-size {self.images})"


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, Exception) and bool(should_reduce_batch_size(error))
    )
