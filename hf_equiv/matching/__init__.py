"""Find images near a source with the embedding of a target."""

from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit
from hf_equiv.matching.solvers import Adam, GradientDescent

__all__ = ["LBFGS", "Adam", "GradientDescent", "match_embedding", "refine_8bit"]
