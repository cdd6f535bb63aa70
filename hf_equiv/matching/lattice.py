"""Plan integer moves among the 8-bit images near a source: a sparse integer least-squares problem."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_equiv.precision import no_autocast, power_of_two

_ROUNDED = 1e-6  # relative tolerance: a float32 radius of k/255 is k whole steps
_CANDIDATES = 2048  # pixels considered at a time
_PAIRED = 512  # pixels among these considered for pairs of steps


@dataclass(frozen=True, slots=True)
class Lattice:
    """The integers k (N,) with k/255 in the box and the L∞ ball; an L2 ball bounds the sum of squares.

    Pixels whose centre is k/255 in its dtype measure distance in whole steps. Elsewhere distances refer to the
    floats k/255, and none exceeds the radius.
    """

    lower: Tensor  # range of each k, (N,) float64
    upper: Tensor  # range of each k, (N,) float64
    center: Tensor  # 255·c, (N,) float64
    places: Tensor  # position of each of the 256 levels: k itself, or 255 times the float k/255
    l2_budget: float  # largest squared distance in an L2 ball, in (1/255)²; infinite without a ball

    @classmethod
    def around(cls, image: Tensor, center: Tensor | None, radius: float | None, norm: str) -> Lattice:
        """Return the levels of `image`'s pixels that the ball about `center` allows, in units of 1/255."""
        c = (image if center is None else center).detach().flatten()
        level = (c.double() * 255).round()
        on_grid = (level / 255).to(c.dtype) == c
        middle = torch.where(on_grid, level, c.double() * 255)
        lower, upper, budget = torch.zeros_like(middle), torch.full_like(middle, 255), math.inf
        places = torch.arange(256, dtype=torch.float64, device=c.device)
        if radius is not None and norm == "l2":
            # Squares of whole steps are whole numbers, so a slightly larger radius admits no further point.
            budget = (radius * 255) ** 2 * (1 + 1e-9)
            if not bool(on_grid.all()):
                budget = (radius * 255) ** 2 * (1 - 1e-12)
                middle, places = c.double() * 255, (places / 255).to(c.dtype).double() * 255
        elif radius is not None:
            reach = radius * 255

            def outside(k: Tensor) -> Tensor:
                gap = torch.maximum((k / 255 - c.double()).abs(), ((k / 255).to(c.dtype).double() - c.double()).abs())
                return torch.where(on_grid, (k - level).abs() > reach * (1 + _ROUNDED), gap > radius)

            lower, upper = (middle - reach).floor(), (middle + reach).ceil()
            for _ in range(2):  # both bounds may be too far out by one or, after adverse rounding, by two
                lower, upper = lower + outside(lower), upper - outside(upper).double()
            lower, upper = lower.clamp(0, 255), upper.clamp(0, 255)
        return cls(lower, upper, middle, places, budget)

    def near(self, levels: Tensor, most: int) -> Lattice:
        """Return the part of the lattice within `most` steps of `levels` in every pixel."""
        return replace(
            self, lower=torch.maximum(self.lower, levels - most), upper=torch.minimum(self.upper, levels + most)
        )

    def round(self, image: Tensor) -> Tensor | None:
        """Return the nearest lattice point (N,), moved towards the centre into an L2 ball; None if there is none."""
        if bool((self.lower > self.upper).any()):
            return None
        levels = image.detach().flatten().double() * 255
        nearest = torch.minimum(torch.maximum(levels.round(), self.lower), self.upper)
        if self.used(nearest) <= self.l2_budget:
            return nearest
        # Undo the most expensive roundings, by one step towards the centre each, until the rest fits.
        inward = (self.center - self._place(nearest)).sign()
        saved = -self.longer(nearest, inward, self.center)
        order = saved.argsort(descending=True)
        total = self.used(nearest) - saved[order].cumsum(0)
        fits = (total <= self.l2_budget).nonzero()
        if not len(fits):
            level = self.center.round()
            return level if self.used(level) <= self.l2_budget else None
        count = int(fits[0]) + 1
        nearest[order[:count]] += inward[order[:count]]
        return nearest

    def used(self, levels: Tensor) -> float:
        """Return the squared distance to the centre, in (1/255)²; 0 without an L2 ball."""
        return 0.0 if self.l2_budget == math.inf else float((self._place(levels) - self.center).square().sum())

    def longer(self, levels: Tensor, steps: Tensor, center: Tensor) -> Tensor:
        """Return how much a step of each pixel alone adds to its squared distance to `center`."""
        here, there = self._place(levels) - center, self._place((levels + steps).clamp(0, 255)) - center
        return there.square() - here.square()

    def _place(self, levels: Tensor) -> Tensor:
        return self.places[levels.long()]


@no_autocast()
def left_geometry(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    """Return two (D, D) matrices from J = U S Vᵀ (D, N): a projector on its reach, and its damped whitening."""
    # After a LayerNorm all embeddings lie on an ellipsoid, so r has a part across it, of second order in ‖r‖. No step
    # removes that part, and it vanishes as the rest does: U_k U_kᵀ with σ above 1e-4 σ₁, the float32 noise, projects it
    # away. In the whitened metric √μ·U (S² + μ)^(−1/2) Uᵀ, with μ a hundredth of the median σ², all directions of the
    # embedding cost alike; in the plain one the few that pixels hardly move (such as the score of the target's own
    # class) stay behind.
    scaled = jacobian / power_of_two(float(jacobian.abs().max()))
    values, vectors = torch.linalg.eigh((scaled @ scaled.T).double())
    kept = vectors[:, values > 1e-8 * values[-1]]
    damping = 1e-2 * float(values.median())
    whiten = (vectors * (damping / (values.clamp_min(0) + damping)).sqrt()) @ vectors.T
    return kept @ kept.T, whiten


@no_autocast()
def plan_moves(
    jacobian: Tensor, whiten: Tensor, r: Tensor, levels: Tensor, lattice: Lattice, goal: float, most: int
) -> Tensor:
    """Return moves (N,) that make ‖r + J·Δ‖ small; if the plain metric stops short, try the whitened metric first."""
    moves = _integer_least_squares(jacobian, r, levels, lattice, goal, most)
    left = r + (jacobian @ moves.to(jacobian.dtype)).double()
    if float(left.norm()) <= max(goal, 0.2 * float(r.norm())):
        return moves
    first = _integer_least_squares(whiten.to(jacobian.dtype) @ jacobian, whiten @ r, levels, lattice, 0.3 * goal, most)
    between = r + (jacobian @ first.to(jacobian.dtype)).double()
    second = _integer_least_squares(jacobian, between, levels + first, lattice, goal, most)
    final = between + (jacobian @ second.to(jacobian.dtype)).double()
    return first + second if final.norm() < left.norm() else moves


def _integer_least_squares(
    jacobian: Tensor, r: Tensor, levels: Tensor, lattice: Lattice, goal: float, most: int
) -> Tensor:
    """Find integer moves Δ (N,) with small ‖r + J·Δ‖ greedily, by at most `most` steps; J is per 8-bit step."""
    # The step s = ±1 of pixel n lowers ‖r‖² by −2s·(Jᵀr)ₙ − ‖Jₙ‖². The best steps among the best few thousand pixels
    # are made until none is left; then all pixels are ranked afresh. If no single step lowers the norm, pairs are made:
    # the difference of two columns is much shorter.
    moves = torch.zeros_like(levels)
    norms2 = jacobian.square().sum(dim=0)
    used, in_ball = lattice.used(levels), lattice.l2_budget != math.inf
    for _ in range(50):
        objective = float(r @ r)
        if objective <= goal**2 or most <= 0:
            break
        slope = jacobian.T @ r.to(jacobian.dtype)
        here = levels + moves - slope.sign().double()
        gain = 2 * slope.abs() - norms2
        gain[(here < lattice.lower) | (here > lattice.upper)] = -math.inf
        value, index = gain.topk(min(_CANDIDATES, gain.numel()))
        paired = not bool(value[0] > 0)
        index = index[:_PAIRED][torch.isfinite(value[:_PAIRED])] if paired else index[value > 0]
        columns = jacobian[:, index].double()
        gram = columns.T @ columns
        c, k, center = columns.T @ r, (levels + moves)[index], lattice.center[index]
        lower, upper, taken = lattice.lower[index], lattice.upper[index], torch.zeros_like(c)
        threshold = 1e-12 * objective
        while most > 0 and objective > goal**2 and len(index):
            s = -c.sign()
            gains, there = 2 * c.abs() - gram.diagonal(), k + s
            gains.masked_fill_((there < lower) | (there > upper), -math.inf)
            if paired:  # in place: these matrices take nearly all the time
                gains = (gains[:, None] + gains).sub_((s[:, None] * gram).mul_(2 * s)).fill_diagonal_(-math.inf)
            if in_ball:
                longer = lattice.longer(k, s, center)
                longer = longer[:, None] + longer if paired else longer
                gains.masked_fill_(used + longer > lattice.l2_budget, -math.inf)
            best = int(gains.argmax())
            won = float(gains.flatten()[best])
            if not won > threshold:
                break
            used += float(longer.flatten()[best]) if in_ball else 0.0
            chosen = divmod(best, len(index)) if paired else (best,)
            c = c + sum(s[i] * gram[i] for i in chosen)
            for i in chosen:
                k[i] += s[i]
                taken[i] += s[i]
                most -= 1
            objective -= won
        if not bool(taken.any()):
            break
        moves[index] += taken
        r = r + columns @ taken
    return moves
