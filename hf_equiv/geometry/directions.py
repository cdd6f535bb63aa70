"""Make the directions in pixel space along which an encoder is measured, such as its row space and its null space."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_equiv import checks
from hf_equiv.checks import UNIT, Bounds
from hf_equiv.conditions import admit, as_function
from hf_equiv.geometry.singular import combine, left_singular, times
from hf_equiv.jacobian import Jacobian
from hf_equiv.precision import Encoding, float64_twin, no_autocast, no_tf32

KINDS = ("random", "top", "row", "null", "gradient", "toward", "match")

_COARSE = 1e-4  # relative spacing of bfloat16 and float16, in which a Jacobian has no meaningful rank
_BLOCK = 4096  # pixels held in float64 at a time


@dataclass(frozen=True, slots=True)
class RowSpace:
    """The row space of J = U diag(σ) Vᵀ above its rank threshold: the directions that move the embedding.

    Attributes:
        basis: V, right singular vectors as rows, (R, N), orthonormal, in the dtype of the image.
        singular_values: σ of these rows, (R,), float64, descending.
        left: their left singular vectors, (D, R), float64.
        threshold: threshold of the rank, in units of σ.
    """

    basis: Tensor
    singular_values: Tensor
    left: Tensor
    threshold: float

    @property
    def rank(self) -> int:
        """R, the dimension of the row space."""
        return len(self.basis)

    def project_row(self, vectors: Tensor) -> Tensor:
        """Return the part VᵀV v of each v, which moves the embedding, to first order.

        Args:
            vectors: v, (…, *shape).

        Returns:
            (…, *shape), in the dtype of the basis.
        """
        return vectors - self.project_null(vectors)

    def project_null(self, vectors: Tensor) -> Tensor:
        """Return the part (I − VᵀV) v of each v, which leaves the embedding, to first order.

        Args:
            vectors: v, (…, *shape).

        Returns:
            (…, *shape), in the dtype of the basis.
        """
        rows = vectors.reshape(-1, self.basis.shape[1]).to(self.basis)
        with no_tf32(), no_autocast():
            for _ in range(2):
                rows = torch.addmm(rows, rows @ self.basis.T, self.basis, alpha=-1)
        return rows.view(vectors.shape)

    def __repr__(self) -> str:
        """State the rank, the number of pixels and the range of σ."""
        ends = "" if not self.rank else f", σ {self.singular_values[0]:.4g} to {self.singular_values[-1]:.4g}"
        return f"RowSpace({self.rank} of {self.basis.shape[1]} directions{ends}, threshold {self.threshold:.2g})"


def row_space(
    f: Encoding | Jacobian,
    image: Tensor | None = None,
    *,
    rank_rtol: float | None = None,
    matrix: Tensor | None = None,
    batch: int = 32,
    bounds: Bounds = UNIT,
) -> RowSpace:
    """Return an orthonormal basis of the row space of J = ∂f/∂x at one image.

    Cost: (1 + 2D)/3 evaluations, unless `matrix` is given; memory 2·D·N numbers.

    Args:
        f: the encoder (1, *shape) -> (1, D), or its `Jacobian` at the image.
        image: x, (*shape); None with a `Jacobian`.
        rank_rtol: threshold of the rank over σ₁; None for 1000 eps of the dtype (float32 1.2e-4, float64 2.2e-13).
        matrix: J (D, N), if it is known, also with columns set to zero.
        batch: most cotangents per pass.
        bounds: the box of the images, near which f is tried; None for none.

    Returns:
        The rows above the threshold; none for a constant f.

    Raises:
        ValueError: `image` is missing, or J holds NaN or infinity.

    Example:
        >>> import torch
        >>> from hf_equiv.geometry.directions import row_space
        >>> rows = row_space(lambda x: x.flatten(1)[:, :2], torch.full((3, 1, 1), 0.5))
        >>> rows.project_null(torch.ones(3, 1, 1)).flatten().tolist()
        [0.0, 0.0, 1.0]
    """
    if isinstance(f, Jacobian):
        J = f
    elif image is None:
        raise ValueError("`image` must be a float tensor (*shape); got None. Leave it out only with a `Jacobian`.")
    else:
        J = Jacobian(f, image, batch=batch, bounds=bounds)
        J.check_deterministic()
    if rank_rtol is not None:
        checks.check_positive(rank_rtol, "rank_rtol", 1, or_zero=True)
    if matrix is None:
        matrix = J.as_matrix()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            "`f` must have a finite Jacobian; got NaN or infinity. Use float32 or float64, or another image."
        )
    left, sigma = left_singular(matrix)
    # By default twice or more the noise of encoders of a dozen layers: DeiT-Tiny in float32 is within 7e-5 of σ₁, its
    # zeros within 1e-7.
    threshold = float(sigma[0]) * (min(1000 * J.eps, 0.1) if rank_rtol is None else rank_rtol)
    kept = sigma > threshold
    left, sigma = left[:, kept], sigma[kept]
    return RowSpace(combine(matrix, left / sigma, matrix.dtype), sigma, left, threshold)


def principal_angles(a: RowSpace, b: RowSpace) -> Tensor:
    """Return the principal angles between two row spaces, at two images or for two encoders at one image.

    cos θ_i are the singular values of V_a V_bᵀ; θ = atan2(sin, cos) with sin θ_i the length of the i-th principal
    vector of b off that of a, so that small angles are exact too.

    Args:
        a: row space of one Jacobian.
        b: row space of another, over the same N pixels and with any rank.

    Returns:
        θ (min(R_a, R_b),), ascending, in [0, π/2], float64, radians.

    Raises:
        ValueError: the images of the two differ in size.

    References:
        Björck, Golub (1973), Math. Comp. 27:579.
    """
    if a.basis.shape[1] != b.basis.shape[1]:
        raise ValueError(
            f"`b` must be over the same pixels as `a`; got {b.basis.shape[1]} and {a.basis.shape[1]} of them. "
            "Use one image size."
        )
    Y, cosines, Zt = torch.linalg.svd(times(a.basis, b.basis.T), full_matrices=False)
    gap = torch.zeros_like(cosines)
    for first, second in zip(a.basis.split(_BLOCK, dim=1), b.basis.split(_BLOCK, dim=1), strict=True):
        rest = Zt @ second.double() - cosines[:, None] * (Y.T @ first.double())
        gap += rest.square().sum(dim=1)
    return torch.atan2(gap.sqrt(), cosines)


def patch_null_space(weight: Tensor) -> Tensor:
    """Return the pixel patterns of one patch that the patch embedding maps to zero.

    They belong to the null space at every image. There are C·p² − rank W of them, W (D, C·p²).

    Args:
        weight: weight of the patch embedding, (D, C, p, p), per pixel in [0, 1], as `Encoder.patch_weight`.

    Returns:
        (M, C, p, p), orthonormal, float64.

    Raises:
        ValueError: `weight` is not a finite (D, C, p, p).
    """
    if weight.ndim != 4 or not bool(torch.isfinite(weight).all()):
        raise ValueError(f"`weight` must be a finite tensor (D, C, p, p); got shape {tuple(weight.shape)}.")
    matrix = weight.detach().flatten(1).double()
    _, sigma, Vh = torch.linalg.svd(matrix, full_matrices=True)
    rank = int((sigma > max(matrix.shape) * torch.finfo(torch.float64).eps * sigma[0]).sum())
    return Vh[rank:].view(-1, *weight.shape[1:])


@dataclass(frozen=True, slots=True)
class Directions:
    """Unit directions of a batch of images, with their kinds.

    Attributes:
        vectors: v, (B, K, *shape), unit L2 norm in pixel units.
        kinds: kind of each, K strings: random, top, row, null, gradient, toward or match.
        indices: number of each within its kind, K integers from 0; for `top` and `row` the index of the singular value,
            in the row space of the first image.
    """

    vectors: Tensor
    kinds: tuple[str, ...]
    indices: tuple[int, ...]

    def __len__(self) -> int:
        """Return K, the directions of each image."""
        return len(self.kinds)

    def __repr__(self) -> str:
        """State the number of images and the directions of each kind in one line."""
        counts = ", ".join(f"{kind} {count}" for kind, count in Counter(self.kinds).items())
        return f"Directions({len(self.vectors)} of {'×'.join(map(str, self.vectors.shape[2:]))}: {counts})"


def make_directions(
    f: Encoding,
    images: Tensor,
    *,
    random: int = 0,
    top: int = 0,
    row: int = 0,
    null: int = 0,
    gradient: bool = False,
    toward: Tensor | None = None,
    match: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch: int = 32,
    bounds: Bounds = UNIT,
) -> Directions:
    """Make unit directions of several kinds at each image.

    With J (D, N) at x, its right singular vectors v₁, v₂, … and its row space (the rows above the rank threshold):

        random    g / ‖g‖ with g standard normal in R^N: nearly null, so it says nothing about the largest constant
        top       v₁ … v_k, the directions the embedding is most sensitive to
        row       k of the right singular vectors of the row space, evenly spread from v₁ to v_rank (k = rank: all)
        null      P_null g / ‖P_null g‖: to first order the embedding does not move
        gradient  Jᵀ(f(t) − f(x)), the descent direction of ½‖f(x) − f(t)‖² for t = `toward`; without it Jᵀf(x)
        toward    (t − x) / ‖t − x‖
        match     (m − x) / ‖m − x‖ with m a match of another image, as `match_embedding` gives

    Cost: `top`, `row` and `null` take one full Jacobian an image, `gradient` one cotangent. Memory: B·K images.

    Args:
        f: the encoder, or any callable (B, *shape) -> (B, D). In half precision its float64 twin gives J.
        images: x, (B, *shape), within `bounds`.
        random: number of random directions.
        top: number of top directions, at most the rank.
        row: number of row directions, at most the rank.
        null: number of null directions.
        gradient: whether to add the gradient.
        toward: images t, (B or 1, *shape).
        match: matches m, (B, *shape).
        generator: source of the random numbers, on the CPU; None for one with seed 0.
        batch: cotangents per backward pass.
        bounds: the box that all images must lie in; None for none.

    Returns:
        The directions, float32 (float64 for float64 images), those of one kind side by side.

    Raises:
        ValueError: no direction or more than J has, images of other shapes, or one equal to its `toward` or `match`.

    Example:
        >>> import torch
        >>> from hf_equiv import make_directions
        >>> weight, x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0)), torch.full((2, 3, 4, 4), 0.5)
        >>> make_directions(lambda x: x.flatten(1) @ weight.T, x, top=2, null=1).kinds
        ('top', 'top', 'null')
    """
    checks.check_images(images, bounds=bounds)
    counts = {"random": random, "top": top, "row": row, "null": null}
    for name, count in counts.items():
        checks.check_count(count, name, least=0)
    others = {name: other for name, other in (("toward", toward), ("match", match)) if other is not None}
    for name, other in others.items():
        checks.check_like(other, images, name, bounds=bounds)
    if not any(counts.values()) and not gradient and not others:
        raise ValueError(f"`make_directions` must be asked for a direction; got none. Kinds: {', '.join(KINDS)}.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if top or row or null or gradient:
        f = admit(f, images, bounds=bounds)
    rows, indices = [], tuple[int, ...]()
    for b, image in enumerate(images.detach()):
        aims = {name: other[b % len(other)].to(image) for name, other in others.items()}
        parts, numbers = _at_image(f, image, counts, generator, batch, gradient, aims)
        indices = indices or numbers
        if not bool((parts.flatten(1).norm(dim=1) > 0).all()):
            raise ValueError(
                f"the directions of image {b} must not be zero: it equals its `toward` or `match`, or its gradient "
                "vanishes. Leave that kind out."
            )
        rows.append(unit_directions(parts, torch.promote_types(images.dtype, torch.float32)))
    kinds = [name for name, count in counts.items() for _ in range(count)] + ["gradient"] * gradient + [*others]
    return Directions(torch.stack(rows), tuple(kinds), indices)


def unit_directions(directions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return directions (K, *shape) scaled to unit L2 norm, in `dtype`."""
    wide = directions.double()
    return (wide / by_image(wide.flatten(1).norm(dim=1), wide)).to(dtype)


def by_image(numbers: Tensor, images: Tensor) -> Tensor:
    """Return one number for each image, (K,), as (K, 1, …, 1), to be combined with images (K, *shape)."""
    return numbers.view(-1, *(1,) * (images.ndim - 1))


def as_directions(vectors: Directions | Tensor, images: Tensor, bounds: Bounds) -> Directions:
    """Return checked directions of checked images; a tensor (B, K, *shape) gets the kind `given`."""
    checks.check_images(images, bounds=bounds)
    if not isinstance(vectors, Directions):
        count = vectors.shape[1] if isinstance(vectors, Tensor) and vectors.ndim > 1 else 0
        vectors = Directions(vectors, ("given",) * count, tuple(range(count)))
    checks.check_directions(vectors.vectors, images)
    return vectors


def _at_image(
    f: Encoding, image: Tensor, counts: dict[str, int], generator: torch.Generator, batch: int,
    gradient: bool, aims: dict[str, Tensor]
) -> tuple[Tensor, tuple[int, ...]]:  # fmt: skip
    """Return the directions at one image, of any length, float64, and the number of each within its kind."""
    parts, numbers = [_gaussian(counts["random"], image, generator)], [*range(counts["random"])]
    spectral = counts["top"] + counts["row"] + counts["null"] > 0
    J = _jacobian(f, image, batch) if spectral or gradient else None
    if J is not None and spectral:
        space = row_space(J)
        for name in ("top", "row"):
            if counts[name] > space.rank:
                told = f"`{name}` must be at most the rank {space.rank} of the Jacobian; got {counts[name]}."
                raise ValueError(told)
        if counts["null"] and space.rank >= image.numel():
            told = f"`null` must be 0 where the Jacobian has full column rank {space.rank}; got {counts['null']}."
            raise ValueError(told)
        spread = [round(i * (space.rank - 1) / max(1, counts["row"] - 1)) for i in range(counts["row"])]
        picks = [*range(counts["top"]), *spread]
        parts.append(space.basis[picks].view(-1, *image.shape))
        parts.append(space.project_null(_gaussian(counts["null"], image, generator)))
        numbers += [*picks, *range(counts["null"])]
    if J is not None and gradient:
        u = J.z
        if "toward" in aims:
            with torch.no_grad():
                u = f(aims["toward"][None])[0].to(J.z) - J.z
        parts.append(J.rmv(u[None]))
        numbers.append(0)
    for aim in aims.values():
        parts.append((aim.double() - image.double())[None])
        numbers.append(0)
    return torch.cat([part.to(torch.float64) for part in parts]), tuple(numbers)


def _jacobian(f: Encoding, image: Tensor, batch: int) -> Jacobian:
    """Return J of f, or of its float64 twin if f is too coarse to tell row space and null space apart."""
    J = Jacobian(f, image, batch=batch)
    if J.eps < _COARSE:
        return J
    twin = float64_twin(f)
    if twin is None:
        raise ValueError(
            f"`f` must be float32 or float64 for directions of its Jacobian; got a relative spacing of {J.eps:.1g}. "
            "Make them with a float32 copy of f."
        )
    return Jacobian(as_function(twin), image.double(), batch=batch)


def _gaussian(count: int, image: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(count, *image.shape, generator=generator, dtype=torch.float64).to(image.device)
