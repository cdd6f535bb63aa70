"""What the tests of publishing share: finished runs that cost nothing, and what a dataset on the loopback Hub holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fakes import TinyEncoder, save_photos
from loopback_hub import Hub

from hf_equiv import shards
from hf_equiv.geometryplan import AnalysisConfig, make_analysis_plan
from hf_equiv.geometryrun import run_analysis
from hf_equiv.plan import RunConfig, make_plan
from hf_equiv.run import run_match

NAME = "alice/results"


def make_runs(folder: Path) -> dict[str, Path]:
    """Finished runs: of built-in photos, of a folder, and of each other analysis."""
    made: dict[str, Path] = {}

    def match(name: str, **options: Any) -> None:
        made[name] = folder / name
        run_match(make_plan(RunConfig(max_evals=40, **options), TinyEncoder()), made[name], batch_size=1)

    match("match", data="builtin", pairs=2)
    match("seed", data="builtin", pairs=2, seed=1)
    match("folder", data=str(save_photos(folder / "photos")), pairs=2)
    for analysis, options in {
        "walk": {"num_steps": 2},
        "spectrum": {"vectors": True},
        "lipschitz": {"directions": "random:1,top:1"},
    }.items():
        made[analysis] = folder / analysis
        config = AnalysisConfig(analysis, data="builtin", limit=2, **options)
        run_analysis(make_analysis_plan(config, TinyEncoder()), made[analysis])
    return made


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


def reseal(folder: Path, files: tuple[str, ...] = ()) -> None:
    """Bring the hashes of run.json up to date, as a careful forger would."""
    record = json.loads((folder / "run.json").read_text())
    record["files"] = {name: shards.sha256_file(folder / name) for name in [*record["files"], *files]}
    (folder / "run.json").write_text(json.dumps(record))
