"""Runs that are started by something else than a shell: a notebook, and a job on the Hub's machines."""

import re
import sys
import tomllib
from types import SimpleNamespace

import pytest
from fakes import save_photos
from runcases import ROOT, free_ports, python

from hf_equiv.cli.main import _run
from hf_equiv.runs import shards

JOB = ROOT / "scripts" / "hf_job.py"

NOTEBOOK = """
    import sys
    from pathlib import Path
    from accelerate import notebook_launcher

    def work(photos, out):
        from fakes import TinyEncoder
        from hf_equiv.analyses import MatchConfig, make_plan, run_analysis

        plan = make_plan(MatchConfig(data=photos, pairs=6, max_evals=20), TinyEncoder(delay=0.01))
        outcome = run_analysis(plan, Path(out), batch_size=1)
        assert len(outcome.rows) == 6
        print("main" if outcome.main else "other", flush=True)

    if __name__ == "__main__":
        port = sys.argv.pop()
        notebook_launcher(work, sys.argv[1:], num_processes=2, use_port=port)
"""


@pytest.fixture
def job(monkeypatch):
    """The script, whose commands are carried out here; their first words are noted in `verbs`."""
    monkeypatch.syspath_prepend(str(JOB.parent))
    import hf_job

    def carry_out(command: list[str], *, check: bool) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "hf_equiv"]
        hf_job.verbs.append(command[3])
        return SimpleNamespace(returncode=_run(command[3:]))

    monkeypatch.setattr(hf_job.subprocess, "run", carry_out)
    monkeypatch.setattr(hf_job, "verbs", [], raising=False)
    return hf_job


def test_notebook_launcher(tmp_path):
    told = python(NOTEBOOK, save_photos(tmp_path / "photos"), tmp_path / "out", *free_ports(1))
    assert told.returncode == 0, told.stderr
    assert re.findall("main|other", told.stdout).count("main") == 1
    assert re.findall("main|other", told.stdout).count("other") == 1
    assert len(list(shards.read_rows(tmp_path / "out"))) == 6


def test_a_job_says_what_it_needs(job, capsys):
    block = re.search(r"# /// script\n(.*?)# ///\n", JOB.read_text(), re.DOTALL)
    header = tomllib.loads("\n".join(line.removeprefix("# ") for line in block[1].splitlines()))
    assert header["dependencies"] == ["hf-equiv"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert header["requires-python"] == project["requires-python"]
    with pytest.raises(SystemExit, match="0"):
        job.main(["--help"])
    told = capsys.readouterr().out
    for flag in ("--verb", "--model", "--data", "--pairs", "--repo", "--public", "--dry-run"):
        assert flag in told
    with pytest.raises(SystemExit, match="2"):
        job.main(["--verb", "dance", "--model", "builtin"])


def test_a_job_runs_and_checks(job, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--model", "builtin-64", "--data", "builtin", "--out", "out"]
    assert job.main([*given, "--pairs", "2", "--dry-run", "--", "--rtol", "0.9", "--no-refine"]) == 0
    assert "timed now on" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert job.main([*given, "--verb", "spectrum", "--pairs", "1", "--", "--k", "1"]) == 0
    told = capsys.readouterr()
    assert re.findall(r"^\+ (\w+)", told.err, re.MULTILINE) == ["spectrum", "verify"]
    assert job.verbs == ["match", "spectrum", "verify"]
    assert "The row of out holds" in told.out
    assert job.main(["--model", "builtin-64", "--data", "none.png"]) == 2


def test_a_job_publishes_last(job):
    given, more = job.parse(["--model", "a/b", "--data", "c/d", "--repo", "e/f", "--public", "--", "--seed", "3"])
    assert job.commands(given, more) == [
        ["match", "a/b", "--out", "run", "--data", "c/d", "--seed", "3"],
        ["verify", "run"],
        ["publish", "run", "e/f", "--public"],
    ]
    assert not any("publish" in command for command in job.commands(*job.parse(["--model", "a/b"])))
