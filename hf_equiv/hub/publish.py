"""Publish a run directory as a dataset on the Hub, whole or not at all, in one commit."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub_errors

from hf_equiv.hub.card import check_summary
from hf_equiv.hub.dataset_files import Dataset, place_of, plan_files, read_dataset
from hf_equiv.hub.licences import FREE, PhotoRights, how_to_change, photo_rights
from hf_equiv.hub.repository import MAIN, Change, Progress, Remote, commit_until_done, send
from hf_equiv.hub_client import WAITS, api_of, check_repo_id, explained, require_token, why_not
from hf_equiv.runs.directory import CARD, RECORD, LocalRun, is_withheld, read_run

_SLUG = re.compile(r"[\w.-]+/[\w.-]+-[0-9a-f]{24}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Published:
    """The result of `publish_results`, or with `dry_run` its plan.

    Attributes:
        repo_id: the dataset, USER/NAME.
        url: page of the dataset.
        run: name of the run in it, ANALYSIS-MODELSLUG-HASH8.
        place: "" for the root of the dataset, else `runs/NAME`.
        changed: whether there was anything to commit.
        commit: the commit that holds the run; None in a dry run.
        revision: the branch, or the ref of the pull request, that holds the run.
        pr_url: page of the pull request.
        private: visibility of the dataset afterwards; None if only its owner can know it.
        photos: whether the photos are published.
        license: identifier of their licence, if it is known.
        why: the reason why the photos are published or withheld.
        how_to_change: the arguments for the opposite.
        files: number of files of the run, with the card.
        bytes: their size.
        uploaded: (path, bytes) of the files that were new or had changed.
        deleted: paths of an earlier version that the commit removes.
        card: text of the dataset's README.md.
        collection: slug of the collection that the dataset was added to.
        collection_private: whether only you can see that collection; a new one is private.
        dry_run: whether nothing was written.
        refused: in a dry run, the reason why the Hub would refuse the commit, as far as it is known.
        unchecked: in a dry run, the reason why the Hub was not asked; the plan is then that of a new dataset.
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
    unchecked: str | None = None


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
    """Publish a finished run directory as a dataset, in one commit; the local directory is never altered.

    The first run of a dataset lies at its root, others in `runs/NAME/`; a run of the same settings is replaced. Photos
    are published if they are free: the built-in ones, or those of a Hub dataset whose card names a free licence.
    Otherwise rows and ids are published without pictures, unless `license` or `i_have_the_right` says more.

    Args:
        folder: finished run directory.
        repo_id: `USER/NAME` or `ORGANISATION/NAME`; made if it does not exist.
        private: visibility. None does not change an existing dataset, and makes a new one private.
        create_pr: open a pull request on `main` instead; you need not own the dataset.
        revision: branch to commit to, made from `main` if missing; or `refs/pr/N`.
        dry_run: read, decide and list, but write nothing. `refused` of the result says why the Hub would refuse,
            `unchecked` why it could not be asked.
        license: licence of the images if it is not known, such as `cc-by-4.0`.
        i_have_the_right: you may publish the photos although their licence is not known to be free.
        withhold_photos: leave the photos out although they are free.
        collection: title or slug of a collection to add the dataset to; a missing one is made, private.
        token: token of the Hub; by default the one you are logged in with.
        message: title of the commit.
        progress: called with (bytes sent, bytes in total, what is being done).

    Returns:
        The result.

    Raises:
        ValueError: no finished run, changed files, a bad name, or a repository that holds other things than runs.
        HfHubHTTPError: no right to write, a token that is not accepted, or a failure that did not pass.
        ConnectionError: the Hub is out of reach.
    """
    name = check_repo_id(repo_id, "dataset", otherwise="results are published as datasets")
    tell = progress or (lambda done, total, what: None)
    remote = Remote(api_of(token), name, "dataset", tell, () if dry_run else WAITS)
    _check_arguments(create_pr, revision, license, i_have_the_right)
    remote.say("checking the run and its files")
    run = read_run(Path(folder))
    check_summary(run.record, str(run.folder / RECORD))
    unchecked = remote.why_unchecked() if dry_run else None
    stated = {"license": license, "i_have_the_right": i_have_the_right, "token": token, "ask": unchecked is None}
    rights = _rights(run, withhold_photos, **stated)
    job = Publication(remote, run, rights, revision or MAIN, create_pr, message)
    if unchecked is not None:
        return replace(_published(job, _change(job, Dataset()), private), dry_run=True, unchecked=unchecked)
    with explained(name, revision=revision, write=True, dry_run=dry_run, token=token):
        if dry_run:
            return _plan_only(job, private)
        require_token(token)
        done = _publish(job, private)
    return done if collection is None else _collect(remote, collection, done)


def _rights(run: LocalRun, withhold: bool, **stated: Any) -> PhotoRights:
    if is_withheld(run.record):
        return PhotoRights(False, None, "this run directory holds no photos")
    if withhold:
        return PhotoRights(False, None, "as asked for", asked=True)
    return photo_rights(run.record["settings"], **stated)


@dataclass(frozen=True, slots=True)
class Publication:
    """A run on its way into a dataset."""

    remote: Remote
    run: LocalRun
    rights: PhotoRights
    revision: str  # branch, or `refs/pr/N`
    create_pr: bool
    message: str | None


def _check_arguments(create_pr: bool, revision: str | None, license: str | None, i_have_the_right: bool) -> None:
    if create_pr and revision is not None:
        raise ValueError(f"`revision` must be None with `create_pr`: pull requests go to main; got {revision!r}.")
    if revision is not None and _COMMIT.fullmatch(revision):
        raise ValueError(f"`revision` must be a branch; got the commit {revision}. Commits cannot be changed.")
    if license is not None and not re.fullmatch(r"[\w.+-]+", license):
        raise ValueError(f"`license` must be an identifier such as 'cc-by-4.0'; got {license!r}.")
    if license is not None and license.lower() not in FREE and not i_have_the_right:
        known = f"Known are {', '.join(sorted(FREE))}; for another pass `i_have_the_right` too."
        raise ValueError(f"`license` must be one that is known to be free; got {license!r}. {known}")


def _publish(job: Publication, private: bool | None) -> Published:
    remote, info = job.remote, job.remote.find()
    # If the visibility changes, an existing dataset becomes private before the commit, but public after it.
    switch = info is not None and not job.create_pr and private not in (None, bool(info.private))
    is_private = bool(info.private) if info is not None and not switch else private is not False
    if info is None:
        remote.say(f"making the {'private' if is_private else 'public'} dataset {remote.repo_id}")
        make = partial(remote.api.create_repo, remote.repo_id, repo_type="dataset", private=is_private, exist_ok=True)
        remote.call("making the dataset", make)
    elif switch and is_private:
        remote.set_private(True)
    if job.revision != MAIN and not job.revision.startswith("refs/pr/"):
        _make_branch(remote, job.revision)
    sending = partial(send, remote, revision=job.revision, create_pr=job.create_pr)
    done = commit_until_done(partial(_look, job), partial(_change, job), sending, remote.say)
    if switch and not is_private:
        remote.set_private(False)
    told = "done" if done.sent else "nothing to commit, it is there already"
    remote.say(f"{told}: {done.pr_url or remote.url}")
    ref = job.revision if done.pr_url is None else f"refs/pr/{done.pr_url.rstrip('/').rsplit('/', 1)[-1]}"
    result = _published(job, done.change, None if job.create_pr and info is not None else is_private)
    return replace(result, changed=done.sent, commit=done.commit, pr_url=done.pr_url, revision=ref)


def _make_branch(remote: Remote, branch: str) -> None:
    api, name = remote.api, remote.repo_id
    refs = remote.call("listing branches", api.list_repo_refs, name, repo_type="dataset")
    branches = {ref.name for ref in refs.branches}
    if branch in {ref.name for ref in refs.tags} - branches:
        raise ValueError(f"`revision` must be a branch; '{branch}' is a tag of '{name}'.")
    if branch not in branches:
        make = partial(api.create_branch, name, branch=branch, repo_type="dataset", exist_ok=True)
        remote.call("making the branch", make)


def _look(job: Publication) -> Dataset:
    job.remote.say("reading the dataset")
    there = read_dataset(job.remote, str(job.remote.info(job.revision).sha))
    return replace(there, proposed=_proposed(job)) if job.create_pr else there


def _change(job: Publication, there: Dataset) -> Change[Dataset]:
    files, deleted = plan_files(there, job.remote.repo_id, job.run, job.rights)
    verb = "Update" if place_of(job.run.record, there.runs) in there.runs else "Add"
    return Change(there, files, sorted(deleted), job.message or f"{verb} {job.run.name}", _mark(job))


def _mark(job: Publication) -> str:
    """Return a line that identifies this content, so that a later call finds its pull request."""
    content = repr((job.run.name, job.rights, sorted(job.run.record["files"].items())))
    return f"hf_equiv run {hashlib.sha256(content.encode()).hexdigest()}"


def _proposed(job: Publication) -> tuple[str, str] | None:
    """Return (commit, address) of an open pull request with this content."""
    remote = job.remote

    def find() -> tuple[str, str] | None:
        for found in remote.api.get_repo_discussions(remote.repo_id, repo_type="dataset"):
            if found.is_pull_request and found.status in ("open", "draft"):
                ref = f"refs/pr/{found.num}"
                commits = remote.api.list_repo_commits(remote.repo_id, repo_type="dataset", revision=ref)
                if commits and _mark(job) in commits[0].message:
                    return commits[0].commit_id, f"{remote.url}/discussions/{found.num}"
        return None

    return remote.call("reading the pull requests", find)


def _published(job: Publication, change: Change[Dataset], private: bool | None) -> Published:
    (card,) = (file.data.decode() for file in change.files if file.path == CARD)
    return Published(
        repo_id=job.remote.repo_id, url=job.remote.url, run=job.run.name,
        place=place_of(job.run.record, change.there.runs), changed=not change.empty, commit=None,
        revision=job.revision, pr_url=None, private=private, photos=job.rights.published, license=job.rights.license,
        why=job.rights.why, how_to_change=how_to_change(job.rights), files=len(change.files),
        bytes=sum(file.size for file in change.files), deleted=tuple(change.deleted), card=card,
        uploaded=tuple((file.path, file.size) for file in change.added),
    )  # fmt: skip


def _plan_only(job: Publication, private: bool | None) -> Published:
    info, there, is_private = job.remote.find(), Dataset(), private is not False
    if info is not None:
        is_private = bool(info.private) if private is None else private
        try:
            there = _look(job)
        except hub_errors.RevisionNotFoundError:  # the branch would start from main
            there = _look(replace(job, revision=MAIN))
    change = _change(job, replace(there, proposed=None))
    refused = None if change.empty else _why_refused(job, exists=info is not None)
    return replace(_published(job, change, is_private), dry_run=True, refused=refused)


def _why_refused(job: Publication, *, exists: bool) -> str | None:
    """Return why the Hub would refuse to write, as far as is known without trying."""
    remote = job.remote
    try:
        with explained(remote.repo_id, write=True):
            require_token(remote.api.token)
            me = remote.call("asking who you are", remote.api.whoami)
    except (hub_errors.LocalTokenNotFoundError, hub_errors.HfHubHTTPError) as error:
        return str(error)
    me = me if isinstance(me, dict) else {}  # the answer of a proxy may be anything
    owner = remote.repo_id.split("/")[0]
    if any(org["name"] == owner and org.get("roleInOrg") == "contributor" for org in me.get("orgs", [])):
        return None  # contributors write to their own repositories, which the Hub does not list
    proposed = exists and (job.create_pr or job.revision.startswith("refs/pr/"))
    return why_not(f"{me.get('name', 'USER')}/mine" if proposed else remote.repo_id, "dataset", me) or None


def _collect(remote: Remote, collection: str, done: Published) -> Published:
    """Add the dataset to a collection; a missing one is made, private, by the dataset's owner or the proposer."""
    api, slug, repo_id = remote.api, collection, remote.repo_id
    try:
        with explained(repo_id, write=True):
            if not _SLUG.fullmatch(collection):
                owner = None if done.pr_url else repo_id.split("/")[0]
                make = partial(api.create_collection, collection, namespace=owner, private=True, exists_ok=True)
                slug = remote.call("making the collection", make).slug
            add = partial(api.add_collection_item, slug, repo_id, "dataset", exists_ok=True)
            found = remote.call("adding to the collection", add)
            return replace(done, collection=slug, collection_private=found.private)
    except (OSError, ValueError) as error:
        told = f"'{repo_id}' is published, but it could not be added to the collection {collection!r}"
        raise ValueError(f"{told}: {error} The same command again adds it.") from error
