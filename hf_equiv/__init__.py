"""Images that share an embedding: find them, make them 8-bit exact, verify them, for any vision checkpoint.

The public names below are imported on first use, so `import hf_equiv` stays quick and loads neither torch nor
transformers. Inside the package nothing imports from here.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_equiv.data import draw_pairs, load_images
    from hf_equiv.deployment import SpaceDeployment
    from hf_equiv.directions import Directions, make_directions
    from hf_equiv.encoder import Encoder
    from hf_equiv.hub import publish_results
    from hf_equiv.hubload import download_results, load_results
    from hf_equiv.jacobian import Jacobian
    from hf_equiv.levelset import WalkResult, trace_level_set
    from hf_equiv.linearity import LinearityResult, linearity_radius
    from hf_equiv.lipschitz import LipschitzResult, directional_lipschitz
    from hf_equiv.matching import match_embedding
    from hf_equiv.publication import Published
    from hf_equiv.quantize import refine_8bit
    from hf_equiv.regional import RegionalResult, regional_lipschitz
    from hf_equiv.report import Report, make_report
    from hf_equiv.results import ConvergenceError, MatchResult, Progress, Status
    from hf_equiv.solvers import LBFGS, Adam, GradientDescent
    from hf_equiv.space import deploy_space
    from hf_equiv.spacestage import SpaceError
    from hf_equiv.spectrum import SpectrumResult, jacobian_spectrum
    from hf_equiv.subspaces import RowSpace, patch_null_space, principal_angles, row_space
    from hf_equiv.verify import verify_run

try:
    __version__ = version("hf-equiv")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = [
    "LBFGS",
    "Adam",
    "ConvergenceError",
    "Directions",
    "Encoder",
    "GradientDescent",
    "Jacobian",
    "LinearityResult",
    "LipschitzResult",
    "MatchResult",
    "Progress",
    "Published",
    "RegionalResult",
    "Report",
    "RowSpace",
    "SpaceDeployment",
    "SpaceError",
    "SpectrumResult",
    "Status",
    "WalkResult",
    "deploy_space",
    "directional_lipschitz",
    "download_results",
    "draw_pairs",
    "jacobian_spectrum",
    "linearity_radius",
    "load_images",
    "load_results",
    "make_directions",
    "make_report",
    "match_embedding",
    "patch_null_space",
    "principal_angles",
    "publish_results",
    "refine_8bit",
    "regional_lipschitz",
    "row_space",
    "trace_level_set",
    "verify_run",
]

_HOMES = {
    "Encoder": "encoder",
    "LBFGS": "solvers",
    "Adam": "solvers",
    "GradientDescent": "solvers",
    "match_embedding": "matching",
    "refine_8bit": "quantize",
    "ConvergenceError": "results",
    "MatchResult": "results",
    "Progress": "results",
    "Status": "results",
    "draw_pairs": "data",
    "load_images": "data",
    "Jacobian": "jacobian",
    "RowSpace": "subspaces",
    "directional_lipschitz": "lipschitz",
    "jacobian_spectrum": "spectrum",
    "linearity_radius": "linearity",
    "make_directions": "directions",
    "patch_null_space": "subspaces",
    "principal_angles": "subspaces",
    "regional_lipschitz": "regional",
    "row_space": "subspaces",
    "trace_level_set": "levelset",
    "LipschitzResult": "lipschitz",
    "LinearityResult": "linearity",
    "RegionalResult": "regional",
    "SpectrumResult": "spectrum",
    "WalkResult": "levelset",
    "Directions": "directions",
    "verify_run": "verify",
    "Published": "publication",
    "publish_results": "hub",
    "download_results": "hubload",
    "load_results": "hubload",
    "Report": "report",
    "make_report": "report",
    "SpaceDeployment": "deployment",
    "SpaceError": "spacestage",
    "deploy_space": "space",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access does not come here again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
