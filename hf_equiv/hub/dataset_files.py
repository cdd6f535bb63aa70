"""Plan the files of a dataset: one run at its root, any number of others in `runs/NAME/`, with or without photos."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets

from hf_equiv.formatting import some
from hf_equiv.hub import card
from hf_equiv.hub.licences import PhotoRights
from hf_equiv.hub.repository import Remote, Snapshot, StagedFile, staged
from hf_equiv.results import SCHEMA_VERSION
from hf_equiv.runs import card as run_card
from hf_equiv.runs import directory, shards
from hf_equiv.runs.directory import CARD, OWN_FOLDERS, RUNS, WITHHELD, LocalRun, analysis_of, is_withheld, run_name
from hf_equiv.runs.schema import LAYOUTS, Row

BESIDE_RUNS = {".gitattributes", ".gitignore", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt", "CITATION.cff"}
FOR_LOADING = (datasets.config.REPOYAML_FILENAME, datasets.config.DATASETDICT_INFOS_FILENAME)
"""Files that `load_dataset` reads beside the header of the card; no run has them."""
_FIGURES_WITHOUT_PHOTOS = {f"figures/{name}.png" for name in ("spectra", "secants", "constants", "drift")}


@dataclass(frozen=True, slots=True)
class Dataset(Snapshot):
    """A dataset as it is at a commit."""

    runs: Mapping[str, Row] = field(default_factory=dict)  # records by place: "" for the root, or `runs/NAME`


def read_dataset(remote: Remote, head: str) -> Dataset:
    """Read the tree, the records of all runs and the card at a commit; refuse a repository that holds other things."""
    files = remote.files(head)
    runs = {
        place: _record(remote.repo_id, path, remote.text(path, head))
        for path in files
        if path.endswith(directory.RECORD) and (place := place_of_file(path)) is not None
    }
    if foreign := [path for path in sorted(files) if path not in BESIDE_RUNS and place_of_file(path) not in runs]:
        must = f"'{remote.repo_id}' must be empty or hold runs of hf_equiv"
        raise ValueError(f"{must}; it holds {some(foreign, 3)}. Publish to a new name.")
    return Dataset(head, files, remote.text(CARD, head) if CARD in files else None, runs=runs)


def place_of_file(path: str) -> str | None:
    """Return the place of the run that a file of a dataset belongs to; None if it belongs to none."""
    parts = PurePosixPath(path).parts
    place = ""
    if parts[0] == RUNS and len(parts) > 2:
        place, parts = f"{RUNS}/{parts[1]}", parts[2:]
    own = (len(parts) > 1 and parts[0] in OWN_FOLDERS) or parts == (directory.RECORD,) or (place and parts == (CARD,))
    return place if own else None


def _record(repo_id: str, path: str, text: str) -> Row:
    try:
        record = directory.parse_record(text.encode())
        version, *_ = record["schema_version"], record["files"]
    except (ValueError, KeyError) as error:
        told = f"{path} of '{repo_id}' is damaged: {error}"
        raise ValueError(f"{told}. Restore it on the Hub, or publish to a new name.") from None
    if version > SCHEMA_VERSION or analysis_of(record) not in LAYOUTS:
        told = f"'{repo_id}' holds a run of a newer hf_equiv ({path}, schema_version {version})"
        raise ValueError(f"{told}. Upgrade hf_equiv, or publish to a new name.")
    card.check_summary(record, f"{path} of {repo_id}")
    return record


def place_of(record: Mapping[str, Any], runs: Mapping[str, Row]) -> str:
    """Return the place of a run: where its earlier version is, the root of a dataset without runs, or a new place."""
    name = run_name(record)
    same = (place for place, other in runs.items() if run_name(other) == name)
    return next(same, f"{RUNS}/{name}" if "" in runs else "")


def plan_files(there: Dataset, repo_id: str, run: LocalRun, rights: PhotoRights) -> tuple[list[StagedFile], list[str]]:
    """Return the files to publish, and the paths of an earlier version of the run to delete; others stay."""
    place = place_of(run.record, there.runs)
    if place in there.runs and not is_withheld(there.runs[place]) and not rights.published and not rights.asked:
        raise ValueError(
            f"the photos of this run are in '{repo_id}', and as it is called now they would be removed "
            f"({rights.why}). Pass `license` or `i_have_the_right` as before, or `withhold_photos=True` to remove them."
        )
    record, files = _staged_run(run, place, rights)
    runs = {**there.runs, place: record}
    previous, root = there.card, there.runs.get("")
    if root is not None and root.get("card") != "dataset":  # a run directory that was uploaded by hand
        if previous is not None and staged(CARD, previous).sha256 == root["files"].get(CARD):
            previous = None  # it is the unedited card of the run
        if place:
            hashes = {name: digest for name, digest in root["files"].items() if name != CARD}
            runs[""] = {**root, "card": "dataset", "files": hashes}
            files.append(staged(directory.RECORD, directory.record_text(runs[""])))
    files.append(staged(CARD, card.dataset_card(repo_id, runs, previous, there.runs)))
    wanted = {file.path for file in files}
    inside = f"{place}/" if place else ""
    earlier = {inside + name for name in there.runs.get(place, {}).get("files", ())}
    return files, [path for path in there.files if path in earlier - wanted]


def _staged_run(run: LocalRun, place: str, rights: PhotoRights) -> tuple[Row, list[StagedFile]]:
    """Return the `run.json` to publish, and all files of the run but the card of the dataset."""
    hidden, inside = not rights.published, f"{place}/" if place else ""
    record = {key: value for key, value in run.record.items() if key != "card"}
    record |= {"photos": WITHHELD if hidden else "published", "license": rights.license, "rights": rights.why}
    record |= {"versions": run.versions} | ({} if place else {"card": "dataset"})
    if hidden:  # pixel hashes would identify the withheld photos
        listed = record[run.layout.listed]
        record[run.layout.listed] = [{k: v for k, v in item.items() if k != "pixels"} for item in listed]
    files = {}
    for name, digest in run.record["files"].items():
        path = run.folder / name
        if hidden and name.startswith(f"{run.layout.folder}/"):
            files[name] = staged(inside + name, shards.without_images(path, run.layout))
        elif name in _FIGURES_WITHOUT_PHOTOS or not (hidden or name == CARD):
            files[name] = staged(inside + name, path, digest)
    if place:
        files[CARD] = staged(inside + CARD, _own_card(run, files, hidden=hidden))
    record["files"] = {name: file.sha256 for name, file in files.items()}
    return record, [*files.values(), staged(inside + directory.RECORD, directory.record_text(record))]


def _own_card(run: LocalRun, files: Iterable[str], *, hidden: bool) -> str | Path:
    """Return the card of a run in `runs/NAME`: its own, or a new one without the figures that are left out."""
    if not hidden and run.record.get("card") != "dataset":
        return run.folder / CARD
    settings, summary = run.record["settings"], run.record["summary"]
    shown = sorted(Path(name).name for name in files if name.startswith("figures/"))
    text = run_card.run_card(run.layout, settings, summary, shown, run.record.get("command"))
    return text + (run_card.NO_PHOTOS if hidden else "")
