"""Turn a checkpoint by name into a map from pixels to an embedding."""

from hf_equiv.models.encoder import Encoder
from hf_equiv.models.joint import JointEncoder

__all__ = ["Encoder", "JointEncoder"]
