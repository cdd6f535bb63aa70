"""Published results back from the Hub, or from a directory: files at one commit, and rows with decoded images."""

from __future__ import annotations

import os
import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from safetensors import safe_open

from hf_equiv.data.sources import content_hash, file_digest
from hf_equiv.data.tables import load_parquet
from hf_equiv.hub_client import api_of, check_dataset_id, explained, hushed, patiently, version
from hf_equiv.runs import directory
from hf_equiv.runs.directory import CARD, OWN_FOLDERS, RUNS, run_name
from hf_equiv.runs.schema import LAYOUTS, MATCH, Layout
from hf_equiv.runs.shards import read_shard, shard_files

CONFIGS = {layout.folder: layout for layout in LAYOUTS.values()}


_WRITTEN = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def split_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Read `USER/NAME` or `USER/NAME@REVISION`.

    Args:
        name: of a dataset.
        revision: the same in a flag of its own.

    Returns:
        The name and the revision.

    Raises:
        ValueError: it is no such name, or the revision is given twice.
    """
    found = _WRITTEN.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{name!r} must be a run directory; it does not exist. Check the path. (Datasets of the Hub are named "
            "USER/NAME or USER/NAME@REVISION.)"
        )
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
        cache_dir: where downloads are kept; by default the Hub's cache.
        local_files_only: use what is in the cache, and never ask the Hub.
        with_float: fetch the float images too; they are most of the bytes.

    Returns:
        The folder, and the commit that it is at.

    Raises:
        RepositoryNotFoundError: there is no such dataset, or it is private.
        RevisionNotFoundError: it has no such revision.
        ConnectionError: the Hub is out of reach.
        LocalEntryNotFoundError: with `local_files_only`, a file is not in the cache.
        ValueError: a bad name, or a dataset without a run.

    Example:
        >>> folder, commit = download_results("me/matches")  # doctest: +SKIP
    """
    name = check_dataset_id(repo_id)
    folders = [folder for folder in OWN_FOLDERS if with_float or folder != "float"]
    inside = [directory.RECORD, *(f"{folder}/*" for folder in folders)]
    wanted = [CARD, *inside, *(f"{RUNS}/*/{pattern}" for pattern in [CARD, *inside])]
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    folder, commit = _snapshot(name, wanted, revision, token, cache_dir, local_files_only)
    runs = run_folders(folder)
    if not runs:
        raise ValueError(f"the dataset '{name}' holds no run of hf_equiv (no {directory.RECORD}). Check the name.")
    for place, run in runs.items():
        for file in directory.read_record(run)["files"] if local_files_only else ():
            if not (run / file).is_file() and (with_float or not file.startswith("float/")):
                raise hub_errors.LocalEntryNotFoundError(
                    f"of '{name}', {place}{'/' if place else ''}{file} is not in the cache and "
                    "`local_files_only=True`. Run once without it."
                )
    return folder, commit


@hushed()
def _snapshot(
    name: str, wanted: list[str], revision: str | None, token: Any, cache_dir: str | None, local_files_only: bool
) -> tuple[Path, str]:
    download = partial(
        snapshot_download, name, repo_type="dataset", revision=revision, allow_patterns=wanted, cache_dir=cache_dir,
        token=token, library_name="hf_equiv", library_version=version("hf_equiv"),
    )  # fmt: skip
    with explained(name, revision=revision, token=token):
        if local_files_only:
            folder = Path(download(local_files_only=True))
            return folder, folder.name
        api = api_of(token)  # asked first: without network, the download below takes what is in the cache and is silent
        patiently(lambda: api.dataset_info(name, revision=revision), lambda _: None, "asking for the dataset")
        folder = Path(patiently(download, lambda _: None, "downloading"))
        return folder, folder.name


def run_folders(folder: Path) -> dict[str, Path]:
    """The runs of a dataset on disk: the one at its root, and those in `runs/`.

    Args:
        folder: a run directory or a downloaded dataset.

    Returns:
        Run directories by place: "" for the root, or `runs/NAME`.
    """
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

    Rows of several runs are in one table. The columns of provenance tell model, readout and data; runs that differ in
    other settings, such as `max_evals` or `refine`, are told apart by `run`. Where photos are withheld, images are
    None.

    Args:
        repo_id_or_dir: `USER/NAME` of the Hub, or a folder.
        config: `matches`, `spectra`, `lipschitz` or `paths`.
        revision: branch, tag, commit or `refs/pr/N` of the dataset.
        run: only the rows of this run of a dataset, by its name in the table of the card; None for all runs.
        with_float: add `match_float`, the match before it was rounded to 8 bit: a float tensor (3, H, W) with values in
            [0, 1], read from its file when the row is asked for; None where there is none. Only for `matches`.
        token: for private datasets; by default the one you are logged in with.
        cache_dir: where downloads are kept; by default the Hub's cache.

    Returns:
        One row for each pair, image, direction or step.

    Raises:
        FileNotFoundError: a folder that does not exist.
        ValueError: an unknown configuration, or no rows of it; an unknown run, or one named for a run directory.
        RepositoryNotFoundError: there is no such dataset, or it is private.

    Example:
        >>> rows = load_results("me/matches", with_float=True)  # doctest: +SKIP
        >>> rows[0]["match"].size, tuple(rows[0]["match_float"].shape)  # doctest: +SKIP
        ((224, 224), (3, 224, 224))
    """
    layout = CONFIGS.get(config)
    if layout is None:
        raise ValueError(f"`config` must be one of {', '.join(CONFIGS)}; got {config!r}.")
    if with_float and layout is not MATCH:
        raise ValueError(f"`with_float` must be False for {config!r}: only matches have float images to load.")
    name = os.fspath(repo_id_or_dir)
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"`revision` must be None for a local folder; got {revision!r}.")
        folder = Path(name)
    elif name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"`repo_id_or_dir` must be a folder or a dataset USER/NAME; got {name!r}.")
    else:
        repo_id, revision = split_name(name, revision)
        parts = [f"{layout.folder}/*", directory.RECORD, *(["float/*"] if with_float else [])]
        wanted = [*parts, *(f"{RUNS}/*/{part}" for part in parts)]
        folder, _ = _snapshot(repo_id, wanted, revision, token, cache_dir, False)
    runs = run_folders(folder) or {"": folder}
    if run is not None:
        if Path(name).is_dir() and list(runs) == [""]:
            raise ValueError(f"`run` must be None for a run directory; got {run!r}. It holds one run.")
        runs = _one_run(name, runs, run)
    return _rows(name, runs, layout, with_float=with_float, cache_dir=cache_dir)


def _one_run(name: str, runs: dict[str, Path], wanted: str) -> dict[str, Path]:
    """The run of this name, at its place."""
    named = {run_name(directory.read_record(run)) if place == "" else run.name: place for place, run in runs.items()
             if (run / directory.RECORD).is_file()}  # fmt: skip
    if wanted not in named:
        there = f"it holds {', '.join(named)}" if named else "it holds none"
        raise ValueError(f"`run` must be the name of a run of {name!r}; got {wanted!r}. Of runs {there}.")
    return {named[wanted]: runs[named[wanted]]}


def _rows(
    name: str, runs: dict[str, Path], layout: Layout, *, with_float: bool, cache_dir: str | None
) -> datasets.Dataset:
    files = [path for run in runs.values() for path in shard_files(run, layout)]
    if not files:
        there = sorted({c for run in runs.values() for c in CONFIGS if shard_files(run, CONFIGS[c])})
        raise ValueError(
            f"{name!r} must hold rows of {layout.folder!r}; it has {', '.join(there) or 'no rows'}. Choose another "
            "`config`."
        )
    revision = content_hash([path.name for path in files], [file_digest(path) for path in files], [None] * len(files))
    rows = load_parquet(name, files, revision, cache_dir)
    if not with_float:
        return rows
    origin = [str(path.parents[1] / "float" / f"{path.stem}.safetensors") for path in files for _ in read_shard(path)]
    return rows.add_column("float_file", origin).with_transform(_decode_with_float)


def _decode_with_float(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Add the float match to rows that are being read."""
    if "float_file" not in batch or "pair_id" not in batch:
        return batch
    places = zip(batch["float_file"], batch["pair_id"], strict=True)
    return batch | {"match_float": [_float(path, pair) for path, pair in places]}


def _float(path: str, pair_id: str) -> Any:
    file = _open(path)
    return file.get_tensor(pair_id) if file is not None and pair_id in file.keys() else None


@lru_cache(maxsize=16)
def _open(path: str) -> Any:
    return safe_open(path, framework="pt") if Path(path).is_file() else None
