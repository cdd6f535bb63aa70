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

ROOT = Path(__file__).parents[1]
APP = [p for p in sorted((ROOT / "spaces_app").rglob("*")) if p.is_file() and "__pycache__" not in p.parts]


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
    built = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as again, zipfile.ZipFile(wheel) as first:
        assert {name: again.read(name) for name in again.namelist()} == {n: first.read(n) for n in first.namelist()}


def test_editable_install_takes_the_app_from_the_clone(tmp_path):
    """The wheel of an editable install holds a path and nothing else; no copy of the app that could grow old."""
    script = "import sys, hatchling.build as b; print(b.build_editable(sys.argv[1]))"
    built = run(sys.executable, "-c", script, tmp_path, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert [Path(name).suffix for name in names] == [".pth"]
        assert archive.read(names[0]).decode().split() == [str(ROOT)]
    script = "from hf_equiv.hub.space_files import app_folder; print(app_folder())"
    told = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert told.stdout.strip() == str(ROOT / "spaces_app"), told.stderr


def test_installed_wheel_has_the_app(environment, wheel, tmp_path):
    """In an empty folder: found, importable, and brought along by a deployment."""
    script = (
        "from hf_equiv.cli import space; from hf_equiv.hub import space_files; print(space_files.app_folder());"
        "print(callable(space.load_app().build_demo)); print(space_files.app_of(None).library)"
    )
    told = run(environment / "bin" / "python", "-c", script, cwd=tmp_path, HF_HOME=str(tmp_path / "hub"))
    assert told.returncode == 0, told.stderr
    folder, found, library = told.stdout.splitlines()[-3:]
    assert Path(folder).is_relative_to(environment)
    assert Path(folder).parts[-2:] == ("hf_equiv", "spaces_app")
    assert found == "True"
    version = wheel.name.split("-")[1]
    assert library == f"hf-equiv {version}, brought along as installed here"
    script = (
        "import sys, pathlib; from hf_equiv.hub.space_files import app_of;"
        "print(*app_of(pathlib.Path(sys.argv[1])).files)"
    )
    told = run(environment / "bin" / "python", "-c", script, wheel, cwd=tmp_path)
    assert {"app.py", "hf_equiv/cli/main.py", f"hf_equiv-{version}.dist-info/METADATA"} <= set(told.stdout.split()), (
        told.stderr
    )


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
