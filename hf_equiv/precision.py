"""Which kernels may compute a stated number: attention for derivatives, no TF32 and no autocast for float32.

Scoped rules, each restored on exit. The fused attention kernels of PyTorch have no forward mode and no second order,
and float64 is only float64 when the softmax runs in float64 too; the plain MATH kernel has all three. TF32 keeps 10
bits of mantissa, so a "float32" convolution or matmul on CUDA is off by about 1e-3 while it is on; autocast to bfloat16
keeps 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def exact_derivatives() -> Iterator[None]:
    """Compute attention with the MATH kernel: forward mode, second order and float64 then hold.

    Wrap every JVP, every double backward and every float64 evaluation. Plain forward + backward is better left to the
    fused kernels, which are faster and need less memory.

    Example:
        >>> import torch
        >>> from hf_equiv.precision import exact_derivatives
        >>> q = torch.randn(1, 1, 4, 8)
        >>> def f(x):
        ...     return torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> with exact_derivatives():
        ...     _, tangent = torch.func.jvp(f, (q,), (q,))
        >>> tuple(tangent.shape)
        (1, 1, 4, 8)

    References:
        PyTorch, `torch.nn.attention.sdpa_kernel`.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def no_tf32() -> Iterator[None]:
    """Switch TF32 off for float32 matmuls and convolutions on CUDA; the caller's settings come back on exit.

    Costs nothing on a CPU. On A100, H100 and H200 the default is TF32 for convolutions, and the patch embedding of a
    vision transformer is one.

    Example:
        >>> import torch
        >>> from hf_equiv.precision import no_tf32
        >>> before = torch.backends.cudnn.conv.fp32_precision
        >>> with no_tf32():
        ...     torch.backends.cudnn.conv.fp32_precision
        'ieee'
        >>> torch.backends.cudnn.conv.fp32_precision == before
        True

    References:
        PyTorch, "CUDA semantics: TensorFloat-32 (TF32) on Ampere devices".
    """
    switches = _tf32_switches()
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, off in switches:
            setattr(owner, name, off)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


@contextmanager
def no_autocast() -> Iterator[None]:
    """Leave `torch.autocast` for the products inside: float32 stays float32 whatever the caller's block asks for.

    Wrap the library's own float32 products, and the backward pass of f: PyTorch casts that by the block it runs in, not
    by the one f ran in. The call of f itself stays in the caller's block. Costs a microsecond where autocast is off.

    Example:
        >>> import torch
        >>> from hf_equiv.precision import no_autocast
        >>> a = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     product = a @ a
        ...     with no_autocast():
        ...         exact = a @ a
        >>> product.dtype, exact.dtype
        (torch.bfloat16, torch.float32)

    References:
        PyTorch, "Automatic Mixed Precision package - torch.amp".
    """
    with ExitStack() as rules:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                rules.enter_context(torch.autocast(device, enabled=False))
        yield


def with_autocast(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Make f what it is here wherever it is called: under the `torch.autocast` that holds now, also in `no_autocast`.

    Returns:
        f itself where no autocast holds.

    Example:
        >>> import torch
        >>> from hf_equiv.precision import no_autocast, with_autocast
        >>> def f(x):
        ...     return x @ x
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     same = with_autocast(f)
        ...     with no_autocast():
        ...         f(torch.ones(2, 2)).dtype, same(torch.ones(2, 2)).dtype
        (torch.float32, torch.bfloat16)
    """
    held = [(device, torch.get_autocast_dtype(device)) for device in _DEVICES if torch.is_autocast_enabled(device)]
    if not held:
        return f

    def call(x: Tensor) -> Tensor:
        with ExitStack() as rules:
            for device, dtype in held:
                rules.enter_context(torch.autocast(device, dtype=dtype))
            return f(x)

    return call


@contextmanager
def float64_softmax() -> Iterator[None]:
    """Keep a float64 softmax in float64: "eager" attention in transformers asks for float32 whatever the dtype.

    Needed only for models whose attention cannot be the fused or MATH kernel. Everything else is untouched.
    """
    with _Float64Softmax():
        yield


class _Float64Softmax(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.softmax and kwargs.get("dtype") is torch.float32:
            if args[0].dtype is torch.float64:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _tf32_switches() -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, value that means off) for matmul and convolution, in this PyTorch's own terms."""
    matmul: Any = torch.backends.cuda.matmul
    conv: Any = getattr(torch.backends.cudnn, "conv", None)
    if conv is not None and hasattr(conv, "fp32_precision"):
        # Reading the older `allow_tf32` flags raises while the newer ones differ between operators: never mix the two.
        return [(matmul, "fp32_precision", "ieee"), (conv, "fp32_precision", "ieee")]
    return [(matmul, "allow_tf32", False), (torch.backends.cudnn, "allow_tf32", False)]


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two images: along a row in their dtype, over the rows in float64.

    A row is short, so the rounding of a float32 product stays near 1e-7·Σ|aᵢbᵢ|, at half the time of float64 copies.

    Returns:
        Σ aᵢbᵢ.
    """
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))


def embedding_noise(f: Callable[[Tensor], Tensor], twin: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """‖f(x) − f₆₄(x)‖ / ‖f₆₄(x)‖ of each image against the float64 twin of f, (B,), float64; one image at a time."""
    floors = []
    with torch.no_grad():
        for image in images.split(1):
            exact = twin(image.double())
            floors.append((f(image).double() - exact).norm() / exact.norm())
    return torch.stack(floors)


def float64_twin(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor] | None:
    """Return the same function in float64 if f makes one, as an Encoder below float64 does.

    A `torch.nn.Module` is never asked: its `double()` would convert the caller's own weights.

    Returns:
        The twin, or None.
    """
    make = None if isinstance(f, torch.nn.Module) else getattr(f, "double", None)
    twin = make() if callable(make) else None
    return twin if callable(twin) and twin is not f else None
