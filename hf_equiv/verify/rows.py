"""Check stored rows: recompute them from their images and compare every column that is not in `UNVERIFIED`."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_equiv.analyses.measures import open_png
from hf_equiv.analyses.pairs import digest_of
from hf_equiv.analyses.run import VERBS
from hf_equiv.data.image_file import decode_png
from hf_equiv.formatting import one_line
from hf_equiv.models.encoder import Encoder
from hf_equiv.png_file import check_png
from hf_equiv.results import SCHEMA_VERSION, Status
from hf_equiv.runs import shards
from hf_equiv.runs.directory import is_withheld
from hf_equiv.runs.schema import PROVENANCE_FEATURES, Layout, Row, row_name
from hf_equiv.verify.unverified import NAMES

RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("embedding_error", "embedding_error_8bit", "target_quantization_error"), (0.0, math.inf)),
    **dict.fromkeys(("cosine_to_target", "cosine_to_source", "cosine_source_target"), (-1.0, 1.0)),
    "psnr_full_db": (0.0, math.inf),
    "ssim_full": (-1.0, 1.0),
    **dict.fromkeys(("match_prob", "target_label_prob", "prob"), (0.0, 1.0)),
    **dict.fromkeys(("drift", "drift_8bit", "seconds", "remaining", "arc_length"), (0.0, math.inf)),
    "stationarity": (0.0, 1.0 + 1e-6),
    "num_evals": (1.0, math.inf),
}
"""Ranges for the numbers of every row, also of rows that cannot be recomputed."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One difference between a file and the recomputed results."""

    file: str  # file inside the run directory
    pair_id: str | None  # row, or None for a problem of a file
    column: str  # column, setting or check
    stated: Any  # the value in the file
    recomputed: Any  # the value found
    message: str  # the same in words


def problem(file: str, name: str | None, column: str, stated: Any, recomputed: Any, message: str) -> Problem:
    """Make a problem whose values can be written as JSON."""
    return Problem(file, name, column, _plain(stated), _plain(recomputed), f"{file}: {message}")


def differs(file: str, name: str | None, column: str, stated: Any, recomputed: Any, why: str = "") -> Problem:
    """Make the problem of a value that differs from the recomputed one; `why` is added in brackets."""
    where = (f"row {name!r}, " if name else "") + column
    told = f"{where} states {_show(stated)}, recomputed {_show(recomputed)}" + (f" ({why})" if why else "")
    return problem(file, name, column, stated, recomputed, told)


def check_stated(file: str, layout: Layout, record: Row, item: Row | None, rows: Sequence[Row]) -> Iterator[Problem]:
    """Check the ranges, and the columns that must equal the entries of the run and the item in `run.json`."""
    settings = record["settings"]
    wanted = dict.fromkeys(("norm", "rtol", "solver")) | {"radius": settings.get("regional")}
    wanted |= {key: settings[key] for key in (*PROVENANCE_FEATURES, "heading") if key in settings}
    wanted |= {"toward_id": item.get("target_id")} | item if item is not None else {}
    wanted |= dict.fromkeys(layout.images) if is_withheld(record) else {}
    wanted.pop("schema_version", None)
    ranges = {**RANGES, "num_evals": (1.0, float(settings.get("max_evals", math.inf)))}
    for row in rows:
        name, what = row_name(layout.analysis, row), layout.item.removesuffix("_id")
        if item is None:
            told = f"row {name!r}: run.json does not list this {what}"
            yield problem(file, name, layout.item, row[layout.item], None, told)
        version = row["schema_version"]
        if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
            yield differs(file, name, "schema_version", version, SCHEMA_VERSION, "a newer hf_equiv wrote this row")
        for key, value in wanted.items():
            if key in row and row[key] != value:
                yield differs(file, name, key, row[key], value, "run.json states another")
        for key in ("through", "models"):
            parts = row[key] if isinstance(row.get(key), list) else []
            numbers = [v for one in parts for v in (one or {None: math.nan}).values() if isinstance(v, float)]
            if not all(math.isfinite(v) and v >= 0 for v in numbers):
                yield differs(file, name, key, None, None, "its entries must hold numbers of at least 0")
        for key, (least, most) in ranges.items():
            value = row.get(key)
            if value is None and key in ("num_evals", "seconds") and row["status"] != Status.ERROR:
                yield differs(file, name, key, None, None, "there must be a number")
            elif value is not None and not (math.isfinite(value) and least - 1e-12 <= value <= most + 1e-12):
                nearest = min(max(value, least), most) if math.isfinite(value) else None
                yield differs(file, name, key, value, nearest, _limit((least, most)))


def check_item(
    file: str, layout: Layout, encoder: Encoder | None, settings: Row, rows: Sequence[Row], floats: Mapping[str, Tensor]
) -> tuple[list[Row], list[Problem]]:
    """Recompute the rows of one pair or image, without images, and compare them column by column."""
    # Without an encoder or images, only columns that follow from stated columns are compared.
    own = [key for key in layout.features if key not in (*NAMES, "status", "heading")]
    if len(rows) == 1 and rows[0]["status"] == Status.ERROR and all(rows[0][key] in (None, []) for key in own):
        return [], []
    made: list[Row] = []
    found: list[Problem] = []
    if encoder is not None:
        item, name = rows[0][layout.item], row_name(layout.analysis, rows[0])
        floats = {key: values for key, values in floats.items() if key == item or key.startswith(f"{item}/")}
        float_file = shards.float_file(Path(file)).as_posix()
        found = [*_check_floats(float_file, name, item, encoder, floats)]
        opened, unreadable = _open_images(file, layout, encoder, rows)
        found += unreadable
        if not found:
            rows, left = opened, {key: values.to(encoder.device) for key, values in floats.items()}
            try:
                again = VERBS[layout.analysis].remake(encoder, settings, rows, left)
                made = [{layout.item: item} | row for row in again]
                for key in sorted(left):
                    told = f"row {name!r}: {key!r} is not one of the float images of such a run"
                    found.append(problem(float_file, name, "float", None, key, told))
            except KeyError as error:
                told = f"the float image {error} of row {name!r} is missing"
                found.append(problem(float_file, name, "float", "a float image", None, told))
            except ValueError as error:  # the settings do not fit; the message begins with the name of one
                column = re.match(r"`(\w+)`", str(error))
                told = f"row {name!r} cannot be recomputed: {one_line(error)}"
                found.append(problem(file, name, column[1] if column else layout.item, "a row", None, told))
    found += _compare(file, layout, settings, rows, made)
    return [{key: value for key, value in row.items() if key not in layout.images} for row in made], found


def _check_floats(file: str, name: str, item: str, encoder: Encoder, floats: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Check shape and range of the float images of one pair or image."""
    for key, values in floats.items():
        column = key.removeprefix(item).lstrip("/") or "match"
        right = tuple(values.shape[-3:]) == tuple(encoder.input_shape) and bool(torch.isfinite(values).all())
        pixels = column not in ("right", "direction")
        right = right and len(values) > 0 and (not pixels or 0 <= float(values.min()) <= float(values.max()) <= 1)
        if column != "left" and not right:
            told = f"row {name!r}, {column}: the float image has shape {tuple(values.shape)}, or values outside [0, 1]"
            yield problem(file, name, column, "pixels in [0, 1]", None, told)
        dtype = torch.float64 if column == "left" else encoder.dtype
        if values.dtype != dtype:
            yield differs(file, name, column, str(values.dtype), str(dtype), "the dtype of a run of these settings")


def check_pixels(file: str, layout: Layout, entry: Row, row: Row, floats: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Check the SHA-256 that `run.json` states of the images that an item starts from."""
    name, stated = row[layout.item], entry.get("pixels")
    text = row.get("target_text")
    columns = ("source", "image") if text else ("source", "target", "image")
    cells = [row[column] for column in columns if column in row]
    parts = [floats[f"{name}/{kind}"] for kind in ("origin", "target", "toward") if f"{name}/{kind}" in floats]
    if stated is None or row["status"] == Status.ERROR or None in cells or not [*cells, *parts]:
        return
    with contextlib.suppress(ValueError):  # named when it is opened
        made = digest_of([*map(decode_png, cells), *parts], text)
        if stated != made:
            told = "the images are not those that the run listed"
            yield differs(file, row_name(layout.analysis, row), "pixels", stated, made, told)


def _open_images(file: str, layout: Layout, encoder: Encoder, rows: Sequence[Row]) -> tuple[list[Row], list[Problem]]:
    """Return the rows with pixels in place of PNG bytes, and problems."""
    opened, found = [dict(row) for row in rows], list[Problem]()
    for row in opened:
        name = row_name(layout.analysis, row)
        for column in layout.images:
            if row[column] is None and (column in layout.added or (column == "target" and row.get("target_text"))):
                continue
            try:
                width, height = check_png(row[column] or b"")
                if column in layout.added:  # of any size
                    continue
                if (3, height, width) == tuple(encoder.input_shape):  # a larger one would take much memory
                    row[column] = open_png(encoder, row[column])
                else:
                    sizes = [3, height, width], list(encoder.input_shape)
                    found.append(differs(file, name, column, *sizes, "wrong size"))
            except ValueError as error:
                found.append(problem(file, name, column, "a PNG image", None, f"row {name!r}, {column}: {error}"))
    return opened, found


def _compare(file: str, layout: Layout, settings: Row, rows: Sequence[Row], made: Sequence[Row]) -> Iterator[Problem]:
    verb, keys = VERBS[layout.analysis], layout.key
    again = {tuple(row[key] for key in keys): row for row in made}
    there = [tuple(row[key] for key in keys) for row in rows]
    whole = not again.keys() - set(there)
    follow = verb.follow(settings, rows) if whole else [{}] * len(rows)  # a missing row says nothing about the others
    if again.keys() == set(there) and there != [*again]:
        told = f"the rows of {rows[0][layout.item]!r} are in another order than the run writes them"
        yield problem(file, row_name(layout.analysis, rows[0]), keys[-1], None, None, told)
    for row, following in zip(rows, follow, strict=True):
        name, own = row_name(layout.analysis, row), again.pop(tuple(row[key] for key in keys), None)
        if made and own is None:
            yield problem(file, name, keys[-1], name, None, f"row {name!r} is not one that the settings ask for")
        limits = verb.tolerances(own, settings) if own is not None else {}
        for column, wanted, actual in (own or {}).get("faults", ()):
            yield problem(file, name, column, wanted, None, f"row {name!r}, {column} must be {wanted}; {actual}")
        for column, value in ((own or {}) | following).items():
            limit = limits.get(column)
            if column in row and not agrees(row[column], value, limit):
                yield _difference(file, name, column, row[column], value, limit)
    for missing in again.values():
        name = row_name(layout.analysis, missing)
        yield problem(file, name, keys[-1], "a row", None, f"row {name!r} is missing")


def agrees(stated: Any, made: Any, limit: Any = None) -> bool:
    """Return whether a stated value equals the recomputed one within `limit`; None and NaN never equal a number."""
    # `limit` is a tolerance or (least, most) for numbers, the largest difference of a pixel for images, None for
    # equality, and one limit for each element of a list or mapping.
    if isinstance(stated, Tensor) and isinstance(made, Tensor):
        return float((stated.double() - made.double()).abs().max()) <= (limit or 0.0)
    if isinstance(stated, list) and isinstance(made, list):
        limits = limit if isinstance(limit, list) else [limit] * len(made)
        return len(stated) == len(made) and all(map(agrees, stated, made, limits))
    if isinstance(stated, dict) and isinstance(made, dict):
        return stated.keys() == made.keys() and all(agrees(stated[k], made[k], (limit or {}).get(k)) for k in made)
    if limit is None or stated is None or made is None:
        return bool(stated == made)
    if isinstance(limit, tuple):
        return bool(limit[0] <= stated <= limit[1])
    return bool(abs(stated - made) <= limit)


def _difference(file: str, name: str, column: str, stated: Any, made: Any, limit: Any) -> Problem:
    """Name the first element of a list that differs, or the value as a whole."""
    place = ""
    if isinstance(stated, Tensor) and isinstance(made, Tensor):
        place = f"pixels differ by up to {float((stated - made).abs().max()):.3g}"
    if isinstance(stated, list) and isinstance(made, list) and len(stated) == len(made):
        limits = limit if isinstance(limit, list) else [limit] * len(made)
        pairs = list(zip(stated, made, limits, strict=True))
        i = next(i for i, pair in enumerate(pairs) if not agrees(*pair))
        place, (stated, made, limit) = f"number {i + 1} of {len(pairs)}", pairs[i]
    return differs(file, name, column, stated, made, "; ".join(filter(None, (place, _limit(limit)))))


def _limit(limit: Any) -> str:
    if isinstance(limit, tuple):
        bounds = f"must be at least {limit[0]:.4g} and at most {limit[1]:.4g}"
        return bounds if limit[0] <= limit[1] else f"must be at most {limit[1]:.4g}; other columns contradict it"
    return f"tolerance {limit:.1e}" if isinstance(limit, float) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | Tensor):
        return "an image"
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _show(value: Any) -> str:
    value = _plain(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
