"""Images that share an embedding: find them, make them 8-bit exact, verify them, for any vision checkpoint.

The public names below are imported on first use, so `import hf_equiv` stays quick and loads neither torch nor
transformers. Inside the package nothing imports from here.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_equiv.data import draw_pairs, load_images
    from hf_equiv.encoder import Encoder
    from hf_equiv.matching import match_embedding
    from hf_equiv.quantize import refine_8bit
    from hf_equiv.results import ConvergenceError, MatchResult, Progress, Status
    from hf_equiv.solvers import LBFGS, Adam, GradientDescent
    from hf_equiv.verify import verify_run

try:
    __version__ = version("hf-equiv")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = [
    "LBFGS",
    "Adam",
    "ConvergenceError",
    "Encoder",
    "GradientDescent",
    "MatchResult",
    "Progress",
    "Status",
    "draw_pairs",
    "load_images",
    "match_embedding",
    "refine_8bit",
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
    "verify_run": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access does not come here again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
