"""Singular values of a Jacobian: all of them from the matrix, or the largest from products with J and Jᵀ."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.jacobian import Jacobian

_BLOCK = 4096  # columns held in float64 at a time

# σ/σ₁ down to which a Gram matrix in float64 is trusted: its error in σ is eps₆₄·σ₁²/σ. A float32 J deserves less.
_SAFE = {torch.float64: 1e-2}

_SAFE_SINGLE = 1e-3
_NOTHING = 1e3  # eps over σ₁ below which a recursion has ended: what is left is the rounding of the products
_NEXT = 1  # values below the k wanted that must have converged too

# Share of the k-th value below which the largest of a second start tells, after 1, 2, … passes of it, that there is no
# more; after still more passes any does.
_NO_MORE = (0.0, 0.8, 0.88, 0.94)

ACCURACY = 100 * torch.finfo(torch.float64).eps
"""Error of `left_singular` over σ₁."""

_LEADING, _PROBES = 4, 2
_UNSEEN = 4.0  # a one-ulp change of the input repeats the random part of the rounding, not the systematic one

Rows = Callable[[Tensor], Tensor]
"""Cotangents (D, K), float64, to Jᵀu (K, N)."""



def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of J = U diag(σ) Vᵀ (D, N), in float64, whatever the dtype of J.

    The Gram matrix JJᵀ squares the small values away, so it is used for those above a hundredth of the largest only:
    the rest of J, U_restᵀJ, has a Gram matrix of its own scale, and so on down. Every σ is then within 100 eps₆₄·σ₁,
    at about a thirtieth of the cost of making J (D = 192, N = 150,528), and J is never copied. Of a J in float32 or
    less the rest (below σ₁/1000) is gone through once: it is then within 1e-10 σ₁.

    Returns:
        U (D, D) and σ (D,), descending, float64. For D > N the last D − N values are zero.

    References:
        Golub, Van Loan, "Matrix Computations", §8.6 (the Gram matrix squares the condition number).
    """
    dim = len(matrix)
    # squares neither overflow nor vanish in units of a power of two near the largest number
    least, most = torch.aminmax(matrix)
    unit = math.ldexp(1.0, math.frexp(max(-float(least), float(most)))[1])
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
        start = dim if again else start + int((values > _SAFE.get(matrix.dtype, _SAFE_SINGLE) * values[0]).sum())
    order = sigma.argsort(descending=True)
    return left[:, order], sigma[order] * unit


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The product J v (D, K) of v (N, K), accumulated in float64."""
    total = torch.zeros(len(matrix), vectors.shape[1], dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[1], _BLOCK):
        total.addmm_(matrix[:, start : start + _BLOCK].double(), vectors[start : start + _BLOCK].double())
    return total


def combine(matrix: Tensor, left: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The combinations of rows leftᵀ J (K, N) of left (D, K), each computed in float64."""
    out = torch.empty(left.shape[1], matrix.shape[1], dtype=dtype, device=matrix.device)
    for start in range(0, matrix.shape[1], _BLOCK):
        out[:, start : start + _BLOCK] = left.T @ matrix[:, start : start + _BLOCK].double()
    return out


def _gram(matrix: Tensor, left: Tensor | None, unit: float) -> Tensor:
    """The matrix (leftᵀJ)(leftᵀJ)ᵀ / unit² in float64: the lower half is computed, and mirrored."""
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
    """The k largest singular triplets found.

    Attributes:
        values: σ (k,), descending, float64.
        bound: on the distance of each to a singular value of J, (k,), float64.
        left: (D, k), float64.
        right: (k, N), float64.
        passes: products with Jᵀ; those with J are one more for each start, of which there are two or more.
    """

    values: Tensor
    bound: Tensor
    left: Tensor
    right: Tensor
    passes: int


def golub_kahan(J: Jacobian, k: int, rtol: float, *, seed: int = 0) -> TopSingular:
    """Find the k largest singular values by Golub–Kahan bidiagonalisation with full re-orthogonalisation.

    From u₁ = J·noise: JᵀU = V B with V orthonormal; B = Q diag(θ) Pᵀ gives θ ≤ σ and the residuals r = J(Vq) − θ(Up),
    measured from the products themselves. Some singular value lies within ‖r‖ of θ. The residuals are the coupling of
    JJᵀ between the Up and the rest of the space; where all but σ₁ … σ_m lie below α < θᵢ, i ≤ m, its Schur complement
    gives

        σᵢ² ≤ θᵢ² + Σ_{j=i…m} θⱼ²‖rⱼ‖² / (θᵢ² − α²),

    which is far smaller: Kato–Temple for m = i, and for larger m true to clusters. The bound is the smallest of all, α
    being the largest θ + ‖r‖ below.

    A Krylov space of one vector holds one vector of each multiple value, and may count values once that lie closer
    together than the residuals; all below them then move up. So once the bounds are small the recursion is begun anew
    from J·noise off what was found, until no value moves by more than rtol·σ₁ and the largest that the second recursion
    may have in what is left, (μ² + its residual)^½, is well below σ_k: after two passes below 0.8 of it, after four
    0.94, then anything. It stays no proof: the bounds hold for some singular values of J, and for the i-th unless a
    value has hardly a part in any start. The whole matrix has no such condition.

    A value whose vector has hardly a part in u₁ appears late, and until then the next lower one stands in its place. So
    k + 1 values must have converged, not k, and the second start helps here as well.

    On the spectra of 14 photos (trained DeiT-Tiny, k = 8, rtol 1e-4) one of 4,200 runs stated a value that its bound
    did not hold for (off by 2.2e-5 σ₁, said to be within 1.8e-5), in 22 passes (median; 95 % within 26). Made double or
    triple, one value or all, they were stated wrong in 6 of 2,520 runs. The shares above were chosen on these spectra.

    Cost: one JVP and one VJP a pass, and a JVP for each start.

    Returns:
        The triplets with their bounds.

    References:
        Golub, Kahan (1965), SIAM J. Numer. Anal. 2:205. Kato (1949), J. Phys. Soc. Jpn. 4:334. C.-K. Li, R.-C. Li
        (2005), Linear Algebra Appl. 395:183 (eigenvalues under a coupling that is small).
    """
    dim, size = J.shape
    device = J.image.device
    generator = torch.Generator().manual_seed(seed)

    def begin(basis: Tensor, scale: float) -> Tensor:
        """A start off the basis in which every singular vector has a part in proportion to its value."""
        noise = torch.randn(1, size, generator=generator, dtype=torch.float64).view(1, *J.image.shape)
        start, _, length = _orthogonalise(J.mv(noise.to(J.image))[0].double(), basis)
        if not length > _NOTHING * J.eps * scale:
            start = torch.randn(dim, generator=generator, dtype=torch.float64).to(device)
            start = _orthogonalise(start, basis)[0]
        return start

    U = torch.empty(0, dim, dtype=torch.float64, device=device)
    V = torch.empty(0, size, dtype=torch.float64, device=device)
    W = torch.empty(0, dim, dtype=torch.float64, device=device)  # rows J v
    B = torch.zeros(0, 0, dtype=torch.float64, device=device)
    scale, since, starts, tried = 0.0, 0, 1, False
    u = begin(U, scale)
    seen = torch.empty(0, dtype=torch.float64, device=device)  # the values at which the last recursion was left
    for passes in range(1, min(dim, size) + 1):
        U = torch.cat([U, u[None]])
        g = J.rmv(u[None])[0].flatten().double()
        v, coefficients, length = _orthogonalise(g, V)
        scale = max(scale, float(g.norm()))
        since += 1
        empty = since == 1 and not float(g.norm()) > _NOTHING * J.eps * scale  # a new start finds no more
        if not length > J.eps * scale:  # the row space is exhausted: any v will do, its coefficient is zero
            v, length = (
                _orthogonalise(torch.randn(size, generator=generator, dtype=torch.float64).to(device), V)[0],
                0.0,
            )
        B = torch.nn.functional.pad(B, (0, 1, 0, 1))
        B[:-1, -1], B[-1, -1] = coefficients, length
        V = torch.cat([V, v[None]])
        w = J.mv(v.view(1, *J.image.shape).to(J.image))[0].double()
        W = torch.cat([W, w[None]])
        Q, theta, Pt = torch.linalg.svd(B)
        rest = W.T @ Q - (U.T @ Pt.T) * theta
        residual = rest.norm(dim=0)
        bound = _bounds(theta, residual) + ACCURACY * theta[0]
        u, _, length = _orthogonalise(w, U)
        limit = rtol * float(theta[0])
        next_too = min(k + _NEXT, dim, size)
        done = passes > next_too and float(bound[:next_too].max()) <= limit
        ended = not length > _NOTHING * J.eps * scale
        if starts > 1 and not tried and passes >= k:
            tried = since > len(_NO_MORE) or _reach(B, since, length) < _NO_MORE[since - 1] * float(theta[k - 1])
        news = len(seen) < next_too or float((theta[:next_too] - seen).abs().max()) > limit
        if passes == min(dim, size) or (done and (empty or (tried and not ended and not news))):
            break
        if ended or (done and (starts == 1 or (tried and news))):
            u, since, starts, tried, seen = begin(U, scale), 0, starts + 1, False, theta[:next_too]
        elif tried:  # of several recursions, the one goes on whose value needs it most
            worst, _, length = _orthogonalise(rest[:, int(bound[:next_too].argmax())], U)
            u = worst if length > _NOTHING * J.eps * scale else u
    return TopSingular(theta[:k], bound[:k], (U.T @ Pt[:k].T), Q[:, :k].T @ V, passes)


def _reach(B: Tensor, since: int, length: float) -> float:
    """The largest value that the last columns of B (those of one recursion) have, with its residual, as far as known.

    Returns:
        (μ² + β)^½ with μ = ‖Jᵀu‖ at most, over the last `since` vectors u, and β the coupling to the next.
    """
    most = float(torch.linalg.matrix_norm(B[:, -since:], 2))
    return math.sqrt(most**2 + abs(float(B[-1, -1])) * length)


def _orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, float]:
    """The unit vector off the rows of `basis`, its coefficients in them, and its length, by Gram–Schmidt sweeps.

    Two sweeps are enough unless nearly all of the vector lies in the basis: then until a sweep takes nothing away.

    Returns:
        Vector, coefficients and length.
    """
    coefficients, rest, length = torch.zeros(len(basis)).to(basis), vector, float(vector.norm())
    for sweep in range(5):
        before, part = length, basis @ rest
        coefficients, rest = coefficients + part, rest - part @ basis
        length = float(rest.norm())
        if sweep > 0 and length > 0.9 * before:
            break
    return rest / (length or 1.0), coefficients, length


def _bounds(theta: Tensor, residual: Tensor) -> Tensor:
    """Bounds of the distance of each θ to a singular value, (K,), from θ (K,), descending, and ‖r‖ (K,)."""
    count = len(theta)
    below = (theta + residual)[1:].flip(0).cummax(0).values.flip(0)  # [m] bounds what lies below θ₁ … θ_m
    gap = theta[:, None].square() - below.square()  # (K, K − 1)
    coupling = (theta * residual).square()
    blocks = coupling[None].expand(count, count).triu().cumsum(1)[:, : count - 1]
    allowed = torch.ones_like(gap).triu().bool() & (gap > 0)
    quadratic = torch.where(allowed, blocks / (2 * theta[:, None] * gap), torch.inf)
    return torch.cat([residual[:, None], quadratic], dim=1).amin(dim=1)


# How far the singular values of a float Jacobian may be from those of the function in exact arithmetic.


def derivative_noise(
    f: Callable[[Tensor], Tensor], J: Jacobian, rows: Rows, left: Tensor, sigma: Tensor, threshold: float
) -> tuple[Tensor, str, float]:
    """Bound |σ(J) − σ(J₆₄)| of each singular value, from a few rows of the difference E = J − J₆₄.

    The rounding of a backward pass is nearly proportional to its result: ‖Eᵀu_i‖ ≤ a(σ_i + σ₁/50) for the left singular
    vectors, and then, by the minimax principle, the values differ by about as much. Measured are ‖Eᵀu‖ for the first
    four (their own bound, times 1.5), and for Σ s_i u_i / (σ_i + σ₁/50) over the values above `threshold` with random
    signs s, twice, whose mean square is that of the ratios. For the other values a is 3 times its root, or 1.5 times
    the largest ratio of the four where that is more: E is concentrated in few directions. Those below the threshold
    have 3 times ‖Eᵀ Σ s_i u_i‖. The reference is, in this order:

    * "float64 twin": f in float64: `f.double()` of an Encoder, a copy of an `nn.Module`, or f(float64 pixels) where
      that returns float64;
    * "perturbed input": f itself at the image with every pixel changed by one unit in the last place, which repeats all
      roundings at random (times 4, as systematic ones stay unseen). For float64, and for callables without twin.

    Returns:
        Bound (K,) in units of J, the method, and the evaluations spent.
    """
    reference, method = _reference(f, J)
    unit = math.ldexp(1.0, math.frexp(float(sigma[0]))[1])  # squares neither overflow nor vanish in it
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


def _reference(f: Callable[[Tensor], Tensor], J: Jacobian) -> tuple[Jacobian, str]:
    if J.eps > torch.finfo(torch.float64).eps:
        twin = getattr(f, "double", None)
        if isinstance(f, torch.nn.Module):  # its `double` works in place
            twin = copy.deepcopy(f).double
        try:
            reference = Jacobian(f if twin is None else twin(), J.image.double())
            if reference.eps == torch.finfo(torch.float64).eps:
                return reference, "float64 twin"
        except (RuntimeError, TypeError, ValueError):
            pass
    generator = torch.Generator().manual_seed(1)
    up = torch.randint(0, 2, J.image.shape, generator=generator, dtype=torch.int8).to(J.image.device) * 2.0 - 1.0
    return Jacobian(f, torch.nextafter(J.image, J.image + up.to(J.image))), "perturbed input"
