"""Check `run.json`: its keys, its list of pairs or images, and the settings, made again from the command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

from hf_equiv.analyses.lipschitz import SINGLE
from hf_equiv.analyses.pairs import Item
from hf_equiv.analyses.plan import read_command, settings_of
from hf_equiv.analyses.run import VERBS
from hf_equiv.formatting import some
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.recorded import is_local
from hf_equiv.results import SCHEMA_VERSION, Status
from hf_equiv.runs.directory import HEAD, RECORD, WITHHELD, is_withheld
from hf_equiv.runs.schema import Layout, Row
from hf_equiv.verify.rows import Problem, differs, problem
from hf_equiv.verify.unverified import NAMES

_CHOICES = {"card": ("dataset",), "photos": (WITHHELD, "published")}


def check_keys(record: Row, layout: Layout, versions: str | None) -> Iterator[Problem]:
    """Check that every key is known, and the few values that follow from others; `read_record` checks the types."""
    for key, value in record.items():
        if key not in {*HEAD, "summary", layout.listed}:
            told = f"key {key!r} is not one of a {layout.analysis} run"
            yield problem(RECORD, None, key, value, None, told)
        elif value not in _CHOICES.get(key, (value,)):
            yield differs(RECORD, None, key, value, " or ".join(_CHOICES[key]), "no such value")
    known = {name for name in NAMES if name in (*layout.features, "target_id") and name != "toward_id"}
    known |= set() if is_withheld(record) else {"pixels"}
    known |= {"target_text"} if "target_texts" in record["settings"] else set()
    for place, item in enumerate(record[layout.listed]):
        for key in sorted(set(item) - known):
            told = f"{layout.listed}.{place} has the key {key!r}, which is not one of a {layout.analysis} run"
            yield problem(RECORD, str(item[layout.item]), key, item[key], None, told)
        for key in sorted(known - set(item)) if "closed_with" in record else ():
            told = f"{layout.listed}.{place} has no {key!r}"
            yield problem(RECORD, str(item[layout.item]), key, None, "a value", told)
    if record.get("versions", versions) != versions:
        yield differs(RECORD, None, "versions", record["versions"], versions, "the rows state another")


def check_list(record: Row, layout: Layout, rows: Sequence[Row]) -> Iterator[Problem]:
    """Check that all listed pairs or images have rows, that the list has the requested length, and the errors."""
    listed = Counter(item[layout.item] for item in record[layout.listed])
    there = {row[layout.item]: row["status"] for row in rows}
    command = f"run the same {layout.analysis} command"
    for name, count in listed.items():
        if name not in there:
            why = "" if record["complete"] else f"; the run is not finished: {command}"
            told = f"{name!r} is listed and missing from {layout.folder}/{why}"
            yield problem(RECORD, name, layout.item, "a row", "no row", told)
        if count > 1:
            yield problem(RECORD, name, layout.item, "once", "twice", f"{name!r} is listed {count} times")
    total, key = len(record[layout.listed]), f"num_{layout.listed}"
    asked = record["settings"].get(key, total)
    if asked != total:
        told = f"the settings ask for {asked} {layout.listed}; {total} are listed"
        yield problem(RECORD, None, f"settings.{key}", asked, total, told)
    version = record["settings"].get("schema_version", record["schema_version"])
    if version != record["schema_version"] or not 1 <= version <= SCHEMA_VERSION:
        yield differs(RECORD, None, "settings.schema_version", version, record["schema_version"])
    if not set(listed) <= set(there):
        return
    if not record["complete"]:
        told = f"all rows are there, but the run is not closed: {command}"
        yield problem(RECORD, None, "complete", False, True, told)
        return
    digests = {item[layout.item]: item.get("pixels") for item in record[layout.listed]}
    works: dict[tuple[Any, ...], str] = {}
    for row in rows if VERBS[layout.analysis].BATCH != "items" else ():  # a batch shares its seconds equally
        name, digest = row[layout.item], digests.get(row[layout.item])
        if digest is not None and works.setdefault((digest, row["seconds"]), name) != name:
            told = f"{name!r} has the pixels of {works[digest, row['seconds']]!r} and took the same time: it is a copy"
            yield problem(RECORD, name, "seconds", row["seconds"], None, told)
    failed = {name for name, status in there.items() if status == Status.ERROR}
    for name in sorted(failed ^ set(record.get("errors", {}))):
        told = "states no error" if name in failed else "states an error of a row that has none"
        yield problem(RECORD, name, "errors", name not in failed, name in failed, f"{RECORD} {told}: {name!r}")


def left_open(record: Row, layout: Layout, rows: Sequence[Row]) -> Iterator[str]:
    """Name the parts of a run that cannot be checked because it states too little."""
    ends = {row["status"] for row in rows}
    if ends & {Status.STALLED, Status.INFEASIBLE, Status.MAX_EVALS}:
        yield "why a match was not reached"
    if ends & {Status.DRIFT_EXCEEDED, Status.BOX_BLOCKED}:
        yield "why a walk ended early"
    digests: dict[Any, list[str]] = {}
    for item in record[layout.listed]:
        digests.setdefault(item.get("pixels"), []).append(item[layout.item])
    for digest, names in digests.items():
        told = some(names, 3)
        if digest is None and not is_withheld(record):
            yield f"the first pixels of {told} (no SHA-256 is stated)"
        elif digest is not None and len(names) > 1:
            yield f"whether {told}, of the same pixels, are {len(names)} {layout.listed}"
    if is_local(record["settings"]):
        yield "the name of the local checkpoint"
    if {"license", "rights"} & set(record):
        yield "license and rights"


def check_settings(record: Row, layout: Layout, encoder: Encoder | None) -> Iterator[Problem]:
    """Make the settings again, from the command if the run states one, and compare them key by key."""
    stated, kind = record["settings"], VERBS[layout.analysis].CONFIG
    command, listed = record.get("command"), record[layout.listed]
    items = [Item(k, item[layout.item], {"target_id": None} | item, 0, None, None) for k, item in enumerate(listed)]
    try:
        config = _config_of(stated, kind) if command is None else read_command(command, kind)
        if command is not None:
            config.check()
        if encoder is None:  # the defaults that a command leaves out may depend on it
            config, command = _config_of(stated, kind), None
        if getattr(config, "labels", None):  # a name with a comma looks like two in a command
            config = replace(config, labels=tuple(stated["labels"]))
        subject = encoder or _unknown_encoder(stated)
        made = settings_of(config, subject, items, config.settings(subject), stated["data_id"], stated["data_revision"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        told = f"no settings can be made again: {error}"
        yield problem(RECORD, None, "command" if command is not None else "settings", command, None, told)
        return
    made |= {"usual_texts": stated.get("usual_texts")} if encoder is None and "usual_texts" in made else {}
    made["model_id"] = stated["model_id"] if command is None else config.model
    if command is not None:
        made |= {"dtype": "float32" if config.half else config.dtype, "readout": config.readout}
        made |= {"model_revision": config.revision} if config.revision else {}
    why = "" if command is None else "command and settings differ"
    for path, a, b in leaves("settings", stated, made):
        if not alike(a, b):
            yield differs(RECORD, None, path, a, b, why)
    pairs, most = getattr(config, "pairs", None), getattr(config, "limit", None) or len(items)
    asked = pairs or min(len(items), most)  # a set may hold fewer images than the limit, but never fewer pairs
    if len(items) != asked:
        yield differs(RECORD, None, f"settings.num_{layout.listed}", len(items), asked, "the command asks for these")
    targets = [item["target_id"] for item in listed if item.get("target_id") is not None]
    if targets and not getattr(config, "needs_target", True):
        yield differs(RECORD, None, f"{layout.listed}.target_id", targets[0], None, "the command asks for no target")


def _config_of(settings: Row, kind: type) -> Any:
    """Return a config with these settings."""
    values = {field.name: settings[field.name] for field in fields(kind) if field.name in settings}
    if "directions" in values:
        counts = values["directions"].items()
        values["directions"] = ",".join(name if name in SINGLE else f"{name}:{n}" for name, n in counts)
    values["import_"] = settings.get("import")
    values |= {key: tuple(values[key]) for key in ("radii", "labels", "through") if values.get(key) is not None}
    values |= {"target_text": "a text"} if "target_texts" in settings else {}
    if "solver" in values:
        values["solver"], *start = settings["solver"].split(", ")
        values["compile"] = "compiled" in start
        values["dtype"] = next((one.removesuffix(" start") for one in start if one != "compiled"), values["dtype"])
    return kind(**values, data="a set" if settings.get("drawn") else None)


def _unknown_encoder(settings: Row) -> Any:
    """Return the stated facts of an encoder that is not loaded, since there are no photos."""
    return SimpleNamespace(
        provenance=settings, embedding_dim=10**9, input_shape=(3, 1000, 1000), classify=lambda *_: None, device="cpu",
        dtype=None, normalize=settings["normalize"], embed_texts=lambda *_: None,
    )  # fmt: skip


def alike(stated: Any, made: Any) -> bool:
    """Return whether two values of JSON are equal and of one type; a whole number may stand for a float."""
    if isinstance(stated, list) and isinstance(made, list):
        return len(stated) == len(made) and all(map(alike, stated, made))
    return bool(stated == made) and (type(stated) is type(made) or (type(stated), type(made)) == (int, float))


def leaves(path: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the values of two nested mappings side by side, with their path."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from leaves(f"{path}.{key}", a.get(key), b.get(key, "no such key"))
    else:
        yield path, a, b
