import logging
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


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
