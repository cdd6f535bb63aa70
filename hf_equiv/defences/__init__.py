"""Certify smoothed embeddings, and attack them to check the certificates."""

from hf_equiv.defences.attack import SmoothedAttack, attack_smoothed
from hf_equiv.defences.certificate import CosineCertificate, certified_cosine

__all__ = ["CosineCertificate", "SmoothedAttack", "attack_smoothed", "certified_cosine"]
