"""What a report measures anew with the encoder: controls, survival, transfer.

Errors are relative, ‖f(a) − f(b)‖ / ‖f(b)‖, in float64 of float32 embeddings; similarity is the cosine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_equiv.metrics import cosine, finite, psnr_db, relative_error, ssim
from hf_equiv.precision import no_tf32
from hf_equiv.survival import TRANSFORMS, round_8bit

Row = dict[str, Any]
Embed = Callable[[Tensor], Tensor]

RANDOM_DRAWS = 4


@torch.no_grad()
@no_tf32()
def measure_pair(
    encoder: Any, source: Tensor, match: Tensor, target: Tensor, *, seed: int, pair_id: str,
    float_match: Tensor | None = None, labels: Sequence[str] | None = None, survival: bool = True,
) -> tuple[Row, Tensor]:  # fmt: skip
    """Set one match against its controls.

    `moved` is how far the embedding has gone from the source's, `random_moved` the same for random steps of the same
    L2 length (median of 4, rounded to 8 bit), `random_error` what is then left to the target. `survival` holds for
    each transform T the error of T(match) (`error`), that of T(target) (`control`), the distance of T(match) from the
    source (`to_source`), and whether the head gives T(match) and T(target) the target's label.

    Cost: about 22 forwards of one image, 38 with a head.

    Args:
        encoder: f.
        source: (3, H, W), pixels k/255.
        match: likewise, as read back from its PNG.
        target: likewise.
        seed: of the run.
        pair_id: id of the row; the random steps depend on the two alone.
        float_match: the match before it went to 8 bit, where it is kept.
        labels: class names for zero-shot classification.
        survival: whether to try the transforms.

    Returns:
        Plain numbers, None for what does not exist; and the embedding of the match, (D,).
    """
    source, match, target = (x.to(encoder.device) for x in (source, match, target))
    z_source, z_match, z_target = encoder(torch.stack([source, match, target]))
    step = (match.double() - source.double()).norm()
    draws = [_random_step(source, step, f"{seed}:{pair_id}:{k}") for k in range(RANDOM_DRAWS)]
    z_random = [encoder(x[None])[0] for x in draws]
    row: Row = {
        "pair_id": pair_id,
        "error": relative_error(z_match, z_target),
        "distance": relative_error(z_source, z_target),
        "moved": relative_error(z_match, z_source),
        "random_moved": _middle([relative_error(z, z_source) for z in z_random]),
        "random_error": _middle([relative_error(z, z_target) for z in z_random]),
        "random_l2": _middle([finite((x.double() - source.double()).norm()) for x in draws]),
        "psnr_match_target": psnr_db(match, target),
        "ssim_match_target": ssim(match, target),
        "rounded_error": None,
        "survival": {},
    }
    if float_match is not None:
        rounded = round_8bit(float_match.to(match))
        row["rounded_error"] = relative_error(encoder(rounded[None])[0], z_target)
    if survival:
        wanted = classes_of(encoder, target[None], labels)
        for name, change in TRANSFORMS.items():
            two = torch.stack([change(x.cpu()) for x in (match, target)]).to(match)
            a, b = encoder(two)
            seen = classes_of(encoder, two, labels)
            row["survival"][name] = {
                "error": relative_error(a, z_target),
                "control": relative_error(b, z_target),
                "to_source": relative_error(a, z_source),
                "label": None if seen is None or wanted is None else seen[0] == wanted[0],
                "control_label": None if seen is None or wanted is None else seen[1] == wanted[0],
            }
    return row, z_match.detach().double().cpu()


@torch.no_grad()
@no_tf32()
def classes_of(encoder: Any, pixels: Tensor, labels: Sequence[str] | None = None) -> list[int] | None:
    """Top-1 class of each image (B, 3, H, W), by the head or zero-shot; None for an encoder with neither."""
    if labels:
        return [int(k) for k in encoder.classify(pixels, list(labels)).argmax(dim=1)]
    return [int(k) for k in encoder.classify(pixels).argmax(dim=1)] if encoder.has_head else None


@torch.no_grad()
@no_tf32()
def transfer_pair(other: Any, images: Sequence[Tensor]) -> tuple[Row, Tensor, Tensor]:
    """Ask another encoder g whether it, too, gives match and target one embedding.

    Args:
        other: g.
        images: source, match, target as g is to see them, each (3, H, W).

    Returns:
        `error` ‖g(match) − g(target)‖ / ‖g(target)‖ and `distance`, the same of the source; `moved` ‖g(match) −
        g(source)‖ / ‖g(source)‖; cosines; the labels that g gives; and g of source and target, (D,).
    """
    three = torch.stack(list(images)).to(other.device)
    z_source, z_match, z_target = other(three)
    seen = classes_of(other, three)
    names = None if seen is None else [other.label_names[k] for k in seen]
    row = {
        "error": relative_error(z_match, z_target),
        "distance": relative_error(z_source, z_target),
        "moved": relative_error(z_match, z_source),
        "cosine_to_target": cosine(z_match, z_target),
        "cosine_to_source": cosine(z_match, z_source),
        "cosine_source_target": cosine(z_source, z_target),
        "labels": names,
    }
    return row, z_source.detach().double().cpu(), z_target.detach().double().cpu()


def pair_distances(sources: Tensor, targets: Tensor) -> list[float]:
    """‖f(a) − f(b)‖ / ‖f(b)‖ of source i and target j of different pairs; of its own for a single pair.

    Photos that embed alike to 1e-4 count as one photo and are left out, and so is what has no finite distance.

    Args:
        sources: (B, D).
        targets: (B, D).

    Returns:
        The distances.
    """
    apart = ~torch.eye(len(sources), dtype=torch.bool) if len(sources) > 1 else torch.ones(1, 1, dtype=torch.bool)
    distance = torch.cdist(sources, targets, compute_mode="donot_use_mm_for_euclid_dist") / targets.norm(dim=1)
    return [float(d) for d in distance[apart & (distance > 1e-4) & distance.isfinite()]]


def _random_step(source: Tensor, length: Tensor, name: str) -> Tensor:
    """The source, a step of this L2 length in a random direction away, inside the box and on k/255."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    v = torch.randn(source.shape, generator=generator, dtype=torch.float64)
    # clipping and rounding shorten or lengthen the step: a few corrections bring it to the length asked for
    scale, moved = float(length) / float(v.norm()), source.double().cpu()
    for _ in range(6):
        moved = round_8bit(source.double().cpu() + scale * v)
        reached = float((moved - source.double().cpu()).norm())
        if not reached or abs(reached / max(float(length), 1e-12) - 1) < 0.01:
            break
        scale *= float(length) / reached
    return moved.to(source)


def _middle(values: Sequence[float | None]) -> float | None:
    known = sorted(v for v in values if v is not None)
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if known else None


def collect(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[float | None]:
    """The values under nested keys, one per row."""
    values: list[Any] = list(rows)
    for key in keys:
        values = [None if value is None else value.get(key) for value in values]
    return values
