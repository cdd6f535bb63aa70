"""Runs that are started by something else than a shell: a notebook, and a job on the Hub's machines."""

import os
import re
import socket
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

from fakes import save_photos

from hf_equiv.runs import shards

ROOT = Path(__file__).parents[2]
JOB = ROOT / "scripts" / "hf_job.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}

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


def call(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=100
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_notebook_launcher(tmp_path):
    (tmp_path / "notebook.py").write_text(textwrap.dedent(NOTEBOOK))
    told = call("notebook.py", save_photos(tmp_path / "photos"), tmp_path / "out", _free_port(), cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert re.findall("main|other", told.stdout).count("main") == 1
    assert re.findall("main|other", told.stdout).count("other") == 1
    assert len(list(shards.read_rows(tmp_path / "out"))) == 6


def test_a_job_says_what_it_needs(tmp_path):
    block = re.search(r"# /// script\n(.*?)# ///\n", JOB.read_text(), re.DOTALL)
    header = tomllib.loads("\n".join(line.removeprefix("# ") for line in block[1].splitlines()))
    assert header["dependencies"] == ["hf-equiv"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert header["requires-python"] == project["requires-python"]
    told = call(JOB, "--help", cwd=tmp_path)
    assert told.returncode == 0
    for flag in ("--verb", "--model", "--data", "--pairs", "--repo", "--public", "--dry-run"):
        assert flag in told.stdout
    assert call(JOB, "--verb", "dance", "--model", "builtin", cwd=tmp_path).returncode == 2


def test_a_job_runs_and_checks(tmp_path):
    told = call(JOB, "--model", "builtin-64", "--data", "builtin", "--pairs", "2", "--out", "out", "--dry-run",
                "--", "--rtol", "0.9", "--no-refine", cwd=tmp_path)  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "estimated seconds" in told.stdout
    assert not (tmp_path / "out").exists()
    told = call(JOB, "--verb", "spectrum", "--model", "builtin-64", "--data", "builtin", "--pairs", "1", "--out", "out",
                "--", "--k", "1", cwd=tmp_path)  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert re.findall(r"^\+ (\w+)", told.stderr, re.MULTILINE) == ["spectrum", "verify"]
    assert "The row of out holds" in told.stdout
    assert call(JOB, "--model", "builtin-64", "--data", "none.png", cwd=tmp_path).returncode == 2


def test_a_job_publishes_last(monkeypatch):
    monkeypatch.syspath_prepend(str(JOB.parent))
    import hf_job

    given, more = hf_job.parse(["--model", "a/b", "--data", "c/d", "--repo", "e/f", "--public", "--", "--seed", "3"])
    assert hf_job.commands(given, more) == [
        ["match", "a/b", "--out", "run", "--data", "c/d", "--seed", "3"],
        ["verify", "run"],
        ["publish", "run", "e/f", "--public"],
    ]
    assert not any("publish" in command for command in hf_job.commands(*hf_job.parse(["--model", "a/b"])))
