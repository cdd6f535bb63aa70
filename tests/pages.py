"""Parse report pages and Markdown tables."""

from __future__ import annotations

import re
from html.parser import HTMLParser

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
