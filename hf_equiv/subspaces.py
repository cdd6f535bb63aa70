"""Row and null space of a Jacobian: projections, angles between them, and what the patch embedding discards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.jacobian import Jacobian
from hf_equiv.precision import no_autocast, no_tf32
from hf_equiv.singular import combine, left_singular
from hf_equiv.spectrum import rank_rtol_of


@dataclass(frozen=True, slots=True)
class RowSpace:
    """The row space of J = U diag(σ) Vᵀ above its rank threshold: the directions that move the embedding.

    Its complement is the null space at this precision: P_null = I − VᵀV with the rows of V above the threshold.

    Attributes:
        basis: V, right singular vectors as rows, (R, N), orthonormal, in the dtype of the image.
        singular_values: σ of these rows, (R,), float64, descending.
        left: their left singular vectors, (D, R), float64.
        threshold: of the rank, in units of σ.
    """

    basis: Tensor
    singular_values: Tensor
    left: Tensor
    threshold: float

    @property
    def rank(self) -> int:
        """R."""
        return len(self.basis)

    def project_row(self, vectors: Tensor) -> Tensor:
        """Return the part VᵀV v of each v, which moves the embedding, to first order.

        Args:
            vectors: v, (…, C, H, W).

        Returns:
            (…, C, H, W), in the dtype of the basis.
        """
        return vectors - self.project_null(vectors)

    def project_null(self, vectors: Tensor) -> Tensor:
        """Return the part (I − VᵀV) v of each v, which leaves the embedding, to first order.

        Applied twice: what the rounding of the first leaves in the row space, the second takes away.

        Args:
            vectors: v, (…, C, H, W).

        Returns:
            (…, C, H, W), in the dtype of the basis.
        """
        rows = vectors.flatten(-3).reshape(-1, self.basis.shape[1]).to(self.basis)
        with no_tf32(), no_autocast():
            for _ in range(2):
                rows = torch.addmm(rows, rows @ self.basis.T, self.basis, alpha=-1)
        return rows.view(vectors.shape)

    def __repr__(self) -> str:
        """Name its rank, the pixels and the range of σ."""
        ends = "" if not self.rank else f", σ {self.singular_values[0]:.4g} to {self.singular_values[-1]:.4g}"
        return f"RowSpace({self.rank} of {self.basis.shape[1]} directions{ends}, threshold {self.threshold:.2g})"


def row_space(
    f: Callable[[Tensor], Tensor] | Jacobian,
    image: Tensor | None = None,
    *,
    rank_rtol: float | None = None,
    matrix: Tensor | None = None,
    batch: int = 32,
) -> RowSpace:
    """Return an orthonormal basis of the row space of J = ∂f/∂x at one image.

    Cost: (1 + 2D)/3 evaluations, unless `matrix` is given; memory 2·D·N numbers.

    Args:
        f: the encoder (1, C, H, W) -> (1, D), or its `Jacobian` at the image.
        image: x, (C, H, W), pixels in [0, 1]; None with a `Jacobian`.
        rank_rtol: threshold of the rank over σ₁; None for 1000 eps of the dtype (float32 1.2e-4, float64 2.2e-13).
        matrix: J (D, N), if it is at hand, also with columns set to zero.
        batch: most cotangents per pass.

    Returns:
        The rows above the threshold; none for a constant f.

    Raises:
        ValueError: `image` is missing, or J holds NaN or infinity.

    Example:
        >>> import torch
        >>> from hf_equiv.subspaces import row_space
        >>> rows = row_space(lambda x: x.flatten(1)[:, :2], torch.full((3, 1, 1), 0.5))
        >>> rows.project_null(torch.ones(3, 1, 1)).flatten().tolist()
        [0.0, 0.0, 1.0]
    """
    if isinstance(f, Jacobian):
        J = f
    elif image is None:
        raise ValueError("`image` must be (C, H, W); got None. Leave it out only with a `Jacobian`.")
    else:
        J = Jacobian(f, image, batch=batch)
        J.check_deterministic()
    if rank_rtol is not None:
        checks.check_range(rank_rtol, "rank_rtol", 0.0, 1.0)
    if matrix is None:
        matrix = J.as_matrix()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            "`f` must have a finite Jacobian; got NaN or infinity. Use float32 or float64, or another image."
        )
    left, sigma = left_singular(matrix)
    threshold = float(sigma[0]) * (rank_rtol_of(J.eps) if rank_rtol is None else rank_rtol)
    kept = sigma > threshold
    left, sigma = left[:, kept], sigma[kept]
    return RowSpace(combine(matrix, left / sigma, matrix.dtype), sigma, left, threshold)


def principal_angles(a: RowSpace, b: RowSpace) -> Tensor:
    """Return the principal angles between two row spaces: of two images, or of two encoders at one image.

    cos θ_i are the singular values of V_a V_bᵀ (Björck & Golub 1973); θ = atan2(sin, cos) with sin θ_i the length of
    the i-th principal vector of b off that of a, so that small angles are exact too.

    Args:
        a: row space of one Jacobian.
        b: of another, over the same N pixels; of any rank.

    Returns:
        θ (min(R_a, R_b),), ascending, in [0, π/2], float64, radians.

    Raises:
        ValueError: the two are of images of different size.

    References:
        Björck, Golub (1973), Math. Comp. 27:579.
    """
    if a.basis.shape[1] != b.basis.shape[1]:
        raise ValueError(
            f"`b` must be over the same pixels as `a`; got {b.basis.shape[1]} and {a.basis.shape[1]} of them. "
            "Use one image size."
        )
    cross = torch.zeros(a.rank, b.rank, dtype=torch.float64, device=a.basis.device)
    step = 4096
    for start in range(0, a.basis.shape[1], step):
        cross.addmm_(a.basis[:, start : start + step].double(), b.basis[:, start : start + step].double().T)
    Y, cosines, Zt = torch.linalg.svd(cross, full_matrices=False)
    gap = torch.zeros_like(cosines)
    for start in range(0, a.basis.shape[1], step):
        block = Zt @ b.basis[:, start : start + step].double()
        block -= cosines[:, None] * (Y.T @ a.basis[:, start : start + step].double())
        gap += block.square().sum(dim=1)
    return torch.atan2(gap.sqrt(), cosines)


def patch_null_space(weight: Tensor) -> Tensor:
    """Return the pixel patterns of one patch that the patch embedding maps to zero, at every image.

    For z_patch = W p with W (D, C·p²) there are at least C·p² − D of them: closed form, free of drift, and part of the
    null space at every image. Where W has full rank and C·p² ≤ D there are none.

    Args:
        weight: of the patch embedding, (D, C, p, p), per pixel in [0, 1]: divide by the standard deviations of the
            normalisation, as `Encoder.patch_weight` does.

    Returns:
        (M, C, p, p), orthonormal, float64.

    Raises:
        ValueError: `weight` is no finite (D, C, p, p).
    """
    if weight.ndim != 4 or not bool(torch.isfinite(weight).all()):
        raise ValueError(f"`weight` must be a finite tensor (D, C, p, p); got shape {tuple(weight.shape)}.")
    matrix = weight.detach().flatten(1).double()
    _, sigma, Vh = torch.linalg.svd(matrix, full_matrices=True)
    rank = int((sigma > max(matrix.shape) * torch.finfo(torch.float64).eps * sigma[0]).sum())
    return Vh[rank:].view(-1, *weight.shape[1:])
