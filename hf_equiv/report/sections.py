"""Sections of a report on matching: errors and controls, budgets, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_equiv.analyses import figures as run_figures
from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.formatting import short
from hf_equiv.hub.card import command_of
from hf_equiv.report import figures
from hf_equiv.report.claims import FEW, claims, disagreements, summary
from hf_equiv.report.collect import Checkpoint, Run, read_pictures
from hf_equiv.report.measure import collect
from hf_equiv.report.numbers import all_rows
from hf_equiv.report.render import (
    Block,
    Bullets,
    Code,
    Heading,
    Picture,
    Strip,
    Table,
    Text,
    ball,
    brief,
    brief_count,
    code,
    count,
    near_budget,
    number,
    plain,
    tenth,
    thousandth,
    three,
)
from hf_equiv.runs.schema import IMAGE_COLUMNS

# What the sections of a report are written from.


MODEL = "MODEL"
"""What commands call the checkpoint."""


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
        transfer_note: why it could not be asked; "" if it was.
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
    transfer_note: str = ""

    def name(self, what: str) -> str:
        """File name of a figure."""
        return f"{self.prefix}-{what}.png"

    def heading(self, text: str, what: str) -> Heading:
        """Heading of a section."""
        return Heading(text, 3, f"{self.prefix}-{what}")


def missing(what: str, command: str) -> Text:
    """Say which command would give what is not there."""
    return Text(f"Not measured: {what}. To add it: {code(command)} and this report again.", "quiet")


def unmeasured(m: Material, what: str) -> Text:
    """Say why something could not be measured."""
    return Text(f"Not measured: {what}, because {m.reason or 'no match was made'}.", "quiet")


def value(estimate: Row | None) -> float | None:
    """The number alone."""
    return None if estimate is None else float(estimate["value"])


def summary_section(m: Material) -> list[Block]:
    """Notes on the runs, five sentences, the claims table, and what disagrees with the paper."""
    n = m.numbers
    blocks: list[Block] = []
    blocks += [Text(_partial(run), "note") for run in m.checkpoint.runs if run.partial]
    blocks += [
        Text(
            f"{plain(run.name)}: {_files(run)} not as run.json states (SHA-256). {left_out(run).capitalize()}; "
            f"{code(f'hf-equiv verify {run.name}')} names what does not hold.",
            "note",
        )
        for run in m.checkpoint.runs
        if run.changed
    ]
    blocks.append(Bullets(tuple(map(plain, summary(n))), ordered=True))
    rows = tuple((c.claim, plain(c.measured), c.interval, c.verdict) for c in claims(n))
    blocks.append(m.heading("The paper's claims", "claims"))
    blocks.append(Table(("claim", "measured here", "interval of the deciding number", "verdict"), rows, stacked=True))
    blocks.append(
        Text(
            "How a verdict is reached is said at the end of the page. A caveat is set where there are fewer than "
            f"{FEW} pairs or photos, or where the interval does not exclude one half.",
            "quiet",
        )
    )
    against = disagreements(n)
    blocks.append(m.heading("Where this disagrees with the paper", "against"))
    if against:
        blocks.append(Bullets(tuple(map(plain, against))))
    else:
        blocks.append(Text("Nothing that was measured does, or what could was not measured.", "quiet"))
    return blocks


def _files(run: Run) -> str:
    """The changed files of a run, the first three by name."""
    more = f" and {len(run.changed) - 3} more" if len(run.changed) > 3 else ""
    names = ", ".join(map(plain, run.changed[:3])) + more
    return f"the file {names} is" if len(run.changed) == 1 else f"the files {names} are"


def left_out(run: Run) -> str:
    """What a report leaves out of a run with changed files."""
    what = "pairs" if run.layout.listed == "pairs" else "images"
    if not run.rows:
        return f"the run is left out of every number: none of its {run.listed} {what} is as recorded"
    if run.left_out:
        return f"{run.left_out} of {run.listed} {what} are left out of every number"
    return f"nothing is read from {'it' if len(run.changed) == 1 else 'them'}"


def _partial(run: Run) -> str:
    what = "pairs" if run.layout.listed == "pairs" else "images"
    return f"Partial: {plain(run.name)} holds {run.there} of {run.listed} {what}; the run is not finished."


def matching_section(m: Material) -> list[Block]:
    """How well the pairs match, beside the controls."""
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
            missing("whether images can share an embedding", f"hf-equiv match {MODEL} --data W --pairs 50"),
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
        (
            "control: target with half a level of noise",
            number(found["target_quantization_error"]),
            "what rounding does to any photo",
        ),
        (
            "control: random step of the match's length",
            number(found["random_error"]),
            f"to the target; it moves the embedding by {short(value(found['random_moved']))}, the match by "
            f"{short(value(found['moved']))} (from the source)",
        ),
        ("control: source to target", number(found["distance"]), "before anything is changed"),
    ]
    apart = found["unrelated"]
    if apart:
        spread = "" if apart["q05"] is None else f", 5 % to 95 %: {short(apart['q05'])} to {short(apart['q95'])}"
        lines.append(
            (
                "control: unrelated photos",
                f"{short(apart['median'])} ({apart['n']} pairs{spread})",
                "source and target of different pairs",
            )
        )
    lines = [line for line in lines if line[1] != "–"]
    blocks.append(Table(("embedding distance, median", "value", "what it is"), tuple(lines), stacked=True))
    shares = [
        (f"{float(t):g}", count(found["within"]["float"][t]), count(found["within"]["8bit"][t]))
        for t in found["within"]["float"]
    ]
    blocks.append(Table(("error at most", "float image", "8-bit PNG"), tuple(shares), stacked=True))
    blocks.append(Text(_outcome(m, run), "quiet"))
    pairs = m.measured["pairs"] if m.measured else []
    curves: dict[str, Sequence[float | None]] = {
        "float match": collect(run.good, "embedding_error"),
        "8-bit PNG match": collect(run.good, "embedding_error_8bit"),
        "control: half-level noise": collect(run.good, "target_quantization_error"),
        "control: random step": collect(pairs, "random_error"),
        "control: unrelated photos": m.measured["unrelated"]["curve"] if m.measured and m.measured["unrelated"] else [],
    }
    png = figures.errors_figure(curves, found["rtol"])
    if png:
        medians = "; ".join(
            f"{name} {short(float(np.median([v for v in values if v is not None])))}"
            for name, values in curves.items()
            if any(v is not None for v in values)
        )
        blocks.append(
            Picture(
                m.name("errors"),
                png,
                f"Distribution of embedding errors; medians: {medians}.",
                "Share of pairs whose embedding distance is at most the value on the axis. A match is as "
                "far left as possible; a step of the same length in a random direction stays with the "
                "unrelated photos.",
            )
        )
    if m.reason:
        blocks.append(unmeasured(m, "the random steps and the distances of this table that need the encoder"))
    return blocks


def _outcome(m: Material, run: Run) -> str:
    tally: dict[str, int] = {}
    for row in run.rows:
        tally[row["status"]] = tally.get(row["status"], 0) + 1
    text = "Status of the rows: " + ", ".join(f"{n} {plain(status)}" for status, n in sorted(tally.items())) + "."
    text += f" Evaluations: {number(m.numbers['match']['num_evals'], tenth)}; one is a forward and a backward pass "
    text += "of one image, (forwards + 2 cotangents + 2 tangents) / 3, so that a forward alone counts a third."
    apart, like = m.numbers["match"]["psnr_match_target"], m.numbers["match"]["ssim_match_target"]
    if apart:
        text += f" The match as a picture against the target: PSNR {number(apart, tenth, ' dB')}"
        text += f", SSIM {number(like, thousandth)}." if like else "."
    return text


def near_section(m: Material) -> list[Block]:
    """Errors, PSNR and SSIM by budget."""
    found = m.numbers["match"]
    if found is None:
        return []
    blocks: list[Block] = [m.heading("How near: error against budget", "near")]
    budgets = m.numbers["budgets"]
    several = len({(b["data_id"], b["data_revision"]) for b in budgets}) > 1
    names = [ball(b["radius"], b["norm"]) + (f", {plain(b['data_id'])}" if several else "") for b in budgets]
    rows = tuple(
        (
            name if names.count(name) == 1 else f"{name} ({plain(b['run'])})",
            f"{b['pairs']} of {b['listed']}",
            brief_count(b["converged"]),
            brief(b["embedding_error"]),
            brief(b["embedding_error_8bit"]),
            brief(b["psnr_db"], tenth),
            brief(b["ssim"], thousandth),
            brief_count(b["nearer"]),
            brief_count(b["flipped"]),
        )
        for b, name in zip(budgets, names, strict=True)
    )
    head = ("budget", "pairs", "converged", "error, float", "error, PNG", "PSNR [dB]", "SSIM", "nearer to target",
            "target's label")  # fmt: skip
    told = (
        "Medians and counts, with 95 % intervals in brackets; n is the number of pairs. A budget ε limits the change "
        "of "
        "every pixel value. PSNR and SSIM compare the PNG with its source: the higher, the more alike. Nearer to "
        "target: "
        "by cosine, than to its own source. The PNG is searched for with evaluations of its own, from where "
        "the float match ended, and may be nearer than that."
    )
    if several:
        told += (
            " The budgets are of different photos: each is set against unrelated photos of its own data, and a "
            "difference between them may come from the photos."
        )
    if len(budgets) > 1:
        told += f" Everything else on this page is of the run {plain(budgets[0]['run'])}, the first of these."
    blocks.append(Table(head, rows, told, stacked=True))
    drawn = False
    for norm in dict.fromkeys(b["norm"] for b in budgets):
        png = figures.budget_figure(budgets, norm)
        if png:
            drawn = True
            told = "; ".join(
                f"{ball(b['radius'], b['norm'])}: {short(value(b['embedding_error_8bit']))}" for b in budgets
            )
            blocks.append(
                Picture(
                    m.name(f"budget-{norm}"),
                    png,
                    f"Median PNG error by budget: {told}.",
                    "The budget curve: the median error that is reached inside a ball of radius ε about "
                    "the source, with 95 % bootstrap intervals.",
                )
            )
    if not drawn:
        blocks.append(missing("a budget curve (one budget only)", f"hf-equiv match {MODEL} --radius 8/255"))
    png = figures.nearness_figure(
        [(ball(r.settings["radius"], r.settings["norm"]), r.good) for r in m.checkpoint.matches]
    )
    if png:
        blocks.append(
            Picture(
                m.name("nearness"),
                png,
                f"PSNR and SSIM of each match to its source; median PSNR "
                f"{number(found['psnr_db'], tenth)} dB in the first run.",
                "Each mark is one match; up and to the right it looks more like its source.",
            )
        )
    return blocks


def heads_section(m: Material) -> list[Block]:
    """What the classification head says."""
    heads = m.numbers["heads"]
    if heads is None:
        return []
    blocks: list[Block] = [m.heading("What the head says", "heads")]
    if not heads["labelled"]:
        return [
            *blocks,
            Text(
                "This checkpoint has no classification head, and no zero-shot labels were given. The kNN "
                "probe below stands in for it.",
                "quiet",
            ),
        ]
    if not heads["apart"]:
        return [
            *blocks,
            Text(
                f"The head gives source and target the same label in all {heads['labelled']} pairs: "
                "there is no flip to count.",
                "quiet",
            ),
        ]
    told = (
        f"In {heads['apart']} of {heads['labelled']} pairs source and target have different labels. Of those, "
        f"{count(heads['flipped'])} matches get the label of the target, and {count(heads['kept'])} keep that of the "
        f"source. The probability of the target's label is {number(heads['target_label_prob'], thousandth)} (median). "
        "The head was not asked when the match was made: only the embedding was."
    )
    return [*blocks, Text(told)]


# Sections of a report on what a match is worth elsewhere: handling, other models, search, classifiers.


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
    png = figures.survival_figure([row[:3] for row in rows], apart)
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


# Section of a report with a few matches as pictures.


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
        difference, gain = run_figures.difference(source.numpy(), match.numpy())
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


# Sections of a report on geometry: spectrum, Lipschitz constants, linearity, walks.


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
    png = figures.spectrum_figure(rows)
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
    png = figures.constants_figure(kinds)
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
    png = figures.proportion_figure(bands)
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
    png = figures.walks_figure(paths, max(run.settings["rtol"] for run in m.checkpoint.of("walk")))
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


# Sections of a report on how it was made, and on several checkpoints side by side.


def made_section(m: Material) -> list[Block]:
    """Model, runs, commands, versions, and limits."""
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
        (
            code(run["name"]),
            run["analysis"],
            f"{run['there']} of {run['listed']}",
            str(run["error_rows"]),
            plain(run["data_id"]),
            plain(run["data_revision"])[:19],
            str(run["seed"]),
        )
        for run in n["runs"]
    )
    head = ("run directory", "verb", "there", "errors", "data", "data revision", "seed")
    blocks.append(Table(head, lines, "Every run directory holds run.json with all settings.", stacked=True))
    blocks.append(Code("\n".join(_commands(run) for run in m.checkpoint.runs)))
    blocks.append(Code("\n".join(dict.fromkeys(_check(run) for run in m.checkpoint.runs))))
    versions = sorted({str(row["versions"]) for run in m.checkpoint.runs for row in run.rows if row["versions"]})
    if versions:
        blocks.append(Text("Versions: " + plain("; ".join(versions)).replace('"', "").strip("{}"), "quiet"))
    blocks.append(Bullets(tuple(_limits(m))))
    return blocks


def _limits(m: Material) -> list[str]:
    match, limits = m.numbers["match"], []
    if match:
        if match["pairs"] < 30:
            limits.append(
                f"{match['pairs']} pair{'s' if match['pairs'] > 1 else ''} only: the intervals are wide, and "
                "those of the bootstrap are too narrow for so few."
            )
        limits.append(
            f"The pairs share {match['photos']} photos, and the intervals take them as independent; they say nothing "
            "of "
            "other kinds of photos."
        )
        if match["measured_pairs"] and match["measured_pairs"] < match["pairs"]:
            limits.append(
                f"Controls, survival, transfer and retrieval are of the first {match['measured_pairs']} of "
                f"{match['pairs']} pairs."
            )
    limits.append("A match that was not found may exist: the solver had a budget of evaluations.")
    if any(run.settings.get("normalize") for run in m.checkpoint.runs):
        limits.append("Embeddings are scaled to length 1: distances are at most 2.")
    return limits


def _commands(run: Run) -> str:
    """The command that makes the run again, as far as run.json tells; the data is named by its id."""
    return plain(command_of({"analysis": run.analysis, "settings": run.settings}))


def _check(run: Run) -> str:
    """The command that recomputes the rows; of a dataset on the Hub those of all its runs."""
    local = run.settings["model_revision"].startswith("sha256:") and run.settings["model_id"] != "builtin"
    return f"hf-equiv verify {plain(run.name).split('@')[0]}" + (" --model PATH" if local else "")


_BUDGET = ("radius", "norm", "solver", "max_evals", "rtol", "refine")


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
        cells(
            "budget of the numbers below",
            lambda n: ball(n["match"]["radius"], n["match"]["norm"]) if n["match"] else "–",
        ),
        cells("float matches that converged", lambda n: count(n["match"]["converged"]) if n["match"] else "–"),
        cells(
            "PNG matches within 1 % of unrelated photos", lambda n: count(n["match"]["matched"]) if n["match"] else "–"
        ),
        cells("PNG error", say(of("match", "embedding_error_8bit"))),
        cells("PSNR to the source [dB]", say(of("match", "psnr_db"), tenth)),
        cells("L2 to the source", say(of("match", "l2"), three)),
        cells("smallest budget that is enough", near),
        cells("matches with the target's label", lambda n: count(n["heads"]["flipped"]) if n["heads"] else "–"),
        cells("PNG error after JPEG 75", say(of("survival", "JPEG 75", "error"))),
        cells("the same of the target (control)", say(of("survival", "JPEG 75", "control"))),
        cells("largest singular value σ₁", say(of("spectrum", "sigma_max"), three)),
        cells("effective rank", say(of("spectrum", "effective_rank"), tenth)),
    ]
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    head = ("", *(plain(m.checkpoint.title) for m in materials))
    same = (
        len(
            {
                (
                    m.numbers["match"]["pairs"],
                    m.checkpoint.matches[0].settings["data_revision"],
                    m.checkpoint.matches[0].settings["seed"],
                    *(m.checkpoint.matches[0].settings.get(key) for key in _BUDGET),
                )
                for m in materials
                if m.numbers["match"]
            }
        )
        <= 1
    )
    told = "Overlapping intervals mean that the difference may be chance."
    if not same:
        told += (
            " The checkpoints were not measured on the same pairs with the same budget, or not with as many: "
            "differences may come from that."
        )
    told += " σ₁ depends on how large the embeddings of a model are; the relative distances do not."
    return [Heading("Side by side", 2, "side-by-side"), Table(head, tuple(rows), told, stacked=True)]
