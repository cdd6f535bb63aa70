"""Turn a checkpoint by name into a map from pixels to an embedding."""

from hf_equiv.models.encoder import Encoder

__all__ = ["Encoder"]
