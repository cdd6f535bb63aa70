"""Load published results from the Hub or a directory: files at one commit, and rows with decoded images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import errors as hub_errors
from safetensors import safe_open

from hf_equiv.data.tables import load_parquet
from hf_equiv.hub.dataset_files import BESIDE_RUNS, FOR_LOADING, place_of_file
from hf_equiv.hub_client import api_of, check_repo_id, checked, explained, hushed, patiently
from hf_equiv.runs import directory
from hf_equiv.runs.directory import CARD, OWN_FOLDERS, RUNS, run_name
from hf_equiv.runs.schema import LAYOUTS, MATCH, Layout, Row
from hf_equiv.runs.shards import check_pictures, float_file, open_cells, read_shard, shard_files

_CONFIGS = {layout.folder: layout for layout in LAYOUTS.values()}
_WRITTEN = re.compile(r"(?!\.{1,2}/)(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def local_folder(where: str | os.PathLike[str], revision: str | None) -> Path | None:
    """Return a folder on disk; None for the name of a dataset."""
    if not Path(where).is_dir():
        return None
    if revision is not None:
        raise ValueError(f"`revision` must be None for a local folder; got {revision!r}.")
    return Path(where)


def split_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Read `USER/NAME` or `USER/NAME@REVISION`; the revision may also come from a flag of its own."""
    found = _WRITTEN.fullmatch(name)
    if found is None:
        hint = "(Datasets of the Hub are named USER/NAME or USER/NAME@REVISION.)"
        why = "it is a file" if Path(name).is_file() else "it does not exist"
        raise FileNotFoundError(f"{name!r} must be a run directory; {why}. Check the path. {hint}")
    if found["revision"] and revision is not None and found["revision"] != revision:
        raise ValueError(f"`revision` must be given once; got {found['revision']!r} and {revision!r}.")
    return found["repo"], found["revision"] or revision


def download_results(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    with_float: bool = True,
) -> tuple[Path, str]:
    """Fetch all runs of a dataset at one commit into the cache of the Hub.

    Args:
        repo_id: `USER/NAME`.
        revision: branch, tag, commit or `refs/pr/N`; by default `main`.
        token: for private datasets; by default the one you are logged in with.
        cache_dir: folder for downloads; by default the Hub's cache.
        local_files_only: whether to use cached files only.
        with_float: fetch the float images too; they are most of the bytes.

    Returns:
        The folder, and its commit.

    Raises:
        RepositoryNotFoundError: there is no such dataset, or it is private.
        RevisionNotFoundError: it has no such revision.
        ConnectionError: the Hub is out of reach.
        LocalEntryNotFoundError: with `local_files_only`, a file is not in the cache.
        ValueError: a bad name, or a dataset without a run.
    """
    name = check_repo_id(repo_id, "dataset", otherwise="results are published as datasets")
    parts = [folder for folder in OWN_FOLDERS if with_float or folder != "float"]
    folder = _snapshot(name, revision, parts, token, cache_dir, local_files_only)
    runs = run_folders(folder)
    if not runs:
        raise ValueError(f"the dataset '{name}' holds no run of hf_equiv (no {directory.RECORD}). Check the name.")
    for run in runs.values() if local_files_only else ():
        for file in directory.read_record(run)["files"]:
            if not (run / file).is_file() and (with_float or not file.startswith("float/")):
                told = f"{(run / file).relative_to(folder).as_posix()} of '{name}' is not in the cache"
                raise hub_errors.LocalEntryNotFoundError(f"{told} and `local_files_only=True`. Run once without it.")
    return folder, folder.name


@hushed()
def _snapshot(
    name: str, revision: str | None, folders: Sequence[str], token: Any, cache_dir: Any, local_files_only: bool = False
) -> Path:
    """Fetch `run.json`, the card and these folders of all runs into a folder named after the commit."""
    api, inside = api_of(token), [directory.RECORD, CARD, *(f"{folder}/*" for folder in folders)]

    def fetch() -> str:
        if not local_files_only:  # without a network the download would silently use cached files
            files = api.dataset_info(name, revision=revision).siblings or ()
            if odd := next((file.rfilename for file in files if not file.rfilename.isprintable()), None):
                told = f"the dataset '{name}' must have printable file names, which progress bars show; got {odd!r}"
                raise ValueError(f"{told}. Ask its owner to rename it.")
        return api.snapshot_download(
            name, repo_type="dataset", revision=revision, cache_dir=cache_dir, local_files_only=local_files_only,
            allow_patterns=[*FOR_LOADING, *inside, *(f"{RUNS}/*/{pattern}" for pattern in inside)],
        )  # fmt: skip

    with explained(name, revision=revision, token=token, local_files_only=local_files_only):
        once = partial(checked, fetch, name, "dataset", cache_dir)
        return Path(patiently(once, lambda _: None, "downloading"))


def foreign_files(name: str, commit: str, places: Iterable[str], token: Any) -> list[str]:
    """List the files of a dataset on the Hub that belong to none of the runs at these places."""
    with explained(name, revision=commit, token=token):
        look = partial(api_of(token).dataset_info, name, revision=commit)
        files = patiently(look, lambda _: None, "listing files").siblings or ()
    own = {*BESIDE_RUNS, *FOR_LOADING}  # the second are downloaded and named then
    return sorted(f.rfilename for f in files if not {f.rfilename, place_of_file(f.rfilename)} & {*own, *places})


def run_folders(folder: Path) -> dict[str, Path]:
    """Return the run directories of a dataset on disk by place: "" for the root, or `runs/NAME`."""
    places = {"": folder} if (folder / directory.RECORD).is_file() else {}
    inside = sorted(path.parent for path in (folder / RUNS).glob(f"*/{directory.RECORD}"))
    return places | {f"{RUNS}/{path.name}": path for path in inside}


def load_results(
    repo_id_or_dir: str | os.PathLike[str],
    config: str = MATCH.folder,
    revision: str | None = None,
    *,
    run: str | None = None,
    with_float: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset:
    """Load the rows of a dataset or of a run directory, images decoded.

    Rows of several runs are in one table. The columns of provenance state model, readout and data; pass `run` to
    separate runs that differ in other settings, such as `max_evals` or `refine`. Images are None if photos are
    withheld.

    Args:
        repo_id_or_dir: `USER/NAME` of the Hub, or a folder.
        config: `matches`, `spectra`, `lipschitz` or `paths`.
        revision: branch, tag, commit or `refs/pr/N` of the dataset.
        run: only the rows of this run of a dataset, by its name in the table of the card; None for all runs.
        with_float: add `match_float`, the match before it was rounded to 8 bit: a float tensor (3, H, W) with values in
            [0, 1], read from its file when the row is asked for; None where there is none. Only for `matches`.
        token: for private datasets; by default the one you are logged in with.
        cache_dir: folder of the downloads; by default the Hub's cache.

    Returns:
        One row for each pair, image, direction or step.

    Raises:
        FileNotFoundError: a folder that does not exist.
        ValueError: an unknown configuration, or no rows of it; an unknown run.
        RepositoryNotFoundError: there is no such dataset, or it is private.

    Example:
        >>> rows = load_results("me/matches", with_float=True)  # doctest: +SKIP
        >>> rows[0]["match"].size, tuple(rows[0]["match_float"].shape)  # doctest: +SKIP
        ((224, 224), (3, 224, 224))
    """
    layout = _CONFIGS.get(config)
    if layout is None:
        raise ValueError(f"`config` must be one of {', '.join(_CONFIGS)}; got {config!r}.")
    if with_float and layout is not MATCH:
        raise ValueError(f"`with_float` must be False for {config!r}: only matches have float images to load.")
    name, cache = os.fspath(repo_id_or_dir), None if cache_dir is None else os.fspath(cache_dir)
    folders = [layout.folder, "float"] if with_float else [layout.folder]
    folder = local_folder(name, revision) or _snapshot(*split_name(name, revision), folders, token, cache)
    files = _files(name, folder, layout, run)

    def check(row: Row) -> None:  # before `datasets` decodes an image by any decoder that its bytes name
        check_pictures(open_cells(row, layout), layout)

    rows, _ = load_parquet(name, files, cache, layout.all_features, check)
    if not with_float:
        return rows
    origin = [str(float_file(path)) for path in files for _ in read_shard(path)]
    return rows.add_column("float_file", origin).with_transform(_decode_with_float)


def _files(name: str, folder: Path, layout: Layout, run: str | None) -> list[Path]:
    """Return the files with rows of a layout, of one run or of all."""
    places = run_folders(folder)
    runs = list(places.values()) or [folder]
    if run is not None:
        named = {path.name if place else run_name(directory.read_record(path)): path for place, path in places.items()}
        if run not in named:
            there = ", ".join(named) or "none"
            raise ValueError(f"`run` must be the name of a run of {name!r}; got {run!r}; it holds {there}.")
        runs = [named[run]]
    files = [path for place in runs for path in shard_files(place, layout)]
    if not files:
        stated = [directory.read_record(place) for place in runs if places]
        there = ", ".join(sorted({LAYOUTS[directory.analysis_of(record)].folder for record in stated})) or "no rows"
        raise ValueError(f"{name!r} must hold rows of {layout.folder!r}; it has {there}. Choose another `config`.")
    return files


def _decode_with_float(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if "float_file" not in batch or "pair_id" not in batch:
        return batch
    pairs = zip(batch["float_file"], batch["pair_id"], strict=True)
    opened = ((_open(path), pair) for path, pair in pairs)
    floats = [file.get_tensor(pair) if file and pair in file.keys() else None for file, pair in opened]
    return batch | {"match_float": floats}


@lru_cache(maxsize=16)
def _open(path: str) -> Any:
    return safe_open(path, framework="pt") if Path(path).is_file() else None
