"""The wheel is complete: installed alone, it matches the built-in photos from an empty folder, offline."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from hf_equiv.hub.space_files import app_folder

ROOT = Path(__file__).parents[1]
APP = [p for p in sorted((ROOT / "spaces_app").rglob("*")) if p.is_file() and "__pycache__" not in p.parts]


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run without what this environment would add to Python's path; the Hub is out of reach."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "VIRTUAL_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def build(kind: str, folder: Path, source: Path = ROOT) -> Path:
    """Build a wheel, sdist or editable wheel by the hook of PEP 517 that `python -m build` and pip call."""
    script = f"import sys, hatchling.build; print(hatchling.build.build_{kind}(sys.argv[1]))"
    built = run(sys.executable, "-c", script, folder, cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / built.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"))


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
    app = {f"hf_equiv/{path.relative_to(ROOT).as_posix()}" for path in APP}
    assert {
        "hf_equiv/spaces_app/app.py",
        "hf_equiv/spaces_app/README.md",
        "hf_equiv/spaces_app/requirements.txt",
    } <= app
    assert {name for name in names if ".dist-info/" not in name} == tracked | app
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_from_an_sdist_is_the_same(wheel, tmp_path):
    """Built from the source archive, as an index does it, not from a clone."""
    archive = build("sdist", tmp_path)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path, tmp_path / archive.name.removesuffix(".tar.gz"))
    with zipfile.ZipFile(again) as again, zipfile.ZipFile(wheel) as first:
        assert {name: again.read(name) for name in again.namelist()} == {n: first.read(n) for n in first.namelist()}


def test_editable_install_takes_the_app_from_the_clone(tmp_path):
    """The wheel of an editable install holds a path and nothing else; no copy of the app that could grow old."""
    with zipfile.ZipFile(build("editable", tmp_path)) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [Path(name).suffix for name in names] == [".pth"]
        assert archive.read(names[0]).decode().split() == [str(ROOT)]
    assert app_folder() == ROOT / "spaces_app"


def test_installed_wheel_has_the_app(environment, wheel, tmp_path):
    """In an empty folder: found, importable, and brought along by a deployment."""
    script = (
        "import pathlib, sys; from hf_equiv.cli import space; from hf_equiv.hub import space_files as files;"
        "print(files.app_folder(), callable(space.load_app().build_demo), files.app_of(None).library, sep='\\n');"
        "print(*files.app_of(pathlib.Path(sys.argv[1])).files)"
    )
    told = run(environment / "bin" / "python", "-c", script, wheel, cwd=tmp_path, HF_HOME=str(tmp_path / "hub"))
    assert told.returncode == 0, told.stderr
    folder, found, library, brought = told.stdout.splitlines()[-4:]
    assert Path(folder).is_relative_to(environment)
    assert Path(folder).parts[-2:] == ("hf_equiv", "spaces_app")
    assert found == "True"
    version = wheel.name.split("-")[1]
    assert library == f"hf-equiv {version}, brought along as installed here"
    assert {"app.py", "hf_equiv/cli/main.py", f"hf_equiv-{version}.dist-info/METADATA"} <= set(brought.split())


def test_installed_wheel_matches_the_builtin_photos(environment, tmp_path):
    where = run(environment / "bin" / "python", "-c", "import hf_equiv; print(hf_equiv.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(environment), where.stdout + where.stderr

    command = [environment / "bin" / "hf-equiv", "match", "builtin", "--max-evals", "3", "--no-refine"]
    done = run(*command, cwd=tmp_path, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 1, done.stdout + done.stderr  # the match is not reached, to be quick
    (run_json,) = tmp_path.glob("runs/match/builtin/*/run.json")
    assert list(run_json.parent.glob("matches/*.parquet"))
    assert (run_json.parent / "figures" / "pairs.png").is_file()

    verified = run(environment / "bin" / "hf-equiv", "verify", run_json.parent, cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
