"""One publication: make the dataset if it is missing, commit until it is done, say what was done."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors

from hf_equiv.hub.licences import FREE, PhotoRights, how_to_change, photo_rights
from hf_equiv.hub.repository import KIND, Change, Progress, Repository, StagedFile, plan_change, read_repository, send
from hf_equiv.hub_client import (
    NOT_ACCEPTED,
    api_of,
    check_dataset_id,
    explained,
    patiently,
    persist,
    require_token,
    status_of,
    why_not,
)
from hf_equiv.runs.directory import CARD, LocalRun, is_withheld, read_run

T = TypeVar("T")


MAIN = "main"


@dataclass(frozen=True, slots=True)
class Published:
    """What `publish_results` did, or with `dry_run` would do.

    Attributes:
        repo_id: the dataset.
        url: its address.
        run: name of the run in it, ANALYSIS-MODELSLUG-HASH8.
        place: "" when it is at the root of the dataset, else `runs/NAME`.
        changed: whether there was anything to commit.
        commit: the commit that holds the run; None in a dry run.
        revision: branch, or ref of the pull request, that it is on.
        pr_url: address of the pull request, if one was opened.
        private: visibility of the dataset afterwards; None where it is somebody else's to know.
        photos: whether the photos are in.
        license: identifier of their licence, if it is known.
        why: why the photos are in or out.
        how_to_change: what to pass for the opposite.
        files: number of files of the run, with the card.
        bytes: their size.
        uploaded: (path, bytes) of those that were not there yet.
        deleted: paths of an earlier version that the commit removes.
        card: text of the dataset's README.md.
        collection: slug of the collection that the dataset was added to.
        collection_private: whether only you can see that collection; a new one is private.
        dry_run: whether nothing was written.
        refused: of a dry run, why the Hub would refuse the publication; None where nothing is known to speak against
            it, and where there is nothing to commit.
    """

    repo_id: str
    url: str
    run: str
    place: str
    changed: bool
    commit: str | None
    revision: str
    pr_url: str | None
    private: bool | None
    photos: bool
    license: str | None
    why: str
    how_to_change: str
    files: int
    bytes: int
    uploaded: tuple[tuple[str, int], ...]
    deleted: tuple[str, ...]
    card: str
    collection: str | None = None
    collection_private: bool | None = None
    dry_run: bool = False
    refused: str | None = None


@dataclass(frozen=True)
class Publication:
    """One run on its way into one dataset.

    Attributes:
        api: client.
        repo_id: `USER/NAME`.
        run: what is published.
        rights: whether its photos go along.
        revision: branch, or `refs/pr/N`.
        create_pr: open a pull request on that branch instead.
        message: title of the commit; None for one that names the run.
        progress: called with (bytes sent, bytes in total, what is being done).
    """

    api: HfApi
    repo_id: str
    run: LocalRun
    rights: PhotoRights
    revision: str
    create_pr: bool
    message: str | None
    progress: Progress

    def say(self, text: str) -> None:
        """Report what is being done."""
        self.progress(0, 0, text)

    def call(self, what: Callable[[], T], name: str) -> T:
        """Make a call that may be repeated."""
        return patiently(what, self.say, name)

    # --- before ---

    def ensure(self, private: bool | None) -> tuple[bool, bool]:
        """Make the dataset and the branch if they are missing; returns (made here, whether it is private)."""
        try:
            info = self.call(lambda: self.api.dataset_info(self.repo_id), "asking for the dataset")
        except hub_errors.GatedRepoError:
            raise
        except hub_errors.RepositoryNotFoundError:
            if self.create_pr and self.repo_id.split("/")[0] not in self._own_names():
                raise
            hidden = private is not False
            self.say(f"making the {'private' if hidden else 'public'} dataset {self.repo_id}")
            self.call(
                lambda: self.api.create_repo(self.repo_id, repo_type=KIND, private=hidden, exist_ok=True), "creating"
            )
            made, is_private = True, hidden
        else:
            made, is_private = False, bool(info.private)
            if private and not is_private and not self.create_pr:
                self.call(
                    lambda: self.api.update_repo_settings(self.repo_id, private=True, repo_type=KIND), "making private"
                )
                is_private = True
        if self.revision != MAIN and not self.revision.startswith("refs/pr/"):
            self._ensure_branch()
        return made, is_private

    def _own_names(self) -> set[str]:
        me = self.call(self.api.whoami, "asking who you are")
        return {me["name"], *(org["name"] for org in me.get("orgs", []))}

    def _ensure_branch(self) -> None:
        refs = self.call(lambda: self.api.list_repo_refs(self.repo_id, repo_type=KIND), "listing branches")
        if self.revision in {ref.name for ref in refs.branches}:
            return
        if self.revision in {ref.name for ref in refs.tags}:
            raise ValueError(f"`revision` must be a branch; '{self.revision}' is a tag of '{self.repo_id}'.")
        self.call(
            lambda: self.api.create_branch(self.repo_id, branch=self.revision, repo_type=KIND, exist_ok=True),
            "making the branch",
        )

    # --- the commit ---

    def look(self) -> Repository:
        """The repository as it is now."""
        self.say("reading the dataset")
        info = self.api.dataset_info(self.repo_id, revision=self.revision)
        return read_repository(self.api, self.repo_id, str(info.sha))

    def commit(self) -> tuple[Change, str, str | None, bool]:
        """Commit until it is done; returns (change, commit, pull request, whether anything was to do)."""
        change: Change | None = None
        tried = False

        def attempt(there: Repository) -> tuple[Change, str, str | None, bool]:
            nonlocal change, tried
            now = plan_change(there, self.run, self.rights)
            if not now.added and not now.deleted:  # nothing to do, or done by a try whose answer was lost
                return (change if tried and change else now), str(there.head), None, tried
            change = now
            if self.create_pr and (proposed := self._proposed()) is not None:
                return change, *proposed, tried
            tried = True
            made = send(
                self.api, there, change, message=self.message or self._title(change), description=self._mark(),
                revision=self.revision, create_pr=self.create_pr, progress=self.progress,
            )  # fmt: skip
            return change, made.oid, made.pr_url, True

        return persist(lambda: self.call(self.look, "reading the dataset"), attempt, self.say, "publishing")

    def _title(self, change: Change) -> str:
        return f"{'Update' if change.update else 'Add'} {self.run.name}"

    def _mark(self) -> str:
        """A line that tells this content from any other, so that a pull request of it is found again."""
        whole = hashlib.sha256(repr((self.run.name, self.rights)).encode())
        for path, digest in sorted(self.run.record["files"].items()):
            whole.update(f"{path}\0{digest}\n".encode())
        return f"hf_equiv run {whole.hexdigest()}"

    def _proposed(self) -> tuple[str, str] | None:
        """(commit, address) of an open pull request with this content."""
        for found in self.api.get_repo_discussions(self.repo_id, repo_type=KIND):
            if not found.is_pull_request or found.status not in ("open", "draft"):
                continue
            commits = self.api.list_repo_commits(self.repo_id, repo_type=KIND, revision=f"refs/pr/{found.num}")
            if commits and self._mark() in commits[0].message:
                return commits[0].commit_id, f"{self._url()}/discussions/{found.num}"
        return None

    # --- after ---

    def _url(self) -> str:
        return f"{constants.ENDPOINT}/datasets/{self.repo_id}"

    def dry(self, private: bool | None, *, stated: bool) -> Published:
        """What would be done."""
        there, is_private = Repository(self.repo_id, None, {}, {}, None), private is not False
        exists = True
        try:
            info = self.call(lambda: self.api.dataset_info(self.repo_id), "asking for the dataset")
            is_private = bool(info.private) if private is None else private
            there = self.call(self.look, "reading the dataset")
        except hub_errors.GatedRepoError:
            raise
        except hub_errors.RepositoryNotFoundError:
            exists = False
        except hub_errors.RevisionNotFoundError:  # the branch would be made from main
            there = self.call(replace(self, revision=MAIN).look, "reading the dataset")
        change = plan_change(there, self.run, self.rights)
        changed = bool(change.added or change.deleted)
        refused = self._refused(exists=exists) if changed else None
        return self.result(change, is_private, stated=stated, changed=changed, revision=self.revision, dry_run=True,
                           refused=refused)  # fmt: skip

    def _refused(self, *, exists: bool) -> str | None:
        """Why the Hub would refuse to write, as far as it tells without a try."""
        try:
            require_token(self.api.token)
            me = self.call(self.api.whoami, "asking who you are")
        except hub_errors.LocalTokenNotFoundError as error:
            return str(error)
        except hub_errors.HfHubHTTPError as error:
            return NOT_ACCEPTED if status_of(error) == 401 else None
        owner = self.repo_id.split("/")[0]
        role = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}.get(owner)
        if role == "contributor":  # writes to what is theirs, which the Hub does not tell
            return None
        proposed = exists and (self.create_pr or self.revision.startswith("refs/pr/"))
        return why_not(f"{me['name']}/mine" if proposed else self.repo_id, KIND, me) or None

    def done(self, pr_url: str | None, *, fresh: bool) -> None:
        """Report that it is done, and where."""
        told = "done" if fresh else "nothing to commit, it is there already"
        self.say(f"{told}: {pr_url or self._url()}")

    def result(self, change: Change, private: bool | None, *, stated: bool, **more: Any) -> Published:
        """The record of what was done."""
        card = next(f for f in change.files if f.path == CARD)
        more = {"commit": None, "pr_url": None} | more
        return Published(
            repo_id=self.repo_id, url=self._url(), run=self.run.name, place=change.place, private=private,
            photos=not is_withheld(change.record), license=self.rights.license, why=self.rights.why,
            how_to_change=how_to_change(self.rights, stated=stated), files=len(change.files),
            bytes=sum(f.size for f in change.files), uploaded=tuple((f.path, f.size) for f in change.added),
            deleted=change.deleted, card=_decoded(card), **more,
        )  # fmt: skip


def _decoded(file: StagedFile) -> str:
    return file.content.decode() if isinstance(file.content, bytes) else file.content.read_text(encoding="utf-8")


# `publish_results`: put a run directory into a dataset on the Hub, in one commit.


_SLUG = re.compile(r"[\w.-]+/[\w.-]+-[0-9a-f]{24}")


_COMMIT = re.compile(r"[0-9a-f]{40}")


def publish_results(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    license: str | None = None,
    i_have_the_right: bool = False,
    withhold_photos: bool = False,
    collection: str | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    progress: Progress | None = None,
) -> Published:
    """Publish a finished run directory as a dataset, whole or not at all: in one commit.

    The first run of a dataset is at its root; others are added in `runs/NAME/`. A run of the same settings replaces its
    earlier version, and files that are no longer part of it go. If nothing has changed, nothing is committed. The local
    directory is never altered.

    What passes is tried again: 409, 412, 429 (as long as the Hub asks), 5xx and cut connections. After each failure the
    dataset is read anew, so that a commit whose answer was lost is recognised, and one that somebody else has made in
    between is built upon. What was uploaded before an interruption is not sent twice.

    Photos are published if they are free: the built-in ones, or of a Hub dataset whose card names a free licence.
    Otherwise rows and ids go without any picture, unless `license` (unknown licence) or `i_have_the_right` says more.

    Args:
        folder: finished run directory.
        repo_id: `USER/NAME` or `ORGANISATION/NAME`; made if it does not exist.
        private: visibility. None keeps that of an existing dataset, and makes a new one private.
        create_pr: open a pull request on `main` instead; for that you need not own the dataset.
        revision: branch to commit to, made from `main` if missing; or `refs/pr/N`.
        dry_run: read, decide and list, but write nothing. `refused` of the result says why the Hub would not let you.
        license: licence of the images where it is not known, such as `cc-by-4.0`.
        i_have_the_right: you may publish the photos although their licence is not known to be free.
        withhold_photos: leave the photos out although they are free.
        collection: title or slug of a collection to add the dataset to; made, private, if there is none.
        token: of the Hub; by default the one you are logged in with.
        message: title of the commit.
        progress: called with (bytes sent, bytes in total, what is being done).

    Returns:
        What was done.

    Raises:
        ValueError: no finished run, files that are not as its `run.json` states, a bad name, or a repository that holds
            other things than runs.
        HfHubHTTPError: no right to write, a token that is not accepted, or a failure that did not pass.
        ConnectionError: the Hub is out of reach.

    Example:
        >>> publish_results("runs/match/builtin/1a2b3c4d", "me/matches").url  # doctest: +SKIP
        'https://huggingface.co/datasets/me/matches'
    """
    name = check_dataset_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(f"`revision` must be None with `create_pr`: pull requests go to main; got {revision!r}.")
    if revision is not None and _COMMIT.fullmatch(revision):
        raise ValueError(f"`revision` must be a branch; got the commit {revision}. Commits cannot be changed.")
    if license is not None and not re.fullmatch(r"[\w.+-]+", license):
        raise ValueError(f"`license` must be an identifier such as 'cc-by-4.0'; got {license!r}.")
    if license is not None and license.lower() not in FREE and not i_have_the_right:
        raise ValueError(
            f"`license` must be one that is known to be free; got {license!r}. Known are {', '.join(sorted(FREE))}; "
            "for another pass `i_have_the_right` too."
        )
    report: Progress = progress or (lambda done, total, what: None)
    report(0, 0, "checking the run and its files")
    run = read_run(Path(folder))
    rights = _rights(run, license, i_have_the_right, withhold_photos, token)
    api = api_of(token)
    job = Publication(api, name, run, rights, revision or MAIN, create_pr, message, report)
    with explained(name, revision=revision, write=True, token=token):
        if dry_run:
            return job.dry(private, stated=license is not None)
        require_token(token)
        made, was_private = job.ensure(private)
        change, commit, pr, fresh = job.commit()
        if not create_pr and private is False and was_private:
            job.call(lambda: api.update_repo_settings(name, private=False, repo_type=KIND), "opening")
            was_private = False
    slug, hidden = (None, None) if collection is None else _collect(api, name, collection, job)
    job.done(pr, fresh=fresh)
    seen = None if create_pr and not made else was_private
    ref = job.revision if pr is None else f"refs/pr/{pr.rstrip('/').rsplit('/', 1)[-1]}"
    return job.result(change, seen, stated=license is not None, commit=commit, pr_url=pr, revision=ref, changed=fresh,
                      collection=slug, collection_private=hidden)  # fmt: skip


def _rights(run: LocalRun, license: str | None, right: bool, withhold: bool, token: Any) -> PhotoRights:
    if is_withheld(run.record):
        return PhotoRights(False, None, "this run directory holds no photos")
    if withhold:
        return PhotoRights(False, None, "as asked for", asked=True)
    return photo_rights(run.record["settings"], license=license, i_have_the_right=right, token=token)


def _collect(api: HfApi, repo_id: str, collection: str, job: Publication) -> tuple[str, bool | None]:
    """Add the dataset to a collection, made private if it is not there; returns its slug and whether it is private."""
    try:
        with explained(repo_id, write=True):
            if _SLUG.fullmatch(collection):
                slug = collection
            else:
                owner = repo_id.split("/")[0]
                me = job.call(api.whoami, "asking who you are")
                names = {me["name"], *(org["name"] for org in me.get("orgs", []) if org.get("roleInOrg") != "read")}
                space = owner if owner in names else me["name"]
                slug = job.call(
                    lambda: api.create_collection(collection, namespace=space, private=True, exists_ok=True),
                    "making the collection",
                ).slug
            found = job.call(
                lambda: api.add_collection_item(slug, repo_id, "dataset", exists_ok=True), "adding to the collection"
            )
            return str(slug), found.private
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{repo_id}' is published, but it could not be added to the collection {collection!r}: {error} The same "
            "command again adds it."
        ) from error
