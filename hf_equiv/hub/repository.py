"""Read a dataset or Space of the Hub at one commit, and change it whole or not at all in one commit."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import CommitInfo, RepoFile
from huggingface_hub.utils.sha import git_hash

from hf_equiv.formatting import many
from hf_equiv.hub_client import WAITS, Say, checked, explained, link_expired, passes, patiently, pause, within
from hf_equiv.runs.shards import sha256_file

T = TypeVar("T")
Progress = Callable[[int, int, str], None]  # receives (bytes sent, bytes in total, what is being done)

MAIN = "main"
_PATIENCE = 5.0  # seconds in which the Hub must answer a dry run
_GROUP_BYTES = 50_000_000  # bytes uploaded between two reports of progress


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository of the Hub and the client that reaches it."""

    api: HfApi
    repo_id: str
    kind: str  # `dataset`, `space` or `model`
    progress: Progress
    waits: Sequence[float] = WAITS  # seconds between tries

    @property
    def url(self) -> str:
        """The page of the repository."""
        return f"{constants.ENDPOINT}/{self.kind}s/{self.repo_id}"

    def say(self, text: str) -> None:
        """Report what is being done."""
        self.progress(0, 0, text)

    def call(self, what: str, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Make a call that is safe to repeat, and return its result. Report `what` before each repetition."""
        return patiently(partial(function, *arguments, **options), self.say, what, self.waits)

    def info(self, revision: str | None = None) -> Any:
        """Return the description of the repository at a revision."""
        ask = self.api.repo_info
        return self.call(f"asking for {self.kind}", ask, self.repo_id, repo_type=self.kind, revision=revision)

    def find(self) -> Any | None:
        """Return the description of the repository; None if there is none or the user may not see it."""
        try:
            return self.info()
        except hub_errors.GatedRepoError:
            raise
        except hub_errors.RepositoryNotFoundError:
            return None

    def why_unchecked(self) -> str | None:
        """Return why the Hub cannot be asked in a dry run, which needs no network; None if it answers."""
        try:
            with explained(self.repo_id, kind=self.kind, write=True, dry_run=True):
                within(_PATIENCE, self.find)
        except ConnectionError as error:
            return str(error)
        except hub_errors.HfHubHTTPError as error:
            return str(error) if passes(error) else None
        return None

    def set_private(self, private: bool) -> None:
        """Set the visibility."""
        what, change = ("making private" if private else "making public"), self.api.update_repo_settings
        self.call(what, change, self.repo_id, private=private, repo_type=self.kind)

    def files(self, head: str) -> dict[str, str]:
        """Return the paths at a commit, each with the SHA-256 of an LFS object or the git id of a plain file."""

        def read() -> dict[str, str]:
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=head, repo_type=self.kind)
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
            return {file.path: file.blob_id if file.lfs is None else file.lfs.sha256 for file in files}

        return self.call(f"reading the {self.kind}", read)

    def text(self, path: str, head: str) -> str:
        """Return the text of a file at a commit."""
        fetch = partial(self.api.hf_hub_download, self.repo_id, path, repo_type=self.kind, revision=head)
        local = self.call(f"reading {path}", checked, fetch, self.repo_id, self.kind)
        return Path(local).read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at a commit."""

    head: str | None = None  # None for a repository that is yet to be made
    files: Mapping[str, str] = field(default_factory=dict)  # as from `Remote.files`
    card: str | None = None  # README.md
    proposed: tuple[str, str] | None = None  # (commit, address) of an open pull request with the planned content


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file of the planned repository."""

    path: str
    content: Path | bytes  # its place on disk, or its bytes
    size: int
    sha256: str

    @property
    def data(self) -> bytes:
        """The content."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def is_in(self, there: Mapping[str, str]) -> bool:
        """Return whether a repository has the file with this content."""
        held = there.get(self.path)
        if held is None or held == self.sha256:
            return held is not None
        return held == git_hash(self.data)

    def addition(self) -> CommitOperationAdd:
        """Return the operation that uploads the file; refuse a file that has changed since it was planned."""
        made = CommitOperationAdd(self.path, self.content if isinstance(self.content, bytes) else str(self.content))
        if made.upload_info.sha256.hex() != self.sha256:
            raise ValueError(f"{self.path} changed while it was published. Wait until nothing writes it; try again.")
        return made


def staged(path: str, content: Path | bytes | str, sha256: str | None = None) -> StagedFile:
    """Return a file to publish; a known `sha256` of a file on disk saves reading it."""
    if isinstance(content, Path):
        return StagedFile(path, content, content.stat().st_size, sha256 or sha256_file(content))
    data = content.encode() if isinstance(content, str) else content
    return StagedFile(path, data, len(data), hashlib.sha256(data).hexdigest())


S = TypeVar("S", bound=Snapshot)


@dataclass(frozen=True)
class Change(Generic[S]):
    """One commit that brings a repository to the planned state."""

    there: S  # the repository that it was planned on
    files: Sequence[StagedFile]  # all files of the planned state
    deleted: Sequence[str]
    title: str
    note: str = ""  # text below the title

    @cached_property
    def added(self) -> tuple[StagedFile, ...]:
        """The files that the repository lacks or has with other content."""
        return tuple(file for file in self.files if not file.is_in(self.there.files))

    @property
    def empty(self) -> bool:
        """Whether the repository is as planned."""
        return not self.added and not self.deleted


@dataclass(frozen=True, slots=True)
class Done(Generic[S]):
    """The result of `commit_until_done`."""

    change: Change[S]
    commit: str  # the commit that holds the planned state
    pr_url: str | None
    sent: bool  # whether this call made the commit


def commit_until_done(
    look: Callable[[], S], plan: Callable[[S], Change[S]], send: Callable[[Change[S]], CommitInfo], say: Say
) -> Done[S]:
    """Read the repository, plan the commit and send it, until the repository is as planned or all tries have failed."""
    # After each failure that may pass, look and plan anew. If the answer to a commit was lost, this finds the commit
    # and does not repeat it. If somebody else has committed, it commits on top of that. `look` repeats its requests.
    tried: Change[S] | None = None
    waits = iter(WAITS)
    while True:
        there = look()
        change = plan(there)
        if change.empty:
            return Done(tried or change, str(there.head), None, tried is not None)
        if there.proposed is not None:
            return Done(change, *there.proposed, tried is not None)
        tried = change
        try:
            made = send(change)
        except Exception as error:
            wait = next(waits, None)
            if wait is None or not passes(error):
                raise
            pause(error, wait, say, "committing")
        else:
            return Done(change, made.oid, made.pr_url, True)


def send(remote: Remote, change: Change[Any], *, revision: str = MAIN, create_pr: bool = False) -> CommitInfo:
    """Upload the files of a change, then make its one commit on top of the commit that it was planned on."""
    told = many(len(change.added), "file")
    remote.progress(0, 0, f"preparing {told}")
    additions = {file.path: file.addition() for file in change.added}
    total, sent = sum(file.size for file in change.added), 0
    group: list[StagedFile] = []
    for file in change.added:
        group.append(file)
        if sum(one.size for one in group) < _GROUP_BYTES and file is not change.added[-1]:
            continue
        remote.progress(sent, total, f"uploading {told}")
        upload = partial(
            remote.api.preupload_lfs_files, remote.repo_id, [additions[file.path] for file in group],
            repo_type=remote.kind, revision=revision, create_pr=create_pr, free_memory=False,
            gitignore_content="",  # the owner's .gitignore must not leave out a part of a run
        )  # fmt: skip
        try:
            upload()
        except RuntimeError as error:
            if not link_expired(error):
                raise
            upload()  # asks for new links
        sent += sum(file.size for file in group)
        group = []
    remote.progress(total, total, f"committing {many(len(change.added) + len(change.deleted), 'file')}")
    deletions = [CommitOperationDelete(path, is_folder=False) for path in change.deleted]
    with warnings.catch_warnings():  # the app of a Space contains data files
        warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
        return remote.api.create_commit(
            remote.repo_id, [*additions.values(), *deletions], commit_message=change.title,
            commit_description=change.note, repo_type=remote.kind, revision=revision, create_pr=create_pr,
            parent_commit=change.there.head,
        )  # fmt: skip
