"""Find how far the first-order model of an encoder holds along given directions (arXiv:2401.15568, §5).

h is doubled, then bisected: a residual that exceeds the bound and falls below it again within a factor of two is not
seen. v and −v have separate radii. x + hv may step over the edge of the box. Radii whose bound is within four times the
float noise are not tested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import admit
from hf_equiv.geometry.directions import Directions, as_directions, by_image
from hf_equiv.geometry.lipschitz import Counted, measure_directions
from hf_equiv.geometry.secants import secant_noise
from hf_equiv.jacobian import Jacobian
from hf_equiv.precision import Encoding, no_tf32
from hf_equiv.results import Status

_MARGIN = 4  # the bound must be this many times the noise for a residual to be tested
_LEAST = 1e-6  # first radius tried, unless the noise asks for a larger one


@dataclass(frozen=True, slots=True)
class LinearityResult:
    """Range of the first-order model, for B images along K directions each.

    Attributes:
        radii: h in pixel units (L2), (B, K), float64; NaN unless resolved.
        at_limit: whether the model still held at `max_radius`, so that the radius is a lower bound, (B, K), bool.
        jvp: the exact ‖Jv‖ in the dtype of f, (B, K), float64.
        relative_to: reference of the residual, "jvp" or "embedding", K strings.
        status: per image and direction `resolved`, `undetermined` (the bound lies in the float noise) or `error`.
        kinds: kind of each direction, K strings.
        indices: number of each direction within its kind, K integers.
        num_evals: cost of each image, (B,), float64: (forwards + 2·tangents) / 3.
        seconds: wall time of each image, (B,), float64.
    """

    radii: Tensor
    at_limit: Tensor
    jvp: Tensor
    relative_to: tuple[str, ...]
    status: tuple[tuple[Status, ...], ...]
    kinds: tuple[str, ...]
    indices: tuple[int, ...]
    num_evals: Tensor
    seconds: Tensor

    def __repr__(self) -> str:
        """State the number of images and the range of the radii of each kind of direction in one line."""
        parts = []
        for kind in dict.fromkeys(self.kinds):
            radii = self.radii[:, [k for k, name in enumerate(self.kinds) if name == kind]].flatten()
            good = radii[radii.isfinite()].tolist()
            parts.append(f"{kind} {min(good):.2g} to {max(good):.2g}" if good else f"{kind} undetermined")
        return f"LinearityResult({len(self.status)} images; radii: {', '.join(parts)})"


def linearity_radius(
    f: Encoding,
    images: Tensor,
    directions: Directions | Tensor,
    *,
    tau: float = 0.1,
    relative_to: str = "auto",
    max_radius: float | None = None,
    rtol: float = 1e-3,
    batch: int = 32,
    bounds: Bounds = UNIT,
    progress: Counted | bool | None = None,
) -> LinearityResult:
    """Find how far f is linear along given directions: a test of "piecewise linear".

    For each image x and unit direction v, the radius is the largest h such that up to it

        ‖f(x + hv) − f(x) − h·Jv‖ ≤ τ·h·‖Jv‖        (relative_to="jvp")
        ‖f(x + hv) − f(x) − h·Jv‖ ≤ τ·‖f(x)‖        (relative_to="embedding"; for null directions, where Jv = 0)

    Cost: per direction one JVP and about 20 + log₂(1/rtol) forward passes. Memory: the activations of `batch` images.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D) with forward mode.
        images: x, (B, *shape), within `bounds`.
        directions: from `make_directions`, or (B, K, *shape) with any length above 0: only the direction counts.
        tau: τ, the residual allowed, relative.
        relative_to: reference of τ; "auto" is "embedding" for the kind `null` and "jvp" for all others.
        max_radius: largest h tried, in pixel units (L2); default the diagonal of the box, √N without one.
        rtol: relative width at which the bisection ends; the lower end is returned.
        batch: images per forward pass and tangents per JVP.
        bounds: the box that `images` must lie in; None for none.
        progress: called with (directions done, directions in all) after each batch of directions; by default a bar in a
            terminal or notebook, False for none.

    Returns:
        The radii with their statuses.

    Raises:
        ValueError: values outside `bounds`, a zero or non-finite direction, or a bad number.
        RuntimeError: f has no forward-mode derivative.

    Example:
        >>> import torch
        >>> from hf_equiv import linearity_radius
        >>> x, f = torch.zeros(1, 1, 1, 1).double(), lambda x: x.flatten(1) + 2 * torch.relu(x.flatten(1) - 0.25)
        >>> linearity_radius(f, x, x[None] + 1, tau=0.5).radii.round(decimals=2).tolist()  # 2(h − 0.25) = h/2
        [[0.33]]
    """
    given = as_directions(directions, images, bounds)
    width = 1.0 if bounds is None else bounds[1] - bounds[0]
    limit = width * math.sqrt(images[0].numel()) if max_radius is None else max_radius
    for name, value in (("tau", tau), ("rtol", rtol), ("max_radius", limit)):
        checks.check_positive(value, name)
    checks.check_choice(relative_to, "relative_to", ("auto", "jvp", "embedding"))
    auto = tuple("embedding" if kind == "null" else "jvp" for kind in given.kinds)
    against = auto if relative_to == "auto" else (relative_to,) * len(given)
    flat = torch.tensor([name == "embedding" for name in against], device="cpu")
    f = admit(f, images, bounds=bounds)
    with bars.shown(progress, "linearity", bars.count) as hook:
        fields = measure_directions(f, images, given, batch, hook, lambda J: _Line(f, J, tau, limit, flat, rtol))
    del fields["noise_method"]
    return LinearityResult(relative_to=against, **fields)


class _Line:
    """Residuals of the first-order model at one image."""

    def __init__(self, f: Encoding, J: Jacobian, tau: float, limit: float, flat: Tensor, rtol: float) -> None:
        self.f, self.J, self.tau, self.limit, self.rtol = f, J, tau, limit, rtol
        self.flat = flat  # which directions are measured against the embedding
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        floor, self.noise_method, self.forwards = secant_noise(f, J.image, one, most=J.forwards)
        self.forwards += 1  # the pass for z below
        self.noise = 2 * float(floor)  # noise of a difference f(x + hv) − f(x): floor(h)·2h
        with torch.no_grad(), no_tf32():
            self.z = f(J.image[None])[0].double()  # the same pass as below, since J.z may come from another kernel

    def measure(self, unit: Tensor, part: slice) -> dict[str, Tensor]:
        # The state of the search is on the CPU, so that a GPU is waited for once in each round.
        flat = self.flat[part]
        jv = self.J.mv(unit).double()
        jvp = jv.norm(dim=1).cpu()
        size = float(self.z.norm())
        finite = jvp.isfinite() & (math.isfinite(size) and math.isfinite(self.noise))
        scale = torch.where(flat, 0.0, self.tau * jvp)  # the bound is scale·h + constant
        constant = torch.where(flat, jvp.new_tensor(self.tau * size), 0.0)
        low = torch.where(flat, _LEAST, (_MARGIN * self.noise / scale).clamp_min(_LEAST))
        testable = finite & (low < self.limit) & ((constant > _MARGIN * self.noise) | ~flat)

        def holds(h: Tensor, which: Tensor) -> Tensor:
            where, steps = which.to(unit.device), h[which].to(jv)
            with torch.no_grad(), no_tf32():
                points = torch.addcmul(self.J.image.to(unit), unit[where], by_image(steps.to(unit), unit))
                moved = self.f(points.to(self.J.image)).double() - self.z
            self.forwards += len(which)
            residual = (moved - steps[:, None] * jv[where]).norm(dim=1).cpu()
            finite[which] &= residual.isfinite()
            return residual <= scale[which] * h[which] + constant[which]

        inside = torch.zeros_like(finite)
        high = low.clone()
        climbing = testable.clone()
        while bool(climbing.any()):
            which = climbing.nonzero().flatten()
            good = holds(high, which)
            inside[which] |= good
            low[which[good]] = high[which[good]]
            climbing[which] = good & (high[which] < self.limit)
            grown = which[climbing[which]]
            high[grown] = (2 * high[grown]).clamp_max(self.limit)
        at_limit = inside & (low >= self.limit)
        open_ = inside & ~at_limit
        while bool((open_ := open_ & (high > low * (1 + self.rtol))).any()):
            which = open_.nonzero().flatten()
            middle = torch.where(open_, (low * high).sqrt(), low)
            stuck = (middle <= low) | (middle >= high)
            good = holds(middle, which)
            low[which[good]], high[which[~good]] = middle[which[good]], middle[which[~good]]
            open_ = open_ & ~stuck
        resolved = finite & inside
        radii = torch.where(resolved, low, low.new_tensor(torch.nan))
        codes = torch.where(finite, (~resolved).long(), 2)
        return {"radii": radii, "at_limit": resolved & at_limit, "jvp": jvp, "codes": codes}
