"""Model the changes of an embedding by single steps of ±1/255: by J alone, or through image processors.

Broyden (1965), Math. Comp. 19:577.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_equiv.precision import no_autocast


class Steps:
    """The changes of an embedding by single steps of ±1/255, over the length of the target: ±J, a linear model."""

    def __init__(self, J: Tensor) -> None:
        self.J = J  # (D, N)
        self.norms2 = J.square().sum(dim=0).double()

    @property
    def finite(self) -> bool:
        """Whether J holds neither NaN nor infinity."""
        return bool(self.norms2.sum().isfinite())

    def geometry(self) -> tuple[Tensor, Tensor]:
        """Return `left_geometry` of J."""
        return left_geometry(self.J)

    def costs(self, levels: Tensor, r: Tensor) -> Tensor:
        """Return what each step from 8-bit levels (N,) adds to ‖r‖², (2, N): those of +1, then those of -1."""
        slope = self.slope(r)
        return torch.stack([self.norms2 + slope, self.norms2 - slope])

    def pick(self, costs: Tensor, steps: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the pixels whose steps cost least, of one step ±1 and its cost for each (N,); and 0: both ways."""
        index = costs.topk(count, largest=False).indices
        return index, torch.zeros_like(index)

    def mend(self, levels: Tensor, index: Tensor, ways: Tensor, steps: Tensor) -> Tensor:
        """Return steps whose effects add up: these do."""
        return steps

    def slope(self, r: Tensor) -> Tensor:
        """Return 2 Jᵀr, (N,)."""
        return 2 * (r.to(self.J) @ self.J)

    def columns(self, index: Tensor, ways: Tensor) -> Tensor:
        """Return the columns of some pixels (K,), (D, K) float64."""
        return self.J.index_select(1, index).double()

    def learn(self, levels: Tensor, index: Tensor, steps: Tensor, missed: Tensor) -> None:
        """Update J in moved pixels by Broyden's rule J ← J + missed·Δᵀ / ‖Δ‖²: J·Δ becomes the observed change."""
        steps = steps / steps.square().sum().clamp_min(1)
        columns = torch.addcmul(self.J.index_select(1, index).double(), missed[:, None], steps[None])
        self.J.index_copy_(1, index, columns.to(self.J))
        self.norms2[index] = columns.square().sum(dim=0)


class JointSteps:
    """The same for several encoders, of which some see the image through a processor that rounds to 8 bit.

    A single step changes such a view in a few levels or not at all, so its effect is J of that encoder times this exact
    change, and that of -1 is not the opposite of that of +1. `views` follow `data.resampling.View`; None for encoders
    that see the image itself.
    """

    def __init__(self, parts: Sequence[Steps], views: Sequence[Any], shape: torch.Size) -> None:
        self.parts, self.views, self.shape = parts, views, shape
        self.sizes = [len(part.J) for part in parts]
        # at the levels of the last `costs`
        self.flips: list[Any] = []
        self.own: list[Tensor] = []  # costs of each encoder alone
        self.open: list[bool] = []  # whether its view may move: the error of others is less

    @property
    def finite(self) -> bool:
        """Whether every J holds neither NaN nor infinity."""
        return all(part.finite for part in self.parts)

    def geometry(self) -> tuple[Tensor, Tensor]:
        """Return the `left_geometry` of each encoder by itself, as one matrix."""
        reach, whiten = zip(*(part.geometry() for part in self.parts), strict=True)
        return torch.block_diag(*reach), torch.block_diag(*whiten)

    def costs(self, levels: Tensor, r: Tensor) -> Tensor:
        """Return what each step adds to ‖r‖², (2, N), but for products of two levels of a view."""
        image = levels.view(self.shape)
        self.flips = [None if view is None else view.flips(image) for view in self.views]
        self.own, sizes = [], [float(own.norm()) for own in r.split(self.sizes)]
        most = max(size for size, view in zip(sizes, self.views, strict=True) if view is None)
        self.open = [view is not None and size > most for size, view in zip(sizes, self.views, strict=True)]
        for part, flips, view, own in zip(self.parts, self.flips, self.views, r.split(self.sizes), strict=True):
            if flips is None:
                self.own.append(part.costs(levels, own))
            else:
                slope, norms2 = (x.double().view(3, view.down.count, -1) for x in (part.slope(own), part.norms2))
                costs = [flips.weigh(slope, step) + flips.weigh(norms2, step, 2) for step in (1, -1)]
                self.own.append(torch.stack(costs).flatten(1))
        return torch.stack(self.own).sum(dim=0)

    def pick(self, costs: Tensor, steps: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return pixels whose steps move no view, and for each open view pixels that move different levels of it.

        With them, (K,), the only step ±1 that the latter may make, and 0 for the former.
        """
        # otherwise most pixels picked would move the same few levels
        which, found = (steps < 0).long()[None], list[Tensor]()
        count = count // (sum(self.open) + 1)
        for own, flips, is_open in zip(self.own, self.flips, self.open, strict=True):
            if flips is None:
                continue
            moves = (own != 0).any(dim=0)
            if is_open:
                own = own.gather(0, which)[0]
                ranked = own.masked_fill((own == 0) | costs.isinf(), math.inf)
                order = ranked.topk(min(8 * count, len(own)), largest=False).indices
                place, level, change = flips.entries(order, steps[order])
                first = place.diff(prepend=place.new_tensor([-1])) > 0
                place, key = place[first], (2 * level + (change > 0))[first]
                key, by_key = key.sort(stable=True)
                again = torch.ones_like(order, dtype=torch.bool)
                again[place[by_key[key.diff(prepend=key.new_tensor([-1])) > 0]]] = False
                found.append(order[again.long().argsort(stable=True)[:count]])
            costs = costs.masked_fill(moves, math.inf)
        index = torch.cat([costs.topk(count, largest=False).indices, *found])
        ways = steps[index].long()
        ways[:count] = 0
        return index, ways

    def columns(self, index: Tensor, ways: Tensor) -> Tensor:
        """Return the changes by single steps of some pixels, as `pick` returns them, (D, K) float64."""
        found = []
        for part, flips in zip(self.parts, self.flips, strict=True):
            if flips is None:
                found.append(part.columns(index, ways))
                continue
            place, level, change = flips.entries(index, ways)
            moved = part.columns(level, change) * (change * ways[place])
            found.append(moved.new_zeros((len(moved), len(index))).index_add_(1, place, moved))
        return torch.cat(found)

    def mend(self, levels: Tensor, index: Tensor, ways: Tensor, steps: Tensor) -> Tensor:
        """Drop steps that together change levels of a view otherwise than each by itself."""
        for view, flips in zip(self.views, self.flips, strict=True):
            while flips is not None:
                place, level, change = flips.entries(index, ways)
                moved = self._moved(view, levels, levels.index_add(0, index, steps))
                moved = moved.flatten().index_add(0, level, -change * steps[place].abs())
                seen = flips.pixels(moved.view(3, view.down.count, -1) != 0).flatten()[index]
                if not bool((seen & (steps != 0)).any()):
                    break
                steps = steps.masked_fill(seen, 0.0)
        return steps

    def _moved(self, view: Any, levels: Tensor, there: Tensor) -> Tensor:
        """Return the changes of the levels of a view, (3, h, w)."""
        before, after = (255 * view.levels_of((x / 255).view(1, *self.shape)) for x in (levels, there))
        return (after - before).round()[0]

    def learn(self, levels: Tensor, index: Tensor, steps: Tensor, missed: Tensor) -> None:
        """Update each J in moved pixels, or in the levels of its view that moved."""
        there = levels.index_add(0, index, steps)
        for part, view, own in zip(self.parts, self.views, missed.split(self.sizes), strict=True):
            if view is None:
                part.learn(levels, index, steps, own)
                continue
            change = self._moved(view, levels, there).flatten()
            moved = change.nonzero().flatten()
            part.learn(levels, moved, change[moved], own)


@no_autocast()
def left_geometry(J: Tensor) -> tuple[Tensor, Tensor]:
    """Return (D, D) matrices from J = U S Vᵀ (D, N): the projector on its reach, and its damped whitening."""
    # After a LayerNorm all embeddings lie on an ellipsoid, so r has a part across it, of second order in ‖r‖. No step
    # removes that part, and it vanishes as the rest does: U_k U_kᵀ with σ above 1e-4 σ₁, the float32 noise, projects it
    # away. In the whitened metric √μ·U (S² + μ)^(−1/2) Uᵀ, with μ a hundredth of the median σ², all directions of the
    # embedding cost alike; in the plain one the few that pixels hardly move (such as the score of the target's own
    # class) stay behind.
    scaled = J / torch.linalg.vector_norm(torch.stack(torch.aminmax(J)), ord=math.inf)
    values, vectors = torch.linalg.eigh((scaled @ scaled.T).nan_to_num().double())
    kept = vectors * (values > 1e-8 * values[-1])
    damping = 1e-2 * values.median()
    whiten = (vectors * (damping / (values.clamp_min(0) + damping)).sqrt()) @ vectors.T
    return kept @ kept.T, whiten
