"""Derive properties of f and its Jacobian from the last LayerNorm of a model and the layers after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_equiv.checks import check_dimension
from hf_equiv.geometry.zeros import LeftRelation
from hf_equiv.precision import Encoding, no_autocast, no_tf32

_INSIDE = 1e-4  # sine of the angle below which a vector lies in a space: W is that of the dtype of f
_AFFINE = 16  # times the spacing of the numbers in f: largest relative error of an affine T
_HALVINGS = 128  # of an interval for the multiplier of a projection


@dataclass(frozen=True, slots=True)
class EmbeddingSet:
    """A set of which every embedding is a member: c + A·diag(a)·q with ‖q‖ ≤ 1, or the unit sphere."""

    center: Tensor  # c (D,), float64
    axes: Tensor | None = None  # A (D, K), float64, orthonormal columns; None for the unit sphere about c = 0
    lengths: Tensor | None = None  # semi-axes a (K,), float64

    def distances(self, z: Tensor) -> Tensor:
        """Return the distance (B,) of each z (B, D) to the set, float64."""
        check_dimension(z[0], len(self.center))
        away = z.to(self.center) - self.center
        if self.axes is None or self.lengths is None:
            return (away.norm(dim=1) - 1).abs()
        # The nearest point has q = a·b/(a² + μ) with b = Aᵀ(z − c), and the μ ≥ 0 at which ‖q‖ = 1, or μ = 0 inside.
        b, a2 = away @ self.axes, self.lengths.square()
        low, high = torch.zeros_like(b[:, :1]), (b * self.lengths).norm(dim=1, keepdim=True)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            long = (b * self.lengths / (a2 + middle).clamp_min(1e-300)).norm(dim=1, keepdim=True) > 1
            low, high = torch.where(long, middle, low), torch.where(long, high, middle)
        within = b * high / (a2 + high).clamp_min(1e-300)
        return torch.hypot(within.norm(dim=1), (away - b @ self.axes.T).norm(dim=1))


@torch.inference_mode(False)
@torch.enable_grad()
@no_tf32()
@no_autocast()
def find_embedding_set(f: Encoding, model: nn.Module, image: Tensor) -> EmbeddingSet | None:
    """Return a set of which the embedding of every image of this size is a member; None if the layers tell of none."""
    # z = T(y), and y = γu + β is the output of the last LayerNorm, with Σu = 0 and ‖u‖² ≤ d at every token. If T is
    # affine and weighs the tokens by s, z = T(β) + W·diag(γ)·q with q = Σ sₜuₜ, hence Σq = 0 and ‖q‖ ≤ √d·Σ|sₜ|. A unit
    # norm leaves the sphere. Half precision is too coarse to tell. Cost: six forwards, four VJPs, VJPs through T.
    norm = find_last_norm(f, model, image)
    kept: list[tuple[Tensor, Tensor]] = []
    with _hooked(norm or nn.Identity(), lambda _, inputs, output: kept.append((inputs[0], output))):
        z, x = _graph(f, image)
    fine = z.dtype in (torch.float32, torch.float64)
    if fine and _unit_norm(z[0], x):
        return EmbeddingSet(torch.zeros_like(z[0], dtype=torch.float64))
    tail = _tail(norm, *kept[0], z[0]) if fine and norm is not None and len(kept) == 1 else None
    if norm is None or tail is None:
        return None
    gain, W, weights = tail
    d, y, bias = len(gain), kept[0][1], getattr(norm, "bias", None)

    def after(u: Tensor) -> Tensor:
        moved = (gain * u + (0.0 if bias is None else bias.double())).to(y)
        with torch.no_grad(), _hooked(norm, lambda *_: moved):
            return f(image[None])[0].double()

    draw = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(gain)
    center, limit = after(torch.zeros_like(draw)), _AFFINE * torch.finfo(z.dtype).eps
    for power in (1, 9):  # the other one has few large values
        u = draw**power - (draw**power).mean(dim=-1, keepdim=True)
        u *= d**0.5 / u.norm(dim=-1, keepdim=True)
        stated = center + W @ (gain * (weights @ u.reshape(-1, d)))
        if not float((after(u) - stated).norm()) <= limit * float(stated.norm()):
            return None
    columns = W * gain
    axes, lengths, _ = torch.linalg.svd(columns - columns.mean(dim=1, keepdim=True), full_matrices=False)
    return EmbeddingSet(center, axes, lengths * (d**0.5 * float(weights.abs().sum())))


def find_last_norm(f: Encoding, model: nn.Module, image: Tensor) -> nn.Module | None:
    """Return the LayerNorm through which all dependence of f(x) on the pixels passes; None if there is none."""
    # The last LayerNorm in the graph of z is tested: with its output detached, z must no longer depend on x. A hidden
    # state before the last LayerNorm fails, by its residual connection.
    seen: dict[nn.Module, Tensor] = {}
    with _hooked(model, lambda module, _, output: seen.update({module: output})):
        z, _ = _graph(f, image)
    used = torch.autograd.grad(z[0].sum(), list(seen.values()), allow_unused=True) if seen else ()
    last = [module for module, gradient in zip(seen, used, strict=True) if gradient is not None]
    if not last:
        return None
    with _hooked(last[-1], lambda _, __, output: output.detach()):
        z, x = _graph(f, image)
    bypassed = z.requires_grad and torch.autograd.grad(z[0].sum(), x, allow_unused=True)[0] is not None
    return None if bypassed else last[-1]


def left_relations(f: Encoding, model: nn.Module, image: Tensor) -> tuple[LeftRelation, ...]:
    """Return the left vectors u with uᵀJ in closed form, exact ones first."""
    # z = T(y), and y = γ (h − mean h)/√(var h + ε) + β is the output of the last LayerNorm (arXiv:1607.06450, eq. 4).
    # With n the unit vector along h − mean h, κ = ε/(var h + ε), and W = ∂T/∂y (D, d) at the one token that T reads:
    #    * "LayerNorm centring": Wᵀu = 1/γ gives uᵀJ = 0, since the normalised values sum to zero;
    #    * "LayerNorm epsilon": Wᵀu = n/γ gives uᵀJ = κ nᵀ(∂h/∂x)/√(var h + ε): their length is constant but for ε;
    #    * "head wider than its input": Wᵀu = 0 for the D − d vectors u off its d columns;
    #    * "LayerNorm gain of zero": Wᵀu = e_i gives uᵀJ = 0 for each γ_i = 0, and no centring: 1/γ_i is infinite.
    # "unit norm" is zᵀJ = 0, with or without a last LayerNorm.
    # If Wᵀ reaches neither 1/γ nor n/γ, it may reach a combination a/γ + b n/γ, and then uᵀJ is b times the latter row:
    # after a unit norm, whose W has z in its null space, one is left of the two. If T averages several tokens equally,
    # only the centring is left. Cost: three forwards, four VJPs, VJPs through T.
    norm = find_last_norm(f, model, image)
    kept: list[tuple[Tensor, Tensor]] = []
    with _hooked(norm or nn.Identity(), lambda _, inputs, output: kept.append((inputs[0], output))):
        z, x = _graph(f, image)
    found = _unit_norm(z[0], x)
    if norm is not None:
        found += _after_norm(norm, *kept[-1], z[0], x, unit_norm=len(found) > 0)
    return tuple(sorted(found, key=lambda one: one.rows is not None))


def _after_norm(
    norm: nn.Module, h: Tensor, y: Tensor, z: Tensor, x: Tensor, *, unit_norm: bool
) -> Iterator[LeftRelation]:
    """Yield the relations of z = T(y), with y the output of the last LayerNorm for h."""
    tail = _tail(norm, h, y, z)
    if tail is None:
        return
    gain, W, scale = tail
    token = int(scale.argmax()) if int((scale != 0).sum()) == 1 else None
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=W.shape[0] <= 4096)
    rank = int((sigma > 1e3 * torch.finfo(z.dtype).eps * sigma[0]).sum())
    if W.shape[0] > W.shape[1] and U.shape[1] == W.shape[0]:
        yield LeftRelation("head wider than its input", U[:, W.shape[1] :])
    if bool((dead := gain.abs() <= 1e3 * torch.finfo(z.dtype).eps * gain.abs().max()).any()):
        targets = torch.eye(len(gain)).to(gain)[:, dead]
        left = U[:, :rank] @ ((Vh[:rank] @ targets @ _solvable(targets, Vh[:rank]).T) / sigma[:rank, None])
        yield LeftRelation("LayerNorm gain of zero", left)
        return
    targets, row = (1 / gain)[:, None], None
    if token is not None:
        target, row = _constant_length(norm, h, x, token)
        targets = torch.cat([targets, (target / gain)[:, None]], dim=1)
    lengths = targets.norm(dim=0)
    targets = targets / lengths
    for weights in _solvable(targets, Vh[:rank]):
        u = U[:, :rank] @ ((Vh[:rank] @ targets @ weights) / sigma[:rank])
        rows = row * weights[1] / lengths[1] if row is not None and bool(weights[1]) else None
        yield LeftRelation(_cause(weights, unit_norm), u[:, None], rows)


def _unit_norm(z: Tensor, x: Tensor) -> list[LeftRelation]:
    """Return the relation zᵀJ = 0 if z has unit length at every x."""
    unit = z.detach().double()
    draw = torch.randn(len(z), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(unit)
    along, other = (torch.autograd.grad(z, x, u.to(z), retain_graph=True)[0].norm() for u in (unit, draw / draw.norm()))
    limit = 1e3 * torch.finfo(z.dtype).eps
    constant = abs(float(unit.norm()) - 1) < limit and float(along) < limit * float(other)
    return [LeftRelation("unit norm", unit[:, None] / unit.norm())] if constant else []


def _constant_length(norm: nn.Module, h: Tensor, x: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Return n (d,) of a token and κ nᵀ(∂h/∂x)/√(var h + ε) (1, N)."""
    d, eps = h.shape[-1], float(getattr(norm, "eps", 0.0))
    centred = h.detach().reshape(-1, d)[token].double()
    centred = centred - centred.mean()
    spread = float(centred.square().mean()) + eps
    n = centred / centred.norm()
    cotangent = torch.zeros_like(h).reshape(-1, d)
    cotangent[token] = n.to(h)
    (row,) = torch.autograd.grad(h, x, cotangent.view_as(h))
    return n, row.flatten(1).double() * (eps / spread / spread**0.5)


def _solvable(targets: Tensor, basis: Tensor) -> Tensor:
    """Return the combinations (R, T) of unit targets (d, T) that lie in the span of the orthonormal rows of a basis."""
    count = targets.shape[1]
    _, off, combinations = torch.linalg.svd(targets - basis.T @ (basis @ targets), full_matrices=False)
    inside = combinations[off < _INSIDE]
    inside = inside.where(inside.abs() > _INSIDE, 0.0)
    return torch.eye(count).to(targets) if len(inside) == count else inside


def _cause(weights: Tensor, unit: bool) -> str:
    """Name a relation by its weights of centring and, if there are two, of the constant length."""
    if len(weights) == 1 or not bool(weights[1]):
        return "LayerNorm centring"
    if not bool(weights[0]):
        return "LayerNorm epsilon"
    return "LayerNorm centring, epsilon and unit norm" if unit else "LayerNorm centring and epsilon"


def patch_weight(model: nn.Module, std: Tensor) -> Tensor | None:
    """Return the patch embedding (D, 3, p, p) per pixel in [0, 1]; None without a stride-p convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            alone = module.kernel_size == module.stride and module.padding in ((0, 0), "valid") and module.groups == 1
            if not alone or module.in_channels != std.numel():
                return None
            return module.weight.detach() / std.view(1, -1, 1, 1)
    return None


def _tail(norm: nn.Module, h: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return γ (d,), W = ∂z/∂y (D, d) at a token and the weights of all tokens, if z = T(y) reads a weighted sum."""
    gamma, d = getattr(norm, "weight", None), h.shape[-1]
    if gamma is not None and len(gamma) != d:
        return None
    again = nn.functional.layer_norm(h, (d,), gamma, getattr(norm, "bias", None), getattr(norm, "eps", 0.0))
    if again.shape != y.shape or not bool(torch.allclose(again, y, rtol=1e-3, atol=1e-3)):  # it has other axes
        return None
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(2, z.numel(), generator=generator).to(z)
    seen = [torch.autograd.grad(z, y, probe, retain_graph=True)[0].reshape(-1, d).double() for probe in probes]
    token = int(seen[0].norm(dim=1).argmax())
    scale = (seen[0] @ seen[0][token]) / seen[0][token].square().sum()
    if any(not float((g - scale[:, None] * g[token]).norm()) <= 1e-4 * float(g.norm()) for g in seen):
        return None
    rows = []
    for unit in torch.eye(z.numel(), dtype=z.dtype, device=z.device).split(64):
        (part,) = torch.autograd.grad(z, y, unit, retain_graph=True, is_grads_batched=True)
        rows.append(part.reshape(len(unit), -1, d)[:, token].double())
    gain = torch.ones(d, dtype=torch.float64, device=h.device) if gamma is None else gamma.detach().double()
    return gain, torch.cat(rows), scale


def _graph(f: Encoding, image: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        x = image.detach().clone()[None].requires_grad_(True)
        return f(x), x


@contextmanager
def _hooked(model: nn.Module, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Call a forward hook on every LayerNorm inside a module."""
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm) and len(m.normalized_shape) == 1]
    handles = [norm.register_forward_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
