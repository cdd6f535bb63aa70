"""Name the causes of singular values that are zero or nearly so, which rounding alone cannot tell apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.geometry.singular import combine, times

_NEAR = 1e-3  # a predicted σ/σ₁ above this is a singular value like the others
_FAR = 1e-2  # a vector that reads less than this part of the least value above the threshold lies among the zeros


@dataclass(frozen=True, slots=True)
class LeftRelation:
    """A property of J that follows from the architecture: leftᵀ J = rows."""

    cause: str  # the reason, in a few words
    left: Tensor  # (D, m), float64, linearly independent columns
    rows: Tensor | None = None  # (m, N), float64, in closed form; None if they are exactly zero


@dataclass(frozen=True, slots=True)
class Zero:
    """Singular values of J that are zero, or nearly so, for one reason."""

    cause: str  # such as "LayerNorm centring", "head wider than its input" or "unit norm"; else "unexplained"
    count: int  # number of singular values
    predicted: float | None  # their size in closed form, 0 for exact ones, in units of J; None without explanation
    measured: float  # the largest one found, in units of J: float noise if the prediction lies below it
    left: Tensor  # their left singular vectors in closed form (D, count), orthonormal, float64; as found if unexplained


def explain_zeros(
    matrix: Tensor, left: Tensor, sigma: Tensor, threshold: float, relations: tuple[LeftRelation, ...]
) -> tuple[tuple[Zero, ...], tuple[Zero, ...]]:
    """Separate exact zeros, explained or not, from near-structural ones, by the known relations of the encoder."""
    # J (D, N) = U diag(σ) Vᵀ with U (D, D) and σ (D,), descending. An exact relation leftᵀJ = 0 is accepted if ‖leftᵀU
    # diag(σ)‖ is below the threshold or far below every value above it, since `left` is rounded too. For a relation
    # wᵀJ = r with small r the singular value is, to first order, the part of r that the rest of J cannot cancel, σ ≈
    # ‖r − P_rest r‖ / ‖w − P_exact w‖, with P_rest the projector on the other rows of J and P_exact the projector on
    # the exact left null vectors. It depends on the large singular values only, so it is as good in float32 as in
    # float64, although the noise hides σ itself.
    exact: list[Zero] = []
    near: list[Zero] = []
    known = left[:, :0]
    zeros = int((sigma <= threshold).sum())
    above = float(sigma[-zeros - 1]) if zeros < len(sigma) else 0.0
    for relation in relations:
        if relation.rows is not None:
            continue
        fresh = _orthonormal(relation.left.to(left), known)
        measured = float(torch.linalg.matrix_norm((left.T @ fresh) * sigma[:, None], 2)) if fresh.numel() else 0.0
        room = zeros - known.shape[1] - fresh.shape[1] >= 0
        if fresh.numel() and room and measured <= max(threshold, _FAR * above):
            exact.append(Zero(relation.cause, fresh.shape[1], 0.0, measured, fresh))
            known = torch.cat([known, fresh], dim=1)
    below = zeros - known.shape[1]
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
    """Return the rows (m, N) less their projection on span(leftᵀJ), whose singular values are `sigma`."""
    rest = rows.double().to(matrix.device)
    for _ in range(2):
        coefficients = (left.T @ times(matrix, rest.T)) / sigma[:, None].square()
        rest = rest - combine(matrix, left @ coefficients)
    return rest


def _orthonormal(columns: Tensor, known: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of `columns` off the orthonormal `known`."""
    for _ in range(2):
        columns = columns - known @ (known.T @ columns)
    basis, lengths, _ = torch.linalg.svd(columns, full_matrices=False)
    return basis[:, lengths > 1e-6]
