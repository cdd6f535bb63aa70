"""Read a set of texts: one that was typed, or the lines of a file."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_equiv.formatting import many, printable, some, utf8

MAX_TEXTS, MAX_CHARACTERS, _MAX_BYTES = 10_000, 2_000, 10_000_000
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # marks that reorder the text around them
_SHOWN = 60  # characters of a text in its id


@dataclass(frozen=True)
class TextSet:
    """Texts under one name, with the attributes that planning needs of a set of images."""

    data_id: str  # the name of the file, or "text"
    data_revision: str  # "sha256:…" over the texts
    texts: tuple[str, ...]
    ids: tuple[str, ...]  # the beginning of each text, made different by a number
    tabular: bool = False
    choices: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[None, ...]:
        """No text has a class."""
        return (None,) * len(self.texts)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)

    def __repr__(self) -> str:
        """State the name, the number of texts and the first ids in one line."""
        return f"TextSet({self.data_id!r}: {many(len(self), 'text')}, {some(self.ids, 2)})"


def is_text_file(what: str) -> bool:
    """Return whether an option names a file of texts, and is no text itself."""
    return what.lower().endswith(".txt") and "\n" not in what


def load_texts(what: str) -> TextSet:
    """Return a text as it is, or the lines of a file whose name ends in .txt.

    Args:
        what: a text, or the path of a file in UTF-8 with one text on each line; empty lines are left out.

    Returns:
        The texts.

    Raises:
        ValueError: no text, control characters, a text or file that is too long, or one that is not UTF-8.
        FileNotFoundError: the file does not exist.
    """
    if not is_text_file(what):
        return name_texts("text", [what])
    path = Path(what).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{printable(what)!r} does not exist. Check the path, or write the text itself.")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path.name!r} must have at most {_MAX_BYTES / 1e6:.0f} MB of texts. Split it.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path.name!r} must be text in UTF-8, one text on each line. Save it as UTF-8.") from None
    return name_texts(utf8(path.name), [line for line in lines if line.strip()])


def name_texts(data_id: str, texts: Sequence[str]) -> TextSet:
    """Check texts and give each its id.

    Args:
        data_id: name of the set.
        texts: the texts.

    Returns:
        The set, without white space around its texts.

    Raises:
        ValueError: no text, too many, one that is too long, or control characters.
    """
    texts = [text.strip() for text in texts]
    if not texts or not all(texts):
        raise ValueError(f"{data_id!r} must hold at least one text and no empty one. Write some words.")
    if len(texts) > MAX_TEXTS:
        raise ValueError(f"{data_id!r} must hold at most {MAX_TEXTS:,} texts; got {len(texts):,}. Split it.")
    ids: dict[str, None] = {}
    for text in texts:
        if any(unicodedata.category(sign) in ("Cc", "Cs") or sign in _TURNING for sign in text):
            raise ValueError(
                f"texts must have no control characters; got some in {printable(text[:_SHOWN])!r} of {data_id!r}. "
                "Remove them."
            )
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"texts must have at most {MAX_CHARACTERS:,} characters; got {len(text):,} in {data_id!r}, from "
                f"{printable(text[:_SHOWN])!r} on. Shorten it."
            )
        name = printable(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…")
        ids[f"{name}#{len(ids)}" if name in ids else name] = None
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return TextSet(data_id, f"sha256:{digest}", tuple(texts), tuple(ids))
