"""The walks of `geometry.py`: this library's, and the uncorrected Euler walk in the null space."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from geometry_peers import Watched
from torch import Tensor

from hf_equiv import Jacobian, row_space, trace_level_set
from hf_equiv.conditions import admit

DRIFT = 1e-4
"""Drift at which the Euler walk is to end."""
DRIFT_RTOL = 0.1
"""How near to it is near enough."""
EULER_WALKS = 6
"""Walks that the search for its step may take."""


def walk_rows(f: Any, image: Tensor, num_steps: int, seed: int) -> list[dict[str, Any]]:
    """The corrected and the uncorrected walk from one image, along the same direction."""
    twin = f.double() if hasattr(f, "double") else f
    generator = torch.Generator().manual_seed(seed)
    heading = torch.randn(image.shape, generator=generator, dtype=torch.float64).to(image)
    counter = Watched(f)
    admit(counter, image)
    with counter.measure():
        walk = trace_level_set(counter, image, heading=heading, num_steps=num_steps, rtol=1e-5, keep_points=True)
    points = [point.pixels for point in walk.paths[0]]
    if not points:
        raise RuntimeError(f"`trace_level_set` must reach a point; it ended with status {walk.status[0]}.")
    rows = [
        {
            "method": "**hf_equiv**",
            **_path(twin, points),
            "status": str(walk.status[0]),
            "walks": 1,
            "jacobians": int(walk.num_jacobians[0]),
            "num_evals": max(counter.num_evals, float(walk.num_evals[0])),
            "seconds": counter.seconds,
        }
    ]
    search = EulerSearch(f, image[0], heading[0], num_steps, lambda line: print(line, file=sys.stderr, flush=True))
    euler, walks = search.run()
    rows.append(
        {
            "method": "Euler in the null space, no correction",
            **_path(twin, euler.points),
            "status": f"h = {euler.step:.2g}",
            "walks": walks,
            "jacobians": num_steps,
            "num_evals": euler.num_evals,
            "seconds": euler.seconds,
        }
    )
    return rows


def _path(f: Callable[[Tensor], Tensor], points: list[Tensor]) -> dict[str, Any]:
    """Largest drift by the float64 encoder f, distance reached and arc length."""
    with torch.no_grad():
        z = torch.cat([f(point[None].double()) for point in points])
    moves = torch.stack(points).double().diff(dim=0).flatten(1).norm(dim=1)
    return {
        "drift": float((z - z[:1]).norm(dim=1).max() / z[0].norm()),
        "l2": float((points[-1].double() - points[0].double()).norm()),
        "arc_length": float(moves.sum()),
        "points": len(points) - 1,
    }


@dataclass
class EulerWalk:
    """An uncorrected walk.

    Attributes:
        step: its length, L2 in pixel units.
        points: the images, (C, H, W), the start first.
        drift: ‖f(x) − z‖ / ‖z‖ of the last.
        num_evals: evaluations of this walk.
        seconds: its wall time.
    """

    step: float
    points: list[Tensor]
    drift: float
    num_evals: float = 0.0
    seconds: float = 0.0


@dataclass
class EulerSearch:
    """The step h of the Euler walk that ends at `DRIFT`, by bisection in log h.

    A pilot step gives the first guess: drift ∝ h² a step, and the steps add up. Then h ∝ √drift until there is a walk
    on either side, and interpolation in log h against log drift from there on.

    Args:
        f: the encoder.
        image: where to start, (C, H, W).
        heading: v, (C, H, W).
        num_steps: of a walk.
        progress: called with a line of text now and then.
    """

    f: Callable[[Tensor], Tensor]
    image: Tensor
    heading: Tensor
    num_steps: int
    progress: Callable[[str], None] = field(default=lambda line: None)

    def run(self) -> tuple[EulerWalk, int]:
        """Walk until the drift at the end is near enough.

        Returns:
            The walk that came nearest, and how many were made.
        """
        pilot = self._walk(0.1, 1)
        step = pilot.step * math.sqrt(DRIFT / (self.num_steps * max(pilot.drift, 1e-12)))
        below = above = best = None
        for count in range(1, EULER_WALKS + 1):
            walk = self._walk(step, self.num_steps)
            miss = abs(walk.drift / DRIFT - 1)
            self.progress(f"Euler walk {count}: step {step:.3g} ends at drift {walk.drift:.2e}")
            if best is None or miss < abs(best.drift / DRIFT - 1):
                best = walk
            if miss <= DRIFT_RTOL:
                break
            if walk.drift < DRIFT:
                below = walk
            else:
                above = walk
            if below is None or above is None:
                step *= math.sqrt(DRIFT / max(walk.drift, 1e-12))
            else:
                share = math.log(DRIFT / below.drift) / math.log(above.drift / below.drift)
                step = below.step * (above.step / below.step) ** min(max(share, 0.1), 0.9)
        assert best is not None
        return best, count

    def _walk(self, step: float, num_steps: int) -> EulerWalk:
        """X ← clip(x + h·P_null v/‖P_null v‖), P_null from a fresh Jacobian at every point."""
        counter, x = Watched(self.f), self.image
        admit(counter, x[None])
        points = [x]
        with counter.measure():
            z = None
            for index in range(num_steps):
                J = Jacobian(counter, x)
                z = J.z.double() if z is None else z
                tangent = row_space(J).project_null(self.heading)
                x = (x + step * tangent / torch.linalg.vector_norm(tangent)).clamp(0, 1)
                points.append(x)
                if num_steps > 1 and (index + 1) % 10 == 0:
                    self.progress(f"Euler walk, step {step:.3g}: {index + 1}/{num_steps}, {counter.seconds:.0f} s")
        with torch.no_grad():
            drift = float((self.f(x[None])[0].double() - z).norm() / z.norm())
        return EulerWalk(step, points, drift, counter.num_evals, counter.seconds)
