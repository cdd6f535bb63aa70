"""Images from files, folders, tables and Hub datasets."""

from hf_equiv.data.sources import draw_pairs, load_images

__all__ = ["draw_pairs", "load_images"]
