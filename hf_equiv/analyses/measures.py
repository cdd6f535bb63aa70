"""Measure a match: errors, distances, PSNR, SSIM and labels of the stored image. Summarise the rows of runs.

Pixels are in [0, 1] and RGB; distances and PSNR are per image, over all N = 3·H·W values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv.analyses.pairs import image_generator
from hf_equiv.analyses.plan import RunRows
from hf_equiv.data.image_file import decode_png
from hf_equiv.formatting import finite, first_name, text_templates
from hf_equiv.precision import no_tf32
from hf_equiv.results import Status
from hf_equiv.runs.schema import Row
from hf_equiv.through.transformations import handle, read_transformations

if TYPE_CHECKING:
    from hf_equiv.models.encoder import Encoder

Rows = Sequence[Mapping[str, Any]]

SSIM_SIGMA = 1.5  # standard deviation of the Gaussian window of SSIM in pixels, as in Wang et al. 2004
SSIM_WINDOW = 2 * round(3.5 * SSIM_SIGMA) + 1  # side of the window, 11 pixels; smaller images have no SSIM
_MOST_SSIM = 100_000_000  # numbers of an image: more take 7 GB
QUANTIZATION_DRAWS = 8

LABEL_MEASURES = (
    "source_label", "target_label", "match_label", "match_prob", "target_label_prob", "same_top1",
)  # fmt: skip
MEASURES = (
    "embedding_error_8bit", "target_quantization_error", "noise_floor",
    "cosine_to_target", "cosine_to_source", "cosine_source_target", "psnr_db", "ssim", "linf", "l2",
    *LABEL_MEASURES,
)  # fmt: skip
"""The columns that `measure_match` computes from the three stored images alone."""


def embed(encoder: Encoder, images: Tensor) -> Tensor:
    """Return f(images), (B, D), without gradients and without TF32."""
    with torch.no_grad(), no_tf32():
        z: Tensor = encoder(images)
    return z


def open_png(encoder: Encoder, png: bytes) -> Tensor:
    """Return the pixels of a PNG file (3, H, W), on the device of the encoder, in float64 for one in float64."""
    return decode_png(png, torch.float64 if encoder.dtype == torch.float64 else torch.float32).to(encoder.device)


def psnr_db(a: Tensor, b: Tensor) -> float | None:
    """Return 10·log₁₀(1 / mean (a−b)²) in dB of two images (C, H, W) in [0, 1]; None for identical images."""
    # in float64: a float32 logarithm is off by 1e-6 dB
    error = float((a.detach().double() - b.detach().double()).square().mean())
    return -10 * math.log10(error) if error > 0.0 and math.isfinite(error) else None


def ssim(a: Tensor, b: Tensor) -> float | None:
    """Return the SSIM (Gaussian window, σ = 1.5) of two images (C, H, W) in [0, 1]; None below 11 px or above 33 MP."""
    from skimage.metrics import structural_similarity  # imports parts of scipy

    if min(a.shape[-2:]) < SSIM_WINDOW or a.numel() > _MOST_SSIM:
        return None
    window: dict[str, Any] = {"gaussian_weights": True, "sigma": SSIM_SIGMA, "use_sample_covariance": False}
    x, y = (image.detach().cpu().double().numpy() for image in (a, b))
    return finite(structural_similarity(x, y, channel_axis=0, data_range=1.0, **window))


def relative_error(z: Tensor, reference: Tensor) -> float | None:
    """Return ‖z − reference‖ / ‖reference‖ of two vectors, in float64."""
    z, reference = z.detach().double(), reference.detach().double()
    return finite((z - reference).norm() / reference.norm())


def of_files(encoder: Any) -> Any:
    """Return the encoder of 8-bit images as its models see their files: a joint one rounds what smaller models see."""
    return encoder.of_files() if hasattr(encoder, "of_files") else encoder


def errors_of(encoder: Any, z: Tensor, reference: Tensor) -> list[float | None]:
    """Return the `relative_error` of an embedding, for each model of a joint encoder."""
    if not hasattr(encoder, "split"):
        return [relative_error(z, reference)]
    return [relative_error(*both) for both in zip(encoder.split(z), encoder.split(reference), strict=True)]


def worst(errors: Sequence[float | None]) -> float | None:
    """Return the largest of the errors of each model; None if one is None."""
    return None if None in errors else largest(errors)


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Return the cosine similarity in [−1, 1] of two vectors, in float64."""
    a, b = a.detach().double(), b.detach().double()
    value = finite(torch.dot(a, b) / (a.norm() * b.norm()))
    return None if value is None else min(1.0, max(-1.0, value))


def target_quantization_error(encoder: Encoder, target: Tensor, z: Tensor, seed: int, pair_id: str) -> float | None:
    """Return the median over 8 draws of ‖f(x_t + u) − f(x_t)‖ / ‖f(x_t)‖, u uniform in ±½/255; None if f gives NaN."""
    noise = torch.rand((QUANTIZATION_DRAWS, *target.shape), generator=image_generator(seed, pair_id)) - 0.5
    moved = encoder(target[None] + (noise / 255.0).to(target))
    errors = [relative_error(row, z) for row in moved]
    return None if None in errors else median_of(errors)


@torch.no_grad()
@no_tf32()
def measure_match(
    encoder: Encoder, source: Tensor, match: Tensor, target: Tensor | str, *, seed: int, pair_id: str,
    labels: Sequence[str] | None = None, through: Sequence[str] | None = None, file: Any = None,
    candidates: Sequence[str] = (),
) -> Row:  # fmt: skip
    """Compute the columns `MEASURES` of a row from its stored images, each (3, H, W) as read back from PNG."""
    # `seed` and `pair_id` seed the noise on the target. `labels` are class names for zero-shot classification (CLIP,
    # SigLIP), in place of the checkpoint's head. A column is None where it is not defined: PSNR of equal images, SSIM
    # below 11 px, labels without a head. `through` names transformations, whose column is added: they change the match,
    # or its image of full size `file` before the image processor. A target that is a text has no label and no 8-bit
    # error; `candidates` are the texts among which it is ranked. Cost: about 16 forwards of one image, of which 2 in
    # float64, and those after transformations.
    pictures = [x.to(encoder.device) for x in (source, match, target) if isinstance(x, Tensor)]
    (source, match), stack, files = pictures[:2], torch.stack(pictures), of_files(encoder)
    z_source, z_match, *z_image = files(stack)
    z_target = z_image[0] if z_image else encoder.embed_texts([str(target)])[0]
    errors = errors_of(encoder, z_match, z_target)
    parts, seen = (
        (encoder.parts, files.seen(match[None])) if hasattr(encoder, "parts") else ((encoder,), (match[None],))
    )
    floors = [finite(one.noise_floor(x)[0]) for one, x in zip(parts, seen, strict=True)]
    quantised = None
    if z_image:
        z_moved = z_target if files is encoder else encoder(pictures[2][None])[0]  # what noise moves is not on the grid
        quantised = target_quantization_error(encoder, pictures[2], z_moved, seed, pair_id)
    # float32 holds k/255 only to 3e-8, so distances are computed from the levels in the files
    near, far = ((x.double() * 255).round() for x in (match, source))
    gap = (near - far) / 255
    row: Row = {
        "embedding_error_8bit": worst(errors),
        "target_quantization_error": quantised,
        "noise_floor": worst(floors),
        "cosine_to_target": cosine(z_match, z_target),
        "cosine_to_source": cosine(z_match, z_source),
        "cosine_source_target": cosine(z_source, z_target),
        "psnr_db": psnr_db(near / 255, far / 255),
        "ssim": ssim(near / 255, far / 255),
        "linf": finite(gap.abs().max()),
        "l2": finite(gap.norm()),
    }
    if through:
        row["through"] = []
        for one in read_transformations(through):
            draws = one.draws(image_generator(seed, f"{pair_id}:{one.name}"))
            after = [handle(match, draw) if file is None else encoder.preprocess([draw(file)])[0] for draw in draws]
            measured = _measure_after(encoder, after, z_target, pictures[2:], labels)
            row["through"].append({"transformation": one.name, **measured})
    if not z_image:
        row |= {"target_text": target, "cosine_to_text": row["cosine_to_target"]}
        row |= {"text_rank": _rank(encoder, z_match, target, candidates)}
        row |= {"source_text_rank": _rank(encoder, z_source, target, candidates)}
    if len(parts) > 1:
        keys = ("model_id", "model_revision")
        row["models"] = [
            {key: one.provenance[key] for key in keys} | {"embedding_error_8bit": error, "noise_floor": floor}
            for one, error, floor in zip(parts, errors, floors, strict=True)
        ]
    names = tuple(labels) if labels else (encoder.label_names if encoder.has_head else None)
    if names is None:
        return row | dict.fromkeys(LABEL_MEASURES)
    logits = files.classify(stack, labels) if labels else files.classify(stack)
    prob = probabilities(encoder, logits)
    s, m, *t = (int(k) for k in prob.argmax(dim=1))
    return row | {
        "source_label": names[s],
        "target_label": names[t[0]] if t else None,
        "match_label": names[m],
        "match_prob": finite(prob[1, m]),
        "target_label_prob": finite(prob[1, t[0]]) if t else None,
        "same_top1": m == t[0] if t else None,
    }


def _rank(encoder: Any, z: Tensor, text: Any, candidates: Sequence[str]) -> int:
    """Return the place of a text among the candidates by cosine to an image embedding; 1 is the nearest."""
    others = [one for one in candidates if one != text]
    own, *rest = (encoder.embed_texts([text, *others]).double() @ z.double()).tolist()
    return 1 + sum(one > own for one in rest)


def _measure_after(
    encoder: Encoder, changed: Sequence[Tensor], z_target: Tensor, target: Sequence[Tensor],
    labels: Sequence[str] | None,
) -> Row:  # fmt: skip
    """Measure how far images (3, H, W), a match after draws of a transformation, embed from the target."""
    images, files = torch.stack([one.to(encoder.device) for one in (*target, *changed)]), of_files(encoder)
    z = files(images)[len(target) :]
    errors = [worst(errors_of(encoder, each, z_target)) for each in z]
    seen = top_classes(files, images, labels) if target else None
    return {
        "error": median_of(errors),
        "worst": worst(errors),
        "same_top1": None if seen is None else seen[1:].count(seen[0]) / len(errors),
    }


def sum_up_through(rows: Rows, name: str) -> Row:
    """Sum up a transformation over the rows: median error and its largest value, and the share of labels kept."""
    found = [one for row in rows for one in row["through"] or () if one and one["transformation"] == name]
    shares = [one["same_top1"] for one in found if one["same_top1"] is not None]
    return {
        "transformation": name,
        "error": median_of(one["error"] for one in found),
        "worst": largest(one["worst"] for one in found),
        "same_top1": sum(shares) / len(shares) if shares else None,
    }


def top_classes(encoder: Any, pixels: Tensor, labels: Sequence[str] | None = None) -> list[int] | None:
    """Return the top-1 class of each image (B, 3, H, W), by the head or zero-shot; None without either."""
    if labels is None and not encoder.has_head:
        return None
    with torch.no_grad(), no_tf32():
        return [int(k) for k in encoder.classify(pixels, labels).argmax(dim=1)]


def probabilities(encoder: Any, scores: Tensor) -> Tensor:
    """Return the probabilities of scores (B, C): a softmax, or a sigmoid of each score of a multi-label head."""
    scores = scores.double()
    return scores.sigmoid() if getattr(encoder, "multi_label", False) else scores.softmax(dim=1)


def distances_apart(sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖f(a)−f(b)‖/‖f(b)‖ of every source and target (B, D), and which pairs are unrelated photos."""
    # A source and the target of another pair are unrelated; a single pair uses its own target. Embeddings that agree to
    # 1e-4 belong to one photo, which may be the source of one pair and the target of another.
    apart = ~torch.eye(len(sources), dtype=torch.bool) if len(sources) > 1 else torch.ones(1, 1, dtype=torch.bool)
    distance = torch.cdist(sources, targets, compute_mode="donot_use_mm_for_euclid_dist") / targets.norm(dim=1)
    return distance, apart & (distance > 1e-4)


def random_pair_baseline(sources: Tensor, targets: Tensor) -> Row | None:
    """Measure how far apart unrelated images are, from the embeddings (B, D) of pairs; None for equal images."""
    a, b = sources.detach().double().cpu(), targets.detach().double().cpu()
    distance, apart = distances_apart(a, b)
    if not bool(apart.any()):
        return None
    similarity = (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1))
    return {
        "num_pairs": int(apart.sum()),
        "distance": _spread(distance[apart].tolist()),
        "cosine": _spread(similarity[apart].tolist()),
    }


def text_baseline(encoder: Any, rows: Rows, candidates: Sequence[str]) -> Row | None:
    """Measure how near photos and texts are that do not belong together, photos and their class, and two photos."""
    from hf_equiv.models.zero_shot import PROMPT

    if not rows:
        return None
    z = embed(encoder, torch.stack([open_png(encoder, row["source"]) for row in rows])).double().cpu()
    own = [row["source_class"] and PROMPT.format(label=first_name(row["source_class"])) for row in rows]
    named = sorted({text for text in own if text})
    try:
        encoder.embed_texts(named)
    except (OSError, ValueError):  # names that the tokenizer does not know
        named, own = [], [None] * len(own)
    texts = [*candidates, *named]
    table = (z @ encoder.embed_texts(texts).double().cpu().T).tolist()
    wrong = [
        value
        for row, text, line in zip(rows, own, table, strict=True)
        for other, value in zip(candidates, line, strict=False)
        if other not in (row["target_text"], text)
    ]
    if not wrong:
        return None
    right = [line[texts.index(text)] for text, line in zip(own, table, strict=True) if text]
    two = (z @ z.T)[torch.ones(len(z), len(z)).triu(1).bool()].tolist()
    photos = [value for value in two if value < 1 - 1e-8]
    return {
        "num_pairs": len(wrong),
        "distance": _spread([math.sqrt(max(0.0, 2 - 2 * value)) for value in wrong]),
        "cosine": _spread(wrong),
        "own_class": _spread(right) if right else None,
        "two_photos": _spread(photos) if photos else None,
    }


def verdict(analysis: str, **values: Any) -> str:
    """Return the verdict of a run in words, from the template."""
    text = _templates().get_template("verdict.txt.jinja").render(analysis=analysis, **values)
    return " ".join(line.strip() for line in text.split("\n") if line.strip())


_templates = cache(text_templates)  # compiling a template takes longer than filling it in


def _spread(values: Sequence[float]) -> Row:
    return {"median": finite(median_of(values)), "min": finite(min(values)), "max": finite(max(values))}


def count_images(made: RunRows) -> tuple[Row, Rows]:
    """Begin the summary of rows of single images, and return the rows with numbers; without any it is complete."""
    rows, good = made.rows, [row for row in made.rows if row["status"] != Status.ERROR]
    counts = {"images": len({row["image_id"] for row in rows}), "rows": len(rows), "counts": counts_of(rows)}
    return counts | ({} if good else {"verdict": "No image could be analysed."}), good


def counts_of(rows: Rows) -> dict[str, int]:
    """Count the rows by status."""
    return dict(sorted(Counter(str(row["status"]) for row in rows).items()))


def median_of(values: Iterable[float | None]) -> float | None:
    """Return the median of the numbers that exist; None if none does."""
    numbers = [value for value in values if value is not None]
    return median(numbers) if numbers else None


def medians_of(rows: Rows, keys: Iterable[str]) -> Row:
    """Return the median of each column."""
    return {key: median_of(row[key] for row in rows) for key in keys}


def largest(values: Iterable[float | None]) -> float | None:
    """Return the largest of the numbers that exist; None if none does."""
    return max((value for value in values if value is not None), default=None)


def quartiles_of(values: Sequence[float]) -> list[float] | None:
    """Return the quantiles 0, 25, 50, 75 and 100 %."""
    if len(values) < 2:
        return [*values] * 5 or None
    return [min(values), *quantiles(values, n=4, method="inclusive"), max(values)]
