"""Where a report finds things: run directories by name or folder, the checkpoints of runs, and other checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_equiv import rundir
from hf_equiv.hubload import download_results
from hf_equiv.recordedmodel import load_recorded
from hf_equiv.reportruns import Checkpoint

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder

_FAILURES = (ValueError, OSError, RuntimeError, ImportError)  # of a model that cannot be loaded; the rest is a bug


@dataclass(frozen=True, slots=True)
class Place:
    """Where models and data are looked for, and where is computed.

    Attributes:
        device: by default CUDA if there is one.
        cache_dir: the Hub's cache.
        local_files_only: never ask the Hub.
    """

    device: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False


def locate(name: str, place: Place) -> tuple[str, Path]:
    """Find a folder, or download the dataset USER/NAME or USER/NAME@REVISION where there is no such folder.

    Args:
        name: a path or a dataset.
        place: where to look.

    Returns:
        What the report calls it, never an absolute path, a dataset with its commit; and the folder.
    """
    path = Path(name).expanduser()
    dataset = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(.+))?", name)
    if dataset and not path.exists():
        folder, commit = download_results(
            dataset[1], revision=dataset[2], cache_dir=place.cache_dir, local_files_only=place.local_files_only
        )
        return f"{dataset[1]}@{commit[:8]}", Path(folder)
    return (path.resolve().name if path.is_absolute() or ".." in path.parts or name == "." else path.as_posix()), path


def load_own(checkpoint: Checkpoint, models: Sequence[str], place: Place) -> tuple[Encoder | None, str]:
    """Load the encoder of a checkpoint's runs.

    Args:
        checkpoint: whose.
        models: where local checkpoints are; the one of the recorded revision is taken.
        place: where to look.

    Returns:
        The encoder, or None and why not.
    """
    reasons: list[str] = []
    local = checkpoint.revision.startswith("sha256:") and checkpoint.model_id != "builtin"
    for model in [*models, None] if local else [None]:
        try:
            encoder = load_recorded(checkpoint.settings, model, place.device, place.cache_dir, place.local_files_only)
        except _FAILURES as error:
            reasons.append(_one_line(error))
            continue
        if encoder.revision == checkpoint.revision:
            return encoder, ""
        reasons.append(
            f"the weights of {encoder.model_id!r} have the revision {encoder.revision[:19]}; the run used "
            f"{checkpoint.revision[:19]}"
        )
    return None, f"its model could not be loaded: {reasons[0].rstrip('.')}"


def load_other(name: str, place: Place) -> Encoder | str:
    """Load another checkpoint by name; if that fails, say why."""
    from hf_equiv.encoder import Encoder

    try:
        return Encoder.from_pretrained(
            name, device=place.device, cache_dir=place.cache_dir, local_files_only=place.local_files_only
        )
    except _FAILURES as error:
        return f"transfer to {Path(name).name if Path(name).is_dir() else name}: {_one_line(error)}"


def default_out(paths: Sequence[str | Path]) -> Path:
    """Name the page after the models of the runs: `reports/MODEL.html` in the current folder.

    Args:
        paths: of the report.

    Returns:
        The path; `reports/report.html` where no model is known.

    Raises:
        ValueError: a damaged run directory.
    """
    slugs: dict[str, None] = {}
    for path in map(Path, paths):
        for record in sorted(path.rglob(rundir.RECORD)) if path.is_dir() else ():
            name = str(rundir.read_record(record.parent)["settings"]["model_id"])
            slugs[re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip(".-") or "model"] = None
        if not path.exists():
            slugs[re.sub(r"[^A-Za-z0-9._-]+", "--", str(path).split("@")[0]).strip(".-")] = None
    return Path("reports") / f"{'-and-'.join(list(slugs)[:4])[:120] or 'report'}.html"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
