"""What `hf_equiv` shows: every public name resolves and says what it takes and gives."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module, metadata

import pytest

import hf_equiv
from hf_equiv.analyses.config import BaseConfig
from hf_equiv.matching.solvers import BatchSolver, Solver

PUBLIC = [getattr(hf_equiv, name) for name in hf_equiv.__all__]
FUNCTIONS = [value for value in PUBLIC if inspect.isfunction(value)]
CLASSES = [value for value in PUBLIC if inspect.isclass(value)]
# What every solver does is said once, in the protocols that they implement.
SOLVER = {"iterate": Solver.iterate, "begin": BatchSolver.begin}
METHODS = list(SOLVER.values()) + [
    getattr(owner, name)
    for owner in CLASSES
    for name, member in vars(owner).items()
    if not name.startswith("_") and isinstance(member, classmethod | staticmethod | type(lambda: None))
    if not (name in SOLVER and inspect.signature(member) == inspect.signature(SOLVER[name]))
    if not issubclass(owner, BaseConfig)  # the plan calls their methods, which `run.VERBS` explains once
]
by_name = {"ids": lambda value: value.__qualname__}


def section(value: object, title: str) -> str:
    """The text under `title:` in a docstring, "" when there is none."""
    found = re.search(rf"^{title}:\n(.*?)(?=^\w|\Z)", inspect.getdoc(value) or "", re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def test_all_is_what_dir_shows():
    assert set(hf_equiv.__all__) <= set(dir(hf_equiv))
    # type checkers read their lists
    folders = "analyses data defences geometry hub interactive matching models report verify".split()
    listed = {home: set(import_module(f"hf_equiv.{home}").__all__) for home in folders}
    assert listed == {home: set(hf_equiv._NAMES[home].split()) for home in folders}
    assert len(PUBLIC) == len(FUNCTIONS) + len(CLASSES)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'matchembedding'"):
        hf_equiv.matchembedding  # noqa: B018


def test_version_is_the_installed_one():
    assert hf_equiv.__version__ == metadata.version("hf-equiv")


@pytest.mark.parametrize("value", PUBLIC, **by_name)
def test_docstring_starts_with_one_sentence(value):
    first = (value.__doc__ or "").strip().split("\n")[0]
    assert first.endswith("."), f"{value.__qualname__}: {first!r}"
    assert not first.startswith(f"{value.__name__}("), "the docstring is the one that dataclass generates"


@pytest.mark.parametrize("value", FUNCTIONS + METHODS, **by_name)
def test_functions_say_what_they_take_and_give(value):
    signature = inspect.signature(value)
    arguments = [name for name in signature.parameters if name != "self"]
    one_line = "\n" not in (value.__doc__ or "\n").strip()
    if value in METHODS and one_line and len(arguments) == 0:
        return  # "The float64 twin." says it
    missing = [name for name in arguments if not re.search(rf"^\s+{name}:", section(value, "Args"), re.MULTILINE)]
    assert not missing, f"{value.__qualname__} has no Args entry for {', '.join(missing)}"
    if signature.return_annotation not in (None, "None"):
        assert section(value, "Returns"), f"{value.__qualname__} has no Returns section"


@pytest.mark.parametrize("value", [c for c in CLASSES if dataclasses.is_dataclass(c)], **by_name)
def test_records_say_what_they_hold(value):
    text = "\n".join(section(kind, title) for kind in value.__mro__ for title in ("Attributes", "Args"))
    missing = [f.name for f in dataclasses.fields(value) if not re.search(rf"^\s+{f.name}:", text, re.MULTILINE)]
    assert not missing, f"{value.__qualname__} does not describe {', '.join(missing)}"
