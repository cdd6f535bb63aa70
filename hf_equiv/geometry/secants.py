"""Extrapolate central difference quotients to h = 0, and measure the float noise that limits them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hf_equiv.checks import check_choice
from hf_equiv.geometry.directions import by_image, unit_directions
from hf_equiv.precision import Encoding, exact_derivatives, float64_twin, no_tf32

RADII = tuple(10 ** (-5 + i / 4) for i in range(21))  # default ladder: L2 in pixel units, four a decade from 1e-5 to 1
RTOL = 0.01  # largest estimated relative error of a resolved value
PLATEAU_RTOL = 0.02  # largest distance of a secant on the plateau, and largest noise floor, relative to the value
PLATEAU_RADII = 3  # fewest radii in a row that make a plateau
JVP_RTOL = 0.05  # largest distance of the value from ‖Jv‖ in half precision, relative to the value: both are noisy

_ORDERS = 5  # terms of the expansion in h² that are tried
_SIGMAS = 2  # standard deviations of noise in an error bound
_POINTS = 9  # points of a difference table, for orders up to 8 (Moré and Wild advise 6 to 8)
_TABLES = 3  # lines through x; their variances are averaged
_COARSE = (1.0, 30.0, 300.0)  # steps of further tables, in units of the smallest radius
_LOUDER = 3  # a larger ratio to the noise of the fine tables is no chance
_ULPS = 4  # step of a table per pixel, in units of the spacing of the dtype: neighbours round independently
_SEED = 0x5EED  # seed of the probe directions: the noise of an image depends on no other setting


def central_secants(
    f: Encoding, image: Tensor, directions: Tensor, radii: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return s(h) = (f(x + hv) − f(x − hv)) / 2h (K, R, D) for unit v (K, *shape), and the steps over h (K, R).

    A forward pass has at most `most` images, or the K of one end and radius. Radii and results are on the CPU.
    """
    # x ± hv may leave the box: f is defined there, and a one-sided quotient would be curved to first order. The share
    # ⟨x₊ − x₋, v⟩ / 2h of a step that the dtype of f can represent is 1, unless the step is lost between two
    # neighbouring numbers.
    start, count = image.to(directions.dtype), len(directions)
    own = getattr(f, "dtype", image.dtype)
    coarser = isinstance(own, torch.dtype) and torch.finfo(own).eps > torch.finfo(image.dtype).eps
    seen = own if coarser else image.dtype  # f rounds its pixels to this dtype
    most = most or count
    secants, shares = [], []
    for some in radii.split(max(1, most // (2 * count))):
        steps = [sign * h for h in some.tolist() for sign in (1, -1)]
        points = torch.cat([torch.add(start, directions, alpha=step) for step in steps]).to(seen)
        ends = _values(f, points.to(image.dtype), most).cpu().view(len(some), 2, count, -1)
        secants.append((ends[:, 0] - ends[:, 1]) / (2 * some[:, None, None]))
        places = points.to(directions).view(len(some), 2, count, -1)
        moved = torch.linalg.vecdot(places[:, 0] - places[:, 1], directions.flatten(1))
        shares.append(moved.double().cpu() / (2 * some[:, None]))
    return torch.cat(secants).transpose(0, 1).contiguous(), torch.cat(shares).T.contiguous()


def _values(f: Encoding, points: Tensor, most: int) -> Tensor:
    """Return f at points (K, *shape), (K, D) float64, with at most `most` of them in a pass."""
    with torch.no_grad(), no_tf32():
        return torch.cat([f(some).double() for some in points.split(most)])


@dataclass(frozen=True, slots=True)
class Reading:
    """Reading of ‖Jv‖ from a ladder of secants, for each direction."""

    value: Tensor  # ‖s(0)‖, extrapolated, (K,), float64; a best guess if it is not resolved
    error: Tensor  # its estimated absolute error, noise and curvature, (K,), float64
    plateau: Tensor  # lowest and highest radius of the plateau, (K, 2), float64; NaN without one
    resolved: Tensor  # whether the secants alone resolve the value, (K,), bool


def read_secants(secants: Tensor, radii: Tensor, noise_floor: Tensor) -> Reading:
    """Extrapolate central secants (K, R, D) to h = 0 and tell which values are resolved."""
    # Since s(h) = Jv + c₁h² + c₂h⁴ + …, polynomials in h² of degree m = 0 … 4 are fitted to the vectors s(h) at the
    # radii up to each h_j, weighted by 1/noise². The (j, m) with the smallest noise + ‖s₀(j, m) − s₀(j, m + 1)‖ gives
    #
    #     value = ‖s₀(j, m)‖,   error = 2·noise of s₀(j, m) + |‖s₀(j, m)‖ − ‖s₀(j, m + 1)‖|.
    #
    # This is the rule of Ridders (1982, Adv. Eng. Softw. 4:75), but it compares vectors and not their norms, so that an
    # accidental agreement needs D coincidences, and the noise is known beforehand. Resolved means: error ≤ 1 % and a
    # plateau.
    count, num_radii = secants.shape[:2]
    least, error = secants.new_full((2, count), torch.inf)
    value = secants.new_zeros(count)
    for top in range(PLATEAU_RADII, num_radii + 1):
        noise = noise_floor[:, :top]
        tried: list[tuple[Tensor, Tensor]] = []
        for m in range(min(_ORDERS, top)):
            tried.append(_fit(secants[:, :top], radii[:top], noise, m))
        for (guess, spread), (finer, _) in pairwise(tried):
            trial = spread + (guess - finer).norm(dim=1)
            better = trial < least
            norm = guess.norm(dim=1)
            bound = _SIGMAS * spread + (norm - finer.norm(dim=1)).abs()
            least, value = torch.where(better, trial, least), torch.where(better, norm, value)
            error = torch.where(better, bound, error)
    plateau = plateau_of(secants.norm(dim=2), radii, noise_floor, value)
    resolved = (error <= RTOL * value) & (value > 0) & plateau.isfinite().all(dim=1)
    return Reading(value, error, plateau, resolved)


def plateau_of(norms: Tensor, radii: Tensor, noise_floor: Tensor, value: Tensor) -> Tensor:
    """Return the ends (K, 2) of the longest run of secants and floors (K, R) within 2 % of the value, else NaN."""
    level = value[:, None]
    on = ((norms - level).abs() <= PLATEAU_RTOL * level) & (noise_floor <= PLATEAU_RTOL * level)
    nowhere = torch.full((len(value), 2), torch.nan, dtype=radii.dtype, device=radii.device)
    if len(radii) < PLATEAU_RADII:
        return nowhere
    index = torch.arange(len(radii), device=radii.device)
    lengths = index - torch.where(on, -1, index).cummax(dim=1).values  # length of the run that ends at each radius
    longest, last = lengths.max(dim=1)
    plateau = torch.stack([radii[last - longest + 1], radii[last]], dim=1)
    return torch.where((longest >= PLATEAU_RADII)[:, None], plateau, nowhere)


def least_error(noise_floor: Tensor) -> Tensor:
    """Return a lower bound of any error of a reading, (K,): two standard deviations of the best mean."""
    # No fit has a smaller spread than 1 / (Σ_r noise_floor_r⁻²)^½ (Gauss–Markov). The least floor is a unit in which
    # squares neither overflow nor vanish.
    least = noise_floor.amin(dim=1, keepdim=True)
    return _SIGMAS * least[:, 0] / (least / noise_floor).norm(dim=1)


def _fit(secants: Tensor, radii: Tensor, noise: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Return the intercept s₀ (K, D) of the weighted least-squares fit of degree `order` in h², and its noise (K,)."""
    # If the residuals of the fit exceed the assumed noise, the noise of s₀ grows in proportion (the Birge ratio).
    powers = (radii / radii[-1])[:, None] ** (2 * torch.arange(order + 1, device=radii.device))
    precision = (noise.amin(dim=1, keepdim=True) / noise)[:, :, None]
    inverse = torch.linalg.pinv(precision * powers)
    terms = inverse @ (precision * secants)
    spread = (inverse[:, 0] * precision[..., 0] * noise).norm(dim=1)
    spare = len(radii) - order - 1
    if spare > 0:
        misfit = ((secants - powers @ terms) / noise[:, :, None]).flatten(1).norm(dim=1)
        spread = spread * (misfit / spare**0.5).clamp_min(1)
    return terms[:, 0], spread


def secant_noise(
    f: Encoding, image: Tensor, radii: Tensor, *, method: str = "auto", most: int | None = None
) -> tuple[Tensor, str, int]:
    """Measure the rounding part of ‖f(x + hv) − f(x − hv)‖ / 2h at radii h; return it, the method and the passes."""
    # A forward pass has at most `most` images, or those of one line. Radii and noise are on the CPU.
    #
    # `twin`: at x ± hv for random unit v, f against its float64 twin f₆₄ at the same points before they are rounded:
    #
    #     floor(h) = ‖(f − f₆₄)(x + hv) − (f − f₆₄)(x − hv)‖ / 2h,
    #
    # so errors that both ends share do not count, and the rounding of the pixels does. Every second radius is measured,
    # and floor(h)·h pooled with its neighbours. `ecnoise`: the standard deviation ε of f(x) from difference tables of
    # equally spaced values along random lines, floor(h) = ε / (√2 h): with steps of a few units in the last place of
    # the pixels, and of 1, 30 and 300 times the smallest radius, which change outputs or activations that are rounded
    # on purpose; the largest that the differences agree on is taken. Neither is below one rounding of the output.
    check_choice(method, "noise", ("auto", "twin", "ecnoise"))
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
            noise, passes = _twin_noise(f, twin, image, radii, most)
            return noise.clamp_min(least) / radii, "twin", passes + 1
        noise, passes = _table_noise(f, image, eps, float(radii[0]) if len(radii) > 1 else None, most)
        return (noise / math.sqrt(2)).clamp_min(least) / radii, "ecnoise", passes + 1


def _twin_noise(f: Encoding, twin: Encoding, image: Tensor, radii: Tensor, most: int | None) -> tuple[Tensor, int]:
    """Return floor(h)·h at each radius, (R,) float64, and the number of forward passes."""
    last = len(radii) - 1
    probed = sorted({*range(0, last, 2), last})
    wide, lines = image.double(), zip(radii[probed].tolist(), _probes(image, len(probed)), strict=True)
    points = torch.cat([torch.stack([wide + h * v, wide - h * v]) for h, v in lines])
    with exact_derivatives():
        exact = _values(twin, points, most or 2)
    gaps = (_values(f, points.to(image.dtype), most or 2) - exact).cpu().view(len(probed), 2, -1)
    errors = torch.tensor([float((one - other).norm()) / 2 for one, other in gaps], dtype=torch.float64, device="cpu")
    # One direction each: pool the root mean square of three neighbours, and interpolate between the nearest two.
    pooled = [errors[max(0, i - 1) : i + 2].square().mean().sqrt() for i in range(len(probed))]
    noise = [(pooled[bisect_right(probed, j) - 1] + pooled[bisect_left(probed, j)]) / 2 for j in range(len(radii))]
    return torch.stack(noise), 4 * len(probed)


def _table_noise(f: Encoding, image: Tensor, eps: float, radius: float | None, most: int | None) -> tuple[Tensor, int]:
    """Return ε, the standard deviation of f(x) as a vector, () float64, and the number of forward passes."""
    largest = max(1.0, float(image.abs().max()))
    fine = min(_ULPS * eps, 1e-2) * largest * math.sqrt(image.numel())
    steps = [fine] * _TABLES + ([] if radius is None else [share * radius for share in _COARSE])
    places = torch.arange(_POINTS, dtype=torch.float64, device=image.device) - _POINTS // 2
    lines = zip(steps, _probes(image, len(steps)), strict=True)
    points = torch.cat([image.double() + by_image(step * places, v[None]) * v for step, v in lines])
    values = _values(f, points.to(image.dtype), most or _POINTS).cpu()
    levels = [ecnoise(line) for line in values.split(_POINTS)]
    noise = torch.stack([level for level, _ in levels[:_TABLES]]).square().mean().sqrt()
    for level, agreed in levels[_TABLES:]:  # differences that disagree show the curvature of f
        noise = level if agreed and bool(level > _LOUDER * noise) else noise
    return noise, len(steps) * _POINTS


def ecnoise(values: Tensor) -> tuple[Tensor, bool]:
    """Return the noise (Σ_d ε_d²)^½ of f from its values (m + 1, D) at equally spaced points; True if it is certain."""
    # This is the ECnoise of Moré and Wild (2011, SIAM J. Sci. Comput. 33:1292, §3). With Δᵏ the k-th differences, σ_k²
    # = (k!)²/(2k)! · mean ‖Δᵏ‖² tends to the variance of the noise as k grows, since differences of the smooth part
    # vanish. The first k is taken at which σ_k, σ_{k+1}, σ_{k+2} agree within a factor of four and most components
    # change sign; without one, the largest k, which errs upwards.
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
    """Return the same random unit directions (count, *shape), float64, at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    probes = torch.randn(count, *image.shape, generator=generator, dtype=torch.float64)
    return unit_directions(probes, torch.float64).to(image.device)
