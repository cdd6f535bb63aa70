"""Singular values against closed forms, LAPACK and each other; their bounds, rank and what must raise."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DIM, EIGHT, SIGMA, images, linear, rank_deficient, smooth_mlp

from hf_equiv.geometry import singular
from hf_equiv.geometry.singular import left_singular
from hf_equiv.geometry.spectrum import jacobian_spectrum
from hf_equiv.jacobian import Jacobian
from hf_equiv.passes import alone, look
from hf_equiv.results import Status

every_case = pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)


def golub_kahan(J: Jacobian, k: int, rtol: float, seed: int = 0) -> singular.TopSingular:
    def work():
        at = yield from look(J._f, J.image)
        return (yield from singular.golub_kahan(at, k, rtol, seed=seed))

    return alone(work())


def graded(sigma: torch.Tensor, columns: int = 5000, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(len(sigma), len(sigma), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(sigma), generator=generator, dtype=torch.float64)).Q
    return ((left * sigma) @ right.T).to(dtype)


@every_case
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_closed_form(case, batch):
    x = images(2, seed=2, dtype=torch.float64)
    result = jacobian_spectrum(case.f, x, batch=batch, vectors=True)
    assert result.status == (Status.COMPLETED,) * 2
    assert result.rank.tolist() == [case.rank] * 2
    assert result.nullity.tolist() == [case.nullity] * 2
    for image, sigma, bound, left, right in zip(
        x, result.singular_values, result.error_bound, result.left, result.right, strict=True
    ):
        dense = case.f.jacobian(image)
        exact = torch.linalg.svdvals(dense)
        assert float((sigma - exact).abs().max()) <= 1e-13 * float(exact[0])
        assert bool(((sigma - exact).abs() <= bound).all())
        assert float(bound.max()) <= 1e-11
        rows = right.flatten(1)
        torch.testing.assert_close((left * sigma) @ rows, dense, rtol=0, atol=1e-12)
        inner = rows[: case.rank] @ rows[: case.rank].T
        torch.testing.assert_close(inner, torch.eye(case.rank, dtype=torch.float64), rtol=0, atol=1e-12)
        if case.singular_values is not None:
            torch.testing.assert_close(sigma, case.singular_values, rtol=0, atol=1e-10)


def test_measures_of_the_spectrum():
    result = jacobian_spectrum(linear(), images(1, dtype=torch.float64))
    p = SIGMA / SIGMA.sum()
    assert float(result.effective_rank) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-12)
    assert float(result.participation) == pytest.approx(
        float(SIGMA.square().sum() ** 2 / SIGMA.pow(4).sum()), rel=1e-12
    )
    share = float(SIGMA[:3].square().sum() / SIGMA.square().sum())
    assert float(result.energy_share(3)) == pytest.approx(share, rel=1e-12)
    assert float(result.energy_share(DIM)) == pytest.approx(1.0, rel=1e-15)
    assert float(result.num_evals) > (1 + 2 * DIM) / 3
    assert "12 values" in repr(result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decades", [3, 8, 12])
def test_small_values_are_not_squared_away(dtype, decades):
    matrix = graded(torch.logspace(1, 1 - decades, 60, dtype=torch.float64), dtype=dtype)
    left, sigma = left_singular(matrix)
    exact = torch.linalg.svdvals(matrix.double())
    assert float((sigma - exact).abs().max()) <= (3e-14 if dtype == torch.float64 else 1e-10) * float(exact[0])
    torch.testing.assert_close(left.T @ left, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-12)
    gram = torch.linalg.eigvalsh(matrix.double() @ matrix.double().T).clamp_min(0).sqrt()
    if decades == 12 and dtype == torch.float64:  # what it is for
        assert float((gram.flip(0) - exact).abs().max()) > 1e-9 * float(exact[0])


def test_float32_values_lie_within_their_bound_of_float64():
    case = smooth_mlp()
    x = images(3, seed=4)
    single = jacobian_spectrum(case, x)
    double = jacobian_spectrum(case, x.double())
    error = (single.singular_values - double.singular_values).abs()
    assert single.noise_method == ("float64 twin",) * 3
    assert double.noise_method == ("perturbed input",) * 3
    assert bool((error <= single.error_bound).all())
    assert float((single.error_bound / single.sigma_max[:, None]).max()) < 1e-5


def test_a_callable_is_measured_against_itself_in_float64():
    model = smooth_mlp()
    weights = (model.W1.float(), model.b.float(), model.W2.float())

    def f(x):
        return torch.tanh((x.flatten(1) - 0.5) @ weights[0].T + weights[1]) @ weights[2].T

    single = jacobian_spectrum(f, images(1, seed=5))
    exact = torch.linalg.svdvals(model.jacobian(images(1, seed=5)[0]))
    assert single.noise_method == ("float64 twin",)
    assert bool(((single.singular_values[0] - exact).abs() <= single.error_bound[0]).all())


def test_a_module_is_not_converted_in_place():
    module = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5), torch.nn.Tanh()).eval().requires_grad_(False)
    )
    result = jacobian_spectrum(module, images(1))
    assert result.noise_method == ("float64 twin",)
    assert module[1].weight.dtype == torch.float32


@pytest.mark.parametrize("seed", range(5))
def test_golub_kahan_bounds_hold(seed):
    sigma = torch.cat([torch.tensor([10.0, 8, 7.9, 5, 4.5, 4.4, 3.9, 3]), torch.linspace(2.5, 0.1, 52)]).double()
    matrix = graded(sigma, 192)
    J = Jacobian(lambda x: x.flatten(1) @ matrix.T, images(1, dtype=torch.float64)[0])
    top = golub_kahan(J, 8, 1e-6, seed=seed)
    assert bool(((top.values - sigma[:8]).abs() <= top.bound).all())
    assert float(top.bound.max()) <= 1e-6 * 10
    assert top.passes < 60
    torch.testing.assert_close(matrix @ top.right.T, top.left * top.values, rtol=0, atol=1e-2)


@every_case
def test_top_k_agrees_with_the_full_spectrum(case):
    x = images(2, seed=6, dtype=torch.float64)
    full = jacobian_spectrum(case.f, x, method="full", k=3, vectors=True)
    top = jacobian_spectrum(case.f, x, method="golub_kahan", k=3, vectors=True, rtol=1e-9)
    assert (full.method, top.method) == (("full",) * 2, ("golub_kahan",) * 2)
    gap = (full.singular_values - top.singular_values).abs()
    assert bool((gap <= full.error_bound + top.error_bound).all())
    assert top.rank is None
    assert full.rank.tolist() == [case.rank] * 2
    assert top.right.shape == (2, 3, *x.shape[1:])


@pytest.mark.parametrize("k", [1, 9, 12])
def test_golub_kahan_of_a_deficient_matrix(k):
    """More values than the rank: the bidiagonalisation breaks down and goes on."""
    result = jacobian_spectrum(rank_deficient(), images(1, dtype=torch.float64), k=k, method="golub_kahan", rtol=1e-10)
    exact = torch.cat([SIGMA[:-3], torch.zeros(3, dtype=torch.float64)])[:k]
    torch.testing.assert_close(result.singular_values[0], exact, rtol=0, atol=1e-9)


def test_auto_takes_the_quicker():
    wide = torch.randn(192, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = images(1, dtype=torch.float64)
    assert jacobian_spectrum(lambda v: v.flatten(1) @ wide, x, k=2).method == ("golub_kahan",)
    assert jacobian_spectrum(lambda v: v.flatten(1) @ wide, x, k=100).method == ("full",)
    assert jacobian_spectrum(lambda v: v.flatten(1) @ wide, x).method == ("full",)


def test_more_outputs_than_pixels():
    tall = torch.randn(300, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = jacobian_spectrum(lambda v: v.flatten(1) @ tall.T, images(1, dtype=torch.float64))
    torch.testing.assert_close(result.singular_values[0], torch.linalg.svdvals(tall), rtol=0, atol=1e-11)
    assert (result.rank.tolist(), result.nullity.tolist()) == ([192], [0])


def test_a_locally_constant_encoder_has_rank_zero():
    result = jacobian_spectrum(lambda v: torch.relu(v.flatten(1)[:, :4] - 5), images(1, dtype=torch.float64))
    assert result.rank.tolist() == [0]
    assert result.sigma_max.tolist() == [0.0]
    assert result.effective_rank.tolist() == [0.0]
    assert result.status == (Status.COMPLETED,)


@pytest.mark.parametrize("k", [None, 2])
def test_nan_is_a_status(k):
    x = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    x[1] = 0.0

    def f(v):
        return (
            v.flatten(1).norm(dim=1, keepdim=True).sqrt() * torch.arange(1.0, 4.0, dtype=v.dtype) + v.flatten(1)[:, :3]
        )

    result = jacobian_spectrum(f, x, k=k)
    assert result.status == (Status.COMPLETED, Status.ERROR)
    assert bool(result.singular_values[1].isnan().all())
    if k is None:
        assert result.rank.tolist() == [3, -1]


def test_rank_rtol_is_used_and_stated():
    result = jacobian_spectrum(linear(), images(1, dtype=torch.float64), rank_rtol=0.5)
    assert float(result.rank_threshold) == pytest.approx(0.5 * float(SIGMA[0]))
    assert result.rank.tolist() == [int((SIGMA > 0.5 * SIGMA[0]).sum())]


def test_bad_input():
    x, f = images(1), linear()
    with pytest.raises(ValueError, match=r"`k` must be at most min\(D, N\) = 12; got 13"):
        jacobian_spectrum(f, x, k=13)
    with pytest.raises(ValueError, match="`method` must be one of auto, full, golub_kahan; got 'qr'"):
        jacobian_spectrum(f, x, method="qr")
    with pytest.raises(ValueError, match="`f` must be differentiable"):
        jacobian_spectrum(lambda v: f(v).detach(), x)
    with pytest.raises(ValueError, match="`f` must be deterministic"):
        jacobian_spectrum(lambda v: torch.nn.functional.dropout(v.flatten(1)), x)
    with pytest.raises(ValueError, match="must lie in"):
        jacobian_spectrum(f, 2 * x)
    with pytest.raises(ValueError, match="`rank_rtol` must"):
        jacobian_spectrum(f, x, rank_rtol=math.nan)
    with pytest.raises(ValueError, match=r"must have a Jacobian that fits into memory; .*pass `k=`"):
        jacobian_spectrum(lambda v: v.flatten(1).expand(-1, 192).repeat(1, 4000), x)
    with pytest.raises(ValueError, match="Leave out `k=`"):
        jacobian_spectrum(f, x, k=2, method="golub_kahan").energy_share(1)


def test_progress():
    seen = []
    jacobian_spectrum(linear(), images(3), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# Krylov methods and what they may skip


def slow(*, count: int = 96) -> torch.Tensor:
    """Singular values as a network has them: a few far apart, then ever closer."""
    return 100.0 / (1 + torch.arange(count, dtype=torch.float64)) ** 0.7


@pytest.mark.parametrize("k", [3, 8])
def test_no_value_is_skipped(k):
    """A value whose vector has hardly a part in the start converges after the next lower one."""
    sigma = slow()
    J = Jacobian(lambda x: x.flatten(1) * sigma, torch.full((1, 1, len(sigma)), 0.5, dtype=torch.float64))
    for seed in range(60):
        top = golub_kahan(J, k, 1e-4, seed=seed)
        error = (top.values - sigma[:k]).abs()
        assert bool((error <= top.bound + 1e-12).all()), seed
        assert float(top.bound.max()) <= 1e-4 * float(sigma[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("values", "k"), [([3, 3, 2, 2, 2] + [1] * 95, 2), ([1] * 7 + [0] * 93, 5), ([3] * 40, 39)], ids=str
)
def test_equal_values_are_all_found(values, k, dtype):
    draw = torch.randn(2, 100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right = torch.linalg.qr(draw)[0]
    if len(values) == 100:
        matrix = left * torch.tensor(values, dtype=torch.float64) @ right
    else:
        matrix = values[0] * right[: len(values)]
    J = Jacobian(lambda x: x.flatten(1) @ matrix.T.to(x), torch.full((1, 1, 100), 0.5, dtype=dtype))
    top = golub_kahan(J, k, 1e-4)
    torch.testing.assert_close(top.values, torch.tensor(values[:k], dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_double_and_triple_values_among_others_are_not_counted_once(times, dtype):
    """One Krylov space holds one vector of each; a second start finds the others."""
    sigma = slow(count=40).repeat_interleave(times)
    J = Jacobian(lambda x: x.flatten(1) * sigma.to(x), torch.full((1, 1, len(sigma)), 0.5, dtype=dtype))
    for seed in range(10):
        top = golub_kahan(J, 6, 1e-4, seed=seed)
        assert bool(((top.values - sigma[:6]).abs() <= top.bound + 1e-5).all()), seed
        assert top.passes < 40


@pytest.mark.parametrize("scale", [1e-160, 1e-155, 1e155, 1e160])
def test_any_scale(scale):
    matrix = torch.randn(20, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.full((1, 1, 1, 60), 0.5, dtype=torch.float64)
    result = jacobian_spectrum(lambda v: v.flatten(1) @ (scale * matrix).T, x)
    exact = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(result.singular_values[0] / scale, exact, rtol=1e-12, atol=0)
    assert bool((result.error_bound[0] / scale < 1e-12).all())
    top = jacobian_spectrum(lambda v: v.flatten(1) @ (scale * matrix).T, x, k=2, method="golub_kahan")
    assert bool(((top.singular_values[0] - scale * exact[:2]).abs() <= top.error_bound[0]).all())
    assert bool((top.error_bound[0] / scale < 1e-3).all())
    assert result.rank.tolist() == [20]


def test_zeros_of_more_outputs_than_pixels():
    matrix = torch.zeros(30, 12, dtype=torch.float64)
    matrix[0, 0], matrix[1, 1] = 1.0, 0.5
    result = jacobian_spectrum(lambda v: v.flatten(1) @ matrix.T, torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64))
    assert (result.rank.tolist(), result.nullity.tolist()) == ([2], [10])
    assert [(zero.cause, zero.count) for zero in result.structural_zeros[0]] == [("unexplained", 10)]


def test_a_value_below_its_own_noise_is_not_counted():
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(5))

    def f(v):  # in float32 the offset leaves four digits of what the norm sees
        return torch.nn.functional.layer_norm(1e4 + 0.01 * v.flatten(1) @ weight.T.to(v), (16,))

    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    result = jacobian_spectrum(f, x)
    assert int(result.rank) <= 15
    assert float(result.rank_threshold) >= float(result.error_bound[0, -1])
    assert jacobian_spectrum(f, x.double()).rank.tolist() == [15]


# precision inside a function, and noise in few directions


class Hidden(torch.autograd.Function):
    """A product in float32 that its types do not show, with second order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs, weight):
        return (inputs.float() @ weight.float().T).double()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return Hidden.apply(grad, ctx.saved_tensors[0].T), None


def one_noisy(x, cast, place=3):
    """One output passes through large numbers in another precision."""
    z = smooth_mlp()(x)
    noisy = ((1e3 + z[:, place]).to(cast).square() / 2e3).double()
    return torch.cat([z[:, :place], noisy[:, None], z[:, place + 1 :]], dim=1)


ROTATION = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
MIXED = 10.0 ** torch.linspace(-10, 10, DIM, dtype=torch.float64)
WIDE = torch.randn(DIM, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
INSIDE = {
    "input": (lambda x, t: smooth_mlp()(x.to(t)).double()),
    "output": (lambda x, t: smooth_mlp()(x).to(t).double()),
    "softmax": (lambda x, t: torch.softmax(smooth_mlp()(x), dim=1, dtype=t).double()),
    "one output": one_noisy,
    "rotated": (lambda x, t: one_noisy(x, t) @ ROTATION),
    "mixed scales": (lambda x, t: smooth_mlp()(x.to(t)).double() * MIXED),
    "more outputs than pixels": (lambda x, t: smooth_mlp()(x.to(t)).double() @ WIDE),
    "one number": (lambda x, t: smooth_mlp()(x.to(t)).double()[:, :1]),
    "deficient": (lambda x, t: smooth_mlp()(x.to(t)).double()[:, [0, 1, 2, 0, 1, 2]]),
    "hidden": (lambda x, t: Hidden.apply(x.flatten(1), smooth_mlp().W1) if t == torch.float32
               else x.flatten(1) @ smooth_mlp().W1.T),
}  # fmt: skip


@pytest.mark.parametrize("k", [None, 1])
@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INSIDE)
def test_bounds_hold_whatever_the_function_computes_in(name, cast, k):
    f, x = INSIDE[name], images(1, seed=8, dtype=torch.float64)
    result = jacobian_spectrum(lambda v: f(v, cast), x, k=k, method="auto" if k is None else "golub_kahan")
    exact = torch.linalg.svdvals(torch.func.jacrev(lambda v: f(v, torch.float64)[0])(x).flatten(1))
    count = result.singular_values.shape[1]
    assert bool(((result.singular_values[0] - exact[:count]).abs() <= result.error_bound[0]).all())
    assert float(result.error_bound[0, 0]) < 10 * max(1e-4, torch.finfo(cast).eps) * float(exact[0])
    if k is None:
        assert int(result.rank) == int((result.singular_values > result.error_bound).sum())
        assert int(result.rank) <= int((exact > 1e-14 * exact[0]).sum())
        assert int(result.nullity) == x.numel() - int(result.rank)


def test_bounds_of_float64_stay_small():
    for f in (smooth_mlp(), linear(), lambda x: torch.softmax(smooth_mlp()(x), dim=1)):
        result = jacobian_spectrum(f, images(1, dtype=torch.float64))
        assert float(result.error_bound.max()) < 1e-12 * float(result.sigma_max)


@pytest.mark.parametrize("least", [0.0101, 0.0099, 0.5])
def test_zeros_of_a_matrix_are_within_their_rounding(least):
    """Eigenvectors of JJᵀ mix values just above a hundredth of σ₁ into the zeros."""
    sigma = torch.cat([torch.linspace(1, least, 30), torch.zeros(24)]).double()
    result = jacobian_spectrum(lambda x: x.flatten(1) @ graded(sigma, 192).T, images(1, dtype=torch.float64))
    assert bool(((result.singular_values[0] - sigma).abs() <= result.error_bound[0]).all())
    assert result.rank.tolist() == [30]
