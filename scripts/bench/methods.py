"""The methods compared: each takes a meter and a source and returns its image, or None for the best the meter saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from meter import Meter
from torch import Tensor

from hf_equiv import LBFGS, Adam, GradientDescent, match_embedding
from hf_equiv.conditions import admit


def ours(solver: Any) -> Callable[[Meter, Tensor], Tensor]:
    """This library, with one of its solvers."""

    def run(meter: Meter, source: Tensor) -> Tensor:
        admit(meter, source, noise=True)
        with meter.measure():
            return match_embedding(
                meter, source, meter.z, solver, rtol=meter.rtol, max_evals=meter.max_evals, raise_on_failure=False
            ).images

    return run


def paper(meter: Meter, source: Tensor) -> None:
    """Gradient descent on ½‖f(x) − z‖² with the fixed step 1e-3, as in arXiv:2401.15568, clipped to the box."""
    x = source.clone()
    with meter.measure(stops=True):
        while True:
            x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(0.5 * (meter(x) - meter.z).square().sum(), x)
            x = (x.detach() - 1e-3 * gradient).clamp(0.0, 1.0)


def scipy_lbfgsb(meter: Meter, source: Tensor) -> None:
    """SciPy's L-BFGS-B on ½‖f(x) − z‖², accumulated in float64 and unscaled."""
    from scipy.optimize import minimize

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat).to(source).view_as(source).requires_grad_(True)
        value = 0.5 * (meter(x).double() - meter.z.double()).square().sum()
        (gradient,) = torch.autograd.grad(value, x)
        return value.item(), gradient.flatten().double().cpu().numpy()

    start = source.flatten().double().cpu().numpy()
    options = {"maxcor": 20, "ftol": 0.0, "gtol": 0.0, "maxiter": 10**6, "maxfun": 10**6}
    with meter.measure(stops=True):
        minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0.0, 1.0)] * len(start), options=options)


def plenoptic_metamer(
    optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any]
) -> Callable[[Meter, Tensor], None]:
    """The `Metamer` of plenoptic, its early stop off."""

    def run(meter: Meter, source: Tensor) -> None:
        import plenoptic

        metamer = plenoptic.Metamer(meter.target.contiguous(), Module(meter))
        metamer.setup(initial_image=source.contiguous(), optimizer=optimizer, optimizer_kwargs=kwargs)
        steps = 10 * meter.max_evals  # the meter stops it
        with meter.measure(stops=True):
            metamer.synthesize(max_iter=steps, stop_criterion=0.0, stop_iters_to_check=steps + 1)

    return run


def art_feature_adversaries(
    optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any]
) -> Callable[[Meter, Tensor], None]:
    """The `FeatureAdversariesPyTorch` of ART, its ball as wide as the box."""

    def run(meter: Meter, source: Tensor) -> None:
        from art.attacks.evasion import FeatureAdversariesPyTorch
        from art.estimators.classification import PyTorchClassifier

        net = torch.nn.Sequential()
        net.add_module("emb", Module(meter))
        estimator = PyTorchClassifier(
            net,
            torch.nn.CrossEntropyLoss(),
            tuple(source.shape[1:]),
            meter.z.shape[1],
            clip_values=(0.0, 1.0),
            device_type="gpu" if source.is_cuda else "cpu",
        )
        attack = FeatureAdversariesPyTorch(
            estimator,
            delta=1.0,
            layer="emb",
            max_iter=10 * meter.max_evals,  # the meter stops it
            batch_size=1,
            optimizer=optimizer,
            optimizer_kwargs=kwargs,
            verbose=False,
        )
        with meter.measure(stops=True):
            attack.generate(source.cpu().numpy(), meter.target.cpu().numpy())

    return run


class Module(torch.nn.Module):
    """The meter as the frozen module that the peers want."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """The embedding (B, D)."""
        return self.meter(images)


@dataclass(frozen=True)
class Method:
    """One line of the table; `needs` is the module it cannot run without."""

    title: str
    run: Callable[[Meter, Tensor], Tensor | None]
    needs: str = "hf_equiv"

    @property
    def is_ours(self) -> bool:
        """Whether it returns a match that `refine_8bit` may then refine."""
        return self.needs == "hf_equiv" and self.run is not paper


TORCH_LBFGS: dict[str, Any] = {"lr": 1.0, "max_iter": 20, "history_size": 10, "line_search_fn": "strong_wolfe"}
METHODS = {
    "lbfgs": Method("**hf_equiv LBFGS**", ours(LBFGS())),
    "adam": Method("hf_equiv Adam", ours(Adam())),
    "gd": Method("hf_equiv GradientDescent", ours(GradientDescent())),
    "paper": Method("paper: gradient descent, step 1e-3", paper),
    "scipy": Method("SciPy L-BFGS-B", scipy_lbfgsb, "scipy"),
    "plenoptic-lbfgs": Method(
        "plenoptic Metamer, LBFGS", plenoptic_metamer(torch.optim.LBFGS, TORCH_LBFGS), "plenoptic"
    ),
    "plenoptic-adam": Method(
        "plenoptic Metamer, Adam 1e-2", plenoptic_metamer(torch.optim.Adam, {"lr": 1e-2}), "plenoptic"
    ),
    "art-lbfgs": Method(
        "ART FeatureAdversaries, LBFGS", art_feature_adversaries(torch.optim.LBFGS, TORCH_LBFGS), "art"
    ),
    "art-adam": Method(
        "ART FeatureAdversaries, Adam 1e-2", art_feature_adversaries(torch.optim.Adam, {"lr": 1e-2}), "art"
    ),
}
