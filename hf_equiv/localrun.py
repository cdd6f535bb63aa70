"""A finished run directory that may be published, and what is said of a folder that is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_equiv import rundir, shards
from hf_equiv.layouts import LAYOUTS
from hf_equiv.plan import default_folder
from hf_equiv.shards import MATCH, Layout, Row

CARD = "README.md"


@dataclass(frozen=True)
class LocalRun:
    """A finished run directory whose files are those that its `run.json` states.

    Attributes:
        folder: where it is.
        record: its `run.json`.
        versions: of the packages that made the rows; None where no row states them.
    """

    folder: Path
    record: Row
    versions: str | None

    @property
    def name(self) -> str:
        """`ANALYSIS-MODELSLUG-HASH8`."""
        return run_name(self.record)

    @property
    def layout(self) -> Layout:
        """Of its rows."""
        return LAYOUTS[analysis_of(self.record)]


def analysis_of(record: Mapping[str, Any]) -> str:
    """The verb of a run."""
    return str(record.get("analysis", MATCH.analysis))


def run_name(record: Mapping[str, Any]) -> str:
    """`ANALYSIS-MODELSLUG-HASH8`: runs of equal settings have equal names.

    Args:
        record: `run.json` of a run.

    Returns:
        The name of its folder in `runs/`.
    """
    place = default_folder(analysis_of(record), record["settings"])
    return "-".join(place.parts[1:])


def read_run(folder: Path) -> LocalRun:
    """Open a run directory that may be published: finished, known, and as its `run.json` states.

    Args:
        folder: run directory.

    Returns:
        The run.

    Raises:
        ValueError: it is no run, a folder of runs, not finished, of a newer version, or its files are not those that it
            states.
    """
    if inside := runs_inside(folder):
        items = "".join(f"\n- {path.as_posix()}{note}" for path, note in inside)
        raise ValueError(f"{folder_of_runs(folder, inside)} Publish each by itself:{items}")
    record = rundir.read_record(folder)
    where = repr(str(folder))
    analysis = analysis_of(record)
    if analysis not in LAYOUTS:
        raise ValueError(f"{where} holds a run of {analysis!r}, which this version of hf_equiv does not know.")
    rundir.check_record(folder, record, LAYOUTS[analysis])
    if not record["complete"]:
        raise ValueError(
            f"{where} must be a finished run; rows are missing. Run the same {analysis} command again: it makes what "
            "is left."
        )
    if "verdict" not in (record["summary"] or ()):
        raise ValueError(f"{str(folder / rundir.RECORD)!r} is damaged: it lacks summary.verdict.")
    _check_files(folder, record)
    layout = LAYOUTS[analysis]
    versions: str | None = None
    for path in shards.shard_files(folder, layout)[:1]:
        versions = next((row["versions"] for row in shards.read_shard(path, layout=layout)), None)
    return LocalRun(folder, record, versions)


def runs_inside(folder: Path) -> list[tuple[Path, str]]:
    """The runs in a folder that is none itself, each with a note in brackets where it cannot be published yet."""
    if (folder / rundir.RECORD).exists() or not folder.is_dir():
        return []
    found = []
    for path in rundir.folders_in(folder):
        try:
            record = rundir.read_record(path)
            note = "" if record.get("complete") else f" (not finished: run the same {analysis_of(record)} command)"
        except ValueError:
            note = f" (its {rundir.RECORD} cannot be read)"
        found.append((path, note))
    return found


def folder_of_runs(folder: Path, inside: Sequence[tuple[Path, str]]) -> str:
    """What is wrong with publishing such a folder."""
    several = "1 run" if len(inside) == 1 else f"{len(inside)} runs"
    return (
        f"{folder.as_posix()!r} must be one run directory; it is a folder of {several}. A dataset takes any number of "
        "runs, one after the other."
    )


def _check_files(folder: Path, record: Row) -> None:
    """Every file must be listed with its SHA-256, and lie inside the folder."""
    stated: dict[str, str] = dict(record["files"])
    own = {path.relative_to(folder).as_posix(): path for path in rundir.own_files(folder)}
    if record.get("card") == "dataset":  # the card of a dataset is its owner's
        own.pop(CARD, None)
    wrong = [f"{name} is missing" for name in stated if name not in own]
    wrong += [f"{name} is not listed" for name in own if name not in stated]
    wrong += [f"{name} has changed" for name, path in own.items() if stated.get(name) != shards.sha256_file(path)
              and name in stated]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{str(folder)!r} must be as its run.json states; {', '.join(wrong[:3])}{more}. `hf-equiv verify` shows "
            "what does not hold; run the analysis again with --overwrite always to make it anew."
        )
