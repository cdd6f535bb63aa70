"""Why singular values of an encoder's Jacobian are zero, or nearly so: names for what rounding alone cannot tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.geometry.singular import combine, times

_NEAR = 1e-3  # a predicted σ/σ₁ above this is a singular value like the others



@dataclass(frozen=True, slots=True)
class LeftRelation:
    """What the architecture says of J before J is known: leftᵀ J = rows.

    Attributes:
        cause: why, in a few words.
        left: (D, m), float64, linearly independent columns.
        rows: (m, N), float64, in closed form; None where they are exactly zero.
    """

    cause: str
    left: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Zero:
    """Singular values of J that are zero, or nearly so, for one reason.

    Attributes:
        cause: "LayerNorm centring", "LayerNorm epsilon", "head wider than its input", "unit norm", or "unexplained".
        count: how many singular values.
        predicted: their size in closed form, 0 for exact ones, in units of J; None without explanation.
        measured: the largest of them as found, in units of J: float noise where the prediction lies below it.
        left: their left singular vectors in closed form (D, count), orthonormal, float64; as found if unexplained.
    """

    cause: str
    count: int
    predicted: float | None
    measured: float
    left: Tensor


def explain_zeros(
    matrix: Tensor, left: Tensor, sigma: Tensor, threshold: float, relations: tuple[LeftRelation, ...]
) -> tuple[tuple[Zero, ...], tuple[Zero, ...]]:
    """Tell the exact zeros from the near-structural ones and from those without explanation.

    J = U diag(σ) Vᵀ. An exact relation leftᵀJ = 0 is accepted if ‖leftᵀU diag(σ)‖ ≤ threshold. Of a relation wᵀJ = r
    with small r the singular value is, to first order, the part of r that the rest of J cannot cancel:

        σ ≈ ‖r − P_rest r‖ / ‖w − P_exact w‖,

    with P_rest the projector on the other rows of J and P_exact that on the exact left null vectors. It depends on the
    large singular values only, so it is as good in float32 as in float64, where σ itself drowns in the noise.

    Args:
        matrix: J, (D, N).
        left: U, (D, D), float64.
        sigma: σ (D,), float64, descending.
        threshold: of the numerical rank, in units of J.
        relations: what is known of the encoder; empty for a plain callable.

    Returns:
        Exact zeros with the unexplained ones, and near-structural ones.
    """
    exact: list[Zero] = []
    near: list[Zero] = []
    known = left[:, :0]
    for relation in relations:
        if relation.rows is not None:
            continue
        fresh = _orthonormal(relation.left.to(left), known)
        measured = float(torch.linalg.matrix_norm((left.T @ fresh) * sigma[:, None], 2)) if fresh.numel() else 0.0
        if fresh.numel() and measured <= threshold:
            exact.append(Zero(relation.cause, fresh.shape[1], 0.0, measured, fresh))
            known = torch.cat([known, fresh], dim=1)
    below = int((sigma <= threshold).sum()) - known.shape[1]
    for relation in relations:
        index = len(sigma) - known.shape[1] - len(near) - 1
        if relation.rows is None or index < 0:
            continue
        w = relation.left.to(left)
        w = w - known @ (known.T @ w)
        rest = (sigma[:index] > threshold).nonzero().flatten()
        predicted = float((_off_rows(relation.rows, matrix, left[:, rest], sigma[rest]) / w.norm()).norm())
        if predicted <= _NEAR * float(sigma[0]) and float(sigma[index]) <= max(threshold, 2 * predicted):
            near.append(Zero(relation.cause, 1, predicted, float(sigma[index]), w / w.norm()))
            below -= int(sigma[index] <= threshold)
    if below > 0:
        spare = left[:, sigma <= threshold]
        explained = torch.cat([known, *(zero.left for zero in near if zero.measured <= threshold)], dim=1)
        spare = _orthonormal(spare, torch.linalg.qr(explained).Q)[:, :below]
        exact.append(Zero("unexplained", below, None, float(sigma[sigma <= threshold][0]), spare))
    return tuple(exact), tuple(near)


def _off_rows(rows: Tensor, matrix: Tensor, left: Tensor, sigma: Tensor) -> Tensor:
    """The rows (m, N) less their projection on span(leftᵀJ), whose singular values are `sigma`."""
    rest = rows.double().to(matrix.device)
    for _ in range(2):
        coefficients = (left.T @ times(matrix, rest.T)) / sigma[:, None].square()
        rest = rest - combine(matrix, left @ coefficients)
    return rest


def _orthonormal(columns: Tensor, known: Tensor) -> Tensor:
    """An orthonormal basis of the span of `columns` off the orthonormal `known`."""
    for _ in range(2):
        columns = columns - known @ (known.T @ columns)
    basis, lengths, _ = torch.linalg.svd(columns, full_matrices=False)
    return basis[:, lengths > 1e-6]
