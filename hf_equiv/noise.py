"""Float noise of an encoder: how much of f(x + hv) − f(x − hv) is rounding, measured and not assumed."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from hf_equiv.precision import exact_derivatives, no_tf32

METHODS = ("auto", "twin", "ecnoise")

_POINTS = 9  # of a difference table: orders up to 8, as Moré and Wild advise 6 to 8
_TABLES = 3  # lines through x; their variances are averaged
_COARSE = (1.0, 30.0, 300.0)  # steps of more tables, in units of the smallest radius
_LOUDER = 3  # times as loud as in the fine ones: more than by chance
_ULPS = 4  # step of a table per pixel, in units of the spacing of the dtype: neighbours round independently
_SEED = 0x5EED  # of the probe directions: the noise of an image never depends on what else is asked


def secant_noise(
    f: Callable[[Tensor], Tensor], image: Tensor, radii: Tensor, *, method: str = "auto"
) -> tuple[Tensor, str, int]:
    """Measure the noise floor of central secants: the rounding part of ‖f(x + hv) − f(x − hv)‖ / 2h, at each radius h.

    `twin`: at x ± hv for random unit v, f against its float64 twin f₆₄ at the same points before they are rounded:

        floor(h) = ‖(f − f₆₄)(x + hv) − (f − f₆₄)(x − hv)‖ / 2h,

    so what the two ends have in common does not count, and the rounding of the pixels does. Every second radius is
    measured, with a direction of its own, and floor(h)·h pooled with its neighbours. `ecnoise`: the standard deviation
    ε of f(x) from difference tables of equally spaced values along random lines, floor(h) = ε / (√2 h): with steps of a
    few units in the last place of the pixels, and with steps of 1, 30 and 300 times the smallest radius, where outputs
    or activations that are rounded on purpose change at all; the largest that the differences agree on is taken.
    Either way not below one rounding of the output, ‖z‖ times a quarter of the spacing of its dtype.

    On DeiT-Tiny in float32 floor(h)·h is 1.5e-5 ± 20 % from h = 1e-4 to 1 along random, row and null directions alike,
    0.4 of the error of a single embedding.

    Cost: `twin` two forward passes of f and of its twin for every second radius, `ecnoise` 54 forward passes.

    Args:
        f: the encoder, or any callable (B, C, H, W) -> (B, D).
        image: x, (C, H, W), pixels in [0, 1].
        radii: h, (R,), float64, ascending, L2 norm in pixel units.
        method: "twin" needs an Encoder below float64; "ecnoise" takes any callable; "auto" the first that can be had.

    Returns:
        The floor (R,) float64, in the units of the secants; the method used; the number of forward passes.

    Raises:
        ValueError: an unknown method, or "twin" where f has no float64 twin.

    Example:
        >>> import torch
        >>> from hf_equiv.noise import secant_noise
        >>> weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
        >>> radii = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)
        >>> floor, method, _ = secant_noise(lambda x: x.flatten(1) @ weight.T, torch.full((3, 4, 4), 0.5), radii)
        >>> method, bool(1e-8 < floor[2] < 1e-5)
        ('ecnoise', True)

    References:
        Moré, Wild (2011), "Estimating computational noise", *SIAM J. Sci. Comput.* 33:1292, §3 (ECnoise).
    """
    if method not in METHODS:
        raise ValueError(f"`noise` must be one of {', '.join(METHODS)}; got {method!r}.")
    twin = float64_twin(f)
    if method == "twin" and twin is None:
        raise ValueError(
            "`noise` must be 'auto' or 'ecnoise' for an `f` without a float64 twin; got 'twin'. "
            "An Encoder below float64 has one."
        )
    with torch.no_grad(), no_tf32():
        z = f(image[None])[0]
        eps = max(torch.finfo(z.dtype).eps, torch.finfo(image.dtype).eps)
        least = max(float(z.double().norm()) * eps / 4, torch.finfo(torch.float64).tiny)
        if twin is not None and method != "ecnoise":
            noise, passes = _twin_noise(f, twin, image, radii)
            return noise.clamp_min(least) / radii, "twin", passes + 1
        noise, passes = _table_noise(f, image, eps, float(radii[0]) if len(radii) > 1 else None)
        return (noise / math.sqrt(2)).clamp_min(least) / radii, "ecnoise", passes + 1


def embedding_noise(f: Callable[[Tensor], Tensor], twin: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """‖f(x) − f₆₄(x)‖ / ‖f₆₄(x)‖ of each image against the float64 twin of f, (B,), float64; one image at a time."""
    floors = []
    with torch.no_grad():
        for image in images.split(1):
            exact = twin(image.double())
            floors.append((f(image).double() - exact).norm() / exact.norm())
    return torch.stack(floors)


def float64_twin(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor] | None:
    """Return the same function in float64 if f makes one, as an Encoder below float64 does.

    A `torch.nn.Module` is never asked: its `double()` would convert the caller's own weights.

    Returns:
        The twin, or None.
    """
    make = None if isinstance(f, torch.nn.Module) else getattr(f, "double", None)
    twin = make() if callable(make) else None
    return twin if callable(twin) and twin is not f else None


def _twin_noise(
    f: Callable[[Tensor], Tensor], twin: Callable[[Tensor], Tensor], image: Tensor, radii: Tensor
) -> tuple[Tensor, int]:
    """floor(h)·h at each radius, (R,) float64."""
    last = len(radii) - 1
    probed = sorted({*range(0, last, 2), last})
    measured, wide = [], image.double()
    for j, v in zip(probed, _probes(image, len(probed)), strict=True):
        points = torch.stack([wide + float(radii[j]) * v, wide - float(radii[j]) * v])
        with exact_derivatives():
            exact = twin(points)
        error = f(points.to(image.dtype)).double() - exact
        measured.append(float((error[0] - error[1]).norm()) / 2)
    errors = torch.tensor(measured, dtype=torch.float64, device=image.device)
    # one direction each: the root mean square of three neighbours, then between them that of the nearest two
    pooled = [errors[max(0, i - 1) : i + 2].square().mean().sqrt() for i in range(len(probed))]
    noise = [(pooled[bisect_right(probed, j) - 1] + pooled[bisect_left(probed, j)]) / 2 for j in range(len(radii))]
    return torch.stack(noise).to(image.device), 4 * len(probed)


def _table_noise(f: Callable[[Tensor], Tensor], image: Tensor, eps: float, radius: float | None) -> tuple[Tensor, int]:
    """ε, the standard deviation of f(x) as a vector, () float64."""
    fine = min(_ULPS * eps, 1e-2) * math.sqrt(image.numel())
    steps = [fine] * _TABLES + ([] if radius is None else [share * radius for share in _COARSE])
    levels = []
    for step, v in zip(steps, _probes(image, len(steps)), strict=True):
        places = step * (torch.arange(_POINTS, dtype=torch.float64, device=image.device) - _POINTS // 2)
        points = image.double() + places[:, None, None, None] * v
        levels.append(_levels(f(points.to(image.dtype)).double()))
    noise = torch.stack([level for level, _ in levels[:_TABLES]]).square().mean().sqrt()
    for level, agreed in levels[_TABLES:]:  # where they do not agree, it is the function that bends
        noise = level if agreed and bool(level > _LOUDER * noise) else noise
    return noise, len(steps) * _POINTS


def ecnoise(values: Tensor) -> Tensor:
    """Noise of a function from its values at equally spaced points: ε = (Σ_d ε_d²)^½, the ECnoise of Moré and Wild.

    With Δᵏ the k-th differences of m + 1 values, σ_k² = (k!)²/(2k)! · mean ‖Δᵏ‖² tends to the variance of the noise as
    k grows, since differences of the smooth part vanish. The first k is taken at which σ_k, σ_{k+1}, σ_{k+2} agree
    within a factor of four and most components change sign; without one, the largest k, which errs upwards.

    Args:
        values: f at equally spaced points, (m + 1, D), float64.

    Returns:
        ε, (), float64, in the units of f; 0 where all values are equal.
    """
    return _levels(values)[0]


def _levels(values: Tensor) -> tuple[Tensor, bool]:
    """The noise as by `ecnoise`, and whether the differences agreed on it."""
    differences, levels, changes = values, [], []
    for k in range(1, len(values) - 1):
        differences = differences.diff(dim=0)
        scale = math.factorial(k) ** 2 / math.factorial(2 * k)
        levels.append((scale * differences.square().sum(dim=1).mean()).sqrt())
        signs = differences.sign()
        changes.append(float((signs.amin(dim=0) < signs.amax(dim=0)).double().mean()) > 0.5)
    for k in range(len(levels) - 2):
        low, high = min(levels[k : k + 3]), max(levels[k : k + 3])
        if changes[k] and high <= 4 * low:
            return levels[k], True
    return levels[-1], False


def _probes(image: Tensor, count: int) -> Tensor:
    """Random unit directions (count, C, H, W), float64, always the same."""
    generator = torch.Generator().manual_seed(_SEED)
    probes = torch.randn(count, *image.shape, generator=generator, dtype=torch.float64)
    return (probes / probes.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).to(image.device)
