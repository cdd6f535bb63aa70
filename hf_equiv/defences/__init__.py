"""Defences against matches: what random smoothing certifies, and the attack that it is measured against."""

from hf_equiv.defences.attack import SmoothedAttack, attack_smoothed
from hf_equiv.defences.certificate import CosineCertificate, certified_cosine

__all__ = ["CosineCertificate", "SmoothedAttack", "attack_smoothed", "certified_cosine"]
