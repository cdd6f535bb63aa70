"""Images that share an embedding: find them, make them 8-bit exact, verify them, for any vision checkpoint.

The public names below are imported on first use, so `import hf_equiv` stays quick and loads neither torch nor
transformers. Inside the package nothing imports from here.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_equiv.data.sources import draw_pairs, load_images
    from hf_equiv.geometry.directions import (
        Directions,
        RowSpace,
        make_directions,
        patch_null_space,
        principal_angles,
        row_space,
    )
    from hf_equiv.geometry.levelset import WalkResult, trace_level_set
    from hf_equiv.geometry.linearity import LinearityResult, linearity_radius
    from hf_equiv.geometry.lipschitz import LipschitzResult, directional_lipschitz
    from hf_equiv.geometry.regional import RegionalResult, regional_lipschitz
    from hf_equiv.geometry.spectrum import SpectrumResult, jacobian_spectrum
    from hf_equiv.hub.load import download_results, load_results
    from hf_equiv.hub.publish import Published, publish_results
    from hf_equiv.hub.space import SpaceDeployment, SpaceError, deploy_space
    from hf_equiv.jacobian import Jacobian
    from hf_equiv.matching.lbfgs import LBFGS
    from hf_equiv.matching.match import match_embedding
    from hf_equiv.matching.refine import refine_8bit
    from hf_equiv.matching.solvers import Adam, GradientDescent
    from hf_equiv.models.encoder import Encoder
    from hf_equiv.report.page import Report, make_report
    from hf_equiv.results import ConvergenceError, MatchResult, Progress, Status
    from hf_equiv.verify.directory import verify_run

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
    "Encoder": "models.encoder",
    "LBFGS": "matching.lbfgs",
    "Adam": "matching.solvers",
    "GradientDescent": "matching.solvers",
    "match_embedding": "matching.match",
    "refine_8bit": "matching.refine",
    "ConvergenceError": "results",
    "MatchResult": "results",
    "Progress": "results",
    "Status": "results",
    "draw_pairs": "data.sources",
    "load_images": "data.sources",
    "Jacobian": "jacobian",
    "RowSpace": "geometry.directions",
    "directional_lipschitz": "geometry.lipschitz",
    "jacobian_spectrum": "geometry.spectrum",
    "linearity_radius": "geometry.linearity",
    "make_directions": "geometry.directions",
    "patch_null_space": "geometry.directions",
    "principal_angles": "geometry.directions",
    "regional_lipschitz": "geometry.regional",
    "row_space": "geometry.directions",
    "trace_level_set": "geometry.levelset",
    "LipschitzResult": "geometry.lipschitz",
    "LinearityResult": "geometry.linearity",
    "RegionalResult": "geometry.regional",
    "SpectrumResult": "geometry.spectrum",
    "WalkResult": "geometry.levelset",
    "Directions": "geometry.directions",
    "verify_run": "verify.directory",
    "Published": "hub.publish",
    "publish_results": "hub.publish",
    "download_results": "hub.load",
    "load_results": "hub.load",
    "Report": "report.page",
    "make_report": "report.page",
    "SpaceDeployment": "hub.space",
    "SpaceError": "hub.space",
    "deploy_space": "hub.space",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access does not come here again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
