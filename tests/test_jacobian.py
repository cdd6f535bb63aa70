"""The Jacobian against closed forms and autograd's own, whatever the number of cotangents per pass."""

from __future__ import annotations

import pytest
import torch
from cases import DIM, EIGHT, images, linear, smooth_mlp

from hf_equiv import jacobian
from hf_equiv.conditions import admit
from hf_equiv.jacobian import Jacobian, jacobian_cost, jacobians, require_forward_mode

every_case = pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)


@every_case
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_closed_form(case, dtype, atol):
    x = images(1, seed=2, dtype=dtype)[0]
    at = Jacobian(case.f, x)
    z, J = at.z, at.as_matrix()
    assert (z.dtype, J.dtype, tuple(J.shape)) == (dtype, dtype, (DIM, x.numel()))
    torch.testing.assert_close(J.double(), case.f.jacobian(x), rtol=0, atol=atol)
    assert torch.equal(z, case.f(x[None])[0])
    assert not z.requires_grad
    assert not J.requires_grad


@every_case
def test_equals_autograd_functional(case):
    x = images(1, seed=3, dtype=torch.float64)
    dense = torch.autograd.functional.jacobian(case.f, x).reshape(DIM, x.numel())
    torch.testing.assert_close(Jacobian(case.f, x[0]).as_matrix(), dense, rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 5, DIM - 1, DIM, DIM + 1, 1000])
def test_every_chunk_size_gives_the_same_rows(chunk, monkeypatch):
    x = images(1, seed=4, dtype=torch.float64)[0]
    passes = []
    real = torch.autograd.grad

    def counting(outputs, inputs, cotangents, **options):
        passes.append(cotangents.shape[0] if options.get("is_grads_batched") else 1)
        return real(outputs, inputs, cotangents, **options)

    tried = admit(smooth_mlp(), x[None])
    monkeypatch.setattr(jacobian.torch.autograd, "grad", counting)
    J = Jacobian(tried, x).as_matrix(chunk)
    assert sum(passes) == DIM
    assert max(passes) <= chunk
    torch.testing.assert_close(J, smooth_mlp().jacobian(x), rtol=0, atol=1e-13)


@every_case
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_several_images_at_once_have_the_jacobian_of_each(case, batch):
    x = images(3, seed=4, dtype=torch.float64)
    each = [Jacobian(case.f, image).as_matrix() for image in x]
    torch.testing.assert_close(jacobians(case.f, x, batch), torch.stack(each), rtol=0, atol=1e-13)


def test_input_that_requires_grad_and_is_not_contiguous():
    x = images(2, seed=5, dtype=torch.float64)
    strided = x.to(memory_format=torch.channels_last).requires_grad_(True)[1]
    assert not strided.is_contiguous()
    J = Jacobian(smooth_mlp(), strided).as_matrix()
    torch.testing.assert_close(J, smooth_mlp().jacobian(x[1]), rtol=0, atol=1e-13)
    assert not J.requires_grad


def test_works_inside_no_grad():
    with torch.no_grad():
        J = Jacobian(linear(), images(1, dtype=torch.float64)[0]).as_matrix()
    torch.testing.assert_close(J, linear().A, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("rows", "wide"), [(1, 192), (300, 192)])
def test_one_row_and_more_rows_than_pixels(rows, wide):
    weight = torch.randn(rows, wide, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    J = Jacobian(lambda v: v.flatten(1) @ weight.T, images(1, dtype=torch.float64)[0])
    assert J.z.shape == (rows,)
    torch.testing.assert_close(J.as_matrix(), weight, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("rows", "cost"), [(1, 1.0), (4, 3.0), (192, 385 / 3)])
def test_cost(rows, cost):
    assert jacobian_cost(rows) == pytest.approx(cost, rel=1e-15)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_unit_of_the_embedding_is_free(scale):
    x = images(1, seed=6)[0]
    J = Jacobian(lambda v: linear()(v) * scale, x).as_matrix()
    torch.testing.assert_close(J.double() / scale, linear().A, rtol=1e-6, atol=1e-9)


def test_autocast_does_not_reach_the_backward_pass():
    weight = linear().A.float()

    def f(v):
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.linear(v.flatten(1), weight)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        J = Jacobian(f, images(1)[0]).as_matrix()
    torch.testing.assert_close(J, weight, rtol=0, atol=1e-6)


def test_a_graph_that_serves_one_backward_pass_is_named():
    class Once(torch.autograd.Function):
        """The identity as `torch.compile` gives it, with buffers that one backward pass uses up."""

        @staticmethod
        def forward(ctx, x):
            ctx.left = 1
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            ctx.left -= 1
            if ctx.left < 0 or len(gradient) != 1:
                raise RuntimeError("donated buffers")
            return gradient

    J = Jacobian(lambda v: linear()(Once.apply(v)), images(1)[0])
    with pytest.raises(RuntimeError, match=r"`f` must allow several backward passes .*donated buffers.*torch.compile"):
        J.as_matrix(1)


def test_forward_mode_is_required_and_finite():
    x = images(1, dtype=torch.float64)
    require_forward_mode(linear(), x, "'linear'")

    class NoForward(torch.autograd.Function):
        @staticmethod
        def forward(v):
            return v.flatten(1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return g

    with pytest.raises(RuntimeError, match=r"must have forward-mode derivatives for this; 'it' does not \("):
        require_forward_mode(NoForward.apply, x, "'it'")
    with pytest.raises(RuntimeError, match=r"the JVP of 'it' must be finite; got NaN"):
        require_forward_mode(lambda v: (v - v).sqrt().flatten(1), x, "'it'")

    def full(v):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        require_forward_mode(full, x, "'it'")


@every_case
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_products_with_j_and_its_transpose(case, batch, dtype, atol):
    x = images(1, seed=6, dtype=dtype)[0]
    J, dense = Jacobian(case.f, x, batch=batch), case.f.jacobian(x)
    generator = torch.Generator().manual_seed(0)
    v, u = (
        torch.randn(4, *x.shape, generator=generator, dtype=dtype),
        torch.randn(4, DIM, generator=generator, dtype=dtype),
    )
    torch.testing.assert_close(J.mv(v).double(), v.flatten(1).double() @ dense.T, rtol=0, atol=atol)
    torch.testing.assert_close(J.rmv(u).flatten(1).double(), u.double() @ dense, rtol=0, atol=atol)
    torch.testing.assert_close(J.as_matrix().double(), dense, rtol=0, atol=atol)
    assert J.num_evals == pytest.approx((1 + 3 + 2 * 4 + 2 * 4 + 2 * DIM) / 3)
    assert (J.shape, J.z.dtype, J.eps) == ((DIM, x.numel()), dtype, torch.finfo(dtype).eps)


class Once(torch.autograd.Function):
    """A square whose backward has no graph: second order fails, and forward mode is there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


def test_forward_mode_where_there_is_no_second_order():
    x = images(1, dtype=torch.float64)[0]
    J = Jacobian(lambda v: Once.apply(v.flatten(1)[:, :3]), x)
    v = torch.ones(1, *x.shape, dtype=torch.float64)
    torch.testing.assert_close(J.mv(v)[0], 2 * x.flatten()[:3])


def test_products_of_the_wrong_shape():
    J = Jacobian(linear(), images(1)[0])
    with pytest.raises(ValueError, match=r"`tangents` must be \(K, 3, 8, 8\); got \(3, 8, 8\)"):
        J.mv(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"`cotangents` must be \(K, 12\); got \(12,\)"):
        J.rmv(torch.zeros(12))
    for wrong in (torch.tensor(0.5), images(1)[0].int()):
        with pytest.raises(ValueError, match=r"`image` must be a float tensor \(\*shape\)"):
            Jacobian(linear(), wrong)
