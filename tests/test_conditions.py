"""The preconditions of f: functions that break one of them times the verbs, and functions that break none."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hf_equiv import (
    Encoder,
    Jacobian,
    directional_lipschitz,
    jacobian_spectrum,
    linearity_radius,
    make_directions,
    match_embedding,
    refine_8bit,
    regional_lipschitz,
    row_space,
    trace_level_set,
)  # fmt: skip
from hf_equiv.conditions import Function, admit

SHAPE, DIM = (3, 6, 6), 4
N = 108
_generator = torch.Generator().manual_seed(0)
W = torch.randn(DIM, N, generator=_generator) / N**0.5
W1, W2 = (torch.randn(*size, generator=_generator) / size[1] ** 0.5 for size in ((24, N), (DIM, 24)))
X, Y = torch.rand(2, 2, *SHAPE, generator=_generator)
V = torch.randn(2, 1, *SHAPE, generator=_generator)
WIDE = torch.randn(N, 512, generator=_generator) / N**0.5


def linear(x: Tensor) -> Tensor:
    return x.flatten(1) @ W.T.to(x)


def curved(x: Tensor) -> Tensor:
    return torch.tanh(2 * (x.flatten(1) - 0.5) @ W1.T.to(x)) @ W2.T.to(x)


VERBS = {
    "match_embedding": lambda f: match_embedding(f, X, Y, max_evals=20, raise_on_failure=False),
    "refine_8bit": lambda f: refine_8bit(f, X, Y, max_evals=4),
    "jacobian_spectrum": lambda f: jacobian_spectrum(f, X[:1]),
    "row_space": lambda f: row_space(f, X[0]),
    "Jacobian": lambda f: Jacobian(f, X[0]).as_matrix(),
    "make_directions": lambda f: make_directions(f, X, gradient=True),
    "directional_lipschitz": lambda f: directional_lipschitz(f, X, V),
    "linearity_radius": lambda f: linearity_radius(f, X, V),
    "regional_lipschitz": lambda f: regional_lipschitz(f, X[:1], 0.1, num_steps=1, num_batches=0),
    "trace_level_set": lambda f: trace_level_set(f, X[:1], heading=V[:1, 0], num_steps=1, step=0.1),
}
every_verb = pytest.mark.parametrize("verb", VERBS)


def counter():
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        return curved(x) * (1 + 1e-3 * len(calls))

    return f


def keeper():
    kept = {}

    def f(x: Tensor) -> Tensor:
        return kept[x.shape] if x.shape in kept else kept.setdefault(x.shape, curved(x))

    return f


def one_of_512(x: Tensor) -> Tensor:
    z = torch.sin(x.flatten(1) @ WIDE.to(x))
    return torch.cat([z[:, :1].detach(), z[:, 1:]], 1)


def net(*middle: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *middle, nn.Flatten(), nn.Linear(64, DIM)).requires_grad_(False)


def straight_through(h: Tensor, rounded: Tensor) -> Tensor:
    return h + (rounded - h).detach()


class Scaled(torch.autograd.Function):
    """The identity with a gradient of 1.1 times too much."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.1 * gradient


def hooked(change):
    def f(x: Tensor) -> Tensor:
        y = x * 1
        if y.requires_grad:
            y.register_hook(change)
        return curved(y)

    return f


class InNumPy(torch.autograd.Function):
    """The hyperbolic tangent in float32, of any image, by code that torch does not show."""

    @staticmethod
    def forward(ctx, x):
        ctx.out = torch.from_numpy(np.tanh(x.detach().numpy().astype(np.float32))).to(x)
        return ctx.out.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.out.square())


def trace(*middle: nn.Module) -> nn.Module:
    """A network that has no float64."""
    return torch.jit.trace(net(*middle), torch.rand(1, *SHAPE))


SMOOTH_TRACE = trace(nn.GELU())

BROKEN = {  # a function, or one that makes it anew for every verb; and the sentence
    "tuple": (lambda x: (linear(x),), r"must map \(B, \*shape\) to a float tensor \(B, D\); got tuple"),
    "dict": (lambda x: {"z": linear(x)}, "got dict"),
    "array": (lambda x: linear(x).detach().numpy(), "got ndarray"),
    "vector": (lambda x: x.sum((1, 2, 3)), r"got shape \(1,\)"),
    "batch": (lambda x: linear(x).repeat(3, 1), r"got shape \(3, 4\)"),
    "whole": (lambda x: linear(x).long(), "int64"),
    "complex": (lambda x: linear(x).to(torch.complex64), "complex64"),
    "sparse": (lambda x: linear(x).to_sparse(), "sparse_coo"),
    "empty": (lambda x: linear(x)[:, :0], r"got shape \(1, 0\)"),
    "random": (lambda x: curved(x) + 1e-3 * torch.randn(DIM), "must be deterministic; two calls .* differ by"),
    "counter": (counter, "must be deterministic; two calls .* differ by"),
    "keeper": (keeper, "must be differentiable and use its input; .* keep results"),
    "another with gradients": (
        lambda x: curved(x) * (1.0 if torch.is_grad_enabled() else 1.01),
        "must map each image for itself",
    ),
    "dropout": (lambda: net(nn.Dropout(1e-3)).train(), r"must be in eval mode; got Dropout\(p=0.001"),
    "batch norm": (lambda: net(nn.BatchNorm2d(4)).train(), r"must be in eval mode; got BatchNorm2d\(4"),
    "no statistics": (
        lambda: net(nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        "must map each image for itself",
    ),
    "batch statistics": (lambda x: curved(x - x.mean(0)), "must map each image for itself; .* changes by"),
    "F.batch_norm": (lambda x: curved(F.batch_norm(x, None, None, training=True)), "must map each image for itself"),
    "first image": (lambda x: linear(x) + 0.1 * linear(x[:1]), "must map each image for itself"),
    "last image": (lambda x: linear(x) + 0.1 * linear(x[-1:]), "must map each image for itself"),
    "detached": (lambda x: linear(x.detach()), "must be differentiable and use its input"),
    "detached input": (lambda x: x.flatten(1).detach() @ W.T.clone().requires_grad_(True), "must be differentiable"),
    "argmax": (lambda x: F.one_hot(linear(x).argmax(1), DIM).float(), "must be differentiable"),
}
FALSE = {  # functions whose autograd is not their derivative
    "a part detached": lambda x: linear(x) + curved(x.detach()),
    "a channel detached": lambda x: linear(torch.cat([x[:, :2], x[:, 2:].detach()], 1)),
    "mean detached": lambda x: curved(x - x.mean((1, 2, 3), keepdim=True).detach()),
    "norm detached": lambda x: linear(x) / linear(x).norm(dim=1, keepdim=True).detach(),
    "8-bit straight through": lambda x: curved(straight_through(x, (x * 255).round() / 255)),
    "signs straight through": lambda x: (lambda h: straight_through(h, h.sign()) @ W2.T)((x.flatten(1) - 0.5) @ W1.T),
    "fake quantisation": lambda x: curved(torch.fake_quantize_per_tensor_affine(x, 1 / 15, 0, 0, 15)),
    "rounded": lambda x: curved((x * 255).round() / 255),
    "a table": lambda x: linear(torch.linspace(0, 1, 256)[(x * 255).long()] ** 2 + 0 * x),
    "thresholds": lambda x: linear((x > 0.5).float() + 0 * x),
    "wrong backward": lambda x: curved(Scaled.apply(x)),
    "halved": hooked(lambda g: 0.5 * g),
    "clamped": hooked(lambda g: g.clamp(-0.01, 0.01)),
    "clipped": hooked(lambda g: g / max(1.0, 4 * float(g.norm()))),
    "clamped where large": hooked(lambda g: g.clamp(-1, 1)),
    "a hundredth less": hooked(lambda g: 0.99 * g),
    "one of 512 outputs detached": one_of_512,
    "reversed": hooked(lambda g: -g),
    "seven per cent in a trace": lambda x: SMOOTH_TRACE(Scaled.apply(x) * 1.07 / 1.1 + 0.03 / 1.1 * x.detach()),
}
NEW = ("counter", "keeper", "dropout", "batch norm", "no statistics")  # these have a state


@every_verb
@pytest.mark.parametrize("name", BROKEN)
def test_a_function_that_breaks_a_condition_is_refused_by_all_verbs(verb, name):
    f, message = BROKEN[name]
    with pytest.raises(ValueError, match=f"^`f` {message}" if message.startswith("must") else message):
        VERBS[verb](f() if name in NEW else f)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "directional_lipschitz"])
@pytest.mark.parametrize("name", FALSE)
def test_a_derivative_that_differences_contradict_is_refused(verb, name):
    number = r"(-?\d[\d.e+-]*)"
    with pytest.raises(
        ValueError, match=f"^`f` must have the derivative .* got {number} from autograd and {number} from"
    ):
        VERBS[verb](FALSE[name])


@pytest.mark.parametrize("name", ["a part detached", "norm detached", "rounded", "a hundredth less"])
def test_directional_constants_are_not_resolved_beside_a_false_derivative(name):
    found = directional_lipschitz(FALSE[name], X, V)
    assert set(sum(found.status, ())) == {"undetermined"}
    assert bool(found.jvp.isnan().all())


def test_a_spectrum_compares_the_derivative_at_every_image():
    def f(x: Tensor) -> Tensor:
        dark = x.mean((1, 2, 3), keepdim=True).flatten(1) < 0.5
        return torch.where(dark, 0.8 * curved(x) + 0.2 * curved(x.detach()), curved(x))

    images = torch.stack([X[0].clamp_min(0.6), 0.3 * X[1]])
    jacobian_spectrum(f, images[:1])
    with pytest.raises(ValueError, match="must have the derivative"):
        jacobian_spectrum(f, images)


def test_noise_that_a_grey_image_does_not_show_is_found_at_the_match():
    def f(x: Tensor) -> Tensor:
        contrast = 100 * (x - 0.5).square().sum((1, 2, 3))[:, None]
        return (curved(x) + contrast) - contrast

    for seed in range(4):
        source, target = torch.rand(2, 1, *SHAPE, generator=torch.Generator().manual_seed(seed))
        found, z = match_embedding(f, source, target, max_evals=100, raise_on_failure=False), f(target).double()
        off = float((curved(found.images.double()) - z).norm() / z.norm())
        assert off <= 1e-5 or not found.converged


def test_numbers_of_a_coarse_function_are_not_better_than_its_rounding():
    def f(x: Tensor) -> Tensor:
        return curved(x.bfloat16()).float()

    found = regional_lipschitz(f, X[:1], 0.1, num_steps=3, num_batches=0)
    exact = torch.func.jvp(lambda x: curved(x.double()), (found.images,), (found.directions,))[1]
    assert float(found.lower_bound) <= float(exact.norm()) * (1 + 1e-6)
    walk = trace_level_set(f, X[:1], heading=V[:1, 0], num_steps=1, step=0.1, rtol=1e-4)
    assert walk.status == ("drift_exceeded",)


def test_a_gradient_that_needs_a_changed_tensor_is_refused():
    weight = W1.clone()

    def f(x: Tensor) -> Tensor:
        z = (x.flatten(1) @ weight.T).tanh() @ W2.T
        weight.mul_(1)
        return z

    with pytest.raises(ValueError, match=r"must be differentiable; got an error in its backward pass .* in place"):
        match_embedding(f, X, Y)


def tokens() -> nn.Module:
    """Features of a single image become tokens: the gradient of its batch norm is wrong in PyTorch 2.13."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    return net(norm, nn.Flatten(2), Transpose()).eval()


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_batch_norm_before_tokens_has_its_true_derivative():
    f = tokens()
    exact = torch.func.jacfwd(lambda x: f(x[None])[0])(X[0]).flatten(1)
    torch.testing.assert_close(Jacobian(f, X[0]).as_matrix(), exact, rtol=1e-5, atol=1e-6)
    sigma = jacobian_spectrum(f, X[:1])
    assert bool(((sigma.singular_values[0] - torch.linalg.svdvals(exact.double())).abs() < 1e-5).all())
    alone, pair = (match_embedding(f, X[:n], f(Y[:n]), max_evals=200, raise_on_failure=False) for n in (1, 2))
    assert alone.converged
    assert pair.converged
    double = copy.deepcopy(f).double()
    wide = Jacobian(double, X[0].double()).as_matrix()
    torch.testing.assert_close(wide.float(), exact, rtol=1e-5, atol=1e-6)


HONEST = {
    "ReLU": lambda x: torch.relu((x.flatten(1) - 0.5) @ W1.T.to(x)) @ W2.T.to(x),
    "max pooling": net(nn.ReLU(), nn.MaxPool2d(2, 1), nn.ZeroPad2d((0, 1, 0, 1))),
    "steep": lambda x: torch.sin(1e4 * x).flatten(1) @ W.T.to(x),
    "sorted": lambda x: x.flatten(1).sort(1).values[:, ::30],
    "tiny": lambda x: curved(x) * 1e-30,
    "1e140": lambda x: curved(x.double()) * 1e140,
    "1e-140": lambda x: curved(x.double()) * 1e-140,
    "offset": lambda x: curved(x) + 1e3,
    "zero": lambda x: F.relu(linear(x)) - F.relu(-linear(x)) - linear(x),
    "cancelling": lambda x: (curved(x) + 1e3) - 1e3,
    "bfloat16 inside": lambda x: curved(x.bfloat16()).float(),
    "half": lambda x: curved(x).half(),
    "float32 inside": lambda x: curved(x.float()).double(),
    "constant": lambda x: 0 * x.flatten(1)[:, :DIM] + 1,
    "dead units": lambda x: torch.relu(x.flatten(1)[:, :DIM] - 2),
    "unit length": lambda x: F.normalize(curved(x)),
    "train flags without effect": net(nn.Dropout(0.0), nn.GroupNorm(2, 4)).train(),
    "batch norm": net(nn.BatchNorm2d(4)).eval(),
    "traced kinks": trace(nn.ReLU(), nn.MaxPool2d(2, 1), nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1))),
    "frozen": torch.jit.freeze(torch.jit.script(net(nn.GELU()).eval())),
    "float32 in NumPy": lambda x: torch.relu(InNumPy.apply(3 * x - 1).flatten(1) @ W1.T.to(x)) @ W2.T.to(x),
    "cancelling in float64": lambda x: ((curved(x.double()) + 1e9) - 1e9).to(x),
    "loop": lambda x: torch.stack([curved(one[None])[0] for one in x]),
}


@pytest.mark.parametrize("place", ["photo", "black", "grey", "white", "8-bit"])
@pytest.mark.parametrize("name", HONEST)
def test_honest_functions_are_admitted(name, place):
    flat = {"black": 0.0, "grey": 0.5, "white": 1.0}
    image = (X[:1] * 255).round() / 255 if place == "8-bit" else X[:1]
    image = torch.full_like(image, flat[place]) if place in flat else image
    for dtype in (torch.float32, torch.float64):
        fits = dtype == torch.float32 if isinstance(HONEST[name], nn.Module) else True
        fits &= dtype == torch.float64 or not name.startswith("1e")  # float32 gradients leave its range
        if fits:
            admit(HONEST[name], image.to(dtype), noise=True)


def test_one_image_at_a_time_is_enough_where_a_verb_needs_no_more():
    def f(x: Tensor) -> Tensor:
        if len(x) > 1:
            raise RuntimeError("one at a time")
        return curved(x)

    for verb in ("jacobian_spectrum", "Jacobian", "trace_level_set"):
        VERBS[verb](f)


@every_verb
def test_the_tensors_of_the_caller_are_not_changed(verb):
    """f normalises in place, and returns a buffer that its next call overwrites."""
    before = [tensor.clone() for tensor in (X, Y, V)]
    buffer = torch.zeros(64, DIM)

    def f(x: Tensor) -> Tensor:
        z = curved(x.sub_(0.25).mul_(2))
        if z.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(z):
            return z
        return buffer[: len(z)].copy_(z)

    def plain(x: Tensor) -> Tensor:
        return curved((x - 0.25) * 2)

    found, wanted = VERBS[verb](f), VERBS[verb](plain)
    assert all(map(torch.equal, before, (X, Y, V)))
    if verb != "Jacobian":
        names = ("images", "values", "radii", "singular_values", "vectors", "basis")
        found, wanted = (next(getattr(each, name) for name in names if hasattr(each, name)) for each in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_statistics_of_batch_norm_stay_as_they_are():
    f = net(nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(f.state_dict())
    with pytest.raises(ValueError, match="eval mode"):
        jacobian_spectrum(f, X)
    assert all(torch.equal(value, before[name]) for name, value in f.state_dict().items())


def test_the_cost_of_the_conditions():
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(len(x))
        return curved(x)

    admit(f, X, noise=True)
    assert sum(calls) <= 13
    calls.clear()
    f = admit(f, X)
    calls.clear()
    assert admit(f, X) is f
    assert calls == []


def test_an_encoder_is_tried_once_for_each_size():
    encoder = Encoder.from_pretrained("builtin-64")
    images = torch.rand(2, *encoder.input_shape, generator=torch.Generator().manual_seed(0))
    first = admit(encoder, images)
    assert isinstance(first, Function)
    assert admit(encoder, images[1:]) is first
    assert admit(encoder, images.double()) is not first
    assert first.pixel_std is not None
    assert torch.equal(first(images), encoder(images))


def test_a_check_at_a_broken_image_waits_for_the_next():
    def f(x: Tensor) -> Tensor:
        return curved(x.detach()) + torch.where(x[:, :1, 0, 0] < 0.1, torch.nan, 0.0)

    bad = X.clone()
    bad[0, :, 0, 0] = 0
    with pytest.raises(ValueError, match="must be differentiable"):
        jacobian_spectrum(f, bad)
