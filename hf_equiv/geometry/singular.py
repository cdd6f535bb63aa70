"""Compute the singular values of a Jacobian: all of them from the matrix, or the largest from products with J and Jᵀ.

*The matrix.* The Gram matrix JJᵀ squares the small values away, so it serves only those above a hundredth of the
largest; the rest of J, U_restᵀJ, has a Gram matrix of its own scale, and so on down. Every σ is then within 100
eps₆₄·σ₁. The rest of a J in float32 or less (below σ₁/1000) is treated once, which brings it within 1e-10 σ₁.

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

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.conditions import Function, as_function
from hf_equiv.jacobian import Jacobian
from hf_equiv.precision import Encoding, float64_twin, power_of_two

ACCURACY = 100 * torch.finfo(torch.float64).eps  # error of `left_singular` over σ₁

_BLOCK = 4096  # columns held in float64 at a time
_SAFE, _SAFE_SINGLE = 1e-2, 1e-3  # least σ/σ₁ read from a Gram matrix, for a float64 J and for any other
_NOTHING = 1e3  # eps over σ₁ below which a recursion ends: the rest is the rounding of the products
_NEXT = 1  # values below the k wanted that must have converged too
_NO_MORE = (0.0, 0.8, 0.88, 0.94)  # shares of σ_k: a new start that reaches less after 1, 2, … passes adds nothing
_LEADING, _PROBES = 4, 2
_UNSEEN = 4.0  # a one-ulp change of the input repeats the random part of the rounding, not the systematic one


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


def rank_threshold(J: Jacobian, largest: Tensor, rank_rtol: float | None) -> float:
    """Return the threshold of the rank, `rank_rtol` times σ₁; by default 1000 times the relative spacing of f."""
    # That is 1.2e-4 for float32 and 2.2e-13 for float64: twice or more the noise of encoders of a dozen layers
    # (DeiT-Tiny in float32 is within 7e-5 of σ₁, its zeros within 1e-7).
    return float(largest) * (min(1000 * J.eps, 0.1) if rank_rtol is None else rank_rtol)


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


def golub_kahan(J: Jacobian, k: int, rtol: float, *, seed: int = 0) -> TopSingular:
    """Find the k largest singular values by Golub–Kahan bidiagonalisation: one JVP and VJP a pass, one JVP a start."""
    dim, size = J.shape
    full = min(dim, size)
    next_too = min(k + _NEXT, full)
    basis = _Bidiagonal(J, seed)
    u, since, starts, tried = basis.start(), 0, 1, False
    seen = torch.empty(0, dtype=torch.float64, device=J.image.device)  # the values at the end of the last recursion
    for passes in range(1, full + 1):
        w, gain = basis.extend(u)
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
            u, since, starts, tried, seen = basis.start(), 0, starts + 1, False, theta[:next_too]
        elif tried:  # continue the recursion whose value needs it most
            worst, _, length = _orthogonalise(rest[:, int(bound[:next_too].argmax())], basis.U)
            u = worst if length > basis.nothing else u
    return TopSingular(theta[:k], bound[:k], (basis.U.T @ Pt[:k].T), Q[:, :k].T @ basis.V, passes)


class _Bidiagonal:
    """JᵀU = V B with orthonormal rows of U and V, and W = J V."""

    def __init__(self, J: Jacobian, seed: int) -> None:
        self.J, self.scale = J, 0.0
        self.generator = torch.Generator().manual_seed(seed)
        dim, size = J.shape
        self.U, self.V, self.W = (
            torch.empty(0, length, dtype=torch.float64, device=J.image.device) for length in (dim, size, dim)
        )
        self.B = torch.zeros(0, 0, dtype=torch.float64, device=J.image.device)

    @property
    def nothing(self) -> float:
        """Length below which a vector is the rounding of the products."""
        return _NOTHING * self.J.eps * self.scale

    def start(self) -> Tensor:
        """Return a start off U in which every singular vector has a part in proportion to its value."""
        noise = self._gaussian(self.J.shape[1]).view(1, *self.J.image.shape)
        start, _, length = _orthogonalise(self.J.mv(noise.to(self.J.image))[0].double(), self.U)
        if length > self.nothing:
            return start
        return _orthogonalise(self._gaussian(self.J.shape[0]).to(self.U.device), self.U)[0]

    def extend(self, u: Tensor) -> tuple[Tensor, float]:
        """Add u and its v; return J v and ‖Jᵀu‖."""
        J = self.J
        self.U = torch.cat([self.U, u[None]])
        g = J.rmv(u[None])[0].flatten().double()
        v, coefficients, length = _orthogonalise(g, self.V)
        self.scale = max(self.scale, float(g.norm()))
        if not length > J.eps * self.scale:  # the row space is exhausted: any v will do, its coefficient is zero
            v, length = _orthogonalise(self._gaussian(J.shape[1]).to(self.U.device), self.V)[0], 0.0
        self.B = torch.nn.functional.pad(self.B, (0, 1, 0, 1))
        self.B[:-1, -1], self.B[-1, -1] = coefficients, length
        self.V = torch.cat([self.V, v[None]])
        w = J.mv(v.view(1, *J.image.shape).to(J.image))[0].double()
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
    f: Encoding, J: Jacobian, rows: Encoding, left: Tensor, sigma: Tensor, threshold: float
) -> tuple[Tensor, str, float]:
    """Bound |σ(J) − σ(J₆₄)| of each singular value, (K,); return also the method and the evaluations spent."""
    # The rounding of a backward pass is nearly proportional to its result: ‖Eᵀu_i‖ ≤ a(σ_i + σ₁/50) with E = J − J₆₄
    # for the left singular vectors, and by the minimax principle the values then differ by about as much. ‖Eᵀu‖ is
    # measured for the first four (their own bound, times 1.5), and for Σ s_i u_i / (σ_i + σ₁/50) over the values above
    # `threshold` with random signs s, twice. For the other values a is 3 times the root mean square of these, or 1.5
    # times the largest ratio of the four if that is more, because E is concentrated in few directions. Values below the
    # threshold get 3 times ‖Eᵀ Σ s_i u_i‖.
    # The reference is f in float64, or f at the image with every pixel changed by one unit in the last place, which
    # repeats all roundings at random (times 4, as systematic ones stay unseen).
    reference, method = _reference(f, J)
    unit = power_of_two(float(sigma[0]))
    sigma, threshold = sigma / unit, threshold / unit
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (len(sigma), _PROBES + 1), generator=generator) * 2 - 1).to(sigma)
    above = sigma > threshold
    leading = min(_LEADING, int(above.sum()))
    sizes = sigma + 0.02 * sigma[0]
    relative = torch.where(above, 1 / sizes, 0.0)[:, None] * signs[:, :_PROBES]
    tail = torch.where(above, 0.0, 1.0)[:, None] * signs[:, _PROBES:]
    cotangents = torch.cat([left[:, :leading], left @ relative, left @ tail], dim=1)
    lengths = cotangents.norm(dim=0)
    cotangents = cotangents / lengths.where(lengths > 0, 1.0)
    noise = torch.zeros_like(lengths)
    asked = lengths > 0
    exact = reference.rmv(cotangents[:, asked].T.to(reference.image)).flatten(1).to(left)
    noise[asked] = ((rows(cotangents[:, asked]) - exact) / unit).norm(dim=1) * lengths[asked]
    if method == "perturbed input":
        noise = noise * _UNSEEN
    typical = float(noise[leading : leading + _PROBES].square().mean().sqrt()) / max(int(above.sum()), 1) ** 0.5
    a = max([3 * typical, *(1.5 * noise[:leading] / sizes[:leading].clamp_min(1e-300)).tolist()])
    bound = torch.where(above, a * sizes, 0.0) + 3 * noise[-1]
    bound[:leading] = 1.5 * noise[:leading]
    floor = 8 * J.eps if method == "perturbed input" else 100 * torch.finfo(torch.float64).eps
    return (bound + floor * sigma[0]) * unit, method, reference.num_evals


def _reference(f: Encoding, J: Jacobian) -> tuple[Jacobian, str]:
    if J.eps > torch.finfo(torch.float64).eps:
        try:
            # `double` of a module works in place.
            plain = f.plain if isinstance(f, Function) else f
            twin = copy.deepcopy(plain).double() if isinstance(plain, torch.nn.Module) else float64_twin(f) or f
            reference = Jacobian(as_function(twin), J.image.double())
            if reference.eps == torch.finfo(torch.float64).eps:
                return reference, "float64 twin"
        except (RuntimeError, TypeError, ValueError):
            pass
    generator = torch.Generator().manual_seed(1)
    up = torch.randint(0, 2, J.image.shape, generator=generator, dtype=torch.int8).to(J.image.device) * 2.0 - 1.0
    return Jacobian(f, torch.nextafter(J.image, J.image + up.to(J.image))), "perturbed input"
