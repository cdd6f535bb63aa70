"""The files of a Space: the app, the library that it needs, and the README.md that makes the repository a Space.

Nothing here uses the network.
"""

from __future__ import annotations

import re
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

DATASET, MODELS = "HF_EQUIV_DATASET", "HF_EQUIV_MODELS"
"""Variables that tell the app what to show and which checkpoints may be chosen."""


TAG = "hf_equiv"
"""Marks a Space as one of ours."""


APP, REQUIREMENTS = "app.py", "requirements.txt"


LIBRARY = "hf_equiv"
"""Folder of the library in a Space that brings it along."""


_PACKAGE = "hf-equiv"


_INSIDE = "spaces_app"


_START = "<!-- hf_equiv: from here to the end mark `hf-equiv space deploy` writes the text; text outside is kept -->"


_TECHNICAL = ("sdk", "sdk_version", "python_version", "app_file")
"""Keys of the header that follow the app; the others are their owner's once the Space is one of ours."""


_INITIAL = {".gitattributes", ".gitignore", CARD}
"""What a Space holds before there is an app."""


@dataclass(frozen=True)
class App:
    """The app and the library behind it.

    Attributes:
        files: content by path in the Space: the app's own, and those of the library where it is brought along.
        library: the library in words.
    """

    files: Mapping[str, bytes]
    library: str


def app_folder() -> Path:
    """Where the app of this installation is: in the installed package, or beside it in a clone."""
    here = Path(__file__).parents[1]
    for folder in (here / _INSIDE, here.parent / _INSIDE):
        if (folder / APP).is_file():
            return folder
    raise FileNotFoundError(
        f"the app of the Space is missing from this installation ({here / _INSIDE}). Install again."
    )


def app_of(wheel: Path | None) -> App:
    """Read the app and settle where a Space gets the library from.

    A wheel that is required by path is not found when a Space is built, because only requirements.txt is seen then. So
    where the library comes from no package index its files go into the Space, beside the app, which imports them.

    Args:
        wheel: of hf_equiv, to bring along; None for this installation: pinned if it came from a package index, else
            brought along as it is here.

    Returns:
        The app.

    Raises:
        ValueError: the wheel is none of this library, or too old to have an app.
    """
    if wheel is not None:
        return _from_wheel(wheel)
    files = _read(app_folder())
    try:
        installed = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise ValueError(
            "hf_equiv must be installed to be deployed; its metadata is missing here. Install it, or pass `wheel`."
        ) from None
    if installed.read_text("direct_url.json") is None:
        pinned = f"{_PACKAGE}=={installed.version}"
        files[REQUIREMENTS] = _requirements(files[REQUIREMENTS], [pinned])
        return App(files, pinned)
    facts = installed.read_text("METADATA") or ""
    package = {f"{LIBRARY}/{name}": data for name, data in _read(Path(__file__).parents[1]).items()}
    return _bring_along(files, package, facts, f"{_PACKAGE} {installed.version}, brought along as installed here")


def _from_wheel(wheel: Path) -> App:
    try:
        with zipfile.ZipFile(wheel) as archive:
            held = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"`wheel` must be a wheel file; got {str(wheel)!r} ({type(error).__name__}).") from None
    facts = next((data.decode() for name, data in held.items() if name.endswith(".dist-info/METADATA")), "")
    if _field(facts, "Name").replace("_", "-") != _PACKAGE:
        raise ValueError(
            f"`wheel` must be a wheel of {_PACKAGE}; got {wheel.name!r}. Build one with `python -m build`."
        )
    inside = f"{LIBRARY}/{_INSIDE}/"
    app = {name.removeprefix(inside): data for name, data in held.items() if name.startswith(inside)}
    if not {APP, REQUIREMENTS, CARD} <= set(app):
        raise ValueError(f"`wheel` must hold the app of the Space; {wheel.name!r} does not. Build one of this version.")
    package = {n: data for n, data in held.items() if n.startswith(f"{LIBRARY}/") and not n.startswith(inside)}
    return _bring_along(app, package, facts, f"{_PACKAGE} {_field(facts, 'Version')}, brought along from {wheel.name}")


def _bring_along(app: dict[str, bytes], package: Mapping[str, bytes], facts: str, told: str) -> App:
    """Lay the library beside the app as an installer would, so that its version is known there too."""
    needed = [line for line in _fields(facts, "Requires-Dist") if not re.search(r"\bextra\s*==", line)]
    app = app | {REQUIREMENTS: _requirements(app[REQUIREMENTS], needed)}
    inside = {name: data for name, data in package.items() if not name.startswith(f"{LIBRARY}/{_INSIDE}/")}
    place = f"hf_equiv-{_field(facts, 'Version')}.dist-info/METADATA"
    return App({**app, **inside, place: facts.partition("\n\n")[0].encode() + b"\n"}, told)


def _read(folder: Path) -> dict[str, bytes]:
    """Path to content; without what running left there."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        inside.as_posix(): path.read_bytes()
        for inside, path in found.items()
        if not any(part.startswith((".", "__pycache__")) for part in inside.parts)
    }


def _fields(facts: str, name: str) -> list[str]:
    head = facts.partition("\n\n")[0]
    return re.findall(rf"^{name}:\s*(.*?)\s*$", head, re.MULTILINE)


def _field(facts: str, name: str) -> str:
    return next(iter(_fields(facts, name)), "")


def _requirements(template: bytes, needed: Sequence[str]) -> bytes:
    """The template with these lines in place of the library; what it names itself is not named twice."""
    lines = template.decode().splitlines()
    at = next(i for i, line in enumerate(lines) if _project(line) == _PACKAGE)
    named = {_project(line) for line in lines}
    added = [line for line in needed if _project(line) == _PACKAGE or _project(line) not in named]
    return ("\n".join([*lines[:at], *added, *lines[at + 1 :]]) + "\n").encode()


def _project(line: str) -> str:
    found = re.match(r"[A-Za-z0-9][\w.-]*", line)
    return "" if found is None else re.sub(r"[-_.]+", "-", found[0]).lower()


# --- the Space ---


def is_ours(readme: str | None) -> bool:
    """Whether a README.md is that of a Space of hf_equiv."""
    tags = split_header(readme or "", "the Space")[0].get("tags") or []
    return TAG in ([tags] if isinstance(tags, str) else tags)


def is_empty(paths: Mapping[str, str]) -> bool:
    """Whether a Space is as it was made."""
    return set(paths) <= _INITIAL


def stage(
    app: App, readme: str | None, there: Mapping[str, str], variables: Mapping[str, str], before: Mapping[str, str]
) -> tuple[list[StagedFile], list[str]]:
    """Settle what a deployment writes and what it removes.

    Args:
        app: to deploy.
        readme: README.md of the Space; None for one without an app.
        there: the paths of the Space.
        variables: of the app, as they will be.
        before: as they are.

    Returns:
        The files, and the paths of an earlier copy of the library that are no longer part of it.
    """
    files = [staged(path, data) for path, data in app.files.items() if path != CARD]
    files.append(staged(CARD, space_card(app.files[CARD].decode(), readme, variables, before)))
    wanted = {file.path for file in files}
    own = re.compile(rf"{LIBRARY}/|hf_equiv-[^/]*\.dist-info/")
    return files, sorted(path for path in there if own.match(path) and path not in wanted)


def space_card(template: str, previous: str | None, variables: Mapping[str, str], before: Mapping[str, str]) -> str:
    """Write the README.md of a Space.

    Args:
        template: README.md of the app.
        previous: the one that is there: text outside the marks stays, and what its owner set once it is one of ours.
        variables: of the app, as they will be: the dataset and the models in them are linked.
        before: as they are: what was linked for their sake is linked no longer.

    Returns:
        Markdown with a YAML header.

    Raises:
        ValueError: the YAML header of the previous one cannot be read.
    """
    made, body = split_header(template, "the app")
    there, text = split_header(previous or "", "the Space")
    facts: dict[str, Any] = {**there, **made}
    if is_ours(previous):
        facts |= {key: value for key, value in there.items() if key not in _TECHNICAL}
    facts["tags"] = joined(made["tags"], joined(there.get("tags"), []))
    for key, linked in (("datasets", datasets_in), ("models", models_in)):
        kept = [name for name in joined(there.get(key), []) if name not in linked(before)]
        facts[key] = joined(linked(variables), kept)
    facts = {key: value for key, value in facts.items() if value not in (None, [])}
    above, below = around_block(text, "the Space")
    header = SpaceCardData(**facts).to_yaml()
    return f"---\n{header}\n---\n{above}{_START}\n\n{body.strip()}\n\n{END}{below}"


def datasets_in(variables: Mapping[str, str]) -> list[str]:
    """Ids of the datasets that the app shows."""
    name = variables.get(DATASET, "").partition("@")[0]
    return [name] if name else []


def models_in(variables: Mapping[str, str]) -> list[str]:
    """Ids of the checkpoints that may be chosen, beside the built-in one."""
    return [name for name in variables.get(MODELS, "").split(",") if name and PurePosixPath(name).name != "builtin"]
