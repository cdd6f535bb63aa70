"""Pictures and numbers as HTML snippets that load nothing: images inside, colours from the page's style sheet."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from along import Stop
from showcase import Comparison

from hf_equiv.analyses.figures import difference_png, thumbnail
from hf_equiv.analyses.measures import psnr_db
from hf_equiv.data.image_file import decode_png

# Rows in plain words, for readers who have never heard of an embedding.


_EYE = 28.0
"""PSNR [dB] above which most viewers see no difference at a glance; below 20 anyone sees one."""


def alike(error: float | None) -> str:
    """Say how alike two embeddings are, from ‖f(x)−z‖/‖z‖: `99.999 %`, with no more nines than there are.

    Returns:
        100 % less the error, rounded down.

    Example:
        >>> alike(4.2e-5), alike(0.87), alike(None)
        ('99.995 %', '13 %', 'an unknown share')
    """
    if error is None or not math.isfinite(error):
        return "an unknown share"
    share = 100.0 * (1.0 - error)
    if share <= 0:
        return "0 %"
    digits = max(0, -math.floor(math.log10(100.0 * error))) if error > 0 else 6
    rounded = math.floor(share * 10**digits) / 10**digits  # never more alike than measured
    return f"{rounded:.{digits}f} %"


def percent(probability: float, digits: int = 0) -> str:
    """Say a probability in percent; one that is neither 0 nor 1 is never said to be.

    Returns:
        Such as `42 %` or `over 99 %`.

    Example:
        >>> from views import percent
        >>> percent(0.423), percent(0.9998), percent(0.0003, 1)
        ('42 %', 'over 99 %', 'under 0.1 %')
    """
    least = 10.0**-digits
    share = 100 * probability
    if share < 100 and float(f"{share:.{digits}f}") >= 100:
        return f"over {100 - least:.{digits}f} %"
    if share > 0 and float(f"{share:.{digits}f}") == 0:
        return f"under {least:.{digits}f} %"
    return f"{share:.{digits}f} %"


def levels(linf: float | None) -> str:
    """Say how far a pixel was changed at most, in grey levels of 255."""
    return "an unknown number of" if linf is None else f"at most {round(255 * linf)}"


def headline(row: Row, apart_db: float | None) -> str:
    """The finding of a match in one or two sentences.

    Args:
        row: of a match, or the measures of one.
        apart_db: PSNR of the match to the target; None if they are the same picture.

    Returns:
        Plain text.
    """
    error = row["embedding_error_8bit"]
    if error is None:
        return "This image could not be measured."
    eye = "your eye can" if apart_db is not None and apart_db < _EYE else "neither can you, at a glance"
    if error <= 1e-3:
        same = f"to it they are {alike(error)} the same"
        return f"The model cannot tell the match from the target: {same}. {eye[0].upper()}{eye[1:]}."
    if error <= 0.1:
        return f"To the model the match is nearly the target: {alike(error)} the same. It could still tell them apart."
    return f"This did not work: to the model the match is only {alike(error)} the target."


def look(row: Row) -> str:
    """How the match looks beside its source, in words."""
    psnr, far = row["psnr_db"], levels(row["linf"])
    if psnr is None:
        return "The picture is the source itself, pixel for pixel."
    seen = (
        "hardly visible"
        if psnr >= 35
        else "visible on a close look"
        if psnr >= _EYE
        else "visible"
        if psnr >= 20
        else "strong"
    )
    return f"The change to the source is {seen}: {far} of 255 grey levels, PSNR {psnr:.1f} dB."


def heads(row: Row) -> str:
    """What the classifier says of the three images, in one sentence; empty without one."""
    if row["match_label"] is None:
        return ""
    before, after, aim = row["source_label"], row["match_label"], row["target_label"]
    if after == aim and before != aim:
        return f"The classifier takes the source for {_a(before)}, and the match for {_a(after)}, like the target."
    if after == aim:
        return f"The classifier takes all three for {_a(after)}."
    return f"The classifier takes the match for {_a(after)}, the source for {_a(before)} and the target for {_a(aim)}."


def _a(name: str) -> str:
    return f"“{name.split(',')[0]}”"


# Small charts as SVG text: they take the colours of the page they stand in, and load nothing.


WIDTH, HEIGHT = 640, 300


_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 16, 46


_TICKS = 6


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour.

    Attributes:
        name: in the legend; empty for none.
        points: (x, y) in order; those that are not finite, or not positive on a log axis, are left out.
        style: a class of the page's style sheet, `one` to `four`, `quiet` or `limit`.
        line: whether points are joined.
        dots: whether each is drawn as a dot; hollow ones are `hollow`.
        hollow: whether dots are rings.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "one"
    line: bool = True
    dots: bool = False
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with its unit.
        log: whether it is logarithmic.
        low: least value; None for that of the points.
        high: largest value; None for that of the points.
        names: labels in place of numbers, at 0, 1, 2, …
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    names: Sequence[str] = ()


def chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    mark: tuple[float, float] | None = None,
    width: int = WIDTH,
) -> str:
    """Draw points and lines over two axes.

    Args:
        title: what it shows; read out by screen readers.
        series: what to draw, the first lowest.
        x: the axis below.
        y: the axis on the left.
        mark: a point (x, y) to stand out.
        width: of the drawing, in units of its text; a narrow one is for narrow places.

    Returns:
        An `<svg>` element without any reference to elsewhere. Its classes: `axis`, `grid`, `tick`, `mark` and the
        styles of the series.

    Example:
        >>> from views import Axis, Series, chart
        >>> drawn = chart("Error", [Series("", [(0, 1.0), (10, 1e-3)])], Axis("evaluations"), Axis("error", log=True))
        >>> drawn.startswith("<svg"), "Error" in drawn
        (True, True)
    """
    shown = [(s, [p for p in s.points if _fits(p[0], x) and _fits(p[1], y)]) for s in series]
    points = [p for _, inside in shown for p in inside] + ([mark] if mark else [])
    across = _Scale(x, [p[0] for p in points], _LEFT, width - _RIGHT)
    up = _Scale(y, [p[1] for p in points], HEIGHT - _BOTTOM, _TOP)
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}" '
        'xmlns="http://www.w3.org/2000/svg">',
        *(_across_tick(across.at(v), text) for v, text in across.ticks()),
        *(_up_tick(up.at(v), text, width) for v, text in up.ticks()),
        f'<text class="axis" x="{(width + _LEFT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x.label)}</text>",
        f'<text class="axis" x="14" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 14 {middle:.0f})">'
        f"{escape(y.label)}</text>",
    ]
    for s, inside in shown:
        places = [(across.at(a), up.at(b)) for a, b in inside]
        if s.line and len(places) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="line {s.style}" points="{path}"/>')
        if s.dots:
            kind = "ring" if s.hollow else "dot"
            parts += [f'<circle class="{kind} {s.style}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>' for a, b in places]
    if mark is not None and _fits(mark[0], x) and _fits(mark[1], y):
        parts.append(f'<circle class="mark" cx="{across.at(mark[0]):.1f}" cy="{up.at(mark[1]):.1f}" r="6"/>')
    legend = "".join(_legend(s) for s in series if s.name)
    return "".join([*parts, "</svg>", f'<div class="legend">{legend}</div>' if legend else ""])


class _Scale:
    """Values of an axis to places between two ends."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        seen = [*values, *(v for v in (axis.low, axis.high) if v is not None)] or [1.0]
        low = min(seen) if axis.low is None else axis.low
        high = max(seen) if axis.high is None else axis.high
        if axis.names:
            low, high = -0.5, len(axis.names) - 0.5
        self.low, self.high = (math.log10(low), math.log10(high)) if axis.log else (low, high)
        if not self.high > self.low:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        if not axis.names:
            room = 0.04 * (self.high - self.low)
            self.low -= room if axis.low is None else 0.0
            self.high += room if axis.high is None else 0.0

    def at(self, value: float) -> float:
        value = math.log10(value) if self.axis.log else value
        share = min(1.02, max(-0.02, (value - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        if self.axis.names:
            return [(float(i), name) for i, name in enumerate(self.axis.names)]
        if self.axis.log and self.high - self.low > 1.2:
            every = max(1, math.ceil((self.high - self.low) / _TICKS))
            powers = range(math.ceil(self.low), math.floor(self.high) + 1, every)
            plain = all(-2 <= k <= 3 for k in powers)
            return [(10.0**k, f"{10.0**k:g}" if plain else _power(k)) for k in powers]
        low, high = (10**self.low, 10**self.high) if self.axis.log else (self.low, self.high)
        step = _round_step((high - low) / (_TICKS - 1))
        first = math.ceil(low / step - 1e-9)
        return [(k * step, f"{k * step:.6g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _fits(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and not (axis.log and value <= 0)


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= step * (1 - 1e-9))


def _power(k: int) -> str:
    digits = str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if k == 0 else f"10{digits}"


def _across_tick(place: float, text: str) -> str:
    bottom = HEIGHT - _BOTTOM
    return (
        f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text class="tick" x="{place:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>'
    )


def _up_tick(place: float, text: str, width: int) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{place + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _legend(s: Series) -> str:
    kind = "ring" if s.dots and s.hollow else "dot" if s.dots and not s.line else "line"
    return f'<span class="key"><span class="swatch {kind} {s.style}"></span>{escape(s.name)}</span>'


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
        sure = f" ({percent(row['match_prob'])})" if row.get("match_prob") is not None else ""
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
        f"<p>{escape(look(row))} {escape(heads(row))}</p>{chips}{numbers(row)}{share}</div></div>"
    )


def match_headline(match: bytes, target: bytes, row: Row) -> str:
    """The finding of a match in one or two sentences, plain text; the pictures are PNG files."""
    return headline(row, png_psnr_db(match, target))


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
        f"<span>{escape(name.split(',')[0])}</span><span>{percent(p, 1)}</span></li>"
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
    seen = f", seen as {row['label'].split(',')[0]} ({percent(row['prob'])})" if row["label"] else ""
    return f"step {row['step']}: L2 {row['l2']:.1f} from the source, drift {row['drift']:.0e}{seen}"


def _number(value: float | None, form: str = "{:.1e}") -> str:
    return "–" if value is None else form.format(value)


def _plain(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else escape(str(value).split(",")[0])


# Spectra, constants and moves along a direction as charts with a sentence: what `svgcharts` draws of rows.


Row = Mapping[str, Any]


_NARROW = 440


_STYLES = {"random": "one", "top": "two", "row": "three", "gradient": "four", "toward": "four", "match": "four"}


_ALOFT = 2.1
"""Relative distance that a chart reaches at least: unrelated embeddings are 1 to 2 apart."""


def along_view(stop: Stop, profile: Sequence[Stop], name: str) -> str:
    """The image at one step, its classes, and how far the embedding moves over the whole way.

    Args:
        stop: where to look.
        profile: the way, in order.
        name: what the picture shows.

    Returns:
        HTML.
    """
    moved = stop.distance or 0.0
    foretold = f" (the Jacobian alone foretells {_percent(stop.first_order)})" if stop.first_order else ""
    curve = chart(
        f"Distance of the embedding: {name}",
        [
            Series(
                "foretold by the Jacobian",
                [(p.step, p.first_order) for p in profile if p.first_order is not None and p.first_order <= _ALOFT],
                "limit",
            ),
            Series("distance of the embedding", [(p.step, p.distance) for p in profile if p.distance is not None]),
        ],
        Axis("step h (L2, pixels in [0, 1])", low=profile[0].step, high=profile[-1].step),
        Axis("‖f(x+hv) − f(x)‖ / ‖f(x)‖", low=0.0, high=max([_ALOFT, moved, *(p.distance or 0.0 for p in profile)])),
        mark=(stop.step, moved),
    )
    text = f"h = {stop.step:.3g}: the embedding has moved by {_percent(moved)} of its length{foretold}."
    return (
        f'<div class="live"><div>{picture(stop.png, name, text)}</div>'
        f'<div>{curve}<h2 class="block-title">What the classifier sees</h2>{class_bars(stop.classes)}</div></div>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 10 else f"{100 * share:.3g} %"


def ladder_view(row: Row) -> str:
    """The secants of one direction over the radii, with the noise floor and the plateau: a lipschitz row."""
    radii = row["radii"]
    series = [
        Series("float noise", [(r, n) for r, n in zip(radii, row["noise_floor"], strict=True) if n], "quiet"),
        Series("|Jv|", [(r, row["jvp"]) for r in (radii[0], radii[-1])], "limit"),
        Series("secants", [(r, s) for r, s in zip(radii, row["secants"], strict=True) if s], "one", dots=True),
    ]
    if row["plateau"]:
        low, high = row["plateau"][0], row["plateau"][-1]
        inside = [(r, s) for r, s in zip(radii, row["secants"], strict=True) if s and low <= r <= high]
        series.append(Series("plateau", inside, "two", dots=True))
    name = f"{row['direction']} {row['index']}"
    drawn = chart(
        f"Secants along {name} at {row['image_id']}", series, Axis("radius h (L2)", log=True),
        Axis("‖f(x+hv) − f(x−hv)‖ / 2h", log=True), width=_NARROW,
    )  # fmt: skip
    if row["value"] is not None:
        said = f"Resolved: the constant is {row['value']:.4g}, the exact derivative |Jv| {row['jvp']:.4g}."
    else:
        said = f"Undetermined: float noise hides it, so no number is given. The exact derivative is {row['jvp']:.1e}."
    return f"{drawn}<p>{said}</p>"


def constants_view(rows: Sequence[Row]) -> str:
    """The constants of one image by kind of direction: lipschitz rows; rings where no constant can be read."""
    kinds = list(dict.fromkeys(row["direction"] for row in rows))
    known: list[Series] = []
    unknown: list[tuple[float, float]] = []
    for k, kind in enumerate(kinds):
        own = [row for row in rows if row["direction"] == kind]
        places = [(k + (0.28 * ((7 * i) % 11 - 5) / 5 if len(own) > 1 else 0.0), row) for i, row in enumerate(own)]
        dots = [(x, row["value"]) for x, row in places if row["value"] is not None]
        known.append(Series("", dots, _STYLES.get(kind, "one"), line=False, dots=True))
        unknown += [(x, row["jvp"]) for x, row in places if row["value"] is None and row["jvp"]]
    rings = Series("|Jv| where noise hides the constant", unknown, "quiet", line=False, dots=True, hollow=True)
    drawn = chart(
        f"Lipschitz constants at {rows[0]['image_id']} by kind of direction",
        [*known, *([rings] if unknown else [])],
        Axis("kind of direction", names=kinds), Axis("constant", log=True), width=_NARROW,
    )  # fmt: skip
    values = [row["value"] for row in rows if row["value"] is not None]
    span = f"From {min(values):.2g} to {max(values):.3g}, by direction alone." if values else "None can be read."
    return f"{drawn}<p>{span}</p>"


def spectrum_view(row: Row) -> str:
    """The singular values of one image with the rank threshold and the named zeros: a spectrum row."""
    values, rank = row["singular_values"], row["rank"]
    causes = [zero["cause"] for zero in [*row["structural_zeros"], *row["near_structural"]]]
    rest = [(k + 1, value) for k, value in enumerate(values) if k >= rank]
    series = [
        Series("rank threshold", [(1, row["rank_threshold"]), (len(values), row["rank_threshold"])], "limit"),
        Series("singular values", [(k + 1, value) for k, value in enumerate(values[:rank])]),
        Series(f"zero: {', '.join(causes)}" if causes else "below it", rest, "two", line=False, dots=True),
    ]
    drawn = chart(
        f"Singular values of the Jacobian at {row['image_id']}", [s for s in series if s.points],
        Axis("number", low=0.0), Axis("σ", log=True), width=_NARROW,
    )  # fmt: skip
    said = f"Rank {rank} of {len(values)}: along {row['nullity']:,} pixel directions the embedding does not move"
    return f"{drawn}<p>{said}, to first order.</p>"
