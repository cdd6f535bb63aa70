"""The wheel is complete: installed alone, it matches the built-in photos from an empty folder, offline."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run without what this environment would add to Python's path; the Hub is out of reach."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "VIRTUAL_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new virtual environment with the wheel alone; its dependencies are read from this environment by a .pth file.

    Files named in a .pth file do not have their own .pth files read, so an editable install stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    installed = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    assert installed.returncode == 0, installed.stderr
    site = next(folder.glob("lib/python*/site-packages"))
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    return folder


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hf_equiv").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "hf_equiv/py.typed" in tracked
    assert {name for name in tracked if name.startswith("hf_equiv/assets/")}
    assert {name for name in names if ".dist-info/" not in name} == tracked
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_matches_the_builtin_photos(environment, tmp_path):
    where = run(environment / "bin" / "python", "-c", "import hf_equiv; print(hf_equiv.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(environment), where.stdout + where.stderr

    done = run(environment / "bin" / "hf-equiv", "match", "builtin", cwd=tmp_path, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stdout + done.stderr
    (run_json,) = tmp_path.glob("runs/match/builtin/*/run.json")
    assert list(run_json.parent.glob("matches/*.parquet"))
    assert (run_json.parent / "figures" / "pairs.png").is_file()

    verified = run(environment / "bin" / "hf-equiv", "verify", run_json.parent, cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
