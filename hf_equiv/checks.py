"""Check user input once, at the entry of each public function, with one function for each rule.

Messages follow one template: `` `name` must <requirement>; got <actual>. <What to do.> ``
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

NORMS = ("linf", "l2")

Bounds = tuple[float, float] | None  # the box of the images; None for no box
UNIT = (0.0, 1.0)  # the box of pixels


def check_tensor(images: Tensor, name: str, channels: str | None = None) -> None:
    """Require a float tensor (B, *shape), or with `channels` pictures (B, 3, H, W)."""
    if not isinstance(images, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor; got {type(images).__name__}. Use `encoder.preprocess(...)`.")
    fits = images.ndim >= 2 if channels is None else images.ndim == 4 and images.shape[1] == 3
    if not fits:
        wanted, single = ("*shape", 1) if channels is None else (f"{channels}, H, W", 3)
        cure = f"Add a batch axis with `{name}[None]`." if images.ndim == single else "Use `encoder.preprocess(...)`."
        raise ValueError(f"`{name}` must have shape (B, {wanted}); got {tuple(images.shape)}. {cure}")
    if not images.is_floating_point():
        raise TypeError(f"`{name}` must be a float tensor; got dtype {images.dtype}. Divide 8-bit values by 255.")


def check_bounds(bounds: Bounds, images: Tensor) -> tuple[float, float]:
    """Require two finite numbers, ascending, or None; return them in the dtype of `images`, −∞ and ∞ for None."""
    if bounds is None:
        return -math.inf, math.inf
    wanted = "two finite numbers (lower, upper), or None for no box"
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"`bounds` must be {wanted}; got {bounds!r}. Use (0, 1) for pixels.")
    for end in bounds:
        _check_number(end, "bounds", wanted)
    low, high = torch.tensor(bounds, dtype=images.dtype, device="cpu").tolist()
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"`bounds` must be {wanted}, with lower < upper; got {bounds}. Use (0, 1) for pixels.")
    return low, high


def check_images(images: Tensor, name: str = "images", bounds: Bounds = UNIT) -> None:
    """Require a float tensor (B, *shape) of finite values within the bounds, by default pixels in [0, 1]."""
    check_tensor(images, name)
    if images.numel() == 0:
        raise ValueError(f"`{name}` must hold at least one image; got an empty batch {tuple(images.shape)}.")
    low, high = check_bounds(bounds, images)
    if bad := _not_finite(images):
        raise ValueError(f"`{name}` must be finite; got NaN or infinity in {bad}. Check how it was read.")
    least, most = float(images.detach().min()), float(images.detach().max())
    if low <= least and most <= high:
        return
    if bounds == UNIT:
        cure = "Pass raw pixels: the encoder normalises them itself." if least < 0.0 else "Divide 8-bit values by 255."
        raise ValueError(
            f"`{name}` must lie in [0, 1]; got values in [{least:.4g}, {most:.4g}]. {cure} For inputs "
            "that are no pixels pass `bounds`; they have no 8-bit form."
        )
    outside = (images.detach() < low) | (images.detach() > high)
    image, value = int(outside.nonzero()[0, 0]), float(images.detach()[outside][0])
    raise ValueError(
        f"`{name}` must lie within `bounds` [{low:g}, {high:g}]; got {value:.6g} in image {image}. Widen `bounds`, or "
        "pass None for no box."
    )


def _not_finite(values: Tensor) -> str:
    """Name the first image of a batch that has a value that is not finite, if there is one."""
    bad = (~torch.isfinite(values.detach())).flatten(1).any(dim=1).nonzero()
    return f"image {int(bad[0])}" if len(bad) else ""


def check_like(images: Tensor, like: Tensor, name: str, *, one: bool = True, bounds: Bounds = UNIT) -> None:
    """Require images of the shape of `like` (B, *shape), or a single one unless `one` is false."""
    check_images(images, name, bounds)
    if images.shape[0] not in (1 if one else len(like), len(like)) or images.shape[1:] != like.shape[1:]:
        raise ValueError(f"`{name}` must have the shape of `images` {tuple(like.shape)}; got {tuple(images.shape)}.")


def is_image(target: Tensor, images: Tensor) -> bool:
    """Whether a target is an image, of as many axes as `images` (B, *shape), and not an embedding (B or 1, D)."""
    # For vectors (B, N) a target (B, N) is an image, and any other length an embedding. Give the vectors another axis,
    # (B, 1, N), to pass an embedding of N numbers.
    return target.ndim == images.ndim and (target.ndim > 2 or target.shape[1:] == images.shape[1:])


def check_target(target: Tensor, images: Tensor, name: str = "images", bounds: Bounds = UNIT) -> None:
    """Require images (B or 1, *shape) or finite non-zero embeddings (B or 1, D); `is_image` tells them apart."""
    if not isinstance(target, Tensor):
        raise TypeError(f"`target` must be a torch.Tensor; got {type(target).__name__}.")
    if target.ndim not in (2, images.ndim):
        shape = ", ".join(map(str, images.shape[1:]))
        hint = " Pass `target[None]` for a single one." if target.ndim in (1, images.ndim - 1) else ""
        hint = f" Add a batch axis with `{name}[None]`." if target.ndim == images.ndim + 1 else hint
        raise ValueError(
            f"`target` must be images (B, {shape}) or embeddings (B, D); got shape {tuple(target.shape)}.{hint}"
        )
    if target.shape[0] not in (1, len(images)):
        sizes = "1" if len(images) == 1 else f"1 or {len(images)}"
        raise ValueError(f"`target` must have batch size {sizes}; got {target.shape[0]}. Pass one per source.")
    if is_image(target, images):
        check_images(target, "target", bounds)
        if target.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"`target` must have the image shape of `{name}` {tuple(images.shape[1:])}; "
                f"got {tuple(target.shape[1:])}. Preprocess both with the same encoder."
            )
        return
    if not target.is_floating_point():
        raise TypeError(f"`target` must be a float tensor; got dtype {target.dtype}.")
    check_embeddings(target)


def check_embeddings(z: Tensor) -> None:
    """Require finite, non-zero embeddings whose squares neither overflow nor vanish: errors are relative to ‖z‖."""
    if bad := _not_finite(z):
        raise ValueError(
            f"`target` embeddings must be finite; got NaN or infinity for {bad}. Check `f` if they come from it."
        )
    largest = z.double().abs().amax(dim=1)
    if bool((largest == 0).any()):
        raise ValueError("`target` embeddings must have non-zero norm: the embedding error is relative to it.")
    if bool(((largest < 1e-150) | (largest > 1e150)).any()):
        raise ValueError(
            f"`target` embeddings must be between 1e-150 and 1e150; got {float(largest.min()):.1e} to "
            f"{float(largest.max()):.1e}. Scale the encoder."
        )


def check_radius(radius: float | None, norm: str, num_pixels: int, name: str = "radius", bounds: Bounds = UNIT) -> None:
    """Require a radius above 0, at most the side of the box for linf or its diagonal for l2, or None."""
    check_choice(norm, "norm", NORMS)
    if radius is None:
        return
    _check_number(radius, name, "a number or None")
    if bounds is None:
        check_positive(radius, name)
        return
    limit = (bounds[1] - bounds[0]) * (1.0 if norm == "linf" else math.sqrt(num_pixels))
    if not math.isfinite(radius) or not 0.0 < radius <= limit:
        box = "pixels in [0, 1]" if bounds == UNIT else f"`bounds` {bounds}"
        raise ValueError(
            f"`{name}` must lie in (0, {limit:.6g}] for norm {norm!r} ({box}); got {radius}. "
            f"Leave it out for no ball, or use a value such as {'8/255' if norm == 'linf' else '2.5'}."
        )


def check_choice(value: str, name: str, allowed: Iterable[str]) -> None:
    """Require one of several words."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {value!r}.")


def _check_number(value: object, name: str, wanted: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be {wanted}; got {type(value).__name__}.")


def check_positive(value: float, name: str, below: float = math.inf, *, or_zero: bool = False) -> None:
    """Require a finite number above 0, or 0 itself with `or_zero`, and below a limit."""
    _check_number(value, name)
    if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        raise ValueError(f"`{name}` must be finite and {'at least' if or_zero else 'above'} 0; got {value}.")
    if value >= below:
        raise ValueError(f"`{name}` must be below {below:g}; got {value}.")


def check_output(z: Tensor, batch: int) -> None:
    """Require that f returned a dense float tensor (B, D)."""
    usual = isinstance(z, Tensor) and z.ndim == 2 and z.layout is torch.strided and z.is_floating_point()
    if not usual or z.shape[0] != batch or z.shape[1] == 0:
        got = f"shape {tuple(z.shape)}, dtype {z.dtype}, {z.layout}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(
            f"`f` must map (B, *shape) to a float tensor (B, D); got {got}. Return one tensor, such as "
            "`model(x).pooler_output`, flattened to (B, D)."
        )


def check_dimension(target: Tensor, dimension: int) -> None:
    """Require a target embedding (D,) of the encoder's dimension."""
    if target.shape[0] != dimension:
        raise ValueError(
            f"`target` embeddings must have the encoder's dimension {dimension}; got {target.shape[0]}. "
            "Pass embeddings of the same encoder and readout, or the target's pixels."
        )


def check_count(value: int, name: str, least: int = 1) -> None:
    """Require a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number; got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}; got {value}.")


def check_rtol(rtol: float) -> None:
    """Require an embedding error in (0, 1); an embedding of zeros has the error 1."""
    check_positive(rtol, "rtol")
    if rtol >= 1:
        raise ValueError(f"`rtol` must be below 1, the error of an embedding of zeros; got {rtol}. Use 1e-5.")


def check_solver(solver: object) -> None:
    """Require an object with a `begin` method, such as `LBFGS()`."""
    if isinstance(solver, type) or not callable(getattr(solver, "begin", None)):
        got = f"the class {solver.__name__}" if isinstance(solver, type) else repr(solver)
        raise TypeError(f"`solver` must be a solver such as LBFGS(), Adam() or GradientDescent(); got {got}.")


def check_match(
    images: Tensor, name: str, target: Tensor, radius: float | None, norm: str, rtol: float, max_evals: int,
    bounds: Bounds = UNIT
) -> None:  # fmt: skip
    """Require the arguments that matching and refinement share."""
    check_images(images, name, bounds)
    check_target(target, images, name, bounds)
    check_radius(radius, norm, images[0].numel(), bounds=bounds)
    check_rtol(rtol)
    check_count(max_evals, "max_evals")


def check_radii(radii: Tensor) -> None:
    """Require at least four positive finite radii, ascending, at least four a decade."""
    if radii.ndim != 1 or len(radii) < 4:
        raise ValueError(
            f"`radii` must be at least 4 numbers; got {radii.numel()}. Use 1e-5:1, or torch.logspace(-5, 0, 21)."
        )
    if not bool(torch.isfinite(radii).all()) or float(radii.min()) <= 0:
        raise ValueError("`radii` must be finite and above 0. They are L2 lengths in pixel units.")
    ratios = (radii[1:] / radii[:-1]).double()
    if float(ratios.min()) <= 1 or float(ratios.max()) > 10**0.25 * (1 + 1e-6):
        raise ValueError(
            "`radii` must ascend with at least four a decade (ratios in (1, 1.7783]); "
            f"got ratios from {float(ratios.min()):.4g} to {float(ratios.max()):.4g}. "
            "Use 1e-5:1, or torch.logspace(-5, 0, 21)."
        )


def check_directions(directions: Tensor, images: Tensor) -> None:
    """Require float, finite, non-zero directions (B, K, *shape) for images (B, *shape)."""
    if not isinstance(directions, Tensor) or not directions.is_floating_point():
        raise TypeError("`directions` must be a float tensor or the result of `make_directions`.")
    wanted = (images.shape[0], "K", *images.shape[1:])
    fits = directions.shape[:1] == images.shape[:1] and directions.shape[2:] == images.shape[1:] and directions.ndim > 2
    if not fits or directions.shape[1] == 0:
        raise ValueError(
            f"`directions` must have shape ({', '.join(map(str, wanted))}) with K ≥ 1; got {tuple(directions.shape)}."
        )
    norms = directions.flatten(2).norm(dim=2)
    if not bool(torch.isfinite(norms).all()) or bool((norms == 0).any()):
        raise ValueError("`directions` must be finite and not zero: a zero vector has no direction.")
