"""Analyse Jacobians, local Lipschitz constants and level sets."""

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

__all__ = [
    "Directions",
    "LinearityResult",
    "LipschitzResult",
    "RegionalResult",
    "RowSpace",
    "SpectrumResult",
    "WalkResult",
    "directional_lipschitz",
    "jacobian_spectrum",
    "linearity_radius",
    "make_directions",
    "patch_null_space",
    "principal_angles",
    "regional_lipschitz",
    "row_space",
    "trace_level_set",
]
