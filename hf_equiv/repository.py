"""A dataset repository as it stands at one commit, and the one commit that puts a run into it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import CommitInfo, RepoFile

from hf_equiv import publishcard, rundir
from hf_equiv.licences import PhotoRights
from hf_equiv.localrun import CARD, LocalRun
from hf_equiv.publishing import (
    StagedFile,
    check_repository,
    is_withheld,
    place_of,
    place_of_file,
    record_text,
    stage,
    text_file,
)
from hf_equiv.shards import Row

KIND = "dataset"
_GROUP = 24
_GROUP_BYTES = 50_000_000
"""Files, and bytes, uploaded between two reports of progress."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Repository:
    """What a dataset repository holds at a commit.

    Attributes:
        repo_id: `USER/NAME`.
        head: the commit; None for a repository that is yet to be made.
        files: for each path the SHA-256 of an LFS object, or the git id of a plain file.
        runs: records of its runs, by place: "" for the root, or `runs/NAME`.
        card: its README.md.
    """

    repo_id: str
    head: str | None
    files: Mapping[str, str]
    runs: Mapping[str, Row]
    card: str | None


@dataclass(frozen=True)
class Change:
    """What a publication changes.

    Attributes:
        place: of the run: "" for the root, or `runs/NAME`.
        record: its published `run.json`.
        files: all files of the run, and the card of the dataset.
        added: those that differ from what is there.
        deleted: paths of an earlier version of the run that are no longer part of it.
        update: whether an earlier version was there.
    """

    place: str
    record: Row
    files: tuple[StagedFile, ...]
    added: tuple[StagedFile, ...]
    deleted: tuple[str, ...]
    update: bool


def read_repository(api: HfApi, repo_id: str, head: str) -> Repository:
    """Read the tree, the records of all runs and the card at a commit.

    Args:
        api: client.
        repo_id: `USER/NAME`.
        head: commit.

    Returns:
        The repository.

    Raises:
        ValueError: a `run.json` in it is damaged, or it holds other files than runs.
    """
    files = read_tree(api, repo_id, head, KIND)
    runs: dict[str, Row] = {}
    for path in files:
        place = place_of_file(path)
        if place is not None and path.endswith(rundir.RECORD):
            runs[place] = _record(repo_id, path, read_text(api, repo_id, path, head, KIND))
    check_repository(repo_id, files, runs)
    card = read_text(api, repo_id, CARD, head, KIND) if CARD in files else None
    return Repository(repo_id, head, files, runs, card)


def read_tree(api: HfApi, repo_id: str, head: str, kind: str) -> dict[str, str]:
    """For each path at a commit the SHA-256 of an LFS object, or the git id of a plain file."""
    files: dict[str, str] = {}
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=head, repo_type=kind):
        if isinstance(entry, RepoFile):
            files[entry.path] = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
    return files


def read_text(api: HfApi, repo_id: str, path: str, head: str, kind: str) -> str:
    """A file of text at a commit."""
    local = api.hf_hub_download(repo_id, path, repo_type=kind, revision=head)
    return Path(local).read_text(encoding="utf-8", errors="replace")


def _record(repo_id: str, path: str, text: str) -> Row:
    try:
        record = json.loads(text)
        int(record["schema_version"]), str(record["settings"]["model_id"]), dict(record["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} of '{repo_id}' is damaged ({type(error).__name__}). Restore it on the Hub, or publish to a new "
            "name."
        ) from None
    return dict(record)


def plan_change(there: Repository, run: LocalRun, rights: PhotoRights) -> Change:
    """Work out the files that a publication adds, changes and deletes.

    Args:
        there: the repository as it is.
        run: the local run.
        rights: whether its photos go along.

    Returns:
        The change; nothing added and nothing deleted if the repository is as it should be.

    Raises:
        ValueError: photos that are there would be removed although nobody asked for that.
    """
    place = place_of(run.record, there.runs)
    if place in there.runs and not is_withheld(there.runs[place]) and not rights.published and not rights.asked:
        raise ValueError(
            f"the photos of this run are in '{there.repo_id}', and as it is called now they would be removed "
            f"({rights.why}). Pass `license` or `i_have_the_right` as before, or `withhold_photos=True` to remove them."
        )
    record, staged = stage(run, place, rights)
    runs = {**there.runs, place: record}
    previous, root = there.card, there.runs.get("")
    if root is not None and root.get("card") != "dataset":  # a run directory that was uploaded as it was
        if previous is not None and text_file(CARD, previous).sha256 == root["files"].get(CARD):
            previous = None  # nobody wrote into it
        if place:
            hashes = {name: digest for name, digest in root["files"].items() if name != CARD}
            runs[""] = {**root, "card": "dataset", "files": hashes}
            staged.append(text_file(rundir.RECORD, record_text(runs[""])))
    files = [*staged, text_file(CARD, publishcard.dataset_card(there.repo_id, runs, previous, there.runs))]
    added = differing(files, there.files)
    wanted = {f.path for f in files}
    earlier = {f"{place}/{name}" if place else name for name in there.runs.get(place, {}).get("files", ())}
    deleted = [path for path in there.files if path in earlier and path not in wanted]  # what others put there stays
    return Change(place, record, tuple(files), tuple(added), tuple(sorted(deleted)), place in there.runs)


def differing(files: Iterable[StagedFile], there: Mapping[str, str]) -> list[StagedFile]:
    """The files that are not there yet, or not as they should be."""
    return [f for f in files if f.path not in there or there[f.path] not in (f.sha256, f.git_oid())]


def send(
    api: HfApi, there: Repository, change: Change, *, message: str, description: str, revision: str, create_pr: bool,
    progress: Progress, kind: str = KIND,
) -> CommitInfo:  # fmt: skip
    """Upload what is large, then make the one commit on top of the commit that was read.

    Args:
        api: client.
        there: the repository as it was read.
        change: what to commit.
        message: title of the commit.
        description: text below the title.
        revision: branch.
        create_pr: open a pull request instead.
        progress: called with (bytes sent, bytes in total, what is being done).
        kind: of the repository.

    Returns:
        What the Hub says of the commit.

    Raises:
        ValueError: a file has changed since the run was read.
    """
    progress(0, 0, f"preparing {_files(len(change.added))}")
    additions = {file.path: _addition(file) for file in change.added}
    total, sent = sum(file.size for file in change.added), 0
    for group in _groups(change.added):
        progress(sent, total, f"uploading {_files(len(additions))}")
        api.preupload_lfs_files(
            there.repo_id, [additions[file.path] for file in group], repo_type=kind, revision=revision,
            create_pr=create_pr, free_memory=False,
            gitignore_content="",  # a .gitignore of the owner must not leave out a part of the run
        )  # fmt: skip
        sent += sum(file.size for file in group)
    progress(total, total, f"committing {_files(len(change.added) + len(change.deleted))}")
    operations: list[Any] = [*additions.values()]
    operations += [CommitOperationDelete(path, is_folder=False) for path in change.deleted]
    with warnings.catch_warnings():  # the app of a Space comes with results to show
        warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
        return api.create_commit(
            there.repo_id, operations, commit_message=message, commit_description=description, repo_type=kind,
            revision=revision, create_pr=create_pr, parent_commit=there.head,
        )  # fmt: skip


def _groups(files: Iterable[StagedFile]) -> Iterator[list[StagedFile]]:
    """The files in groups that are uploaded together."""
    group: list[StagedFile] = []
    for file in files:
        group.append(file)
        if len(group) == _GROUP or sum(one.size for one in group) >= _GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _addition(file: StagedFile) -> CommitOperationAdd:
    content = file.content if isinstance(file.content, bytes) else str(file.content)
    made = CommitOperationAdd(file.path, content)
    if made.upload_info.sha256.hex() != file.sha256:
        raise ValueError(f"{file.path} changed while it was published. Wait until nothing writes it, then try again.")
    return made
