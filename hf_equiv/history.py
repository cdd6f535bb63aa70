"""The secant pairs of one image and the quasi-Newton direction that they give."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_equiv.feasible import dot


class SecantHistory:
    """The last `capacity` secant pairs (s, y) of one image and their inner products, for the L-BFGS direction.

    H = γI + [S, γY] M [S, γY]ᵀ, so a direction costs two passes over the stored vectors: their products with the
    gradient, and their sum. The products with the newest y = g′ − g are the difference of those with g′ and with g.
    Nothing else touches the long axis N.
    """

    def __init__(self, capacity: int, like: Tensor) -> None:
        self.capacity = capacity
        self.shape = like.shape
        self.pairs = like.new_empty((0, 2, like.numel()))  # grows in blocks: memory follows use
        self.order: list[int] = []
        # sᵢ·yⱼ, valid for i not newer than j, and yᵢ·yⱼ
        self.sy, self.yy = torch.zeros((2, capacity, capacity), dtype=torch.float64, device="cpu")
        self.unsettled: list[int] = []  # slots whose products are still missing, oldest first
        self.newest: tuple[Tensor, Tensor] | None = None  # the gradients whose difference the newest y is
        self.seen: tuple[Tensor, Tensor] | None = None  # the gradient of the last direction and its products

    def grow(self, limit: int) -> None:
        """Double the capacity, up to `limit`."""
        size, self.capacity = self.capacity, min(2 * self.capacity, limit)
        grown = torch.zeros((2, self.capacity, self.capacity), dtype=torch.float64, device="cpu")
        grown[0, :size, :size], grown[1, :size, :size] = self.sy, self.yy
        self.sy, self.yy = grown

    def clear(self) -> None:
        """Forget all pairs."""
        self.order, self.unsettled, self.newest, self.seen = [], [], None, None

    def add(self, s: Tensor, before: Tensor, after: Tensor) -> None:
        """Store the pair of a step s and the gradients at its ends, unless its curvature s·y is not safely positive."""
        y = after - before
        sy, yy, ss = dot(s, y), dot(y, y), dot(s, s)
        if not sy > 1e-10 * math.sqrt(ss * yy):
            return
        slot = self.order.pop(0) if len(self.order) == self.capacity else len(self.order)
        if slot >= self.pairs.shape[0]:
            grown = self.pairs.new_empty((min(self.capacity, slot + 20), 2, s.numel()))
            grown[: self.pairs.shape[0]] = self.pairs
            self.pairs = grown
        self.pairs[slot, 0], self.pairs[slot, 1] = s.flatten(), y.flatten()
        self.order.append(slot)
        self.sy[slot, slot], self.yy[slot, slot] = sy, yy
        self.unsettled = [other for other in self.unsettled if other != slot] + [slot]
        self.newest = (before, after)

    def direction(self, gradient: Tensor, free: Tensor) -> Tensor | None:
        """−H·gradient on the free pixels, or None without a history or without descent."""
        if not self.order:
            return None
        products = self._products(gradient.flatten())
        self._settle(gradient, products)
        self.seen = (gradient, products)
        g = (gradient * free).flatten()
        index = torch.tensor(self.order, device="cpu")
        products = self._without_held(products, gradient, g, free)[index]
        newest = self.order[-1]
        gamma = float(self.sy[newest, newest] / self.yy[newest, newest])
        r = torch.triu(self.sy[index][:, index])
        w = torch.linalg.solve_triangular(r, products[:, :1], upper=True)
        middle = (torch.diag(r.diagonal()) + gamma * self.yy[index][:, index]) @ w - gamma * products[:, 1:]
        a = torch.linalg.solve_triangular(r.T, middle, upper=False)
        weights = torch.empty((len(self.order), 2), dtype=torch.float64, device="cpu")
        weights[index] = torch.cat([a, -gamma * w], dim=1)
        step = torch.addmv(g, self._flat().T, weights.flatten().to(g), beta=-gamma, alpha=-1).view(self.shape) * free
        return step if dot(step, gradient) < 0.0 else None

    def _flat(self) -> Tensor:
        """s₀, y₀, s₁, y₁, … as rows."""
        return self.pairs[: len(self.order)].view(2 * len(self.order), -1)

    def _products(self, v: Tensor) -> Tensor:
        """(sᵢ·v, yᵢ·v) of every slot, (slots, 2), float64 on the CPU; of several columns v, (slots, 2, columns)."""
        return (self._flat() @ v).view(len(self.order), 2, *v.shape[1:]).to("cpu", torch.float64)

    def _settle(self, gradient: Tensor, products: Tensor) -> None:
        """Fill in the products of the pairs added since the last direction."""
        slots, self.unsettled = self.unsettled, []
        if not slots:
            return
        ends = (None, None) if self.newest is None else self.newest
        if len(slots) == 1 and self.seen is not None and ends[0] is self.seen[0] and ends[1] is gradient:
            earlier = torch.zeros_like(products)
            earlier[: len(self.seen[1])] = self.seen[1]
            columns = (products - earlier)[:, :, None]
        else:
            columns = self._products(self.pairs[slots, 1].T)
        count = len(self.order)
        for slot, column in zip(slots, columns.unbind(dim=2), strict=True):
            own = self.sy[slot, slot].item(), self.yy[slot, slot].item()
            self.sy[:count, slot] = column[:, 0]
            self.yy[:count, slot] = self.yy[slot, :count] = column[:, 1]
            self.sy[slot, slot], self.yy[slot, slot] = own

    def _without_held(self, products: Tensor, gradient: Tensor, g: Tensor, free: Tensor) -> Tensor:
        """The products with g, the gradient on the free pixels, from those with all of it."""
        held = (~free).flatten().nonzero().flatten()
        if len(held) == 0:
            return products
        if 16 * len(held) > len(g):
            return self._products(g)
        part = self._flat()[:, held] @ gradient.flatten()[held]
        return products - part.view(-1, 2).to("cpu", torch.float64)
