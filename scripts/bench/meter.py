"""Meters around an encoder: what a method costs, and how far a matching method gets."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections import Counter as Tallied
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LEVELS = (1e-2, 1e-3, 1e-4, 1e-5)
"""Errors at which the meter notes evaluations and time."""
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}
"""Operations after which the host has waited for the device."""
WAITS |= {"_linalg_check_errors", "_linalg_eigh", "_linalg_svd"}  # they read whether they have failed
COPIES = {"_to_copy": 0, "copy_": 1}  # and the place of their source


class Done(Exception):  # noqa: N818  (a signal, not an error)
    """The meter's word to a peer that it has arrived, or has spent its evaluations."""


class Counter:
    """A function of images that counts and times what is asked of it.

    Outside `with counter.measure():` it is the bare function. An image that goes forward counts as one of `forwards`; a
    product with Jᵀ as one of `cotangents`; a product with J as one of `tangents`, whether by forward mode or as the
    VJP of u -> Jᵀu. `calls` holds the images of each call, and the cotangents for each in every backward pass of it.

    Args:
        encoder: (B, 3, H, W) in [0, 1] to (B, D).
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor]) -> None:
        self.encoder = encoder
        self.calls: list[tuple[int, list[int]]] = []
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
            passes: list[int] = []
            self.calls.append((len(images), passes))
            self.forwards += len(images)
            with contextlib.suppress(RuntimeError):  # no forward mode in progress
                tangent = fwad.unpack_dual(images).tangent
                self.tangents += 0 if tangent is None else copies(tangent) * len(images)
            if embeddings.requires_grad:
                embeddings.register_hook(partial(self._count_cotangents, passes))
        return embeddings

    def _count_cotangents(self, passes: list[int], cotangents: Tensor) -> None:
        passes.append(copies(cotangents))
        self.cotangents += passes[-1] * len(cotangents)
        if cotangents.requires_grad:  # a VJP of this VJP, in its cotangent, is a product with J
            cotangents.register_hook(self._count_tangents)

    def _count_tangents(self, products: Tensor) -> None:
        self.tangents += copies(products) * len(products)


class Watched(Counter):
    """A counter that is in all else the encoder, its float64 twin included."""

    def __getattr__(self, name: str) -> Any:
        """What the counter lacks, the encoder has."""
        return getattr(self.__dict__["encoder"], name)


class Paired(Watched):
    """A counter that stops its clock now and then to repeat its last call on the bare encoder.

    So a slow moment of the machine falls on both. A call is repeated after a pass of a new shape, and at the latest
    after `every` evaluations of each of its images.

    Args:
        encoder: (B, 3, H, W) in [0, 1] to (B, D).
        like: images of the size to come, (B, 3, H, W).
        every: evaluations between two repetitions.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor], like: Tensor, every: int = 10) -> None:
        super().__init__(encoder)
        self.like, self.every, self._last = like, every, 0.0
        self.times: dict[tuple[int, ...], list[float]] = {}  # seconds of a call by its shape: images, cotangents

    def __call__(self, images: Tensor) -> Tensor:
        """Encode; count, and repeat the call before this one while measuring."""
        if self._running and self.calls and not torch._C._functorch.is_functorch_wrapped_tensor(images):
            shape = shape_of(self.calls[-1])
            if shape not in self.times or self.num_evals - self._last >= self.every * shape[0]:
                self._last = self.num_evals
                self._wait()
                now = self.seconds
                self.repeat(shape)
                self._started += self.seconds - now
        return super().__call__(images)

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Count and time what happens inside, to the end of its work on a GPU.

        Yields:
            nothing
        """
        self._wait()
        with super().measure():
            yield
            self._wait()

    def repeat(self, shape: tuple[int, ...]) -> None:
        """Time a call of this shape on the bare encoder."""
        again = bare(self.encoder, self.like, shape)
        self._wait()
        start = time.perf_counter()
        again()
        self._wait()
        self.times.setdefault(shape, []).append(time.perf_counter() - start)

    def seconds_of(self, shape: tuple[int, ...]) -> float:
        """Mean seconds of a call of this shape on the bare encoder, over three or more."""
        while len(times := self.times.get(shape, [])) < 3:
            self.repeat(shape)
        return sum(times) / len(times)

    def _wait(self) -> None:
        if self.like.is_cuda:
            torch.cuda.synchronize(self.like.device)


class Tally(TorchDispatchMode):
    """Count the operations that reach a device, and those that make the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Tallied(operations=0, synchronisations=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation and count it."""
        out = func(*args, **(kwargs or {}))
        self.seen["operations"] += 1
        self.seen["synchronisations"] += waits(func.overloadpacket.__name__, args, kwargs or {}, out)
        return out


def waits(name: str, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether the host waits for an operation."""
    if name in COPIES:
        blocks = not kwargs.get("non_blocking", any(args[2:]))
        return blocks and args[COPIES[name]].device != out.device
    masked = name == "index" or (name in ("index_put", "index_put_") and args[2].numel() > 1)  # one value is filled in
    return name in WAITS or (masked and any(i is not None and i.dtype == torch.bool for i in args[1]))


def outside(f: Counter, like: Tensor, work: Callable[[], Any]) -> tuple[Any, Tallied[str]]:
    """Return the result of `work`, and what it does outside the encoder of `f`.

    From all operations and synchronisations those of the same calls of the bare encoder are subtracted.
    """
    with f.measure(), Tally() as tally:
        result = work()
    plain = Counter(f.encoder)
    for shape, number in Tallied(map(shape_of, f.calls)).items():
        again = bare(plain, like, shape)
        with plain.measure(), Tally() as inside:
            again()
        tally.seen.subtract({key: number * count for key, count in inside.seen.items()})
    return result, tally.seen


def lower_peak(device: torch.device) -> None:
    """Forget the largest memory in use so far; on a CPU, tensors go back to the system from now on when freed."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD, which otherwise grows with use
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Return the largest memory in use since then, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def shape_of(call: tuple[int, list[int]]) -> tuple[int, ...]:
    """The images of a call, and the cotangents of each of its backward passes."""
    return call[0], *call[1]


def bare(encoder: Callable[[Tensor], Tensor], like: Tensor, shape: Sequence[int]) -> Callable[[], None]:
    """A call of this shape and its backward passes on images of the size of `like`, with nothing around them."""
    x = like[:1].expand(shape[0], *like.shape[1:]).contiguous().requires_grad_(len(shape) > 1)
    with torch.no_grad():
        z = encoder(x[:1])
    one = torch.ones_like(z).expand(shape[0], -1)
    cotangents = [one.clone() if count == 1 else one.repeat(count, 1, 1) for count in shape[1:]]

    def run() -> None:
        with torch.set_grad_enabled(len(shape) > 1):
            z = encoder(x)
        for left, u in zip(range(len(shape) - 2, -1, -1), cotangents, strict=True):
            torch.autograd.grad(z, x, u, retain_graph=left > 0, is_grads_batched=u.ndim == 3)

    return run


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
