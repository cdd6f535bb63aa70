"""Match two photos in one call, and show results in a notebook."""

from hf_equiv.interactive.photos import match_photos

__all__ = ["match_photos"]
