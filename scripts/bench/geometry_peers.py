"""What `geometry.py` compares: each takes a counted encoder and an image, and returns what its method states."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from meter import Watched
from methods import Module
from torch import Tensor

from hf_equiv import Jacobian, jacobian_spectrum
from hf_equiv.conditions import admit
from hf_equiv.precision import exact_derivatives

POWER_ITERATIONS = 25
"""Of plenoptic's power method, whose default is at most 1000: a budget of this benchmark, not its limit."""
SKETCH = 3
"""Measurements of skerch for each singular value."""


@dataclass(frozen=True)
class Top:
    """The largest singular values, as one method states them.

    Attributes:
        values: (K,), descending, float64; None from a method that only forms J.
        bound: the error bound it gives, (K,), float64; None if it gives none.
        num_evals: evaluations by its own count, where that is the larger.
    """

    values: Tensor | None
    bound: Tensor | None = None
    num_evals: float = 0.0


def ours(full: bool) -> Callable[[Watched, Tensor, int, int], Top]:
    """`jacobian_spectrum`, all values or the first k."""

    def run(f: Watched, image: Tensor, k: int, seed: int) -> Top:
        admit(f, image)
        with f.measure():
            found = jacobian_spectrum(f, image, k=None if full else k)
        return Top(found.singular_values[0], found.error_bound[0], float(found.num_evals[0]))

    return run


def bare(chunk: int) -> Callable[[Watched, Tensor, int, int], Top]:
    """J by D VJPs in a plain loop, and nothing else."""

    def run(f: Watched, image: Tensor, k: int, seed: int) -> Top:
        with f.measure():
            x = image.clone().requires_grad_(True)
            z = f(x)[0]
            matrix = image.new_empty(len(z), image.numel())
            for cotangents, rows in zip(torch.eye(len(z)).to(z).split(chunk), matrix.split(chunk), strict=True):
                (found,) = torch.autograd.grad(z, x, cotangents, is_grads_batched=True, retain_graph=True)
                rows.copy_(found.flatten(1))
        return Top(None)

    return run


def scipy_svds(tol: float) -> Callable[[Watched, Tensor, int, int], Top]:
    """SciPy's `svds` (ARPACK) on this library's products with J and Jᵀ."""

    def run(f: Watched, image: Tensor, k: int, seed: int) -> Top:
        from scipy.sparse.linalg import LinearOperator

        with f.measure():
            J = Jacobian(f, image[0])

            def tensor(vector: np.ndarray, shape: tuple[int, ...]) -> Tensor:
                return torch.from_numpy(np.ascontiguousarray(vector)).to(J.image).view(1, *shape)

            operator = LinearOperator(
                J.shape,
                matvec=lambda v: J.mv(tensor(v, J.image.shape))[0].numpy(),
                rmatvec=lambda u: J.rmv(tensor(u, J.z.shape))[0].flatten().numpy(),
                dtype=J.z.numpy().dtype,
            )
            return _svds(operator, k, seed, tol)

    return run


def _svds(operator: Any, k: int, seed: int, tol: float) -> Top:
    from scipy.sparse.linalg import svds

    start = np.random.default_rng(seed).standard_normal(min(operator.shape)).astype(operator.dtype)
    return Top(_descending(svds(operator, k=k, tol=tol, v0=start, return_singular_vectors=False)))


def plenoptic_eigendistortion(method: str) -> Callable[[Watched, Tensor, int, int], Top]:
    """The `Eigendistortion` of plenoptic: σ² as eigenvalues of JᵀJ."""

    def run(f: Watched, image: Tensor, k: int, seed: int) -> Top:
        import plenoptic

        torch.manual_seed(seed)
        with f.measure(), exact_derivatives(), quiet():
            found = plenoptic.Eigendistortion(image.contiguous(), Module(f))
            found.synthesize(method=method, k=k, max_iter=POWER_ITERATIONS)
        return Top(_descending(found.eigenvalues[:k].double().sqrt()))  # "power" puts the smallest k after them

    return run


def curvlinops_svds(f: Watched, image: Tensor, k: int, seed: int) -> Top:
    """SciPy's `svds` on the `JacobianLinearOperator` of curvlinops, the image as the parameter."""
    from curvlinops import JacobianLinearOperator

    class Pixels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(image.clone())

        def forward(self, _: Tensor) -> Tensor:
            return f(self.x)

    model, nothing = Pixels(), torch.zeros(1, 1)
    with f.measure(), exact_derivatives():
        operator = JacobianLinearOperator(model, [model.x], [(nothing, nothing)], check_deterministic=False)
        return _svds(operator.to_scipy(), k, seed, 0.0)


def skerch_ssvd(f: Watched, image: Tensor, k: int, seed: int) -> Top:
    """The sketched SVD of skerch (Halko, Martinsson, Tropp) on this library's products with J and Jᵀ."""
    from skerch.algorithms import ssvd

    class Operator:
        def __init__(self) -> None:
            self.J = Jacobian(f, image[0])
            self.shape = self.J.shape

        def __matmul__(self, block: Tensor) -> Tensor:
            return self.J.mv(block.T.reshape(-1, *self.J.image.shape)).T

        def __rmatmul__(self, block: Tensor) -> Tensor:
            return self.J.rmv(block).flatten(1)

    with f.measure():
        operator = Operator()
        measurements = min(SKETCH * k, *operator.shape)
        _, values, _ = ssvd(operator, "cpu", image.dtype, measurements, seed=seed, recovery_type="hmt")
    return Top(_descending(values[:k]))


def torchlip(kind: str, **settings: float) -> Callable[[Watched, Tensor, int], float]:
    """The `evaluate_lip_const` of deel-torchlip."""

    def run(f: Watched, image: Tensor, seed: int) -> float:
        from deel.torchlip.utils import evaluate_lip_const

        torch.manual_seed(seed)
        with f.measure(), quiet():
            return float(evaluate_lip_const(Module(f), image, evaluation_type=kind, **settings))

    return run


def art_clever(logits: Watched, image: Tensor, num_classes: int, target: int, radius: float, seed: int) -> float:
    """The targeted CLEVER score of ART: a radius, min(margin / estimated constant, `radius`)."""
    from art.estimators.classification import PyTorchClassifier
    from art.metrics import clever_t

    np.random.seed(seed)
    estimator = PyTorchClassifier(
        Module(logits),
        torch.nn.CrossEntropyLoss(),
        tuple(image.shape[1:]),
        num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    with logits.measure(), quiet():
        score = clever_t(
            estimator, image[0].numpy(), target, nb_batches=20, batch_size=16, radius=radius, norm=2, pool_factor=5
        )
    return float(score)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what a peer prints.

    Yields:
        nothing
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def installed(module: str) -> bool:
    """Whether a module can be imported; `a.b` also where there is no `a`."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _descending(values: Tensor | np.ndarray) -> Tensor:
    found = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    return found.detach().double().cpu().sort(descending=True).values


@dataclass(frozen=True)
class Method:
    """One line of a table; `needs` is the module it cannot run without."""

    title: str
    run: Callable[..., Any]
    needs: str = "hf_equiv"


TOP = {
    "top": Method("**hf_equiv, top k**", ours(full=False)),
    "full": Method("hf_equiv, all values", ours(full=True)),
    "bare-8": Method("J alone: D VJPs, 8 at a time", bare(8)),
    "bare-48": Method("J alone: D VJPs, 48 at a time", bare(48)),
    "scipy": Method("SciPy svds, tol 0", scipy_svds(0.0), "scipy"),
    "scipy-1e-4": Method("SciPy svds, tol 1e-4", scipy_svds(1e-4), "scipy"),
    "curvlinops": Method("curvlinops + svds, tol 0", curvlinops_svds, "curvlinops"),
    "skerch": Method(f"skerch ssvd, {SKETCH}k measurements", skerch_ssvd, "skerch"),
    "plenoptic-rsvd": Method(
        "plenoptic Eigendistortion, randomized_svd", plenoptic_eigendistortion("randomized_svd"), "plenoptic"
    ),
    "plenoptic-power": Method(
        f"plenoptic Eigendistortion, power, {POWER_ITERATIONS} iterations",
        plenoptic_eigendistortion("power"),
        "plenoptic",
    ),
}
TORCHLIP = {
    "torchlip-jacobian": Method("torchlip jacobian_norm", torchlip("jacobian_norm"), "deel.torchlip"),
    "torchlip-noise": Method("torchlip noise_norm", torchlip("noise_norm"), "deel.torchlip"),
    "torchlip-noise-1e-7": Method(
        "torchlip noise_norm, epsilon_noise 1e-7", torchlip("noise_norm", epsilon_noise=1e-7), "deel.torchlip"
    ),
    "torchlip-attack": Method("torchlip attack", torchlip("attack"), "deel.torchlip"),
}
