"""Compute the singular values of a Jacobian: all of them from the matrix, or the largest from products with J and Jᵀ.

*The matrix.* The Gram matrix JJᵀ squares the small values away, so it serves only those above a hundredth of the
largest; the rest of J, U_restᵀJ, has a Gram matrix of its own scale, and so on down. The error of a σ is about 10
eps₆₄ σ₁²/σ, and for the rest σ₁/σ of the least that the first matrix served, which is up to 100 (`rounding`). The rest
of a J in float32 or less (below σ₁/1000) is treated once.

*Products.* Golub–Kahan bidiagonalisation with full re-orthogonalisation starts from u₁ = J·noise: JᵀU = V B with V
orthonormal; B = Q diag(θ) Pᵀ gives θ ≤ σ and the residuals r = J(Vq) − θ(Up), measured from the products themselves.
Some singular value lies within ‖r‖ of θ. The residuals couple the Up to the rest of the space; if all but σ₁ … σ_m lie
below α < θᵢ, i ≤ m, the Schur complement gives

    σᵢ² ≤ θᵢ² + Σ_{j=i…m} θⱼ²‖rⱼ‖² / (θᵢ² − α²),

which is far smaller: Kato–Temple for m = i, and valid for clusters with larger m. The bound is the smallest of all.

A Krylov space from one start vector contains one vector for each repeated singular value. It may therefore count a
cluster of values closer than the residuals only once. So once the bounds are small, the recursion starts anew from
J·noise orthogonal to the vectors found, until no value moves by more than rtol·σ₁ and the largest value that the second
recursion may still find is well below σ_k. This is no proof (docs/benchmark.md has error rates): a value may be missed
if its vector has almost no part in any start. The whole matrix has no such condition.

References: Golub, Van Loan, "Matrix Computations", §8.6. Golub, Kahan (1965), SIAM J. Numer. Anal. 2:205. Kato (1949),
J. Phys. Soc. Jpn. 4:334. C.-K. Li, R.-C. Li (2005), Linear Algebra Appl. 395:183.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.conditions import Function
from hf_equiv.memory import unless_memory
from hf_equiv.passes import Sight, Work, look
from hf_equiv.precision import power_of_two, resolved_step

ACCURACY = 100 * torch.finfo(torch.float64).eps  # error of the small matrices over σ₁

_BLOCK = 4096  # columns held in float64 at a time
_SAFE, _SAFE_SINGLE = 1e-2, 1e-3  # least σ/σ₁ read from a Gram matrix, for a float64 J and for any other
_GRAM = 10  # error of a value read from its Gram matrix, in units of eps σ₁²/σ
_NOTHING = 1e3  # eps over σ₁ below which a recursion ends: the rest is the rounding of the products
_NEXT = 1  # values below the k wanted that must have converged too
_NO_MORE = (0.0, 0.8, 0.88, 0.94)  # shares of σ_k: a new start that reaches less after 1, 2, … passes adds nothing
_PROBES, _DRAWS = 6, 2  # cotangents, and perturbed images that share them
_EVEN = 0.2  # part of the rounding, over σ₁, that does not shrink with σ
_CERTAIN, _RITZ = 5.0, 3.0  # margins of a norm measured by random cotangents, and along what they span
_UNSEEN = 4.0  # a change of the input repeats the random part of the rounding, not the systematic one


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (D, D) and σ (D,), descending, of J (D, N), in float64; for D > N the last D − N values are zero."""
    dim = len(matrix)
    least, most = torch.aminmax(matrix)
    unit = power_of_two(max(-float(least), float(most)))
    safe = _SAFE if matrix.dtype == torch.float64 else _SAFE_SINGLE
    left = torch.eye(dim, dtype=torch.float64, device=matrix.device)
    sigma = torch.zeros(dim, dtype=torch.float64, device=matrix.device)
    start = 0
    while start < dim:
        squares, vectors = torch.linalg.eigh(_gram(matrix, left[:, start:] if start else None, unit))
        values = squares.flip(0).clamp_min(0).sqrt()
        left[:, start:] = left[:, start:] @ vectors.flip(1)
        sigma[start:] = values
        if not float(values[0]) > torch.finfo(torch.float64).eps * float(sigma[0]):
            break
        again = start > 0 and matrix.dtype != torch.float64
        start = dim if again else start + int((values > safe * values[0]).sum())
    order = sigma.argsort(descending=True)
    return left[:, order], sigma[order] * unit


def rounding(matrix: Tensor, sigma: Tensor) -> Tensor:
    """Bound the error of the values σ (D,) that `left_singular` read from a matrix, (D,)."""
    # The eigenvectors of JJᵀ are off by about eps σ₁²/σ² and mix a value σ into the rest in proportion.
    safe = _SAFE if matrix.dtype == torch.float64 else _SAFE_SINGLE
    served = sigma[sigma > safe * sigma[0]].amin() if float(sigma[0]) > 0 else sigma[0]
    unit = power_of_two(float(sigma[0]))
    ratio = (sigma[0] / unit) / (torch.maximum(sigma, served) / unit).clamp_min(1e-300)
    return _GRAM * torch.finfo(torch.float64).eps * ratio * sigma[0]


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return the product J v (D, K) of v (N, K), accumulated in float64."""
    total = torch.zeros(len(matrix), vectors.shape[1], dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[1], _BLOCK):
        total.addmm_(matrix[:, start : start + _BLOCK].double(), vectors[start : start + _BLOCK].double())
    return total


def combine(matrix: Tensor, left: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the combinations of rows leftᵀ J (K, N) of left (D, K), each computed in float64."""
    out = torch.empty(left.shape[1], matrix.shape[1], dtype=dtype, device=matrix.device)
    for start in range(0, matrix.shape[1], _BLOCK):
        out[:, start : start + _BLOCK] = left.T @ matrix[:, start : start + _BLOCK].double()
    return out


def _gram(matrix: Tensor, left: Tensor | None, unit: float) -> Tensor:
    """Return (leftᵀJ)(leftᵀJ)ᵀ / unit² in float64: the lower half is computed and mirrored."""
    size = len(matrix) if left is None else left.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=matrix.device)
    strip = max(48, -(-size // 8))
    for start in range(0, matrix.shape[1], _BLOCK):
        block = matrix[:, start : start + _BLOCK].double() / unit
        rows = block if left is None else left.T @ block
        for first in range(0, size, strip):
            gram[first : first + strip, : first + strip].addmm_(rows[first : first + strip], rows[: first + strip].T)
    lower = gram.tril()
    return lower + lower.tril(-1).T


@dataclass(frozen=True, slots=True)
class TopSingular:
    """The k largest singular triplets found."""

    values: Tensor  # σ (k,), descending, float64
    bound: Tensor  # bound on the distance of each to a singular value of J, (k,), float64
    left: Tensor  # (D, k), float64
    right: Tensor  # (k, N), float64
    passes: int  # products with Jᵀ; products with J are one more for each start, of which there are two or more


def golub_kahan(J: Sight, k: int, rtol: float, *, seed: int = 0) -> Work[TopSingular]:
    """Find the k largest singular values by Golub–Kahan bidiagonalisation: one JVP and VJP a pass, one JVP a start."""
    dim, size = J.shape
    full = min(dim, size)
    next_too = min(k + _NEXT, full)
    basis = _Bidiagonal(J, seed)
    u, since, starts, tried = (yield from basis.start()), 0, 1, False
    seen = torch.empty(0, dtype=torch.float64, device=J.image.device)  # the values at the end of the last recursion
    for passes in range(1, full + 1):
        w, gain = yield from basis.extend(u)
        since += 1
        empty = since == 1 and not gain > basis.nothing  # a new start finds no more
        Q, theta, Pt = torch.linalg.svd(basis.B)
        rest = basis.W.T @ Q - (basis.U.T @ Pt.T) * theta
        bound = _bounds(theta, rest.norm(dim=0)) + ACCURACY * theta[0]
        u, _, length = _orthogonalise(w, basis.U)
        limit = rtol * float(theta[0])
        done = passes > next_too and float(bound[:next_too].max()) <= limit
        ended = not length > basis.nothing
        if starts > 1 and not tried and passes >= k:
            tried = since > len(_NO_MORE) or _reach(basis.B, since, length) < _NO_MORE[since - 1] * float(theta[k - 1])
        news = len(seen) < next_too or float((theta[:next_too] - seen).abs().max()) > limit
        if passes == full or (done and (empty or (tried and not ended and not news))):
            break
        if ended or (done and (starts == 1 or (tried and news))):
            u = yield from basis.start()
            since, starts, tried, seen = 0, starts + 1, False, theta[:next_too]
        elif tried:  # continue the recursion whose value needs it most
            worst, _, length = _orthogonalise(rest[:, int(bound[:next_too].argmax())], basis.U)
            u = worst if length > basis.nothing else u
    unit = basis.unit
    return TopSingular(theta[:k] * unit, bound[:k] * unit, (basis.U.T @ Pt[:k].T), Q[:, :k].T @ basis.V, passes)


class _Bidiagonal:
    """JᵀU = V B with orthonormal rows of U and V, and W = J V, in a unit in which squares are numbers."""

    def __init__(self, J: Sight, seed: int) -> None:
        self.J, self.scale, self.unit = J, 0.0, 0.0
        self.generator = torch.Generator().manual_seed(seed)
        self.eps = min(J.eps, torch.finfo(torch.float32).eps)  # in bfloat16 the values are noisy, but no less there
        dim, size = J.shape
        self.U, self.V, self.W = (
            torch.empty(0, length, dtype=torch.float64, device=J.image.device) for length in (dim, size, dim)
        )
        self.B = torch.zeros(0, 0, dtype=torch.float64, device=J.image.device)

    @property
    def nothing(self) -> float:
        """Length below which a vector is the rounding of the products."""
        return _NOTHING * self.eps * self.scale

    def start(self) -> Work[Tensor]:
        """Return a start off U in which every singular vector has a part in proportion to its value."""
        noise = self._gaussian(self.J.shape[1]).view(1, *self.J.image.shape)
        moved = (yield from self.J.mv(noise.to(self.J.image)))[0].double()
        self.unit = self.unit or power_of_two(float(moved.abs().max()))
        start, _, length = _orthogonalise(moved / self.unit, self.U)
        if length > self.nothing:
            return start
        return _orthogonalise(self._gaussian(self.J.shape[0]).to(self.U.device), self.U)[0]

    def extend(self, u: Tensor) -> Work[tuple[Tensor, float]]:
        """Add u and its v; return J v and ‖Jᵀu‖."""
        J = self.J
        self.U = torch.cat([self.U, u[None]])
        g = (yield from J.rmv(u[None]))[0].flatten().double() / self.unit
        v, coefficients, length = _orthogonalise(g, self.V)
        self.scale = max(self.scale, float(g.norm()))
        if not length > self.eps * self.scale:  # the row space is exhausted: any v will do, its coefficient is zero
            v, length = _orthogonalise(self._gaussian(J.shape[1]).to(self.U.device), self.V)[0], 0.0
        self.B = torch.nn.functional.pad(self.B, (0, 1, 0, 1))
        self.B[:-1, -1], self.B[-1, -1] = coefficients, length
        self.V = torch.cat([self.V, v[None]])
        w = (yield from J.mv(v.view(1, *J.image.shape).to(J.image)))[0].double() / self.unit
        self.W = torch.cat([self.W, w[None]])
        return w, float(g.norm())

    def _gaussian(self, size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)


def _reach(B: Tensor, since: int, length: float) -> float:
    """Return (μ² + β)^½, a limit of the values that the last `since` columns of B (one recursion) may reach."""
    # μ = ‖Jᵀu‖ at most, over the last `since` vectors u, and β is the coupling to the next.
    most = float(torch.linalg.matrix_norm(B[:, -since:], 2))
    return math.sqrt(most**2 + abs(float(B[-1, -1])) * length)


def _orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the unit vector off the rows of `basis`, its coefficients in them and its length, by Gram–Schmidt."""
    # Two sweeps are enough unless nearly all of the vector lies in the basis; then sweep until one takes nothing away.
    coefficients, rest, length = torch.zeros(len(basis)).to(basis), vector, float(vector.norm())
    for sweep in range(5):
        before, part = length, basis @ rest
        coefficients, rest = coefficients + part, rest - part @ basis
        length = float(rest.norm())
        if sweep > 0 and length > 0.9 * before:
            break
    return rest / (length or 1.0), coefficients, length


def _bounds(theta: Tensor, residual: Tensor) -> Tensor:
    """Return bounds of the distance of each θ (K,), descending, to a singular value, from its residuals ‖r‖ (K,)."""
    count = len(theta)
    below = (theta + residual)[1:].flip(0).cummax(0).values.flip(0)  # [m] bounds all values below θ₁ … θ_m
    gap = theta[:, None].square() - below.square()  # (K, K − 1)
    coupling = (theta * residual).square()
    blocks = coupling[None].expand(count, count).triu().cumsum(1)[:, : count - 1]
    allowed = torch.ones_like(gap).triu().bool() & (gap > 0)
    quadratic = torch.where(allowed, blocks / (2 * theta[:, None] * gap), torch.inf)
    return torch.cat([residual[:, None], quadratic], dim=1).amin(dim=1)


def derivative_noise(
    J: Sight, matrix: Tensor | None, left: Tensor, sigma: Tensor
) -> Work[tuple[Tensor, float, str, float]]:
    """Bound |σ(J) − σ(J₆₄)| of each value, (K,), and of a zero; return also the method and the evaluations spent."""
    # Let E = J − J₆₄ and s_i = σ_i + σ₁/5, since the rounding of a backward pass grows with its result.
    # With F = diag(1/s) UᵀE over an orthonormal basis of all u, ‖Eᵀu‖ ≤ ‖F‖₂ ‖diag(s) Uᵀu‖, and by the minimax
    # principle every value lies within ‖F‖₂ s_i. A few noisy directions may hold all of E, so no average over
    # directions bounds ‖F‖₂. But ‖F‖₂⁴ ≤ ‖FFᵀ‖² (Frobenius), which is the expectation of ⟨Fᵀω, Fᵀω′⟩² for independent
    # normal ω, ω′. Its mean over the pairs of six falls short by more than 5⁴ with probability 3e-4 if one direction
    # holds all of E, and never if many do. Off the K known vectors u, s is that of the last. With the matrix and a
    # twin, ‖FQ‖₂ ≤ ‖F‖₂ is measured too, with Q the span of the six Fᵀω, which holds most of a direction that stands
    # out.
    unit = power_of_two(float(sigma[0]))
    top = float(sigma[0]) / unit
    size = sigma / unit + _EVEN * (top or 1.0)
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(J.shape[0], _PROBES, generator=generator, dtype=torch.float64).to(left)
    cotangents = omega / size[-1] + left @ ((1 / size - 1 / size[-1])[:, None] * (left.T @ omega))
    if matrix is None:
        seen = (yield from J.rmv(cotangents.T)).flatten(1).double() / unit
    else:
        seen = combine(matrix, cotangents) / unit
    exact = (yield from in_double(J.f, J.image)) if J.eps > torch.finfo(torch.float64).eps else None
    method = "perturbed input" if exact is None else "float64 twin"
    if exact is None:
        rows, spent = yield from _beside(J, cotangents.T)
    else:
        rows, spent = (yield from exact.rmv(cotangents.T)), 0.0
    noise = seen - rows.flatten(1).to(left) / unit
    scale = power_of_two(float(noise.abs().max()))
    inner = (noise / scale) @ (noise / scale).T
    norm = _CERTAIN * scale * float(inner[~torch.eye(_PROBES).bool()].square().mean()) ** 0.25
    if matrix is not None and exact is not None:
        norm = min(norm, _RITZ * (yield from _along(matrix, exact, left / size, noise, unit)))
    floor = ACCURACY
    if exact is None:
        norm, floor = _UNSEEN * norm, 8 * J.eps
    else:
        spent = exact.num_evals
    zero = (norm * _EVEN + floor) * top / max(1 - norm, 1e-3)
    return (norm * size + floor * top) * unit, zero * unit, method, spent


def _along(matrix: Tensor, exact: Sight, weights: Tensor, noise: Tensor, unit: float) -> Work[float]:
    """Return ‖weightsᵀ E Q‖₂ with Q the span of rows of noise; infinity if there is no product with J in float64."""
    Q = torch.linalg.svd(noise, full_matrices=False).Vh
    try:
        moved = yield from exact.mv(Q.view(-1, *exact.image.shape))
    except unless_memory(RuntimeError):
        return math.inf
    return float(torch.linalg.matrix_norm(weights.T @ ((times(matrix, Q.T) - moved.T.to(weights)) / unit), 2))


def in_double(f: Function, image: Tensor) -> Work[Sight | None]:
    """Return the sight of an image with all arithmetic of f in float64; None if it cannot be computed so."""
    try:
        exact = yield from look(f.exact, image.double())
    except unless_memory(RuntimeError, TypeError, ValueError):
        return None
    return exact if exact.eps == torch.finfo(torch.float64).eps else None


def _beside(J: Sight, cotangents: Tensor) -> Work[tuple[Tensor, float]]:
    """Return Jᵀu of cotangents u (K, D), averaged around x, without the rounding of J; and the evaluations spent."""
    # Equal steps to either side repeat all roundings at random, and their mean has the derivative of x.
    step, passes = resolved_step(J.f, J.image, J.eps)
    generator, spent, rows = torch.Generator().manual_seed(1), passes / 3, []
    for some in cotangents.split(len(cotangents) // _DRAWS):
        up = torch.randint(0, 2, J.image.shape, generator=generator, dtype=torch.int8).to(J.image.device) * 2.0 - 1.0
        pair = []
        for sign in (1, -1):
            at = yield from look(J.f, J.image + sign * step * up.to(J.image))
            pair.append((yield from at.rmv(some)))
            spent += at.num_evals
        rows.append(torch.stack(pair).mean(dim=0))
    return torch.cat(rows), spent
