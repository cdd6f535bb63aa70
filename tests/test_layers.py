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

# A module may import from the modules listed before it, and from no other.
NUMERICS = [
    "results",
    "checks",
    "precision",
    "jacobian",
    "linearmodel",
    "corrector",
    "feasible",
    "history",
    "solvers",
    "matching",
    "lattice",
    "quantize",
]
GEOMETRY = ["singular", "zeros", "derivative_noise", "spectrum", "subspaces"]
LIPSCHITZ = ["noise", "secants", "directions", "lipschitz", "extreme", "regional", "linearity"]
WALKS = ["trustregion", "headings", "walk", "levelset"]
ENCODER = ["hub_files", "checkpoint", "loading", "readouts", "preprocess", "network"]
ENCODER += ["structure", "zero_shot", "encoder"]
DATA = ["imagefile", "imageset", "photofiles", "parquetfile", "streaming", "hubdata", "data"]
RUN = [
    "stages",
    "shards",
    "card",
    "merge",
    "retry",
    "rundir",
    "beside",
    "pairs",
    "runconfig",
    "plan",
    "plots",
    "memory",
]
RUN += ["matchrows", "processes", "work", "run"]
ANALYSES = ["layouts", "analysisconfig", "geometryplan", "spectrumrows", "targetmatch", "lipschitzrows", "walkrows"]
ANALYSES += ["geometrysummary", "geometryplots", "walkplots", "geometryrun"]
HUB = ["hubcalls", "licences", "localrun", "publishing", "publishcard", "repository", "publication", "hub"]
HUB += ["spacefiles", "deployment", "spacestage", "space", "hubload"]
PLOTS = ["plots", "geometryplots", "walkplots", "reportfigures", "reportgeometryfigures"]
VERIFY = ["rowcheck", "columncheck", "walkcheck", "geometrycheck", "recordcheck", "withheldcheck", "recordedmodel"]
VERIFY += ["verify", "datasetcheck"]
REPORT = ["reportstats", "reportruns", "survival", "reportmeasures", "reportsearch", "reportwork", "reportnumbers"]
REPORT += ["reportwords"]
REPORT += ["reportclaims", "reportfindings", "reportpage", "reportfigures", "reportgeometryfigures"]
REPORT += ["reportmaterial", "reportgallery"]
REPORT += ["reportmatches", "reportdownstream", "reportgeometry", "reportmade", "reportsources", "report"]
SHOW = ["svgcharts", "live", "along", "showwords", "showcase", "showviews", "geometryviews"]
COMMANDS = ["wording", "environment", "display", "progress", "matchcommand", "geometrytables", "geometrycommand"]
COMMANDS += ["publishcommand", "spacecommand", "reportcommand", "options", "spacegroup"]
COMMANDS += ["runverbs", "resultverbs", "cli", "__main__"]
ORDER = [*NUMERICS, *GEOMETRY, *LIPSCHITZ, *WALKS, *ENCODER, "metrics", *DATA, *RUN, *ANALYSES, *HUB, *VERIFY, *REPORT]
ORDER += [*SHOW, *COMMANDS]

# Where a library may be imported; one that is not listed may not be imported at all. (torch: everywhere)
HOMES = {
    "transformers": ENCODER,
    "huggingface_hub": [*ENCODER, *DATA, *HUB],
    "accelerate": ["memory", "processes"],
    "datasets": [*DATA, "shards", "layouts", "hubload"],
    "pyarrow": ["parquetfile", "shards"],
    "safetensors": [*ENCODER, "shards", "hubload"],
    "PIL": [*ENCODER, *DATA, "plots", "walkplots", "survival", "live"],
    "numpy": [*ENCODER, *DATA, *PLOTS, "reportstats", "reportgallery", "reportmatches", "reportgeometry"],
    "torchmetrics": ["metrics"],
    "matplotlib": PLOTS,
    "click": ["options", "spacegroup", "runverbs", "resultverbs", "cli"],
    "rich": ["display", "progress", "geometrytables"],
}
DISTRIBUTIONS = {"PIL": "pillow"}


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


MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}
every_module = pytest.mark.parametrize("module", MODULES)


def test_every_module_has_its_place():
    assert sorted(MODULES) == sorted(ORDER), "list new modules in ORDER, at the lowest place where they work"
    assert not [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE], "the package is flat"


@every_module
def test_imports_point_down(module):
    for parts in (name.split(".") for name in imports(MODULES[module])):
        if parts[0] != "hf_equiv":
            continue
        assert len(parts) > 1, f"{module} imports the package root"
        assert parts[1] in ORDER, f"{module} imports {parts[1]!r} from the package root; name its module"
        assert ORDER.index(parts[1]) < ORDER.index(module), f"{module} imports {parts[1]}, which stands above it"


@every_module
def test_libraries_are_at_home(module):
    outside = {name.split(".")[0] for name in imports(MODULES[module])} - set(sys.stdlib_module_names) - {"hf_equiv"}
    strangers = {name for name in outside - {"torch"} if module not in HOMES.get(name, ())}
    assert not strangers, f"{module} may not import {', '.join(sorted(strangers))}"


def test_the_numerics_need_torch_alone():
    assert not {*NUMERICS, *GEOMETRY, *LIPSCHITZ} & {module for homes in HOMES.values() for module in homes}


def test_every_library_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in project["dependencies"]}
    assert {DISTRIBUTIONS.get(name, name) for name in HOMES} | {"torch"} == declared


@pytest.mark.parametrize("name", ["hf_equiv", "hf_equiv.cli"])
def test_importing_is_cheap(name):
    heavy = ["torch", "transformers", "datasets", "accelerate", "torchmetrics", "matplotlib", "PIL", "huggingface_hub"]
    script = f"import sys, {name}; print(*[m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
