"""Run the computations of several images side by side, so that they share the passes of f and its derivatives.

A computation is a generator. It yields the next thing that it needs, f at an image (`look`) or products with J there
(`Sight.mv`, `Sight.rmv`), and receives the answer. All wait for one another, products before looks, so that all come to
their next images together, and one pass serves them all. Each gets the numbers that it gets alone, provided that f maps
each image for itself.

Memory: the activations of at most two images for each computation, since a sight closes at the next look; a product
with an earlier sight costs its forward pass again. A product of K vectors takes those of K images. A pass that runs out
of memory is halved, and only a computation that fails alone receives the error.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_equiv.conditions import Function
from hf_equiv.jacobian import CPU_VECTORS, VECTORS, Jacobians, stacked
from hf_equiv.memory import check_memory, halved, images_within, unless_memory

T = TypeVar("T")
Work = Generator["Look | Product", Any, T]


@dataclass(frozen=True, slots=True)
class Look:
    """A request for f at an image (*shape), which a `Sight` answers."""

    f: Function
    image: Tensor


@dataclass(frozen=True, slots=True)
class Product:
    """A request for products of K vectors with J or Jᵀ at a sight."""

    at: Sight
    vectors: Tensor  # (K, D) if transposed, else (K, *shape)
    transposed: bool


class Sight:
    """An image x (*shape) with f(x), and J there: the products of `Jacobian`, inside a computation."""

    def __init__(self, f: Function, shared: Jacobians, index: int) -> None:
        self.f, self.index = f, index
        self.shared: Jacobians | None = shared  # the pass with the graph of the image; None if the sight is closed
        self.image, self.output, self.eps = shared.images[index].clone(), shared.outputs[index].clone(), shared.eps
        self.z = self.output.to(self.image)
        self.shape = (self.output.numel(), self.image.numel())
        self.num_evals, self.turned = 1 / 3, False

    def mv(self, tangents: Tensor) -> Work[Tensor]:
        """Return J v of each tangent (K, *shape), (K, D)."""
        return (yield Product(self, tangents, transposed=False))

    def rmv(self, cotangents: Tensor) -> Work[Tensor]:
        """Return Jᵀu of each cotangent (K, D), (K, *shape)."""
        return (yield Product(self, cotangents, transposed=True))

    def as_matrix(self) -> Work[Tensor]:
        """Form J (D, N) from D cotangents."""
        check_memory(self.image, self.shape[0])
        rows = yield from self.rmv(torch.eye(self.shape[0], dtype=self.output.dtype, device=self.output.device))
        return rows.flatten(1)


def look(f: Function, image: Tensor) -> Work[Sight]:
    """Return the sight of f at an image (*shape)."""
    return (yield Look(f, image))


def side_by_side(works: Sequence[Work[T]], most: int = VECTORS) -> list[tuple[T, float]]:
    """Return the results of some computations and the seconds of each; a product has at most `most` vectors in all."""
    results, spent = dict[int, T](), [0.0] * len(works)
    asked: dict[int, Look | Product] = {}
    held: dict[int, Sight] = {}  # the open sight of each
    answers: dict[int, Any] = dict.fromkeys(range(len(works)))
    while answers:
        for b, answer in answers.items():
            start = time.perf_counter()
            try:
                failed = isinstance(answer, Exception)
                asked[b] = works[b].throw(answer) if failed else works[b].send(answer)
            except StopIteration as end:
                results[b] = end.value
                held.pop(b, None)
            spent[b] += time.perf_counter() - start
        groups, products = defaultdict[Any, list[int]](list), any(isinstance(one, Product) for one in asked.values())
        for b, one in asked.items():
            if isinstance(one, Product) or not products:
                if b in held and not (isinstance(one, Product) and one.at is held[b]):
                    held.pop(b).shared = None
                groups[_kind(one)].append(b)
        answers = {}
        for group in groups.values():
            requests, start = [asked.pop(b) for b in group], time.perf_counter()
            answers |= zip(group, _answers(requests, most), strict=True)
            share = (time.perf_counter() - start) / len(group)
            for b, one in zip(group, requests, strict=True):
                spent[b] += share
                if isinstance(sight := one.at if isinstance(one, Product) else answers[b], Sight):
                    held[b] = sight
    return [(results[b], spent[b]) for b in range(len(works))]


def alone(work: Work[T]) -> T:
    """Return the result of one computation."""
    return side_by_side([work])[0][0]


def _kind(one: Look | Product) -> tuple[Any, ...]:
    """Return a key that requests have in common which one pass can answer."""
    if isinstance(one, Look):
        return id(one.f), one.image.shape, one.image.dtype
    return id(one.at.shared or one.at.f), one.at.image.shape, one.at.image.dtype, one.transposed, len(one.vectors)


def _answers(group: list[Any], most: int) -> list[Any]:
    """Answer requests of one kind in one pass, or in several where memory runs out; an error is an answer too."""

    def answer(some: Sequence[Any]) -> list[Any]:
        try:
            return _look(some) if isinstance(some[0], Look) else _multiply(some, most)
        except unless_memory(RuntimeError, TypeError, ValueError) as error:
            return [error] * len(some)

    return [one for _, found in halved(answer, group) for one in (found if isinstance(found, list) else [found])]


def _look(group: Sequence[Look]) -> list[Sight]:
    shared = Jacobians(group[0].f, torch.stack([one.image for one in group]))
    return [Sight(one.f, shared, i) for i, one in enumerate(group)]


def _multiply(group: Sequence[Product], most: int) -> list[Tensor]:
    """Return the products of K vectors with J at each of some images of a pass; those of the others are zero."""
    sights = [one.at for one in group]
    shared, count, backward = _pass_of(sights), len(group[0].vectors), group[0].transposed
    images, index = shared.images, [sight.index for sight in sights]
    # The last bits of a product on a CPU depend on the number of vectors in a pass, so the images do not change it.
    at_once = max(1, most // len(images)) if images.is_cuda else min(most, CPU_VECTORS)
    given, wanted = (shared.outputs, images) if backward else (images, shared.outputs)
    answers = [images.new_empty((count, *wanted.shape[1:])) for _ in group]
    try:
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            some = torch.stack([one.vectors[part].to(given) for one in group], dim=1)
            vectors = some.new_zeros((len(some), *given.shape))
            vectors[:, index] = some
            found = shared.pull(vectors) if backward else shared.push(vectors)
            for answer, i in zip(answers, index, strict=True):
                answer[part] = found[:, i]
    except torch.OutOfMemoryError:
        for sight in sights:
            sight.shared = None  # so that each half has a smaller pass
        raise
    for sight in sights:
        first = not (backward or sight.turned or shared.by_forward_mode)
        sight.num_evals, sight.turned = sight.num_evals + 2 * count / 3 + first, sight.turned or first
    return answers


def _pass_of(sights: list[Sight]) -> Jacobians:
    """Return the pass of some sights: a new one if it is closed, or if half of its images or more do not ask."""
    shared = sights[0].shared
    if shared is not None and 2 * len(sights) > len(shared.images):
        return shared
    closed, shared = shared is None, Jacobians(sights[0].f, torch.stack([sight.image for sight in sights]))
    for i, sight in enumerate(sights):
        sight.shared, sight.index = shared, i
        sight.num_evals, sight.turned = sight.num_evals + closed / 3, sight.turned and not closed
    return shared


def at_once(f: Function, images: Tensor, most: int, memory: int) -> int:
    """Return how many images to work on side by side: those that have Jacobians within `memory`; one on a CPU."""
    if not images.is_cuda:
        return 1
    with torch.no_grad():
        return max(1, min(most, images_within(memory, f(images[:1]).numel(), images[0])))


def measure_images(
    images: Tensor, measure: Callable[[int], Work[dict[str, Any]]], progress: Callable[[int, int], None] | None = None,
    *, count: int = 1, most: int = VECTORS
) -> dict[str, Any]:  # fmt: skip
    """Return the fields of a result: those that `measure` finds at each image, `count` side by side, and seconds."""
    columns = defaultdict[str, list[Any]](list)
    for places in torch.arange(len(images)).split(count):
        found = side_by_side([measure(b) for b in places.tolist()], most)
        for b, (fields, seconds) in zip(places.tolist(), found, strict=True):
            for name, value in {**fields, "seconds": seconds}.items():
                columns[name].append(value)
            if progress is not None:
                progress(b + 1, len(images))
    return {name: stacked(column) for name, column in columns.items()}
