"""Sections of a report on matching: errors and controls, budgets, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_equiv import reportfigures
from hf_equiv.metrics import short
from hf_equiv.reportclaims import FEW, claims
from hf_equiv.reportfindings import disagreements, summary
from hf_equiv.reportmaterial import MODEL, Material, missing, unmeasured, value
from hf_equiv.reportmeasures import collect
from hf_equiv.reportpage import Block, Bullets, Picture, Table, Text, code, plain
from hf_equiv.reportruns import Run
from hf_equiv.reportwords import ball, brief, brief_count, count, number, tenth, thousandth

Row = Mapping[str, Any]


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
    png = reportfigures.errors_figure(curves, found["rtol"])
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
        png = reportfigures.budget_figure(budgets, norm)
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
    png = reportfigures.nearness_figure(
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
