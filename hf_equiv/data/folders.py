"""Find the image files of a folder and their classes, and say what is left out or guessed."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hf_equiv.data.image_file import IMAGE_SUFFIXES
from hf_equiv.formatting import many, some
from hf_equiv.limits import MAX_BYTES

LABEL_FILE = "labels.csv"
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "category")
METADATA = ("metadata.csv", "metadata.jsonl")

_MOST_LINKS = 16  # ways to one folder

_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test|testing|eval|evaluation)([-._ 0-9].*)?", re.I)


@dataclass(frozen=True)
class Folder:
    """The images of a folder by their path inside it, sorted, with classes; or else its parquet files."""

    photos: Mapping[str, Path]
    labels: tuple[str | None, ...]
    tables: tuple[Path, ...]
    choices: tuple[str, ...]  # a sentence on everything that is left out or guessed


def read_folder(folder: Path) -> Folder:
    """Search a folder and the folders in it, links included."""
    found = dict(sorted((path.relative_to(folder).as_posix(), path) for path in _walk(folder)))
    runs = {path.parent for path in found.values() if path.name == "run.json"} - {folder}
    usable = {
        name: path
        for name, path in found.items()
        if os.path.isfile(path)
        and not _is_hidden(name)
        and runs.isdisjoint(path.parents)  # figures of a run are no photos
    }
    photos = {name: path for name, path in usable.items() if path.suffix.lower() in IMAGE_SUFFIXES}
    if photos:
        labels, used, said = _labels(photos, usable)
        tables: tuple[Path, ...] = ()
    else:
        tables = tuple(path for path in usable.values() if path.suffix.lower() == ".parquet")
        labels, used, said = (), [path.relative_to(folder).as_posix() for path in tables], []
    kept = {*photos, *used}
    left = [  # a hidden file is left out in silence, unless it is an image
        name
        for name, path in found.items()
        if name not in kept and not (_is_hidden(name) and path.suffix.lower() not in IMAGE_SUFFIXES)
    ]
    if left:
        said.append(f"leaving out {many(len(left), 'file')}{'' if photos else ', no image or table'}: {some(left, 4)}")
    return Folder(photos, labels, tables, tuple(said))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, and each folder in it that cannot be entered or leads back to one above."""
    # Links to folders of links multiply: a folder that was entered often enough is left out as well.
    root, unreadable, times = folder.resolve(), list[str](), Counter[Path]()
    above = {folder: frozenset([root])}
    for place, inside, files in os.walk(folder, followlinks=True, onerror=lambda e: unreadable.append(e.filename)):
        here = Path(place)
        for name in list(inside):
            real = (here / name).resolve()
            times[real] += 1
            if real in above[here] or root.is_relative_to(real) or times[real] > _MOST_LINKS:
                inside.remove(name)
                yield here / name
            else:
                above[here / name] = above[here] | {real}
        yield from (here / name for name in files)
    yield from map(Path, unreadable)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _labels(
    photos: Mapping[str, Path], files: Mapping[str, Path]
) -> tuple[tuple[str | None, ...], list[str], list[str]]:
    """Return the class of each photo, the files that state classes, and a sentence on each guess."""
    stated: dict[str, str] = {}
    said: list[str] = []
    tables = [name for name, path in files.items() if name == LABEL_FILE or path.name in METADATA]
    for name in sorted(tables, key=lambda name: (name == LABEL_FILE, name)):  # labels.csv overrides the others
        labels, told = _read_labels(files[name], name)
        places = {key: key for key in photos if key in labels}
        if name == LABEL_FILE:  # it may name a file without its folder
            places |= {key: path.name for key, path in photos.items() if key not in labels and path.name in labels}
        absent = sorted(labels.keys() - places.values())
        stated |= {key: labels[place] for key, place in places.items()}
        said.append(f"{told} ({many(len(places), 'image')})" if labels else told)
        said += [f"{name} names files that are not there ({len(absent)}): {some(absent, 4)}"] if absent else []
    classes, guessed = _folder_names(photos)
    if without := [name for name in photos if name not in stated] if stated else []:
        said.append(f"images without a class in {' and '.join(tables)} ({len(without)}): {some(without, 4)}")
    return tuple(stated.get(name, classes[name]) for name in photos), tables, said + ([] if stated else guessed)


def _folder_names(photos: Mapping[str, Path]) -> tuple[dict[str, str | None], list[str]]:
    """Return the folder of each photo as its class, unless the folders are splits or there is only one."""
    inside = {name: PurePosixPath(name).parts[:-1] for name in photos}
    if len({folders[-1:] for folders in inside.values()}) == 1 and len(set(inside.values())) > 1:
        inside = {name: folders[:-1] for name, folders in inside.items()}  # CLASS/images/PHOTO
    names = {folders[-1] for folders in inside.values() if folders}
    tops = {folders[0] for folders in inside.values() if folders}
    splits, said = {name for name in names | tops if _SPLIT.fullmatch(name)}, []
    if len(splits) < 2 and not names <= splits:  # `train` may be a class, beside `bus`
        splits = set()
    if splits:
        told = f"taking the folders {some(sorted(splits), 4)} for splits and their images together"
        said.append(f"{told}; name one of the folders to take it alone")
    names -= splits
    if len(names) == 1:
        said.append(f"the folder {min(names)!r} is no class, since there is no other")
        names = set()
    if names:
        said.append(f"taking the names of folders as classes: {some(sorted(names), 4)}")
    return {name: folders[-1] if folders and folders[-1] in names else None for name, folders in inside.items()}, said


def _read_labels(path: Path, name: str) -> tuple[dict[str, str], str]:
    """Return the classes that a table states, by the path of the image inside the folder, and a sentence on it."""
    columns, rows = _read_rows(path, name)
    file = next((column for column in ("file", "file_name") if column in columns), None)
    wanted = ("name", "label") if name == LABEL_FILE else LABEL_COLUMNS
    label = next((column for column in wanted if column in columns), None)
    if file is None or label is None:
        if name == LABEL_FILE:
            raise ValueError(
                f"{name!r} must have columns file,label[,name]; got {some(columns, 4)}. Name them in its first line."
            )
        told = f"{name} gives no classes: it must have the columns file_name and label; it has {some(columns, 4)}"
        return {}, told
    found: dict[str, str] = {}
    for row in rows:
        given, value = row.get(file), row.get(label)
        if given and value not in (None, ""):
            key = os.path.normpath(PurePosixPath(name).parent / str(given).replace("\\", "/"))
            if found.setdefault(key, str(value)) != str(value):
                told = f"{name!r} must have one class for each file; {given!r} is {found[key]!r} and {value!r}"
                raise ValueError(f"{told}. Correct it.")
    return found, f"taking classes from the column {label!r} of {name}"


def _read_rows(path: Path, name: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Read a CSV file, with commas, semicolons or tabs, or a file of one JSON object a line."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{name!r} must have at most {MAX_BYTES:,} bytes; got {path.stat().st_size:,}. Shorten it.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:  # spreadsheets begin a file with a mark
            if path.suffix == ".jsonl":
                rows = [dict(json.loads(line)) for line in stream if line.strip()]
                return list(dict.fromkeys(column for row in rows for column in row)), rows
            head = stream.readline()
            stream.seek(0)
            table = csv.DictReader(stream, delimiter=max(",;\t", key=head.count))
            rows = [{str(key).strip(): value for key, value in row.items()} for row in table]
            return [column.strip() for column in table.fieldnames or []], rows
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
        told = f"{name!r} must be a {'file of JSON lines' if path.suffix == '.jsonl' else 'CSV file'} in UTF-8"
        raise ValueError(f"{told}; it cannot be read ({error}). Save it anew.") from error
