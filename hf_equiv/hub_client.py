"""Calls to the Hub: patient with what passes, and every failure named together with its cure."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx, validate_repo_id

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


def is_missing_revision(error: BaseException) -> bool:
    """Whether the Hub said that a repository has no such revision."""
    return isinstance(error, hub_errors.RevisionNotFoundError)


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


S = TypeVar("S")


T = TypeVar("T")


Say = Callable[[str], None]


WAITS = (1.0, 2.0, 4.0, 8.0, 8.0, 16.0)
"""Seconds between tries."""


WORDS = {"dataset": "dataset", "space": "Space", "model": "model"}
"""What kinds of repository are called."""


NOT_ACCEPTED = "the Hub does not accept the token. Log in again with `hf auth login`, or set HF_TOKEN to a valid one."


LONGEST_WAIT = 310.0
"""The most that a rate limit is waited for: its window is five minutes."""


_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}


_PROPOSE = "To propose the results to the owner of a dataset that exists, pass `create_pr=True`."


_CUT = (httpx.TransportError, ConnectionError, TimeoutError)


def api_of(token: str | bool | None) -> HfApi:
    """A client that says who it is."""
    return HfApi(library_name="hf_equiv", library_version=version("hf_equiv"), token=token)


def check_dataset_id(repo_id: str) -> str:
    """Refuse what cannot be the name of a dataset; returns `USER/NAME`, without a leading `datasets/`."""
    return check_repo_id(repo_id, "dataset", otherwise="results are published as datasets")


def check_repo_id(repo_id: str, kind: str, *, otherwise: str, argument: str = "repo_id") -> str:
    """Refuse what cannot be the name of a repository of this kind.

    Args:
        repo_id: what was given.
        kind: `dataset`, `space` or `model`.
        otherwise: said of the name of a repository of another kind.
        argument: what the caller calls it.

    Returns:
        `USER/NAME`, without a leading `datasets/`, `spaces/` or `models/`.

    Raises:
        ValueError: it is no such name.
    """
    name = repo_id.removeprefix(f"{kind}s/") if repo_id.count("/") == 2 else repo_id
    wanted = f"`{argument}` must be the name of a {WORDS[kind]}, USER/NAME; got {repo_id!r}."
    if name.count("/") == 2 and name.startswith(("spaces/", "models/", "datasets/")):
        raise ValueError(f"{wanted} That is a {name.split('/')[0][:-1]}: {otherwise}.")
    try:
        validate_repo_id(name)
    except hub_errors.HFValidationError:
        raise ValueError(f"{wanted} Use letters, digits, '-', '_' and '.', 96 at most.") from None
    if name.count("/") != 1:
        raise ValueError(f"{wanted} Put your user name or organisation before it.")
    return name


def require_token(token: str | bool | None, what: str = "publishing") -> None:
    """Refuse to write without a token.

    Args:
        token: as it was given; None for the one of the login.
        what: what needs it.

    Raises:
        LocalTokenNotFoundError: there is none.
    """
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise hub_errors.LocalTokenNotFoundError(
            f"{what} needs a token of the Hub and there is none. Log in with `hf auth login`, or set HF_TOKEN."
        )


def patiently(call: Callable[[], T], say: Say, what: str) -> T:
    """Make a call that may be repeated, again after what passes: 409, 412, 429, 5xx, cut connections.

    Args:
        call: what to do.
        say: told before each wait.
        what: the call in words.

    Returns:
        What the call returns; its last error is raised when no try was left.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not passes(error):
                raise
            pause(error, wait, say, what)
    return call()


def persist(look: Callable[[], S], attempt: Callable[[S], T], say: Say, what: str) -> T:
    """Look how things stand and act upon it until it is done, looking anew after each failure that may pass.

    So a commit whose answer was lost is found, and one that somebody else has made in between is built upon.

    Args:
        look: reads the state; patient by itself.
        attempt: acts on a state, and is done when it returns.
        say: told before each wait.
        what: the attempt in words.

    Returns:
        What the attempt returns; its last error is raised when no try was left.
    """
    for wait in WAITS:
        state = look()
        try:
            return attempt(state)
        except Exception as error:
            if not passes(error):
                raise
            pause(error, wait, say, what)
    return attempt(look())


def pause(error: BaseException, wait: float, say: Say, what: str) -> None:
    """Wait as long as the Hub asks, else `wait` seconds."""
    seconds = min(max(wait, _asked_wait(error)), LONGEST_WAIT)
    say(f"{what}: {brief(error)}; again in {seconds:.0f} s")
    time.sleep(seconds)


def passes(error: BaseException) -> bool:
    """Whether the failure may be gone at the next try."""
    for cause in _causes(error):
        if isinstance(cause, hub_errors.HfHubHTTPError | httpx.HTTPStatusError):
            return cause.response.status_code in _PASSING
        if isinstance(cause, hub_errors.OfflineModeIsEnabled | hub_errors.LocalTokenNotFoundError):
            return False
        if isinstance(cause, _CUT):
            return True
    return False


def brief(error: BaseException) -> str:
    """A failure in a few words, without addresses or tokens."""
    status = status_of(error)
    if status is not None:
        return f"the Hub answered {status}"
    return "the connection was cut" if passes(error) else type(error).__name__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, if there is one."""
    for cause in _causes(error):
        if isinstance(cause, hub_errors.HfHubHTTPError | httpx.HTTPStatusError):
            return int(cause.response.status_code)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _asked_wait(error: BaseException) -> float:
    """Seconds that a rate limit asks for: `RateLimit: "api";r=0;t=37`, or `Retry-After: 37`."""
    for cause in _causes(error):
        if isinstance(cause, hub_errors.HfHubHTTPError | httpx.HTTPStatusError):
            headers = cause.response.headers
            found = re.search(r"\bt=(\d+)", headers.get("RateLimit", "")) or re.fullmatch(
                r"\s*(\d+)\s*", headers.get("Retry-After", "")
            )
            return float(found[1]) + 1 if found else 0.0
    return 0.0


@contextmanager
def explained(
    repo_id: str, *, kind: str = "dataset", revision: str | None = None, write: bool = False,
    token: str | bool | None = None,
) -> Iterator[None]:  # fmt: skip
    """Re-raise what the Hub client raises about a repository under the same name, and say what to do."""
    try:
        yield
    except hub_errors.LocalTokenNotFoundError:
        raise
    except hub_errors.GatedRepoError as error:
        told = (
            f"'{repo_id}' is gated. Ask for access at {constants.ENDPOINT}/{kind}s/{repo_id}, then log in with "
            "`hf auth login`."
        )
        raise _same(error, told) from None
    except hub_errors.RepositoryNotFoundError as error:
        raise _same(error, _not_found(repo_id, kind, write=write)) from None
    except hub_errors.RevisionNotFoundError as error:
        told = f"`revision` must exist in the {WORDS[kind]} '{repo_id}'; got {revision!r}. Use a branch, tag or commit."
        raise _same(error, told) from None
    except hub_errors.HfHubHTTPError as error:
        raise _same(error, _refused(repo_id, kind, error, token, write=write)) from None
    except hub_errors.LocalEntryNotFoundError as error:
        raise hub_errors.LocalEntryNotFoundError(_unreachable(repo_id, kind, write=write)) from error
    except (hub_errors.OfflineModeIsEnabled, *_CUT) as error:
        raise ConnectionError(_unreachable(repo_id, kind, write=write)) from error
    except RuntimeError as error:  # what the client raises about an upload, around the cause
        if not passes(error):
            raise
        raise ConnectionError(_unreachable(repo_id, kind, write=write, cause=brief(error))) from error


def _not_found(repo_id: str, kind: str, *, write: bool) -> str:
    if write:
        return (
            f"`repo_id` must be a {WORDS[kind]} that you can see; the Hub shows you none at '{repo_id}'. Check the "
            "name; for a private one log in with `hf auth login`."
        )
    other = _other_kind(repo_id)
    if other is not None:
        return f"'{repo_id}' is a {other} of the Hub, not a dataset. Name the dataset that the results are in."
    return (
        f"'{repo_id}' is no folder here, and on the Hub there is no such dataset or it is private. Check the spelling; "
        "for a private one log in with `hf auth login`, or set HF_TOKEN."
    )


def _other_kind(repo_id: str) -> str | None:
    api = api_of(None)
    for kind, word in (("model", "model"), ("space", "Space")):
        try:
            if api.repo_exists(repo_id, repo_type=kind):
                return word
        except (OSError, httpx.HTTPError):
            return None
    return None


def _refused(repo_id: str, kind: str, error: hub_errors.HfHubHTTPError, token: Any, *, write: bool) -> str:
    status = error.response.status_code
    said = " ".join((error.server_message or "").split()).rstrip(".")
    if status == 401:
        return NOT_ACCEPTED
    if status == 403 and write:
        return f"you may not write to '{repo_id}': {_why_forbidden(repo_id, kind, said, token)}"
    if status == 402 and kind == "space":
        return (
            f"the Hub wants to be paid for '{repo_id}' (HTTP 402{': ' + said if said else ''}). Free accounts get "
            "`hardware='cpu-basic'`, and some no Gradio Space at all: then deploy from a PRO account or a paying "
            "organisation."
        )
    if passes(error):
        return f"the Hub did not answer for '{repo_id}' in {len(WAITS) + 1} tries (HTTP {status}). Try again later."
    return f"the Hub refused the request for '{repo_id}' (HTTP {status}{': ' + said if said else ''})."


def _why_forbidden(repo_id: str, kind: str, said: str, token: str | bool | None) -> str:
    """Token, role or owner: the Hub tells whose token it is and what that may do."""
    try:
        me = api_of(token).whoami()
    except (OSError, httpx.HTTPError):
        return f"the Hub says: {said or 'forbidden'}. {_PROPOSE if kind == 'dataset' else ''}".rstrip()
    told = f"the token lacks that right ({said or 'forbidden'}). Make a write token at"
    return why_not(repo_id, kind, me) or f"{told} {constants.ENDPOINT}/settings/tokens."


def why_not(repo_id: str, kind: str, me: dict[str, Any]) -> str:
    """Why the user whom `whoami` names may not write there, by token, owner or role; "" where none of them says so."""
    propose, use = (_PROPOSE, "Publish as") if kind == "dataset" else ("", "Deploy to")
    owner, tokens = repo_id.split("/")[0], f"{constants.ENDPOINT}/settings/tokens"
    user, roles = me["name"], {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return f"the token can only read. Make a write token at {tokens} and log in with it: `hf auth login`."
    if owner == user or roles.get(owner) in ("write", "admin"):
        return ""
    if owner in roles:
        return f"your role in '{owner}' is '{roles[owner]}'. Ask its owners for the role 'write'. {propose}".rstrip()
    return f"'{owner}' is neither you nor an organisation of yours. {use} '{user}/NAME'. {propose}".rstrip()


def _unreachable(repo_id: str, kind: str, *, write: bool, cause: str = "") -> str:
    if constants.HF_HUB_OFFLINE:
        why, cure = "HF_HUB_OFFLINE=1 is set", "Unset it"
    else:
        why, cure = cause or f"{constants.ENDPOINT} cannot be reached", "Check the network and try again"
    if write:
        done = "deployed" if kind == "space" else "published"
        return f"'{repo_id}' was not {done}: {why}. {cure}; what was uploaded already is not sent twice."
    return f"'{repo_id}' is no folder here, its files are not all in the cache, and {why}. {cure}."
