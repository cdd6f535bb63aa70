"""Check `run.json` against the folder it is in: files, model, what is listed, card (private helper of `verify`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from hf_equiv import card, rundir, shards
from hf_equiv.results import SCHEMA_VERSION, Status
from hf_equiv.rowcheck import Findings
from hf_equiv.shards import MATCH, Layout, Row

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder


def check_model(encoder: Encoder, settings: Row, found: Findings) -> None:
    """The weights and the scaling of pixels must be those that the run states."""
    loaded = encoder.provenance["model_revision"]
    if loaded != settings["model_revision"]:
        other = f"other weights were loaded: {loaded}; the run states {settings['model_revision']}"
        found.say("run.json", None, "model_revision", settings["model_revision"], loaded, other)
    stated, here = (json.loads(text) for text in (settings["processor"], encoder.provenance["processor"]))
    for key in ("image_mean", "image_std"):
        if stated.get(key) != here.get(key):
            found.add("run.json", None, f"processor.{key}", stated.get(key), here.get(key), "pixels are scaled")


def check_files(folder: Path, record: Row, found: Findings) -> None:
    """Every file must have the SHA-256 that is stated, and a finished run must state one for every file."""
    stated: Mapping[str, str] = record["files"]
    for name, digest in stated.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            found.say(name, None, "sha256", digest, None, "the file is outside the run directory")
            continue
        path = folder / name
        now = shards.sha256_file(path) if path.is_file() else None
        if now != digest:
            how = "is missing" if now is None else "changed: its SHA-256 is not what run.json states"
            found.say(name, None, "sha256", digest, now, f"the file {how}")
    if not record["complete"]:
        return
    for path in sorted(rundir.own_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name not in stated:
            found.say(name, None, "sha256", None, shards.sha256_file(path), "run.json does not list this file")


def check_listed(record: Row, layout: Layout, rows: Sequence[Row], found: Findings) -> bool:
    """Every pair or image that is listed must have its rows, as many as were asked for; errors need their reason.

    Returns:
        Whether all is there, so that a summary can be made.
    """
    listed = [item[layout.item] for item in record[layout.listed]]
    there = {row[layout.item]: row["status"] for row in rows}
    what, missing = ("row", "missing") if layout is MATCH else ("image", "its rows are missing")
    for name in dict.fromkeys(listed):
        if name not in there:
            why = "" if record["complete"] else f"; the run is not finished: run the same {layout.analysis} command"
            told = f"{what} {name!r} is listed and {missing} from {layout.folder}/{why}"
            found.say("run.json", name, layout.item, "a row", "no row", told)
        if listed.count(name) > 1:
            found.say("run.json", name, layout.item, "once", "twice", f"{what} {name!r} is listed twice")
    count = record["settings"].get(f"num_{layout.listed}", len(listed))
    if count != len(listed):
        told = f"the settings ask for {count} {layout.listed}; {len(listed)} are listed"
        found.say("run.json", None, f"settings.num_{layout.listed}", count, len(listed), told)
    version = record["settings"].get("schema_version", record["schema_version"])
    if version != record["schema_version"] or not 1 <= version <= SCHEMA_VERSION:
        found.add("run.json", None, "settings.schema_version", version, record["schema_version"])
    if not set(listed) <= set(there):
        return False
    if not record["complete"]:
        told = f"all rows are there, but the run is not closed: run the same {layout.analysis} command"
        found.say("run.json", None, "complete", False, True, told)
    failed = {name for name, status in there.items() if status == Status.ERROR}
    for name in sorted(failed ^ set(record.get("errors", {}))) if record["complete"] else ():
        told = "states no error" if name in failed else "states an error of a row that has none"
        found.say("run.json", name, "errors", name not in failed, name in failed, f"run.json {told}: {name!r}")
    return True


def check_card(folder: Path, record: Row, made: Row, found: Findings) -> None:
    """The numbers of README.md must be those of the rows; a card of another schema may be put in other words."""
    path = folder / "README.md"
    if record["schema_version"] != SCHEMA_VERSION or not path.is_file():
        return
    wanted = card.run_card(record["settings"], made).splitlines()
    there = set(path.read_text(encoding="utf-8", errors="replace").splitlines())
    for line in wanted:
        if line.startswith("| ") and line not in there and not line.startswith("| |"):
            told = f"the card does not say what the rows say: {line}"
            found.say("README.md", None, line.split(" | ")[0].removeprefix("| "), None, line, told)
