"""Sections of a report on geometry: spectrum, Lipschitz constants, linearity, walks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_equiv import reportgeometryfigures
from hf_equiv.metrics import short
from hf_equiv.reportmaterial import MODEL, Material, missing, value
from hf_equiv.reportnumbers import all_rows
from hf_equiv.reportpage import Block, Picture, Table, Text, plain
from hf_equiv.reportwords import ball, count, number, tenth, three

Row = Mapping[str, Any]


def spectrum_section(m: Material) -> list[Block]:
    """Singular values, rank and named zeros."""
    blocks: list[Block] = [m.heading("Geometry: how many directions move the embedding", "spectrum")]
    found = m.numbers["spectrum"]
    if found is None:
        return [*blocks, missing("the spectrum of the Jacobian", f"hf-equiv spectrum {MODEL} --data W --limit 20")]
    rows = all_rows(m.checkpoint.of("spectrum"))
    lines = [
        ("largest singular value σ₁", number(found["sigma_max"], three)),
        ("smallest above the rank threshold", number(found["smallest_above"], three)),
        ("rank threshold", number(found["rank_threshold"])),
        ("effective rank (entropy of the spectrum)", number(found["effective_rank"], tenth)),
    ]
    ranks = ""
    if found["ranks"]:
        ranks = " to ".join(str(r) for r in dict.fromkeys((found["ranks"][0], found["ranks"][-1])))
        lines.append((f"numerical rank, in {plain(found['dtype'])}", f"{ranks} of {found['dim']}"))
        lines.append(
            ("nullity: directions without effect to first order", f"{found['nullity']:,} of {found['pixels']:,}")
        )
    for kind, told in (("structural_zeros", "zero by construction"), ("near_structural", "nearly zero")):
        for cause, zero in found[kind].items():
            lines.append((f"{told}: {plain(cause)}", f"{zero['count']}, measured {short(zero['measured'])}"))
    blocks.append(
        Text(
            f"The Jacobian at {found['images']} photo{'s' if found['images'] > 1 else ''}: singular values in "
            "embedding "
            "length per pixel length (L2, pixels in [0, 1]). The nullity follows from the number of pixels alone, "
            "whatever "
            "the encoder; how far one can go along it is the question of the next sections."
        )
    )
    blocks.append(Table(("", "value, median"), tuple(lines)))
    if not ranks:
        blocks.append(missing("rank and nullity", f"hf-equiv spectrum {MODEL} without --k"))
    png = reportgeometryfigures.spectrum_figure(rows)
    if png:
        blocks.append(
            Picture(
                m.name("spectrum"),
                png,
                f"Singular values of the Jacobian, largest {short(value(found['sigma_max']))}"
                f"{', rank ' + ranks if ranks else ''}.",
                "Singular values of the Jacobian, a line for each photo.",
            )
        )
    return blocks


def lipschitz_section(m: Material) -> list[Block]:
    """Local constants by kind of direction."""
    blocks: list[Block] = [m.heading("Geometry: how fast the embedding moves, by kind of direction", "lipschitz")]
    found = m.numbers["lipschitz"]
    if found is None:
        command = f"hf-equiv lipschitz {MODEL} --data W --limit 5 --linearity"
        return [*blocks, missing("local directional Lipschitz constants", command)]
    rows = tuple(
        (
            plain(kind),
            f"{k['resolved']} of {k['count']}",
            number(k["value"], three),
            "–" if k["spread"] is None else f"{three(k['spread']['min'])} to {three(k['spread']['max'])}",
            "–" if k["jvp"] is None else three(k["jvp"]["max"]),
        )
        for kind, k in found["kinds"].items()
    )
    blocks.append(
        Text(
            f"Local constants ‖f(x + hv) − f(x − hv)‖ / 2h at {found['images']} "
            f"photo{'s' if found['images'] > 1 else ''}, "
            "each read from a plateau over many radii, and stated only where that stands above the float noise. A "
            "random "
            "direction tells of random directions: its constant is not the Lipschitz constant of the encoder."
        )
    )
    head = ("direction", "above the noise", "constant, median", "range", "largest ‖Jv‖")
    told = "top, row: along singular vectors; null: projected off all of them; n counts directions, which share photos."
    blocks.append(Table(head, rows, told, stacked=True))
    if found["regional"]:
        blocks.append(
            Text(
                f"Largest constant found inside {ball(found['radius'], found['norm'])} about a photo: "
                f"{three(found['regional']['max'])} (at the photos themselves at most "
                f"{three(found['regional_at_center']['max'])}). It is a lower bound: a search can only miss larger "
                "ones."
            )
        )
    kinds: dict[str, list[Row]] = {}
    for row in all_rows(m.checkpoint.of("lipschitz")):
        kinds.setdefault(row["direction"], []).append(row)
    png = reportgeometryfigures.constants_figure(kinds)
    if png:
        told = "; ".join(f"{kind} {short(value(k['value']))}" for kind, k in found["kinds"].items())
        blocks.append(
            Picture(
                m.name("constants"),
                png,
                f"Local constants by kind of direction; medians: {told}.",
                "One mark for each direction; hollow: no constant above the float noise, ‖Jv‖ is shown. "
                "At the right: how many are above it.",
            )
        )
    return blocks


def linearity_section(m: Material) -> list[Block]:
    """How far the linear model holds, beside how far matches and walks lie."""
    blocks: list[Block] = [m.heading("In proportion: linear sets and matches", "linearity")]
    found = m.numbers["lipschitz"]
    kinds = {kind: k for kind, k in found["kinds"].items() if k["linearity"]} if found else {}
    if not kinds:
        return [*blocks, missing("how far the linear model holds", f"hf-equiv lipschitz {MODEL} --data W --linearity")]
    far = m.numbers["match"]["l2"] if m.numbers["match"] else None
    lines = [
        (
            f"linear along {plain(kind)}",
            number(k["linearity"], three),
            f"{k['at_limit']} of {k['count']} held up to the largest radius tried" if k["at_limit"] else "",
        )
        for kind, k in kinds.items()
    ]
    if far:
        lines.append(
            (
                "distance of a match from its source",
                number(far, three),
                ball(m.numbers["match"]["radius"], m.numbers["match"]["norm"]),
            )
        )
    walk = m.numbers["walk"]
    if walk and walk["l2"]:
        lines.append(("distance reached by walks with one embedding", number(walk["l2"], three), "corrected each step"))
    blocks.append(
        Text(
            "How far one can go in a straight line before the first-order model of the encoder is wrong by 10 %: of "
            "the "
            "change it predicts, or along null directions, where it predicts none, of the embedding's length. All "
            "lengths "
            "are L2 distances between images, pixels in [0, 1]."
        )
    )
    blocks.append(Table(("length", "median", ""), tuple(lines), stacked=True))
    rows = all_rows(m.checkpoint.of("lipschitz"))
    bands: list[tuple[str, str, list[float]]] = []
    for kind in kinds:
        radii = [r["linearity_radius"] for r in rows if r["direction"] == kind and r["linearity_radius"]]
        bands.append((f"linear: {plain(kind)}", kind, radii))
    if m.checkpoint.matches:
        bands.append(("matches", "", [r["l2"] for r in m.checkpoint.matches[0].good if r["l2"]]))
    if walk:
        bands.append(("ends of walks", "", [w["l2"] for w in walk["walks"] if w["l2"]]))
    png = reportgeometryfigures.proportion_figure(bands)
    if png:
        told = "; ".join(f"{name} {short(float(np.median(values)))}" for name, _, values in bands if values)
        blocks.append(
            Picture(
                m.name("proportion"),
                png,
                f"Lengths in pixel space, medians: {told}.",
                "How far the linear model holds, beside how far matches and walks lie. The bar is the median.",
            )
        )
    return blocks


def walks_section(m: Material) -> list[Block]:
    """How far walks with the embedding held have come."""
    blocks: list[Block] = [m.heading("Geometry: walking with the embedding held", "walks")]
    found = m.numbers["walk"]
    if found is None:
        return [
            *blocks,
            missing("how far a set of equal embedding reaches", f"hf-equiv walk {MODEL} --data W --limit 5"),
        ]
    rows = tuple(
        (
            plain(w["image_id"]),
            plain(w["heading"]),
            plain(w["status"]),
            str(w["steps"]),
            three(w["l2"]),
            three(w["arc_length"]),
            "–" if w["psnr_db"] is None else f"{w['psnr_db']:.1f}",
            short(w["largest_drift"]),
            plain(", then ".join(label.split(",")[0] for label in w["labels"])) or "–",
        )
        for w in found["walks"]
    )
    blocks.append(
        Text(
            f"{len(found['walks'])} walk{'s' if len(found['walks']) > 1 else ''} through images of one embedding: a "
            "step "
            "along the null space, then a correction back to the embedding. The distance is a lower bound of how far "
            "the "
            "set reaches: more steps go further."
        )
    )
    head = ("photo", "heading", "status", "steps", "L2 reached", "path", "PSNR [dB]", "largest drift", "seen as")
    blocks.append(Table(head, rows, stacked=True))
    if found["one_label"]:
        blocks.append(Text(f"The head gives one label all the way in {count(found['one_label'])} walks."))
    paths: dict[str, list[Row]] = {}
    for run in m.checkpoint.of("walk"):
        for row in run.good:
            paths.setdefault(f"{plain(row['image_id'])} ({plain(row['heading'])})", []).append(row)
    png = reportgeometryfigures.walks_figure(paths, max(run.settings["rtol"] for run in m.checkpoint.of("walk")))
    if png:
        blocks.append(
            Picture(
                m.name("walks"),
                png,
                f"Walks end at L2 {number(found['l2'], three)} from their origin, "
                f"with drift at most {short(found['largest_drift'])}.",
                "Above: distance from the origin; below: how far the embedding has drifted.",
            )
        )
    return blocks
