"""A meter around an encoder: what a matching method costs, and how far it gets."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

LEVELS = (1e-2, 1e-3, 1e-4, 1e-5)
"""Errors at which the meter notes evaluations and time."""


class Done(Exception):  # noqa: N818  (a signal, not an error)
    """The meter's word to a peer that it has arrived, or has spent its evaluations."""


class Meter:
    """An encoder that counts, times and remembers what is asked of it about one pair.

    Outside `with meter.measure():` it is the bare encoder.

    Args:
        encoder: (B, 3, H, W) in [0, 1] to (B, D).
        target: the target image (1, 3, H, W); its embedding is `z`.
        rtol: the error at which a method is done.
        max_evals: evaluations a method may spend.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor], target: Tensor, rtol: float, max_evals: int) -> None:
        self.encoder, self.target, self.rtol, self.max_evals = encoder, target, rtol, max_evals
        with torch.no_grad():
            self.z = encoder(target)
        self.forwards = self.cotangents = self.tangents = 0
        self.best_error, self.best_image = math.inf, target
        self.reached: dict[float, tuple[float, float]] = {}
        self._running = self._stops = False
        self._elapsed = self._started = 0.0

    @contextlib.contextmanager
    def measure(self, stops: bool = False) -> Iterator[None]:
        """Count and time what happens inside; with `stops`, raise `Done` at the tolerance or the budget.

        Args:
            stops: for peers, which have no such stop of their own. `Done` ends the block quietly.

        Yields:
            nothing
        """
        self._running, self._stops, self._started = True, stops, time.perf_counter()
        try:
            with contextlib.suppress(Done):
                yield
        finally:
            self._elapsed = self.seconds
            self._running = False

    @property
    def num_evals(self) -> float:
        """Evaluations so far."""
        return (self.forwards + 2 * self.cotangents + 2 * self.tangents) / 3

    @property
    def seconds(self) -> float:
        """Time so far, without the time spent on looking."""
        return self._elapsed + (time.perf_counter() - self._started if self._running else 0.0)

    def error(self, image: Tensor) -> float:
        """‖f(x) − z‖ / ‖z‖ of one image (1, 3, H, W), neither counted nor timed."""
        with torch.no_grad():
            return self._error(self.encoder(image))

    def _error(self, embedding: Tensor) -> float:
        z = self.z.double()
        return float((embedding.double() - z).norm() / z.norm())

    def __call__(self, images: Tensor) -> Tensor:
        """Encode; count, look and stop while measuring."""
        if not self._running:
            return self.encoder(images)
        if self._stops:
            if not images.requires_grad and torch.equal(images, self.target):
                return self.z  # ART encodes the unchanged target in every step
            if self.num_evals >= self.max_evals:
                raise Done
        embeddings = self.encoder(images)
        self.forwards += len(images)
        with contextlib.suppress(RuntimeError):  # no forward mode in progress
            tangent = fwad.unpack_dual(images).tangent
            self.tangents += 0 if tangent is None else copies(tangent) * len(images)
        if embeddings.requires_grad:
            embeddings.register_hook(self._count_cotangents)
        if not torch._C._functorch.is_functorch_wrapped_tensor(images):
            self._look(images.detach(), embeddings.detach())
        return embeddings

    def _count_cotangents(self, cotangents: Tensor) -> None:
        self.cotangents += copies(cotangents) * len(cotangents)

    def _look(self, images: Tensor, embeddings: Tensor) -> None:
        """Keep the best image and when each level was first reached; the clock stands still meanwhile."""
        now, evals = self.seconds, self.num_evals
        for image, embedding in zip(images.split(1), embeddings.split(1), strict=True):
            error = self._error(embedding)
            inside = image.clamp(0.0, 1.0)
            if error < self.best_error and not torch.equal(inside, image):
                error = self.error(inside)
            if error < self.best_error:
                self.best_error, self.best_image = error, inside.clone()
                for level in LEVELS:
                    if error <= level:
                        self.reached.setdefault(level, (evals, now))
        self._started += self.seconds - now
        if self._stops and self.best_error <= self.rtol:
            raise Done


def copies(tensor: Tensor) -> int:
    """How many tensors a vmapped tensor stands for: the cotangents of `is_grads_batched=True` or `vmap(vjp)`."""
    functorch, count = torch._C._functorch, 1
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            axis = functorch.maybe_get_bdim(tensor)
            tensor = functorch.get_unwrapped(tensor)
            count *= tensor.shape[axis]
        else:
            tensor = functorch.get_unwrapped(tensor)
    return count * len(torch._remove_batch_dim(tensor, 1, 1, 0))  # `is_grads_batched` has a vmap of its own
