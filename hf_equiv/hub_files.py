"""Files of one model repository at one commit, with every failure named together with its cure."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]

_SAID = ("Repo card metadata block was not found.", "No files matched allow_patterns=")
_SAYING = ("huggingface_hub.repocard", "huggingface_hub._snapshot_download")


@contextmanager
def hushed() -> Iterator[None]:
    """Leave out two warnings of the Hub client: of a card without metadata, and of patterns that no file matches.

    Neither is the user's to mend, and what follows from the second has an error of its own. Its other warnings stay.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_SAID)

    loggers = [logging.getLogger(name) for name in _SAYING]
    for logger in loggers:
        logger.addFilter(wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)


def version(package: str) -> str:
    """Return the installed version of `package`, or "unknown"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


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


def is_missing_revision(error: BaseException) -> bool:
    """Whether the Hub said that a repository has no such revision."""
    return isinstance(error, hub_errors.RevisionNotFoundError)


def _api(token: str | bool | None) -> HfApi:
    return HfApi(library_name="hf_equiv", library_version=version("hf_equiv"), token=token)


@contextmanager
def _explained(repo_id: str, revision: str | None, name: str, local_files_only: bool) -> Iterator[None]:
    """Re-raise what the Hub client raises under the same name, with a message that says what to do."""
    at = f" at revision '{revision}'" if revision else ""
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise _same(
            error,
            f"'{repo_id}' is gated. Ask for access at {constants.ENDPOINT}/{repo_id}, then log in with "
            "`hf auth login` or pass `token`.",
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise _same(
            error,
            f"`model_id` must name a folder or a repository you can read; '{repo_id}' is no folder here, and on the "
            "Hub it does not exist or is private. Check the spelling; for a private one log in with `hf auth login` or "
            "pass `token`.",
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise _same(
            error, f"`revision` must exist in '{repo_id}'; got {revision!r}. Use a branch, a tag or a commit of it."
        ) from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise hub_errors.LocalEntryNotFoundError(_not_cached(repo_id, name, local_files_only)) from error
    except (hub_errors.RevisionResolutionError, hub_errors.OfflineModeIsEnabled, httpx.TransportError) as error:
        raise ConnectionError(_not_cached(repo_id, name, local_files_only)) from error
    except hub_errors.RemoteEntryNotFoundError as error:
        raise _same(
            error,
            f"`model_id` must hold a checkpoint; '{repo_id}'{at} has no file '{name}'. Check the id and `subfolder`.",
        ) from error
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        cure = "Log in again with `hf auth login`, or pass `token=False`." if status == 401 else "Try again later."
        raise _same(error, f"The Hub refused '{name}' of '{repo_id}' (HTTP {status}). {cure}") from error


def _same(error: hub_errors.HfHubHTTPError, message: str) -> hub_errors.HfHubHTTPError:
    return type(error)(message, response=error.response)


def _not_cached(repo_id: str, name: str, local_files_only: bool) -> str:
    if constants.HF_HUB_OFFLINE:
        why, cure = "HF_HUB_OFFLINE=1 is set", "Unset it once to fetch the checkpoint"
    elif local_files_only:
        why, cure = "`local_files_only=True`", "Run once without it to fetch the checkpoint"
    else:
        why, cure = f"{constants.ENDPOINT} cannot be reached", "Check the network"
    return (
        f"'{repo_id}' is no folder here; of the Hub's '{repo_id}', '{name}' is not in the cache and {why}. {cure}, or "
        "pass a local folder or 'builtin'."
    )
