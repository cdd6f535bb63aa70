"""Control the kernels that compute stated numbers: attention for derivatives, no TF32 and no autocast in float32.

PyTorch's fused attention kernels have neither forward mode nor second order, and float64 needs a softmax in float64;
the plain MATH kernel has all three. TF32 keeps 10 bits of mantissa, so a "float32" convolution or matmul on CUDA is off
by about 1e-3; autocast to bfloat16 keeps 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

Encoding = Callable[[Tensor], Tensor]  # images (B, *shape) to embeddings (B, D)

_DEVICES = ("cpu", "cuda", "xpu", "mps")
_DTYPE = vars(torch._C.TensorBase)["dtype"].__get__  # `tensor.dtype`
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_FINE, _COARSEST = 512.0, 2.0**-6  # first and last step by which f is probed, in units of eps and of a pixel


def exact_derivatives() -> AbstractContextManager[None]:
    """Compute attention with the MATH kernel, which supports forward mode, second order and float64."""
    # Every JVP, double backward and float64 evaluation needs it. Plain forward and backward passes use the fused
    # kernels, which are faster and need less memory.
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def no_tf32() -> Iterator[None]:
    """Switch TF32 off for float32 matmuls and convolutions on CUDA, and restore the caller's settings on exit."""
    # A100, H100 and H200 use it for convolutions by default, and a patch embedding is one. The older `allow_tf32` flags
    # raise when read while these differ between operators: never mix the two.
    cudnn: Any = torch.backends.cudnn
    owners: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv)
    before = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = "ieee"
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


@contextmanager
def no_autocast() -> Iterator[None]:
    """Leave `torch.autocast`: float32 products inside stay float32."""
    # The library's own float32 products and the backward pass of f need it: PyTorch casts a backward pass by the block
    # in which it runs, not by the block of the forward pass. Calls of f stay in the caller's block.
    with ExitStack() as rules:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                rules.enter_context(torch.autocast(device, enabled=False))
        yield


def with_autocast(f: Encoding) -> Encoding:
    """Bind f to the `torch.autocast` settings that hold now, so that it computes the same inside `no_autocast`."""
    held = [(device, torch.get_autocast_dtype(device)) for device in _DEVICES if torch.is_autocast_enabled(device)]
    if not held:
        return f

    def call(x: Tensor) -> Tensor:
        with ExitStack() as rules:
            for device, dtype in held:
                rules.enter_context(torch.autocast(device, dtype=dtype))
            return f(x)

    return call


class InFloat64(TorchFunctionMode):
    """Compute in float64 despite narrower types inside a function: weights, autocast blocks, a softmax in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch with its floating-point tensors and types widened to float64."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__":  # an attribute; only the type is widened, because weights are converted where they count
            return _widened(func(*args, **kwargs)) if func == _DTYPE else func(*args, **kwargs)
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        if name == "__set__" or (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
            return func(*args[:1], *tree_map(_widened, args[1:]), **tree_map(_widened, kwargs))  # in place
        return tree_map(_widened, func(*tree_map(_widened, args), **tree_map(_widened, kwargs)))


def in_float64(f: Encoding) -> Encoding:
    """Return f with all its arithmetic in float64, for float64 images; the weights keep their values."""

    def call(x: Tensor) -> Tensor:
        with InFloat64(), exact_derivatives():
            return f(x)

    return call


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _NARROW else value
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


class Recorded(TorchFunctionMode):
    """Record the relative spacing `eps` of the coarsest numbers that depend on the pixels inside a function."""

    eps = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch and look at the type of its results."""
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad:
                self.eps = max(self.eps, torch.finfo(value.dtype).eps)
        return out


def resolved_step(f: Encoding, image: Tensor, eps: float) -> tuple[float, int]:
    """Return a change of the image that f resolves, 512 eps or more if f is coarser than `eps`; and the passes."""
    # Two equal steps from a point near x, off its kinks, change f by the same amount if they are above its rounding and
    # below its curvature. If no step does, nothing is known against `eps`.
    generator = torch.Generator().manual_seed(0)
    size = max(1.0, float(image.abs().max()))
    draw = torch.rand(2, *image.shape, generator=generator, dtype=torch.float64).to(image)
    start, way = torch.lerp(image, draw[0], 2.0**-10), (draw[1] - 0.5).sign()
    step, passes = _FINE * eps * size, 1
    with torch.no_grad(), no_tf32():
        first = f(start[None]).double()
        while step < _COARSEST * size:
            second, third = (f((start + k * step * way)[None]).double() for k in (1, 2))
            passes += 2
            bend, moved = float((third - 2 * second + first).norm()), float((third - first).norm())
            if moved > 0 and 8 * bend <= moved:
                return step, passes
            step *= 64
    return _FINE * eps * size, passes


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products Σ aᵢbᵢ of the rows of two tensors (B, N), (B,) float64, alike for every B."""
    # Short stretches are summed in their dtype, which keeps a float32 rounding near 1e-7·Σ|aᵢbᵢ| and takes half the
    # time of float64 copies; the stretches are summed in float64.
    stretches = (-1, math.gcd(a.shape[1], 512))
    return torch.linalg.vecdot(a.unflatten(1, stretches), b.unflatten(1, stretches)).sum(dim=1, dtype=torch.float64)


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the products (B, M) of matrices (B, M, K) with vectors (B, K), alike for every B."""
    return torch.bmm(vectors[:, None], matrices.mT)[:, 0]  # as rows, because the bits of columns depend on B


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two images as a Python number."""
    return float(inner(a.flatten()[None], b.flatten()[None]))


def power_of_two(value: float) -> float:
    """Return a power of two near `value` ≥ 0, as a unit in which squares neither overflow nor vanish; 1 for 0."""
    return math.ldexp(1.0, math.frexp(value)[1])


def float64_twin(f: Encoding) -> Encoding | None:
    """Return the same function in float64 if f offers one, as an Encoder below float64 does; else None."""
    # `double()` of a `torch.nn.Module` is never called, because it converts the caller's own weights.
    make = None if isinstance(f, torch.nn.Module) else getattr(f, "double", None)
    twin = make() if callable(make) else None
    return twin if callable(twin) and twin is not f else None
