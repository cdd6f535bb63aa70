"""Data of strangers on a terminal: no control character, no second line, no markup; streams that are closed or full."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fakes import TinyEncoder, draw_photo, reseal
from hubcases import call

from hf_equiv.analyses.run import RunOutcome, read_back
from hf_equiv.cli import environment, output, progress
from hf_equiv.formatting import duration, excerpt, one_line, printable
from hf_equiv.report import collect
from hf_equiv.runs.execute import RunProgress
from hf_equiv.runs.schema import LAYOUTS
from hf_equiv.verify import directory

EVIL = "x\x1b[2J\x1b]0;t\x07\x9b31m\r\nerror: all is well\u202e\u2066\u200b\x7f[bold red]:smile: y"
CLI = Path(environment.__file__).parent


@pytest.fixture(autouse=True)
def costless(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module, name in ((environment, "load_encoder"), (directory, "load_recorded"), (collect, "load_recorded")):
        monkeypatch.setattr(module, name, lambda *_, **__: TinyEncoder())


def spoil(value):
    """Put the hostile text into every string but those that a run could not be opened without."""
    if isinstance(value, dict):
        return {key: inner if key in ("analysis", "dtype", "files") else spoil(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [spoil(inner) for inner in value]
    return value + EVIL if isinstance(value, str) and not value.startswith(("sha256:", "{")) else value


@pytest.fixture(params=["match", "walk", "spectrum", "lipschitz"])
def hostile(request, runs, tmp_path) -> Path:
    """A run with hostile ids, labels, names and words in every row, in its record and in the name of a file."""
    folder = Path(shutil.copytree(runs[request.param], tmp_path / "run"))
    record = spoil(json.loads((folder / "run.json").read_text()))
    record["files"][f"figures/a{EVIL}.png".replace("/0", "")] = "0" * 64
    (folder / "run.json").write_text(json.dumps(record))
    for path in folder.glob("*/*.parquet"):
        rows = pq.read_table(path)
        for place, field in enumerate(rows.schema):
            if field.type == pa.string() and field.name not in ("status", "processor", "versions", "dtype"):
                texts = [None if text is None else spoil(text) for text in rows.column(place).to_pylist()]
                rows = rows.set_column(place, field, pa.array(texts, pa.string()))
        pq.write_table(rows, path)
    (folder / "figures" / f"b{EVIL.replace('/', '')}.png").write_bytes(b"")
    record["files"] = {name: "0" * 64 for name in record["files"] if (folder / name).is_file()}
    (folder / "run.json").write_text(json.dumps(record))
    reseal(folder)
    return folder


def harmless(text: str) -> None:
    """Nothing but printable characters and the colours of the program itself, and no line that data began."""
    assert all(sign.isprintable() or sign == "\n" for sign in re.sub(r"\x1b\[\d*(;\d+)*m", "", text)), ascii(text)
    assert not any(line.startswith("error: all is well") for line in text.splitlines())


@pytest.mark.parametrize(("command", "terminal"), [("verify", True), ("report", True), ("publish", False)])
def test_a_hostile_run(command, terminal, hostile, capsys, monkeypatch):
    if terminal:
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "dumb")  # no bars, which move the cursor
    more = {"report": ["--no-survival"], "publish": ["alice/results", "--dry-run"]}.get(command, [])
    code, out, err = call(capsys, command, hostile, *more)
    assert code in (0, 1, 2)
    assert "HF_EQUIV_DEBUG" not in err
    harmless(out)
    harmless(err)
    if not terminal:
        _, out, _ = call(capsys, command, hostile, *more, "--json")
        harmless(out)
        assert out == "" or json.loads(out)


HOSTILE = ["a\x1b[2J.png", "b\nerror: all is well.png", "c\u202e.png", "[bold]d.png", ":e:.png", "<i>&amp;.png"]


def test_hostile_file_names(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for k, name in enumerate(HOSTILE):
        draw_photo(k).save(tmp_path / "in" / name)
        (tmp_path / "in" / f"bad{name}").write_bytes(b"no image")
    place = "out" + "".join(HOSTILE)
    code, out, err = call(capsys, "spectrum", "builtin", "--data", "in", "--out", place)
    assert code == 1
    harmless(out)
    harmless(err)
    for text in ("[bold]d", ":e:", "<i>&amp;"):  # markup is text
        assert text in out
    assert call(capsys, "verify", place)[0] == 0
    for name in HOSTILE:
        more = ["report", "in", "--transfer", name], ["env", "--what" + name]
        for given in (["match", name], ["verify", name], *more):
            harmless(call(capsys, *given)[2])


def test_messages_of_libraries_are_printable(capsys):
    import logging
    import warnings

    with environment.calm(quiet=True):
        logging.lastResort.handle(logging.getLogRecordFactory()("a", 30, "b", 1, "a label: %s", (EVIL,), None))
        sys.stderr.write(warnings.formatwarning(UserWarning(EVIL), UserWarning, "file.py", 1))
        link = "requesting PUT https://storage/part?X-Signature=secret again"
        logging.lastResort.handle(logging.getLogRecordFactory()("a", 30, "b", 1, link, (), None))
    err = capsys.readouterr().err
    assert err.count("[bold red]:smile: y") == 2
    assert "PUT https://storage/part again" in err
    harmless(err)


def test_one_place_prints():
    """Every text of the commands goes through `output`; click prints only its own help."""
    for path in CLI.glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = [ast.unparse(node.func) for node in calls]
        prints = [n for n in names if n in ("print", "Console") or n.endswith((".echo", ".secho")) or "std" in n]
        allowed = {"main.py": ["click.echo"], "output.py": None, "streams.py": None}.get(path.name, [])
        assert (
            allowed is None
            or [n for n in prints if not n.endswith(("isatty", "to_stderr", "fileno", "redirect_stdout"))] == allowed
        ), path


@pytest.mark.parametrize("clean", [printable, lambda text: one_line(ValueError(text)), lambda text: excerpt(text, 400)])
def test_what_is_printable(clean):
    assert clean(EVIL).isprintable()
    assert clean("Zürich 東京 🫥 a→b") == "Zürich 東京 🫥 a→b"


def test_an_excerpt_ends_after_a_word():
    assert excerpt("Got SizeDict(height=None, width=None)", 27) == "Got SizeDict(height=None, …"
    assert excerpt("short", 5) == "short"


def test_a_report_says_which_runs_are_partial(runs, tmp_path, capsys):
    folder = Path(shutil.copytree(runs["match"], tmp_path / "run"))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"complete": False, "summary": None, "files": {}}))
    code, out, _ = call(capsys, "report", "run", "--no-survival")
    assert code == 0
    assert "\npartial:   run holds 2 of 2 pairs" in out
    assert "partial:" not in call(capsys, "report", runs["match"], "--no-survival", "--out", "whole.html")[1]


# --- numbers, times, cores ---


@pytest.mark.parametrize("width", [24, 40, 80])
@pytest.mark.parametrize("verb", LAYOUTS)
def test_no_number_is_cut_at_any_width(verb, width, runs, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    record, layout = json.loads((runs[verb] / "run.json").read_text()), LAYOUTS[verb]
    made = read_back(runs[verb], layout, [item[layout.item] for item in record[layout.listed]], 0)
    lines = output._lines(RunOutcome(verb, runs[verb], tuple(made.rows), record["summary"], {}, {}))
    whole, console = next(output._tables(verb, lines, 10_000)), output._console()
    for table in output._tables(verb, lines, console.width):
        console.print(table, soft_wrap=False)
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(len, printed.splitlines())) <= width
    words = printed.split()
    for column in whole.columns:
        if column.no_wrap:
            assert {word for cell in (column.header, *column.cells) for word in cell.split()} <= {*words}, column.header


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_time_left_is_readable_at_any_width(width, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    bars = progress._bars()
    show = progress._Bars(bars, "rows")
    show(RunProgress("saved", 0, 1000))
    clock[0], names = 60.0, ("folder/photo1.jpg->folder/photo2.jpg", "cat->coffee")
    evals, active = torch.tensor([200.0, 150.0]), torch.tensor([True, False])
    show(RunProgress("match", 0, 1000, names, torch.tensor([1.2e-3, 9e-6]), evals, active))
    with bars.console.capture() as told:
        bars.console.print(bars.get_renderable())
    assert "0 of 1000, 11 h 45 min left" in told.get()  # two thirds of a pair and three quarters of another in a minute
    assert max(map(len, told.get().splitlines())) <= width
    show(RunProgress("saved", 1, 1000, names[1:]))  # and the part of the other pair still counts
    assert show.pace.left(RunProgress("refine", 1, 1000, names[:1])) == pytest.approx(60 * (999 - 2 / 3) / (1 + 2 / 3))
    assert ("cat->coffee" in told.get()) == (width >= 60)  # whole or not at all


def test_the_estimate_says_that_the_machine_is_busy(monkeypatch):
    facts = {"device": "cpu", "evaluations": {"match": 1000}, "seconds_per_evaluation": 0.026, "estimated_seconds": 26}
    said = "about 26 s: roughly 1,000 evaluations, 26 ms each as timed now on "
    for notes, device, where in (
        ([], "cpu", "cpu"),
        (["busy"], "cpu", "this busy machine"),
        (["busy"], "cuda", "cuda"),
    ):
        monkeypatch.setattr(environment, "notes", notes)
        assert output.time_in_words(facts | {"device": device}) == said + where


def test_times_for_people():
    times = {None: "–", 0: "0 s", 0.0123: "12 ms", 0.5: "0.5 s", 9.4: "9.4 s", 38.2: "38 s", 59.6: "1 min 0 s"}
    times |= {250: "4 min 10 s", 1500: "25 min", 17373.3: "4 h 50 min", 86_400 * 3.1: "3 d 2 h", float("nan"): "–"}
    assert {seconds: duration(seconds) for seconds in times} == times


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8), ({"cpu.max": "max 100000\n"}, 8), ({"cpu.max": "150000 100000\n"}, 2), ({"cpu.max": "odd"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)  # fmt: skip
def test_cores_of_a_container(files, cores, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert environment.usable_cores() == cores


@pytest.mark.parametrize(
    ("given", "cores", "others", "left", "said"),
    [
        ({}, 8, 0.4, {}, ""), ({}, 2, 0.4, {"OMP_NUM_THREADS": "2"}, ""),
        ({}, 8, 3.2, {"OMP_WAIT_POLICY": "passive"}, "about 3 threads busy on 8 cores. OMP_WAIT_POLICY is passive;"),
        ({"OMP_NUM_THREADS": "2"}, 8, 5.0, {"OMP_NUM_THREADS": "2"}, ""),
        ({"OMP_WAIT_POLICY": "active"}, 8, 3.2, {"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY is active;"),
    ],
)  # fmt: skip
def test_threads_on_a_loaded_machine(given, cores, others, left, said, monkeypatch):
    monkeypatch.setattr(os, "environ", {**given})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(environment, "usable_cores", lambda: cores)
    monkeypatch.setattr(environment, "_others", lambda: others)
    monkeypatch.setattr(environment, "notes", [])
    environment.prepare_threads()
    assert os.environ == left
    lines = environment.place(torch.device("cpu"))
    assert re.fullmatch(rf"computing on the CPU: \d+ threads? on {cores} cores", lines[0])
    assert [said in line for line in lines[1:]] == ([True] if said else [])


# --- streams ---

LINES = """
import sys
sys.argv = ["hf-equiv"]
from hf_equiv.cli import main, output, streams
from hf_equiv.cli import environment
from unittest.mock import Mock
environment.import_module = Mock()  # the libraries that `calm` silences take seconds to import
m = sys.modules["hf_equiv.cli.main"]
@m.cli.command()
def long():
    with environment.calm(quiet=True):
        for _ in range(20000):
            streams.to_stderr("a line on stderr")
    open("done", "w").close()
    output.print_json({"label": "東京"})
    with streams.writing(sys.stdout):
        output._console().print("ε – 東京")
    return 1
main(["long"])
"""


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">&-", 1, ""), ("2>&-", 1, "東京"), (">&- 2>&-", 1, ""), ("<&- >&- 2>&-", 1, ""),
        ("2>&1 | head -1", 1, "a line"),
        ("2>/dev/null | head -c 1", 1, "{"), (">/dev/full", 2, "standard output cannot be written: No space left"),
        ("2>/dev/full", 1, "東京"),
    ],
)  # fmt: skip
def test_streams_that_are_closed_lose_no_result(redirect, code, said, tmp_path):
    (tmp_path / "long.py").write_text(LINES)
    command = f"set -o pipefail; {sys.executable} long.py {redirect}"
    there = os.environ | {"PYTHONPATH": str(CLI.parents[1])}
    told = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=there, capture_output=True, text=True, check=False)
    assert (tmp_path / "done").exists()
    assert told.returncode == code
    assert said in told.stdout + told.stderr
    assert "Traceback" not in told.stderr
    assert "Exception ignored" not in told.stderr


@pytest.mark.parametrize(
    "coding", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_stdout_that_cannot_encode(coding, tmp_path):
    (tmp_path / "long.py").write_text(LINES, encoding="utf-8")
    there = os.environ | {"PYTHONPATH": str(CLI.parents[1])} | coding
    told = subprocess.run([sys.executable, "long.py"], cwd=tmp_path, env=there, capture_output=True, check=False)
    assert told.returncode == 1
    first, second = told.stdout.decode("ascii").splitlines()
    assert json.loads(first) == {"label": "東京"}
    assert second.startswith("\\u03b5")
