"""Plan integer moves among the 8-bit images near a source: sparse integer least-squares problems of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_equiv.matching.feasible import Rows
from hf_equiv.matching.steps import JointSteps, Steps
from hf_equiv.precision import no_autocast, times

_ROUNDED = 1e-6  # relative tolerance: a float32 radius of k/255 is k whole steps
_CANDIDATES = 1280  # pixels considered in a round
WORKSPACE = 4 * (2 * _CANDIDATES + 1) ** 2  # bytes of the moves of an image
_LEADERS = 8  # first steps of the pairs considered at a time
_MENDS = 4  # plans of more steps in place of those that interact in views
_LOOK = 16  # pairs of steps between two looks of the host
_LEAST = 1e-5  # share of ‖r‖² that a pair of steps must remove
_POOR = 0.7  # share of ‖r‖ left, from which the plain metric alone is tried


@dataclass(frozen=True)
class Lattice(Rows):
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

    def holding(self, levels: Tensor, held: Tensor) -> Lattice:
        """Return the part of the lattice whose pixels equal `levels` where `held` (B, N)."""
        lower, upper = (torch.where(held, levels, bound) for bound in (self.lower, self.upper))
        return replace(self, lower=lower, upper=upper)

    def at(self, index: Tensor) -> Lattice:
        """Return the ranges and centres of some pixels (B, K) of each image."""
        lower, upper, center = (part.gather(1, index) for part in (self.lower, self.upper, self.center))
        return replace(self, lower=lower, upper=upper, center=center)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the nearest lattice points (B, N) of flat images, in the box alone."""
        return torch.minimum(torch.maximum((x.double() * 255).round(), self.lower), self.upper)

    def shrink(self, x: Tensor) -> Tensor:
        """Return flat images so far inside their L2 balls that rounding, by 1/12 of a squared step each, fits too."""
        if self.l2_budget is None:
            return x
        away = 255 * x.double() - self.center
        room = (self.l2_budget - (away != 0).sum(dim=1, keepdim=True) / 12).clamp_min(0)
        share = (room / away.square().sum(dim=1, keepdim=True).clamp_min(1e-300)).sqrt().clamp_max(1)
        return ((self.center + share * away) / 255).to(x)

    def round(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest lattice points (B, N), moved towards the centres into L2 balls; and whether they exist."""
        nearest = self.nearest(images.detach().flatten(1))
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


@dataclass(frozen=True, slots=True)
class Moves:
    """Steps of some pixels of each image, and the columns of J of these pixels."""

    index: Tensor  # pixels (B, K)
    columns: Tensor  # (B, D, K) float64
    steps: Tensor  # (B, K) float64


@no_autocast()
def plan_moves(
    models: Sequence[Steps | JointSteps], whiten: Tensor, r: Tensor, levels: Tensor, lattice: Lattice, goal: float,
    most: Tensor,
) -> Moves:  # fmt: skip
    """Return moves Δ that make ‖r + J·Δ‖ small: first in the whitened metric, then in the plain one.

    Where that leaves most of r, the plain metric alone may do better.

    Args:
        models: the changes by single steps at each image.
        whiten: the whitened metric, (B, D, D).
        r: (B, D).
        levels: lattice points to start from, (B, N).
        lattice: the points allowed.
        goal: norm of r + J·Δ that suffices.
        most: about the most steps in either metric, (B, 1).
    """
    index, ways = _candidates(models, r, levels, lattice)
    columns = torch.stack([model.columns(i, s) for model, i, s in zip(models, index, ways, strict=True)])
    room = None if lattice.l2_budget is None else lattice.l2_budget - lattice.used(levels)
    part, k = lattice.at(index), levels.gather(1, index)
    part = replace(part, lower=part.lower.where(ways < 1, k), upper=part.upper.where(ways > -1, k))
    none = torch.zeros_like(k)
    white = _Pursuit(whiten @ columns, times(whiten, r), k, part, room)
    steps = white.descend(none, 0.3 * goal, most)
    del white  # the largest tensor of a round
    plain = _Pursuit(columns, r, k, part, room)
    steps = plain.descend(steps, goal, most)
    left = plain.left(steps).norm(dim=1, keepdim=True)
    poor = left > (_POOR * r.norm(dim=1, keepdim=True)).clamp_min(goal)
    if bool(poor.any()):
        alone = plain.descend(none, goal, most * poor)
        steps = torch.where(poor & (plain.left(alone).norm(dim=1, keepdim=True) < left), alone, steps)
    joint = any(isinstance(model, JointSteps) for model in models)
    for last in (*[False] * _MENDS, True) if joint else ():
        seen = zip(models, levels, index, ways, steps, strict=True)
        mended = torch.stack([model.mend(*own) for model, *own in seen])
        lost = mended != steps
        if last or not bool(lost.any()):
            return Moves(index, columns, mended)
        bounds = plain.lattice
        plain.lattice = replace(bounds, lower=bounds.lower.where(~lost, k), upper=bounds.upper.where(~lost, k))
        steps = plain.descend(mended, goal, most)
    return Moves(index, columns, steps)


def _candidates(
    models: Sequence[Steps | JointSteps], r: Tensor, levels: Tensor, lattice: Lattice
) -> tuple[Tensor, Tensor]:
    """Return the pixels (B, K) whose step s = ±1 lowers ‖r‖² most, and the only way that each may go, or 0."""
    seen = zip(models, levels, r, strict=True)
    costs, down = torch.stack([model.costs(k, r_b) for model, k, r_b in seen]).min(dim=1)
    steps = 1.0 - 2.0 * down.to(levels)
    blocked = (levels + steps < lattice.lower) | (levels + steps > lattice.upper)
    costs, count = costs.masked_fill_(blocked, math.inf), min(_CANDIDATES, costs.shape[1])
    picked = [model.pick(c, s, count) for model, c, s in zip(models, costs, steps, strict=True)]
    index, ways = map(torch.stack, zip(*picked, strict=True))
    return index, ways


class _Pursuit:
    """Greedy descent of ‖r + A·Δ‖² over integer Δ (B, K), for A (B, D, K) and r (B, D).

    There are M = 2K + 1 moves: +1 or −1 of each pixel, and none. A move of column a costs ‖a‖² + 2aᵀ(r + AΔ), and
    changes the costs of the others by a row of 2(±A)ᵀ(±A), in float32, which is enough between two exact residuals. Of
    all pairs of moves that begin with one of the best few the best is made: the difference of two columns is much
    shorter than either.
    """

    def __init__(self, A: Tensor, r: Tensor, levels: Tensor, lattice: Lattice, room: Tensor | None) -> None:
        self.A, self.r, self.levels, self.lattice, self.room = A, r, levels, lattice, room
        narrow, count = A.float(), A.shape[2]
        block = 2 * narrow.mT @ narrow
        self.rows = block.new_empty((len(A), 2 * count + 1, 2 * count + 1))
        self.rows[:, -1] = self.rows[:, :, -1] = 0.0
        quarters = [part for half in self.rows[:, :-1].split(count, dim=1) for part in half[:, :, :-1].split(count, 2)]
        for part, sign in zip(quarters, (1, -1, -1, 1), strict=True):
            torch.mul(block, sign, out=part)
        diagonal = self.rows.diagonal(dim1=1, dim2=2)
        self.own = diagonal / 2
        diagonal[:, :-1] = math.inf  # a move is made once between two exact residuals
        self.batch = torch.arange(len(A), device=A.device)

    def left(self, steps: Tensor) -> Tensor:
        """Return r + A·Δ."""
        return self.r + times(self.A, steps)

    def descend(self, steps: Tensor, goal: float, most: Tensor) -> Tensor:
        """Add about `most` (B, 1) steps to Δ, until ‖r + A·Δ‖ is at most `goal` or no pair is worth it."""
        turns, going, kept = 0, most[:, 0] > 0, steps
        before = torch.full_like(most, math.inf)
        pairs = 2 * torch.arange(_LOOK, device=most.device)[:, None]
        while True:
            left = self.left(steps)
            size2 = left.square().sum(dim=1, keepdim=True)
            falls = size2 < before  # otherwise float32 misled the last steps
            steps = kept = torch.where(falls, steps, kept)
            going, before = going & (falls & (size2 > goal**2))[:, 0], size2
            if not bool(going.any()):
                return steps
            bars = torch.where(going & (turns + pairs < most[:, 0]), -_LEAST * size2[:, 0], -math.inf)
            moves, made = self._look(left, steps, bars.unbind())
            going, turns, count = made[:, 0], turns + 2 * _LOOK, steps.shape[1]
            taken = torch.zeros_like(self.own, dtype=steps.dtype).scatter_add_(1, moves, made.repeat(1, 2).to(steps))
            steps = steps + taken[:, :count] - taken[:, count:-1]

    def _look(self, left: Tensor, steps: Tensor, bars: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Choose a pair of moves for each bar (B,), to be made if its cost is lower; images that are done wait.

        Returns:
            The moves (B, 2L), all first ones before the second ones, and whether each pair was made (B, L).
        """
        k, none = self.levels + steps, torch.zeros_like(steps[:, :1])
        slope = 2 * times(self.A.mT, left).to(self.rows)
        blocked = torch.cat([k >= self.lattice.upper, k <= self.lattice.lower], dim=1)
        cost = torch.cat([slope, -slope], dim=1).masked_fill_(blocked, math.inf)
        cost, free, longer = self.own + torch.cat([cost, none.to(cost)], dim=1), self.room, none
        if free is not None:
            ahead = [self.lattice.longer(k, torch.full_like(k, sign)) for sign in (1, -1)]
            longer = torch.cat([*ahead, none], dim=1)
            free = free - self.lattice.longer(self.levels, steps).sum(dim=1, keepdim=True)
        firsts, seconds, made = [], [], []
        for bar in bars:
            change, first = _within(cost, longer, free).topk(min(_LEADERS, cost.shape[1]), largest=False)
            after = self.rows[self.batch[:, None], first].add_(cost[:, None])
            rest = None if free is None else (free - longer.gather(1, first))[:, :, None]
            least, second = _within(after, longer[:, None], rest).min(dim=2)
            least, best = least.add_(change).min(dim=1)
            going = least < bar
            one, two = first[self.batch, best], second[self.batch, best]
            there = after[self.batch, best] + self.rows[self.batch, two]
            cost = torch.where(going[:, None], there, cost)
            if free is not None:
                free = free - ((longer[self.batch, one] + longer[self.batch, two]) * going)[:, None]
            firsts.append(one)
            seconds.append(two)
            made.append(going)
        return torch.stack([*firsts, *seconds], dim=1), torch.stack(made, dim=1)


def _within(cost: Tensor, longer: Tensor, free: Tensor | None) -> Tensor:
    """Return the costs of moves, ∞ for those that need more room in an L2 ball than there is."""
    return cost if free is None else cost.masked_fill(longer > free, math.inf)
