"""Round matches to 8 bit in turn: sensitive pixels first, while the pixels that are left repair the embedding.

Rounding all pixels at once moves the embedding by 3e-3 to 1e-1: too far for J to hold if a match is less than 1/255
from its source. So the pixels are ordered by the norm of their columns of J, and half of them, the more sensitive,
are rounded and held. Newton steps of the others bring f(x) back to z; then half of these are rounded, and so on. The
last pixels, whose rounding nothing repairs, are the least sensitive ones. If f were linear and one pixel were rounded
at a time, this would be the nearest plane algorithm.

Babai (1986), Combinatorica 6:1 (nearest plane).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_equiv.matching.feasible import FeasibleSet
from hf_equiv.matching.lattice import Lattice
from hf_equiv.matching.newton import Newton
from hf_equiv.precision import Encoding

_LAST = 1280  # pixels that are rounded together in the end
_NEAR = 10  # times rtol: embedding error to which the others repair each rounding


def num_turns(size: int) -> int:
    """Return how often pixels are rounded and held in an image of `size` numbers, before the last ones."""
    return max(0, math.ceil(math.log2(size / _LAST)))


def round_in_turn(
    f: Encoding, images: Tensor, z: Tensor, lattice: Lattice, rtol: float, most: Tensor
) -> Iterator[Newton]:
    """Move matches to points that are 8-bit images but for the last, least sensitive pixels.

    Args:
        f: the encoder.
        images: matches, (B, *shape).
        z: their targets, (B, D) float64.
        lattice: the 8-bit images allowed.
        rtol: embedding error wanted.
        most: thirds of an evaluation that each image may spend, at least those of a Jacobian and its turns, (B,).

    Yields:
        The state of the images after every step.
    """
    lower, upper = ((bound / 255).to(images) for bound in (lattice.lower, lattice.upper))
    x = torch.clamp(lattice.shrink(images.flatten(1)), lower, upper)
    goal = torch.full_like(z[:, 0], _NEAR * rtol)
    turns = num_turns(x.shape[1])
    newton = Newton(f, x.view_as(images), z, FeasibleSet(lower, upper, x, batched=True), goal, most - turns)
    sizes = torch.stack([torch.linalg.vector_norm(model.A, dim=0) for model in newton.models])
    order, left = sizes.argsort(dim=1, descending=True, stable=True), x.shape[1]
    yield newton
    for _ in range(turns):
        left = max(left // 2, _LAST)
        held = order[:, :-left]
        fixed = (lattice.nearest(newton.best) / 255).to(x).gather(1, held)
        lower, upper, x = (part.scatter(1, held, fixed) for part in (lower, upper, newton.best))
        newton.box = FeasibleSet(lower, upper, x, batched=True)
        newton.begin(x)
        yield newton
        for _ in newton.run():
            yield newton


def round_into_ball(image: Tensor, source: Tensor, radius: float | None, norm: str) -> Tensor:
    """Round pixels (3, H, W) to k/255 without leaving the ball about a source that lies on the grid."""
    # Each value goes to the nearest level inside the linf ball. For l2, the values that rounding moved outwards at the
    # least gain go one level back, until the distance fits.
    levels, centre = image.double() * 255, (source.double() * 255).round()
    step = levels.round() - centre
    if radius is not None and norm == "linf":
        most = int(radius * 255 + 1e-9)
        step = step.clamp(-most, most)
    elif radius is not None:
        outwards = (step.abs() - (levels - centre).abs()).flatten().argsort(descending=True)
        flat = step.flatten()
        while (excess := float(flat.square().sum()) - (radius * 255) ** 2) > 0:
            order = outwards[flat[outwards] != 0]
            saved = (2 * flat[order].abs() - 1).cumsum(0)  # k² − (k−1)² for each value taken one level back
            back = order[: int((saved < excess).sum()) + 1]
            flat[back] -= flat[back].sign()
        step = flat.view_as(step)
    return ((centre + step).clamp(0, 255) / 255).to(image.dtype)
