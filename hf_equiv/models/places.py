"""Remember the paths of local checkpoints and photos on this machine.

A run directory names local files without their folders, because it may be published. Their paths are kept in the cache
of the user, not beside the run: nothing can publish them, and a run that was downloaded or unpacked brings none along.
An entry is found by a digest alone. A stranger's run therefore leads only to a folder that this user has named before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path


def remember(key: str, text: str) -> None:
    """Keep a text under a key; a cache that cannot be written is left alone."""
    with suppress(OSError):
        path = _entry(key)
        path.touch(mode=0o600)
        path.write_bytes(os.fsencode(text))


def recall(key: str) -> str | None:
    """Return the text that this user has kept under a key on this machine, if any."""
    with suppress(OSError):
        path = _entry(key)
        if not hasattr(os, "getuid") or path.stat().st_uid == os.getuid():  # several users may share a cache
            return os.fsdecode(path.read_bytes())
    return None


def key_of_run(analysis: str, settings: Mapping[str, Any]) -> str:
    """Return the key of the command of a run; the key of a checkpoint is its revision."""
    return json.dumps([analysis, settings], sort_keys=True)


def _entry(key: str) -> Path:
    return cached_assets_path("hf_equiv", "places") / hashlib.sha256(key.encode()).hexdigest()
