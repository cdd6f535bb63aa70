"""Collect the files of a Space: the app, its library, and the README.md that makes the repository a Space."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import SpaceCardData

from hf_equiv.hub.card import END, around_block, joined, split_header
from hf_equiv.hub.repository import StagedFile, staged
from hf_equiv.runs.directory import CARD

# Variables that tell the app the dataset to show and the checkpoints to offer.
DATASET, MODELS = "HF_EQUIV_DATASET", "HF_EQUIV_MODELS"

APP, REQUIREMENTS, LICENCE = "app.py", "requirements.txt", "LICENSE"

INITIAL = {".gitattributes", ".gitignore", CARD}  # files of a Space without an app

_LIBRARY = "hf_equiv"  # folder of the library in a Space, and the tag that marks a Space as one of ours
_PACKAGE = "hf-equiv"
_HERE = Path(__file__).parents[1]
_INSIDE = "spaces_app"
_START = "<!-- hf_equiv: from here to the end mark `hf-equiv space deploy` writes the text; text outside is kept -->"
# Keys of the header that follow the app; the owner sets the others once the Space is one of ours.
_TECHNICAL = ("sdk", "sdk_version", "python_version", "app_file")


@dataclass(frozen=True)
class App:
    """The app and the library behind it."""

    files: Mapping[str, bytes]  # files of the app, and of a library that is brought along, by path in the Space
    library: str  # the source of the library in words


def app_folder() -> Path:
    """Return the folder of the app: in the installed package, or beside it in a clone."""
    for folder in (_HERE / _INSIDE, _HERE.parent / _INSIDE):
        if (folder / APP).is_file():
            return folder
    raise FileNotFoundError(
        f"the app of the Space is missing from this installation ({_HERE / _INSIDE}). Install again."
    )


def app_of(wheel: Path | None) -> App:
    """Read the app, and the library from a wheel or from this installation; an installation from an index is pinned."""
    # The build of a Space sees only requirements.txt, so it cannot find a wheel that this file names by path. Therefore
    # the library's files go into the Space, beside the app, which imports them.
    if wheel is not None:
        return _from_wheel(wheel)
    try:
        installed = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        told = "hf_equiv must be installed to be deployed; its metadata is missing here"
        raise ValueError(f"{told}. Install it, or pass `wheel`.") from None
    if installed.read_text("direct_url.json") is not None:
        return _bring_along(app_folder(), _HERE, installed, "as installed here")
    app, pinned = _read(app_folder()) | _licence(installed), f"{_PACKAGE}=={installed.version}"
    return App(app | {REQUIREMENTS: _requirements(app[REQUIREMENTS], [pinned])}, pinned)


def _from_wheel(wheel: Path) -> App:
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"`wheel` must be a wheel file; got {str(wheel)!r} ({type(error).__name__}).") from None
        found = (one for one in metadata.distributions(path=[unpacked]) if one.read_text("METADATA"))
        described = next(found, None)
        if described is None or _project(str(described.name)) != _PACKAGE:
            raise ValueError(f"`wheel` must be a wheel of {_PACKAGE}; got {wheel.name!r}. Make one: `python -m build`.")
        library = Path(unpacked, _LIBRARY)
        if not all((library / _INSIDE / name).is_file() for name in (APP, REQUIREMENTS, CARD)):
            told = f"`wheel` must hold the app of the Space; {wheel.name!r} does not"
            raise ValueError(f"{told}. Build one of this version.")
        return _bring_along(library / _INSIDE, library, described, f"from {wheel.name}")


def _bring_along(app_at: Path, library_at: Path, described: metadata.Distribution, source: str) -> App:
    """Put the library beside the app as an installer would, so that the app can read its version."""
    app = _read(app_at) | _licence(described)
    files = {f"{_LIBRARY}/{name}": data for name, data in _read(library_at).items()
             if not name.startswith(f"{_INSIDE}/")}  # fmt: skip
    needed = [line for line in described.requires or () if not re.search(r"\bextra\s*==", line)]
    files[REQUIREMENTS] = _requirements(app[REQUIREMENTS], needed)
    header = str(described.read_text("METADATA")).partition("\n\n")[0] + "\n"
    files[f"hf_equiv-{described.version}.dist-info/METADATA"] = header.encode()
    return App(app | files, f"{_PACKAGE} {described.version}, brought along {source}")


def _licence(described: metadata.Distribution) -> dict[str, bytes]:
    """Return the licence of the library and of the app, if the installation has it."""
    text = described.read_text(f"licenses/{LICENCE}")
    return {} if text is None else {LICENCE: text.encode()}


def _read(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by path, without hidden ones and caches."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        inside.as_posix(): path.read_bytes()
        for inside, path in found.items()
        if not any(part.startswith((".", "__pycache__")) for part in inside.parts)
    }


def _requirements(template: bytes, needed: Sequence[str]) -> bytes:
    """Replace the library in the template by `needed` lines, without projects that the template names itself."""
    lines = template.decode().splitlines()
    named = {_project(line) for line in lines} - {_PACKAGE}
    added = [line for line in needed if _project(line) not in named]
    made = [new for line in lines for new in (added if _project(line) == _PACKAGE else [line])]
    return ("\n".join(made) + "\n").encode()


def _project(line: str) -> str:
    found = re.match(r"[A-Za-z0-9][\w.-]*", line)
    return "" if found is None else re.sub(r"[-_.]+", "-", found[0]).lower()


def is_ours(readme: str | None) -> bool:
    """Return whether a README.md belongs to a Space of hf_equiv."""
    return _LIBRARY in joined(split_header(readme or "", "the Space")[0].get("tags"))


def stage(
    app: App, readme: str | None, there: Mapping[str, str], variables: Mapping[str, str], before: Mapping[str, str]
) -> tuple[list[StagedFile], list[str]]:
    """Return the files to deploy, and the paths of an earlier copy of the library to delete."""
    kept = {CARD, LICENCE} if LICENCE in there else {CARD}  # a licence that is there may be the owner's
    files = [staged(path, data) for path, data in app.files.items() if path not in kept]
    files.append(staged(CARD, _space_card(app.files[CARD].decode(), readme, variables, before)))
    wanted = {file.path for file in files}
    own = re.compile(rf"{_LIBRARY}/|hf_equiv-[^/]*\.dist-info/")
    return files, [path for path in there if own.match(path) and path not in wanted]


def _space_card(template: str, previous: str | None, variables: Mapping[str, str], before: Mapping[str, str]) -> str:
    """Write the README.md of a Space: text outside the marks and, if the Space is ours, the owner's settings stay."""
    made, body = split_header(template, "the app")
    there, text = split_header(previous or "", "the Space")
    facts: dict[str, Any] = {**there, **made}
    if is_ours(previous):
        facts |= {key: value for key, value in there.items() if key not in _TECHNICAL}
    facts["tags"] = joined(made["tags"], joined(there.get("tags")))
    for key, names_in in (("datasets", datasets_in), ("models", models_in)):
        kept = [name for name in joined(there.get(key)) if name not in names_in(before)]
        facts[key] = joined(names_in(variables), kept)
    header = SpaceCardData(**{key: value for key, value in facts.items() if value not in (None, [])}).to_yaml()
    above, below = around_block(text, "the Space")
    return f"---\n{header}\n---\n{above}{_START}\n\n{body.strip()}\n\n{END}{below}"


def datasets_in(variables: Mapping[str, str]) -> list[str]:
    """Return the ids of the datasets that the app shows."""
    name = variables.get(DATASET, "").partition("@")[0]
    return [name] if name else []


def models_in(variables: Mapping[str, str]) -> list[str]:
    """Return the ids of the checkpoints that may be chosen, beside the built-in one."""
    return [name for name in variables.get(MODELS, "").split(",") if name and PurePosixPath(name).name != "builtin"]
