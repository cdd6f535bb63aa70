"""The four analyses: match, spectrum, lipschitz, walk."""

from hf_equiv.analyses.lipschitz import LipschitzConfig
from hf_equiv.analyses.match_config import MatchConfig
from hf_equiv.analyses.plan import make_plan
from hf_equiv.analyses.run import RunOutcome, run_analysis
from hf_equiv.analyses.spectrum import SpectrumConfig
from hf_equiv.analyses.walk import WalkConfig

__all__ = [
    "LipschitzConfig",
    "MatchConfig",
    "RunOutcome",
    "SpectrumConfig",
    "WalkConfig",
    "make_plan",
    "run_analysis",
]
