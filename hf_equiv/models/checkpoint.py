"""Find the files of a checkpoint by name, on disk and at one revision.

All files come from one folder or from one Hub commit. transformers never talks to the Hub itself, so it cannot load
weights that a bot converted on another branch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    validate_repo_id,
)
from transformers.utils import logging as transformers_logging

from hf_equiv.formatting import utf8
from hf_equiv.hub_client import api_of, checked, explained, version
from hf_equiv.models.places import BUILTINS

_WEIGHTS = "model.safetensors"
_PICKLED = (".bin", ".h5", ".msgpack", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class HubFiles:
    """A model repository on the Hub, pinned to one commit once it is found."""

    repo_id: str
    commit: str = ""  # 40 hex digits
    subfolder: str = ""
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def fetch(self, name: str) -> Path:
        """Return a file on disk, and download it if it is not cached."""
        with explained(
            self.repo_id, kind="model", revision=self.commit, file=name, local_files_only=self.local_files_only
        ):
            download = partial(
                hf_hub_download,
                self.repo_id,
                name,
                subfolder=self.subfolder or None,
                revision=self.commit,
                cache_dir=self.cache_dir,
                token=self.token,
                local_files_only=self.local_files_only,
                library_name="hf_equiv",
                library_version=version("hf_equiv"),
            )
            return Path(checked(download, self.repo_id, "model", self.cache_dir))

    def names(self) -> list[str]:
        """Return the files in the subfolder; none offline."""
        if self.local_files_only or constants.HF_HUB_OFFLINE:
            return []
        with explained(self.repo_id, kind="model", revision=self.commit):
            listed = api_of(self.token).list_repo_files(self.repo_id, revision=self.commit, token=self.token)
        prefix = f"{self.subfolder.strip('/')}/" if self.subfolder else ""
        names = (name.removeprefix(prefix) for name in listed if name.startswith(prefix))
        return [name for name in names if "/" not in name]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of one checkpoint at one revision."""

    model_id: str  # the user's Hub id, folder or a name in BUILTINS; only loading uses it, see `name`
    folder: Path  # folder of config and weights on this machine
    revision: str  # commit sha on the Hub, or "sha256:…" of the weights of a local folder
    trust_remote_code: bool = False  # whether Python files of the checkpoint may be executed
    hub: HubFiles | None = None  # source of further files of the same commit; None for a folder

    @property
    def name(self) -> str:
        """Name to record: Hub id, name in BUILTINS, or a local folder's own name, never a path of this machine."""
        if self.hub is not None or self.model_id in BUILTINS:
            return self.model_id
        return utf8(Path(self.model_id).expanduser().resolve().name) or "root"

    def find(self, name: str) -> Path | None:
        """Return a file on disk; None if the checkpoint does not have it (offline: if it is not cached)."""
        if self.hub is None:
            return self.folder / name if (self.folder / name).is_file() else None
        with suppress(hub_errors.EntryNotFoundError):
            return self.hub.fetch(name)
        return None

    def fetch_matching(self, endings: tuple[str, ...]) -> None:
        """Download the files of a Hub checkpoint whose name ends in one of `endings`, without weight indices."""
        for name in [] if self.hub is None else self.hub.names():
            if name.endswith(endings) and not name.endswith(".index.json"):
                self.find(name)

    def load(self, kind: Any, **options: Any) -> Any:
        """Load a part by an auto class of transformers, from the folder alone."""
        own = self.trust_remote_code
        return kind.from_pretrained(self.folder, local_files_only=True, trust_remote_code=own, **options)

    def weights(self) -> list[Path]:
        """Return the safetensors files on disk, downloaded if need be, or refuse a checkpoint without them."""
        whole = self.find(_WEIGHTS)
        if whole is not None:
            return [whole]
        index = self.find(f"{_WEIGHTS}.index.json")
        if index is not None:
            fetch = self.hub.fetch if self.hub is not None else self.folder.joinpath
            files = {name: fetch(name) for name in _shard_names(index)}
            lost = next((name for name, file in files.items() if not file.is_file()), None)
            if lost is None:
                return list(files.values())
            raise FileNotFoundError(
                f"`model_id` must be complete; '{self.model_id}' lacks '{lost}', which its index names. Fetch it."
            )
        if self.hub is None:
            names = sorted(path.name for path in self.folder.iterdir())
        else:
            with suppress(hub_errors.RemoteEntryNotFoundError):  # a repository without it; other failures are raised
                return [self.hub.fetch(_WEIGHTS)]
            names = self.hub.names()
        others = ", ".join(name for name in names if name.endswith(_PICKLED))
        got = f"only {others}" if others else "no weights at all"
        raise FileNotFoundError(
            f"`model_id` must hold its weights as safetensors; '{self.model_id}' has {got}. Pickled weights can run "
            "code and are never loaded: convert them with `model.save_pretrained(...)`, or choose another checkpoint."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the load report and progress bars of transformers; restore both on exit."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars_off = are_progress_bars_disabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # this also switches on the bars of the Hub client
        if hub_bars_off:
            disable_progress_bars()


def find_checkpoint(hub: HubFiles, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Resolve a name to a folder with config.json at one revision; loading fetches the weights from the Hub."""
    name = hub.repo_id  # a Hub id, a folder or "builtin"
    if not name:
        raise ValueError("`model_id` must be a Hub id, a folder or 'builtin'; got an empty string.")
    if name in BUILTINS:
        return _builtin(name, revision)
    if os.path.isdir(name) or _looks_like_a_path(name):
        if revision is not None:
            raise ValueError(
                f"`revision` must be None for a local folder; got {revision!r}. Only Hub ids have revisions."
            )
        return _local(Checkpoint(name, Path(name).expanduser() / hub.subfolder, "", trust_remote_code))
    try:
        validate_repo_id(name)
    except hub_errors.HFValidationError as error:
        raise ValueError(
            f"`model_id` must be a Hub id such as 'facebook/deit-tiny-patch16-224', a folder or 'builtin'; got "
            f"{name!r}. Check the spelling."
        ) from error
    offline = hub.local_files_only or constants.HF_HUB_OFFLINE  # avoids the client's warning that it is offline
    with explained(name, kind="model", revision=revision, file="config.json", local_files_only=hub.local_files_only):
        resolved = api_of(hub.token).resolve_revision(
            name, revision=revision, cache_dir=hub.cache_dir, local_files_only=offline, token=hub.token
        )
    hub = replace(hub, commit=resolved.resolved)
    return Checkpoint(name, hub.fetch("config.json").parent, hub.commit, trust_remote_code, hub)


def _builtin(name: str, revision: str | None) -> Checkpoint:
    """Return a checkpoint of the package; a run of an earlier version of it names the weights by their digest."""
    known = [_local(Checkpoint(name, folder, "")) for folder in (BUILTINS[name], *BUILTINS.values())]
    for found in known:
        if revision in (None, found.revision):
            return found
    revisions = ", ".join(sorted({found.revision for found in known}))
    raise ValueError(
        f"`revision` must be None for {name!r}, or one of {revisions}; got {revision!r}. Install the version of "
        "hf_equiv that has it."
    )


def _local(found: Checkpoint) -> Checkpoint:
    if not found.folder.is_dir():
        raise FileNotFoundError(
            f"`model_id` must be an existing folder, a Hub id or 'builtin'; got '{found.folder}', which is no folder. "
            "Check the path."
        )
    if utf8(str(found.folder)) != str(found.folder):  # safetensors does not open it
        raise ValueError(f"`model_id` must be a name in UTF-8; got {str(found.folder)!r}. Rename the folder.")
    if found.find("config.json") is None:
        raise FileNotFoundError(
            f"`model_id` must hold a checkpoint; got '{found.model_id}', which has no config.json. Save one there with "
            "`model.save_pretrained(...)`, or name the folder that has it."
        )
    return replace(found, revision=_digest(found.weights()))


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise OSError(
            f"'{index.name}' must be a safetensors index; it cannot be read ({error}). Fetch it again."
        ) from error


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1 or "\\" in name


def _digest(files: list[Path]) -> str:
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return "sha256:" + (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())
