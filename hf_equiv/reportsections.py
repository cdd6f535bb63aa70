"""The sections of a report on one checkpoint, as blocks; each only where there is data, else one line that says how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_equiv import plots, reportfigures
from hf_equiv.imagefile import decode_png, encode_png
from hf_equiv.metrics import short
from hf_equiv.reportmeasures import collect
from hf_equiv.reportnumbers import all_rows
from hf_equiv.reportpage import Block, Bullets, Code, Heading, Picture, Strip, Table, Text, code, plain
from hf_equiv.reportruns import Checkpoint, Run, read_pictures
from hf_equiv.reportwords import (
    ball, claims, count, disagreements, interval, near_budget, number, summary, tenth, thousandth, three,
)  # fmt: skip
from hf_equiv.shards import IMAGE_COLUMNS

Row = Mapping[str, Any]
SHOWN = 4
"""Matches in the gallery."""

MODEL = "MODEL"


@dataclass(frozen=True)
class Material:
    """What the sections of one checkpoint are written from.

    Attributes:
        checkpoint: its runs.
        numbers: as from `checkpoint_numbers`.
        measured: as from `measure_run`; None if it could not be measured.
        reason: why not, in a sentence; "" if it was.
        survival: whether survival was asked for.
        transfer: whether a second model was named.
        labelled: what `--label-data` names; None without.
        prefix: of file names and anchors.
    """

    checkpoint: Checkpoint
    numbers: Row
    measured: Row | None
    reason: str
    survival: bool
    transfer: bool
    labelled: str | None
    prefix: str

    def name(self, what: str) -> str:
        """File name of a figure."""
        return f"{self.prefix}-{what}.png"

    def heading(self, text: str, what: str) -> Heading:
        """Heading of a section."""
        return Heading(text, 3, f"{self.prefix}-{what}")


def checkpoint_sections(material: Material) -> list[Block]:
    """All sections of one checkpoint.

    Args:
        material: runs, numbers and measurements.

    Returns:
        The blocks, from the summary to how it was made.
    """
    blocks: list[Block] = [Heading(plain(material.checkpoint.title), 2, material.prefix)]
    for part in (
        _summary, _matching, _gallery, _near, _heads, _survival, _transfer, _retrieval, _probe, _spectrum, _lipschitz,
        _linearity, _walks, _made,
    ):  # fmt: skip
        blocks += part(material)
    return blocks


def _missing(what: str, command: str) -> Text:
    return Text(f"Not measured: {what}. To add it: {code(command)} and this report again.", "quiet")


def _unmeasured(m: Material, what: str) -> Text:
    return Text(f"Not measured: {what}, because {m.reason or 'no match was made'}.", "quiet")


def _summary(m: Material) -> list[Block]:
    n = m.numbers
    blocks: list[Block] = []
    blocks += [Text(_partial(run), "note") for run in m.checkpoint.runs if run.partial]
    blocks += [
        Text(
            f"{plain(run.name)}: the files {', '.join(map(plain, run.changed[:3]))} are not as run.json states "
            f"(SHA-256). Numbers from them are not to be relied on; {code(f'hf-equiv verify {run.name}')} names what "
            "does not hold.",
            "note",
        )
        for run in m.checkpoint.runs
        if run.changed
    ]
    blocks.append(Bullets(tuple(map(plain, summary(n))), ordered=True))
    rows = tuple((c.claim, plain(c.measured), c.interval, c.verdict) for c in claims(n))
    blocks.append(m.heading("The paper's claims", "claims"))
    blocks.append(Table(("claim", "measured here", "interval of the deciding number", "verdict"), rows, stacked=True))
    against = disagreements(n)
    blocks.append(m.heading("Where this disagrees with the paper", "against"))
    if against:
        blocks.append(Bullets(tuple(map(plain, against))))
    else:
        blocks.append(Text("Nothing that was measured does, or what could was not measured.", "quiet"))
    return blocks


def _partial(run: Run) -> str:
    what = "pairs" if run.layout.listed == "pairs" else "images"
    return f"Partial: {plain(run.name)} holds {run.there} of {run.listed} {what}; the run is not finished."


def _matching(m: Material) -> list[Block]:
    blocks: list[Block] = [m.heading("Matching: one embedding, two photos", "matching")]
    found = m.numbers["match"]
    if found is None:
        errors = [run for run in m.checkpoint.of("match") if run.rows]
        if errors:
            return [
                *blocks,
                Text("Every pair of the match run ended in an error; there is no match to report.", "note"),
            ]
        return [
            *blocks,
            _missing("whether images can share an embedding", f"hf-equiv match {MODEL} --data W --pairs 50"),
        ]
    run = m.checkpoint.matches[0]
    limit = "free inside the pixel box" if found["radius"] is None else f"within {ball(found['radius'], found['norm'])}"
    told = (
        f"Each pair is a source photo and a target photo. The solver ({plain(found['solver'])}) changes the source, "
        f"{limit}, until its embedding is the target's to {short(found['rtol'])}. {len(run.good)} pairs of "
        f"{found['photos']} photos. The last rows of the table are controls: what the same numbers are when no match "
        "was looked for."
    )
    blocks.append(Text(told))
    lines = [
        ("float match to target", number(found["embedding_error"]), "what the solver reached"),
        ("8-bit PNG match to target", number(found["embedding_error_8bit"]), "the file, read back"),
        ("float match rounded to 8 bit", number(found["rounded_error"]), "without the search on the 8-bit grid"),
        ("float32 noise of the encoder", number(found["noise_floor"]), "nothing below this means anything"),
        ("control: target with half a level of noise", number(found["target_quantization_error"]),
         "what rounding does to any photo"),
        ("control: random step of the match's length", number(found["random_error"]),
         f"to the target; it moves the embedding by {short(_value(found['random_moved']))}, the match by "
         f"{short(_value(found['moved']))} (from the source)"),
        ("control: source to target", number(found["distance"]), "before anything is changed"),
    ]  # fmt: skip
    apart = found["unrelated"]
    if apart:
        spread = "" if apart["q05"] is None else f", 5 % to 95 %: {short(apart['q05'])} to {short(apart['q95'])}"
        lines.append(("control: unrelated photos", f"{short(apart['median'])} ({apart['n']} pairs{spread})",
                      "source and target of different pairs"))  # fmt: skip
    lines = [line for line in lines if line[1] != "–"]
    blocks.append(Table(("embedding distance, median", "value", "what it is"), tuple(lines), stacked=True))
    shares = [
        (f"{float(t):g}", count(found["within"]["float"][t]), count(found["within"]["8bit"][t]))
        for t in found["within"]["float"]
    ]
    blocks.append(Table(("error at most", "float image", "8-bit PNG"), tuple(shares)))
    blocks.append(Text(_outcome(m, run), "quiet"))
    pairs = m.measured["pairs"] if m.measured else []
    curves: dict[str, Sequence[float | None]] = {
        "float match": collect(run.good, "embedding_error"),
        "8-bit PNG match": collect(run.good, "embedding_error_8bit"),
        "control: half-level noise": collect(run.good, "target_quantization_error"),
        "control: random step": collect(pairs, "random_error"),
        "control: unrelated photos": m.measured["unrelated"]["curve"] if m.measured and m.measured["unrelated"] else [],
    }
    png = reportfigures.errors_figure(curves, found["rtol"])
    if png:
        medians = "; ".join(f"{name} {short(float(np.median([v for v in values if v is not None])))}"
                            for name, values in curves.items() if any(v is not None for v in values))  # fmt: skip
        blocks.append(Picture(m.name("errors"), png, f"Distribution of embedding errors; medians: {medians}.",
                              "Share of pairs whose embedding distance is at most the value on the axis. A match is as "
                              "far left as possible; a step of the same length in a random direction stays with the "
                              "unrelated photos."))  # fmt: skip
    if m.reason:
        blocks.append(_unmeasured(m, "the random steps and the distances of this table that need the encoder"))
    return blocks


def _outcome(m: Material, run: Run) -> str:
    tally: dict[str, int] = {}
    for row in run.rows:
        tally[row["status"]] = tally.get(row["status"], 0) + 1
    text = "Status of the rows: " + ", ".join(f"{n} {plain(status)}" for status, n in sorted(tally.items())) + "."
    text += f" Evaluations (one forward and one backward pass): {number(m.numbers['match']['num_evals'], tenth)}."
    apart, like = m.numbers["match"]["psnr_match_target"], m.numbers["match"]["ssim_match_target"]
    if apart:
        text += f" Match and target share an embedding and look different: PSNR {number(apart, tenth, ' dB')}"
        text += f", SSIM {number(like, thousandth)}." if like else "."
    return text


def _value(estimate: Row | None) -> float | None:
    return None if estimate is None else float(estimate["value"])


def _gallery(m: Material) -> list[Block]:
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
        return [*blocks, Text("The photos are not part of this data set: they were withheld when it was published.",
                              "quiet")]  # fmt: skip
    for k, row in enumerate(kept):
        source, match = (decode_png(row[name]) for name in ("source", "match"))
        difference, gain = plots.difference(source.numpy(), match.numpy())
        images = {"source": row["source"], "match": row["match"], "difference": _encoded(difference),
                  "target": row["target"]}  # fmt: skip
        below = {
            "source": (_seen("source", row["source_label"]), _class(row["source_class"])),
            "match": (_seen("match", row["match_label"]), f"error {short(row['embedding_error_8bit'])} as PNG, "
                      f"{short(row['embedding_error'])} float"),
            "difference": (f"(match − source) × {gain}", _size(row)),
            "target": (_seen("target", row["target_label"]), _class(row["target_class"])),
        }  # fmt: skip
        strip = tuple(
            (f"{m.prefix}-pair{k + 1}-{name}.png", png, f"{name} of {plain(row['pair_id'])}",
             tuple(line for line in below[name] if line))
            for name, png in images.items()
        )  # fmt: skip
        blocks.append(Strip(strip, f"{plain(row['source_id'])} made to embed as {plain(row['target_id'])}"))
    if near and m.checkpoint.matches[0] is not run:
        blocks.append(Text("Shown at the smallest budget that is enough; the numbers of the section above are of "
                           f"{plain(m.checkpoint.matches[0].name)}.", "quiet"))  # fmt: skip
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


def _near(m: Material) -> list[Block]:
    found = m.numbers["match"]
    if found is None:
        return []
    blocks: list[Block] = [m.heading("How near: error against budget", "near")]
    budgets = m.numbers["budgets"]
    rows = tuple(
        (
            ball(b["radius"], b["norm"]), f"{b['pairs']} of {b['listed']}", count(b["converged"]),
            number(b["embedding_error"]), number(b["embedding_error_8bit"]), number(b["psnr_db"], tenth),
            number(b["ssim"], thousandth), count(b["flipped"]),
        )
        for b in budgets
    )  # fmt: skip
    head = ("budget", "pairs", "converged", "error, float", "error, PNG", "PSNR [dB]", "SSIM", "target's label")
    blocks.append(Table(head, rows, "Medians. A budget ε limits the change of every pixel value; PSNR and SSIM compare "
                        "the PNG with its source (from about 35 dB on a change is hard to see).", stacked=True))  # fmt: skip
    apart = found["unrelated"]["median"] if found["unrelated"] else None
    drawn = False
    for norm in dict.fromkeys(b["norm"] for b in budgets):
        png = reportfigures.budget_figure(budgets, norm, apart)
        if png:
            drawn = True
            told = "; ".join(
                f"{ball(b['radius'], b['norm'])}: {short(_value(b['embedding_error_8bit']))}" for b in budgets
            )
            blocks.append(Picture(m.name(f"budget-{norm}"), png, f"Median PNG error by budget: {told}.",
                                  "The budget curve: the median error that is reached inside a ball of radius ε about "
                                  "the source, with 95 % bootstrap intervals."))  # fmt: skip
    if not drawn:
        blocks.append(
            _missing("a budget curve (one budget only)", f"hf-equiv match {MODEL} --radius 8/255, then 4/255")
        )
    png = reportfigures.nearness_figure([(ball(r.settings["radius"], r.settings["norm"]), r.good) for r in
                                         m.checkpoint.matches])  # fmt: skip
    if png:
        blocks.append(Picture(m.name("nearness"), png, f"PSNR and SSIM of each match to its source; median PSNR "
                              f"{number(found['psnr_db'], tenth)} dB in the first run.",
                              "Each mark is one match; up and to the right it looks more like its source."))  # fmt: skip
    return blocks


def _heads(m: Material) -> list[Block]:
    heads = m.numbers["heads"]
    if heads is None:
        return []
    blocks: list[Block] = [m.heading("What the head says", "heads")]
    if not heads["labelled"]:
        return [*blocks, Text("This checkpoint has no classification head, and no zero-shot labels were given. The kNN "
                              "probe below stands in for it.", "quiet")]  # fmt: skip
    if not heads["apart"]:
        return [*blocks, Text(f"The head gives source and target the same label in all {heads['labelled']} pairs: "
                              "there is no flip to count.", "quiet")]  # fmt: skip
    told = (
        f"In {heads['apart']} of {heads['labelled']} pairs source and target have different labels. Of those, "
        f"{count(heads['flipped'])} matches get the label of the target, and {count(heads['kept'])} keep that of the "
        f"source. The probability of the target's label is {number(heads['target_label_prob'], thousandth)} (median). "
        "The head was not asked when the match was made: only the embedding was."
    )
    return [*blocks, Text(told)]


def _survival(m: Material) -> list[Block]:
    match, found = m.numbers["match"], m.numbers["survival"]
    if match is None:
        return []
    blocks: list[Block] = [m.heading("Does a match survive handling?", "survival")]
    if found is None:
        if not m.survival:
            return [*blocks, Text("Not measured: --no-survival was given.", "quiet")]
        return [*blocks, _unmeasured(m, "survival")]
    blocks.append(Text(
        "Each match is saved, resized or blurred, and embedded again. The control is the target photo after the same: "
        "if it moves as far, the encoder is sensitive and the match is not more fragile than a photo."
    ))  # fmt: skip
    rows = [("as stored (8-bit PNG)", match["embedding_error_8bit"], None, None, None)]
    rows += [("float, rounded to 8 bit", match["rounded_error"], match["target_quantization_error"], None, None)]
    rows += [(name, f["error"], f["control"], f["label"], f["control_label"]) for name, f in found.items()]
    rows = [row for row in rows if row[1]]
    near = {name: f["to_source"] for name, f in found.items()}
    table = tuple(
        (name, number(error), number(control), number(near.get(name)), count(label), count(other))
        for name, error, control, label, other in rows
    )
    head = ("after", "match to target", "control: target to itself", "match to source", "match: target's label",
            "control: target's label")  # fmt: skip
    blocks.append(Table(head, table, "Embedding distances are medians. The control of rounding is half a level of "
                        "noise on the target.", stacked=True))  # fmt: skip
    apart = match["unrelated"]["median"] if match["unrelated"] else None
    png = reportfigures.survival_figure([row[:3] for row in rows], apart)
    if png:
        told = "; ".join(f"{name}: {short(_value(e))}, control {short(_value(c))}" for name, e, c, _, _ in rows)
        blocks.append(Picture(m.name("survival"), png, f"Distance from the target after handling: {told}.",
                              "Distance from the target's embedding after handling, median with 95 % bootstrap "
                              "interval."))  # fmt: skip
    return blocks


def _transfer(m: Material) -> list[Block]:
    if m.numbers["match"] is None:
        return []
    blocks: list[Block] = [m.heading("Do the matches match in another model?", "transfer")]
    if not m.numbers["transfer"]:
        if m.transfer:
            return [*blocks, _unmeasured(m, "transfer")]
        return [*blocks, Text(f"Not measured. To add it: this report with {code('--transfer MODEL2')}.", "quiet")]
    for one in m.numbers["transfer"]:
        how = "as they are" if one["same_size"] else "through its own image processor, since its input has another size"
        blocks.append(Text(
            f"{plain(one['model'])} (readout {plain(one['readout'])}, revision {plain(one['revision'])[:19]}) is given "
            f"the stored images {how}."
        ))  # fmt: skip
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


def _retrieval(m: Material) -> list[Block]:
    if m.numbers["match"] is None:
        return []
    blocks: list[Block] = [m.heading("What an image search returns", "retrieval")]
    found = m.numbers["retrieval"]
    if found is None:
        if m.measured and m.measured["pairs"]:
            return [*blocks, Text("Not measured: a search needs at least four different photos.", "quiet")]
        return [*blocks, _unmeasured(m, "retrieval")]
    blocks.append(Text(
        f"A database of {found['photos']} different photos (all sources and targets"
        f"{', and the labelled photos' if m.labelled else ''}) is searched by cosine similarity with the PNG match, and "
        "as the control with the source. Neighbours are counted without the two photos of the pair."
    ))  # fmt: skip
    k = found["k"]
    lines = (
        ("the target comes first", count(found["first"]), count(found["source_first"])),
        ("rank of the target, median", number(found["rank"], three), number(found["source_rank"], three)),
        (f"of the target's {k} nearest neighbour{'s' if k > 1 else ''}, share found, median",
         number(found["overlap"], thousandth), number(found["source_overlap"], thousandth)),
    )  # fmt: skip
    blocks.append(Table(("", "searched with the match", "control: with the source (itself left out)"), lines,
                        f"Neighbours drawn at random would agree to {found['chance']:.2f}.", stacked=True))  # fmt: skip
    return blocks


def _probe(m: Material) -> list[Block]:
    if m.numbers["match"] is None:
        return []
    blocks: list[Block] = [m.heading("A classifier on the embeddings (kNN probe)", "probe")]
    found = m.numbers["probe"]
    if found is None:
        if not (m.measured and m.measured["pairs"]):
            return [*blocks, _unmeasured(m, "the kNN probe")]
        return [*blocks, Text("Not measured: it needs labelled photos, with at least two photos in two classes. To add "
                              f"it: this report with {code('--label-data W')}.", "quiet")]  # fmt: skip
    told = (
        f"Downstream means every head, also one that is trained later. As an example, {found['photos']} photos of "
        f"{found['classes']} classes vote: the {found['k']} nearest by cosine similarity, without the two photos of the "
        f"pair. Leave-one-out accuracy: {count(found['accuracy'])}. "
    )
    if not found["apart"]:
        return [*blocks, Text(told + f"It gives source and target the same class in all {found['pairs']} pairs.")]
    told += (
        f"In {found['apart']} of {found['pairs']} pairs it gives source and target different classes; of those, "
        f"{count(found['flipped'])} matches get the target's class and {count(found['kept'])} keep the source's."
    )
    return [*blocks, Text(told)]


def _spectrum(m: Material) -> list[Block]:
    blocks: list[Block] = [m.heading("Geometry: how many directions move the embedding", "spectrum")]
    found = m.numbers["spectrum"]
    if found is None:
        return [*blocks, _missing("the spectrum of the Jacobian", f"hf-equiv spectrum {MODEL} --data W --limit 20")]
    rows = all_rows(m.checkpoint.of("spectrum"))
    lines = [
        ("largest singular value σ₁", number(found["sigma_max"], three)),
        ("smallest above the rank threshold", number(found["smallest_above"], three)),
        ("rank threshold", number(found["rank_threshold"])),
        ("effective rank (entropy of the spectrum)", number(found["effective_rank"], tenth)),
    ]
    if found["ranks"]:
        ranks = " to ".join(str(r) for r in dict.fromkeys((found["ranks"][0], found["ranks"][-1])))
        lines.append((f"numerical rank, in {plain(found['dtype'])}", f"{ranks} of {found['dim']}"))
        lines.append(("nullity: directions without effect to first order",
                      f"{found['nullity']:,} of {found['pixels']:,}"))  # fmt: skip
    for kind, told in (("structural_zeros", "zero by construction"), ("near_structural", "nearly zero")):
        for cause, zero in found[kind].items():
            lines.append((f"{told}: {plain(cause)}", f"{zero['count']}, measured {short(zero['measured'])}"))
    blocks.append(Text(
        f"The Jacobian at {found['images']} photo{'s' if found['images'] > 1 else ''}: singular values in embedding "
        "length per pixel length (L2, pixels in [0, 1]). The nullity follows from the number of pixels alone, whatever "
        "the encoder; how far one can go along it is the question of the next sections."
    ))  # fmt: skip
    blocks.append(Table(("", "value, median"), tuple(lines)))
    png = reportfigures.spectrum_figure(rows)
    if png:
        blocks.append(Picture(m.name("spectrum"), png, f"Singular values of the Jacobian, largest "
                              f"{short(_value(found['sigma_max']))}, rank {found['ranks']}.",
                              "Singular values of the Jacobian, a line for each photo."))  # fmt: skip
    return blocks


def _lipschitz(m: Material) -> list[Block]:
    blocks: list[Block] = [m.heading("Geometry: how fast the embedding moves, by kind of direction", "lipschitz")]
    found = m.numbers["lipschitz"]
    if found is None:
        command = f"hf-equiv lipschitz {MODEL} --data W --limit 5 --linearity"
        return [*blocks, _missing("local directional Lipschitz constants", command)]
    rows = tuple(
        (
            plain(kind), f"{k['resolved']} of {k['count']}", number(k["value"], three),
            "–" if k["spread"] is None else f"{three(k['spread']['min'])} to {three(k['spread']['max'])}",
            "–" if k["jvp"] is None else three(k["jvp"]["max"]),
        )
        for kind, k in found["kinds"].items()
    )  # fmt: skip
    blocks.append(Text(
        f"Local constants ‖f(x + hv) − f(x − hv)‖ / 2h at {found['images']} photo{'s' if found['images'] > 1 else ''}, "
        "each read from a plateau over many radii, and stated only where that stands above the float noise. A random "
        "direction tells of random directions: its constant is not the Lipschitz constant of the encoder."
    ))  # fmt: skip
    head = ("direction", "above the noise", "constant, median", "range", "largest ‖Jv‖")
    told = "top, row: along singular vectors; null: projected off all of them; n counts directions, which share photos."
    blocks.append(Table(head, rows, told, stacked=True))
    if found["regional"]:
        blocks.append(Text(
            f"Largest constant found inside a ball of radius {three(found['radius'])} about a photo: "
            f"{three(found['regional']['max'])} (at the photos themselves at most "
            f"{three(found['regional_at_center']['max'])}). It is a lower bound: a search can only miss larger ones."
        ))  # fmt: skip
    kinds: dict[str, list[Row]] = {}
    for row in all_rows(m.checkpoint.of("lipschitz")):
        kinds.setdefault(row["direction"], []).append(row)
    png = reportfigures.constants_figure(kinds)
    if png:
        told = "; ".join(f"{kind} {short(_value(k['value']))}" for kind, k in found["kinds"].items())
        blocks.append(Picture(m.name("constants"), png, f"Local constants by kind of direction; medians: {told}.",
                              "One mark for each direction; hollow: no constant above the float noise, ‖Jv‖ is shown. "
                              "At the right: how many are above it."))  # fmt: skip
    return blocks


def _linearity(m: Material) -> list[Block]:
    blocks: list[Block] = [m.heading("In proportion: linear sets and matches", "linearity")]
    found = m.numbers["lipschitz"]
    kinds = {kind: k for kind, k in found["kinds"].items() if k["linearity"]} if found else {}
    if not kinds:
        return [*blocks, _missing("how far the linear model holds", f"hf-equiv lipschitz {MODEL} --data W --linearity")]
    far = m.numbers["match"]["l2"] if m.numbers["match"] else None
    lines = [(f"linear along {plain(kind)}", number(k["linearity"], three),
              f"{k['at_limit']} of {k['count']} held up to the largest radius tried" if k["at_limit"] else "")
             for kind, k in kinds.items()]  # fmt: skip
    if far:
        lines.append(("distance of a match from its source", number(far, three), ball(
            m.numbers["match"]["radius"], m.numbers["match"]["norm"])))  # fmt: skip
    walk = m.numbers["walk"]
    if walk and walk["l2"]:
        lines.append(("distance reached by walks with one embedding", number(walk["l2"], three), "corrected each step"))
    blocks.append(Text(
        "How far one can go in a straight line before the first-order model of the encoder is wrong by 10 %: of the "
        "change it predicts, or along null directions, where it predicts none, of the embedding's length. All lengths "
        "are L2 distances between images, pixels in [0, 1]."
    ))  # fmt: skip
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
    png = reportfigures.proportion_figure(bands)
    if png:
        told = "; ".join(f"{name} {short(float(np.median(values)))}" for name, _, values in bands if values)
        blocks.append(Picture(m.name("proportion"), png, f"Lengths in pixel space, medians: {told}.",
                              "How far the linear model holds, beside how far matches and walks lie. The bar is the "
                              "median."))  # fmt: skip
    return blocks


def _walks(m: Material) -> list[Block]:
    blocks: list[Block] = [m.heading("Geometry: walking with the embedding held", "walks")]
    found = m.numbers["walk"]
    if found is None:
        return [
            *blocks,
            _missing("how far a set of equal embedding reaches", f"hf-equiv walk {MODEL} --data W --limit 5"),
        ]
    rows = tuple(
        (plain(w["image_id"]), plain(w["heading"]), plain(w["status"]), str(w["steps"]), three(w["l2"]),
         three(w["arc_length"]), "–" if w["psnr_db"] is None else f"{w['psnr_db']:.1f}", short(w["largest_drift"]),
         plain(", then ".join(label.split(",")[0] for label in w["labels"])) or "–")
        for w in found["walks"]
    )  # fmt: skip
    blocks.append(Text(
        f"{len(found['walks'])} walk{'s' if len(found['walks']) > 1 else ''} through images of one embedding: a step "
        "along the null space, then a correction back to the embedding. The distance is a lower bound of how far the "
        "set reaches: more steps go further."
    ))  # fmt: skip
    head = ("photo", "heading", "status", "steps", "L2 reached", "path", "PSNR [dB]", "largest drift", "seen as")
    blocks.append(Table(head, rows, stacked=True))
    if found["one_label"]:
        blocks.append(Text(f"The head gives one label all the way in {count(found['one_label'])} walks."))
    paths: dict[str, list[Row]] = {}
    for run in m.checkpoint.of("walk"):
        for row in run.good:
            paths.setdefault(f"{plain(row['image_id'])} ({plain(row['heading'])})", []).append(row)
    png = reportfigures.walks_figure(paths)
    if png:
        blocks.append(Picture(m.name("walks"), png, f"Walks end at L2 {number(found['l2'], three)} from their origin, "
                              f"with drift at most {short(found['largest_drift'])}.",
                              "Above: distance from the origin; below: how far the embedding has drifted."))  # fmt: skip
    return blocks


def _made(m: Material) -> list[Block]:
    n, s = m.numbers, m.checkpoint.settings
    blocks: list[Block] = [m.heading("How this was made", "made")]
    size = f"{n['dim']} numbers from {n['pixels']:,} pixel values" if n["dim"] and n["pixels"] else "–"
    facts = [
        ("model", code(n["model_id"])),
        ("revision", code(n["revision"])),
        ("readout", f"{plain(n['readout'])}{', scaled to length 1' if n['normalize'] else ''}, {plain(s['dtype'])}"),
        ("embedding", size),
    ]
    blocks.append(Table(("", "value"), tuple(facts), stacked=True))
    lines = tuple(
        (code(run["name"]), run["analysis"], f"{run['there']} of {run['listed']}", str(run["error_rows"]),
         plain(run["data_id"]), plain(run["data_revision"])[:19], str(run["seed"]))
        for run in n["runs"]
    )  # fmt: skip
    head = ("run directory", "verb", "there", "errors", "data", "data revision", "seed")
    blocks.append(Table(head, lines, "Every run directory holds run.json with all settings.", stacked=True))
    blocks.append(Code("\n".join(_commands(run) for run in m.checkpoint.runs)))
    blocks.append(Code("\n".join(f"hf-equiv verify {plain(run.name)}" for run in m.checkpoint.runs)))
    versions = sorted({str(row["versions"]) for run in m.checkpoint.runs for row in run.rows if row["versions"]})
    if versions:
        blocks.append(Text("Versions: " + plain("; ".join(versions)).replace('"', "").strip("{}"), "quiet"))
    blocks.append(Bullets(tuple(_limits(m))))
    return blocks


def _limits(m: Material) -> list[str]:
    match, limits = m.numbers["match"], []
    if match:
        if match["pairs"] < 30:
            limits.append(f"{match['pairs']} pair{'s' if match['pairs'] > 1 else ''} only: the intervals are wide, and "
                          "those of the bootstrap are too narrow for so few.")  # fmt: skip
        limits.append(
            f"The pairs share {match['photos']} photos, and the intervals take them as independent; they say nothing of "
            "other kinds of photos."
        )
        if match["measured_pairs"] and match["measured_pairs"] < match["pairs"]:
            limits.append(f"Controls, survival, transfer and retrieval are of the first {match['measured_pairs']} of "
                          f"{match['pairs']} pairs.")  # fmt: skip
    limits.append("A match that was not found may exist: the solver had a budget of evaluations.")
    if any(run.settings.get("normalize") for run in m.checkpoint.runs):
        limits.append("Embeddings are scaled to length 1: distances are at most 2.")
    return limits


def _commands(run: Run) -> str:
    """The command that makes the run, as far as run.json tells; the data is named by its id."""
    s = run.settings
    words = ["hf-equiv", run.analysis, plain(s["model_id"]), "--readout", plain(s["readout"])]
    local = str(s["model_revision"]).startswith("sha256:")
    words += [] if local else ["--revision", plain(s["model_revision"])]
    data = plain(s["data_id"])
    if run.analysis == "match":
        words += (
            ["--data", data, "--pairs", str(s["num_pairs"])] if s.get("drawn") else ["--source", "…", "--target", "…"]
        )
    else:
        words += ["--source" if " + " in data else "--data", data]
    flags = ("solver", "radius", "rtol", "max_evals", "k", "regional", "heading", "step", "num_steps")
    for name in flags:
        if s.get(name) is not None and not (run.analysis != "match" and name == "solver"):
            words += [f"--{name.replace('_', '-')}", f"{s[name]:g}" if isinstance(s[name], float) else plain(s[name])]
    if isinstance(s.get("directions"), dict):
        kinds = s["directions"].items()
        words += ["--directions", ",".join(k if k in ("gradient", "toward") else f"{k}:{n}" for k, n in kinds)]
    words += ["--norm", plain(s["norm"])] if s.get("norm") and (s.get("radius") or s.get("regional")) else []
    words += [f"--{name}" for name in ("vectors", "linearity", "normalize") if s.get(name)]
    words += ["--no-refine"] if s.get("refine") is False else []
    words += ["--labels", plain(",".join(s["labels"]))] if s.get("labels") else []
    return " ".join(words + ["--seed", str(s["seed"])])


def comparison(materials: Sequence[Material]) -> list[Block]:
    """Several checkpoints side by side: is one more exposed than another?

    Args:
        materials: of the checkpoints.

    Returns:
        Heading, table and how to read it.
    """

    def cells(label: str, pick: Any) -> tuple[str, ...]:
        return (label, *(pick(m.numbers) for m in materials))

    def of(part: str, *keys: str) -> Any:
        def pick(numbers: Row) -> Any:
            value: Any = numbers[part]
            for key in keys:
                value = None if value is None else value.get(key)
            return value

        return pick

    def say(pick: Any, form: Any = short) -> Any:
        return lambda numbers: number(pick(numbers), form)

    def near(numbers: Row) -> str:
        found = near_budget(numbers)
        return "–" if found is None else ball(found["radius"], found["norm"])

    rows = [
        cells("pairs", lambda n: str(n["match"]["pairs"]) if n["match"] else "–"),
        cells("budget of the numbers below", lambda n: ball(n["match"]["radius"], n["match"]["norm"]) if n["match"]
              else "–"),
        cells("float matches that converged", lambda n: count(n["match"]["converged"]) if n["match"] else "–"),
        cells("PNG matches within 1 % of unrelated photos", lambda n: count(n["match"]["matched"]) if n["match"] else "–"),
        cells("PNG error", say(of("match", "embedding_error_8bit"))),
        cells("PSNR to the source [dB]", say(of("match", "psnr_db"), tenth)),
        cells("L2 to the source", say(of("match", "l2"), three)),
        cells("smallest budget that is enough", near),
        cells("matches with the target's label", lambda n: count(n["heads"]["flipped"]) if n["heads"] else "–"),
        cells("PNG error after JPEG 75", say(of("survival", "JPEG 75", "error"))),
        cells("the same of the target (control)", say(of("survival", "JPEG 75", "control"))),
        cells("largest singular value σ₁", say(of("spectrum", "sigma_max"), three)),
        cells("effective rank", say(of("spectrum", "effective_rank"), tenth)),
    ]  # fmt: skip
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    head = ("", *(plain(m.checkpoint.title) for m in materials))
    same = len({(m.numbers["match"]["pairs"], m.checkpoint.matches[0].settings["data_revision"],
                 m.checkpoint.matches[0].settings["seed"], m.numbers["match"]["radius"])
                for m in materials if m.numbers["match"]}) <= 1  # fmt: skip
    told = "Overlapping intervals mean that the difference may be chance."
    if not same:
        told += (" The checkpoints were not measured on the same pairs with the same budget, or not with as many: "
                 "differences may come from that.")  # fmt: skip
    told += " σ₁ depends on how large the embeddings of a model are; the relative distances do not."
    return [Heading("Side by side", 2, "side-by-side"), Table(head, tuple(rows), told, stacked=True)]


def interval_of(estimate: Row | None) -> str:
    """The interval alone, for tables."""
    return interval(estimate)
