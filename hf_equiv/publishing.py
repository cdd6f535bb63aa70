"""What a run directory becomes in a dataset repository: which files, under which names, with or without photos.

A dataset is one run at its root and any number of others in `runs/NAME/`. Nothing here uses the network, and the local
directory is never changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hf_equiv import card, rundir, shards
from hf_equiv.layouts import LAYOUTS
from hf_equiv.licences import PhotoRights
from hf_equiv.localrun import CARD, LocalRun, analysis_of, run_name
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.shards import MATCH, Row

RUNS = "runs"
WITHHELD = "withheld"
OWN_FOLDERS = (*(layout.folder for layout in LAYOUTS.values()), "float", "figures")
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


def is_withheld(record: Mapping[str, Any]) -> bool:
    """Whether the photos of a run are left out."""
    return record.get("photos") == WITHHELD


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
    return record, [*files, _staged(place, rundir.RECORD, record_text(record).encode(), None)]


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
        text = card.run_card(run.record["settings"], run.record["summary"])
    else:
        shown = [PurePosixPath(n).name for n in run.record["files"] if n.startswith("figures/")]
        text = card.analysis_card(run.layout, run.record["settings"], run.record["summary"], sorted(shown))
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
    inside = (len(parts) > 1 and parts[0] in OWN_FOLDERS) or parts in ((rundir.RECORD,), (CARD,))
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
