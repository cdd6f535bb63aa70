"""The `publish` command: what would be done or what was done, as text or JSON."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_equiv.cli import environment, output, progress
from hf_equiv.cli.output import in_flags
from hf_equiv.formatting import size

if TYPE_CHECKING:
    from hf_equiv.hub.publish import Published

_SHOWN = 40
"""Files listed by a dry run; the rest is counted."""


def run(directory: Path, repo_id: str, *, as_json: bool, quiet: bool, **given: Any) -> int:
    """Carry out `hf-equiv publish`; returns the exit code."""
    with output.result_stream() as out:
        from hf_equiv.hub.publish import publish_results
        from hf_equiv.runs.directory import folder_of_runs, runs_inside

        if inside := runs_inside(directory):
            commands = (f"{_command(path, repo_id, given)}{note}" for path, note in inside)
            raise ValueError(folder_of_runs(directory, inside) + " Publish each:\n- " + "\n- ".join(commands))
        environment.calm(quiet=True)  # one bar, ours
        try:
            with progress.transfer(quiet=as_json or quiet, what="publishing") as report:
                done = publish_results(directory, repo_id, progress=report, **given)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "interrupted. The same command goes on: what was uploaded is not sent twice, and a commit that was "
                "made is found."
            ) from None
        if as_json:
            output.print_json(asdict(done), out)
        elif not quiet:
            _print(done, out)
    return 0


def _command(path: Path, repo_id: str, given: Mapping[str, Any]) -> str:
    """The command for one run, with the flags that were given."""
    words = ["hf-equiv", "publish", path.as_posix(), repo_id]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if name == "private" and value is not None:
            words.append("--private" if value else "--public")
        elif value is True:
            words.append(flag)
        elif value not in (None, False):
            words += [flag, str(value)]
    return shlex.join(words)


def _print(done: Published, out: Any) -> None:
    console = output.console_of(out)

    def line(name: str, text: str) -> None:
        console.print(f"{name + ':':<11}{text}", highlight=False, markup=False, soft_wrap=True)

    seen = {True: "private", False: "public", None: "visibility is its owner's"}[done.private]
    place = f" in {done.place}/" if done.place else ""
    if done.dry_run:
        _print_plan(done, seen, place, console, line)
    elif not done.changed:
        line("unchanged", f"{done.run}{place} is there as it is here; nothing was committed")
    else:
        one = (
            f"{len(done.uploaded)} of {done.files} files" if len(done.uploaded) < done.files else f"{done.files} files"
        )
        told = f"{done.run}{place}: {one}, {size(sum(n for _, n in done.uploaded))}"
        told += f", {len(done.deleted)} removed" if done.deleted else ""
        line("proposed" if done.pr_url else "published", f"{told}, in one commit {str(done.commit)[:8]}")
    line("dataset", f"{done.url} ({seen})")
    if done.pr_url:
        line("request", done.pr_url)
    if done.collection:
        kind = {True: " (private)", False: " (public)", None: ""}[done.collection_private]
        if done.collection_private and done.private is False:
            kind = " (private: only you see it, unlike the dataset; its page lets you make it public)"
        line("list", f"{done.url.split('/datasets/')[0]}/collections/{done.collection}{kind}")
    verb = "would be in" if done.dry_run else "are in"
    photos = f"{verb} ({done.why})" if done.photos else f"WITHHELD: image columns are empty ({done.why})"
    line("photos", f"{photos}. {in_flags(done.how_to_change)}")
    if done.refused:
        line("refused", f"publishing would be, as things are: {in_flags(done.refused)}")
    if not done.dry_run:
        at = "" if done.revision == "main" else f"@{done.revision}"
        rest = f', revision="{done.revision}"' if at else ""
        config = _config(done)
        line("load", f'datasets.load_dataset("{done.repo_id}", "{config}", split="train"{rest})')
        line("check it", f"hf-equiv verify {done.repo_id}{at}" + ("" if done.photos else " --allow-withheld"))


def _config(done: Published) -> str:
    from hf_equiv.runs.schema import LAYOUTS

    return LAYOUTS[done.run.split("-")[0]].folder


def _print_plan(done: Published, seen: str, place: str, console: Any, line: Callable[[str, str], None]) -> None:
    """What a dry run found."""
    if not done.changed:
        line("would do", f"nothing: {done.run}{place} is there as it is here")
        return
    line("would do", f"commit {done.run}{place} to {done.revision}; nothing was written")
    for path, count in done.uploaded[:_SHOWN]:
        console.print(f"  + {size(count):>8}  {path}", highlight=False, markup=False, soft_wrap=True)
    if len(done.uploaded) > _SHOWN:
        console.print(f"  … and {len(done.uploaded) - _SHOWN} more files", highlight=False, markup=False)
    for path in done.deleted:
        console.print(f"  -           {path}", highlight=False, markup=False, soft_wrap=True)
    line("in all", f"{len(done.uploaded)} files, {size(sum(n for _, n in done.uploaded))}; {seen}")
    console.print("\ncard (README.md of the dataset):", highlight=False, markup=False)
    for text in done.card.splitlines():
        console.print(f"  | {text}".rstrip(), highlight=False, markup=False, soft_wrap=True)
    console.print()
