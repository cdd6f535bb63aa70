"""The Jacobian J = ∂f/∂x of an encoder at one image, by vector–Jacobian products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_equiv.checks import check_output


def jacobian_matrix(f: Callable[[Tensor], Tensor], image: Tensor, *, chunk: int = 32) -> tuple[Tensor, Tensor]:
    """Form J at one image from D cotangents, `chunk` at a time.

    z = f(x) (D,), J[d, n] = ∂z_d / ∂x_n (D, N) with N = C·H·W. One forward pass and D backward passes: (1 + 2D)/3
    evaluations. Memory: D·N numbers and `chunk` times the activations of one image.

    Args:
        f: the encoder, (1, C, H, W) -> (1, D).
        image: x, (C, H, W), pixels in [0, 1].
        chunk: cotangents per backward pass; lower it where memory is short.

    Returns:
        z (D,) and J (D, N), both in the dtype of `image`.

    Raises:
        ValueError: f returns no (1, D), or no gradient.

    Example:
        >>> import torch
        >>> from hf_equiv.jacobian import jacobian_matrix
        >>> weight = torch.arange(6.0).view(2, 3)
        >>> z, J = jacobian_matrix(lambda x: x.flatten(1) @ weight.T, torch.ones(3, 1, 1))
        >>> torch.equal(J, weight)
        True
    """
    x = image.detach()[None].requires_grad_(True)
    with torch.enable_grad():
        output = f(x)
        check_output(output, 1)
        if not output.requires_grad:
            raise ValueError("`f` must be differentiable; got an output without a gradient. Drop no_grad or detach.")
        z = output[0]
    identity = torch.eye(z.shape[0], dtype=z.dtype, device=z.device)
    matrix = image.new_empty((z.shape[0], image.numel()))
    for start in range(0, z.shape[0], chunk):
        cotangents = identity[start : start + chunk]
        (rows,) = torch.autograd.grad(z, x, cotangents, is_grads_batched=True, retain_graph=True)
        matrix[start : start + chunk] = rows.flatten(1)
    return z.detach(), matrix


def jacobian_cost(num_rows: int) -> float:
    """Evaluations of one full Jacobian: one forward and `num_rows` cotangents, (1 + 2·num_rows) / 3."""
    return (1 + 2 * num_rows) / 3
