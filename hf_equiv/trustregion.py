"""The quadratic subproblem of Newton's method: conjugate gradients inside a ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.feasible import dot

MAX_PRODUCTS = 40
"""Products with the Hessian, at most."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step p with what the quadratic model says of it.

    Attributes:
        step: p, of the shape of the gradient.
        slope: ⟨g, p⟩.
        curvature: ⟨p, H p⟩.
        bound: whether p ends on the sphere ‖p‖ = radius.
    """

    step: Tensor
    slope: float
    curvature: float
    bound: bool

    def gain(self, share: float) -> float:
        """What `share`·p gains in the model: share·⟨g, p⟩ − ½·share²·⟨p, H p⟩."""
        return share * self.slope - 0.5 * share**2 * self.curvature


def newton_step(hessian: Callable[[Tensor], Tensor], gradient: Tensor, radius: float, accuracy: float) -> Step:
    """Maximise ⟨g, p⟩ − ½⟨p, H p⟩ over ‖p‖ ≤ radius by truncated conjugate gradients.

    Starting along g, which is never made worse. Ends where ‖g − H p‖ ≤ accuracy·‖g‖, on the sphere, or, where H bends
    the other way, by going on to the sphere.

    Args:
        hessian: H, symmetric up to noise, in the space where g lies.
        gradient: g, of any shape, not zero.
        radius: of the ball.
        accuracy: of the solution, relative.

    Returns:
        The step.

    Example:
        >>> import torch
        >>> from hf_equiv.trustregion import newton_step
        >>> found = newton_step(lambda v: 4 * v, torch.tensor([2.0, 0.0]), 10.0, 0.1)
        >>> found.step, found.gain(1.0), found.bound
        (tensor([0.5000, 0.0000]), 0.5, False)

    References:
        Steihaug (1983), SIAM J. Numer. Anal. 20, 626–637. Nocedal, Wright (2006), Numerical Optimization, alg. 7.2.
    """
    p, image = torch.zeros_like(gradient), torch.zeros_like(gradient)
    residual = gradient.clone()
    search, size = residual.clone(), dot(residual, residual)
    enough, bound = accuracy**2 * size, False
    for _ in range(MAX_PRODUCTS):
        bent = hessian(search)
        curvature = dot(search, bent)
        length = size / curvature if curvature > 0 else math.inf
        ahead = _to_sphere(p, search, radius)
        bound = not length < ahead
        length = min(length, ahead)
        p, image = p + length * search, image + length * bent
        if bound:
            break
        residual = residual - length * bent
        before, size = size, dot(residual, residual)
        if size <= enough:
            break
        search = residual + (size / before) * search
    return Step(p, dot(gradient, p), dot(p, image), bound)


def _to_sphere(p: Tensor, v: Tensor, radius: float) -> float:
    """The t ≥ 0 with ‖p + t v‖ = radius."""
    a, b, c = dot(v, v), dot(p, v), dot(p, p) - radius**2
    root = math.sqrt(max(0.0, b * b - a * c))
    return (root - b) / a if b <= 0 else -c / (root + b)
