"""Sections of a report on what a match is worth elsewhere: handling, other models, search, classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_equiv import reportfigures
from hf_equiv.metrics import short
from hf_equiv.reportmaterial import Material, unmeasured, value
from hf_equiv.reportpage import Block, Picture, Table, Text, code, plain
from hf_equiv.reportwords import brief, brief_count, count, number, thousandth, three

Row = Mapping[str, Any]


def survival_section(m: Material) -> list[Block]:
    """What usual image handling leaves of a match, beside what it does to the target."""
    match, found = m.numbers["match"], m.numbers["survival"]
    if match is None:
        return []
    blocks: list[Block] = [m.heading("Does a match survive handling?", "survival")]
    if found is None:
        if not m.survival:
            return [*blocks, Text("Not measured: --no-survival was given.", "quiet")]
        return [*blocks, unmeasured(m, "survival")]
    blocks.append(
        Text(
            "Each match is saved, resized or blurred, and embedded again. The control is the target photo after the "
            "same: "
            "if it moves as far, the encoder is sensitive and the match is not more fragile than a photo."
        )
    )
    rows = [("as stored (8-bit PNG)", match["embedding_error_8bit"], None, None, None)]
    rows += [("float, rounded to 8 bit", match["rounded_error"], match["target_quantization_error"], None, None)]
    rows += [(name, f["error"], f["control"], f["label"], f["control_label"]) for name, f in found.items()]
    rows = [row for row in rows if row[1]]
    near = {name: f["to_source"] for name, f in found.items()}
    table = tuple(
        (name, brief(error), brief(control), brief(near.get(name)), brief_count(label), brief_count(other))
        for name, error, control, label, other in rows
    )
    head = (
        "after",
        "match to target",
        "control: target to itself",
        "match to source",
        "match: target's label",
        "control: target's label",
    )
    blocks.append(
        Table(
            head,
            table,
            f"Medians and counts over {match['measured_pairs']} pairs, with 95 % intervals in brackets. The control of "
            "rounding is half a level of noise on the target.",
            stacked=True,
        )
    )
    apart = match["unrelated"]["median"] if match["unrelated"] else None
    png = reportfigures.survival_figure([row[:3] for row in rows], apart)
    if png:
        told = "; ".join(f"{name}: {short(value(e))}, control {short(value(c))}" for name, e, c, _, _ in rows)
        blocks.append(
            Picture(
                m.name("survival"),
                png,
                f"Distance from the target after handling: {told}.",
                "Distance from the target's embedding after handling, median with 95 % bootstrap interval.",
            )
        )
    return blocks


def transfer_section(m: Material) -> list[Block]:
    """Whether the matches match in other models."""
    if m.numbers["match"] is None:
        return []
    blocks: list[Block] = [m.heading("Do the matches match in another model?", "transfer")]
    if not m.numbers["transfer"]:
        if m.transfer:
            if m.transfer_note and not m.reason:
                return [*blocks, Text(f"Not measured: {plain(m.transfer_note)}.", "quiet")]
            return [*blocks, unmeasured(m, "transfer")]
        return [*blocks, Text(f"Not measured. To add it: this report with {code('--transfer MODEL2')}.", "quiet")]
    for one in m.numbers["transfer"]:
        how = "as they are" if one["same_size"] else "through its own image processor, since its input has another size"
        blocks.append(
            Text(
                f"{plain(one['model'])} (readout {plain(one['readout'])}, revision {plain(one['revision'])[:19]}) is "
                "given "
                f"the stored images {how}."
            )
        )
        apart = one["unrelated"]
        lines = [
            ("match to target", number(one["error"]), number(one["cosine_to_target"], thousandth)),
            ("match to source", number(one["moved"]), number(one["cosine_to_source"], thousandth)),
            ("control: source to target", number(one["distance"]), number(one["cosine_source_target"], thousandth)),
        ]
        if apart:
            lines.append(("control: unrelated photos", f"{short(apart['median'])} ({apart['n']} pairs)", "–"))
        blocks.append(Table(("in the other model", "embedding distance, median", "cosine, median"), tuple(lines)))
        told = f"In {count(one['nearer'])} pairs the match is nearer to the target than the source is."
        if one["flipped"]:
            told += f" Its head gives {count(one['flipped'])} matches the target's label, and {count(one['kept'])} "
            told += "the source's (where the two differ)."
        blocks.append(Text(told))
    return blocks


def retrieval_section(m: Material) -> list[Block]:
    """What a search by embedding returns."""
    if m.numbers["match"] is None:
        return []
    blocks: list[Block] = [m.heading("What an image search returns", "retrieval")]
    found = m.numbers["retrieval"]
    if found is None:
        if m.measured and m.measured["pairs"]:
            return [*blocks, Text("Not measured: a search needs at least four different photos.", "quiet")]
        return [*blocks, unmeasured(m, "retrieval")]
    blocks.append(
        Text(
            f"A database of {found['photos']} different photos (all sources and targets"
            f"{', and the labelled photos' if m.labelled else ''}) is searched by cosine similarity with the PNG "
            "match, and "
            "as the control with the source. Neighbours are counted without the two photos of the pair."
        )
    )
    k = found["k"]
    lines = (
        ("the target comes first", count(found["first"]), count(found["source_first"])),
        ("rank of the target, median", number(found["rank"], three), number(found["source_rank"], three)),
        (
            f"of the target's {k} nearest neighbour{'s' if k > 1 else ''}, share found, mean",
            number(found["overlap"], thousandth),
            number(found["source_overlap"], thousandth),
        ),
    )
    blocks.append(
        Table(
            ("", "searched with the match", "control: with the source (itself left out)"),
            lines,
            f"Neighbours drawn at random would agree to {found['chance']:.2f}."
            + (" With so few photos a rank says little." if found["photos"] < 20 else "")
            + (_unranked(found["unranked"]) if found["unranked"] else ""),
            stacked=True,
        )
    )
    return blocks


def _unranked(count: int) -> str:
    return f" {count} of the matches or targets have an embedding that is zero or not finite: they have no rank."


def probe_section(m: Material) -> list[Block]:
    """What a classifier on the embeddings makes of the matches."""
    if m.numbers["match"] is None:
        return []
    blocks: list[Block] = [m.heading("A classifier on the embeddings (kNN probe)", "probe")]
    found = m.numbers["probe"]
    if found is None:
        if not (m.measured and m.measured["pairs"]):
            return [*blocks, unmeasured(m, "the kNN probe")]
        return [
            *blocks,
            Text(
                "Not measured: it needs labelled photos, with at least two photos in two classes. To add "
                f"it: this report with {code('--label-data W')}.",
                "quiet",
            ),
        ]
    told = (
        f"Downstream means every head, also one that is trained later. As an example, {found['photos']} photos of "
        f"{found['classes']} classes vote: the {found['k']} nearest by cosine similarity, without the two photos of "
        "the "
        f"pair. Leave-one-out accuracy: {count(found['accuracy'])}. "
    )
    if not found["apart"]:
        return [*blocks, Text(told + f"It gives source and target the same class in all {found['pairs']} pairs.")]
    told += (
        f"In {found['apart']} of {found['pairs']} pairs it gives source and target different classes; of those, "
        f"{count(found['flipped'])} matches get the target's class and {count(found['kept'])} keep the source's."
    )
    return [*blocks, Text(told)]
