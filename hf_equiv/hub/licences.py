"""Decide whether the photos of a run may be published, by the licence of the images that it was made from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx

from hf_equiv.data.sources import load_images
from hf_equiv.hub_client import api_of

FREE = frozenset(
    {
        "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-2.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
        "mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "pddl", "odc-by", "odbl", "cdla-permissive-1.0",
        "cdla-permissive-2.0", "unlicense", "wtfpl", "isc", "zlib", "bsl-1.0", "etalab-2.0",
    }
)  # fmt: skip
"""Licences, by their names on the Hub, under which images may be shared and changed."""

_CLOSED_SETS = re.compile(r"imagenet|ilsvrc|celeba|vggface|ms-?celeb", re.IGNORECASE)

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class PhotoRights:
    """The decision whether the photos of a run are published, and its reason."""

    published: bool
    license: str | None  # identifier on the Hub, for the card; None if there is nothing to state
    why: str
    asked: bool = False  # whether the user asked to leave the photos out


def photo_rights(
    settings: Mapping[str, Any], *, license: str | None = None, i_have_the_right: bool = False, token: Any = None
) -> PhotoRights:
    """Decide whether the photos of a run with these settings may be published."""
    # Free are the built-in photos, and Hub datasets that are not gated and whose card names a licence of `FREE`.
    # Folders, files and datasets without a licence in the card have an unknown licence: the user's word counts.
    # Gated sets, sets that are known to be restricted and all other licences need `i_have_the_right`.
    free: dict[str, str] = {}
    closed: dict[str, str] = {}
    unknown: set[str] = set()
    for name, revision in _sources(settings):
        found, why = _licence_of(name, revision, token)
        if why is not None:
            closed[name] = why
        elif found is None:
            unknown.add(name)
        else:
            free[name] = found
    free = {name: found for name, found in free.items() if name not in unknown}  # a folder may be called `builtin`
    unknown -= closed.keys()
    stated, names = license.lower() if license else None, ", ".join(sorted(unknown))
    if not closed and (not unknown or stated in FREE):
        told = [f"{n}: {'CC0 or public domain' if n == 'builtin' else found}" for n, found in sorted(free.items())]
        told += [f"{names}: {license}"] if unknown else []
        licences = {*free.values(), *([str(stated)] if unknown else [])}
        return PhotoRights(True, licences.pop() if len(licences) == 1 else "other", f"free: {'; '.join(told)}")
    reasons = [f"{name} {why}" for name, why in sorted(closed.items())]
    if unknown and stated is None:
        reasons.append(f"the licence of {', '.join(map(repr, sorted(unknown)))} is not known")
    elif unknown and stated not in FREE:
        reasons.append(f"{license!r} is not among the licences that are known to be free")
    if i_have_the_right:
        return PhotoRights(True, stated or "other", f"the publisher states to have the right ({'; '.join(reasons)})")
    return PhotoRights(False, None, "; ".join(reasons))


def how_to_change(rights: PhotoRights, *, stated: bool) -> str:
    """Return the arguments for the other decision, in a sentence; `stated` tells whether a licence was named."""
    if rights.published:
        return "To leave them out, pass `withhold_photos=True`."
    if rights.asked:
        return "To publish them, leave out `withhold_photos`. Earlier commits keep what they hold."
    cure = "With the right to publish them, pass `i_have_the_right=True`."
    if "is not known" in rights.why and not stated:
        return f"If they are free, name their licence, as in `license='cc-by-4.0'`. {cure}"
    return cure


def _sources(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and revision of each set that the images come from."""
    names, revisions = str(settings["data_id"]).split(" + "), str(settings["data_revision"]).split(" + ")
    if len(names) != len(revisions):  # a folder with a plus in its name
        return [(str(settings["data_id"]), "")]
    return list(zip(names, revisions, strict=True))


def _licence_of(name: str, revision: str, token: Any) -> tuple[str | None, str | None]:
    """Return (licence or None, why the images are restricted or None)."""
    if name == "builtin" and revision == load_images("builtin").data_revision:
        return "cc0-1.0", None
    if _CLOSED_SETS.search(name):
        return None, "is known to be restricted"
    if not _COMMIT.fullmatch(revision):
        return None, None
    try:
        info = api_of(token).dataset_info(name.split(":")[0], revision=revision)
    except hub_errors.GatedRepoError:
        return None, "is gated"
    except (OSError, httpx.HTTPError):  # gone, private, or out of reach
        return None, None
    if info.gated:
        return None, "is gated"
    found = info.card_data.get("license") if info.card_data else None
    names = [found] if isinstance(found, str) else list(found or [])
    if not names or names == ["unknown"]:
        return None, None
    bad = [item for item in names if str(item).lower() not in FREE]
    return (None, f"has licence {', '.join(map(repr, bad))}") if bad else (" and ".join(names), None)
