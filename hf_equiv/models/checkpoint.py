"""A checkpoint by name: resolved once, its files on disk at one revision.

Everything is read from one folder: the local folder, the built-in one, or the snapshot of one Hub commit. So the commit
is resolved exactly once, every file is of that commit, and transformers never talks to the Hub itself (no weights
converted by a bot on another branch, no second revision).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, validate_repo_id
from transformers.utils import logging as transformers_logging

from hf_equiv.hub_client import _explained, version

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).parents[1] / "assets" / "builtin"



# Files of one model repository at one commit, with every failure named together with its cure.


@dataclass(frozen=True, slots=True)
class HubFiles:
    """A repository pinned to the commit it was at when it was resolved.

    Attributes:
        repo_id: `namespace/name`.
        commit: 40 hex digits; every later call uses it.
    """

    repo_id: str
    commit: str
    subfolder: str
    token: str | bool | None
    cache_dir: str | None
    local_files_only: bool

    @classmethod
    def resolve(
        cls,
        repo_id: str,
        *,
        revision: str | None,
        subfolder: str,
        token: str | bool | None,
        cache_dir: str | os.PathLike[str] | None,
        local_files_only: bool,
    ) -> HubFiles:
        """Ask the Hub (or, offline, the cache) once which commit `revision` is."""
        try:
            validate_repo_id(repo_id)
        except hub_errors.HFValidationError as error:
            raise ValueError(
                f"`model_id` must be a Hub id such as 'facebook/deit-tiny-patch16-224', a folder or 'builtin'; got "
                f"{repo_id!r}. Check the spelling."
            ) from error
        cache = os.fspath(cache_dir) if cache_dir is not None else None
        cached_only = local_files_only or constants.HF_HUB_OFFLINE  # else the client warns that it is offline
        with _explained(repo_id, revision, "config.json", local_files_only):
            resolved = _api(token).resolve_revision(
                repo_id, revision=revision, cache_dir=cache, local_files_only=cached_only, token=token
            )
        return cls(repo_id, resolved.resolved, subfolder, token, cache, local_files_only)

    def fetch(self, name: str) -> Path:
        """Return `name` on disk, downloading it when it is not cached."""
        with _explained(self.repo_id, self.commit, name, self.local_files_only):
            return Path(
                hf_hub_download(
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
            )

    def try_fetch(self, name: str) -> Path | None:
        """Return `name` on disk, or None if the repository has no such file (offline: if it is not cached)."""
        try:
            return self.fetch(name)
        except hub_errors.EntryNotFoundError:
            return None

    def fetch_matching(self, endings: tuple[str, ...], exclude: tuple[str, ...] = ()) -> None:
        """Download every file of the subfolder whose name ends in one of `endings`; offline, take what is cached."""
        for name in self._names():
            if name.endswith(endings) and not name.endswith(exclude or "\0"):
                self.try_fetch(name)

    def other_weights(self) -> list[str]:
        """Return the names of weight files in other formats than safetensors."""
        return [name for name in self._names() if name.endswith((".bin", ".h5", ".msgpack", ".ckpt", ".pt", ".pth"))]

    def _names(self) -> list[str]:
        if self.local_files_only or constants.HF_HUB_OFFLINE:
            return []
        with _explained(self.repo_id, self.commit, "its file list", self.local_files_only):
            listed = _api(self.token).list_repo_files(self.repo_id, revision=self.commit, token=self.token)
        prefix = f"{self.subfolder.strip('/')}/" if self.subfolder else ""
        names = (name.removeprefix(prefix) for name in listed if name.startswith(prefix))
        return [name for name in names if "/" not in name]


def _api(token: str | bool | None) -> HfApi:
    return HfApi(library_name="hf_equiv", library_version=version("hf_equiv"), token=token)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of one checkpoint at one revision.

    Attributes:
        model_id: what the user asked for: a Hub id, a folder or "builtin"; only loading uses it, see `name`.
        folder: where config and weights lie on this machine.
        revision: commit sha on the Hub, or "sha256:…" of the weights of a local folder.
        trust_remote_code: whether Python files of the checkpoint may be executed.
        hub: how to fetch further files of the same commit; None for a folder.
    """

    model_id: str
    folder: Path
    revision: str
    trust_remote_code: bool = False
    hub: HubFiles | None = None

    @property
    def name(self) -> str:
        """The name to record: the Hub id, "builtin", or a local folder's own name; never a path of this machine."""
        if self.hub is not None or self.model_id == BUILTIN:
            return self.model_id
        return Path(self.model_id).expanduser().resolve().name or "root"

    def fetch_tokenizer(self) -> None:
        """Make the tokenizer's files of a Hub checkpoint present in `folder`."""
        if self.hub is not None:
            self.hub.fetch_matching((".json", ".txt", ".model"), exclude=(".index.json",))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the load report and progress bar of transformers; both come back on exit."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars_off = are_progress_bars_disabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # which also switches those of the Hub client on
        if hub_bars_off:
            disable_progress_bars()


def find_checkpoint(
    model_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Resolve `model_id` to files on disk at one revision; the weights are fetched by `load_model`.

    Returns:
        The checkpoint; its folder holds config.json.

    Raises:
        ValueError: `model_id` is empty or malformed, or a folder is asked for with a revision.
        FileNotFoundError: the folder does not exist or holds no checkpoint.
        OSError: the Hub's failures by their own names: RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError;
            without network and cache a ConnectionError.
    """
    name = os.fspath(model_id)
    if not name:
        raise ValueError("`model_id` must be a Hub id, a folder or 'builtin'; got an empty string.")
    if name == BUILTIN or os.path.isdir(name) or _looks_like_a_path(name):
        if revision is not None:
            what = "the built-in checkpoint" if name == BUILTIN else "a local folder"
            raise ValueError(f"`revision` must be None for {what}; got {revision!r}. Only Hub ids have revisions.")
        folder = (BUILTIN_FOLDER if name == BUILTIN else Path(name).expanduser()) / subfolder
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`model_id` must be an existing folder, a Hub id or 'builtin'; got '{name}', but there is no folder "
                f"'{folder}'. Check the path."
            )
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"`model_id` must hold a checkpoint; got '{name}', which has no config.json. Save one there with "
                "`model.save_pretrained(...)`, or name the folder that has it."
            )
        return Checkpoint(name, folder, _digest(weight_files(folder, name)), trust_remote_code)
    hub = HubFiles.resolve(
        name,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    folder = hub.fetch("config.json").parent
    return Checkpoint(name, folder, hub.commit, trust_remote_code, hub)


def weight_files(folder: Path, model_id: str) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, or say clearly that there are none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        files = [folder / shard for shard in shard_names(index)]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"`model_id` must be complete; '{model_id}' lacks '{file.name}', which its index names. Fetch it."
                )
        return files
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".h5", ".msgpack", ".ckpt", ".pt", ".pth"))
    raise no_safetensors(model_id, others)


def shard_names(index: Path) -> list[str]:
    """Return the file names that a safetensors index lists, each once, in order."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise OSError(
            f"'{index.name}' must be a safetensors index; it cannot be read ({error}). Fetch it again."
        ) from error


def no_safetensors(model_id: str, others: list[str]) -> FileNotFoundError:
    """Return the error for a checkpoint without safetensors weights."""
    got = f"only {', '.join(others)}" if others else "no weights at all"
    return FileNotFoundError(
        f"`model_id` must hold its weights as safetensors; '{model_id}' has {got}. Pickled weights can run code and "
        "are never loaded: convert them with `model.save_pretrained(...)`, or choose another checkpoint."
    )


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1 or "\\" in name


def _digest(files: list[Path]) -> str:
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return "sha256:" + (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())
