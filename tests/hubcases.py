"""What the tests of publishing share: finished runs that cost nothing, and what a dataset on the loopback Hub holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fakes import TinyEncoder, save_photos
from loopback_hub import Hub

from hf_equiv.analyses import MatchConfig, make_plan, run_analysis
from hf_equiv.analyses.run import VERBS
from hf_equiv.cli.main import _run
from hf_equiv.runs.directory import read_run
from hf_equiv.verify.dataset import verify_results

NAME = "alice/results"


def make_runs(folder: Path) -> dict[str, Path]:
    """Finished runs: of built-in photos, of a folder, and of each other analysis."""
    made: dict[str, Path] = {}

    def match(name: str, **options: Any) -> None:
        made[name] = folder / name
        run_analysis(make_plan(MatchConfig(max_evals=40, **options), TinyEncoder()), made[name], batch_size=1)

    match("match", data="builtin", pairs=2)
    match("seed", data="builtin", pairs=2, seed=1)
    match("folder", data=str(save_photos(folder / "photos")), pairs=2)
    for analysis, options in {
        "walk": {"num_steps": 2},
        "spectrum": {"vectors": True},
        "lipschitz": {"directions": "random:1,top:1"},
    }.items():
        made[analysis] = folder / analysis
        config = VERBS[analysis].CONFIG(data="builtin", limit=2, **options)
        run_analysis(make_plan(config, TinyEncoder()), made[analysis])
    return made


def surroundings(home: Path, endpoint: str, **more: str) -> dict[str, str]:
    """Environment of a process of its own: this package, that Hub, and nothing of this process's Hub settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    return kept | settings | more


def contents(folder: Path) -> dict[str, bytes]:
    """Path to content of a run directory, but run.json and the card, which publishing writes anew."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name not in ("run.json", "README.md", ".lock")}


def at_root(hub: Hub, name: str = NAME, revision: str = "main") -> dict[str, bytes]:
    """What the run at the root of a dataset holds."""
    beside = ("run.json", "README.md", ".gitattributes")
    files = hub.files("datasets", name, revision)
    return {p: data for p, data in files.items() if p not in beside and not p.startswith("runs/")}


def titles(hub: Hub, name: str = NAME, revision: str = "main") -> list[str]:
    """Titles of the commits, newest first."""
    repo = hub.repos["datasets", name]
    found, at = [], repo.at(revision)
    while True:
        found.append(at.title)
        if at.parent is None:
            return found
        at = repo.commits[at.parent]


def record_of(hub: Hub, place: str = "", name: str = NAME, revision: str = "main") -> dict[str, Any]:
    """The run.json of a run of a dataset."""
    data: dict[str, Any] = json.loads(hub.files("datasets", name, revision)[f"{place}run.json"])
    return data


def whole(
    hub: Hub, runs: dict[str, Path], commits: int, names: tuple[str, ...] = ("seed", "match"), *,
    repo: str = NAME, revision: str = "main",
) -> None:  # fmt: skip
    """The dataset holds these runs and nothing else, each whole and once, the first at the root, in so many commits."""
    report = verify_results(repo, revision=revision)
    assert report.problems == ()
    assert len(report.runs) == len(names)
    assert len(titles(hub, repo, revision)) == commits
    files = hub.files("datasets", repo, revision)
    expected = {".gitattributes", "README.md"}
    by_name = {read_run(runs[name]).name: runs[name] for name in names}
    assert {run.name for run in report.runs} == set(by_name)
    for run in report.runs:
        inside = f"{run.place}/" if run.place else ""
        local = contents(by_name[run.name])
        assert {name: files[inside + name] for name in local} == local
        expected |= {inside + name for name in (*local, "run.json", *(["README.md"] if inside else []))}
    assert set(files) == expected


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = _run([str(a) for a in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err
