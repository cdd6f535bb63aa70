"""Blocks become HTML and Markdown that are well formed and hold nothing that data could run."""

import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from hf_equiv.reportpage import (
    Bullets,
    Code,
    Heading,
    Page,
    Picture,
    Strip,
    Table,
    Text,
    code,
    plain,
    to_html,
    to_markdown,
)

NASTY = "<script>alert('x')</script> a|b `c` [d](e) *f* _g_ & \" \x00\x01\x02"
VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Refuses tags that do not close in order; keeps tags, attributes and text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag not in ("span", "code", "a"):
            self.text.append("\n")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def checked(html: str) -> Checker:
    """Parse a page, and check that it is whole and loads nothing."""
    page = Checker()
    page.feed(html)
    page.close()
    assert page.open == []
    assert "script" not in page.tags
    assert not {"link", "iframe", "object", "embed", "form"} & set(page.tags)
    names = [value for _, key, value in page.attributes if key == "id"]
    assert len(names) == len(set(names))
    for tag, key, value in page.attributes:
        assert not key.startswith("on"), f"{tag} {key}"
        if key in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "#")), value[:60]
        if key == "href":
            assert value[1:] in names
    assert all(dict_of(page, "img", i).get("alt") for i in range(page.tags.count("img")))
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    return page


def dict_of(page: Checker, tag: str, index: int) -> dict:
    """Attributes of the index-th element of a kind, as far as the flat list tells: alt of images."""
    found = [value for name, key, value in page.attributes if name == tag and key == "alt"]
    return {"alt": found[index]}


def tables_of(markdown: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, split at bars that are not escaped."""
    tables, lines = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            assert line.endswith("|")
            lines.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif lines:
            tables.append(lines)
            lines = []
    return tables


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def page() -> Page:
    return Page(
        NASTY,
        (
            Heading(NASTY, 2, "first"),
            Text(NASTY, "lead"),
            Text(NASTY + code(NASTY)),
            Bullets((NASTY, code("x"))),
            Bullets(("one", "two"), ordered=True),
            Code(NASTY + "\nhf-equiv report runs"),
            Table(("a", NASTY), (("1", NASTY), ("2", "supported with a caveat")), NASTY, (0,), stacked=True),
            Picture("figure.png", png(), NASTY, NASTY),
            Strip((("one.png", png(), NASTY, (NASTY, "two lines")), ("two.png", png(), "alt", ())), NASTY),
        ),
    )


def test_html_is_whole_and_escapes(page):
    found = checked(to_html(page))
    assert "<script>alert('x')</script>" in "".join(found.text)
    assert found.tags.count("img") == 3
    assert ("span", "class", "badge partly") in found.attributes


def test_markdown_is_whole_and_escapes(page):
    text, files = to_markdown(page, "report_files")
    assert set(files) == {"figure.png", "one.png", "two.png"}
    assert all(f"](report_files/{name})" in text for name in files)
    outside = re.sub(r"^    .*$|`[^`]*`", "", text.replace("\\`", ""), flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)<", outside), "HTML in Markdown"
    tables = tables_of(text)
    assert len(tables) == 2
    for table in tables:
        assert len({len(row) for row in table}) == 1, table
        assert all(set(cell) <= set("-:") for cell in table[1])


def test_numbers_with_exponents_stay_whole():
    html = to_html(Page("t", (Text("error 4.3e-5 (95 % CI 2.3e-5 to 5.2e-5, n = 6)"),)))
    for whole in ("4.3e-5", "95 % CI 2.3e-5 to 5.2e-5", "n = 6"):
        assert f'<span class="whole">{whole}</span>' in html


def test_plain_and_code():
    assert plain("a\nb\x01\x02 c ") == "a b c"
    assert code("a\x02b") == "\x01a b\x02"
