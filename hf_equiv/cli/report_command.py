"""The `report` command: make the page, write it, say where it is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hf_equiv.cli import environment, output, progress


def run(paths: tuple[str, ...], **given: Any) -> int:
    """Carry out `hf-equiv report`; returns the exit code."""
    with output.result_stream() as out:
        from hf_equiv.report.collect import default_out
        from hf_equiv.report.page import make_report

        as_json, quiet = given["as_json"], given["as_json"] or given["quiet"]
        path: Path = given["out"] or default_out(paths)
        if path.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"`out` must be a file name ending in .html; got {str(path)!r}.")
        _refuse_unwritable(path)
        environment.calm(quiet=quiet)
        with progress.staged_counter(quiet=quiet) as tell:
            report = make_report(
                paths, transfer=given["transfer"], label_data=given["label_data"], survival=not given["no_survival"],
                model=given["model"], out=path, device=given["device"], cache_dir=given["cache_dir"],
                local_files_only=given["local_files_only"], observer=tell,
            )  # fmt: skip
        report.write(path)
        made = {"report": str(path), "markdown": str(path.with_suffix(".md"))}
        if as_json:
            output.print_json({"analysis": "report", "out": str(path), **report.numbers}, out)
        elif not given["quiet"]:
            output.print_summary(report, made, out)
        for problem in report.problems if quiet else ():
            output.to_stderr(f"not complete: {problem}")
        return 1 if report.problems else 0


def _refuse_unwritable(path: Path) -> None:
    """Say so before anything is measured; nothing is left."""
    there = next(place for place in path.absolute().parents if place.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".hf-equiv-", dir=there):
            pass
    except OSError as error:
        raise ValueError(f"`out` {str(path)!r} cannot be written: {error.strerror}. Name another place.") from error
