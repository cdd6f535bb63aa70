"""The import rules: layers point down, each large library has one home, and importing the package is cheap.

Read from the syntax tree, so imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_equiv"

# A file may import its own folder, the root, and the folders named here.
FOLDERS = {
    "matching": [],
    "geometry": ["matching"],
    "defences": ["matching"],
    "data": [],
    "models": ["geometry", "data"],
    "text": ["models", "matching"],
    "full_size": ["models", "matching", "data"],
    "through": ["matching", "data"],
    "runs": [],
    "analyses": ["full_size", "through", "models", "geometry", "matching", "data", "runs"],
    "hub": ["runs", "data"],
    "verify": ["analyses", "hub", "through", "models", "geometry", "matching", "data", "runs"],
    "report": ["verify", "analyses", "hub", "defences", "through", "models", "geometry", "matching", "data", "runs"],
    "interactive": ["analyses", "through", "models", "geometry", "matching", "data", "runs"],
    "cli": ["report", "verify", "analyses", "hub", "through", "models", "geometry", "matching", "data", "runs"],
}
# In the root each file names the files that it may import.
ROOT_FILES = {
    "results": [],
    "bars": ["results"],
    "checks": [],
    "precision": ["checks"],
    "memory": [],
    "derivatives": ["precision", "memory"],
    "conditions": ["checks", "precision", "memory", "derivatives"],
    "jacobian": ["checks", "precision", "memory", "derivatives", "conditions"],
    "passes": ["memory", "conditions", "jacobian"],
    "formatting": [],
    "limits": [],
    "png_file": ["limits"],
    "hub_client": ["formatting"],
    "__main__": ["cli"],
}
NUMERICS = "matching geometry defences results checks precision memory derivatives conditions jacobian passes".split()
MOST_FILES = 12

# Where a library may be imported: folders, files of the root, or single files. torch may be imported everywhere.
HOMES = {
    "transformers": ["models", "text"],
    "huggingface_hub": ["hub_client", "models", "data", "hub"],
    "accelerate": ["runs"],
    "datasets": ["data", "runs", "hub"],
    "pyarrow": ["limits", "data", "runs"],
    "safetensors": ["models", "text", "runs", "hub"],
    "PIL": [
        "models",
        "data",
        "full_size",
        "through",
        "analyses/figures",
        "analyses/plan",
        "interactive/figures",
    ],
    "numpy": ["models", "data", "full_size", "analyses/figures", "report"],
    "matplotlib": ["analyses/figures", "interactive/figures", "report/figures"],
    "jinja2": ["formatting", "report/render"],
    "markupsafe": ["formatting", "report/render"],
    "scipy": ["report/statistics"],
    "skimage": ["analyses/measures"],
    "tqdm": ["bars"],  # on first use, and the numerics work without it
    "click": ["cli"],
    "rich": ["cli"],
}
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image"}


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
every_module = pytest.mark.parametrize("module", MODULES)


def test_every_module_has_its_place():
    assert {module.split("/")[0] for module in MODULES} == {*FOLDERS, *ROOT_FILES}
    assert {module.count("/") for module in MODULES} == {0, 1}


@pytest.mark.parametrize("folder", [*FOLDERS, "../spaces_app", "../spaces_app/making"])
def test_folders_are_small(folder):
    files = [path for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__"]
    assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files; find the two subjects in it"


@every_module
def test_imports_point_down(module):
    own = module.split("/")[0]
    allowed = [own, *ROOT_FILES, *FOLDERS[own]] if own in FOLDERS else ROOT_FILES[own]
    for parts in (name.split(".") for name in imports(MODULES[module])):
        if parts[0] == "hf_equiv":
            assert len(parts) > 1, f"{module} imports the package root"
            assert parts[1] in {*FOLDERS, *ROOT_FILES}, f"{module} imports {parts[1]!r} from the root; name its module"
            assert parts[1] in allowed, f"{module} imports {parts[1]}, which it may not"


def test_no_import_cycles():
    below = {module: {target_of(name) for name in imports(path)} - {None, module} for module, path in MODULES.items()}
    while leaves := [module for module, found in below.items() if not found & below.keys()]:
        for module in leaves:
            del below[module]
    assert not below, f"these import each other: {', '.join(below)}"


def target_of(name: str) -> str | None:
    """The module that holds an imported name."""
    parts = name.split(".")[1:]
    found = ["/".join(parts[:size]) for size in (2, 1) if "/".join(parts[:size]) in MODULES]
    return found[0] if name.startswith("hf_equiv.") and found else None


@pytest.mark.parametrize("folder", FOLDERS)
def test_inits_hand_on_names_alone(folder):
    tree = ast.parse(MODULES[f"{folder}/__init__"].read_text(encoding="utf-8"))
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, folder


@every_module
def test_libraries_are_at_home(module):
    outside = {name.split(".")[0] for name in imports(MODULES[module])} - set(sys.stdlib_module_names) - {"hf_equiv"}
    strangers = {name for name in outside - {"torch"} if not {module, module.split("/")[0]} & {*HOMES.get(name, ())}}
    assert not strangers, f"{module} may not import {', '.join(sorted(strangers))}"


def test_the_numerics_need_torch_alone():
    assert not set(NUMERICS) & {home for homes in HOMES.values() for home in homes}


def test_every_library_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in project["dependencies"]}
    assert {DISTRIBUTIONS.get(name, name) for name in HOMES} | {"torch"} == declared


@pytest.mark.parametrize("name", ["hf_equiv", "hf_equiv.cli"])
def test_importing_is_cheap(name):
    heavy = ["torch", "transformers", "datasets", "accelerate", "matplotlib", "PIL", "huggingface_hub"]
    script = f"import sys, {name}; print(*[m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
