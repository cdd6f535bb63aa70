"""Multiply by J = ∂f/∂x and its transpose through autograd, and avoid the known faults of its backward passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_equiv.memory import unless_memory
from hf_equiv.precision import Encoding, no_autocast

_AXES = {torch.channels_last: 4, torch.channels_last_3d: 5}
_USUAL = (torch.contiguous_format, *_AXES)
_LAYOUTS: dict[Any, tuple[torch.memory_format, ...]] = {
    torch.batch_norm: _USUAL,
    torch.nn.functional.batch_norm: _USUAL,
    torch.instance_norm: _USUAL[:1],
    torch.nn.functional.instance_norm: _USUAL[:1],
}


def vjps(output: Tensor, variable: Tensor, cotangents: Tensor) -> Tensor:
    """Return the VJPs (K, *variable) of cotangents (K, *output), and keep the graph."""
    if len(cotangents) == 1:
        return torch.autograd.grad(output, variable, cotangents[0], retain_graph=True)[0][None]
    return torch.autograd.grad(output, variable, cotangents, retain_graph=True, is_grads_batched=True)[0]


def transposed(f: Encoding, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return u (B, D) and Jᵀu (B, *shape) at x (B, *shape) with the graph between them."""
    with torch.enable_grad():
        z = f(x)
        u = torch.zeros_like(z, requires_grad=True)
        with no_autocast():
            (gradient,) = torch.autograd.grad(z, x, u, create_graph=True)
    return u, gradient


def forward_mode(f: Encoding, x: Tensor, v: Tensor, name: str = "f") -> Tensor:
    """Return J v at x, both (B, *shape), by forward mode; an error calls f `name`."""
    try:
        moved: Tensor = torch.func.jvp(f, (x,), (v,))[1]
    except unless_memory(RuntimeError) as error:
        raise RuntimeError(
            f"`encoder` must have forward-mode derivatives for this; {name} does not "
            f"({' '.join(str(error).split())[:160]}). Use a method that needs gradients only, such as match_embedding, "
            "or another checkpoint."
        ) from error
    return moved


class PlainStrides(TorchFunctionMode):
    """Give batch norm and instance norm no tensors with strides for which their backward pass is wrong on a CPU."""

    # PyTorch 2.13 takes a tensor whose axes of size 1 have odd strides for channels-last in one place and for
    # contiguous in another. A single image whose features become tokens, `flatten(2).transpose(1, 2)`, sends back such
    # a gradient. Instance norm makes one image of the whole batch, so any layout but the contiguous one is odd there.
    used = False  # whether a tensor had such strides

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch; inputs and gradients of these norms get usual strides."""
        layouts = _LAYOUTS.get(func)
        if layouts is None:
            return func(*args, **(kwargs or {}))
        plain = partial(self._plain, layouts)
        out = func(*map(plain, args[:1]), *args[1:], **(kwargs or {}))
        if out.requires_grad:
            out.register_hook(plain)
        return out

    def _plain(self, layouts: tuple[torch.memory_format, ...], value: Tensor) -> Tensor:
        fitting = [layout for layout in layouts if value.ndim == _AXES.get(layout, value.ndim)]
        usual = [torch.empty(value.shape, device="meta", memory_format=layout).stride() for layout in fitting]
        if value.stride() in usual or (len(layouts) > 1 and 1 not in value.shape):
            return value
        self.used = True
        return value.clone(memory_format=torch.contiguous_format)
