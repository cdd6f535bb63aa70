"""A page as a list of blocks, and its two forms: one HTML file with everything in it, or Markdown with its pictures.

Every text is plain and is escaped when it is written; `code` marks what stands in a fixed-width font.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_equiv.formatting import short

BADGES = {
    "supported": "yes",
    "supported with a caveat": "partly",
    "not supported": "no",
    "not measured": "open",
    "not decided": "open",
}
"""Verdicts, and the class that colours them."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of level 2 or 3; `name` is its anchor."""

    text: str
    level: int = 2
    name: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `kind` is "", "lead" (large), "quiet" (small print) or "note" (set apart)."""

    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list; `ordered` gives it numbers."""

    items: tuple[str, ...]
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class Code:
    """Lines in a fixed-width font."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table; columns `numbers` are set to the right; on a phone `stacked` puts cells below each other."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    numbers: tuple[int, ...] = ()
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure as PNG; `alt` says what is in it to whoever cannot see it."""

    name: str
    png: bytes
    alt: str
    caption: str


@dataclass(frozen=True, slots=True)
class Strip:
    """Small images side by side: (file name, PNG, alternative text, lines below) each."""

    images: tuple[tuple[str, bytes, str, tuple[str, ...]], ...]
    caption: str


Block = Heading | Text | Bullets | Code | Table | Picture | Strip


@dataclass(frozen=True, slots=True)
class Page:
    """A title and blocks."""

    title: str
    blocks: tuple[Block, ...]


def code(text: object) -> str:
    """Mark text for a fixed-width font."""
    return f"\x01{plain(text)}\x02"


def plain(text: object) -> str:
    """Text from data, on one line and without control characters."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())


def to_html(page: Page) -> str:
    """Write a page as one HTML file that loads nothing from elsewhere.

    Args:
        page: the page.

    Returns:
        The document.
    """
    body = "\n".join(_html(block) for block in page.blocks)
    contents = "".join(
        f'<li class="l{b.level}"><a href="#{b.name}">{_inline(b.text)}</a></li>'
        for b in page.blocks
        if isinstance(b, Heading) and b.name
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_escape(page.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_inline(page.title)}</h1>
<details class="contents"><summary>Contents</summary><ul>{contents}</ul></details>
{body}
</main>
</body>
</html>
"""


def to_markdown(page: Page, folder: str) -> tuple[str, dict[str, bytes]]:
    """Write a page as Markdown, with its pictures as files.

    Args:
        page: the page.
        folder: what the folder of the pictures is called beside the Markdown file.

    Returns:
        The text; and the pictures by file name.
    """
    files: dict[str, bytes] = {}
    parts = [f"# {_mark(page.title)}"]
    for block in page.blocks:
        if isinstance(block, Picture):
            files[block.name] = block.png
            parts.append(f"![{_mark(block.alt)}]({folder}/{block.name})\n\n{_mark(block.caption)}")
        elif isinstance(block, Strip):
            files |= {name: png for name, png, _, _ in block.images}
            cells = " | ".join(f"![{_mark(alt)}]({folder}/{name})" for name, _, alt, _ in block.images)
            below = " | ".join(". ".join(map(_mark, lines)) for _, _, _, lines in block.images)
            rule = " | ".join("---" for _ in block.images)
            parts.append(f"{_mark(block.caption)}\n\n| {cells} |\n| {rule} |\n| {below} |")
        else:
            parts.append(_markdown(block))
    return "\n\n".join(parts) + "\n", files


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        anchor = f' id="{block.name}"' if block.name else ""
        return f"<h{block.level}{anchor}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f'<p class="{block.kind}">{_inline(block.text)}</p>' if block.kind else f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Bullets):
        tag = "ol" if block.ordered else "ul"
        return f"<{tag}>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + f"</{tag}>"
    if isinstance(block, Code):
        return f"<pre>{_escape(block.text)}</pre>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Picture):
        return (
            f'<figure><img src="{_data(block.png)}" alt="{_escape(block.alt)}">'
            f"<figcaption>{_inline(block.caption)}</figcaption></figure>"
        )
    cells = "".join(
        f'<div><img src="{_data(png)}" alt="{_escape(alt)}">' + "<br>".join(_inline(line) for line in lines) + "</div>"
        for _, png, alt, lines in block.images
    )
    return f'<figure class="strip"><figcaption>{_inline(block.caption)}</figcaption><div>{cells}</div></figure>'


def _html_table(table: Table) -> str:
    def cell(tag: str, k: int, text: str) -> str:
        badge = BADGES.get(text) if tag == "td" else None
        inside = f'<span class="badge {badge}">{_escape(text)}</span>' if badge else _inline(text)
        named = f' data-head="{_escape(plain_marks(table.head[k]))}"' if table.stacked and tag == "td" else ""
        right = ' class="n"' if k in table.numbers else ""
        return f"<{tag}{right}{named}>{inside}</{tag}>"

    head = "".join(cell("th", k, text) for k, text in enumerate(table.head))
    rows = "".join(
        "<tr>" + "".join(cell("td", k, text) for k, text in enumerate(row)) + "</tr>\n" for row in table.rows
    )
    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    names = " ".join(name for name, on in (("stacked", table.stacked), ("dense", len(table.head) >= _DENSE)) if on)
    kind = f' class="{names}"' if names else ""
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>"
    return f'<div class="wide"><table{kind}>{caption}{body}</table></div>'


def _markdown(block: Heading | Text | Bullets | Code | Table) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_mark(block.text)}"
    if isinstance(block, Text):
        return f"> {_mark(block.text)}" if block.kind == "note" else _mark(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"{f'{n}.' if block.ordered else '-'} {_mark(item)}" for n, item in enumerate(block.items, 1))
    if isinstance(block, Code):
        return "\n".join("    " + line for line in block.text.splitlines())
    lines = [block.head, tuple("---:" if k in block.numbers else "---" for k in range(len(block.head)))]
    table = ["| " + " | ".join(_mark(text) for text in lines[0]) + " |", "| " + " | ".join(lines[1]) + " |"]
    table += ["| " + " | ".join(_mark(text) for text in row) + " |" for row in block.rows]
    return (f"{_mark(block.caption)}\n\n" if block.caption else "") + "\n".join(table)


def _escape(text: str) -> str:
    return html.escape("".join(sign for sign in text if sign.isprintable() or sign == "\n"), quote=True)


def _inline(text: str) -> str:
    """Escape text; what belongs together, an interval or a number with an exponent, stays on one line."""
    return "".join(
        f"<code{' class=whole' if len(part) <= _SHORT else ''}>{_escape(part)}</code>"
        if marked
        else _WHOLE.sub(r'<span class="whole">\g<0></span>', _escape(part))
        for part, marked in _parts(text)
        if part
    )


_DENSE = 8  # columns from which a table is set smaller


_SHORT = 32  # characters of code that are not broken


_SPAN = r"[\d.e-]+(?: %)? to [\d.e-]+(?: %)?"


_WHOLE = re.compile(rf"\({_SPAN}\)|95 % CI {_SPAN}|\bn = \d+|\bε = [\d./]+|\b\d[\d.]*e-\d+\b")


def _mark(text: str) -> str:
    """Escape what Markdown would read as its own; a code span holds no backtick and no bar of a table."""
    return "".join(
        f"`{part.replace('`', chr(39)).replace('|', '/')}`" if marked else _SIGNS.sub(r"\\\1", part)
        for part, marked in _parts(text)
        if part
    ).replace("\n", " ")


_SIGNS = re.compile(r"([\\`*_<>\[\]|#~&])")


def _parts(text: str) -> list[tuple[str, bool]]:
    pieces = re.split(r"(\x01[^\x01\x02]*\x02)", text)
    return [(plain_marks(piece), piece.startswith("\x01") and piece.endswith("\x02")) for piece in pieces]


def plain_marks(text: str) -> str:
    """The text without marks."""
    return text.replace("\x01", "").replace("\x02", "")


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--quiet:#57606a;--rule:#d7dce1;--paper:#fff;--panel:#f6f8fa;--link:#1f5fa8;
--yes:#1a6b3c;--yesb:#dcf3e4;--partly:#7a4f00;--partlyb:#fdf0cd;--no:#a1241b;--nob:#fde4e1;--open:#57606a;--openb:#e9edf1}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--quiet:#a3adb7;--rule:#3a424b;--paper:#14181d;--panel:#1e242b;
--link:#8ab8f0;--yes:#8fe0b0;--yesb:#153d27;--partly:#f2cf7d;--partlyb:#44360f;--no:#ffaaa1;--nob:#4d1b17;
--open:#b4bdc6;--openb:#2b333c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:.5rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.4rem;line-height:1.25;margin:3rem 0 .6rem;padding-top:.8rem;border-top:2px solid var(--rule);
overflow-wrap:anywhere}
h3{font-size:1.1rem;margin:2rem 0 .4rem}
p{margin:.5rem 0;max-width:46rem;overflow-wrap:break-word}
p.lead{font-size:1.08rem}
p.quiet,figcaption,caption{color:var(--quiet);font-size:.87rem}
p.note{border-left:4px solid var(--link);background:var(--panel);padding:.6rem .9rem}
ul,ol{padding-left:1.4rem}
li{margin:.3rem 0;max-width:45rem}
a{color:var(--link)}
code,pre{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,monospace;font-size:.88em}
code{background:var(--panel);padding:.05em .3em;border-radius:3px;overflow-wrap:anywhere}
pre{background:var(--panel);padding:.7rem .9rem;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere}
.whole{white-space:nowrap}
.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.9rem;min-width:60%}
caption{text-align:left;padding:.2rem 0 .4rem}
th,td{text-align:left;vertical-align:top;padding:.4rem .7rem .4rem 0;border-bottom:1px solid var(--rule)}
th{font-weight:600}
table.dense{font-size:.8rem}table.dense td,table.dense th{padding-right:.45rem}
.n{text-align:right;font-variant-numeric:tabular-nums}
.badge{display:inline-block;padding:.05rem .5rem;border-radius:.7rem;font-size:.82rem;font-weight:600}
.yes{color:var(--yes);background:var(--yesb)}.partly{color:var(--partly);background:var(--partlyb)}
.no{color:var(--no);background:var(--nob)}.open{color:var(--open);background:var(--openb)}
figure{margin:1.1rem 0;max-width:38rem}
figure>img{width:100%;height:auto;background:#fff;border:1px solid var(--rule);border-radius:4px}
figure.strip{max-width:none}
figure.strip>div{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:.6rem;font-size:.8rem;line-height:1.35;
overflow-wrap:anywhere;margin-top:.3rem}
figure.strip img{display:block;width:100%;height:auto;margin-bottom:.25rem;border:1px solid var(--rule);
image-rendering:auto}
.contents{background:var(--panel);padding:.5rem .9rem;font-size:.92rem;border-radius:4px}
.contents summary{cursor:pointer;font-weight:600}
.contents ul{list-style:none;margin:.3rem 0;padding:0}
.contents li{margin:.1rem 0}
.contents .l3{padding-left:1.2rem}
@media(max-width:34rem){figure.strip>div{grid-template-columns:repeat(2,minmax(0,1fr))}table{font-size:.82rem}
table.stacked thead{display:none}table.stacked tr{display:block;padding:.6rem 0;border-bottom:1px solid var(--rule)}
table.stacked td{display:block;border:0;padding:.15rem 0;text-align:left}
table.stacked td+td::before{content:attr(data-head) ": ";color:var(--quiet)}
table.stacked td:first-child{font-weight:600}}
@media print{.contents{display:none}h2{break-before:auto}figure,tr{break-inside:avoid}body{font-size:11pt}
.wide{overflow:visible}}
"""


# Numbers of a report in words: with interval and n, as counts, as budgets.


Row = Mapping[str, Any]


ON_THE_WAY = 0.1
"""A budget counts as enough if the median PNG ends within this part of that distance."""


ALIKE_DB = 30.0
"""PSNR from which a match is said to look like its source: what has changed is seen on a close look only."""


def number(estimate: Row | None, form: Callable[[float], str] = short, unit: str = "") -> str:
    """A median with interval and n: `1.2e-5 (95 % CI 9.1e-6 to 1.6e-5, n = 6)`."""
    if estimate is None:
        return "–"
    return f"{form(estimate['value'])}{unit} ({interval(estimate, form)})"


def interval(estimate: Row | None, form: Callable[[float], str] = short) -> str:
    """The interval and n alone."""
    if estimate is None:
        return "–"
    if estimate["low"] is None:
        return f"n = {estimate['n']}, no interval"
    return f"95 % CI {form(estimate['low'])} to {form(estimate['high'])}, n = {estimate['n']}"


def brief(estimate: Row | None, form: Callable[[float], str] = short) -> str:
    """A median with the interval in brackets, for wide tables whose caption says what it is."""
    if estimate is None or estimate["low"] is None:
        return "–" if estimate is None else form(estimate["value"])
    return f"{form(estimate['value'])} ({form(estimate['low'])} to {form(estimate['high'])})"


def brief_count(share: Row | None) -> str:
    """A count with the interval in brackets, likewise."""
    return count(share).replace("95 % CI ", "")


def count(share: Row | None) -> str:
    """A share as a count with Wilson's interval: `6 of 6 (95 % CI 61 % to 100 %)`."""
    if share is None:
        return "–"
    told = f"{share['hits']} of {share['n']}"
    return told if share["low"] is None else f"{told} ({span(share)})"


def span(share: Row | None) -> str:
    """Wilson's interval in percent."""
    if share is None:
        return "–"
    if share["low"] is None:
        return f"n = {share['n']}, no interval"
    return f"95 % CI {share['low']:.0%} to {share['high']:.0%}".replace("%", " %").replace("95  %", "95 %")


def tenth(value: float) -> str:
    """One decimal."""
    return f"{value:.1f}"


def three(value: float) -> str:
    """Three significant digits, in plain notation where that is short."""
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return short(value) if abs(value) < 1e-3 or abs(value) >= 1e7 else f"{value:.3g}"


def decibels(psnr: float) -> str:
    """One decimal, or as many as tell it from `ALIKE_DB`."""
    return next(text for n in range(1, 18) if float(text := f"{psnr:.{n}f}") != ALIKE_DB or psnr == ALIKE_DB)


def thousandth(value: float) -> str:
    """Three decimals."""
    return f"{value:.3f}"


def ball(radius: float | None, norm: str) -> str:
    """A budget in words: `no ball`, `ε = 8/255`, `L2 ε = 2`."""
    if radius is None:
        return "no ball"
    return f"ε = {radius * 255:.3g}/255" if norm == "linf" else f"L2 ε = {radius:.3g}"


def near_budget(numbers: Row) -> Row | None:
    """The smallest ball whose median PNG match ends within a tenth of the distance of unrelated images of its data."""
    enough = [
        b for b in numbers["budgets"]
        if b["radius"] is not None and b["embedding_error_8bit"] and b["unrelated"]
        and b["embedding_error_8bit"]["value"] <= ON_THE_WAY * b["unrelated"]
    ]  # fmt: skip
    return min(enough, key=lambda b: (b["norm"] != "linf", b["radius"]), default=None)


def look_alike(numbers: Row) -> Row | None:
    """The smallest budget whose matches look like their sources (PSNR) and mostly embed nearer to their targets.

    Args:
        numbers: of a checkpoint.

    Returns:
        Where none does, the widest of those whose matches look like their sources; None if no run has such matches.
    """
    alike = [b for b in numbers["budgets"] if b["nearer"] and b["psnr_db"] and b["psnr_db"]["value"] >= ALIKE_DB]
    alike.sort(key=lambda b: (b["radius"] is None, b["norm"] != "linf", b["radius"] or 0.0))
    return next((b for b in alike if b["nearer"]["value"] > 0.5), alike[-1] if alike else None)


def most_alike(numbers: Row) -> Row | None:
    """The budget whose matches look most like their sources (median PSNR), whether or not that is much."""
    known = [b for b in numbers["budgets"] if b["nearer"] and b["psnr_db"]]
    return max(known, key=lambda b: float(b["psnr_db"]["value"]), default=None)


def linear_reach(numbers: Row) -> tuple[Row, Row, str] | None:
    """How far the first-order model holds, how far the matches lie, and along which kind of direction."""
    found, match = numbers["lipschitz"], numbers["match"]
    if not found or not match or not match["l2"]:
        return None
    for kind in ("null", "random"):
        own = found["kinds"].get(kind)
        if own and own["linearity"]:
            return own["linearity"], match["l2"], kind
    return None


def falls_short(reach: Row, far: Row) -> bool:
    """Whether the linear model ends before the matches, beyond what the intervals leave open."""
    return bool(None not in (reach["high"], far["low"]) and reach["high"] < far["low"])
