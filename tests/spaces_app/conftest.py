import shutil
from pathlib import Path

import pytest
from appserver import served

SMALL = Path(__file__).parents[2] / "hf_equiv" / "assets" / "builtin-64"


@pytest.fixture(scope="package")
def url(tmp_path_factory):
    """The app for programs and browsers, which offers a checkpoint of a folder too; half of the usual evaluations."""
    folder = tmp_path_factory.mktemp("app")
    model = Path(shutil.copytree(SMALL, folder / "my-model"))
    given = {"HF_EQUIV_MAX_EVALS": "200", "HF_EQUIV_TIME_LIMIT": "120", "HF_TOKEN": "hf_secret"}
    with served(folder, "--model", str(model), **given) as address:
        yield address


@pytest.fixture(scope="package")
def encoder():
    """The built-in checkpoint."""
    from hf_equiv.models.encoder import Encoder

    return Encoder.from_pretrained("builtin")


@pytest.fixture(scope="package")
def small():
    """The checkpoint of the folder that the app offers, which is quick."""
    from hf_equiv.models.encoder import Encoder

    return Encoder.from_pretrained("builtin-64")
