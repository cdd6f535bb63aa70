"""Encoders of known answer: closed-form maps from small images to embeddings, for the tests of the numerics.

Each takes (B, C, H, W) in [0, 1], works in the dtype of its input, and handles one image at a time, so that its result
does not depend on the batch by construction. With y = x − ½ (flattened), every map sends mid-grey to its offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPE = (3, 8, 8)
"""Channels, height, width: N = 192."""
DIM = 12
"""Embedding size D."""
SIGMA = torch.logspace(0.5, -0.5, DIM, dtype=torch.float64)
"""Singular values of the full-rank linear cases: condition number 10."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """Matrix (rows, columns), rows ≤ columns, with orthonormal rows, float64."""
    gaussian = torch.randn(columns, rows, generator=_generator(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.T.contiguous()


def _matrix(singular_values: Tensor, columns: int, seed: int) -> Tensor:
    """Matrix (D, columns) with the given singular values, float64."""
    dim = len(singular_values)
    return _orthonormal(dim, dim, seed) @ (singular_values[:, None] * _orthonormal(dim, columns, seed + 1))


@dataclass(frozen=True)
class Linear:
    """z = A y + b: Jacobian A everywhere; the match nearest to x is x + A⁺(z − f(x)) while that stays in the box.

    Attributes:
        A: (D, N), float64.
        b: (D,), float64.
    """

    A: Tensor
    b: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        A, b = self.A.to(images), self.b.to(images)
        return torch.stack([A @ (image.flatten() - 0.5) + b for image in images])

    def jacobian(self, image: Tensor) -> Tensor:
        """J (D, N) at one image (C, H, W), float64."""
        assert image.numel() == self.A.shape[1]
        return self.A

    def nearest_match(self, images: Tensor, z: Tensor) -> Tensor:
        """The L2-nearest images that embed as z, or come closest to it, the box left out of account."""
        step = torch.linalg.lstsq(self.A, (z.double() - self(images.double())).T, driver="gelsd").solution.T
        return images.double() + step.view(images.shape)


@dataclass(frozen=True)
class Quadratic:
    """z_i = a_i·y + ½ (c_i·y)²: Jacobian a_i + (c_i·y) c_i, second derivative along v exactly (c_i·v)².

    Attributes:
        a: (D, N), float64.
        c: (D, N), float64.
    """

    a: Tensor
    c: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        a, c = self.a.to(images), self.c.to(images)
        flat = [image.flatten() - 0.5 for image in images]
        return torch.stack([a @ y + 0.5 * (c @ y).square() for y in flat])

    def jacobian(self, image: Tensor) -> Tensor:
        """J (D, N) at one image (C, H, W), float64."""
        y = image.double().flatten() - 0.5
        return self.a + (self.c @ y)[:, None] * self.c

    def second_derivative(self, direction: Tensor) -> Tensor:
        """D²f[v, v] (D,) of one direction (C, H, W), float64; the same at every image."""
        return (self.c @ direction.double().flatten()).square()


@dataclass(frozen=True)
class Invariant:
    """A `Linear` map of the first channel alone: every change of the others leaves z, exactly.

    Attributes:
        inner: the map of the first channel, A (D, H·W).
    """

    inner: Linear

    def __call__(self, images: Tensor) -> Tensor:
        return self.inner(images[:, :1])

    def jacobian(self, image: Tensor) -> Tensor:
        """J (D, N) at one image (C, H, W), float64: zero in the columns of the other channels."""
        rest = torch.zeros(len(self.inner.A), image[1:].numel(), dtype=torch.float64)
        return torch.cat([self.inner.A, rest], dim=1)


@dataclass(frozen=True)
class SmoothMLP:
    """z = W₂ tanh(W₁ y + b): curved, smooth, with Jacobian W₂ diag(1 − tanh²) W₁.

    Attributes:
        W1: (hidden, N), float64.
        b: (hidden,), float64.
        W2: (D, hidden), float64.
    """

    W1: Tensor
    b: Tensor
    W2: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        W1, b, W2 = self.W1.to(images), self.b.to(images), self.W2.to(images)
        return torch.stack([W2 @ torch.tanh(W1 @ (image.flatten() - 0.5) + b) for image in images])

    def jacobian(self, image: Tensor) -> Tensor:
        """J (D, N) at one image (C, H, W), float64."""
        hidden = torch.tanh(self.W1 @ (image.double().flatten() - 0.5) + self.b)
        return self.W2 @ ((1 - hidden.square())[:, None] * self.W1)


@dataclass(frozen=True)
class Kinked:
    """z = A y + b + c·max(0, w·y − t): linear on either side of one hyperplane, at a known distance along any line.

    Attributes:
        inner: the map below the kink.
        w: unit normal of the hyperplane, (N,), float64.
        t: its offset.
        c: what is added above it, (D,), float64.
    """

    inner: Linear
    w: Tensor
    t: float
    c: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        w, c = self.w.to(images), self.c.to(images)
        above = torch.stack([torch.relu(w @ (image.flatten() - 0.5) - self.t) for image in images])
        return self.inner(images) + above[:, None] * c

    def jacobian(self, image: Tensor) -> Tensor:
        """J (D, N) at one image (C, H, W), float64."""
        above = float(self.w @ (image.double().flatten() - 0.5)) > self.t
        return self.inner.A + above * torch.outer(self.c, self.w)

    def kink_distance(self, image: Tensor, direction: Tensor) -> float:
        """The h at which image + h·direction crosses the hyperplane."""
        position = self.w @ (image.double().flatten() - 0.5)
        return float((self.t - position) / (self.w @ direction.double().flatten()))


@dataclass(frozen=True)
class Sphere:
    """z = u/‖u‖ with u = A y + b: one exact left null vector, z itself.

    Attributes:
        inner: the map before it is normalised.
    """

    inner: Linear

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([u / u.norm() for u in self.inner(images)])

    def jacobian(self, image: Tensor) -> Tensor:
        """J (D, N) at one image (C, H, W), float64."""
        u = self.inner(image.double()[None])[0]
        z = u / u.norm()
        return (self.inner.A - torch.outer(z, z @ self.inner.A)) / u.norm()


@dataclass(frozen=True)
class Case:
    """An encoder with what is known about it.

    Attributes:
        name: for test ids.
        f: the encoder; it has `jacobian(image)`.
        rank: exact rank of its Jacobian at a generic image.
        singular_values: of its Jacobian where they are the same at every image, (D,), descending; else None.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    rank: int
    singular_values: Tensor | None = None

    @property
    def nullity(self) -> int:
        """N − rank."""
        return images(1).numel() - self.rank


def images(batch: int, seed: int = 0, *, margin: float = 0.25, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images (B, C, H, W), at least `margin` away from the walls of the box."""
    noise = torch.rand(batch, *SHAPE, generator=_generator(seed), dtype=torch.float64)
    return (margin + (1 - 2 * margin) * noise).to(dtype)


def linear() -> Linear:
    """Full rank, condition number 10."""
    return Linear(_matrix(SIGMA, 192, 1), torch.full((DIM,), 0.5, dtype=torch.float64))


def orthogonal() -> Linear:
    """Orthonormal rows: all singular values 1, so gradient descent with step 1 arrives in one step."""
    return Linear(_orthonormal(DIM, 192, 3), torch.full((DIM,), 0.5, dtype=torch.float64))


def rank_deficient() -> Linear:
    """The last three singular values are zero: embeddings off its range cannot be matched (see `unreachable`)."""
    sigma = torch.cat([SIGMA[:-3], torch.zeros(3, dtype=torch.float64)])
    return Linear(_matrix(sigma, 192, 5), torch.full((DIM,), 0.5, dtype=torch.float64))


def unreachable(batch: int, *, error: float = 0.1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images x and embeddings z (B, D) that `rank_deficient` cannot reach: its best error from anywhere is `error`."""
    f, x = rank_deficient(), images(batch, seed=7, dtype=torch.float64)
    off_range = torch.linalg.svd(f.A).U[:, -1]  # AᵀU₋₁ = 0
    reachable = f(x)
    reachable = reachable - (reachable @ off_range)[:, None] * off_range
    # ‖reachable + t·u‖² = ‖reachable‖² + t², and f(x) has its own constant part along u
    constant = f.b @ off_range
    distance = _solve_distance(reachable.norm(dim=1), constant, error)
    return x.to(dtype), (reachable + (constant + distance)[:, None] * off_range).to(dtype)


def _solve_distance(rest: Tensor, constant: Tensor, error: float) -> Tensor:
    """The t > 0 with t / √(rest² + (constant + t)²) = error."""
    a, b, c = 1 - error**2, -2 * error**2 * constant, -(error**2) * (rest.square() + constant**2)
    return (-b + (b * b - 4 * a * c).sqrt()) / (2 * a)


def quadratic() -> Quadratic:
    """Mildly curved around `linear`'s matrix."""
    return Quadratic(_matrix(SIGMA, 192, 9), 0.5 * _orthonormal(DIM, 192, 11))


def invariant() -> Invariant:
    """Depends on the first channel only."""
    return Invariant(Linear(_matrix(SIGMA, 64, 13), torch.full((DIM,), 0.5, dtype=torch.float64)))


def smooth_mlp(hidden: int = 32) -> SmoothMLP:
    """A small two-layer network with tanh."""
    return SmoothMLP(
        1.5 * _orthonormal(hidden, 192, 15),
        0.5 * torch.randn(hidden, generator=_generator(17), dtype=torch.float64),
        _matrix(SIGMA, hidden, 19),
    )


def kinked() -> Kinked:
    """Piecewise linear, with a kink a little away from a typical image."""
    generator = _generator(21)
    w = torch.randn(192, generator=generator, dtype=torch.float64)
    c = torch.randn(DIM, generator=generator, dtype=torch.float64)
    return Kinked(linear(), w / w.norm(), 0.8, 2 * c / c.norm())


def sphere() -> Sphere:
    """The full-rank linear map, normalised to unit length."""
    return Sphere(linear())


CASES = (
    Case("linear", linear(), DIM, SIGMA),
    Case("orthogonal", orthogonal(), DIM, torch.ones(DIM, dtype=torch.float64)),
    Case("rank_deficient", rank_deficient(), DIM - 3, torch.cat([SIGMA[:-3], torch.zeros(3, dtype=torch.float64)])),
    Case("quadratic", quadratic(), DIM),
    Case("invariant", invariant(), DIM, SIGMA),
    Case("smooth_mlp", smooth_mlp(), DIM),
)
"""For `@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)`."""

EIGHT = (*CASES, Case("kinked", kinked(), DIM), Case("sphere", sphere(), DIM - 1))
"""With a piecewise linear one and one whose embeddings lie on a sphere."""


_WIDE = 32  # height and width: many more pixels than the other cases have, for 8-bit moves need N ≫ D


class Wide:
    """z = W·tanh(A·(x − ½) + b), N = 3072, D = 6."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.A = torch.randn(16, 3 * _WIDE * _WIDE, generator=generator, dtype=torch.float64) / 16
        self.b = torch.randn(16, generator=generator, dtype=torch.float64)
        self.W = torch.randn(6, 16, generator=generator, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        A, b, W = self.A.to(x), self.b.to(x), self.W.to(x)
        return torch.stack([W @ torch.tanh(A @ (image.flatten() - 0.5) + b) for image in x])


def wide_images(batch: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.25 + 0.5 * torch.rand((batch, 3, _WIDE, _WIDE), generator=generator, dtype=torch.float64)).to(dtype)
