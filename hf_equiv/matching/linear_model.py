"""Keep a linear model of an encoder at one image current by rank-one updates, and solve with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CUT, _CUT_SINGLE = 1e-5, 1e-4  # share of σ₁ below which learnt rows are noise (up to 5e-5 in float32)
_BLOCKS = 32  # blocks of columns of A: each is multiplied in the dtype of A, and their products are summed in float64


class LinearModel:
    """A (D, N) ≈ J near the current point, with its Gram matrix G = A_F A_Fᵀ (D, D), float64, of the free pixels F.

    An update by u (D,) and v (N,) changes both, with w = v on F and zero elsewhere:

        A ← A + u vᵀ,      G ← G + u (A w)ᵀ + (A w) uᵀ + ‖w‖² u uᵀ.

    `learn` takes v = Jᵀu − Aᵀu with ‖u‖ = 1 and the J of another point. With u along the residual this is the adjoint
    Broyden method (Schlenkrich, Griewank, Walther 2010, Math. Program. 121, eq. 4). Memory: D·N numbers.
    """

    def __init__(self, matrix: Tensor, shape: torch.Size) -> None:
        self.A, self.shape = matrix, shape
        self.free = torch.ones(shape, dtype=torch.bool, device=matrix.device)
        self.G = self.A.new_zeros((len(self.A), len(self.A)), dtype=torch.float64)
        for columns in self.A.chunk(_BLOCKS, dim=1):
            self.G += columns @ columns.T
        self._factor: tuple[Tensor, Tensor] | None = None

    @property
    def finite(self) -> bool:
        """Whether A holds neither NaN nor infinity."""
        return bool(torch.isfinite(self.G.diagonal()).all())

    def hold(self, free: Tensor) -> None:
        """Let G count only the pixels where `free` (*shape) is true, which may move."""
        hold_all([self], free[None])

    def update(self, u: Tensor, v: Tensor, known: Tensor | None = None) -> None:
        """Add u vᵀ to A, for u (D,) and v (*shape); A v saves a pass over A if it is `known`."""
        u, moving = u.to(self.A).double(), v * self.free  # u as A stores it
        if known is None:
            product = self.apply(moving)
        else:
            held = (v != moving).flatten().nonzero()[:, 0]
            product = known - self.A.index_select(1, held) @ v.flatten()[held]
        self.G += torch.outer(u, product) + torch.outer(product, u)
        self.G += torch.linalg.vector_norm(moving, dtype=torch.float64).square() * torch.outer(u, u)
        self.A.addr_(u.to(self.A), v.flatten())
        self._factor = None

    def learn(self, u: Tensor, row: Tensor) -> None:
        """Set the row uᵀA to `row` (*shape), the uᵀJ of another point, if it is finite; ‖u‖ = 1 in the dtype of A."""
        if bool(torch.isfinite(row).all()):
            self.update(u, row - self.transpose(u))

    def apply(self, step: Tensor) -> Tensor:
        """Return A s of a step s (*shape), the predicted change of the embedding, (D,) float64."""
        product = step.new_zeros(len(self.A), dtype=torch.float64)
        blocks = 1 if step.is_cuda else _BLOCKS  # a GPU sums in blocks of its own
        for columns, part in zip(self.A.chunk(blocks, dim=1), step.flatten().chunk(blocks), strict=True):
            product += columns @ part
        return product

    def correction(self, residual: Tensor) -> Tensor:
        """Return the shortest step s = −A_Fᵀ G⁺ residual on the free pixels with residual + A s = 0."""
        return -self.transpose(self._solve(residual)) * self.free

    def multipliers(self, v: Tensor) -> Tensor:
        """Return λ (D,) = G⁺ A v_F, so that A_Fᵀ λ is the part of v (*shape) in the row space."""
        return self._solve(self.apply(v * self.free))

    def transpose(self, u: Tensor) -> Tensor:
        """Return Aᵀ u over all pixels, (*shape)."""
        return (self.A.T @ u.to(self.A)).view(self.shape)

    def project_null(self, v: Tensor) -> Tensor:
        """Return the part of v (*shape) on the free pixels that A maps to zero: twice v ← v − A_Fᵀ G⁺ A v."""
        for _ in range(2):
            v = (v - self.transpose(self.multipliers(v))) * self.free
        return v

    def _solve(self, r: Tensor) -> Tensor:
        """Return G⁺ r; eigenvalues of G below the cut count as zero."""
        if self._factor is None:
            values, vectors = torch.linalg.eigh(self.G)
            cut = _CUT if self.A.dtype == torch.float64 else _CUT_SINGLE
            kept = values > cut**2 * values[-1]
            self._factor = values[kept], vectors[:, kept]
        values, vectors = self._factor
        return vectors @ ((vectors.T @ r) / values)


def hold_all(models: Sequence[LinearModel], free: Tensor) -> None:
    """Let G of each model count only the pixels where `free` (B, *shape) is true: one wait for the device."""
    changed = (free != torch.stack([model.free for model in models])).flatten(1)
    places = changed.nonzero()[:, 1].split(changed.sum(dim=1).tolist())
    for model, mask, indices in zip(models, free, places, strict=True):
        model.free = mask
        for index in indices.split(1 + mask.numel() // _BLOCKS) if len(indices) else ():
            columns = model.A.index_select(1, index)
            model.G += torch.where(mask.flatten()[index], columns, -columns) @ columns.T
            model._factor = None
