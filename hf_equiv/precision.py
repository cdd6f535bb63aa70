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

Encoding = Callable[[Tensor], Tensor]  # pixels (B, C, H, W) to embeddings (B, D)

_DEVICES = ("cpu", "cuda", "xpu", "mps")


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


class Float64Softmax(TorchFunctionMode):
    """Keep a float64 softmax in float64: "eager" attention in transformers casts it to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch; a softmax of float64 values stays in float64."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.softmax and kwargs.get("dtype") is torch.float32:
            if args[0].dtype is torch.float64:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product Σ aᵢbᵢ of two images: along a row in their dtype, over the rows in float64."""
    # A row is short: a float32 product keeps its rounding near 1e-7·Σ|aᵢbᵢ| and takes half the time of float64 copies.
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))


def power_of_two(value: float) -> float:
    """Return a power of two near `value` ≥ 0, as a unit in which squares neither overflow nor vanish; 1 for 0."""
    return math.ldexp(1.0, math.frexp(value)[1])


def float64_twin(f: Encoding) -> Encoding | None:
    """Return the same function in float64 if f offers one, as an Encoder below float64 does; else None."""
    # `double()` of a `torch.nn.Module` is never called, because it converts the caller's own weights.
    make = None if isinstance(f, torch.nn.Module) else getattr(f, "double", None)
    twin = make() if callable(make) else None
    return twin if callable(twin) and twin is not f else None
