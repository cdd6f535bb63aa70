"""Compute the singular values of ∂f/∂x with error bounds, and explain the zeros among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_equiv import bars, checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import Function, admit
from hf_equiv.geometry.invariance import row_energy
from hf_equiv.geometry.singular import ACCURACY, combine, derivative_noise, golub_kahan, left_singular, rounding
from hf_equiv.geometry.zeros import LeftRelation, Zero, explain_zeros
from hf_equiv.jacobian import check_equal
from hf_equiv.memory import MEMORY
from hf_equiv.passes import Sight, Work, at_once, look, measure_images
from hf_equiv.precision import Encoding
from hf_equiv.results import Status


@dataclass(frozen=True, slots=True)
class SpectrumResult:
    """Singular values of J = ∂f/∂x (D, N) at each image of N numbers, in embedding per unit of these, such as pixels.

    Fields that need every singular value are None if only the largest were computed. An image whose status is `error`
    has NaN values and rank −1.

    Attributes:
        singular_values: σ₁ ≥ σ₂ …, (B, K), float64; K = min(D, N), or `k`.
        error_bound: bound on the distance of each to the value in exact arithmetic, (B, K), float64. It holds with high
            probability: the noise of f is measured along random directions, with a margin for one that they miss.
        noise_method: how its float noise was measured, per image: "float64 twin" or "perturbed input".
        sigma_max: σ₁, (B,), float64.
        rank: number of values above `rank_threshold`, by default those that exceed their bounds, (B,), int64, or None.
        nullity: N − rank, (B,), int64, or None.
        rank_threshold: threshold in the units of σ, (B,), float64.
        effective_rank: exp(−Σ p log p) with p = σ / Σσ (Roy & Vetterli 2007), (B,), float64, or None.
        participation: (Σσ²)² / Σσ⁴, (B,), float64, or None.
        invariance_map: share of a change that lies in the row space, by cell of a grid of at most 14 × 14, over the
            mean share R/N, (B, rows, columns), float64; 0 for cells that lie in the null space. Like the next two, None
            if J was not formed or the input is no image (C, H, W).
        band_energy: the same by frequency, (B, 5): below 1/32, 1/16, 1/8 and 1/4 cycle per pixel, and above.
        channel_energy: the same by channel, (B, C).
        structural_zeros: per image the exact zeros by cause, and the unexplained ones.
        near_structural: per image the values that would be exact zeros but for a small constant of the architecture.
        patch_nullity: part of the nullity that the patch embedding discards at every image; or None.
        left: left singular vectors, (B, D, K), or None.
        right: right singular vectors as images, (B, K, *shape), or None.
        method: "full" or "golub_kahan", per image.
        num_evals: (forwards + 2·cotangents + 2·tangents) / 3, (B,), float64.
        seconds: wall time, (B,), float64, with an equal part of the time of each shared pass.
        status: `completed` or `error`, per image.
    """

    singular_values: Tensor
    error_bound: Tensor
    noise_method: tuple[str, ...]
    sigma_max: Tensor
    rank: Tensor | None
    nullity: Tensor | None
    rank_threshold: Tensor
    effective_rank: Tensor | None
    participation: Tensor | None
    invariance_map: Tensor | None
    band_energy: Tensor | None
    channel_energy: Tensor | None
    structural_zeros: tuple[tuple[Zero, ...], ...]
    near_structural: tuple[tuple[Zero, ...], ...]
    patch_nullity: int | None
    left: Tensor | None
    right: Tensor | None
    method: tuple[str, ...]
    num_evals: Tensor
    seconds: Tensor
    status: tuple[Status, ...]

    def energy_share(self, k: int) -> Tensor:
        """Return Σ_{i ≤ k} σ_i² / Σ σ_i², the share of the first k in ‖Jv‖² averaged over all directions.

        Args:
            k: number of the largest values.

        Returns:
            (B,) float64, in [0, 1].

        Raises:
            ValueError: only the largest values were computed, or there are fewer than `k`.
        """
        checks.check_count(k, "k")
        if self.rank is None or k > self.singular_values.shape[1]:
            raise ValueError(f"`k` must be at most the number of values of a full spectrum; got {k}. Leave out `k=`.")
        squares = self.singular_values.square()
        return squares[:, :k].sum(dim=1) / squares.sum(dim=1)

    def __repr__(self) -> str:
        """State the number of images and values, σ₁ and rank in one line."""
        count = self.singular_values.shape[1]
        rank = "" if self.rank is None else f", rank {', '.join(map(str, self.rank.tolist()))}"
        largest = ", ".join(f"{s:.4g}" for s in self.sigma_max.tolist())
        return f"SpectrumResult({len(self.status)} images: {count} values, sigma_max {largest}{rank})"


def jacobian_spectrum(
    f: Encoding,
    images: Tensor,
    *,
    k: int | None = None,
    method: str = "auto",
    vectors: bool = False,
    rank_rtol: float | None = None,
    rtol: float = 1e-4,
    batch: int = 32,
    memory: int = MEMORY,
    bounds: Bounds = UNIT,
    progress: Callable[[int, int], None] | bool | None = None,
) -> SpectrumResult:
    """Compute the singular values of J = ∂f/∂x at each image: how far the embedding moves, along how many directions.

    J = U diag(σ) Vᵀ (D, N). The right vectors are the pixel directions that move the embedding, in order. "full" forms
    J and takes all σ from it in float64; "golub_kahan" finds the top k from products with J and Jᵀ. For an Encoder,
    zeros of known cause are named.

    Cost: full (1 + 2D)/3 evaluations an image; golub_kahan 4/3 a pass, about 2k + 7 passes. Memory: full D·N numbers an
    image, golub_kahan 3N a pass; and the activations of `batch` images. On a GPU images share passes: at most `batch`,
    with Jacobians of at most `memory` bytes. A pass that runs out of memory is halved.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D).
        images: (B, *shape), within `bounds`.
        k: number of singular values; None for all min(D, N).
        method: "full", "golub_kahan", or "auto" for the quicker.
        vectors: whether to return singular vectors.
        rank_rtol: threshold of the rank over σ₁; None for the error bound of a zero.
        rtol: bound over σ₁ at which "golub_kahan" stops.
        batch: most cotangents per pass, those of all images together; memory grows with it.
        memory: most bytes of the Jacobians held at once; at least one image is worked on, and on a CPU one.
        bounds: the box that `images` must lie in; None for none.
        progress: called after each image with (images done, images in all); by default a bar in a terminal or notebook,
            False for none.

    Returns:
        The spectrum of each image.

    Raises:
        ValueError: values outside `bounds`, a bad argument, an f that is not differentiable or not deterministic, or a
            Jacobian too large for the memory.

    Example:
        >>> import torch
        >>> from hf_equiv import jacobian_spectrum
        >>> result = jacobian_spectrum(lambda x: x.flatten(1) * torch.tensor([3, 2, 0]), torch.full((1, 3, 1, 1), 0.5))
        >>> result.singular_values.tolist(), result.rank.tolist(), result.structural_zeros[0][0].cause
        ([[3.0, 2.0, 0.0]], [2], 'unexplained')

    References:
        Salman, Shams, Liu (2024), arXiv:2401.15568, §3. Roy, Vetterli (2007), EUSIPCO, "The effective rank".
    """
    checks.check_images(images, bounds=bounds)
    checks.check_positive(rtol, "rtol")
    checks.check_count(memory, "memory")
    checks.check_choice(method, "method", ("auto", "full", "golub_kahan"))
    if rank_rtol is not None:
        checks.check_positive(rank_rtol, "rank_rtol", 1, or_zero=True)
    if k is not None:
        checks.check_count(k, "k")
    options = k, method, vectors, rank_rtol, rtol
    f = admit(f, images, each=True, bounds=bounds)
    with bars.shown(progress, "spectrum", bars.count) as hook:
        fields = measure_images(
            images, lambda b: _measure(f, images[b].detach(), *options), hook,
            count=at_once(f, images, batch, memory), most=batch,
        )  # fmt: skip
    return SpectrumResult(patch_nullity=_patch_nullity(f, images[0]), **fields)


def _measure(
    f: Function, image: Tensor, k: int | None, method: str, vectors: bool, rank_rtol: float | None, rtol: float
) -> Work[dict[str, Any]]:
    """Return the fields of one image by the method asked for, or the quicker."""
    first = yield from look(f, image)
    J = yield from look(f, image)
    check_equal(first.z, J.z, J.eps)
    J.num_evals += first.num_evals
    size = min(J.shape)
    count = size if k is None else k
    if count > size:
        raise ValueError(f"`k` must be at most min(D, N) = {size}; got {count}.")
    # A pass of Golub–Kahan costs about two VJPs; forming J costs D of them.
    quicker = count < size and 2 * (2 * count + 6) < 0.8 * J.shape[0]
    if method == "golub_kahan" or (method == "auto" and quicker):
        return (yield from _top(J, count, vectors, rank_rtol, rtol))
    return (yield from _full(J, count, vectors, rank_rtol))


def _full(J: Sight, k: int, vectors: bool, rank_rtol: float | None) -> Work[dict[str, Any]]:
    """Return the fields of one image from the matrix."""
    matrix = yield from J.as_matrix()
    if not bool(torch.isfinite(matrix).all()):
        none, nan = torch.tensor(-1, device="cpu"), math.nan
        missing = torch.full((J.shape[0], 1), nan, dtype=torch.float64, device=matrix.device)
        more = {"rank": none, "nullity": none, "effective_rank": nan, "participation": nan}
        return _failed(J, "full", k, vectors, **more, **row_energy(matrix, missing, missing[0], J.image.shape))
    left, sigma = left_singular(matrix)
    count = min(J.shape)
    scale = float(sigma[0])
    bound, least, noise, spent = yield from derivative_noise(J, matrix, left, sigma)
    exact_to = rounding(matrix, sigma)
    bound, least = bound + exact_to, least + float(exact_to[-1])
    threshold = least if rank_rtol is None else rank_rtol * scale
    predict = getattr(J.f, "left_relations", None)
    relations: tuple[LeftRelation, ...] = predict(J.image) if predict is not None else ()
    sigma, bound = sigma[:count], bound[:count]
    wide = J.shape[0] > J.shape[1]  # then any f has D − N left null vectors
    exact, near = explain_zeros(matrix, left[:, :count], sigma, threshold, () if wide else relations)
    rank, share, right = (sigma > threshold).sum().cpu(), sigma / sigma.sum(), None
    seen = row_energy(matrix, left[:, :rank], sigma[:rank], J.image.shape)
    if vectors:
        values = sigma[:k, None]
        right = combine(matrix, left[:, :k]) / values.where(values > ACCURACY * scale, 1.0)
    return _fields(
        J,
        "full",
        sigma[:k],
        bound[:k],
        threshold,
        left[:, :k] if vectors else None,
        right,
        noise_method=noise,
        num_evals=J.num_evals + spent + (11 / 3 if predict is not None else 0.0),
        rank=rank,
        nullity=J.shape[1] - rank,
        effective_rank=float(torch.special.entr(share).sum().exp()) if scale > 0 else 0.0,
        participation=float(sigma.square().sum().square() / sigma.pow(4).sum()) if scale > 0 else 0.0,
        structural_zeros=exact,
        near_structural=near,
        **seen,
    )


def _top(J: Sight, k: int, vectors: bool, rank_rtol: float | None, rtol: float) -> Work[dict[str, Any]]:
    """Return the fields of one image from products with J and Jᵀ."""
    if not bool(torch.isfinite((yield from J.rmv(torch.ones_like(J.z)[None]))).all()):
        return _failed(J, "golub_kahan", k, vectors)
    top = yield from golub_kahan(J, k, rtol)
    noise, least, name, spent = yield from derivative_noise(J, None, top.left, top.values)
    threshold = least if rank_rtol is None else rank_rtol * float(top.values[0])
    pair = (top.left, top.right) if vectors else (None, None)
    more: dict[str, Any] = {"noise_method": name, "num_evals": J.num_evals + spent}
    return _fields(J, "golub_kahan", top.values, top.bound + noise, threshold, *pair, **more)


def _failed(J: Sight, method: str, k: int, vectors: bool, **more: Any) -> dict[str, Any]:
    nan = torch.full((k,), torch.nan, dtype=torch.float64, device=J.image.device)
    pair = (nan.expand(J.shape[0], -1), nan[:, None].expand(-1, J.shape[1])) if vectors else (None, None)
    return _fields(J, method, nan, nan, math.nan, *pair, status=Status.ERROR, **more)


def _fields(
    J: Sight, method: str, values: Tensor, bound: Tensor, threshold: float, left: Tensor | None,
    right: Tensor | None, **more: Any
) -> dict[str, Any]:  # fmt: skip
    """Return the fields of one image; a field that needs every singular value is None unless it is given."""
    return {
        "singular_values": values,
        "error_bound": bound,
        "noise_method": "",
        "sigma_max": values[0],
        "rank": None,
        "nullity": None,
        "rank_threshold": threshold,
        "effective_rank": None,
        "participation": None,
        "invariance_map": None,
        "band_energy": None,
        "channel_energy": None,
        "structural_zeros": (),
        "near_structural": (),
        "left": left,
        "right": None if right is None else right.reshape(-1, *J.image.shape).to(J.image),
        "method": method,
        "num_evals": J.num_evals,
        "status": Status.COMPLETED,
        **more,
    }


def _patch_nullity(f: Encoding, image: Tensor) -> int | None:
    weight = getattr(f, "patch_weight", None)
    if not isinstance(weight, Tensor):
        return None
    from_patch = weight[0].numel() - int(torch.linalg.matrix_rank(weight.flatten(1).double()))
    tiles = (image.shape[1] // weight.shape[2]) * (image.shape[2] // weight.shape[3])
    unused = image.numel() - tiles * weight[0].numel()
    return tiles * from_patch + unused
