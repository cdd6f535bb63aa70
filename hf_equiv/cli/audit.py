"""Define `hf-equiv audit`: the runs and the report that say whether an encoder is exposed, by one command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_equiv.cli.analyses import compute, config_of, costs, count_evaluations, interruptible, load, where_of
from hf_equiv.cli.options import COUNT, images_option, model_options, names, option, run_options
from hf_equiv.cli.streams import to_stderr
from hf_equiv.formatting import many

if TYPE_CHECKING:
    from hf_equiv.analyses.plan import Plan
    from hf_equiv.analyses.run import RunOutcome

_PHOTOS = 10  # photos of spectrum and constants; with fewer, a verdict of the report has a caveat
_PAGE = "page with JPEG, resizing and blur (time without figures)"
_PAGE_COST = 38 / 3  # evaluations per pair


@dataclass(frozen=True)
class Part:
    """One run of an audit."""

    plan: Plan
    folder: Path
    to_do: int  # pairs or photos without a row
    evaluations: float  # a rough count of those that they need

    @property
    def title(self) -> str:
        """Name of the part for a person."""
        config = self.plan.config
        if config.analysis != "match":
            return {"spectrum": "spectrum", "lipschitz": "local constants"}[config.analysis]
        return f"match within {config.radius * 255:.0f}/255" if config.radius else "match without a limit"

    @property
    def amount(self) -> str:
        """The number of pairs or photos, and of those to do."""
        total, what = len(self.plan.items), "pair" if self.plan.config.analysis == "match" else "photo"
        return many(total, what) + ("" if self.to_do == total else f", {self.to_do} to do")


@click.command()
@click.argument("model")
@images_option("--data", "Your photos: a folder, a parquet file or a Hub dataset, best with classes.")
@option("--pairs", "Number of pairs to draw from --data. Default: 10, or as many as exist.", "N", COUNT)
@option("--labels", "Class names for zero-shot labels (CLIP, SigLIP).", "A,B,C", names)
@model_options
@option("--out", "Folder of page and runs. Default: runs/audit/MODEL/HASH8.", "DIR", click.Path(path_type=Path))
@run_options
def audit(**given: Any) -> int:
    """Answer whether an encoder is exposed: can photos be changed to pass for others?

    Matches pairs of photos without a limit and within 16, 8, 4 and 2 levels of 255, measures spectrum and local
    constants of some photos, and writes the page of hf-equiv report, with survival of JPEG, resizing and blur. It
    first says how long that takes. You can stop it with Ctrl-C at any time and continue with the same command.

    \b
    hf-equiv audit builtin
    hf-equiv audit facebook/deit-tiny-patch16-224 --data photos/ --pairs 20

    Files: report.html, and a run directory for each part.

    Exit code 1: a pair or photo could not be computed, or a part of the page could not be measured. A pair that cannot
    be matched is a result.
    """  # noqa: D301, DOC201 (this is the help text, and click looks for the backspace itself)
    from hf_equiv.cli import environment, output, progress

    quiet = given["as_json"] or given["quiet"]
    with environment.calm(quiet=quiet):
        plans = _plans(given)
        out = given["out"] or _default_out(plans)
        parts = _parts(plans, out, given["overwrite"])
        facts = _estimate(parts)
    settings = plans["match"].settings
    result = {"analysis": "audit", "model": settings["model_id"], "revision": settings["model_revision"]}
    result["out"] = str(out)
    if given["dry_run"]:
        if environment.is_first():
            output.print_plan(facts, result | {"runs": []} if given["as_json"] else None)
        return 0
    device = environment.place(plans["match"].encoder.device)
    progress.say([*facts["choices"], *device, output.time_in_words(facts)], quiet=quiet)
    with interruptible({part.folder: part.plan for part in parts}, out, "pairs and photos of all parts"):
        done = [_compute(part, f"part {place} of {len(parts) + 1}", given) for place, part in enumerate(parts, 1)]
        return _finish(result, done, out, given) if environment.is_first() else 0


def _plans(given: dict[str, Any]) -> dict[str, Plan]:
    """Return the plans by the names of their folders, in the order of the work."""
    from hf_equiv.analyses import LipschitzConfig, MatchConfig, SpectrumConfig
    from hf_equiv.analyses.plan import make_plan, with_config
    from hf_equiv.models.places import BUILTINS
    from hf_equiv.report.collect import AUDIT_LEVELS

    if given["model"] in BUILTINS and given["data"] is None:
        given = given | {"data": "builtin"}
    free, where = config_of(MatchConfig, given), where_of(given)
    few = given | {"limit": _PHOTOS, "dtype": "float32" if free.half else free.dtype}
    encoder = load(free, given)
    match = make_plan(free, encoder, **where)
    balls = {f"match-{k}": with_config(match, replace(free, radius=k / 255)) for k in AUDIT_LEVELS}
    spectrum = make_plan(config_of(SpectrumConfig, few), encoder, **where)
    directions = f"random:8,top:{min(4, encoder.embedding_dim)},null:8"
    constants = config_of(LipschitzConfig, few | {"directions": directions, "linearity": True})
    return {"match": match, **balls, "spectrum": spectrum, "lipschitz": with_config(spectrum, constants)}


def _default_out(plans: Mapping[str, Plan]) -> Path:
    """Return `runs/audit/MODEL-slug/HASH8`, the hash of the settings of all runs."""
    from hf_equiv.runs.directory import default_folder

    settings = {name: plan.settings for name, plan in plans.items()}
    return default_folder("audit", {"model_id": plans["match"].settings["model_id"], "runs": settings})


def _parts(plans: Mapping[str, Plan], out: Path, overwrite: str) -> list[Part]:
    """Return the parts with the work that is left; refuse folders that cannot be used."""
    from hf_equiv.runs import directory, resume

    if (out / directory.RECORD).exists():
        raise ValueError(f"`out` must be a folder of runs; {str(out)!r} is a run directory. Give another --out.")
    parts = []
    for name, plan in plans.items():
        failing = sum(bool(item.unusable) for item in plan.items)
        to_do = len(plan.items) - resume.refuse_early(out / name, plan, overwrite)
        parts.append(Part(plan, out / name, to_do, (to_do - min(failing, to_do)) * count_evaluations(plan)))
    return parts


def _estimate(parts: list[Part]) -> dict[str, Any]:
    """Return the facts of a dry run: the evaluations of each part, and the time of one on this checkpoint."""
    match = parts[0].plan
    counts = {part.folder.name: round(part.evaluations) for part in parts}
    counts["report"] = round(_PAGE_COST * len(match.items))
    return {
        "model": match.settings["model_id"],
        "revision": match.settings["model_revision"],
        "photos": match.settings["data_id"],
        "unusable_images": dict(why for part in parts for item in part.plan.items for why in item.unusable),
        "choices": list(dict.fromkeys(choice for part in parts for choice in part.plan.choices)),
        "parts": {part.folder.name: f"{part.title}, {part.amount}" for part in parts} | {"report": _PAGE},
        "out": str(parts[0].folder.parent),
        **costs(match, counts),
    }


def _compute(part: Part, place: str, given: dict[str, Any]) -> RunOutcome:
    """Carry out a part, and say what it gave."""
    from hf_equiv.cli import progress

    quiet = given["as_json"] or given["quiet"]
    progress.say([f"{place}: {part.title}, {part.amount}"], quiet=quiet)
    outcome = compute(part.plan, part.folder, given)
    progress.say([f"  {outcome.summary['verdict']}"], quiet=quiet)
    return outcome


def _finish(result: dict[str, Any], done: list[RunOutcome], out: Path, given: dict[str, Any]) -> int:
    """Write the page, print its answer and where everything is, and return the exit code."""
    from hf_equiv.cli import environment, output, progress
    from hf_equiv.report.claims import say
    from hf_equiv.report.page import make_report

    path, quiet = out / "report.html", given["as_json"] or given["quiet"]
    how = {"model": given["model"], "device": given["device"], **where_of(given)}
    how |= {"model": environment.import_encoder(given["import_"])} if given["import_"] else {}
    with progress.steps(quiet=quiet, amount=progress.count) as tell:
        runs = [run.out for run in done]
        page = make_report(runs, out=path, observer=lambda step, now, total: tell(now, total, step), **how)
    page.write(path)
    answer = next(iter(say("summary", page.models[0])))
    problems = [f"{run.out}: {name}: {why}" for run in done for name, why in run.errors.items()] + [*page.problems]
    if given["as_json"]:
        made = [{"analysis": run.analysis, "out": str(run.out), "summary": run.summary} for run in done]
        output.print_json(result | {"answer": answer, "report": str(path), "runs": made, **page.numbers})
    elif not quiet:
        output.print_text("audit", answer=answer, path=path, runs=runs)
    for told in problems:
        to_stderr(f"not complete: {told}")
    return 1 if problems else 0
