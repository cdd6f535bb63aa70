"""Remember the paths of local checkpoints and photos on this machine.

A run directory names local files without their folders, because it may be published. Their paths are kept in the cache
of the user, not beside the run: nothing can publish them, and a run that was downloaded or unpacked brings none along.
A path is found by the SHA-256 of the files. A stranger's run therefore leads only to a folder that this user has named
before, for files of these contents.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from huggingface_hub import cached_assets_path

BUILTINS = {name: Path(__file__).parents[1] / "assets" / name for name in ("builtin", "builtin-64", "builtin-robust")}
"""Folders of the checkpoints that ship with the package, by name."""


def remember(revision: str, path: str) -> None:
    """Keep the path of local files under the SHA-256 of their contents; a cache that is read-only stays as it is."""
    with suppress(OSError):
        entry = _entry(revision)
        entry.touch(mode=0o600)
        entry.write_bytes(os.fsencode(os.path.abspath(Path(path).expanduser())))


def recall(revision: str) -> str | None:
    """Return the path that this user has last used on this machine for files of these contents, if any."""
    with suppress(OSError):
        entry = _entry(revision)
        if not hasattr(os, "getuid") or entry.stat().st_uid == os.getuid():  # several users may share a cache
            return os.fsdecode(entry.read_bytes())
    return None


def from_here(name: str, revision: str) -> str:
    """Return the path of local files as it can be typed in the current folder; their name if there is none."""
    path = recall(revision)
    if path is None or not path.isprintable() or not os.path.exists(path):
        return name
    near = os.path.relpath(path)
    return near if os.sep in near else f".{os.sep}{near}"  # never a name of the Hub


def _entry(revision: str) -> Path:
    return cached_assets_path("hf_equiv", "places") / hashlib.sha256(revision.encode()).hexdigest()
