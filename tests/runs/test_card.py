"""Cards hold values of strangers: nothing in them is Markdown, HTML, YAML, or the end of a part."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from hf_equiv.hub.card import END, dataset_card
from hf_equiv.runs.card import escape, run_card
from hf_equiv.runs.schema import LAYOUTS

HOSTILE = [
    "<form action=http://evil.com><input></form><img src=x onerror=alert(1)>", "[a](http://evil.com)",
    "![a](http://evil.com/i.png)", "[a]: http://evil.com", "http://evil.com www.evil.com", "<http://evil.com>",
    "| a |\n| --- |\n| b |", "```", "`x` ``y``", "# Evil", "\n\n# Evil\n", "    # Evil", "Evil\n====", "- Evil",
    "1. Evil", "> Evil", "---", "***", "~~~",
    "\x1b[2J\u202eEvil", "x: [1, {a}]\n---\nlicense: evil", END + "\n# Evil", "L" * 3000,
]  # fmt: skip


def spoilt(value, text):
    if isinstance(value, dict):
        return {key: spoilt(inner, text) if key != "analysis" else inner for key, inner in value.items()}
    if isinstance(value, list):
        return [spoilt(inner, text) for inner in value]
    return text if isinstance(value, str) and not value.startswith("{") else value


@pytest.mark.parametrize("analysis", ["match", "walk"])
@pytest.mark.parametrize("text", HOSTILE)
def test_values_of_strangers_are_text(text, analysis, runs):
    record = json.loads((runs[analysis] / "run.json").read_text())
    plain, evil = ({"": record, "runs/a": record}, dict.fromkeys(("", "runs/a"), spoilt(record, text)))
    figures = [f"{text}.png"]
    cards = [[dataset_card("me/x", of) for of in (plain, evil)]]
    cards += [[run_card(LAYOUTS[analysis], r["settings"], r["summary"], figures) for r in (record, evil[""])]]
    for usual, card in cards:
        made, wanted = (MarkdownIt("commonmark").enable("table").render(_body(one)) for one in (card, usual))
        assert not re.search(r"""<a [^>]*evil\.com|<img src="(?!figures/|runs/a/figures/)""", made)
        assert re.findall(r"<(?!/?(?:em|strong)\b)/?\w+", made) == re.findall(r"<(?!/?(?:em|strong)\b)/?\w+", wanted)
        assert _body(card).count(END) == _body(usual).count(END)
        assert all(sign.isprintable() or sign == "\n" for sign in card)
        assert "://evil" not in _body(card).split("```")[0]  # which a page of the Hub makes a link
        header = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---"))
        assert set(header) <= {"pretty_name", "license", "task_categories", "tags", "size_categories", "configs"}
        assert header["configs"] == yaml.safe_load(usual.split("\n---\n")[0].removeprefix("---"))["configs"]


def _body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


@pytest.mark.parametrize(
    "value",
    [1, -0.5, "cat.jpg->dog.png", "1 of 2 matches reached error 1e-5.", "cifar10:plain:train[:40]", "a_b*c", "–"],
)
def test_ordinary_values_stay_as_they_are(value):
    assert escape(value).replace("&gt;", ">") == str(value)
