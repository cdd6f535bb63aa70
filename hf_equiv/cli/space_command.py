"""The `space` commands: serve the app here, or deploy it to a Space on the Hub."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_equiv.cli import environment, output, progress
from hf_equiv.cli.output import in_flags
from hf_equiv.formatting import size

if TYPE_CHECKING:
    from hf_equiv.hub.space import SpaceDeployment

_MODULE = "hf_equiv_space_app"
"""Name of the app as a module: it lies in no package."""


def run(*, host: str, port: int, dataset: str | None, models: Sequence[str], share: bool) -> int:
    """Carry out `hf-equiv space run`: serve the app until it is stopped."""
    from hf_equiv.hub.space_files import DATASET, MODELS

    if any("," in model for model in models):
        raise ValueError(f"`models` must be names without commas; got {', '.join(models)}. Repeat the flag.")
    if dataset is not None:
        os.environ[DATASET] = dataset
    if models:
        os.environ[MODELS] = ",".join(models)
    _refuse_taken(host, port)
    load_app().main(host=host, port=port, share=share)
    return 0


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = f"{error.strerror or error}"
            raise ValueError(f"`port` must be free; got {port} of {host}: {why}. Choose another.") from error


def load_app() -> ModuleType:
    """Import the app of this installation.

    Returns:
        The module, with `build_demo` and `main`.

    Raises:
        ImportError: gradio is missing.
    """
    from hf_equiv.hub.space_files import APP, app_folder

    if importlib.util.find_spec("gradio") is None:
        raise ImportError('the app needs gradio, which is not installed. Run pip install "hf_equiv[space]".')
    folder = app_folder()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # as in a Space, where files beside the app can be imported
    spec = importlib.util.spec_from_file_location(_MODULE, folder / APP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    spec.loader.exec_module(module)
    return module


def deploy(repo_id: str, *, as_json: bool, quiet: bool, wheel: Path | None, **given: Any) -> int:
    """Carry out `hf-equiv space deploy`; returns the exit code."""
    with output.result_stream() as out:
        from hf_equiv.hub.space import SpaceError, deploy_space

        environment.calm(quiet=True)  # one bar, ours
        failed: SpaceError | None = None
        try:
            with progress.transfer(quiet=as_json or quiet, what="deploying") as report:
                done = deploy_space(repo_id, wheel=wheel, progress=report, **given)
        except SpaceError as error:
            failed, done = error, error.deployment
        if as_json:
            output.print_json(asdict(done) | {"error": None if failed is None else str(failed)}, out)
        elif not quiet:
            _print(done, out)
        if failed is not None:
            output.to_stderr(f"error: {in_flags(str(failed))}")
    return 0 if failed is None else 1


def _by_folder(files: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """(number, bytes) of the files at the top and of the folders there."""
    found: dict[str, tuple[int, int]] = {}
    for path, count in sorted(files.items()):
        top, slash, _ = path.partition("/")
        number, total = found.get(top + slash, (0, 0))
        found[top + slash] = (number + 1, total + count)
    return found


def _print(done: SpaceDeployment, out: Any) -> None:
    console = output.console_of(out)

    def line(name: str, text: str) -> None:
        console.print(f"{name + ':':<11}{text}", highlight=False, markup=False, soft_wrap=True)

    sent = size(sum(count for _, count in done.uploaded))
    told = f"{len(done.uploaded)} of {done.files} files" if len(done.uploaded) < done.files else f"{done.files} files"
    told += f", {sent}" + (f", {len(done.deleted)} removed" if done.deleted else "")
    if done.dry_run and done.changed:
        verb = "make the Space" if done.made else "bring the Space up to date"
        line("would do", f"{verb}; nothing was written")
        for sign, files in (("+", dict(done.uploaded)), ("-", dict.fromkeys(done.deleted, 0))):
            for name, (number, total) in _by_folder(files).items():
                amount = size(total) if sign == "+" else ""
                shown = f"  {sign} {amount:>8}  {name}" + (f" ({number} files)" if number > 1 else "")
                console.print(shown, highlight=False, markup=False, soft_wrap=True)
        line("in all", told)
    elif done.dry_run:
        line("would do", "nothing: the Space is as it should be")
    elif not done.changed:
        line("unchanged", "the Space is as it should be; nothing was committed")
    else:
        line("made" if done.made else "updated", f"{told}, commit {str(done.commit)[:8]}")
    line("space", f"{done.url} ({'private' if done.private else 'public'})")
    line("library", done.library)
    for key, value in done.variables.items():
        line("variable", f"{key}={value}")
    if done.hardware:
        line("hardware", done.hardware)
    if done.stage:
        line("stage", done.stage.lower().replace("_", " "))
    for text in done.warnings:
        line("warning", in_flags(text))
