"""Find images that share an embedding, make them 8-bit exact and verify them, for any vision checkpoint.

The public names are imported on first use: `import hf_equiv` is quick and loads neither torch nor transformers. Modules
inside the package never import from here.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_equiv.analyses import *  # noqa: F403
    from hf_equiv.data import *  # noqa: F403
    from hf_equiv.defences import *  # noqa: F403
    from hf_equiv.geometry import *  # noqa: F403
    from hf_equiv.hub import *  # noqa: F403
    from hf_equiv.interactive import *  # noqa: F403
    from hf_equiv.jacobian import Jacobian as Jacobian
    from hf_equiv.matching import *  # noqa: F403
    from hf_equiv.models import *  # noqa: F403
    from hf_equiv.report import *  # noqa: F403
    from hf_equiv.results import ConvergenceError as ConvergenceError
    from hf_equiv.results import MatchResult as MatchResult
    from hf_equiv.results import Progress as Progress
    from hf_equiv.results import Status as Status
    from hf_equiv.text import *  # noqa: F403
    from hf_equiv.verify import *  # noqa: F403

try:
    __version__ = version("hf-equiv")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

_NAMES = {
    "analyses": "LipschitzConfig MatchConfig RunOutcome SpectrumConfig WalkConfig make_plan run_analysis",
    "data": "draw_pairs load_images",
    "defences": "CosineCertificate SmoothedAttack attack_smoothed certified_cosine",
    "geometry": (
        "Directions LinearityResult LipschitzResult RegionalResult RowSpace SpectrumResult WalkResult "
        "directional_lipschitz jacobian_spectrum linearity_radius make_directions patch_null_space principal_angles "
        "regional_lipschitz row_space trace_level_set"
    ),
    "hub": "Published SpaceDeployment SpaceError deploy_space download_results load_results publish_results",
    "interactive": "match_photos",
    "jacobian": "Jacobian",
    "matching": "LBFGS Adam GradientDescent match_embedding refine_8bit",
    "models": "Encoder JointEncoder",
    "report": "Report make_report",
    "text": "NearestTexts TextEncoder TokenResult find_nearest_texts refine_tokens round_tokens",
    "results": "ConvergenceError MatchResult Progress Status",
    "verify": "verify_run",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
