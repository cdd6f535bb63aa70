"""One small run for each entry of `OPTIONS` of a test file, and copies of it to tamper with."""

import shutil
from pathlib import Path

import pytest
from fakes import TinyEncoder, save_photos

from hf_equiv.verify import directory


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> dict[str, Path]:
    """Not to be changed."""
    place = tmp_path_factory.mktemp("runs")
    photos, make_run = save_photos(place / "photos"), request.module.make_run
    return {name: make_run(name, photos, place / name) for name in request.module.OPTIONS}


@pytest.fixture
def copied(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "load_recorded", lambda settings, *_: TinyEncoder())
    return lambda name: Path(shutil.copytree(runs[name], tmp_path / "copy"))
