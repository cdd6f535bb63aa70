"""Section of a report with a few matches as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_equiv import plots
from hf_equiv.imagefile import decode_png, encode_png
from hf_equiv.metrics import short
from hf_equiv.reportmaterial import Material
from hf_equiv.reportpage import Block, Strip, Text, plain
from hf_equiv.reportruns import read_pictures
from hf_equiv.reportwords import ball, near_budget
from hf_equiv.shards import IMAGE_COLUMNS

Row = Mapping[str, Any]
SHOWN = 4
"""Matches in the gallery."""


def gallery_section(m: Material) -> list[Block]:
    """A few matches as pictures."""
    if m.numbers["match"] is None:
        return []
    near = near_budget(m.numbers)
    runs = {run.name: run for run in m.checkpoint.matches}
    run = runs[near["run"]] if near else m.checkpoint.matches[0]
    s = run.settings
    blocks: list[Block] = [m.heading(f"What matches look like ({ball(s['radius'], s['norm'])})", "gallery")]
    ids = [row["pair_id"] for row in run.good][:SHOWN]
    rows = {row["pair_id"]: row for row, _ in read_pictures(run, ids)}
    kept = [rows[name] for name in ids if all(rows[name][c] is not None for c in IMAGE_COLUMNS)]
    if not kept:
        return [
            *blocks,
            Text("The photos are not part of this data set: they were withheld when it was published.", "quiet"),
        ]
    for k, row in enumerate(kept):
        source, match = (decode_png(row[name]) for name in ("source", "match"))
        difference, gain = plots.difference(source.numpy(), match.numpy())
        images = {
            "source": row["source"],
            "match": row["match"],
            "difference": _encoded(difference),
            "target": row["target"],
        }
        below = {
            "source": (_seen("source", row["source_label"]), _class(row["source_class"])),
            "match": (
                _seen("match", row["match_label"]),
                f"error {short(row['embedding_error_8bit'])} as PNG, {short(row['embedding_error'])} float",
            ),
            "difference": (f"(match − source) × {gain}", _size(row)),
            "target": (_seen("target", row["target_label"]), _class(row["target_class"])),
        }
        strip = tuple(
            (
                f"{m.prefix}-pair{k + 1}-{name}.png",
                png,
                f"{name} of {plain(row['pair_id'])}",
                tuple(line for line in below[name] if line),
            )
            for name, png in images.items()
        )
        blocks.append(Strip(strip, f"{plain(row['source_id'])} made to embed as {plain(row['target_id'])}"))
    if near and m.checkpoint.matches[0] is not run:
        blocks.append(
            Text(
                "Shown at the smallest budget that is enough; the numbers of the section above are of "
                f"{plain(m.checkpoint.matches[0].name)}.",
                "quiet",
            )
        )
    return blocks


def _encoded(pixels: np.ndarray) -> bytes:
    import torch

    return encode_png(torch.from_numpy(np.ascontiguousarray(pixels)))


def _seen(role: str, label: str | None) -> str:
    return role if label is None else f"{role}, seen as {plain(label.split(',')[0])}"


def _class(name: str | None) -> str:
    return "" if name is None else f"class {plain(name)}"


def _size(row: Row) -> str:
    told = "identical to the source" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.1f} dB"
    return told if row["ssim"] is None else f"{told}, SSIM {row['ssim']:.3f}"
