"""Plan integer moves among the 8-bit images near a source: sparse integer least-squares problems of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_equiv.precision import no_autocast

_ROUNDED = 1e-6  # relative tolerance: a float32 radius of k/255 is k whole steps
_CANDIDATES = 1280  # pixels considered in a round
_FINE = 0.2  # share of r for which half of them are chosen, since later steps are finer
_LEADERS = 8  # first steps of the pairs considered at a time
_LOOK = 16  # pairs of steps between two looks of the host
_LEAST = 1e-5  # share of ‖r‖² that a pair of steps must remove
_POOR = 0.7  # share of ‖r‖ left, from which the plain metric alone is tried


@dataclass(frozen=True, slots=True)
class Lattice:
    """The integers k (B, N) with k/255 in the box and the L∞ ball; an L2 ball bounds the sum of squares.

    Images whose centre is k/255 in its dtype measure distance in whole steps. Elsewhere distances refer to the
    floats k/255, and none exceeds the radius.
    """

    lower: Tensor  # range of each k, (B, N) float64
    upper: Tensor  # range of each k, (B, N) float64
    center: Tensor  # 255·c, (B, N) float64
    places: Tensor  # position of each of the 256 levels: k itself, or 255 times the float k/255, (B, 256) float64
    l2_budget: Tensor | None  # largest squared distances in an L2 ball, in (1/255)², (B, 1); None without one

    @classmethod
    def around(cls, images: Tensor, centers: Tensor | None, radius: float | None, norm: str) -> Lattice:
        """Return the levels of the images (B, *shape) that the balls about `centers` allow, in units of 1/255."""
        c = (images if centers is None else centers).detach().flatten(1)
        level = (c.double() * 255).round()
        on_grid = (level / 255).to(c.dtype) == c
        middle = torch.where(on_grid, level, c.double() * 255)
        lower, upper, budget = torch.zeros_like(middle), torch.full_like(middle, 255), None
        places = torch.arange(256, dtype=torch.float64, device=c.device).expand(len(c), -1)
        if radius is not None and norm == "l2":
            # Squares of whole steps are whole numbers, so a slightly larger radius admits no further point.
            whole = on_grid.all(dim=1, keepdim=True)
            budget = (radius * 255) ** 2 * torch.where(whole, 1 + 1e-9, 1 - 1e-12).double()
            middle = torch.where(whole, middle, c.double() * 255)
            places = torch.where(whole, places, (places / 255).to(c.dtype).double() * 255)
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

    def near(self, levels: Tensor, most: Tensor) -> Lattice:
        """Return the part of the lattice within `most` (B, 1) steps of `levels` in every pixel."""
        return replace(
            self, lower=torch.maximum(self.lower, levels - most), upper=torch.minimum(self.upper, levels + most)
        )

    def of(self, images: list[int]) -> Lattice:
        """Return the lattices of some images of the batch."""
        lower, upper, center, places = (part[images] for part in (self.lower, self.upper, self.center, self.places))
        return Lattice(lower, upper, center, places, None if self.l2_budget is None else self.l2_budget[images])

    def at(self, index: Tensor) -> Lattice:
        """Return the ranges and centres of some pixels (B, K) of each image."""
        lower, upper, center = (part.gather(1, index) for part in (self.lower, self.upper, self.center))
        return replace(self, lower=lower, upper=upper, center=center)

    def round(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest lattice points (B, N), moved towards the centres into L2 balls; and whether they exist."""
        levels = (images.detach().flatten(1).double() * 255).round()
        nearest = torch.minimum(torch.maximum(levels, self.lower), self.upper)
        inside = (self.lower <= self.upper).all(dim=1)
        if self.l2_budget is None:
            return nearest, inside
        # Undo the most expensive roundings, by one step towards the centre each, until the rest fits.
        inward = (self.center - self._place(nearest)).sign()
        saved, order = (-self.longer(nearest, inward)).sort(dim=1, descending=True)
        used = self.used(nearest)
        total = torch.cat([used, used - saved.cumsum(dim=1)], dim=1)
        count = (total.cummin(dim=1).values > self.l2_budget).sum(dim=1, keepdim=True)
        undone = inward.gather(1, order) * (torch.arange(order.shape[1], device=order.device) < count)
        fits = count < total.shape[1]
        nearest = torch.where(fits, nearest.scatter_add(1, order, undone), self.center.round())
        return nearest, (self.used(nearest) <= self.l2_budget * (1 + 1e-13))[:, 0] & inside

    def used(self, levels: Tensor) -> Tensor:
        """Return the squared distances to the centres, in (1/255)², (B, 1)."""
        return (self._place(levels) - self.center).square().sum(dim=1, keepdim=True)

    def longer(self, levels: Tensor, steps: Tensor) -> Tensor:
        """Return how much a step of each pixel alone adds to its squared distance to the centre."""
        here, there = self._place(levels) - self.center, self._place((levels + steps).clamp(0, 255)) - self.center
        return there.square() - here.square()

    def _place(self, levels: Tensor) -> Tensor:
        return self.places.gather(1, levels.long())


@no_autocast()
def left_geometry(jacobians: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, D, D) matrices from J = U S Vᵀ (B, D, N): projectors on their reach, and their damped whitening."""
    # After a LayerNorm all embeddings lie on an ellipsoid, so r has a part across it, of second order in ‖r‖. No step
    # removes that part, and it vanishes as the rest does: U_k U_kᵀ with σ above 1e-4 σ₁, the float32 noise, projects it
    # away. In the whitened metric √μ·U (S² + μ)^(−1/2) Uᵀ, with μ a hundredth of the median σ², all directions of the
    # embedding cost alike; in the plain one the few that pixels hardly move (such as the score of the target's own
    # class) stay behind.
    grams = []
    for jacobian in jacobians:
        scaled = jacobian / torch.linalg.vector_norm(torch.stack(torch.aminmax(jacobian)), ord=math.inf)
        grams.append(scaled @ scaled.T)
    values, vectors = torch.linalg.eigh(torch.stack(grams).nan_to_num().double())
    kept = vectors * (values > 1e-8 * values[:, -1:])[:, None]
    damping = 1e-2 * values.median(dim=1, keepdim=True).values
    whiten = (vectors * (damping / (values.clamp_min(0) + damping)).sqrt()[:, None]) @ vectors.mT
    return kept @ kept.mT, whiten


@dataclass(frozen=True, slots=True)
class Moves:
    """Steps of some pixels of each image, and the columns of J of these pixels."""

    index: Tensor  # pixels (B, K)
    columns: Tensor  # (B, D, K) float64
    steps: Tensor  # (B, K) float64


@no_autocast()
def plan_moves(
    jacobians: Sequence[Tensor], norms2: Tensor, whiten: Tensor, r: Tensor, levels: Tensor, lattice: Lattice,
    goal: Tensor, most: Tensor,
) -> Moves:  # fmt: skip
    """Return moves Δ that make ‖r + J·Δ‖ small: first in the whitened metric, then in the plain one.

    Where that leaves most of r, the plain metric alone may do better.

    Args:
        jacobians: J of each image, per 8-bit step, B matrices (D, N).
        norms2: the squared norms of their columns, (B, N).
        whiten: the whitened metric, (B, D, D).
        r: (B, D).
        levels: lattice points to start from, (B, N).
        lattice: the points allowed.
        goal: norm of r + J·Δ that suffices, (B, 1).
        most: about the most steps in either metric, (B, 1).
    """
    index = _candidates(jacobians, norms2, r, levels, lattice)
    columns = torch.stack([J.index_select(1, i) for J, i in zip(jacobians, index, strict=True)]).double()
    room = None if lattice.l2_budget is None else lattice.l2_budget - lattice.used(levels)
    part, k = lattice.at(index), levels.gather(1, index)
    gram = _gram(columns)

    def descend(steps: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        steps = _descend(columns, gram, r, k, steps, part, room, goal, most)
        return steps, (r + apply(columns, steps)).norm(dim=1, keepdim=True)

    white, none = whiten @ columns, torch.zeros_like(k)
    first = _descend(white, _gram(white), apply(whiten, r), k, none, part, room, 0.3 * goal, most)
    steps, left = descend(first, most)
    poor = left > torch.maximum(goal, _POOR * r.norm(dim=1, keepdim=True))
    if bool(poor.any()):
        plain, other = descend(none, most * poor)
        steps = torch.where(poor & (other < left), plain, steps)
    return Moves(index, columns, steps)


def apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the products (B, M) of matrices (B, M, K) with vectors (B, K)."""
    return (matrices @ vectors[:, :, None])[:, :, 0]


def _candidates(jacobians: Sequence[Tensor], norms2: Tensor, r: Tensor, levels: Tensor, lattice: Lattice) -> Tensor:
    """Return the pixels (B, K) whose step s = ±1 lowers ‖r‖² most, by 2|Jᵀr|ₙ − ‖Jₙ‖²; half of them for a smaller r."""
    slope = torch.stack([r_b.to(J) @ J for r_b, J in zip(r, jacobians, strict=True)])
    there, slope = levels - slope.sign(), slope.abs()
    blocked = (there < lattice.lower) | (there > lattice.upper)
    count = min(_CANDIDATES, slope.shape[1])
    coarse = torch.sub(2 * slope, norms2).masked_fill_(blocked, -math.inf).topk(count // 2).indices
    fine = torch.sub(2 * _FINE * slope, norms2).masked_fill_(blocked, -1e300)
    fine.scatter_(1, coarse, -math.inf)  # once each
    return torch.cat([coarse, fine.topk(count - count // 2).indices], dim=1)


def _gram(columns: Tensor) -> Tensor:
    """Return 2AᵀA (B, K, K) in float32, which is enough between two exact residuals."""
    narrow = columns.float()
    return 2 * narrow.mT @ narrow


def _descend(
    columns: Tensor, gram: Tensor, r: Tensor, levels: Tensor, steps: Tensor, lattice: Lattice, room: Tensor | None,
    goal: Tensor, most: Tensor,
) -> Tensor:  # fmt: skip
    """Add integer steps Δ (B, K) that make ‖r + A·Δ‖ small greedily; images that are done wait for the others."""
    # A step s = ±1 of pixel n changes ‖r + AΔ‖² by s·cₙ + ‖Aₙ‖², with c = 2Aᵀ(r + AΔ), and c by s·Gₙ, with G = 2AᵀA.
    # Of all pairs of steps that begin with one of the best few, the best is made: the difference of two columns is much
    # shorter than either. The second step may be none.
    own, batch = gram.diagonal(dim1=1, dim2=2) / 2, torch.arange(len(r), device=r.device)[:, None]
    turns, going, kept = 0, most > 0, steps
    before = torch.full_like(goal, math.inf)
    while True:
        left = r + apply(columns, steps)
        slope, size2 = 2 * apply(columns.mT, left).to(gram), left.square().sum(dim=1, keepdim=True)
        falls = size2 < before  # otherwise float32 misled the last steps
        going, before = going & falls & (size2 > goal.square()), size2
        steps = kept = torch.where(falls, steps, kept)
        if not bool(going.any()):
            return steps
        least = _LEAST * size2
        for _ in range(_LOOK):
            k = levels + steps
            up, down = torch.where(k < lattice.upper, own, math.inf), torch.where(k > lattice.lower, own, math.inf)
            if room is not None:
                free = room - lattice.longer(levels, steps).sum(dim=1, keepdim=True)
                more, less = lattice.longer(k, torch.ones_like(k)), lattice.longer(k, -torch.ones_like(k))
                up, down = torch.where(more > free, math.inf, up), torch.where(less > free, math.inf, down)
            rise, fall = up + slope, down - slope
            change, lead = torch.minimum(rise, fall).topk(min(_LEADERS, k.shape[1]), largest=False)
            s = torch.where((rise > fall).gather(1, lead), -1.0, 1.0)[:, :, None]
            after = torch.addcmul(slope[:, None], s, gram[batch, lead])
            rise, fall = up[:, None] + after, down[:, None] - after
            if room is not None:
                free = (free - torch.where(s[:, :, 0] > 0, more.gather(1, lead), less.gather(1, lead)))[:, :, None]
                rise.masked_fill_(more[:, None] > free, math.inf)
                fall.masked_fill_(less[:, None] > free, math.inf)
            both = torch.minimum(rise, fall).scatter_(2, lead[:, :, None], 0.0).add_(change[:, :, None])
            won, best = both.flatten(1).min(dim=1, keepdim=True)
            going = going & (-won > least) & (most > turns)
            a, second = best // k.shape[1], best % k.shape[1]
            first, s = lead.gather(1, a), s[:, :, 0].gather(1, a) * going
            t = torch.where((rise > fall).flatten(1).gather(1, best), -1.0, 1.0) * (going & (first != second))
            slope = torch.addcmul(torch.addcmul(slope, s, gram[batch, first][:, 0]), t, gram[batch, second][:, 0])
            steps = steps.scatter_add(1, torch.cat([first, second], dim=1), torch.cat([s, t], dim=1).double())
            turns += 2
