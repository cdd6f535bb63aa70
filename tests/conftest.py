import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from loopback_hub import Hub

# The clients read these when they are imported: no test reaches another Hub than the one in this process.
assert "huggingface_hub" not in sys.modules
HUB = Hub().start()
_HOME = tempfile.TemporaryDirectory(prefix="hf-equiv-home-")
os.environ |= {
    "HF_ENDPOINT": HUB.endpoint,
    "HF_TOKEN": "hf_alice",
    "HF_HOME": _HOME.name,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
if "PYTEST_XDIST_WORKER" in os.environ:  # one test process per core: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of marker `browser` run by default, and say why where they cannot."""
    missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    missing += [] if shutil.which("chromium") else ["chromium (apt-get install chromium)"]
    if missing:
        skip = pytest.mark.skip(reason=f"needs {', '.join(missing)}")
        for item in items:
            if item.get_closest_marker("browser") is not None:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _figures_drawn_once():
    """Draw the figures of the same rows once a session, which every `verify` would draw again."""
    from hf_equiv.analyses import figures

    drawn = {}

    def plain(value):  # a PNG file or a tensor
        data = value if isinstance(value, bytes) else value.double().contiguous().numpy().tobytes()
        return [str(getattr(value, "dtype", "")), *getattr(value, "shape", ()), hashlib.sha256(data).hexdigest()]

    def once(draw):
        @functools.wraps(draw)
        def call(*given):
            key = draw.__name__, hashlib.sha256(json.dumps(given, default=plain).encode()).digest()
            if key not in drawn:
                drawn[key] = draw(*given)
            return dict(drawn[key]) if isinstance(drawn[key], dict) else drawn[key]

        return call

    for name in ("pairs_figure", "spectrum_figures", "lipschitz_figures", "walk_figures"):
        setattr(figures, name, once(getattr(figures, name)))


@pytest.fixture(scope="session", autouse=True)
def _balls_searched_in_a_few_steps():
    from fakes import shorten_searches

    shorten_searches()


@pytest.fixture(scope="session")
def loopback() -> Hub:
    """The loopback Hub as the last test left it, for fixtures that outlive a test."""
    return HUB


@pytest.fixture
def hub():
    """The loopback Hub, empty."""
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Finished runs for the Hub by name, not to be changed."""
    from hubcases import make_runs

    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photos in three class folders."""
    from fakes import save_photos

    return save_photos(tmp_path / "photos")


@pytest.fixture
def tiny():
    """An encoder that costs nothing."""
    from fakes import TinyEncoder

    return TinyEncoder()


@pytest.fixture(autouse=True)
def _quiet_libraries():
    logging.getLogger("transformers").setLevel(logging.ERROR)
