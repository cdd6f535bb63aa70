"""Text encoders as functions of token embeddings, and searches among texts."""

from hf_equiv.text.encoder import TextEncoder
from hf_equiv.text.injectivity import NearestTexts, find_nearest_texts
from hf_equiv.text.tokens import TokenResult, refine_tokens, round_tokens

__all__ = ["NearestTexts", "TextEncoder", "TokenResult", "find_nearest_texts", "refine_tokens", "round_tokens"]
