"""Measure anew what the rows of a match run do not say: each part once, kept beside the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_equiv import reportmeasures, reportsearch, shards
from hf_equiv.imagefile import decode_png, open_image
from hf_equiv.imageset import ImageSet
from hf_equiv.precision import no_tf32
from hf_equiv.reportruns import Run, read_pictures
from hf_equiv.reportstats import spread

Row = dict[str, Any]
Tell = Callable[[int, int], None]

MEASURED_PAIRS = 200
"""Pairs of a run that are measured anew, the first of its list."""

LABELLED_PHOTOS = 2000
"""Photos of `label_data` that are used, drawn with seed 0."""

_VERSION = 2  # of what is measured: raise it when a number changes its meaning
_CURVE = 400  # points of a stored distribution


def measured_ids(run: Run) -> list[str]:
    """The pairs that are measured anew."""
    return [row["pair_id"] for row in run.good][:MEASURED_PAIRS]


def measure_run(
    run: Run, encoder: Any, *, survival: bool, labelled: ImageSet | None, cache: Path | None, tell: Tell
) -> Row:
    """Measure a match run with its own encoder: controls, survival, retrieval, and the kNN probe.

    Args:
        run: with at least one match.
        encoder: f, as recorded.
        survival: whether to try the transforms.
        labelled: photos with classes for the probe, also part of the retrieval database.
        cache: folder for what was measured; None to measure in any case.
        tell: called with (images done, images in all).

    Returns:
        `pairs` as from `measure_pair`, `unrelated` distances, `retrieval`, `probe`, `withheld` (pairs without their
        photos), `dim` and `pixels`.

    Raises:
        ValueError: a stored image is damaged, or a photo of `labelled` cannot be read.
    """
    data = None if labelled is None else [labelled.data_id, labelled.data_revision, len(labelled)]
    key = [*_identity(run, encoder), "pairs", survival, data]
    return _kept(cache, key, lambda: _measure_run(run, encoder, survival, labelled, tell))


def measure_transfer(run: Run, other: Any, *, cache: Path | None, tell: Tell) -> Row:
    """Measure the matches of a run with another encoder.

    The stored images are given to it as they are where its input has their size; otherwise through its own image
    processor.

    Args:
        run: with at least one match.
        other: the other encoder.
        cache: folder for what was measured.
        tell: called with (pairs done, pairs in all).

    Returns:
        `model`, `revision`, `readout`, `same_size`, `pairs` as from `transfer_pair`, and `unrelated` distances.
    """
    key = [*_identity(run, other), "transfer"]
    return _kept(cache, key, lambda: _measure_transfer(run, other, tell))


def _measure_run(run: Run, encoder: Any, survival: bool, labelled: ImageSet | None, tell: Tell) -> Row:
    ids, dtype = measured_ids(run), _dtype(encoder)
    photos = reportsearch.Gallery()
    total, done = len(ids) + (0 if labelled is None else len(labelled)), 0
    tell(done, total)

    def embed(x: Tensor) -> Tensor:
        with torch.no_grad(), no_tf32():
            z: Tensor = encoder(x.to(encoder.device))
        return z

    made: dict[str, tuple[Row, int, int, Tensor]] = {}
    withheld = 0
    for row, exact in read_pictures(run, ids, floats=True):
        done += 1
        if any(row[name] is None for name in shards.IMAGE_COLUMNS):
            withheld += 1
        else:
            source, match, target = (decode_png(row[name], dtype) for name in shards.IMAGE_COLUMNS)
            numbers, z = reportmeasures.measure_pair(
                encoder, source, match, target, seed=run.settings["seed"], pair_id=row["pair_id"],
                float_match=exact, labels=run.settings.get("labels"), survival=survival,
            )  # fmt: skip
            places = (
                photos.add(row["source_id"], source, embed, row["source_class"]),
                photos.add(row["target_id"], target, embed, row["target_class"]),
            )
            made[row["pair_id"]] = numbers, *places, z
        tell(done, total)
    pairs = [made[name] for name in ids if name in made]
    for item in labelled or ():
        photos.add(item.id, encoder.preprocess([item.image])[0].to(dtype), embed, item.label)
        done += 1
        tell(done, total)
    found: Row = {
        "pairs": [numbers for numbers, *_ in pairs],
        "withheld": withheld,
        "dim": int(encoder.embedding_dim),
        "pixels": int(torch.tensor(encoder.input_shape).prod()),
        "size": list(encoder.input_shape[1:]),
        "unrelated": None,
        "retrieval": None,
        "probe": None,
    }
    if pairs:
        matrix = photos.matrix
        sources, targets = (matrix[[pair[k] for pair in pairs]] for k in (1, 2))
        found["unrelated"] = _distribution(reportmeasures.pair_distances(sources, targets))
        found["retrieval"] = _retrieval(pairs, matrix)
        found["probe"] = reportsearch.probe([pair[1:] for pair in pairs], photos)
    return found


def _retrieval(pairs: Sequence[tuple[Row, int, int, Tensor]], matrix: Tensor) -> Row | None:
    """Neighbours compared: 10, or a third of a small database, so that agreement by chance stays below a half."""
    others = len(matrix) - 2
    if others < 2:
        return None
    k = min(10, max(1, others // 3))
    rows = [reportsearch.retrieve(z, source, target, matrix, k) for _, source, target, z in pairs]
    return {"photos": len(matrix), "k": k, "chance": k / others, "pairs": rows}


def _measure_transfer(run: Run, other: Any, tell: Tell) -> Row:
    ids, dtype = measured_ids(run), _dtype(other)
    made: dict[str, tuple[Row, Tensor, Tensor]] = {}
    same = True
    tell(0, len(ids))
    for count, (row, _) in enumerate(read_pictures(run, ids), 1):
        if all(row[name] is not None for name in shards.IMAGE_COLUMNS):
            images = [decode_png(row[name], dtype) for name in shards.IMAGE_COLUMNS]
            same = tuple(images[0].shape) == tuple(other.input_shape)
            if not same:
                images = list(other.preprocess([open_image(row[name]) for name in shards.IMAGE_COLUMNS]))
            made[row["pair_id"]] = reportmeasures.transfer_pair(other, images)
        tell(count, len(ids))
    pairs = [made[name] for name in ids if name in made]
    distances: list[float] = []
    if pairs:
        sources, targets = torch.stack([a for _, a, _ in pairs]), torch.stack([b for _, _, b in pairs])
        distances = reportmeasures.pair_distances(sources, targets)
    return {
        "model": other.provenance["model_id"],
        "revision": other.revision,
        "readout": other.readout,
        "same_size": same,
        "pairs": [numbers for numbers, _, _ in pairs],
        "unrelated": _distribution(distances),
    }


def _distribution(values: Sequence[float]) -> Row | None:
    """Spread and a curve of at most 400 points."""
    found, ordered = spread(values), sorted(values)
    if found is None:
        return None
    places = range(len(ordered)) if len(ordered) <= _CURVE else range(0, len(ordered), len(ordered) // _CURVE)
    return found | {"curve": [ordered[i] for i in places]}


def _dtype(encoder: Any) -> torch.dtype:
    return torch.float64 if encoder.dtype == torch.float64 else torch.float32


def _identity(run: Run, encoder: Any) -> list[Any]:
    """What the numbers depend on: the files, the encoder, where it runs, and this code."""
    files = [
        [path.relative_to(run.folder).as_posix(), shards.sha256_file(path)]
        for name in (run.layout.folder, "float")
        for path in sorted((run.folder / name).glob("*.*"))
        if not path.name.startswith(".") and path.relative_to(run.folder).as_posix() not in run.changed
    ]
    provenance = {key: encoder.provenance.get(key) for key in ("model_id", "model_revision", "readout", "dtype")}
    return [_VERSION, MEASURED_PAIRS, files, measured_ids(run), provenance, encoder.normalize, str(encoder.device),
            torch.__version__]  # fmt: skip


def _kept(cache: Path | None, key: Sequence[Any], make: Callable[[], Row]) -> Row:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = None if cache is None else cache / f"measured-{digest[:16]}.json"
    if path is not None and path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] == digest:
                return dict(stored["measured"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # damaged: measured again
    found = make()
    text = json.dumps({"key": digest, "measured": found}, allow_nan=False)
    if path is not None:
        shards.write_atomic(path, text.encode())
    return dict(json.loads(text)["measured"])  # the same whether it was kept or not
