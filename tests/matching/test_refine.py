"""`refine_8bit`: what it returns is 8-bit, in the ball, and has the error it states after a PNG round trip."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import (
    DIM,
    SHAPE,
    Linear,
    Wide,
    images,
    linear,
    quadratic,
    rank_deficient,
    smooth_mlp,
    unreachable,
    wide_images,
)
from PIL import Image
from torch import Tensor

from hf_equiv.conditions import admit
from hf_equiv.data.sources import load_images
from hf_equiv.jacobian import jacobian_cost
from hf_equiv.matching import refine
from hf_equiv.matching.lattice import WORKSPACE, Lattice
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.matching.steps import left_geometry
from hf_equiv.memory import MEMORY
from hf_equiv.models.encoder import Encoder
from hf_equiv.results import MatchResult, Progress, Status

every_f = pytest.mark.parametrize("f", [linear(), quadratic(), smooth_mlp()], ids=lambda f: type(f).__name__)


def levels(x: Tensor) -> Tensor:
    """255·x, which must be whole numbers but for the rounding of k/255."""
    wide = x.double() * 255
    assert float((wide - wide.round()).abs().max()) <= 255 * torch.finfo(x.dtype).eps
    assert torch.equal((wide.round() / 255).to(x.dtype), x)
    assert float(wide.round().min()) >= 0
    assert float(wide.round().max()) <= 255
    return wide.round()


def through_png(x: Tensor) -> Tensor:
    """(3, H, W) written as a PNG by Pillow and read back, float64."""
    file = io.BytesIO()
    Image.fromarray((x.double() * 255).round().byte().permute(1, 2, 0).numpy()).save(file, format="PNG")
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file.getvalue())))).permute(2, 0, 1).double() / 255


def error64(f, x: Tensor, z: Tensor) -> Tensor:
    return (f(x.double()) - z.double()).norm(dim=1) / z.double().norm(dim=1)


def check_statement(f, result: MatchResult, z: Tensor, noise: float = 2e-6) -> None:
    """Grid values, and the stated error found again in the files."""
    levels(result.images)
    files = torch.stack([through_png(x) for x in result.images])
    torch.testing.assert_close(result.errors, error64(f, files, z), rtol=0, atol=noise)
    exact = (f(files.to(result.images)).double() - z.double()).norm(dim=1) / z.double().norm(dim=1)
    torch.testing.assert_close(result.errors, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_converges_and_states_the_error_of_the_file(dtype):
    f, x, z = Wide(), wide_images(2, 1, dtype), Wide()(wide_images(2, 2, dtype))
    match = match_embedding(f, x, z)
    exact = refine_8bit(f, match.images, z, rtol=5e-5)
    assert exact.converged
    assert bool((exact.errors <= 5e-5).all())
    check_statement(f, exact, z, 2e-6 if dtype == torch.float32 else 1e-14)
    rounded = (match.images.double() * 255).round() / 255
    assert bool((error64(f, rounded, z) > 10 * exact.errors).all()), "rounding alone would have done"
    assert float((exact.images - match.images).abs().max()) <= 3.5001 / 255, "three steps, and half a one for rounding"
    assert exact.images.dtype == dtype
    assert not exact.images.requires_grad


@every_f
def test_states_the_error_of_the_file_when_it_ends_early(f):
    x, z = images(2, seed=1), f(images(2, seed=2))
    match = match_embedding(f, x, z, rtol=1e-3)
    exact = refine_8bit(f, match.images, z, max_evals=12)
    check_statement(f, exact, z)
    rounded = (match.images.double() * 255).round() / 255
    assert bool((exact.errors < error64(f, rounded, z)).all())


@pytest.mark.parametrize("radius", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linf_ball_of_whole_levels_is_used_whole(radius, dtype):
    source = ((wide_images(1, 3).double() * 255).round() / 255).to(dtype)
    z = 40 * torch.ones(1, 6)  # far out of reach: pixels run to the ends of the ball
    match = match_embedding(Wide(), source, z, radius=radius / 255, max_evals=30, raise_on_failure=False)
    exact = refine_8bit(Wide(), match.images, z, source=source, radius=radius / 255, max_evals=20)
    moved = (levels(exact.images) - levels(source)).abs()
    assert float(moved.max()) == radius
    check_statement(Wide(), exact, z, 1e-6)


@pytest.mark.parametrize("radius", [8 / 255, 4.5 / 255, 1 / 255, 0.02])
def test_linf_ball_about_a_source_off_the_grid(radius):
    source = wide_images(1, 4)
    z = Wide()(wide_images(1, 5))
    match = match_embedding(Wide(), source, z, radius=radius, max_evals=100, raise_on_failure=False)
    exact = refine_8bit(Wide(), match.images, z, source=source, radius=radius, max_evals=20)
    for pixels in (levels(exact.images) / 255, exact.images.double()):  # of the file, and as returned
        assert float((pixels - source.double()).abs().max()) <= radius
    check_statement(Wide(), exact, z)


@pytest.mark.parametrize("on_grid", [True, False])
@pytest.mark.parametrize("radius", [0.3, 0.1, 10 / 255])
def test_l2_ball(radius, on_grid):
    source = wide_images(1, 6)
    if on_grid:
        source = ((source.double() * 255).round() / 255).float()
    else:
        radius += 0.06  # rounding the source itself takes about √(N/12)/255 = 0.063
    z = Wide()(wide_images(1, 7))
    match = match_embedding(Wide(), source, z, radius=radius, norm="l2", max_evals=60, raise_on_failure=False)
    exact = refine_8bit(Wide(), match.images, z, source=source, radius=radius, norm="l2", max_evals=20)
    assert exact.status[0] is not Status.INFEASIBLE
    centre = source.double() if not on_grid else levels(source) / 255
    distance = float((levels(exact.images) / 255 - centre).norm())
    assert distance <= radius * (1 + 1e-14 if on_grid else 1)  # whole steps: the radius may be used up
    assert distance >= 0.5 * radius
    check_statement(Wide(), exact, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l2_ball_of_a_source_off_the_grid_holds_the_floats(dtype):
    def f(v: Tensor) -> Tensor:
        return linear()(v.float())

    for seed in range(20):
        source, target = images(1, seed=200 + seed).to(dtype), f(images(1, seed=300 + seed))
        start = (source.double() + 0.05 * torch.randn(source.shape, generator=seeded(seed))).clamp(0, 1).to(dtype)
        exact = refine_8bit(f, start, target, source=source, radius=0.3, norm="l2", rtol=1e-3, max_evals=20)
        assert float((exact.images.double() - source.double()).norm()) <= 0.3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ball_smaller_than_a_level_holds_a_source_on_the_grid_alone(norm):
    source = ((images(1, seed=8).double() * 255).round() / 255).float()
    exact = refine_8bit(
        linear(), (source + 0.2).clamp(0, 1), linear()(images(1, seed=9)), source=source, radius=1e-4, norm=norm
    )
    assert torch.equal(exact.images, source)
    assert exact.status == (Status.STALLED,)
    check_statement(linear(), exact, linear()(images(1, seed=9)))


def test_held_pixels_keep_their_level():
    f, x = smooth_mlp(), images(2)
    held = torch.zeros_like(x, dtype=torch.bool)
    held[0, :, :2] = True
    z = f(x)
    plain, found = refine_8bit(f, x, z, rtol=1e-3), refine_8bit(f, x, z, held=held, rtol=1e-3)
    assert torch.equal(found.images[held], ((255 * x).round() / 255)[held])
    assert not torch.equal(plain.images[held], found.images[held])
    assert torch.equal(plain.images[1], found.images[1])
    assert float(found.errors.max()) < 0.2 * float(plain.traces[0][0][1])
    with pytest.raises(ValueError, match="`held` must be a bool tensor of the shape of `images`"):
        refine_8bit(f, x, z, held=held[:1])


def test_an_image_much_better_than_rounding_is_refined():
    f, x, z = smooth_mlp(), images(1, seed=42), smooth_mlp()(images(1, seed=43))
    exact = refine_8bit(f, match_embedding(f, x, z).images, z, source=x)
    assert float(exact.errors) > 1e-5
    assert float(exact.errors) <= 0.5 * exact.traces[0][0][1]
    assert exact.status == (Status.REFINED,)
    assert not exact.converged


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.3 / 255), ("l2", 0.3 * math.sqrt(192) / 255)])
def test_infeasible(norm, radius):
    source = (torch.full((2, *SHAPE), 100.5) / 255).requires_grad_(True)
    exact = refine_8bit(linear(), source, linear()(images(2)).detach(), source=source, radius=radius, norm=norm)
    assert exact.status == (Status.INFEASIBLE, Status.INFEASIBLE)
    assert not exact.converged
    assert bool(torch.isinf(exact.errors).all())
    assert not exact.images.requires_grad


def test_one_infeasible_image_spoils_no_other():
    source = ((images(2, seed=10).double() * 255).round() / 255).float()
    source[1] = 100.5 / 255
    z = linear()(images(2, seed=11))
    both = refine_8bit(linear(), source, z, source=source, radius=0.4 / 255)
    assert both.status == (Status.STALLED, Status.INFEASIBLE)
    assert torch.equal(both.images[0], source[0])


def test_images_outside_the_ball_are_brought_in():
    source = ((images(1, seed=12).double() * 255).round() / 255).float()
    far, z = images(1, seed=13), linear()(images(1, seed=14))
    for norm, radius in (("linf", 3 / 255), ("l2", 0.1)):
        exact = refine_8bit(linear(), far, z, source=source, radius=radius, norm=norm)
        gap = (levels(exact.images) - levels(source)) / 255
        assert float(gap.abs().max() if norm == "linf" else gap.norm()) <= radius * (1 + 1e-9)


# Specks


@dataclass(frozen=True)
class Uneven:
    """`Wide` with a hundred pixels that it sees thirty times as well as the others."""

    inner: Wide

    def __call__(self, x: Tensor) -> Tensor:
        weight = torch.ones(x[0].numel(), dtype=x.dtype)
        weight[::30] = 30
        return self.inner(0.5 + (x - 0.5) * weight.view(x.shape[1:]) / 10)


def test_sensitive_pixels_are_not_heaped_up():
    f, x = Uneven(Wide()), wide_images(1, 40)
    z = f((x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(41))).clamp(0, 1))
    exact = refine_8bit(f, x, z, rtol=1e-4)
    assert exact.converged
    assert float((levels(exact.images) - (x.double() * 255).round()).abs().flatten()[::30].max()) <= 3


def test_a_start_far_from_a_match_may_go_further():
    x, z = images(1, seed=42), linear()(images(1, seed=43))
    exact = refine_8bit(linear(), x, z, max_evals=20)
    assert float((levels(exact.images) - (x.double() * 255).round()).abs().max()) > 3
    assert float(exact.errors) < 2e-2


# Units and autocast


@pytest.mark.parametrize("power", [-66, 66])
def test_the_unit_of_the_embedding_is_free(power):
    x, z = wide_images(1, 44), Wide()(wide_images(1, 45))
    match = match_embedding(Wide(), x, z, rtol=1e-4)
    plain = refine_8bit(Wide(), match.images, z, rtol=1e-4)
    scaled = refine_8bit(lambda v: Wide()(v) * 2.0**power, match.images, z * 2.0**power, rtol=1e-4)
    assert plain.converged
    assert torch.equal(plain.images, scaled.images)
    assert torch.equal(plain.errors, scaled.errors)
    assert plain.traces == scaled.traces


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_left_geometry_at_any_scale(scale):
    for J in (smooth_mlp().jacobian(image).float() for image in images(2)):
        plain, scaled = left_geometry(J), left_geometry(J * scale)
        torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-6)
        assert round(float(scaled[0].trace()), 6) == DIM


def test_autocast_around_the_call_changes_nothing_but_f():
    def f(v: Tensor) -> Tensor:
        return Wide()(v.double()).to(v)  # autocast leaves float64 alone

    x, z = wide_images(1, 46), f(wide_images(1, 47))
    match = match_embedding(f, x, z, rtol=1e-4)
    plain = refine_8bit(f, match.images, z, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = refine_8bit(f, match.images, z, rtol=1e-4)
    assert plain.converged
    assert same_result(plain, cast)


def test_inference_mode_around_the_call():
    x, z = wide_images(1, 48), Wide()(wide_images(1, 49))
    plain = refine_8bit(Wide(), x, z, max_evals=20)
    with torch.inference_mode():
        assert same_result(plain, refine_8bit(Wide(), x.clone(), z.clone(), max_evals=20))


def test_f_may_normalise_in_place():
    x, z = wide_images(1, 48), Wide()(2 * wide_images(1, 49) - 1)
    kept = x.clone()
    found = refine_8bit(lambda v: Wide()(v.mul_(2).sub_(1)), x, z, max_evals=20)
    assert same_result(found, refine_8bit(lambda v: Wide()(2 * v - 1), x, z, max_evals=20))
    assert torch.equal(x, kept)


# Rank


def test_rank_deficient_jacobian():
    f, x = rank_deficient(), images(2, seed=15)
    reachable = refine_8bit(f, x, f(images(2, seed=16)), max_evals=12)
    check_statement(f, reachable, f(images(2, seed=16)))
    assert bool((reachable.errors < 2e-2).all())
    x, z = unreachable(1)
    lost = refine_8bit(f, x, z)
    assert lost.status == (Status.STALLED,)
    assert bool((lost.errors >= 0.1 * (1 - 1e-5)).all())
    assert bool((lost.errors <= 0.102).all())


@pytest.mark.parametrize("copies", [3, 17])
def test_most_singular_values_zero_and_more_outputs_than_pixels(copies):
    f = Linear(linear().A.repeat(copies, 1), linear().b.repeat(copies))
    x, z = images(1, seed=17), f(images(1, seed=18))
    exact = refine_8bit(f, x, z, max_evals=int(jacobian_cost(len(f.A))) + 4)
    single = refine_8bit(linear(), x, linear()(images(1, seed=18)), max_evals=int(jacobian_cost(DIM)) + 4)
    check_statement(f, exact, z)
    assert float(exact.errors) <= 2 * float(single.errors)


def test_one_output():
    f = Linear(linear().A[:1], linear().b[:1])
    exact = refine_8bit(f, images(1), f(images(1, seed=1)))
    assert exact.converged
    check_statement(f, exact, f(images(1, seed=1)))


def test_no_gradient():
    exact = refine_8bit(lambda v: v.flatten(1)[:, :4] * 0 + 1, images(1), torch.full((1, 4), 2.0))
    assert exact.status == (Status.STALLED,)
    assert float(exact.errors) == 0.5


# Counting


@pytest.mark.parametrize("max_evals", [1, 9, 14])
@every_f
def test_every_pass_is_counted(f, max_evals, monkeypatch):
    spent = {"forward": 0, "cotangent": 0}
    real = torch.autograd.grad

    def grad(outputs, inputs, cotangents, **options):
        spent["cotangent"] += cotangents.shape[:-1].numel()
        return real(outputs, inputs, cotangents, **options)

    def counted(v: Tensor) -> Tensor:
        spent["forward"] += v.shape[0]
        return f(v)

    x, z = images(2, seed=20), f(images(2, seed=21))
    tried = admit(counted, x, noise=True)
    spent["forward"] = 0
    monkeypatch.setattr(torch.autograd, "grad", grad)
    exact = refine_8bit(tried, x, z, max_evals=max_evals)
    by_hand = (spent["forward"] + 2 * spent["cotangent"]) / 3
    assert float(exact.num_evals.sum()) == pytest.approx(by_hand, rel=1e-12)
    assert bool((exact.num_evals <= max_evals + 1e-9).all())
    assert spent["cotangent"] % DIM == 0


def test_budget_too_small_for_a_jacobian_gives_the_rounded_image():
    x, z = images(2, seed=22), linear()(images(2, seed=23))
    exact = refine_8bit(linear(), x, z, max_evals=8)  # (1 + 2·12)/3 + 2/3 would be needed
    assert exact.status == (Status.MAX_EVALS, Status.MAX_EVALS)
    assert torch.equal(levels(exact.images), (x.double() * 255).round())
    assert exact.num_evals.tolist() == [1 / 3, 1 / 3]
    check_statement(linear(), exact, z)


def test_images_on_the_grid_that_match_cost_one_forward_pass():
    x = ((images(1, seed=24).double() * 255).round() / 255).float()
    exact = refine_8bit(linear(), x, linear()(x))
    assert torch.equal(exact.images, x)
    assert (exact.status, exact.num_evals.tolist()) == ((Status.CONVERGED,), [1 / 3])


def test_traces():
    x, z = wide_images(2, 25), Wide()(wide_images(2, 26))
    exact = refine_8bit(Wide(), x, z, rtol=1e-3)
    for i, trace in enumerate(exact.traces):
        evals, errors = zip(*trace, strict=True)
        assert list(evals) == sorted(set(evals))
        assert list(errors) == sorted(set(errors), reverse=True)
        assert errors[-1] == float(exact.errors[i])
        assert evals[-1] <= float(exact.num_evals[i])


def same_result(a: MatchResult, b: MatchResult) -> bool:
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "errors", "num_evals"))
    return equal and a.status == b.status and a.traces == b.traces


def test_batch_equals_one_by_one_and_layout_does_not_matter():
    x, y, options = images(2, seed=27), images(2, seed=28), {"max_evals": 12}
    together = refine_8bit(smooth_mlp(), x, y, **options)
    assert same_result(together, refine_8bit(smooth_mlp(), x, smooth_mlp()(y), **options))
    assert same_result(together, refine_8bit(smooth_mlp(), x.to(memory_format=torch.channels_last), y, **options))
    with torch.no_grad():
        assert same_result(together, refine_8bit(smooth_mlp(), x, y, **options))
    for i in range(2):
        alone = refine_8bit(smooth_mlp(), x[i : i + 1], y[i : i + 1], **options)
        assert torch.equal(alone.images[0], together.images[i])
        assert (alone.status[0], alone.traces[0]) == (together.status[i], together.traces[i])


def test_an_image_is_the_same_beside_others_that_end_early():
    f, source, z = Wide(), wide_images(4, 50), Wide()(wide_images(4, 51))
    source[1] = 100.5 / 255  # no level in its ball
    source[2] = (source[2] * 255).round() / 255
    z[2] = f(source[2:3])[0]  # matches already
    ball = {"source": source, "radius": 0.4 / 255, "max_evals": 20}
    together = refine_8bit(f, source, z, **ball)
    assert together.status[1:3] == (Status.INFEASIBLE, Status.CONVERGED)
    for i in (0, 3):
        single = refine_8bit(f, source[i : i + 1], z[i : i + 1], **ball | {"source": source[i : i + 1]})
        assert torch.equal(together.images[i], single.images[0])
        assert (together.status[i], together.traces[i]) == (single.status[0], single.traces[0])


@pytest.mark.parametrize(("memory", "most"), [(MEMORY, 3), (3 * WORKSPACE - 1, 2), (1, 1)])
def test_images_are_refined_together_as_memory_allows(monkeypatch, memory, most):
    f, source, z = Wide(), wide_images(3, 50), Wide()(wide_images(3, 51))
    planned, plan, plain = [], refine.plan_moves, refine_8bit(Wide(), source, z, max_evals=20)

    def watched(matrices, *rest):
        planned.append(len(matrices))
        return plan(matrices, *rest)

    monkeypatch.setattr(refine, "plan_moves", watched)
    found = refine_8bit(f, source, z, max_evals=20, memory=memory)
    assert max(planned) == most
    assert torch.equal(found.images, plain.images)
    assert found.traces == plain.traces


# Failures


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_an_error_that_is_no_number_has_not_converged(bad):
    def f(v: Tensor) -> Tensor:
        if bad is None and float(v.detach().flatten(1).mean(dim=1).max()) > 0.9:
            raise torch.OutOfMemoryError
        return torch.stack([linear()(x[None])[0] + (bad if float(x.detach().mean()) > 0.9 else 0.0) for x in v])

    x = images(2, seed=30)
    x[0] = 0.99
    z = linear()(images(2, seed=31))
    exact = refine_8bit(f, x, z)
    assert exact.status[0] is Status.ERROR
    assert not exact.converged
    alone = refine_8bit(linear(), x[1:], z[1:])
    assert torch.equal(exact.images[1], alone.images[0])


def test_nan_in_the_jacobian_is_an_error_of_that_image():
    def f(v: Tensor) -> Tensor:
        return linear()(v) + (v - v.detach()).square().sum(dim=(1, 2, 3)).sqrt()[:, None]

    exact = refine_8bit(f, images(1), linear()(images(1, seed=1)))
    assert exact.status == (Status.ERROR,)
    assert float(exact.num_evals) == pytest.approx((1 + 1 + 2 * 12 + 2) / 3)  # the Jacobian, and both of its points
    levels(exact.images)


def test_progress():
    seen: list[Progress] = []
    x, z = wide_images(2, 32), Wide()(wide_images(2, 33))
    exact = refine_8bit(Wide(), x, z, rtol=1e-3, progress=seen.append)
    assert seen[-1].active.tolist()[0] is False
    assert torch.equal(seen[-1].images, exact.images)
    assert torch.equal(seen[-1].errors, exact.errors)
    evals = [float(p.num_evals.sum()) for p in seen]
    assert evals == sorted(set(evals))
    calls = []

    def hook(progress: Progress) -> None:
        calls.append(progress)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine_8bit(Wide(), x, z, progress=hook)
    assert len(calls) == 1


GOOD, Z = images(2), linear()(images(2, seed=1))
# ruff: noqa: E501
BAD = {
    "images no tensor": ("x", Z, {}, TypeError, "`images` must be a torch.Tensor; got str."),
    "images uint8": (GOOD.byte(), Z, {}, TypeError, "`images` must be a float tensor; got dtype torch.uint8"),
    "images above 1": (GOOD + 1, Z, {}, ValueError, "`images` must lie in [0, 1]"),
    "images of no box": (GOOD - 1, Z, {}, ValueError, "`images` must lie in [0, 1]"),
    "no bounds": (GOOD, Z, {"bounds": None}, ValueError, "`bounds` must be (0, 1) for 8-bit images k/255; got None."),
    "wide bounds": (GOOD, Z, {"bounds": (-1, 1)}, ValueError, "`bounds` must be (0, 1) for 8-bit images k/255; got (-1, 1)."),
    "radius alone": (GOOD, Z, {"radius": 0.1}, ValueError, "`source` must be given with `radius`; got None."),
    "source shape": (GOOD, Z, {"source": GOOD[:1], "radius": 0.1}, ValueError, "`source` must have the shape of `images`"),
    "source above 1": (GOOD, Z, {"source": GOOD + 1}, ValueError, "`source` must lie in [0, 1]"),
    "radius 0": (GOOD, Z, {"source": GOOD, "radius": 0.0}, ValueError, "`radius` must lie in (0, 1]"),
    "norm": (GOOD, Z, {"norm": "l0"}, ValueError, "`norm` must be one of linf, l2"),
    "rtol": (GOOD, Z, {"rtol": math.nan}, ValueError, "`rtol` must be finite and above 0"),
    "max_evals": (GOOD, Z, {"max_evals": 0}, ValueError, "`max_evals` must be at least 1"),
    "target batch": (GOOD, torch.cat([Z, Z]), {}, ValueError, "`target` must have batch size 1 or 2; got 4."),
    "target shape": (GOOD, GOOD[..., :4] / 2, {}, ValueError, "`target` must have the image shape of `images`"),
    "target dimension": (GOOD, Z[:, :5], {}, ValueError, "`target` embeddings must have the encoder's dimension 12; got 5."),
    "target dimension 1": (GOOD, Z[:, :1], {}, ValueError, "`target` embeddings must have the encoder's dimension 12; got 1."),
    "target zero": (GOOD, Z * 0, {}, ValueError, "`target` embeddings must have non-zero norm"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case):
    given, target, options, kind, message = case
    with pytest.raises(kind, match=re.escape(message)):
        refine_8bit(lambda v: linear()(v) if v.shape[1:] == SHAPE else v.mean((2, 3)), given, target, **options)


@pytest.mark.parametrize("f", [lambda v: linear()(v)[:, None], lambda v: linear()(v)[:, :1]], ids=["3-D", "D = 1"])
def test_encoder_of_another_output(f):
    with pytest.raises(ValueError, match=r"`f` must map|`target` embeddings must have the encoder's dimension"):
        refine_8bit(f, GOOD, Z)


def test_encoder_without_gradient():
    with pytest.raises(ValueError, match="`f` must be differentiable"):
        refine_8bit(lambda v: linear()(v.detach()), GOOD, Z)


# The lattice


def test_every_level_survives_every_float_dtype():
    for dtype in (torch.float32, torch.float64):
        ramp = (torch.arange(256).double() / 255).to(dtype).view(1, 16, 16)
        assert torch.equal(Lattice.around(ramp, None, None, "linf").round(ramp)[0], torch.arange(256.0).double()[None])
        for k in (1, 8, 100):
            ball = Lattice.around(ramp, ramp, k / 255, "linf")
            assert torch.equal(ball.lower[0], (torch.arange(256.0) - k).clamp_min(0).double())
            assert torch.equal(ball.upper[0], (torch.arange(256.0) + k).clamp_max(255).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [8 / 255, 4.5 / 255, 1 / 255, 0.3 / 255, 0.02, 0.5])
def test_linf_lattice_about_a_centre_off_the_grid_is_the_exact_ball(radius, dtype):
    center = torch.rand(20_000, generator=torch.Generator().manual_seed(48), dtype=torch.float64)
    grid = torch.arange(256.0).double() / 255
    center[: 2 * 256] = torch.cat([grid + radius, grid - radius]).clamp(0, 1)  # a level on the edge of the ball
    center = center.to(dtype)
    lattice = Lattice.around(center[None], center[None], radius, "linf")
    off = (center.double() * 255).round().div(255).to(dtype) != center
    lower, upper = lattice.lower[0], lattice.upper[0]
    held = lower <= upper
    assert bool(off.sum() > 10_000)
    for end, out in ((lower, -1), (upper, 1)):
        for pixels in (end / 255, (end / 255).to(dtype).double()):
            assert bool(((pixels - center.double()).abs() <= radius)[off & held].all())
        beyond = (end + out) / 255
        assert bool((((beyond - center.double()).abs() > radius - 1e-7) | (beyond < 0) | (beyond > 1)).all())


def test_l2_rounding_stays_in_the_ball_near_the_image():
    center = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(34), dtype=torch.float64)
    offset = torch.randn((5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = (center + 0.1 * offset / offset.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
    rounded, inside = Lattice.around(images, center.expand(5, -1, -1, -1), 0.1, "l2").round(images)
    assert bool(inside.all())
    assert float((rounded / 255 - center.flatten()).norm(dim=1).max()) <= 0.1 * (1 + 1e-9)
    assert float((rounded - images.flatten(1) * 255).abs().max()) <= 1.5


# A trained checkpoint


def test_builtin_cat_as_coffee():
    encoder = Encoder.from_pretrained("builtin-64")
    photos = load_images("builtin")
    source, target = (encoder.preprocess(photos[i].image) for i in (0, 1))
    match = match_embedding(encoder, source, target, rtol=1e-4)
    exact = refine_8bit(encoder, match.images, target, rtol=8e-5)
    file = through_png(exact.images[0])[None]
    double = encoder.double()
    z = double(target.double())
    assert float((double(file) - z).norm() / z.norm()) <= 1e-4
    assert float(exact.errors) <= 1e-4
    assert float((double(source.double()) - z).norm() / z.norm()) > 0.5
    # What the match itself changed is the solver's; rounding and refining add two least significant bits squared.
    assert float((file - match.images.double()).square().mean()) < 2 / 255**2
    assert float((file - source.double()).square().mean()) < 2e-3  # PSNR above 27 dB
