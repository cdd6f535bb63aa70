"""Measure the numbers that match rows lack with the encoder: controls, survival, transfer, retrieval and a kNN probe.

Errors are relative, ‖f(a) − f(b)‖ / ‖f(b)‖, in float64 of float32 embeddings; similarity is the cosine. Pixels are
(3, H, W) in [0, 1], on the grid k/255.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_equiv.analyses import measures
from hf_equiv.analyses.measures import cosine, distances_apart, median_of, open_png, relative_error, top_classes
from hf_equiv.analyses.pairs import image_generator
from hf_equiv.data.image_file import stored_image
from hf_equiv.data.image_set import ImageSet
from hf_equiv.formatting import finite
from hf_equiv.precision import no_tf32
from hf_equiv.report import search
from hf_equiv.report.collect import Run, read_pictures
from hf_equiv.report.statistics import spread
from hf_equiv.runs import shards
from hf_equiv.runs.schema import IMAGE_COLUMNS, Row
from hf_equiv.through.transformations import TRANSFORMS, handle

Tell = Callable[[int, int], None]

MEASURED_PAIRS = 200  # most pairs of a run to measure anew, from the first on
LABELLED_PHOTOS = 2000  # most photos of `label_data`, drawn with seed 0
RANDOM_DRAWS = 4
_VERSION = 3  # raise it when a stored number changes its meaning
_CURVE = 400  # points of a stored distribution


def round_8bit(pixels: Tensor) -> Tensor:
    """Round to the nearest k/255."""
    return (pixels.clamp(0, 1) * 255).round() / 255


@torch.no_grad()
@no_tf32()
def measure_pair(
    encoder: Any, source: Tensor, match: Tensor, target: Tensor | str, *, seed: int, pair_id: str,
    float_match: Tensor | None = None, labels: Sequence[str] | None = None, survival: bool = True,
) -> tuple[Row, Tensor]:  # fmt: skip
    """Measure the controls and the survival of one match, images (3, H, W) on k/255, in about 22 forwards."""
    # `moved` is the distance of the match's embedding from the source's, `random_moved` the same for random steps of
    # equal L2 length, rounded to 8 bit, and `random_error` their distance from the target. The second value is z_match.
    pictures = [x.to(encoder.device) for x in (source, match, target) if isinstance(x, Tensor)]
    (source, match), (z_source, z_match, *z_image) = pictures[:2], encoder(torch.stack(pictures))
    z_target = z_image[0] if z_image else encoder.embed_texts([target])[0]
    step = float((match.double() - source.double()).norm())
    generators = [image_generator(seed, f"{pair_id}:{k}") for k in range(RANDOM_DRAWS)]
    draws = [_random_step(source, step, generator) for generator in generators]
    z_random = [encoder(x[None])[0] for x in draws]
    row: Row = {
        "pair_id": pair_id,
        "error": relative_error(z_match, z_target),
        "distance": relative_error(z_source, z_target),
        "moved": relative_error(z_match, z_source),
        "random_moved": median_of(relative_error(z, z_source) for z in z_random),
        "random_error": median_of(relative_error(z, z_target) for z in z_random),
        "random_l2": median_of(finite((x.double() - source.double()).norm()) for x in draws),
        "psnr_match_target": measures.psnr_db(match, pictures[2]) if z_image else None,
        "ssim_match_target": measures.ssim(match, pictures[2]) if z_image else None,
        "rounded_error": None,
        "survival": _survival(encoder, pictures[1:], (z_source, z_target), labels) if survival else {},
    }
    if float_match is not None:
        row["rounded_error"] = relative_error(encoder(round_8bit(float_match.to(match))[None])[0], z_target)
    return row, z_match.detach().double().cpu()


def _survival(
    encoder: Any, pixels: Sequence[Tensor], embeddings: tuple[Tensor, Tensor], labels: Sequence[str] | None
) -> dict[str, Row]:
    """Apply each transform T, and compare T(match) with target and source, and T(target) with target (`control`)."""
    # A target that is a text is not among the pixels, and has neither control nor class.
    z_source, z_target = embeddings
    wanted = top_classes(encoder, pixels[1][None], labels) if pixels[1:] else None
    found = {}
    for name, change in TRANSFORMS.items():
        both = torch.stack([handle(x, change) for x in pixels])
        z_changed, *z_control = encoder(both)
        seen = top_classes(encoder, both, labels) if wanted else None
        found[name] = {
            "error": relative_error(z_changed, z_target),
            "control": relative_error(z_control[0], z_target) if z_control else None,
            "to_source": relative_error(z_changed, z_source),
            "label": None if seen is None or wanted is None else seen[0] == wanted[0],
            "control_label": None if seen is None or wanted is None else seen[1] == wanted[0],
        }
    return found


@torch.no_grad()
@no_tf32()
def transfer_pair(other: Any, images: Sequence[Tensor]) -> tuple[Row, Tensor, Tensor]:
    """Measure how another encoder g embeds source, match and target, (3, H, W) each."""
    three = torch.stack(list(images)).to(other.device)
    z_source, z_match, z_target = other(three)
    seen = top_classes(other, three)
    row = {
        "error": relative_error(z_match, z_target),
        "distance": relative_error(z_source, z_target),
        "moved": relative_error(z_match, z_source),
        "cosine_to_target": cosine(z_match, z_target),
        "cosine_to_source": cosine(z_match, z_source),
        "cosine_source_target": cosine(z_source, z_target),
        "labels": None if seen is None else [other.label_names[k] for k in seen],
    }
    return row, z_source.detach().double().cpu(), z_target.detach().double().cpu()


def _random_step(source: Tensor, length: float, generator: torch.Generator) -> Tensor:
    """Move the source by this L2 length in a random direction, inside the box and on k/255."""
    v, start = torch.randn(source.shape, generator=generator, dtype=torch.float64), source.double().cpu()
    # Clipping and rounding change the length of the step; a few corrections bring it to the length asked for.
    scale, moved = length / float(v.norm()), start
    for _ in range(6):
        moved = round_8bit(start + scale * v)
        reached = float((moved - start).norm())
        if not reached or abs(reached / max(length, 1e-12) - 1) < 0.01:
            break
        scale *= length / reached
    return moved.to(source)


def measure_run(
    run: Run, encoder: Any, *, survival: bool, labelled: ImageSet | None, cache: Path | None, tell: Tell
) -> Row:
    """Measure a match run with its own encoder: controls, survival, retrieval and probe; kept in `cache`."""
    data = None if labelled is None else [labelled.data_id, labelled.data_revision, len(labelled)]
    path = place_of(cache, run, "pairs", encoder, [survival, data])
    return keep(path, lambda: _measure_run(run, encoder, survival, labelled, tell))


def refuse_texts(run: Run, option: str) -> None:
    """Refuse a run whose targets are texts."""
    if "target_texts" in run.settings:
        raise ValueError(f"`{option}` must come with matches of images; {run.name} has texts. Leave it out.")


def measured_earlier(run: Run, cache: Path | None) -> Row | None:
    """Return the newest measurements of a run that an earlier report kept with any options; None if there are none."""
    path = place_of(cache, run, "pairs")
    there = path.parent.glob(f"{path.name.rsplit('-', 1)[0]}-*.json") if path else ()
    found = map(_read_kept, sorted(there, key=lambda path: path.stat().st_mtime, reverse=True))
    return next(filter(None, found), None)


def measure_transfer(run: Run, other: Any, *, cache: Path | None, tell: Tell) -> Row:
    """Measure a match run with another encoder, through its image processor if its input has another size."""
    path = place_of(cache, run, "transfer", other)
    return keep(path, lambda: _measure_transfer(run, other, tell))


def _read(run: Run, encoder: Any, tell: Callable[[int], None]) -> Iterator[tuple[Row, list[Any], Any]]:
    """Yield row, source, match and target, and the float match, of the measured pairs whose photos are there."""
    # In a run with texts the target is the text.
    texts = "target_texts" in run.settings
    columns = IMAGE_COLUMNS[:2] if texts else IMAGE_COLUMNS
    for done, (row, exact) in enumerate(read_pictures(run, _measured_ids(run), floats=True), 1):
        text = [row["target_text"]] if texts else []
        if None not in [*(row[name] for name in columns), *text]:
            yield row, [*(open_png(encoder, row[name]) for name in columns), *text], exact
        tell(done)


@torch.no_grad()
@no_tf32()
def _measure_run(run: Run, encoder: Any, survival: bool, labelled: ImageSet | None, tell: Tell) -> Row:
    encoder, ids = measures.of_files(encoder), _measured_ids(run)
    photos = search.Gallery(lambda x: encoder(x.to(encoder.device)))
    total = len(ids) + (0 if labelled is None else len(labelled))
    pairs: list[tuple[Row, int, int, Tensor]] = []
    of_texts: list[tuple[Row, Tensor, Tensor]] = []
    tell(0, total)
    for row, (source, match, target), exact in _read(run, encoder, lambda done: tell(done, total)):
        numbers, z = measure_pair(
            encoder, source, match, target, seed=run.settings["seed"], pair_id=row["pair_id"],
            float_match=exact, labels=run.settings.get("labels"), survival=survival,
        )  # fmt: skip
        place = photos.add(source, row["source_class"])
        if isinstance(target, str):
            of_texts.append((numbers, photos.vectors[place], encoder.embed_texts([target])[0].double().cpu()))
        else:
            pairs.append((numbers, place, photos.add(target, row["target_class"]), z))
    for done, item in enumerate(labelled or (), len(ids) + 1):
        photos.add(encoder.preprocess([item.image])[0], item.label)
        tell(done, total)
    size = {"dim": int(encoder.embedding_dim), "pixels": math.prod(encoder.input_shape)}
    if of_texts:
        found = {"pairs": [numbers for numbers, *_ in of_texts], "retrieval": None, "probe": None}
        return size | found | {"unrelated": _unrelated([pair[1:] for pair in of_texts])}
    if not pairs:
        return size | {"pairs": [], "unrelated": None, "retrieval": None, "probe": None}
    embeddings = [(photos.vectors[source], photos.vectors[target]) for _, source, target, _ in pairs]
    return size | {
        "pairs": [numbers for numbers, *_ in pairs],
        "unrelated": _unrelated(embeddings),
        "retrieval": _retrieval(pairs, torch.stack(photos.vectors)),
        "probe": search.probe([pair[1:] for pair in pairs], photos),
    }


def _retrieval(pairs: Sequence[tuple[Row, int, int, Tensor]], matrix: Tensor) -> Row | None:
    """Compare 10 neighbours, or a third of a small database, so that agreement by chance stays below a half."""
    others = len(matrix) - 2
    if others < 2:
        return None
    k = min(10, max(1, others // 3))
    rows = [search.retrieve(z, source, target, matrix, k) for _, source, target, z in pairs]
    return {"photos": len(matrix), "k": k, "chance": k / others, "pairs": rows}


def _measure_transfer(run: Run, other: Any, tell: Tell) -> Row:
    total, same, pairs = len(_measured_ids(run)), True, []
    refuse_texts(run, "transfer")
    tell(0, total)
    for row, images, _ in _read(run, other, lambda done: tell(done, total)):
        same = tuple(images[0].shape) == tuple(other.input_shape)
        if not same:
            images = list(other.preprocess([stored_image(row[name]) for name in IMAGE_COLUMNS]))
        pairs.append(transfer_pair(other, images))
    return {
        "model": other.provenance["model_id"],
        "revision": other.revision,
        "readout": other.readout,
        "same_size": same,
        "pairs": [numbers for numbers, _, _ in pairs],
        "unrelated": _unrelated([embeddings for _, *embeddings in pairs]),
    }


def _unrelated(pairs: Sequence[Sequence[Tensor]]) -> Row | None:
    """Return the spread of the distances of unrelated photos, and a curve of about 400, from embeddings of pairs."""
    if not pairs:
        return None
    distance, apart = distances_apart(*(torch.stack(list(z)) for z in zip(*pairs, strict=True)))
    values = sorted(distance[apart & distance.isfinite()].tolist())
    found = spread(values)
    return None if found is None else asdict(found) | {"curve": values[:: max(1, len(values) // _CURVE)]}


def _measured_ids(run: Run) -> list[str]:
    return [row["pair_id"] for row in run.good][:MEASURED_PAIRS]


def place_of(cache: Path | None, run: Run, kind: str, encoder: Any = None, options: Sequence[Any] = ()) -> Path | None:
    """Return the file that keeps measurements: its name tells the rows and this code, then the encoder and options."""
    if cache is None:
        return None
    paths = [path for name in (run.layout.folder, "float") for path in sorted((run.folder / name).glob("[!.]*.*"))]
    names = ((path.relative_to(run.folder).as_posix(), path) for path in paths)
    files = [[name, shards.sha256_file(path)] for name, path in names if name not in run.changed]
    parts = (
        [_VERSION, MEASURED_PAIRS, files, _measured_ids(run), kind],
        [*(_function(encoder) if encoder else ()), *options],
    )
    digests = (hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for part in parts)
    return cache / f"measured-{'-'.join(digests)}.json"


def _function(encoder: Any) -> list[Any]:
    """List what changes a number besides the rows: the encoder and its device."""
    provenance = {key: encoder.provenance.get(key) for key in ("model_id", "model_revision", "readout", "dtype")}
    return [provenance, encoder.normalize, str(encoder.device), torch.__version__]


def _read_kept(path: Path) -> Row | None:
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # a damaged file is measured again
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return None


def keep(path: Path | None, make: Callable[[], Row]) -> Row:
    """Return measurements as the file keeps them, or make and keep them."""
    if path is not None and (there := _read_kept(path)):
        return there
    text = json.dumps(make(), allow_nan=False)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shards.write_atomic(path, text.encode())
    return dict(json.loads(text))  # equal for a new and a kept measurement
