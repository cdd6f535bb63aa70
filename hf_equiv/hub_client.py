"""Create the Hub client, repeat requests that failed temporarily, and explain failures and their cure."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import httpx, parse_ratelimit_headers, validate_repo_id
from huggingface_hub.utils.sha import git_hash

from hf_equiv.formatting import excerpt

T = TypeVar("T")
Say = Callable[[str], None]

WAITS = (1.0, 2.0, 4.0, 8.0, 8.0, 16.0)  # seconds between tries
RevisionNotFoundError = hub_errors.RevisionNotFoundError  # for folders that do not import huggingface_hub

_LONGEST_WAIT = 310.0  # seconds; the window of a rate limit is five minutes
_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
_ANSWERED = (hub_errors.HfHubHTTPError, httpx.HTTPStatusError)
_CUT = (httpx.RequestError, ConnectionError, TimeoutError)
_MISREAD = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
_WORDS = {"dataset": "dataset", "space": "Space", "model": "model"}
_PROPOSE = "To propose the results to the owner of a dataset that exists, pass `create_pr=True`."
_WRITE_TOKEN = f"Make a write token at {constants.ENDPOINT}/settings/tokens"
_LOG_IN = "Log in to the network, or correct HTTPS_PROXY or HF_ENDPOINT, and try again"
_DONE = {"dataset": "published", "space": "deployed"}
_BOUND = ("Try again, or through another network; what was uploaded already is not sent twice.",
          "The file is too large for that network: try another one.")  # fmt: skip
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_STRAY = ("Repo card metadata block was not found.", "No files matched allow_patterns=")


@contextmanager
def hushed() -> Iterator[None]:
    """Silence two warnings that the user cannot fix: a card without metadata, and patterns that match no file."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_STRAY)

    loggers = [logging.getLogger(f"huggingface_hub.{name}") for name in ("repocard", "_snapshot_download")]
    with ExitStack() as stack:
        for logger in loggers:
            logger.addFilter(wanted)
            stack.callback(logger.removeFilter, wanted)
        yield


def version(package: str) -> str:
    """Return the installed version of `package`, or "unknown"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def api_of(token: str | bool | None) -> HfApi:
    """Return a client that identifies itself as hf_equiv."""
    return HfApi(library_name="hf_equiv", library_version=version("hf_equiv"), token=token)


def check_repo_id(repo_id: str, kind: str, *, otherwise: str, argument: str = "repo_id") -> str:
    """Return the `USER/NAME` of a dataset, space or model; the error for another kind says `otherwise`."""
    name = repo_id.removeprefix(f"{kind}s/") if repo_id.count("/") == 2 else repo_id
    wanted = f"`{argument}` must be the name of a {_WORDS[kind]}, USER/NAME; got {repo_id!r}."
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
    """Raise `LocalTokenNotFoundError` if there is no token to write with."""
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise hub_errors.LocalTokenNotFoundError(
            f"{what} needs a token of the Hub and there is none. Log in with `hf auth login`, or set HF_TOKEN."
        )


def patiently(call: Callable[[], T], say: Say, what: str, waits: Sequence[float] = WAITS) -> T:
    """Make a call that is safe to repeat, again after 409, 412, 429, 5xx and cut connections; return its result."""
    for wait in waits:
        try:
            return call()
        except Exception as error:
            if not passes(error):
                raise
            pause(error, wait, say, what)
    return call()


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return the result of a call, or raise a TimeoutError after `seconds`: the Hub client has no time limit."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()  # a thread that the exit of Python does not wait for
    return future.result(seconds)


def pause(error: BaseException, wait: float, say: Say, what: str) -> None:
    """Wait as long as the Hub asks (`RateLimit: "api";r=0;t=37`, or `Retry-After: 37`), else `wait` seconds."""
    answer = _answer(error)
    headers = {} if answer is None else answer.headers
    limit, after = parse_ratelimit_headers(headers), headers.get("Retry-After", "").strip()
    asked = limit.reset_in_seconds if limit else int(after) if after.isdecimal() else 0
    seconds = min(max(wait, asked + 1), _LONGEST_WAIT)
    say(f"{what}: {brief(error)}; again in {seconds:.0f} s")
    time.sleep(seconds)


def passes(error: BaseException) -> bool:
    """Return whether the same call may succeed at the next try."""
    for cause in _causes(error):
        if isinstance(cause, _ANSWERED):
            return cause.response.status_code in _PASSING
        if isinstance(cause, hub_errors.OfflineModeIsEnabled | hub_errors.LocalTokenNotFoundError):
            return False
        if isinstance(cause, _CUT):
            return True
    return False


def brief(error: BaseException) -> str:
    """Return a failure in a few words, without addresses or tokens."""
    answer = _answer(error)
    if answer is not None:
        return f"{'storage' if _is_of_storage(answer) else 'the Hub'} answered {answer.status_code}"
    if said := misread(error):
        return f"{constants.ENDPOINT} answered with {said}, as a proxy or the login page of a network does"
    return "the connection was cut" if passes(error) else type(error).__name__


def link_expired(error: BaseException) -> bool:
    """Return whether storage refused a link, which expires after a while; the Hub makes a new one when asked again."""
    answer = _answer(error)
    return answer is not None and answer.status_code in (400, 401, 403) and _is_of_storage(answer)


def _is_of_storage(answer: Any) -> bool:
    """Return whether an answer came from the storage of files, whose links carry their own permission."""
    url, method = answer.request.url, answer.request.method
    elsewhere = not str(url).startswith(f"{constants.ENDPOINT}/")
    return elsewhere or (method == "PUT" and not url.path.startswith("/api/"))


def misread(error: BaseException) -> str | None:
    """Describe an answer that the Hub client could not read; None for other failures."""
    for cause in _causes(error):
        names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(cause.__traceback__)]
        last = next((name for name in reversed(names) if name.startswith(("hf_equiv.", "huggingface_hub."))), "")
        read = last.startswith("huggingface_hub.")
        if isinstance(cause, hub_errors.FileMetadataError) or (read and isinstance(cause, json.JSONDecodeError)):
            return "a web page"
        if read and type(cause) in _MISREAD and _answer(error) is None:
            return f"JSON that no Hub sends ({type(cause).__name__}: {excerpt(cause)})"
    return None


def checked(fetch: Callable[[], T], repo_id: str, kind: str, cache_dir: Any = None) -> T:
    """Download files by `fetch`, and again if one is not the file that the Hub names, or if a link has expired."""
    # The cache names each file by its SHA-256 or its git id. Files that were there before are not read.
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    repository = cache / repo_folder_name(repo_id=repo_id, repo_type=kind)
    damaged: list[Path] = []
    for tries_left in (2, 1, 0):
        before = _blobs(repository)
        try:
            result = fetch()
        except Exception as error:
            damaged = [path for path in _blobs(repository) - before if not _is_whole(path)]
            cut_short = isinstance(error, OSError) and "Consistency check failed" in str(error)
            if not (damaged or cut_short or (tries_left and link_expired(error))):
                raise
        else:
            damaged = [path for path in _blobs(repository) - before if not _is_whole(path)]
            if not damaged:
                return result
        names = {path.name for path in damaged}
        links = [link.name for link in (repository / "snapshots").rglob("*") if link.resolve().name in names]
        for path in damaged:
            path.unlink()
    told = f"{links[0] if links else 'a file'!r} of '{repo_id}' arrived damaged three times"
    raise OSError(f"{told}: it is not as the Hub states. A proxy or the network changes files: try another one.")


def _blobs(repository: Path) -> set[Path]:
    """Return the downloaded files of a repository, each named by its digest."""
    return {path for path in (repository / "blobs").glob("*") if _DIGEST.fullmatch(path.name)}


def _is_whole(path: Path) -> bool:
    """Return whether the name of a file is its SHA-256, git id, or (on some mirrors) SHA-1."""
    if len(path.name) == 40:
        data = path.read_bytes()
        return path.name in (git_hash(data), hashlib.sha1(data).hexdigest())
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == path.name


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _answer(error: BaseException) -> Any | None:
    return next((cause.response for cause in _causes(error) if isinstance(cause, _ANSWERED)), None)


@contextmanager
def explained(
    repo_id: str, *, kind: str = "dataset", revision: str | None = None, write: bool = False, dry_run: bool = False,
    token: str | bool | None = None, file: str | None = None, local_files_only: bool = False,
) -> Iterator[None]:  # fmt: skip
    """Re-raise failures of the Hub client about a repository (or its `file`) in the same class, with the cure."""
    try:
        yield
    except hub_errors.LocalTokenNotFoundError:
        raise
    except hub_errors.HfHubHTTPError as error:
        told = _refused(error, repo_id, kind, revision, file, token, write=write)
        raise type(error)(told, response=error.response) from error
    except (
        hub_errors.LocalEntryNotFoundError, hub_errors.RevisionResolutionError, RuntimeError, *_MISREAD, *_CUT,
    ) as error:  # fmt: skip
        answer, unread, failed = _answer(error), misread(error), isinstance(error, RuntimeError)
        lasts = failed and unread is None and not passes(error)  # the client wraps a failed upload
        if (type(error) in _MISREAD and unread is None) or (lasts and not write and answer is None):
            raise
        if lasts:
            said = excerpt(getattr(error.__cause__, "server_message", None) or "")
            why = "the upload failed" if answer is None else brief(error)
            told = f"'{repo_id}' was not {_DONE[kind]}: {why}{f' ({said})' if said else ''}. {excerpt(error)}"
            raise OSError(f"{told} {_BOUND[answer is not None and answer.status_code == 413]}") from error
        known = failed or answer is not None or unread is not None
        why = brief(error) if known else f"{constants.ENDPOINT} cannot be reached"
        told = _unreachable(repo_id, kind, file, why, write=write, dry_run=dry_run, local_files_only=local_files_only)
        local = isinstance(error, hub_errors.LocalEntryNotFoundError)
        raise (hub_errors.LocalEntryNotFoundError if local else ConnectionError)(told) from error
    except OSError as error:
        if error.filename is None or (write and not Path(error.filename).is_relative_to(constants.HF_HOME)):
            raise
        raise unusable_cache(error) from error


def unusable_cache(error: OSError) -> OSError:
    """Return the error for a cache that cannot be written or read."""
    told = f"the cache of downloads cannot be used: {error.strerror}: {str(error.filename)!r}"
    return OSError(f"{told}. Set HF_HOME, or pass `cache_dir`, to a folder that can be written.")


def _refused(
    error: hub_errors.HfHubHTTPError, repo_id: str, kind: str, revision: str | None, file: str | None, token: Any, *,
    write: bool,
) -> str:  # fmt: skip
    """Return advice for an error response of the Hub."""
    status, word = error.response.status_code, _WORDS[kind]
    said = excerpt(error.server_message or "", 300).rstrip(".")
    told = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if not said and "html" in error.response.headers.get("Content-Type", "") and not passes(error):
        return f"the Hub refused the request for '{repo_id}' ({told}: a web page, as of a proxy). {_LOG_IN}."
    if isinstance(error, hub_errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"
        return f"'{repo_id}' is gated. Ask for access at {page}, then log in with `hf auth login`."
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"`revision` must exist in the {word} '{repo_id}'; got {revision!r}. Use a branch, tag or commit."
    missing_file = isinstance(error, hub_errors.RemoteEntryNotFoundError)
    if missing_file and kind == "model":
        at = f" at revision '{revision}'" if revision else ""
        return f"`model_id` must hold a checkpoint; '{repo_id}'{at} has no file '{file}'. Check the id and `subfolder`."
    if isinstance(error, hub_errors.RepositoryNotFoundError) or (status == 404 and not missing_file and not write):
        return _not_found(repo_id, kind)
    if status == 401:
        return "the Hub does not accept the token. Log in again with `hf auth login`, or set HF_TOKEN to a valid one."
    if status == 403 and write:
        return f"you may not write to '{repo_id}': {_why_forbidden(repo_id, kind, said or 'forbidden', token)}"
    if status == 402 and kind == "space":
        return (
            f"the Hub wants to be paid for '{repo_id}' ({told}). Free accounts get `hardware='cpu-basic'`, and some no "
            "Gradio Space at all: then deploy from a PRO account or a paying organisation."
        )
    if _is_of_storage(error.response):
        return f"storage refused a file of '{repo_id}' ({told}). Try again, or through another network."
    if passes(error):
        return f"the Hub did not answer for '{repo_id}' (HTTP {status}). Try again later."
    return f"the Hub refused the request for '{repo_id}' ({told}). Correct what it names, or try again later."


def _not_found(repo_id: str, kind: str) -> str:
    for other in _WORDS.keys() - {kind}:
        with suppress(OSError, httpx.HTTPError):
            if api_of(None).repo_exists(repo_id, repo_type=other):
                return f"'{repo_id}' is a {_WORDS[other]} of the Hub, not a {kind}. Name a {kind}."
    return (
        f"'{repo_id}' is no folder here, and on the Hub there is no such {kind} or it is private. Check the spelling; "
        "for a private one log in with `hf auth login`, or set HF_TOKEN."
    )


def _why_forbidden(repo_id: str, kind: str, said: str, token: str | bool | None) -> str:
    try:
        why = why_not(repo_id, kind, api_of(token).whoami())
    except (OSError, httpx.HTTPError):
        return f"the Hub says: {said}. {_PROPOSE if kind == 'dataset' else ''}".rstrip()
    return why or f"the token lacks that right ({said}). {_WRITE_TOKEN}."


def why_not(repo_id: str, kind: str, me: dict[str, Any]) -> str:
    """Return why the user `me` of `whoami` may not write there: token, owner or role; "" if none forbids it."""
    propose, use = (f" {_PROPOSE}", "Publish as") if kind == "dataset" else ("", "Deploy to")
    owner, user = repo_id.split("/")[0], me.get("name", "USER")
    roles = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return f"the token can only read. {_WRITE_TOKEN} and log in with it: `hf auth login`."
    if owner == user or roles.get(owner) in ("write", "admin"):
        return ""
    if owner in roles:
        return f"your role in '{owner}' is '{roles[owner]}'. Ask its owners for the role 'write'.{propose}"
    return f"'{owner}' is neither you nor an organisation of yours. {use} '{user}/NAME'.{propose}"


def _unreachable(
    repo_id: str, kind: str, file: str | None, why: str, *, write: bool, dry_run: bool, local_files_only: bool
) -> str:
    cure = "Check the network and try again"
    if "answered with" in why:
        cure = _LOG_IN
    if constants.HF_HUB_OFFLINE:
        why, cure = "HF_HUB_OFFLINE=1 is set", "Unset it"
    elif local_files_only:
        why, cure = "`local_files_only=True`", "Run once without it"
    if dry_run:
        return f"'{repo_id}' could not be looked at: {why}. {cure}; nothing was written."
    if write:
        return f"'{repo_id}' was not {_DONE[kind]}: {why}. {cure}; what was uploaded already is not sent twice."
    missing = "its files are not all" if file is None else f"its file '{file}' is not"
    other = "the path or the name" + (", or pass a local folder or 'builtin'" if kind == "model" else "")
    told = f"'{repo_id}' is no folder here, {missing} in the cache, and {why}"
    return f"{told}. Correct {other}, or {cure[0].lower()}{cure[1:]}."
