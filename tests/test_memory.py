"""What is done when memory runs out: smaller parts, and errors that no `except` clause takes for others."""

from __future__ import annotations

import pytest
import torch

from hf_equiv.memory import halved, unless_memory


@pytest.mark.parametrize(("room", "lengths"), [(5, [5]), (3, [2, 3]), (2, [2, 1, 2]), (1, [1] * 5), (0, [1] * 5)])
def test_halved(room, lengths):
    def call(items):
        if len(items) > room:
            raise torch.OutOfMemoryError
        return [2 * item for item in items]

    parts = list(halved(call, list(range(5))))
    assert [len(some) for some, _ in parts] == lengths
    assert [item for some, _ in parts for item in some] == list(range(5))
    if room:
        assert [item for _, found in parts for item in found] == list(range(0, 10, 2))
    else:
        assert all(found.__traceback__ is None for _, found in parts)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, torch.OutOfMemoryError, MemoryError, KeyError])
@pytest.mark.parametrize("kinds", [(RuntimeError,), (ValueError, Exception)], ids=["few", "all"])
def test_a_lack_of_memory_is_not_taken_for_another_error(error, kinds):
    def work():
        try:
            yield
        except unless_memory(*kinds):
            yield "caught"

    waiting = work()
    next(waiting)
    if issubclass(error, kinds) and error not in (torch.OutOfMemoryError, MemoryError):
        assert waiting.throw(error()) == "caught"
    else:
        with pytest.raises(error):
            waiting.throw(error())
