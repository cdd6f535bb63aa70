"""Runs beside a new one that differ from it by the state of their images alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hf_equiv import retry, rundir
from hf_equiv.shards import Layout, Row


def other_states(folder: Path, settings: Row, items: Sequence[Row], layout: Layout) -> tuple[str, ...]:
    """Say which run beside a new run directory is the same but for the state of the data.

    The hash in the name of the default directory holds this state: when a photo has been mended, the same command
    begins another run.

    Args:
        folder: run directory that is about to be made.
        settings: everything that changes a number.
        items: the pairs or images as `run.json` would list them.
        layout: folder and columns.

    Returns:
        One sentence, of the run whose rows can be kept if there is one, else of the latest; none if there is no such
        run, or if `folder` holds a run already.
    """
    if (folder / rundir.RECORD).exists():
        return ()
    found: list[tuple[bool, float, Path]] = []
    for path in folder.parent.glob(f"*/{rundir.RECORD}"):
        try:
            record = rundir.read_record(path.parent)
            rundir.check_record(path.parent, record, layout)
            changed = path.stat().st_mtime
        except (ValueError, OSError):  # damaged, or gone since: no business of the new run
            continue
        if record["settings"] | {"data_revision": settings["data_revision"]} == settings:
            found.append((retry.is_mended(record[layout.listed], items), changed, path.parent))
    if not found:
        return ()
    mended, _, place = max(found)
    same = f"{place} holds the same run over another state of the data"
    if mended:
        return (f"{same}: --out {shlex.quote(str(place))} would keep its rows; this run begins anew",)
    return (f"{same}, of which not only unusable images have changed; this run begins anew",)
