"""Run the Python of the README and the docs, and check that their commands, flags, targets and links exist."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from PIL import Image
from tiny_texts import save_text

from hf_equiv.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
NOTEBOOK = json.loads((ROOT / "docs" / "first_match.ipynb").read_text(encoding="utf-8"))
PYTHON += ["\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")]
COMMANDS = [
    shlex.split(line, comments=True)
    for language, text in BLOCKS
    if language in ("bash", "sh", "console")
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]


def test_there_is_something_to_check():
    assert PYTHON
    assert COMMANDS


@pytest.mark.parametrize("text", PYTHON, ids=range(len(PYTHON)))
def test_python_runs(text, tmp_path, monkeypatch):
    """The README as it is; the others on the small checkpoint, texts on a tiny one."""
    if "TextEncoder" in text:
        name = '"sentence-transformers/all-MiniLM-L6-v2"'
        assert name in text
        text = text.replace(name, repr(str(save_text(tmp_path / "text", "bert"))))
    elif text != PYTHON[0]:
        assert 'from_pretrained("builtin")' in text
        text = text.replace('from_pretrained("builtin")', 'from_pretrained("builtin-64")')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image.Image, "show", lambda image: None)  # no viewer
    exec(compile(text, "README", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "hf-equiv"], ids=" ".join)
def test_commands_parse(words):
    command: click.Command = cli
    while isinstance(command, click.Group):
        command, words = command.commands[words[1]], words[1:]
    command.make_context(words[0], words[1:])  # unknown flags and bad values raise


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "make"], ids=" ".join)
def test_make_targets_exist(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])


def test_scripts_and_extras_exist():
    for words in COMMANDS:
        for word in words:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), word
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {extra for found in re.findall(r"(?:hf[-_]equiv|\.)\[([\w,]+)\]", TEXT) for extra in found.split(",")}
    assert named <= set(extras)


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_repository_exist(page):
    """Files that links name exist; so do the headings after `#`."""
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
