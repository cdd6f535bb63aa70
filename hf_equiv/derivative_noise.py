"""How far the singular values of a float Jacobian may be from those of the function in exact arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_equiv.jacobian import Jacobian

_LEADING, _PROBES = 4, 2
_UNSEEN = 4.0  # a one-ulp change of the input repeats the random part of the rounding, not the systematic one

Rows = Callable[[Tensor], Tensor]
"""Cotangents (D, K), float64, to Jᵀu (K, N)."""


def derivative_noise(
    f: Callable[[Tensor], Tensor], J: Jacobian, rows: Rows, left: Tensor, sigma: Tensor, threshold: float
) -> tuple[Tensor, str, float]:
    """Bound |σ(J) − σ(J₆₄)| of each singular value, from a few rows of the difference E = J − J₆₄.

    The rounding of a backward pass is nearly proportional to its result: ‖Eᵀu_i‖ ≤ a(σ_i + σ₁/50) for the left singular
    vectors, and then, by the minimax principle, the values differ by about as much. Measured are ‖Eᵀu‖ for the first
    four (their own bound, times 1.5), and for Σ s_i u_i / (σ_i + σ₁/50) over the values above `threshold` with random
    signs s, twice, whose mean square is that of the ratios. For the other values a is 3 times its root, or 1.5 times
    the largest ratio of the four where that is more: E is concentrated in few directions. Those below the threshold
    have 3 times ‖Eᵀ Σ s_i u_i‖. The reference is, in this order:

    * "float64 twin": f in float64: `f.double()` of an Encoder, a copy of an `nn.Module`, or f(float64 pixels) where
      that returns float64;
    * "perturbed input": f itself at the image with every pixel changed by one unit in the last place, which repeats all
      roundings at random (times 4, as systematic ones stay unseen). For float64, and for callables without twin.

    Returns:
        Bound (K,) in units of J, the method, and the evaluations spent.
    """
    reference, method = _reference(f, J)
    unit = math.ldexp(1.0, math.frexp(float(sigma[0]))[1])  # squares neither overflow nor vanish in it
    sigma, threshold = sigma / unit, threshold / unit
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (len(sigma), _PROBES + 1), generator=generator) * 2 - 1).to(sigma)
    above = sigma > threshold
    leading = min(_LEADING, int(above.sum()))
    sizes = sigma + 0.02 * sigma[0]
    relative = torch.where(above, 1 / sizes, 0.0)[:, None] * signs[:, :_PROBES]
    tail = torch.where(above, 0.0, 1.0)[:, None] * signs[:, _PROBES:]
    cotangents = torch.cat([left[:, :leading], left @ relative, left @ tail], dim=1)
    lengths = cotangents.norm(dim=0)
    cotangents = cotangents / lengths.where(lengths > 0, 1.0)
    noise = torch.zeros_like(lengths)
    asked = lengths > 0
    exact = reference.rmv(cotangents[:, asked].T.to(reference.image)).flatten(1).to(left)
    noise[asked] = ((rows(cotangents[:, asked]) - exact) / unit).norm(dim=1) * lengths[asked]
    if method == "perturbed input":
        noise = noise * _UNSEEN
    typical = float(noise[leading : leading + _PROBES].square().mean().sqrt()) / max(int(above.sum()), 1) ** 0.5
    a = max([3 * typical, *(1.5 * noise[:leading] / sizes[:leading].clamp_min(1e-300)).tolist()])
    bound = torch.where(above, a * sizes, 0.0) + 3 * noise[-1]
    bound[:leading] = 1.5 * noise[:leading]
    floor = 8 * J.eps if method == "perturbed input" else 100 * torch.finfo(torch.float64).eps
    return (bound + floor * sigma[0]) * unit, method, reference.num_evals


def _reference(f: Callable[[Tensor], Tensor], J: Jacobian) -> tuple[Jacobian, str]:
    if J.eps > torch.finfo(torch.float64).eps:
        twin = getattr(f, "double", None)
        if isinstance(f, torch.nn.Module):  # its `double` works in place
            twin = copy.deepcopy(f).double
        try:
            reference = Jacobian(f if twin is None else twin(), J.image.double())
            if reference.eps == torch.finfo(torch.float64).eps:
                return reference, "float64 twin"
        except (RuntimeError, TypeError, ValueError):
            pass
    generator = torch.Generator().manual_seed(1)
    up = torch.randint(0, 2, J.image.shape, generator=generator, dtype=torch.int8).to(J.image.device) * 2.0 - 1.0
    return Jacobian(f, torch.nextafter(J.image, J.image + up.to(J.image))), "perturbed input"
