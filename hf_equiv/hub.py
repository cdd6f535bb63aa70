"""`publish_results`: put a run directory into a dataset on the Hub, in one commit."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hf_equiv.hubcalls import api_of, check_dataset_id, explained, require_token
from hf_equiv.licences import FREE, PhotoRights, photo_rights
from hf_equiv.localrun import LocalRun, read_run
from hf_equiv.publication import MAIN, Publication, Published
from hf_equiv.publishing import is_withheld
from hf_equiv.repository import KIND, Progress

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
