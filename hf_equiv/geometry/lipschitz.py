"""Measure local directional Lipschitz constants, with noise floor, plateau and status.

At a kink exactly at x, such as a maximum of equal numbers, central secants tend to the mean of the two one-sided
derivatives. If autograd gives the mean too, it is resolved. docs/internals.md has the accuracy in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import admit
from hf_equiv.geometry.directions import Directions, as_directions, unit_directions
from hf_equiv.geometry.secants import JVP_RTOL, RADII, RTOL, central_secants, read_secants, secant_noise
from hf_equiv.jacobian import Jacobian
from hf_equiv.passes import Work, measure_images
from hf_equiv.precision import Encoding
from hf_equiv.results import Status

Counted = Callable[[int, int], None]  # a progress hook: (directions done, directions in all)

_STATUS = (Status.RESOLVED, Status.UNDETERMINED, Status.ERROR)


@dataclass(frozen=True, slots=True)
class KindSummary:
    """Directional constants of one kind over the whole batch."""

    count: int  # directions of this kind, all images together
    resolved: int  # number of them with a resolved value
    quantiles: Tensor  # 0, 25, 50, 75 and 100 % of the resolved values, (5,), float64; NaN if there are none
    largest_jvp: float  # largest exact ‖Jv‖ for this kind


@dataclass(frozen=True, slots=True)
class LipschitzResult:
    """Local directional Lipschitz constants of B images along K directions each.

    All lengths are L2 norms in pixel units (pixels in [0, 1]); constants are embedding length per pixel length.

    Attributes:
        values: lim ‖f(x + hv) − f(x − hv)‖ / 2h read from the secants, (B, K), float64; NaN unless resolved.
        errors: estimated absolute error of the reading, (B, K), float64; also for unresolved directions.
        jvp: the exact ‖Jv‖ in the dtype of f, (B, K), float64; NaN if differences of f contradict its autograd.
        radii: h, (R,), float64.
        secants: ‖f(x + hv) − f(x − hv)‖ / 2h, (B, K, R), float64.
        noise_floor: part of a secant that rounding can explain, (B, K, R), float64, in the units of the secants.
        noise_method: "twin" or "ecnoise".
        plateau: lowest and highest radius of the plateau, (B, K, 2), float64; NaN unless resolved.
        unit_factor: factor to normalised-pixel units, 1 / ‖v / std‖, (B, K), float64; NaN if f has no std.
        status: per image and direction `resolved`, `undetermined` or `error`.
        kinds: kind of each direction, K strings.
        indices: number of each direction within its kind, K integers.
        num_evals: cost of each image, (B,), float64: (forwards + 2·tangents) / 3.
        seconds: wall time of each image, (B,), float64.
    """

    values: Tensor
    errors: Tensor
    jvp: Tensor
    radii: Tensor
    secants: Tensor
    noise_floor: Tensor
    noise_method: str
    plateau: Tensor
    unit_factor: Tensor
    status: tuple[tuple[Status, ...], ...]
    kinds: tuple[str, ...]
    indices: tuple[int, ...]
    num_evals: Tensor
    seconds: Tensor

    def by_kind(self) -> dict[str, KindSummary]:
        """Return the counts, quantiles and largest ‖Jv‖ of each kind of direction."""
        levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
        summaries = {}
        for kind in dict.fromkeys(self.kinds):
            columns = [k for k, name in enumerate(self.kinds) if name == kind]
            values = self.values[:, columns].flatten()
            good = values[values.isfinite()]
            quantiles = good.quantile(levels) if len(good) else torch.full_like(levels, torch.nan)
            summaries[kind] = KindSummary(len(values), len(good), quantiles, float(self.jvp[:, columns].max()))
        return summaries

    def __repr__(self) -> str:
        """State the number of images and the resolved directions of each kind in one line."""
        parts = ", ".join(f"{kind} {one.resolved}/{one.count}" for kind, one in self.by_kind().items())
        return f"LipschitzResult({len(self.status)} images, resolved: {parts}; noise: {self.noise_method})"


def directional_lipschitz(
    f: Encoding,
    images: Tensor,
    directions: Directions | Tensor,
    *,
    radii: Tensor | Sequence[float] | None = None,
    noise: str = "auto",
    std: Tensor | Sequence[float] | None = None,
    batch: int = 32,
    bounds: Bounds = UNIT,
    progress: Counted | bool | None = None,
) -> LipschitzResult:
    """Measure the local Lipschitz constant of f along given directions, and separate it from float noise.

    For each image x and unit direction v, the value is the limit at h → 0 of central secants over a ladder of radii,

        ‖s(h)‖ = ‖f(x + hv) − f(x − hv)‖ / 2h   →   ‖Jv‖,    J = ∂f/∂x (D, N).

    The value is extrapolated from the range between rounding and curvature, never copied from autograd. It is
    `resolved` if its error estimate and its distance from the exact ‖Jv‖ are at most 1 % (the latter 5 % in half
    precision) and three radii in a row agree within 2 %; else `undetermined`, as all null directions are, or `error` if
    f or its derivative is not finite. x ± hv may step over the edge of the box.

    Cost: 2·K·R forward passes and K JVPs an image, and a few per cent for the noise. Memory: the activations of `batch`
    images, one image at a time.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D) with forward mode.
        images: x, (B, *shape), within `bounds`.
        directions: from `make_directions`, or (B, K, *shape) with any length above 0: only the direction counts.
        radii: h in pixel units (L2), ascending, at least four a decade; default 21 from 1e-5 to 1.
        noise: method for the noise floor: "twin", "ecnoise" or "auto" (`secants.secant_noise`).
        std: standard deviations by which f normalises, (C,), one for each entry of the first axis of an image; default
            from the encoder.
        batch: images per forward pass and tangents per JVP; on a GPU eight times as many images.
        bounds: the box that `images` must lie in; None for none.
        progress: called with (directions done, directions in all) after each batch of directions; by default a bar in a
            terminal or notebook, False for none.

    Returns:
        Values with errors, exact JVPs, ladders, noise floors, plateaus and statuses.

    Raises:
        ValueError: values outside `bounds`, a zero or non-finite direction, or radii too few or too sparse.
        RuntimeError: f has no forward-mode derivative.

    Example:
        >>> import torch
        >>> from hf_equiv import directional_lipschitz
        >>> x, along = torch.full((1, 1, 1, 2), 0.5).double(), torch.eye(2).double().view(1, 2, 1, 1, 2)
        >>> result = directional_lipschitz(lambda x: torch.sin(3 * x.flatten(1)[:, :1]), x, along)
        >>> [str(status) for status in result.status[0]]
        ['resolved', 'undetermined']

    References:
        Salman, Shams, Liu (2024), arXiv:2401.15568, §4. Moré, Wild (2011), *SIAM J. Sci. Comput.* 33:1292 (noise).
    """
    given = as_directions(directions, images, bounds)
    ladder = torch.as_tensor(RADII if radii is None else radii, dtype=torch.float64, device="cpu").detach()
    checks.check_radii(ladder)
    scale = pixel_std(f, images, std)
    f = admit(f, images, gradient=False, bounds=bounds)  # the values come from secants
    with bars.shown(progress, "secants", bars.count) as hook:
        fields = measure_directions(f, images, given, batch, hook, lambda J: _Ladder(f, J, ladder, noise, scale))
    return LipschitzResult(radii=ladder, noise_method=fields.pop("noise_method")[-1], **fields)


def measure_directions(
    f: Encoding, images: Tensor, given: Directions, batch: int, progress: Counted | None,
    probe_at: Callable[[Jacobian], Any]
) -> dict[str, Any]:  # fmt: skip
    """Measure the directions of each image in batches; return the fields of a result, and `noise_method`."""
    # A probe has `noise_method`, `forwards` and `measure(unit, part)`: columns (K, …) by name for the unit directions
    # at `part`; the column `codes` holds the index of each status.
    dtype = torch.promote_types(images.dtype, torch.float32)
    vectors = given.vectors.detach().to(images.device)

    def measure(b: int) -> Work[dict[str, Any]]:
        yield from ()  # the passes of an image are full
        J = Jacobian(f, images[b].detach(), batch=batch)
        J.check_deterministic()
        probe, chunks = probe_at(J), []
        for first in range(0, len(given), batch):
            part = slice(first, first + batch)
            unit = unit_directions(vectors[b, part], dtype)
            chunks.append(probe.measure(unit, part))
            if progress is not None:
                progress(b * len(given) + first + len(unit), len(images) * len(given))
        columns = {name: torch.cat([chunk[name] for chunk in chunks]).cpu() for name in chunks[0]}
        status = tuple(_STATUS[code] for code in columns.pop("codes").tolist())
        spent = J.num_evals + probe.forwards / 3
        return {**columns, "status": status, "num_evals": spent, "noise_method": probe.noise_method}

    fields = measure_images(images, measure)
    return {**fields, "kinds": given.kinds, "indices": given.indices}


class _Ladder:
    """Secants over a ladder of radii at one image."""

    def __init__(self, f: Encoding, J: Jacobian, radii: Tensor, noise: str, std: Tensor | None) -> None:
        self.f, self.J, self.radii, self.std = f, J, radii, std
        self.derivable: bool = getattr(f, "derivable", True)
        self.floor, self.noise_method, self.forwards = secant_noise(f, J.image, radii, method=noise, most=J.forwards)

    def measure(self, unit: Tensor, part: slice) -> dict[str, Tensor]:
        # The figures below are small: on the CPU they cost no launches of a GPU.
        jvp = self.J.mv(unit).double().norm(dim=1).cpu()
        secants, shares = central_secants(self.f, self.J.image, unit, self.radii, self.J.forwards)
        self.forwards += 2 * len(unit) * len(self.radii)
        norms = secants.norm(dim=2)
        # Steps that the dtype rounds away are a known error of the secant, proportional to the constant itself.
        lost = (1 - shares).abs() * jvp[:, None]
        noise_floor = torch.hypot(self.floor.expand_as(lost), lost)
        finite = norms.isfinite().all(dim=1) & jvp.isfinite() & noise_floor.isfinite().all(dim=1)
        clean = torch.where(finite[:, None, None], secants, 0.0)
        reading = read_secants(clean, self.radii, torch.where(finite[:, None], noise_floor, 1.0))
        # Secants above the smallest radius do not show a kink near x; the difference from the derivative at x does.
        apart = (reading.value - jvp).abs()
        coarse = self.J.eps > torch.finfo(torch.float32).eps  # there ‖Jv‖ itself is accurate to a few per cent
        agrees = apart <= (JVP_RTOL if coarse else RTOL) * reading.value
        error = torch.maximum(reading.error, apart)
        resolved = finite & reading.resolved & agrees & self.derivable
        nothing = reading.value.new_tensor(torch.nan)
        return {
            "values": torch.where(resolved, reading.value, nothing),
            "errors": torch.where(finite, error, nothing),
            "jvp": jvp if self.derivable else torch.full_like(jvp, torch.nan),
            "secants": norms,
            "noise_floor": noise_floor,
            "plateau": torch.where(resolved[:, None], reading.plateau, nothing),
            "unit_factor": unit_factor(unit, self.std),
            "codes": torch.where(finite, (~resolved).long(), 2),
        }


def pixel_std(f: object, images: Tensor, std: Tensor | Sequence[float] | None) -> Tensor | None:
    """Return the standard deviations by which f normalises, (C,) float64: `std`, else the encoder's, else None."""
    values = getattr(f, "pixel_std", None) if std is None else std
    if values is None:
        return None
    scale = torch.as_tensor(values, dtype=torch.float64, device=images.device).flatten()
    if len(scale) != images.shape[1] or not bool((scale > 0).all()):
        raise ValueError(
            f"`std` must be {images.shape[1]} positive numbers, one for each entry of axis 1; got {scale.tolist()}."
        )
    return scale


def unit_factor(directions: Tensor, std: Tensor | None) -> Tensor:
    """Return 1 / ‖v / std‖ of unit directions (K, *shape), (K,) float64; NaN without std."""
    if std is None:
        return torch.full((len(directions),), torch.nan, dtype=torch.float64, device=directions.device)
    energy = directions.unsqueeze(-1).flatten(2).square().sum(dim=2, dtype=torch.float64)
    return (energy / std.square()).sum(dim=1).rsqrt()
