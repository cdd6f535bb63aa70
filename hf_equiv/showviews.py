"""Pictures and numbers as HTML snippets that load nothing: images inside, colours from the page's style sheet."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from hf_equiv import showwords
from hf_equiv.imagefile import decode_png
from hf_equiv.metrics import psnr_db
from hf_equiv.plots import difference_png, thumbnail
from hf_equiv.showcase import Comparison
from hf_equiv.svgcharts import Axis, Series, chart

Row = Mapping[str, Any]

_NAMES = {
    "embedding_error_8bit": "embedding error of the PNG",
    "target_quantization_error": "half a grey level of noise",
    "noise_floor": "float noise",
    "cosine_to_target": "cosine to the target",
    "cosine_to_source": "cosine to the source",
    "cosine_source_target": "cosine of source and target",
    "psnr_db": "PSNR to the source [dB]",
    "ssim": "SSIM to the source",
    "linf": "largest change of a pixel",
    "l2": "L2 distance to the source",
    "source_label": "class of the source",
    "match_label": "class of the match",
    "target_label": "class of the target",
    "match_prob": "probability of the match's class",
    "target_label_prob": "probability of the target's class",
    "same_top1": "match and target in one class",
}


_LEAST = 1e-7
"""Drift that a chart tells from zero, unless the drift allowed is as small."""

_LEAP = 20.0
"""Evaluations between two points of a curve that want an explanation."""


def data_uri(data: bytes, kind: str = "png") -> str:
    """The bytes of an image file as an address that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def strip(rows: Sequence[Row], chosen: str) -> str:
    """Matches to choose from: a button each, with a small picture and what it looks like and embeds as."""
    buttons = "".join(
        f'<li><button type="button" data-key="{escape(row["key"], quote=True)}" '
        f'aria-pressed="{"true" if row["key"] == chosen else "false"}">'
        f'<img src="{data_uri(thumbnail(row["match"]), "jpeg")}" alt="" loading="lazy">'
        f"<span>{escape(_called(row, 'source'))} → {escape(_called(row, 'target'))}</span></button></li>"
        for row in rows
    )
    return f'<ul class="strip">{buttons}</ul>'


def picture(png: bytes, alt: str, caption: str = "") -> str:
    """One picture, each of its pixels to be seen, with a caption."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="shot"><img src="{data_uri(png)}" alt="{escape(alt, quote=True)}">{below}</figure>'


def compare(left: bytes, right: bytes, left_name: str, right_name: str) -> str:
    """Two pictures on top of each other and a slider that moves the border between them; also by the arrow keys."""
    alts = [escape(name, quote=True) for name in (left_name, right_name)]
    return (
        '<figure class="compare"><div class="stack">'
        f'<img src="{data_uri(right)}" alt="{alts[1]}"><img class="over" src="{data_uri(left)}" alt="{alts[0]}">'
        '<span class="edge" aria-hidden="true"></span>'
        '<input type="range" min="0" max="100" value="50" '
        f'aria-label="Border between {alts[0]} on the left and {alts[1]} on the right" '
        "oninput=\"this.closest('.compare').style.setProperty('--at', this.value + '%')\"></div>"
        f"<figcaption><span>{escape(left_name)}</span><span>{escape(right_name)}</span></figcaption></figure>"
    )


def match_view(source: bytes, match: bytes, target: bytes, row: Row, *, link: str = "") -> str:
    """A finished match: slider, target, difference, the numbers in words, what the head says.

    Args:
        source: PNG.
        match: PNG.
        target: PNG.
        row: the measures of the match.
        link: address of this view, for a link to it.

    Returns:
        HTML.
    """
    change, factor = difference_png(source, match)
    labels = [row.get(f"{who}_label") for who in ("source", "match", "target")]
    chips = ""
    if labels[1] is not None:
        sure = f" ({showwords.percent(row['match_prob'])})" if row.get("match_prob") is not None else ""
        sure = sure.replace(" %", "\N{NO-BREAK SPACE}%")
        chips = "".join(
            f"<div><dt>{who}</dt><dd>{escape(str(label).split(',')[0])}{more}</dd></div>"
            for who, label, more in zip(("source", "match", "target"), labels, ("", sure, ""), strict=True)
        )
        chips = f'<h3>What the classifier sees</h3><dl class="chips">{chips}</dl>'
    share = f'<p class="small"><a href="{escape(link, quote=True)}">Link to this match</a></p>' if link else ""
    return (
        '<div class="match">'
        f'<div class="pair">{compare(source, match, "source", "match")}</div>'
        f'<div class="side">{picture(target, "target", "target: what the model takes the match for")}'
        f"{picture(change, f'difference, {factor} times', f'match − source, × {factor}')}</div>"
        f'<div class="say"><p class="headline">{escape(match_headline(match, target, row))}</p>'
        f"<p>{escape(showwords.look(row))} {escape(showwords.heads(row))}</p>{chips}{numbers(row)}{share}</div></div>"
    )


def match_headline(match: bytes, target: bytes, row: Row) -> str:
    """The finding of a match in one or two sentences, plain text; the pictures are PNG files."""
    return showwords.headline(row, png_psnr_db(match, target))


def numbers(row: Row) -> str:
    """The main numbers of a match, named."""
    facts = [
        (
            "embedding error",
            _number(row.get("embedding_error_8bit")),
            "‖f(x)−z‖/‖z‖ of the PNG; 0 for the target itself",
        ),
        (
            "PSNR to source",
            _number(row.get("psnr_db"), "{:.1f} dB"),
            "of the PNG; a change above 35 dB is hardly visible",
        ),
        ("float noise", _number(row.get("noise_floor")), "what float32 arithmetic itself is worth here"),
        (
            "half a grey level",
            _number(row.get("target_quantization_error")),
            "of noise on the target moves it this far",
        ),
    ]
    if row.get("num_evals") is not None:
        facts.append(("evaluations", f"{row['num_evals']:.0f}", "forward and backward passes of the float match"))
    cells = "".join(
        f'<div title="{escape(note, quote=True)}"><dt>{name}</dt><dd>{value}</dd></div>' for name, value, note in facts
    )
    said = "".join(f"<li><strong>{name}</strong>: {escape(note)}</li>" for name, _, note in facts)
    return (
        f'<h3>The numbers</h3><dl class="chips">{cells}</dl>'
        f'<details class="small"><summary>What they mean</summary><ul>{said}</ul></details>'
    )


def check_table(found: Sequence[Comparison], seconds: float) -> str:
    """What a row states beside what was computed now, and the verdict."""
    rows = "".join(
        f'<tr><th scope="row">{escape(_NAMES.get(c.name, c.name))}</th>'
        f"<td>{_plain(c.stated)}</td><td>{_plain(c.now)}</td>"
        f'<td class="{"good" if c.holds else "bad"}">{"agrees" if c.holds else "differs"}</td></tr>'
        for c in found
    )
    wrong = sum(not c.holds for c in found)
    verdict = "All numbers hold." if not wrong else f"{wrong} of {len(found)} do not hold."
    return (
        f'<p class="verdict {"bad" if wrong else "good"}">{verdict} '
        f"The three PNG files were encoded again just now, in {seconds:.1f} s; what the search cost is not checked.</p>"
        '<div class="wide"><table><thead><tr><th scope="col">number</th><th scope="col">stated</th>'
        f'<th scope="col">now</th><th scope="col">verdict</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def class_bars(classes: Sequence[tuple[str, float]]) -> str:
    """Classes with bars of their probabilities."""
    bars = "".join(
        f'<li><span class="bar" style="--share:{100 * p:.2f}%" aria-hidden="true"></span>'
        f"<span>{escape(name.split(',')[0])}</span><span>{showwords.percent(p, 1)}</span></li>"
        for name, p in classes
    )
    return f'<ol class="bars">{bars}</ol>' if bars else '<p class="small">This checkpoint has no classifier.</p>'


def curve_view(curve: Sequence[tuple[str, float, float]], rtol: float) -> str:
    """Embedding error against evaluations, the float match and its refinement as a PNG apart."""
    series = [
        Series(name, [(evals, error) for stage, evals, error in curve if stage == key], style)
        for key, name, style in (("match", "float match", "one"), ("refine", "8-bit PNG", "two"))
    ]
    gaps = [b[1] - a[1] for a, b in pairwise(curve)]
    leap = max(gaps, default=0.0)
    last = max((evals for _, evals, _ in curve), default=1.0)
    highest = max([2.0, *(error for _, _, error in curve if error < math.inf)])
    goal = Series("goal", [(0.0, rtol), (max(last, 50.0), rtol)], "limit")
    drawn = chart(
        "Embedding error against evaluations", [goal, *(s for s in series if s.points)],
        Axis("evaluations (forward + backward)", low=0.0), Axis("embedding error", log=True, high=highest),
    )  # fmt: skip
    if leap >= _LEAP:
        drawn += f'<p class="small">Where it leaps, by up to {leap:.0f} evaluations, a whole Jacobian is computed.</p>'
    return drawn


def player(path: Sequence[Row], rtol: float) -> str:
    """A walk as frames with a slider, and its drift below; the script of the page moves it."""
    first, least = path[0], min(_LEAST, rtol / 100)
    highest = max(10 * rtol, *(row["drift"] for row in path))
    frames = "".join(
        f'<img src="{data_uri(row["frame"])}" alt="{escape(_frame_text(row), quote=True)}"'
        f"{'' if k == 0 else ' hidden'}>"
        for k, row in enumerate(path)
    )
    drift = chart(
        "Drift of the embedding against arc length",
        [
            Series("largest drift allowed", [(row["arc_length"], rtol) for row in path], "limit"),
            Series("drift", [(row["arc_length"], max(row["drift"], least)) for row in path], "one", dots=True),
        ],
        Axis("arc length (L2, pixels in [0, 1])"), Axis("drift", log=True, low=least, high=highest),
        mark=(first["arc_length"], max(first["drift"], least)),
    )  # fmt: skip
    below = any(row["drift"] < least for row in path)
    note = f'<p class="small">Drawn at {least:.0e}: drift below it, and none at all.</p>' if below else ""
    texts = "".join(f"<li>{escape(_frame_text(row))}</li>" for row in path)
    return (
        f'<div class="player" data-at="0"><div class="frames">{frames}</div>'
        '<div class="controls"><button type="button" class="play" aria-pressed="false">Play</button>'
        f'<input class="seek" type="range" min="0" max="{len(path) - 1}" value="0" aria-label="Step of the walk"></div>'
        f'<p class="now">{escape(_frame_text(first))}</p><ol class="texts" hidden>{texts}</ol>{drift}{note}</div>'
    )


def png_psnr_db(a: bytes, b: bytes) -> float | None:
    """PSNR of two PNG files in dB; None if they are the same picture."""
    return psnr_db(decode_png(a), decode_png(b))


def _called(row: Row, who: str) -> str:
    """The class of a photo, else its name."""
    return str(row.get(f"{who}_class") or _short(row[f"{who}_id"])).split(",")[0]


def _short(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0] or name


def _frame_text(row: Row) -> str:
    seen = f", seen as {row['label'].split(',')[0]} ({showwords.percent(row['prob'])})" if row["label"] else ""
    return f"step {row['step']}: L2 {row['l2']:.1f} from the source, drift {row['drift']:.0e}{seen}"


def _number(value: float | None, form: str = "{:.1e}") -> str:
    return "–" if value is None else form.format(value)


def _plain(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else escape(str(value).split(",")[0])
