"""Meters around an encoder: what a method costs, and how far a matching method gets."""

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


class Counter:
    """A function of images that counts and times what is asked of it.

    Outside `with counter.measure():` it is the bare function. An image that goes forward counts as one of `forwards`; a
    product with Jᵀ as one of `cotangents`; a product with J as one of `tangents`, whether by forward mode or as the
    VJP of u -> Jᵀu.

    Args:
        encoder: (B, 3, H, W) in [0, 1] to (B, D).
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor]) -> None:
        self.encoder = encoder
        self.admitted: dict = {}  # the check of f by hf_equiv, once for an encoder: made before a method is measured
        self.forwards = self.cotangents = self.tangents = 0
        self._running = False
        self._elapsed = self._started = 0.0

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Count and time what happens inside.

        Yields:
            nothing
        """
        self._running, self._started = True, time.perf_counter()
        try:
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
        """Time so far."""
        return self._elapsed + (time.perf_counter() - self._started if self._running else 0.0)

    def __call__(self, images: Tensor) -> Tensor:
        """Encode; count while measuring."""
        embeddings = self.encoder(images)
        if self._running:
            self.forwards += len(images)
            with contextlib.suppress(RuntimeError):  # no forward mode in progress
                tangent = fwad.unpack_dual(images).tangent
                self.tangents += 0 if tangent is None else copies(tangent) * len(images)
            if embeddings.requires_grad:
                embeddings.register_hook(self._count_cotangents)
        return embeddings

    def _count_cotangents(self, cotangents: Tensor) -> None:
        self.cotangents += copies(cotangents) * len(cotangents)
        if cotangents.requires_grad:  # a VJP of this VJP, in its cotangent, is a product with J
            cotangents.register_hook(self._count_tangents)

    def _count_tangents(self, products: Tensor) -> None:
        self.tangents += copies(products) * len(products)


class Meter(Counter):
    """A counter that also remembers how far a matching method has come on one pair, and stops it.

    Args:
        encoder: (B, 3, H, W) in [0, 1] to (B, D).
        target: the target image (1, 3, H, W); its embedding is `z`.
        rtol: the error at which a method is done.
        max_evals: evaluations a method may spend.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor], target: Tensor, rtol: float, max_evals: int) -> None:
        super().__init__(encoder)
        self.target, self.rtol, self.max_evals = target, rtol, max_evals
        with torch.no_grad():
            self.z = encoder(target)
        self.best_error, self.best_image = math.inf, target
        self.reached: dict[float, tuple[float, float]] = {}
        self._stops = False

    @contextlib.contextmanager
    def measure(self, stops: bool = False) -> Iterator[None]:
        """Count and time what happens inside; with `stops`, raise `Done` at the tolerance or the budget.

        The time spent on looking is not counted.

        Args:
            stops: for peers, which have no such stop of their own. `Done` ends the block quietly.

        Yields:
            nothing
        """
        self._stops = stops
        with contextlib.suppress(Done), super().measure():
            yield

    def error(self, image: Tensor) -> float:
        """‖f(x) − z‖ / ‖z‖ of one image (1, 3, H, W), neither counted nor timed."""
        with torch.no_grad():
            return self._error(self.encoder(image))

    def _error(self, embedding: Tensor) -> float:
        z = self.z.double()
        return float((embedding.double() - z).norm() / z.norm())

    def __call__(self, images: Tensor) -> Tensor:
        """Encode; count, look and stop while measuring."""
        if self._running and self._stops:
            if not images.requires_grad and torch.equal(images, self.target):
                return self.z  # ART encodes the unchanged target in every step
            if self.num_evals >= self.max_evals:
                raise Done
        embeddings = super().__call__(images)
        if self._running and not torch._C._functorch.is_functorch_wrapped_tensor(images):
            self._look(images.detach(), embeddings.detach())
        return embeddings

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
