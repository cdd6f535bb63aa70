"""Verify every run of a dataset, on the Hub or in a folder, and the dataset's own card."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_equiv.analyses.measures import largest
from hf_equiv.hub import card as hub_card
from hf_equiv.hub.dataset_files import BESIDE_RUNS, FOR_LOADING
from hf_equiv.hub.load import download_results, foreign_files, local_folder, run_folders, split_name
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.recorded import is_local
from hf_equiv.runs import directory
from hf_equiv.runs.directory import CARD, RUNS, run_name
from hf_equiv.runs.schema import Row
from hf_equiv.verify.directory import VerifyReport, compare_lines, first_cell, verify_run
from hf_equiv.verify.rows import Problem, differs, problem


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """The findings of `verify_results`."""

    runs: tuple[VerifyReport, ...]  # the findings of each run; files are named inside the dataset
    card_problems: tuple[Problem, ...]  # problems of the dataset's card, and of files that belong to no run
    repo_id: str | None = None  # the dataset on the Hub; None for a folder
    commit: str | None = None  # the commit that was verified; None for a folder
    elsewhere: tuple[str, ...] = ()  # parts of the card that no run gives

    @property
    def holds(self) -> bool:
        """Whether every run holds and the card agrees with the runs."""
        return bool(self.runs) and not self.card_problems and all(run.holds for run in self.runs)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All problems of the runs and of the card."""
        return (*(problem for run in self.runs for problem in run.problems), *self.card_problems)

    @property
    def total(self) -> VerifyReport:
        """All runs as one report: summed counts and the worst error."""
        counts = ("rows", "verified", "failed", "error_rows", "withheld")
        added: dict[str, Any] = {key: sum(getattr(run, key) for run in self.runs) for key in counts}
        errors = ("worst_embedding_error", "worst_embedding_error_8bit")
        added |= {key: largest(getattr(run, key) for run in self.runs) for key in errors}
        return VerifyReport(**added, problems=self.problems)

    def to_json(self) -> dict[str, Any]:
        """Return the totals as for one run, with the name and commit on the Hub, and the runs if there are several."""
        data = self.total.to_json()
        if self.repo_id is not None:
            data |= {"dataset": self.repo_id, "commit": self.commit}
        data["unverified"] = list(dict.fromkeys([n for run in self.runs for n in run.unverified] + [*self.elsewhere]))
        if len(self.runs) > 1:
            data["runs"] = [
                {"run": run.name, "path": run.place, "analysis": run.analysis, "model": run.model,
                 "revision": run.revision} | run.to_json()
                for run in self.runs
            ]  # fmt: skip
        return data


def verify_results(
    where: str | os.PathLike[str],
    *,
    revision: str | None = None,
    model: str | Encoder | None = None,
    device: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    allow_withheld: bool = False,
    observer: Callable[[int, int], None] | None = None,
) -> DatasetReport:
    """Check a dataset `USER/NAME[@REVISION]` of the Hub, or a folder: every run as `verify_run` does, and the card."""
    # Each run's model is loaded at its recorded commit. Branches and tags that have moved since change nothing; a
    # commit that is gone, or that the rows and `run.json` state differently, is a problem. `revision` belongs to the
    # dataset: a branch, tag, commit or `refs/pr/N`. `model` is the place of the checkpoint, if the runs used a folder.
    folder, repo_id, commit = local_folder(where, revision), None, None
    if folder is None:
        repo_id, revision = split_name(os.fspath(where), revision)
        folder, commit = download_results(
            repo_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
    places = run_folders(folder) or {"": folder}  # `verify_run` refuses a folder that is no run, by name
    records = {place: directory.read_record(path) for place, path in places.items()}
    runs: list[VerifyReport] = []
    for place, path in places.items():
        own = len(places) == 1 or is_local(records[place]["settings"])
        report = verify_run(
            path, model=model if own else None, device=device, cache_dir=cache_dir,
            local_files_only=local_files_only, allow_withheld=allow_withheld, observer=observer,
        )  # fmt: skip
        inside = f"{place}/" if place else ""
        named = tuple(replace(p, file=inside + p.file, message=inside + p.message) for p in report.problems)
        runs.append(replace(report, place=place, problems=named))
    several = len(places) > 1 or records[next(iter(places))].get("card") == "dataset"
    card_problems = tuple(_check_card(folder / CARD, records, repo_id)) if several else ()
    found = (*_check_folders(folder, records), *card_problems)
    left = [*_left_open(folder / CARD, records)] if several and not card_problems else []
    if repo_id is not None and local_files_only:
        left.append("files on the Hub that belong to no run")
    elif repo_id is not None and commit is not None:  # they are not downloaded
        foreign = foreign_files(repo_id, commit, places, token)
        found += tuple(problem(name, None, "file", name, None, "this belongs to no run") for name in foreign)
    return DatasetReport(tuple(runs), found, repo_id, commit, tuple(left))


def _check_folders(folder: Path, records: dict[str, Row]) -> Iterator[Problem]:
    """Check that the folders in `runs/` are runs, named by their settings."""
    for path in sorted((folder / RUNS).glob("*")):
        if (name := f"{RUNS}/{path.name}") not in records:
            yield problem(name, None, "file", directory.RECORD, None, f"this is no run: it has no {directory.RECORD}")
    for path in sorted(folder.glob("*")) if "" not in records else ():
        if path.name not in (RUNS, *BESIDE_RUNS) and (path.name in FOR_LOADING or not path.name.startswith(".")):
            yield problem(path.name, None, "file", path.name, None, "this belongs to no run")
    names = Counter(map(run_name, records.values()))
    for place, record in records.items():
        name, file = run_name(record), f"{place}/{directory.RECORD}"
        if place and names[name] > 1:
            yield problem(file, None, "settings", place, None, "another run has the same settings: it is there twice")
        if place and record.get("card") == "dataset":
            yield problem(file, None, "card", "dataset", None, "only the run at the root may say so")
        if place and (folder / place / RUNS).exists():
            yield problem(f"{place}/{RUNS}", None, "file", RUNS, None, "a run holds no runs")
        if place and place != f"{RUNS}/{name}":
            told = f"its settings are those of {name}"
            yield problem(f"{place}/{directory.RECORD}", None, "settings", place, name, told)


def _left_open(path: Path, records: dict[str, Row]) -> Iterator[str]:
    """Name the parts of the card that no run gives."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if "<!-- hf_equiv: from here" in text and hub_card.START not in text:
        yield f"words and order of {CARD} (of an earlier version)"
    (header, _), (made, _) = (hub_card.split_header(one) for one in (text, hub_card.dataset_card("", records)))
    own = hub_card.around_block(text[text.find("\n---", 3) + 4 :] if header else text, "the dataset")
    if header != made or "".join(own).strip():
        yield f"the owner's own text and header keys in {CARD}"


def _check_card(path: Path, records: dict[str, Row], repo_id: str | None) -> Iterator[Problem]:
    """Check that the generated part of the card and its configurations agree with the runs."""
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    try:
        parts = hub_card.generated_parts(text, records, repo_id)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # an incomplete record
        told = f"no card can be made of the runs' records ({type(error).__name__}: {error})"
        yield problem(CARD, None, "card", "what the runs say", None, told)
        return
    if parts is None:
        wanted = "the part that publishing writes"
        yield problem(CARD, None, "card", wanted, None, f"{wanted} must be there once")
        return
    if parts[0].startswith(hub_card.START):
        yield from compare_lines(*parts, "the runs say", "no run says")
    else:  # an earlier version wrote other sentences
        for line in hub_card.unknown_numbers(*parts):
            yield problem(CARD, None, first_cell(line), line, None, f"the card says what no run says: {line}")
    header, own = hub_card.split_header(text)[0], hub_card.configs_of(records)
    configs = [item for item in header.get("configs") or [] if isinstance(item, dict)]
    for config in own:  # `load_dataset` reads the files that the header names
        name = config["config_name"]
        stated = [item for item in configs if item.get("config_name") == name]
        if stated != [config]:
            yield differs(CARD, None, f"configs.{name}", stated, [config])
    for key in hub_card.doubled_keys(text):
        yield problem(CARD, None, key, "twice", "once", f"the header has the key {key!r} twice")
    known = [config["config_name"] for config in own]
    foreign = [f"configs.{item.get('config_name')}" for item in configs if item.get("config_name") not in known]
    for key in foreign + [key for key in ("dataset_info", "builder_name") if key in header]:
        yield problem(CARD, None, key, key, None, f"the header has {key}, which belongs to no run")
