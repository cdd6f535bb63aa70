"""A dataset repository as it stands at one commit, and the one commit that puts a run into it."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import CommitInfo, RepoFile

from hf_equiv.hub import card
from hf_equiv.hub.licences import PhotoRights
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.runs import card as run_card
from hf_equiv.runs import directory, shards
from hf_equiv.runs.directory import CARD, OWN_FOLDERS, RUNS, WITHHELD, LocalRun, analysis_of, is_withheld, run_name
from hf_equiv.runs.schema import LAYOUTS, MATCH, Row

# What a run directory becomes in a dataset repository: which files, under which names, with or without photos.
#
# A dataset is one run at its root and any number of others in `runs/NAME/`. Nothing here uses the network, and the
# local directory is never changed.


_BESIDE = {".gitattributes", ".gitignore", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt", "CITATION.cff"}


_WITHOUT_PHOTOS = {"spectra.png", "secants.png", "constants.png", "drift.png"}
"""Figures that show no photo."""


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file as it will be in the repository.

    Attributes:
        path: inside the repository.
        content: where it is on disk, or its bytes.
        size: in bytes.
        sha256: of its content.
    """

    path: str
    content: Path | bytes
    size: int
    sha256: str

    def git_oid(self) -> str:
        """What git calls a file of this content."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def place_of(record: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Where a run goes in a dataset: "" for its root, or `runs/NAME`.

    Args:
        record: of the run.
        runs: records of the runs that are there, by place.

    Returns:
        The place where a run of the same settings is; the root of a dataset without one; else a new place.
    """
    name = run_name(record)
    for place, other in runs.items():
        if run_name(other) == name:
            return place
    return f"{RUNS}/{name}" if "" in runs else ""


def stage(run: LocalRun, place: str, rights: PhotoRights) -> tuple[Row, list[StagedFile]]:
    """Settle what is published of a run.

    Args:
        run: the run.
        place: "" for the root of the dataset, or `runs/NAME`.
        rights: whether the photos go along.

    Returns:
        The `run.json` to publish and all files of the run, without the card of the dataset.
    """
    withheld = not rights.published or is_withheld(run.record)
    record = {key: value for key, value in run.record.items() if key not in ("card", "photos", "license", "versions")}
    record |= {"photos": WITHHELD if withheld else "published", "license": rights.license, "rights": rights.why}
    if withheld:  # what no picture can be recognised by
        record[run.layout.listed] = [
            {k: v for k, v in item.items() if k != "pixels"} for item in record[run.layout.listed]
        ]
    record |= {"versions": run.versions} | ({"card": "dataset"} if place == "" else {})
    files: list[StagedFile] = []
    for name, digest in run.record["files"].items():
        content = _content(run, name, withheld=withheld)
        if content is not None and name != CARD:
            files.append(_staged(place, name, content, digest if isinstance(content, Path) else None))
    if place:
        text = _own_card(run, {PurePosixPath(file.path).name for file in files}, withheld=withheld)
        files.append(_staged(place, CARD, text, None))
    cut = len(place) + 1 if place else 0
    record["files"] = {file.path[cut:]: file.sha256 for file in files}
    return record, [*files, _staged(place, directory.RECORD, record_text(record).encode(), None)]


def record_text(record: Row) -> str:
    """The text of a `run.json`."""
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _content(run: LocalRun, name: str, *, withheld: bool) -> Path | bytes | None:
    path, top = run.folder / name, PurePosixPath(name).parts[0]
    if not withheld:
        return path
    if top == run.layout.folder:
        return shards.without_images(path, run.layout)
    return path if top == "figures" and PurePosixPath(name).name in _WITHOUT_PHOTOS else None


def _own_card(run: LocalRun, figures: set[str], *, withheld: bool) -> bytes:
    """The card of a run in `runs/NAME`: its own, or without the figures that are left out."""
    if not withheld and run.record.get("card") != "dataset":
        return (run.folder / CARD).read_bytes()
    if run.layout is MATCH:
        text = run_card.run_card(MATCH, run.record["settings"], run.record["summary"], ["pairs.png"])
    else:
        shown = [PurePosixPath(n).name for n in run.record["files"] if n.startswith("figures/")]
        text = run_card.analysis_card(run.layout, run.record["settings"], run.record["summary"], sorted(shown))
    lines = [
        line for line in text.splitlines(keepends=True)
        if not ((found := re.match(r"!\[.*\]\(figures/(.*)\)", line)) and found[1] not in figures)
    ]  # fmt: skip
    note = "The photos are withheld: image columns are empty.\n" if withheld else ""
    return ("".join(lines) + ("\n" + note if note else "")).encode()


def _staged(place: str, name: str, content: Path | bytes, digest: str | None) -> StagedFile:
    path = f"{place}/{name}" if place else name
    if isinstance(content, bytes):
        return StagedFile(path, content, len(content), hashlib.sha256(content).hexdigest())
    return StagedFile(path, content, content.stat().st_size, digest or shards.sha256_file(content))


def text_file(path: str, text: str) -> StagedFile:
    """A file of text."""
    return bytes_file(path, text.encode())


def bytes_file(path: str, data: bytes) -> StagedFile:
    """A file that is in memory."""
    return _staged("", path, data, None)


def place_of_file(path: str) -> str | None:
    """The place of the run that a file of a repository belongs to; None if it belongs to none."""
    parts = PurePosixPath(path).parts
    place = ""
    if parts[0] == RUNS and len(parts) > 2:
        place, parts = f"{parts[0]}/{parts[1]}", parts[2:]
    inside = (len(parts) > 1 and parts[0] in OWN_FOLDERS) or parts in ((directory.RECORD,), (CARD,))
    return place if inside and (place or parts != (CARD,)) else None


def check_repository(repo_id: str, paths: Iterable[str], runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a repository that holds something else than runs, or runs of a newer version.

    Args:
        repo_id: its name.
        paths: of its files.
        runs: records of its runs, by place.

    Raises:
        ValueError: it does.
    """
    foreign = [p for p in sorted(paths) if p not in _BESIDE and place_of_file(p) not in runs]
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ValueError(
            f"'{repo_id}' must be empty or hold runs of hf_equiv; it holds {', '.join(foreign[:3])}{more}. Publish to "
            "a new name."
        )
    for place, record in runs.items():
        if int(record["schema_version"]) > SCHEMA_VERSION or analysis_of(record) not in LAYOUTS:
            raise ValueError(
                f"'{repo_id}' holds a run of a newer hf_equiv ({place or 'at its root'}, schema_version "
                f"{record['schema_version']}). Upgrade hf_equiv, or publish to a new name."
            )


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
        if place is not None and path.endswith(directory.RECORD):
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
            staged.append(text_file(directory.RECORD, record_text(runs[""])))
    files = [*staged, text_file(CARD, card.dataset_card(there.repo_id, runs, previous, there.runs))]
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
