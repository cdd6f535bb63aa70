"""The secant pairs of one image and the quasi-Newton direction that they give."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_equiv.feasible import dot


class SecantHistory:
    """The last `size` secant pairs (s, y) of one image and their inner products, for the L-BFGS direction.

    H = γI + [S, γY] M [S, γY]ᵀ, so a direction costs three products with the 2·`size` vectors: the gradient's, the
    newest y's, and their sum. Nothing else touches the long axis N.
    """

    def __init__(self, capacity: int, like: Tensor) -> None:
        self.capacity = capacity
        self.shape = like.shape
        self.pairs = like.new_empty((0, 2, like.numel()))  # grows in blocks: memory follows use
        self.order: list[int] = []
        # sᵢ·yⱼ, valid for i not newer than j, and yᵢ·yⱼ
        self.sy, self.yy = torch.zeros((2, capacity, capacity), dtype=torch.float64, device="cpu")
        self.unsettled: int | None = None  # the newest slot, while its products are still missing

    def grow(self, limit: int) -> None:
        """Double the capacity, up to `limit`."""
        size, self.capacity = self.capacity, min(2 * self.capacity, limit)
        grown = torch.zeros((2, self.capacity, self.capacity), dtype=torch.float64, device="cpu")
        grown[0, :size, :size], grown[1, :size, :size] = self.sy, self.yy
        self.sy, self.yy = grown

    def clear(self) -> None:
        """Forget all pairs."""
        self.order, self.unsettled = [], None

    def add(self, s: Tensor, y: Tensor) -> None:
        """Store a pair unless its curvature s·y is not safely positive."""
        sy, yy, ss = dot(s, y), dot(y, y), dot(s, s)
        if not sy > 1e-10 * math.sqrt(ss * yy):
            return
        self._settle()
        slot = self.order.pop(0) if len(self.order) == self.capacity else len(self.order)
        if slot >= self.pairs.shape[0]:
            grown = self.pairs.new_empty((min(self.capacity, slot + 20), 2, s.numel()))
            grown[: self.pairs.shape[0]] = self.pairs
            self.pairs = grown
        self.pairs[slot, 0], self.pairs[slot, 1] = s.flatten(), y.flatten()
        self.order.append(slot)
        self.sy[slot, slot], self.yy[slot, slot] = sy, yy
        self.unsettled = slot

    def _products(self, v: Tensor) -> Tensor:
        """(sᵢ·v, yᵢ·v) of every slot, (slots, 2), float64 on the CPU."""
        count = len(self.order)
        return (self.pairs[:count].view(2 * count, -1) @ v).view(count, 2).to("cpu", torch.float64)

    def _settle(self) -> None:
        """Fill in the newest pair's products."""
        if self.unsettled is None:
            return
        slot, self.unsettled = self.unsettled, None
        products, count, own = self._products(self.pairs[slot, 1]), len(self.order), float(self.sy[slot, slot])
        self.sy[:count, slot], self.sy[slot, slot] = products[:, 0], own
        self.yy[:count, slot] = self.yy[slot, :count] = products[:, 1]

    def direction(self, gradient: Tensor, free: Tensor) -> Tensor | None:
        """−H·gradient on the free pixels, or None without a history or without descent."""
        if not self.order:
            return None
        self._settle()
        g = (gradient * free).flatten()
        index = torch.tensor(self.order, device="cpu")
        products = self._products(g)[index]
        newest = self.order[-1]
        gamma = float(self.sy[newest, newest] / self.yy[newest, newest])
        r = torch.triu(self.sy[index][:, index])
        w = torch.linalg.solve_triangular(r, products[:, :1], upper=True)
        middle = (torch.diag(r.diagonal()) + gamma * self.yy[index][:, index]) @ w - gamma * products[:, 1:]
        a = torch.linalg.solve_triangular(r.T, middle, upper=False)
        weights = torch.empty((len(self.order), 2), dtype=torch.float64, device="cpu")
        weights[index] = torch.cat([a, -gamma * w], dim=1)
        flat = self.pairs[: len(self.order)].view(weights.numel(), -1)
        step = torch.addmv(g, flat.T, weights.flatten().to(g), beta=-gamma, alpha=-1).view(self.shape) * free
        return step if dot(step, gradient) < 0.0 else None
