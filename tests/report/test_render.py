"""Templates give HTML and Markdown that are well formed and hold nothing that data could run."""

import re
from types import SimpleNamespace

import pytest
from pages import checked, tables_of

from hf_equiv.report import render
from hf_equiv.report.claims import PARTLY, Claim

NASTY = "<script>alert('x')</script> a|b `c` [d](e) *f* _g_ & \" \x00\x01\x02\n"


def page(*cells: str, title: str = NASTY) -> dict:
    """A page of one checkpoint whose findings are strings from data."""
    numbers = SimpleNamespace(
        match=None, survival=None, heads=None, retrieval=None, probe=None, spectrum=None, lipschitz=None, walk=None,
        transfer=(), runs=(), dim=None, pixels=None, model_id=NASTY, revision=NASTY, readout=NASTY, dtype="float32",
        normalize=False, title=title,
    )  # fmt: skip
    model = {
        "prefix": "model", "numbers": numbers, "near": None, "runs": (), "budget": None, "gallery": None,
        "answer": {"verdict": NASTY, "tone": "bad", "sentence": NASTY, "exposed": NASTY, "how": NASTY, "helps": NASTY},
        "claims": [Claim(cell, cell, cell, PARTLY, "partly") for cell in cells], "consequences": cells,
        "against": cells, "limits": cells, "commands": [*cells], "versions": NASTY, "figures": {},
        "reason": "", "earlier": False, "can_measure": True, "to_finish": [], "again": lambda *_, **__: NASTY,
    }  # fmt: skip
    return {"title": title, "models": [model], "several": False, "same": True, "labelled": None}


def test_html_is_whole_and_escapes():
    html = render.to_html(page(NASTY, "1"))
    found = checked(html)
    assert html.startswith("<!DOCTYPE html>")
    assert "".join(found.text).count("<script>alert('x')</script>") >= 4
    assert ("span", "class", "badge partly") in found.attributes
    assert ("section", "class", "answer bad") in found.attributes
    assert not re.search(r"[\x00-\x08]", html)


def test_markdown_is_whole_and_escapes():
    text = render.to_markdown(page(NASTY, "1"), "report_files")
    outside = re.sub(r"^    .*$|`[^`]*`", "", text.replace("\\`", ""), flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)<", outside), "HTML in Markdown"
    for table in tables_of(text):
        assert len({len(row) for row in table}) == 1, table
        assert all(set(cell) <= set("-:") for cell in table[1])
    assert "\n\n\n" not in text
    assert text.startswith("# \\<script")


def test_numbers_with_exponents_stay_whole():
    html = render.to_html(page("error 4.3e-5 (95 % CI 2.3e-5 to 5.2e-5, n = 6), 1.0 (range 0.5 to 2.0, n = 3)"))
    for whole in ("4.3e-5", "95 % CI 2.3e-5 to 5.2e-5", "n = 6", "range 0.5 to 2.0"):
        assert f'<span class="whole">{whole}</span>' in html


def test_values_and_code():
    assert render.plain("a\nb\x01\x02 c ") == "a b   c "
    assert render.plain(None) == "–"
    html, markdown = (
        render._environment(kind).get_template(f"report.{name}.jinja").make_module(page("1") | {"folder": "files"})
        for kind, name in (("html", "html"), ("markdown", "md"))
    )
    words = '<code><span class="whole">a|`&lt;b</span> <span class="whole">--out</span></code>'
    assert html.code("a|`<b --out") == words  # a line breaks between words
    assert markdown.code("a|`<b") == "`a/'<b`"
    assert render._environment("html").from_string("{{ x }}{{ x }}").render(x="<b>") == "&lt;b&gt;" * 2
    assert html.code("y" * 40) == f"<code><span>{'y' * 40}</span></code>"  # may be broken
    assert html.link("method", "How to read").endswith('<a href="#method">How to read</a>')
    assert markdown.link("method", "How to read") == "[How to read](#how-to-read)"


@pytest.mark.parametrize("kind", ["html", "markdown"])
def test_a_name_that_a_template_lacks_is_an_error(kind):
    with pytest.raises(Exception, match="undefined"):
        render._environment(kind).from_string("{{ nothing }}").render()
