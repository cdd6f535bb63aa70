"""The rows of `geometry.py` for singular values and Lipschitz constants, beside the truth in float64."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from geometry_peers import TOP, TORCHLIP, Watched, art_clever, installed
from torch import Tensor

from hf_equiv import Jacobian, directional_lipschitz, make_directions, regional_lipschitz
from hf_equiv.conditions import admit
from hf_equiv.geometry.directions import Directions

ROUNDS = 3
"""Times that what is compared by its seconds is run, in turn."""
NUM_DIRECTIONS = 8
"""Random and null directions at an image."""
STEPS = (1e-7, 1e-5)
"""Of the naive forward secants."""
RADIUS = 1.0
"""Of the ball."""

Run = Callable[[], Any]


@dataclass(frozen=True)
class Exact:
    """The truth at one image.

    Attributes:
        f: the encoder in float64.
        matrix: J (D, N), float64.
        sigma: its singular values, descending.
    """

    f: Callable[[Tensor], Tensor]
    matrix: Tensor
    sigma: Tensor

    @classmethod
    def at(cls, f: Any, image: Tensor) -> Exact:
        """Form J of the float64 twin at an image (1, C, H, W); of f itself where it has none."""
        twin = f.double() if hasattr(f, "double") else f
        matrix = Jacobian(twin, image[0].double()).as_matrix()
        return cls(twin, matrix, torch.linalg.svdvals(matrix))

    def lengths(self, directions: Tensor) -> list[float]:
        """‖Jv‖ of unit directions (K, C, H, W)."""
        return (directions.flatten(1).double() @ self.matrix.T).norm(dim=1).tolist()


class Bench:
    """Runs the methods, skips the peers that are absent or fail, and says so.

    Attributes:
        skipped: peers that gave no row, by title, with the reason.
    """

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}

    def attempt(self, title: str, needs: str, run: Run) -> Any:
        """What `run` returns; None where a peer is absent or fails. This library may not fail."""
        if title in self.skipped:
            return None
        if not installed(needs):
            return self.skip(title, f"{needs.partition('.')[0]} is not installed")
        try:
            return run()
        except Exception as error:
            if needs == "hf_equiv":
                raise
            return self.skip(title, " ".join(f"{type(error).__name__}: {error}".split())[:160])

    def skip(self, title: str, reason: str) -> None:
        """Note that a peer gives no row."""
        self.skipped[title] = reason
        print(f"{title} is skipped: {reason}.", file=sys.stderr)


def top_rows(bench: Bench, f: Any, image: Tensor, exact: Exact, k: int, seed: int) -> list[dict[str, Any]]:
    """The largest singular values at one image (1, C, H, W), by every method."""
    in_turn = ["full", "bare-8", "bare-48"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in [*in_turn * ROUNDS, *(name for name in TOP if name not in in_turn)]:
        method, counter = TOP[name], Watched(f)
        found = bench.attempt(method.title, method.needs, lambda m=method, c=counter: m.run(c, image, k, seed))
        if found is None:
            continue
        row: dict[str, Any] = {
            "method": name,
            "count": None,
            "error": None,
            "bound": None,
            "held": None,
            "passes": (counter.tangents + counter.cotangents) / 2,
            "num_evals": max(counter.num_evals, found.num_evals),
            "seconds": counter.seconds,
        }
        if found.values is not None:
            values = found.values.cpu()
            off = (values - exact.sigma[: len(values)].cpu()).abs()
            row.update(count=len(values), error=float(off.max() / exact.sigma[0]))
            if found.bound is not None:
                row.update(bound=float(found.bound.max() / exact.sigma[0]), held=bool((off <= found.bound.cpu()).all()))
        runs.setdefault(name, []).append(row)
    rows = [{**same[0], "seconds": statistics.median(row["seconds"] for row in same)} for same in runs.values()]
    slower = max((row for row in rows if row["method"].startswith("bare")), key=lambda row: row["seconds"])
    order = list(TOP)
    return sorted((row for row in rows if row is not slower), key=lambda row: order.index(row["method"]))


def local_rows(bench: Bench, f: Any, image: Tensor, exact: Exact, seed: int) -> list[dict[str, Any]]:
    """Local constants at one image: what each method states, and what is true."""
    sigma = float(exact.sigma[0])
    rows = []

    def add(
        title: str, stated: list[float | None], true: list[float], counter: Watched, num_evals: float = 0.0
    ) -> None:
        evals = max(counter.num_evals, num_evals)
        row = {"method": title, "stated": stated, "true": true, "sigma_max": sigma}
        rows.append({**row, "num_evals": evals, "seconds": counter.seconds})

    generator = torch.Generator().manual_seed(seed)
    made = make_directions(f, image, random=NUM_DIRECTIONS, top=1, null=NUM_DIRECTIONS, generator=generator)
    names = {"top": "the top direction", "random": "random directions", "null": "null directions"}
    for kind, name in names.items():
        picks = [index for index, own in enumerate(made.kinds) if own == kind]
        some = Directions(made.vectors[:, picks], (kind,) * len(picks), tuple(range(len(picks))))
        true, counter = exact.lengths(some.vectors[0]), Watched(f)
        admit(counter, image, gradient=False)
        with counter.measure():
            found = directional_lipschitz(counter, image, some)
        stated = [value if math.isfinite(value) else None for value in found.values[0].tolist()]
        add(f"**hf_equiv**, {name}", stated, true, counter, float(found.num_evals[0]))
        for h in STEPS if kind != "top" else ():
            counter = Watched(f)
            with counter.measure(), torch.no_grad():
                z = counter(image)
                naive = [float((counter(image + h * v) - z).double().norm()) / h for v in some.vectors[0]]
            add(f"forward secant, h = {h:.0e}, {name}", naive, true, counter)
    for name, method in TORCHLIP.items():
        if name == "torchlip-jacobian" and not _fits(exact.matrix):
            bench.skip(method.title, "a Jacobian in one pass does not fit into memory")
        counter = Watched(f)
        value = bench.attempt(method.title, method.needs, lambda m=method, c=counter: m.run(c, image, seed))
        if value is not None:
            add(method.title, [value], [sigma], counter)
    return rows


def _fits(matrix: Tensor) -> bool:
    """Whether D copies of the widest layers fit: those of a ViT hold about 12 numbers for each of a large image."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 12 * 4 * matrix.numel() < 0.4 * memory


def regional_rows(bench: Bench, f: Any, image: Tensor, sigma: float, seed: int, **effort: int) -> list[dict[str, Any]]:
    """Constants of the ball about one image: of the embedding, and of a logit margin where there is a head.

    `effort` goes to `regional_lipschitz`.

    Returns:
        One row a method, each with the lower bound of the same constant.
    """
    rows = _regional("embedding", f, image, sigma, None, seed, **effort)
    if not getattr(f, "has_head", False):
        bench.skip("ART clever_t", "the checkpoint has no classification head")
        return rows
    with torch.no_grad():
        logits = f.classify(image)[0]
    best, second = logits.topk(2).indices.tolist()

    def margin_of(encoder: Any) -> Callable[[Tensor], Tensor]:
        def margin(x: Tensor) -> Tensor:
            scores = encoder.classify(x)
            return (scores[:, best] - scores[:, second])[:, None]

        return margin

    class Margin:
        """The margin with its float64 twin."""

        __call__ = staticmethod(margin_of(f))
        double = staticmethod(lambda: margin_of(f.double()))

    value = float(logits[best] - logits[second])
    at_center = float(Jacobian(margin_of(f.double()), image[0].double()).as_matrix().norm())
    rows += _regional("logit margin", Margin(), image, at_center, value, seed, **effort)
    bound, counter = rows[-2]["value"], Watched(f.classify)
    score = bench.attempt("ART clever_t", "art", lambda: art_clever(counter, image, len(logits), second, RADIUS, seed))
    if score is not None:
        constant = value / score if score > 0 else None  # its fit may fail
        row = {"method": "ART clever_t", "of": "logit margin", "value": constant, "lower_bound": bound}
        row.update(at_center=at_center, checked=None, radius=score, saturated=score >= RADIUS)
        rows.append({**row, "num_evals": counter.num_evals, "seconds": counter.seconds})
    return rows


def _regional(
    of: str, f: Any, image: Tensor, at_center: float, margin: float | None, seed: int, **effort: int
) -> list[dict[str, Any]]:
    """This library's lower bound, checked in float64 where it was found, and its extreme-value estimate."""
    found = regional_lipschitz(f, image, RADIUS, generator=torch.Generator().manual_seed(seed), **effort)
    bound, estimate = float(found.lower_bound[0]), float(found.clever[0])
    there = Jacobian(f.double() if hasattr(f, "double") else f, found.images[0].double())
    inside = float((found.images - image).double().norm()) <= RADIUS * (1 + 1e-6)
    checked = float(there.mv(found.directions)[0].norm()) if inside else 0.0
    rows = []
    for method, value in (("**hf_equiv**, lower bound", bound), ("hf_equiv, CLEVER (same run)", estimate)):
        stated = value if math.isfinite(value) else None
        row = {"method": method, "of": of, "value": stated, "lower_bound": bound, "at_center": at_center}
        row["checked"] = checked / bound if stated == bound else None
        row["radius"] = None if margin is None or stated is None else min(margin / stated, RADIUS)
        row.update(saturated=False, num_evals=float(found.num_evals[0]), seconds=float(found.seconds[0]))
        rows.append(row)
    return rows
