"""Computations side by side: the numbers of each alone, fewer calls of f, and memory that runs out."""

from __future__ import annotations

import pytest
import torch
from cases import EIGHT, images, linear, smooth_mlp

from hf_equiv.conditions import Function
from hf_equiv.geometry import levelset, spectrum
from hf_equiv.geometry.levelset import trace_level_set
from hf_equiv.geometry.spectrum import jacobian_spectrum
from hf_equiv.models.encoder import Encoder
from hf_equiv.passes import alone, at_once, look, side_by_side
from hf_equiv.results import Status


class Watched:
    """An encoder that notes the number of images of its calls, and has memory for the derivatives of a few."""

    def __init__(self, f, room: int = 1000) -> None:
        self.f, self.room, self.calls = f, room, []
        self.admitted = {}  # so that the checks of f are made once

    def __call__(self, x):
        if x.requires_grad and len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.calls.append(len(x))
        return self.f(x)


@pytest.fixture
def grouped(monkeypatch):
    """Set the number of images side by side, which on a CPU is one."""

    def group(count: int) -> None:
        for verb in (levelset, spectrum):
            monkeypatch.setattr(verb, "at_once", lambda *_: count)

    return group


def walk(f, x, heading: str, num_steps: int = 4):
    other = {"toward": {"target": x.flip(0)}, "nearest": {"origin": x.flip(0)}}.get(heading, {})
    return trace_level_set(f, x, heading=heading, step=0.4, num_steps=num_steps, keep_points=True, **other)


VERBS = {heading: lambda f, x, heading=heading: walk(f, x, heading) for heading in ("random", "toward", "nearest")}
VERBS |= {"full": jacobian_spectrum, "top": lambda f, x: jacobian_spectrum(f, x, k=2, method="golub_kahan")}


def numbers(result) -> list:
    """All numbers of a result but its times."""
    if hasattr(result, "paths"):
        points = [(p.drift, p.l2, p.stationarity, p.num_evals) for path in result.paths for p in path]
        return [result.images.tolist(), points, result.status, result.num_jacobians.tolist()]
    return [result.singular_values.tolist(), result.error_bound.tolist(), result.num_evals.tolist(), result.status]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
def test_the_bits_are_those_of_an_image_alone(case, verb, grouped):
    found = []
    for count in (1, 3):
        grouped(count)
        found.append(numbers(VERBS[verb](case.f, images(3, seed=3))))
    assert found[0] == found[1]


@pytest.mark.parametrize("verb", ["random", "top"])
def test_the_bits_of_an_encoder_are_those_of_an_image_alone(verb, grouped):
    f = Encoder.from_pretrained("builtin-64", device="cpu")
    x = 0.3 + 0.4 * torch.rand(2, *f.input_shape, generator=torch.Generator().manual_seed(0))
    found = []
    for count in (1, 2):
        grouped(count)
        found.append(numbers(walk(f, x, verb, num_steps=1) if verb == "random" else VERBS[verb](f, x)))
    assert found[0] == found[1]


@pytest.mark.parametrize("verb", VERBS)
def test_images_share_the_passes(verb, grouped):
    calls = []
    for count in (1, 8):
        f = Watched(smooth_mlp())
        grouped(count)
        VERBS[verb](f, images(1))
        f.calls.clear()
        VERBS[verb](f, images(8, seed=3))
        calls.append(len(f.calls))
    assert calls[1] < calls[0] / 2.5


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("room", [1, 3])
def test_a_pass_without_memory_is_halved(verb, room, grouped):
    x = images(5, seed=3)
    whole = numbers(VERBS[verb](smooth_mlp(), x))
    grouped(5)
    f = Watched(smooth_mlp(), room)
    VERBS[verb](f, images(1))
    f.calls.clear()
    halved = numbers(VERBS[verb](f, x))
    assert max(f.calls) == room
    assert halved[0] == whole[0]


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(("images_held", "most", "count"), [(3, 32, 3), (2.9, 32, 2), (3, 2, 2), (0.5, 32, 1)])
def test_images_side_by_side_have_jacobians_within_the_memory(images_held, most, count):
    x, memory = images(5), int(images_held * 12 * 192 * 4)
    assert at_once(linear(), x.as_subclass(OnGpu), most, memory) == count
    assert at_once(linear(), x, most, memory) == 1


def test_an_image_that_fails_alone_leaves_the_others(grouped):
    x = images(3, seed=3)

    def f(v):
        if v.requires_grad and bool((v[:, 0, 0, 0] > 0.7).any()):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return smooth_mlp()(v)

    x[:, 0, 0, 0], x[1, 0, 0, 0] = 0.3, 0.8
    grouped(3)
    found = walk(f, x, "random")
    assert found.status == (Status.COMPLETED, Status.ERROR, Status.COMPLETED)
    assert (len(found.paths[0]), found.paths[1]) == (5, ())
    for verb in VERBS.values():
        with pytest.raises(torch.OutOfMemoryError):
            verb(f, x[1:2])


def test_memory_that_a_product_lacks_is_that_of_the_images_that_ask(monkeypatch):
    f, x = Function(smooth_mlp()), images(3, seed=3)
    dense = [smooth_mlp().jacobian(image) for image in x.double()]
    real = torch.autograd.grad

    def full(outputs, inputs, *rest, **options):
        if len(inputs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(outputs, inputs, *rest, **options)

    def work(image, asks):
        at = yield from look(f, image)
        return (yield from at.rmv(torch.ones(1, 12))) if asks else None

    monkeypatch.setattr(torch.autograd, "grad", full)
    found = [row for row, _ in side_by_side([work(image, b > 0) for b, image in enumerate(x)])]
    assert found[0] is None
    for row, J in zip(found[1:], dense[1:], strict=True):
        torch.testing.assert_close(row.flatten().double(), J.sum(0), rtol=0, atol=1e-5)


def test_a_product_with_an_earlier_sight_costs_its_forward_pass_again():
    f, x = Watched(smooth_mlp()), images(2, seed=3)

    def work():
        first = yield from look(f, x[0])
        second = yield from look(f, x[1])
        rows = []
        for at in (second, first, first):
            rows.append((yield from at.rmv(torch.eye(12)[:1])))
        return first, second, rows

    first, second, rows = alone(work())
    assert torch.equal(rows[1], rows[2])
    assert f.calls == [1, 1, 1]
    assert (first.num_evals, second.num_evals) == (pytest.approx(2), pytest.approx(1))


def test_an_error_of_f_ends_the_computation():
    def f(v):
        raise ValueError("no such image")

    with pytest.raises(ValueError, match="no such image"):
        alone(look(f, images(1)[0]))
