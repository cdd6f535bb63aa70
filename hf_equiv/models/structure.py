"""Derive properties of the Jacobian from the layers of a model: its last LayerNorm and the layers after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_equiv.geometry.zeros import LeftRelation
from hf_equiv.precision import Encoding

_INSIDE = 1e-4  # sine of the angle below which a vector lies in a space: W is that of the dtype of f


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
    #    * "head wider than its input": Wᵀu = 0 for the D − d vectors u off its d columns.
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
    gamma, d = getattr(norm, "weight", None), h.shape[-1]
    if gamma is not None and len(gamma) != d:
        return
    gain = torch.ones(d, dtype=torch.float64, device=h.device) if gamma is None else gamma.detach().double()
    again = nn.functional.layer_norm(h, (d,), gamma, getattr(norm, "bias", None), getattr(norm, "eps", 0.0))
    plain = again.shape == y.shape and bool(torch.allclose(again, y, rtol=1e-3, atol=1e-3))  # false for other axes
    W, token = _tail(z, y) if plain and bool((gain != 0).all()) else (None, None)
    if W is None:
        return
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=W.shape[0] <= 4096)
    rank = int((sigma > 1e3 * torch.finfo(z.dtype).eps * sigma[0]).sum())
    if W.shape[0] > W.shape[1] and U.shape[1] == W.shape[0]:
        yield LeftRelation("head wider than its input", U[:, W.shape[1] :])
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


def _tail(z: Tensor, y: Tensor) -> tuple[Tensor | None, int | None]:
    """Return W = ∂z/∂y (D, d) at the token that z reads, and the token; no token if z averages several."""
    generator = torch.Generator().manual_seed(0)
    d = y.shape[-1]
    probes = torch.randn(2, z.numel(), generator=generator).to(z)
    seen = [torch.autograd.grad(z, y, probe, retain_graph=True)[0].reshape(-1, d).double() for probe in probes]
    lengths = seen[0].norm(dim=1)
    token = int(lengths.argmax())
    if not float(lengths[token]) > 0:
        return None, None
    several = int((lengths > 0).sum()) > 1
    if several:
        scale = (seen[0] @ seen[0][token]) / seen[0][token].square().sum()
        if any(float((g - scale[:, None] * g[token]).norm()) > 1e-4 * float(g.norm()) for g in seen):
            return None, None
    rows = []
    for unit in torch.eye(z.numel(), dtype=z.dtype, device=z.device).split(64):
        (part,) = torch.autograd.grad(z, y, unit, retain_graph=True, is_grads_batched=True)
        rows.append(part.reshape(len(unit), -1, d)[:, token].double())
    return torch.cat(rows), None if several else token


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
