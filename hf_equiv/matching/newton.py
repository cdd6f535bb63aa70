"""Bring images to their targets by Newton steps: one Jacobian of each, kept current by secants, in a trust region.

A ≈ J starts as the Jacobian at x. With r = f(x) − z, each step s minimises ‖r + As‖² + μ‖s‖² over the steps that stay
in the box, with the smallest μ of a table at which ‖s‖ ≤ Δ and not only noise of r is left. Its optimum has a
multiplier λ (D,):

    s = clip(x + Aᵀλ) − x,   As + μλ = −r,   solved by Newton's method in λ,   A ← A + (r⁺ − r − As) sᵀ/‖s‖² (Broyden).

The derivative of As + μλ is G + μ, with G = A_F A_Fᵀ of the pixels F that the clipping leaves alone. Without it, a
clipped step loses half of its length or more, for many pixels of a photo lie at a bound, and most of a small L∞ ball.

x⁺ is accepted if the error falls in the metric ‖r‖² = rᵀ(G + μ)⁻¹r, the squared length of the step that is still
to take (the natural level function): in the plain metric a few sensitive directions of the embedding, which the
next step repairs, hide the progress of all others. If the decrease is less than 60 % of what A promised, A learns
the row combination uᵀJ(x⁺) along u ∝ (G + μ)⁻¹r⁺, the direction that the next step relies on, by one backward pass.

Deuflhard (2004), Newton Methods for Nonlinear Problems, §3.3. Moré (1978), Lecture Notes in Math. 630 (trust region).
Schlenkrich, Griewank, Walther (2010), Math. Program. 121, eq. 4 (adjoint Broyden updates).
Qi, Sun (1993), Math. Program. 58:353 (Newton's method for piecewise smooth equations).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_equiv.derivatives import vjps
from hf_equiv.jacobian import jacobians
from hf_equiv.matching.feasible import FeasibleSet, Rows
from hf_equiv.matching.linear_model import LinearModel, hold_all
from hf_equiv.matching.solvers import pick
from hf_equiv.precision import Encoding, inner, times

_CUT = 1e-8  # share of the largest eigenvalue of G below which a direction is noise
_DAMPINGS = 64  # trial values of μ, over 20 decades
_CLIPS, _LEFT = 6, 1e-2  # most corrections of λ, and the share of ‖r‖ left that needs none
_GOOD, _POOR = 0.6, 0.25  # share of the promised decrease: no row is learnt above, the trust region shrinks below
_RIGHT = 0.7  # share from which it grows
_FAR = 20  # times the best error at which a point is refused
_PATIENCE = 60  # steps without half the error
_MOST = 300  # steps
_TINY = 1e-12  # radius of the trust region at which the steps end


class Newton(Rows):
    """Images on their way to their targets, with a linear model of f at each.

    Args:
        f: the encoder.
        images: points with an embedding error of a few percent, (B, *shape).
        z: target embeddings, (B, D) float64.
        box: the box of the flat images (B, N).
        goal: embedding errors at which an image is done, (B,).
        most: thirds of an evaluation that each image may spend, at least those of a Jacobian and one step, (B,).

    Attributes:
        best: the best flat images, (B, N).
        error: their embedding errors, (B,) float64.
        cost: thirds of an evaluation spent, (B,).
        models: A of each image, in units of the length of its target.
    """

    def __init__(self, f: Encoding, images: Tensor, z: Tensor, box: FeasibleSet, goal: Tensor, most: Tensor) -> None:
        self.f, self.shape, self.z, self.box, self.goal, self.most = f, images.shape[1:], z, box, goal, most
        self.size = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        J = jacobians(f, images)
        self.models = [LinearModel(A.div_(size), A.shape[1:]) for A, size in zip(J, self.size.to(J), strict=True)]
        self.cost = torch.full_like(most, 1 + 2 * z.shape[1])
        self.begin(images.flatten(1))

    def begin(self, x: Tensor) -> None:
        """Go on from the points x (B, N), with the models as they are."""
        with torch.no_grad():
            self.r = self._residual(self.f(x.view(-1, *self.shape)))  # (f(x) − z)/‖z‖
        self.x = self.best = x
        self.error = self.mark = torch.linalg.vector_norm(self.r, dim=1)
        self.cost = self.cost + 1
        finite = torch.stack([model.G for model in self.models]).isfinite().flatten(1).all(dim=1)
        self.radius = torch.where(finite, math.inf, 0.0).to(self.error)  # Δ; none without a model
        self.since = torch.zeros_like(self.cost)  # steps since the error last halved, from `mark`

    def run(self) -> Iterator[None]:
        """Take steps of all images that are not done; yield after each."""
        for _ in range(_MOST):
            going = (self.error > self.goal) & (self.since < _PATIENCE) & (self.cost + 3 <= self.most)
            index = (going & (self.radius > _TINY)).nonzero().flatten()
            if not len(index):
                return
            some = self.keep(index)
            some._step()
            for name in ("x", "r", "best", "error", "radius", "since", "mark", "cost"):
                setattr(self, name, getattr(self, name).index_copy(0, index, getattr(some, name)))
            yield

    def _residual(self, output: Tensor) -> Tensor:
        return (output.detach().double() - self.z) / self.size

    def _step(self) -> None:
        """Take one trial step of every image, and let its model learn from the result."""
        values, vectors = torch.linalg.eigh(torch.stack([model.G for model in self.models]))
        values = torch.where(values > _CUT * values[:, -1:], values, math.inf)  # 1/∞ leaves noise out
        part = times(vectors.mT, self.r)
        damping = _damping(values, part, 0.5 * self.goal, self.radius)

        def solve(q: Tensor) -> Tensor:
            return times(vectors, times(vectors.mT, q) / (values + damping))

        def level(q: Tensor) -> Tensor:
            return torch.linalg.vector_norm(times(vectors.mT, q) / (values + damping).sqrt(), dim=1)

        reachable = times(vectors, torch.where(values.isinf(), 0.0, part))  # r without noise
        x, moved = move(self.x, reachable, self.models, self.box, -solve(self.r), damping)
        promised, step = self.r + moved, x - self.x
        with torch.enable_grad():
            points = x.view(-1, *self.shape).requires_grad_(True)
            output = self.f(points)
        r = self._residual(output)
        error, length2 = torch.linalg.vector_norm(r, dim=1), inner(step, step)
        now, then = level(self.r), level(r)
        share = (now - then) / (now - level(promised)).clamp_min(1e-300)
        finite = error.isfinite()
        usable = finite & (length2 > 0)
        learns = usable & ~(share >= _GOOD) & (error > self.goal)
        wanted, rows_wanted = torch.stack([usable, learns]).tolist()
        for b in (b for b, use in enumerate(wanted) if use):
            self.models[b].update((r - promised)[b] / length2[b], step[b], moved[b])
        if any(rows_wanted):
            u = solve(r)
            u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp_min(1e-300)
            rows = vjps(output, points, u.to(output)[None])[0].flatten(1) / self.size.to(x)
            fine = rows.isfinite().all(dim=1).tolist()
            for b in (b for b, use in enumerate(rows_wanted) if use and fine[b]):
                self.models[b].update(u[b], rows[b] - self.models[b].transpose(u[b]))
        self.cost = self.cost + 1 + 2 * learns
        shorter = 0.5 * torch.minimum(self.radius, length2.sqrt())
        longer = torch.where(share > _RIGHT, 2 * self.radius, self.radius)
        self.radius = torch.where(finite & (share >= _POOR), longer, shorter)
        accepted = finite & (then < now) & (error < _FAR * self.error)
        self.x, self.r = pick(accepted, x, self.x), pick(accepted, r, self.r)
        better = error < self.error
        self.best, self.error = pick(better, x, self.best), torch.where(better, error, self.error)
        halved = self.error < 0.5 * self.mark
        self.since = torch.where(halved, 0, self.since + 1)
        self.mark = torch.where(halved, self.error, self.mark)


def move(
    x: Tensor, r: Tensor, models: Sequence[LinearModel], box: FeasibleSet, multiplier: Tensor, damping: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x + s = clip(x + Aᵀλ) (B, N) and As (B, D), with As + μλ = −r nearly, from a first λ (B, D)."""
    there, moved = torch.empty_like(x), torch.empty_like(r)
    places = torch.arange(len(x), device=x.device)  # whose λ may be corrected
    for k in range(_CLIPS + 1):
        some, at = [models[b] for b in places.tolist()], x[places]
        wanted = at + torch.stack([model.transpose(u) for model, u in zip(some, multiplier[places], strict=True)])
        inside = box.keep(places).project(wanted)
        change = torch.stack([model.apply(s) for model, s in zip(some, inside - at, strict=True)])
        there, moved = there.index_copy(0, places, inside), moved.index_copy(0, places, change)
        hold_all(some, wanted == inside)
        left = change + damping[places] * multiplier[places] + r[places]
        poor = torch.linalg.vector_norm(left, dim=1) > _LEFT * torch.linalg.vector_norm(r[places], dim=1)
        if k == _CLIPS:
            break
        G = torch.stack([model.G for model in some])
        least = torch.maximum(damping[places], _CUT * G.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True))
        factor, failed = torch.linalg.cholesky_ex(G + torch.diag_embed(least.expand_as(left)))
        change = torch.cholesky_solve(left[:, :, None], factor)[:, :, 0]
        solved = (poor & (failed == 0) & change.isfinite().all(dim=1)).nonzero().flatten()  # else no pixel is free
        if not len(solved):
            break
        places = places[solved]
        multiplier = multiplier.index_add(0, places, -change[solved])
    return there, moved


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
