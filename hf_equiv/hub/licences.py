"""Decide whether the photos of a run may be published, by the licence of the images that it was made from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx

from hf_equiv.data.sources import load_images
from hf_equiv.hub.card import joined
from hf_equiv.hub_client import api_of

# Licences, by their names on the Hub, under which images may be shared and changed.
FREE = frozenset(
    "apache-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-2.0 "
    "cc-by-sa-3.0 cc-by-sa-4.0 cdla-permissive-1.0 cdla-permissive-2.0 etalab-2.0 isc mit odbl odc-by pddl unlicense "
    "wtfpl zlib".split()
)
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
    settings: Mapping[str, Any], *, license: str | None = None, i_have_the_right: bool = False, token: Any = None,
    ask: bool = True,
) -> PhotoRights:  # fmt: skip
    """Decide whether the photos of a run with these settings may be published; `ask` the Hub for its licences."""
    # The built-in photos are free, and so are Hub datasets that are not gated and whose card names a licence in `FREE`.
    # Folders, files and datasets without a licence in the card have an unknown licence, which `license` states.
    # Gated sets, sets that are known to be restricted and all other licences need `i_have_the_right`.
    stated = license.lower() if license else None
    licences, free, reasons = set(), [], []
    for name, revision in sorted(_sources(settings)):
        found, why = _licence_of(name, revision, token, ask)
        if why is not None:
            reasons.append(f"{name} {why}")
        elif found is None and stated not in FREE:
            asked = ask or not _COMMIT.fullmatch(revision)
            reasons.append(f"the licence of {name!r} is not known{'' if asked else ' without the Hub'}")
        else:
            licences.add(found or stated)
            free.append(f"{name}: {found or license}")
    if not reasons:
        return PhotoRights(True, licences.pop() if len(licences) == 1 else "other", f"free: {'; '.join(free)}")
    told = "; ".join(dict.fromkeys(reasons))
    if i_have_the_right:
        return PhotoRights(True, stated or "other", f"the publisher states to have the right ({told})")
    return PhotoRights(False, None, told)


def how_to_change(rights: PhotoRights) -> str:
    """Return a sentence with the arguments that would change the decision."""
    if rights.published:
        return "To leave them out, pass `withhold_photos=True`."
    if rights.asked:
        return "To publish them, leave out `withhold_photos`. Earlier commits keep what they hold."
    named = "If they are free, name their licence, as in `license='cc-by-4.0'`. " if "not known" in rights.why else ""
    return f"{named}With the right to publish them, pass `i_have_the_right=True`."


def _sources(settings: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Return name and revision of each set that the images come from."""
    names, revisions = (str(settings[key]).split(" + ") for key in ("data_id", "data_revision"))
    if len(names) != len(revisions):  # the name of a folder contains a plus
        return {(str(settings["data_id"]), "")}
    return set(zip(names, revisions, strict=True))


def _licence_of(name: str, revision: str, token: Any, ask: bool) -> tuple[str | None, str | None]:
    """Return (licence or None, why the images are restricted or None)."""
    if name == "builtin" and revision == load_images("builtin").data_revision:
        return "cc0-1.0", None
    if _CLOSED_SETS.search(name):
        return None, "is known to be restricted"
    if not ask or not _COMMIT.fullmatch(revision):
        return None, None
    try:
        info = api_of(token).dataset_info(name.split(":")[0], revision=revision)
    except hub_errors.GatedRepoError:
        return None, "is gated"
    except (OSError, httpx.HTTPError, ValueError):  # gone, private, out of reach, or a web page
        return None, None
    if info.gated:
        return None, "is gated"
    names = joined(info.card_data.get("license") if info.card_data else None)
    if names in ([], ["unknown"]):
        return None, None
    bad = [item for item in names if str(item).lower() not in FREE]
    return (None, f"has licence {', '.join(map(repr, bad))}") if bad else (" and ".join(names), None)
