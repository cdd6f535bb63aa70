"""End a match by Newton steps: one Jacobian of each image, kept current by two-sided secants, in a trust region.

A ≈ J starts as the Jacobian at x. With r = f(x) − z, each step s minimises ‖r + As‖² + μ‖s‖² over the steps that stay
in the box, with the smallest μ of a table at which ‖s‖ ≤ Δ and not only noise of r is left. Its optimum has a
multiplier λ (D,):

    s = clip(x + Aᵀλ) − x,   As + μλ = −r,   solved by Newton's method in λ,   A ← A + (r⁺ − r − As) sᵀ/‖s‖² (Broyden).

The derivative of As + μλ is G + μ, with G = A_F A_Fᵀ of the pixels F that the clipping leaves alone. A step that is
only clipped loses half of its length or more: many pixels of a photo lie at a bound, most of them in a small L∞ ball.

x⁺ is accepted if the error falls in the metric ‖r‖² = rᵀ(G + μ)⁻¹r, which is the squared length of the step that it
still takes (the natural level function). In the plain metric a few sensitive directions of the embedding, which the
next step repairs, hide the progress of all others. If the decrease is less than 60 % of the decrease that A promised, A
learns the row combination uᵀJ(x⁺) of u ∝ (G + μ)⁻¹r⁺, on which the next step relies, by one backward pass.

Deuflhard (2004), Newton Methods for Nonlinear Problems, §3.3. Moré (1978), Lecture Notes in Math. 630 (trust region).
Schlenkrich, Griewank, Walther (2010), Math. Program. 121, eq. 4 (adjoint Broyden updates).
Qi, Sun (1993), Math. Program. 58:353 (Newton's method for piecewise smooth equations).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv.derivatives import vjps
from hf_equiv.jacobian import jacobians
from hf_equiv.matching.feasible import FeasibleSet, Rows
from hf_equiv.matching.linear_model import LinearModel
from hf_equiv.matching.solvers import pick
from hf_equiv.precision import Encoding, inner

_CUT = 1e-8  # share of the largest eigenvalue of G below which a direction is noise
_DAMPINGS = 64  # trial values of μ, over 20 decades
_CLIPS, _LEFT = 6, 1e-2  # most corrections of λ, and the share of ‖r‖ left that needs none
_GOOD, _POOR = 0.6, 0.25  # share of the promised decrease: no row is learnt above, the trust region shrinks below
_RIGHT = 0.7  # share from which it grows
_FAR = 20  # times the best error at which a point is refused
_PATIENCE = 60  # steps without half the error
_MOST = 300  # steps
_TINY = 1e-12  # radius of the trust region at which the steps end


@dataclass
class _State(Rows):
    x: Tensor  # (B, N)
    r: Tensor  # (f(x) − z)/‖z‖, (B, D) float64
    best: Tensor  # (B, N)
    error: Tensor  # of the best, (B,) float64
    radius: Tensor  # Δ, (B,)
    since: Tensor  # steps since the error last halved, (B,)
    mark: Tensor  # the error then, (B,) float64
    cost: Tensor  # thirds of an evaluation, (B,) int64


def end_by_newton(
    f: Encoding, images: Tensor, z: Tensor, feasible: FeasibleSet, goal: Tensor, most: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Bring images (B, *shape) near their targets z (B, D) to embedding errors of at most `goal` (B,).

    Args:
        f: the encoder.
        images: points with an embedding error of a few percent.
        z: target embeddings, float64.
        feasible: the box of the flat images (B, N).
        goal: embedding errors at which an image is done.
        most: thirds of an evaluation that each image may spend, at least those of a Jacobian and one step.

    Yields:
        After every step the best flat images (B, N), their errors, and the thirds of an evaluation spent (B,).
    """
    size = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    J = jacobians(f, images).div_(size[:, :, None].to(images))
    models = [LinearModel(A, A.shape[1:]) for A in J]
    finite = torch.tensor([model.finite for model in models], device=J.device)
    x = images.flatten(1)
    with torch.no_grad():
        r = (f(images).double() - z) / size
    error = torch.linalg.vector_norm(r, dim=1)
    spent = torch.full_like(most, 2 + 2 * z.shape[1])
    radius = torch.where(finite, math.inf, 0.0).to(error)
    at = _State(x, r, x, error, radius, torch.zeros_like(most), error, spent)
    best, errors, costs = x.clone(), error.clone(), spent.clone()
    left = torch.arange(len(images), device=images.device)
    yield best, errors, costs
    for _ in range(_MOST):
        going = (at.error > goal) & (at.since < _PATIENCE) & (at.cost + 3 <= most) & (at.radius > _TINY)
        kept = going.nonzero().flatten()
        if len(kept) < len(left):
            left, z, size, goal, most = left[kept], z[kept], size[kept], goal[kept], most[kept]
            at, feasible, models = at.keep(kept), feasible.keep(kept), [models[k] for k in kept.tolist()]
        if not len(kept):
            return
        _step(f, at, models, feasible, z, size, goal, images.shape)
        best[left], errors[left], costs[left] = at.best, at.error, at.cost
        yield best, errors, costs


def _step(
    f: Encoding, at: _State, models: list[LinearModel], feasible: FeasibleSet, z: Tensor, size: Tensor, goal: Tensor,
    shape: torch.Size,
) -> None:  # fmt: skip
    """Take one trial step of every image, and let its model learn from the result."""
    values, vectors = torch.linalg.eigh(torch.stack([model.G for model in models]))
    values = torch.where(values > _CUT * values[:, -1:], values, math.inf)  # 1/∞ leaves noise out
    part = _times(vectors.mT, at.r)
    damping = _damping(values, part, 0.5 * goal, at.radius)

    def solve(q: Tensor) -> Tensor:
        return _times(vectors, _times(vectors.mT, q) / (values + damping))

    def level(q: Tensor) -> Tensor:
        return torch.linalg.vector_norm(_times(vectors.mT, q) / (values + damping).sqrt(), dim=1)

    reachable = _times(vectors, torch.where(values.isinf(), 0.0, part))  # r without noise
    multipliers = -solve(at.r)
    moves = [
        _move(at.x[b], reachable[b], model, feasible.of(b, at.x[b].shape), multipliers[b], damping[b])
        for b, model in enumerate(models)
    ]
    x, moved = map(torch.stack, zip(*moves, strict=True))
    promised = at.r + moved
    step = x - at.x
    with torch.enable_grad():
        points = x.view(-1, *shape[1:]).requires_grad_(True)
        output = f(points)
    r = (output.detach().double() - z) / size
    surprise, length2 = r - promised, inner(step, step)
    now, then = level(at.r), level(r)
    share = (now - then) / (now - level(promised)).clamp_min(1e-300)
    finite = r.isfinite().all(dim=1)
    usable = finite & (length2 > 0)
    for b in usable.nonzero().flatten().tolist():
        models[b].update(surprise[b] / length2[b], step[b], moved[b])
    error = torch.linalg.vector_norm(r, dim=1)
    learns = usable & ~(share >= _GOOD) & (error > goal)
    if bool(learns.any()):
        u = solve(r)
        u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp_min(1e-300)
        rows = vjps(output, points, u.to(output)[None])[0].flatten(1) / size.to(x)
        for b in learns.nonzero().flatten().tolist():
            models[b].learn(u[b], rows[b])
    at.cost = at.cost + 1 + 2 * learns
    length = length2.sqrt()
    shorter = 0.5 * torch.minimum(at.radius, length)
    longer = torch.where(share > _RIGHT, 2 * at.radius, at.radius)
    at.radius = torch.where(finite & (share >= _POOR), longer, shorter)
    better = error < at.error
    accepted = finite & (then < now) & (error < _FAR * at.error)
    at.x, at.r = pick(accepted, x, at.x), pick(accepted, r, at.r)
    at.best, at.error = pick(better, x, at.best), torch.where(better, error, at.error)
    halved = at.error < 0.5 * at.mark
    at.since, at.mark = torch.where(halved, 0, at.since + 1), torch.where(halved, at.error, at.mark)


def _move(
    x: Tensor, r: Tensor, model: LinearModel, feasible: FeasibleSet, multiplier: Tensor, damping: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x + s = clip(x + Aᵀλ) (N,) and As (D,), with As + μλ = −r nearly, from a first λ (D,)."""
    for k in range(_CLIPS + 1):
        wanted = x + model.transpose(multiplier)
        there = feasible.project(wanted)
        moved = model.apply(there - x)
        left = moved + damping * multiplier + r
        model.hold(wanted == there)
        poor = torch.linalg.vector_norm(left) > _LEFT * torch.linalg.vector_norm(r)
        if k == _CLIPS or not bool(poor):
            break
        least = torch.maximum(damping, _CUT * model.G.trace())
        factor, failed = torch.linalg.cholesky_ex(model.G + torch.diag(least.expand(len(r))))
        change = torch.cholesky_solve(left[:, None], factor)[:, 0]
        if bool(failed) or not bool(change.isfinite().all()):  # no pixel is free
            break
        multiplier = multiplier - change
    return there, moved


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the products (B, M) of matrices (B, M, K) with vectors (B, K)."""
    return (matrices @ vectors[:, :, None])[:, :, 0]


def _damping(values: Tensor, part: Tensor, left: Tensor, radius: Tensor) -> Tensor:
    """Return the μ (B, 1) of a table that leaves a residual of `left`, or more if the step is longer than `radius`."""
    exponents = torch.linspace(-14, 6, _DAMPINGS, dtype=values.dtype, device=values.device)
    largest = values.masked_fill(values.isinf(), 0.0).amax(dim=1, keepdim=True)
    table = largest * 10**exponents  # (B, K), ascending
    weights = 1 / (values[:, None] + table[:, :, None])
    kept = torch.where(values.isinf(), 0.0, part)[:, None]
    residual = torch.linalg.vector_norm(kept * table[:, :, None] * weights, dim=2)
    lengths = torch.linalg.vector_norm(kept * torch.where(values.isinf(), 0.0, values).sqrt()[:, None] * weights, dim=2)
    small = (residual <= left[:, None]).sum(dim=1, keepdim=True) - 1
    index = torch.maximum(small, (lengths > radius[:, None]).sum(dim=1, keepdim=True))
    return table.gather(1, index.clamp(0, _DAMPINGS - 1))
