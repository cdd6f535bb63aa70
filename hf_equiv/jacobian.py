"""Compute with the Jacobian J = ∂f/∂x of an encoder at one image: matrix-free products with J and Jᵀ, or the matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_equiv.checks import UNIT, Bounds, check_count
from hf_equiv.conditions import admit
from hf_equiv.derivatives import forward_mode, transposed, vjps
from hf_equiv.memory import unless_memory
from hf_equiv.precision import Encoding, Recorded, exact_derivatives, no_autocast, no_tf32

VECTORS = 32  # most pairs of a vector and an image in a pass, by default
CPU_VECTORS = 8  # most vectors in a pass with one image on a CPU, which is fastest there
_FORWARDS = 8  # images of a forward pass without a graph, for each vector of a derivative pass


class Jacobians:
    """J = ∂f/∂x at each of several images, in shared passes.

    Rules and costs are those of `Jacobian`. Memory: the activations of all images, three times that after the first
    `push`, K times that during a product of K vectors an image.

    Args:
        f: the encoder, admitted.
        images: x, (B, *shape).

    Attributes:
        images: x, detached.
        outputs: f(x), (B, D), in the dtype of f.
        eps: relative spacing of the coarsest dtype among `images`, f's output and the numbers inside f.
    """

    def __init__(self, f: Encoding, images: Tensor) -> None:
        self._f = f
        with torch.inference_mode(False), torch.enable_grad(), no_tf32(), Recorded() as seen:
            self._x = images.detach().clone(memory_format=torch.contiguous_format).requires_grad_(True)
            self._z = f(self._x)
        self.images, self.outputs = self._x.detach(), self._z.detach()
        self.eps = max(torch.finfo(images.dtype).eps, torch.finfo(self._z.dtype).eps, seen.eps)
        self._transpose: tuple[Tensor, Tensor] | None = None
        self.by_forward_mode = False
        self._spent = len(images)

    @property
    def num_evals(self) -> float:
        """Evaluations of all images so far: (forwards + 2·cotangents + 2·tangents) / 3."""
        return self._spent / 3

    def push(self, tangents: Tensor) -> Tensor:
        """Return J v of K tangents of each image (K, B, *shape), (K, B, D)."""
        self._spent += 2 * tangents.shape[0] * tangents.shape[1]
        with torch.inference_mode(False), exact_derivatives(), no_tf32():
            return self._push(tangents.to(self.images)).to(self.images)

    def pull(self, cotangents: Tensor) -> Tensor:
        """Return Jᵀu of K cotangents of each image (K, B, D), (K, B, *shape)."""
        self._spent += 2 * cotangents.shape[0] * cotangents.shape[1]
        with torch.inference_mode(False), no_tf32(), no_autocast():
            try:
                return vjps(self._z, self._x, cotangents.to(self._z))
            except unless_memory(RuntimeError) as error:
                raise RuntimeError(
                    "`f` must allow several backward passes from one forward pass; it does not "
                    f"({' '.join(str(error).split())[:160]}). Pass the function before `torch.compile`."
                ) from error

    def _push(self, tangents: Tensor) -> Tensor:
        if not self.by_forward_mode:
            try:
                if self._transpose is None:
                    self._transpose = transposed(self._f, self._x)
                    self._spent += 3 * len(self._x)
                u, gradient = self._transpose
                with no_autocast():
                    return vjps(gradient, u, tangents)
            except unless_memory(RuntimeError):
                self._transpose, self.by_forward_mode = None, True

        def push(tangent: Tensor) -> Tensor:
            return forward_mode(self._f, self._x.detach(), tangent)

        return push(tangents[0])[None] if len(tangents) == 1 else torch.func.vmap(push)(tangents)


class Jacobian(Jacobians):
    """J = ∂f/∂x at one image as a matrix-free map: products with J and Jᵀ, several vectors at once.

    z = f(x) (D,), J[d, n] = ∂z_d / ∂x_n (D, N) for the N numbers of x. `rmv` is reverse mode (VJP). `mv` is its
    transpose: u -> Jᵀu is linear, so its own VJP along v is Jv (Townsend 2017, "A new trick for calculating Jacobian
    vector products"); without second order it falls back to forward mode (JVP), at three times the cost. TF32 and
    autocast are off. In float32 the products with J and Jᵀ differ by the noise of the encoder, about 1e-5 ‖J‖.

    Cost: 2K/3 evaluations for a product of K vectors, and one for the graph of `mv`. The trial of f does not count.
    Memory: the activations of one image, three times that after the first `mv`, `batch` times that during a product.

    Args:
        f: the encoder, (1, *shape) -> (1, D).
        image: x, (*shape), such as pixels (C, H, W).
        batch: most vectors per pass; lower it when memory is short. A CPU takes at most 8, which is fastest there. See
            `forwards` for passes without a graph.
        bounds: the box of the images, near which f is tried; None for none.

    Attributes:
        image: x, (*shape).
        z: f(x), (D,), in the dtype of `image`; `output` is f(x) in the dtype of f.
        shape: (D, N).
        forwards: most images in a forward pass without a graph. On a GPU that is eight times `batch`, since such a pass
            keeps no activations. None on a CPU: passes stay small there, and the bits do not depend on `batch`.
        eps: relative spacing of the coarsest dtype among `image`, f's output and the numbers inside f.
        num_evals: evaluations spent so far, (forwards + 2·cotangents + 2·tangents) / 3.

    Raises:
        ValueError: f fails a condition of `conditions`, such as a derivative that differences of f contradict.

    Example:
        >>> import torch
        >>> from hf_equiv import Jacobian
        >>> weight = torch.arange(6.0).view(2, 3)
        >>> torch.equal(Jacobian(lambda x: x.flatten(1) @ weight.T, torch.ones(3, 1, 1)).as_matrix(), weight)
        True
    """

    def __init__(self, f: Encoding, image: Tensor, *, batch: int = VECTORS, bounds: Bounds = UNIT) -> None:
        if image.ndim == 0 or not image.is_floating_point():
            raise ValueError(f"`image` must be a float tensor (*shape); got {image.dtype} {tuple(image.shape)}.")
        check_count(batch, "batch")
        super().__init__(admit(f, image[None], bounds=bounds), image[None])
        self._batch = batch if image.is_cuda else min(batch, CPU_VECTORS)
        self.forwards = _FORWARDS * batch if image.is_cuda else None
        self.image, self.output = self.images[0], self.outputs[0]
        self.z = self.output.to(image.dtype)
        self.shape = (self.z.numel(), image.numel())

    def mv(self, tangents: Tensor) -> Tensor:
        """Return J v of each tangent v.

        Args:
            tangents: (K, *shape), with any length.

        Returns:
            (K, D), in embedding per unit of the tangents.

        Raises:
            ValueError: the shape of `tangents` does not fit.
            RuntimeError: an operation of f has neither second order nor forward mode.
        """
        if tangents.shape[1:] != self.image.shape:
            wanted = ", ".join(map(str, self.image.shape))
            raise ValueError(f"`tangents` must be (K, {wanted}); got {tuple(tangents.shape)}.")
        return self._in_passes(self.push, tangents, self.shape[:1])

    def rmv(self, cotangents: Tensor) -> Tensor:
        """Return Jᵀu of each cotangent u, by reverse mode.

        Args:
            cotangents: (K, D).

        Returns:
            (K, *shape).

        Raises:
            ValueError: the shape of `cotangents` does not fit.
        """
        if cotangents.ndim != 2 or cotangents.shape[1] != self.shape[0]:
            raise ValueError(f"`cotangents` must be (K, {self.shape[0]}); got {tuple(cotangents.shape)}.")
        return self._in_passes(self.pull, cotangents, self.image.shape)

    def _in_passes(self, multiply: Callable[[Tensor], Tensor], vectors: Tensor, shape: Sequence[int]) -> Tensor:
        products = self.image.new_empty((len(vectors), *shape))
        for start in range(0, len(vectors), self._batch):
            part = slice(start, start + self._batch)
            products[part] = multiply(vectors[part, None].detach())[:, 0]
        return products

    def as_matrix(self, batch: int | None = None) -> Tensor:
        """Form J from D cotangents, at a cost of 2D/3 evaluations and D·N numbers of memory.

        Args:
            batch: most cotangents per pass, also on a CPU; None for the batch of the constructor.

        Returns:
            J (D, N), in the dtype of `image`.
        """
        return _matrices(self, self._batch if batch is None else batch)[0]

    def check_deterministic(self) -> None:
        """Require that a second call of f gives the same embedding up to rounding."""
        with torch.no_grad():
            again = self._f(self.image[None])[0].to(self.z)
        self._spent += 1
        check_equal(self.z, again, self.eps)


def check_equal(first: Tensor, second: Tensor, eps: float) -> None:
    """Require that two calls of f on one image gave the same embedding up to rounding."""
    off = float((second - first).double().norm())
    if off > 1e3 * eps * float(first.double().norm()):
        raise ValueError(
            f"`f` must be deterministic; two calls on one image differ by {off:.3g}. Switch dropout and sampling off, "
            "for example with `model.eval()`."
        )


def jacobians(f: Encoding, images: Tensor, batch: int = VECTORS) -> Tensor:
    """Form J of several images at once from D cotangents of each, with at most `batch` images in a backward pass.

    Args:
        f: the encoder, (B, *shape) -> (B, D), each image for itself.
        images: x, (B, *shape).
        batch: most pairs of a cotangent and an image in a pass, at least B; memory holds their activations.

    Returns:
        J (B, D, N), in the dtype of `images`; B·D·N numbers.
    """
    return _matrices(Jacobians(f, images), batch // len(images))


def _matrices(at: Jacobians, count: int) -> Tensor:
    """Form J (B, D, N) from `count` cotangents of each image at a time."""
    (B, D), N = at.outputs.shape, at.images[0].numel()
    matrices = at.images.new_empty((B, D, N))
    unit = torch.eye(D, dtype=at.outputs.dtype, device=at.outputs.device)
    for rows, out in zip(unit.split(max(1, count)), matrices.split(max(1, count), dim=1), strict=True):
        out.copy_(at.pull(rows[:, None].expand(-1, B, -1)).flatten(2).transpose(0, 1))
    return matrices


def jacobian_cost(num_rows: int) -> float:
    """Return the evaluations of a full Jacobian: one forward and `num_rows` cotangents, (1 + 2·num_rows) / 3."""
    return (1 + 2 * num_rows) / 3


def require_forward_mode(f: Encoding, image: Tensor, name: str) -> None:
    """Require a finite Jacobian–vector product of f at one image (1, *shape); an error calls f `name`."""
    tangent = torch.linspace(-1, 1, image.numel(), dtype=image.dtype, device=image.device).view_as(image)
    if not bool(torch.isfinite(forward_mode(f, image, tangent, name)).all()):
        raise RuntimeError(f"the JVP of {name} must be finite; got NaN or infinity. Use float32 or float64.")


def stacked(column: list[Any]) -> Any:
    """Return tensors as one tensor, floats as float64, missing values as None, and others as a tuple."""
    if isinstance(column[0], Tensor):
        return torch.stack(column)
    if isinstance(column[0], float):
        return torch.tensor(column, dtype=torch.float64, device="cpu")
    return None if column[0] is None else tuple(column)
