"""Compute the singular values of ∂f/∂x with error bounds, and explain the zeros among them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.geometry.singular import ACCURACY, combine, derivative_noise, golub_kahan, left_singular
from hf_equiv.geometry.zeros import LeftRelation, Zero, explain_zeros
from hf_equiv.jacobian import Jacobian
from hf_equiv.results import Status

METHODS = ("auto", "full", "golub_kahan")


@dataclass(frozen=True, slots=True)
class SpectrumResult:
    """Singular values of J = ∂f/∂x (D, N), N = C·H·W, at each image of the batch, in embedding per pixel in [0, 1].

    Fields that need every singular value are None if only the largest were computed. An image whose status is `error`
    has NaN values and rank −1.

    Attributes:
        singular_values: σ₁ ≥ σ₂ …, (B, K), float64; K = min(D, N), or `k`.
        error_bound: on the distance of each to that of the function in exact arithmetic, (B, K), float64.
        noise_method: measurement of its float noise, per image: "float64 twin" or "perturbed input".
        sigma_max: σ₁, (B,), float64.
        rank: number of values above `rank_threshold`, (B,), int64, or None.
        nullity: N − rank, (B,), int64, or None.
        rank_threshold: in the units of σ, (B,), float64.
        effective_rank: exp(−Σ p log p) with p = σ / Σσ (Roy & Vetterli 2007), (B,), float64, or None.
        participation: (Σσ²)² / Σσ⁴, (B,), float64, or None.
        structural_zeros: per image the exact zeros by cause, and the unexplained ones.
        near_structural: per image the values that would be exact zeros but for a small constant of the architecture.
        patch_nullity: part of the nullity that the patch embedding discards at every image; or None.
        left: left singular vectors, (B, D, K), or None.
        right: right singular vectors as images, (B, K, C, H, W), or None.
        method: "full" or "golub_kahan", per image.
        num_evals: (forwards + 2·cotangents + 2·tangents) / 3, (B,), float64.
        seconds: wall time, (B,), float64.
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
        """Return Σ_{i ≤ k} σ_i² / Σ σ_i²: the share of the first k in ‖Jv‖² averaged over all directions.

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


def rank_rtol_of(eps: float) -> float:
    """Return the default threshold of the rank over σ₁ for numbers of relative spacing `eps`: 1000 eps, at most 0.1."""
    # It is 1.2e-4 for float32 and 2.2e-13 for float64: twice or more the noise of encoders of a dozen layers (DeiT-Tiny
    # in float32 is within 7e-5 of σ₁, its zeros within 1e-7).
    return min(1000 * eps, 0.1)


def jacobian_spectrum(
    f: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    k: int | None = None,
    method: str = "auto",
    vectors: bool = False,
    rank_rtol: float | None = None,
    rtol: float = 1e-4,
    batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> SpectrumResult:
    """Compute the singular values of J = ∂f/∂x at each image: how far the embedding moves, along how many directions.

    J = U diag(σ) Vᵀ (D, N). The right vectors are the pixel directions that move the embedding, in order; the N − rank
    directions off them leave it, to first order. "full" forms J and takes all σ from it in float64; "golub_kahan" finds
    the top k from products with J and Jᵀ. For an Encoder, zeros of known cause are named.

    Cost: full (1 + 2D)/3 evaluations an image and D·N numbers of memory; golub_kahan 4/3 a pass, about 2k + 7 passes.

    Args:
        f: the encoder, or any callable (B, C, H, W) -> (B, D).
        images: (B, C, H, W), pixels in [0, 1].
        k: number of singular values; None for all min(D, N).
        method: "full", "golub_kahan", or "auto" for the quicker.
        vectors: whether to return singular vectors.
        rank_rtol: threshold of the rank over σ₁; None for 1000 eps, or twice the measured noise if that is more.
        rtol: bound over σ₁ at which "golub_kahan" stops.
        batch: most cotangents per pass; memory grows with it.
        progress: called after each image with (images done, images in all).

    Returns:
        The spectrum of each image.

    Raises:
        ValueError: pixels outside [0, 1], a bad argument, an f that is not differentiable or not deterministic, or a
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
    checks.check_images(images)
    checks.check_count(batch, "batch")
    settings = _Settings(k, method, vectors, rank_rtol, rtol)
    found = []
    for image in images.detach():
        found.append(settings.run(f, image, batch))
        if progress is not None:
            progress(len(found), len(images))
    return _collect(found, images[0].numel())


@dataclass(slots=True)
class _Image:
    """The spectrum of one image; a field is None if it needs values that were not computed."""

    values: Tensor
    bound: Tensor
    threshold: float
    num_evals: float
    status: Status = Status.COMPLETED
    noise_method: str = ""
    rank: int | None = None
    effective_rank: float | None = None
    participation: float | None = None
    exact: tuple[Zero, ...] = ()
    near: tuple[Zero, ...] = ()
    left: Tensor | None = None
    right: Tensor | None = None
    method: str = ""
    patch_nullity: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Settings:
    k: int | None
    method: str
    vectors: bool
    rank_rtol: float | None
    rtol: float

    def __post_init__(self) -> None:
        """Check the settings."""
        checks.check_positive(self.rtol, "rtol")
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {self.method!r}.")
        if self.rank_rtol is not None:
            checks.check_positive(self.rank_rtol, "rank_rtol", 1, or_zero=True)
        if self.k is not None:
            checks.check_count(self.k, "k")

    def run(self, f: Callable[[Tensor], Tensor], image: Tensor, batch: int) -> _Image:
        start = time.perf_counter()
        J = Jacobian(f, image, batch=batch)
        J.check_deterministic()
        size = min(J.shape)
        k = size if self.k is None else self.k
        if k > size:
            raise ValueError(f"`k` must be at most min(D, N) = {size}; got {k}.")
        method = self.method
        if method == "auto":  # a pass costs about two VJPs; forming J costs D of them
            method = "golub_kahan" if k < size and 2 * (2 * k + 6) < 0.8 * J.shape[0] else "full"
        one = self._full(f, J, k) if method == "full" else self._top(f, J, k)
        one.method, one.patch_nullity, one.seconds = method, _patch_nullity(f, J), time.perf_counter() - start
        return one

    def _threshold(self, J: Jacobian, largest: Tensor) -> float:
        return float(largest) * (rank_rtol_of(J.eps) if self.rank_rtol is None else self.rank_rtol)

    def _full(self, f: Callable[[Tensor], Tensor], J: Jacobian, k: int) -> _Image:
        J.check_memory()
        matrix = J.as_matrix()
        if not bool(torch.isfinite(matrix).all()):
            return self._failed(J, k)
        left, sigma = left_singular(matrix)
        count = min(J.shape)
        scale, threshold = float(sigma[0]), self._threshold(J, sigma[0])
        bound, noise, spent = derivative_noise(f, J, lambda u: combine(matrix, u), left, sigma, threshold)
        if self.rank_rtol is None and scale > 0:
            lost = float(sigma[-1]) <= max(threshold, float(bound[-1]))
            threshold = max(threshold, 2 * float(bound[-1]) if lost else 0.0)
        predict = getattr(f, "left_relations", None)
        relations: tuple[LeftRelation, ...] = predict(J.image) if predict is not None else ()
        sigma, bound = sigma[:count], bound[:count]
        wide = J.shape[0] > J.shape[1]  # any f has D − N left null vectors then
        exact, near = explain_zeros(matrix, left[:, :count], sigma, threshold, () if wide else relations)
        share = sigma / sigma.sum()
        one = _Image(
            values=sigma[:k],
            bound=bound[:k],
            threshold=threshold,
            num_evals=J.num_evals + spent + (7 / 3 if relations else 0.0),
            noise_method=noise,
            rank=int((sigma > threshold).sum()),
            effective_rank=float(torch.special.entr(share).sum().exp()) if scale > 0 else 0.0,
            participation=float(sigma.square().sum().square() / sigma.pow(4).sum()) if scale > 0 else 0.0,
            exact=exact,
            near=near,
        )
        if self.vectors:
            one.left = left[:, :k]
            values = sigma[:k, None]
            right = combine(matrix, one.left) / values.where(values > ACCURACY * scale, 1.0)
            one.right = right.view(-1, *J.image.shape).to(J.image)
        return one

    def _top(self, f: Callable[[Tensor], Tensor], J: Jacobian, k: int) -> _Image:
        if not bool(torch.isfinite(J.rmv(torch.ones_like(J.z)[None])).all()):
            return self._failed(J, k)
        top = golub_kahan(J, k, self.rtol)
        threshold = self._threshold(J, top.values[0])
        noise, name, spent = derivative_noise(
            f, J, lambda u: J.rmv(u.T.to(J.image)).flatten(1).double(), top.left, top.values, threshold
        )
        one = _Image(top.values, top.bound + noise, threshold, J.num_evals + spent, noise_method=name)
        if self.vectors:
            one.left, one.right = top.left, top.right.view(-1, *J.image.shape).to(J.image)
        return one

    def _failed(self, J: Jacobian, k: int) -> _Image:
        nan = torch.full((k,), torch.nan, dtype=torch.float64, device=J.image.device)
        one = _Image(nan, nan, math.nan, J.num_evals, Status.ERROR, rank=-1)
        if self.vectors:
            one.left = nan.expand(J.shape[0], -1)
            one.right = torch.full((k, *J.image.shape), torch.nan).to(J.image)
        return one


def _collect(found: list[_Image], num_pixels: int) -> SpectrumResult:
    def numbers(values: Iterable[float | None]) -> Tensor:
        return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)

    def stacked(vectors: list[Tensor | None]) -> Tensor | None:
        given = [one for one in vectors if one is not None]
        return torch.stack(given) if given else None

    values = torch.stack([one.values for one in found])
    full = found[0].rank is not None or any(one.rank is not None and one.rank >= 0 for one in found)
    rank = torch.tensor([-1 if one.rank is None else one.rank for one in found]) if full else None
    return SpectrumResult(
        singular_values=values,
        error_bound=torch.stack([one.bound for one in found]),
        noise_method=tuple(one.noise_method for one in found),
        sigma_max=values[:, 0],
        rank=rank,
        nullity=None if rank is None else torch.where(rank < 0, -1, num_pixels - rank),
        rank_threshold=numbers(one.threshold for one in found),
        effective_rank=numbers(one.effective_rank for one in found) if full else None,
        participation=numbers(one.participation for one in found) if full else None,
        structural_zeros=tuple(one.exact for one in found),
        near_structural=tuple(one.near for one in found),
        patch_nullity=found[0].patch_nullity,
        left=stacked([one.left for one in found]),
        right=stacked([one.right for one in found]),
        method=tuple(one.method for one in found),
        num_evals=numbers(one.num_evals for one in found),
        seconds=numbers(one.seconds for one in found),
        status=tuple(one.status for one in found),
    )


def _patch_nullity(f: Callable[[Tensor], Tensor], J: Jacobian) -> int | None:
    weight = getattr(f, "patch_weight", None)
    if not isinstance(weight, Tensor):
        return None
    from_patch = weight[0].numel() - int(torch.linalg.matrix_rank(weight.flatten(1).double()))
    channels, height, width = J.image.shape
    tiles = (height // weight.shape[2]) * (width // weight.shape[3])
    unused = channels * height * width - tiles * weight[0].numel()
    return tiles * from_patch + unused
