"""Blocks become HTML and Markdown that are well formed and hold nothing that data could run."""

import io
import re

import pytest
from pages import checked, tables_of
from PIL import Image

from hf_equiv.report.render import (
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
