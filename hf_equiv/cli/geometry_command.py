"""The `spectrum`, `lipschitz` and `walk` commands: plan, dry run or run, and the result as table or JSON."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_equiv.cli import environment, output, progress
from hf_equiv.cli.match_command import how_to_go_on, in_words, seconds_per_evaluation, without_nan
from hf_equiv.cli.output import in_flags, verify_command


def run(analysis: str, model: str, **given: Any) -> int:
    """Carry out `hf-equiv ANALYSIS`; returns the exit code."""
    with output.result_stream() as out:
        return _run(analysis, model, given, out)


def _run(analysis: str, model: str, given: dict[str, Any], out: Any) -> int:
    from hf_equiv.analyses.plan import make_plan
    from hf_equiv.analyses.run import VERBS
    from hf_equiv.runs import resume

    as_json, quiet = given["as_json"], given["as_json"] or given["quiet"]
    of_verb = VERBS[analysis].config
    stated = {f.name: given[f.name] for f in fields(of_verb) if f.name in given}
    config = of_verb(model=model, **stated)
    config.check()
    if given["batch_size"] is not None and given["batch_size"] < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {given['batch_size']}.")
    environment.calm(quiet=quiet)
    where = {key: given[key] for key in ("cache_dir", "local_files_only")}
    options = {key: given[key] for key in ("revision", "readout", "normalize", "device", "dtype")}
    encoder = environment.load_encoder(model, **options, **where)
    plan = make_plan(config, encoder, **where)
    folder: Path = given["out"] or plan.default_out
    progress.say(plan.choices, quiet=quiet or given["dry_run"])
    if given["out"] is None:
        items = [subject.entry() for subject in plan.subjects]
        progress.say(resume.other_states(folder, plan.settings, items, plan.layout), quiet=quiet)
    if given["dry_run"]:
        if not progress.is_first():
            return 0
        facts = _estimate(plan, folder, given["overwrite"])
        if as_json:
            output.print_json(_result(plan, folder, (), None) | {"dry_run": facts}, out)
        else:
            output.print_facts({"would do": in_words(facts)}, out)
        return 0

    from hf_equiv.analyses.run import run_analysis
    from hf_equiv.runs import directory

    try:
        with progress.run_progress(quiet=quiet, what="images") as observer:
            outcome = run_analysis(
                plan, folder, overwrite=given["overwrite"], batch_size=given["batch_size"], observer=observer
            )
    except KeyboardInterrupt:
        kept = len(directory.finished_ids(folder, plan.layout)) if folder.is_dir() else 0
        raise KeyboardInterrupt(how_to_go_on(kept, len(plan.subjects), "images", folder)) from None
    if not outcome.main:
        return 0
    if as_json:
        output.print_json(_result(plan, folder, outcome.rows, outcome.summary), out)
    elif not given["quiet"]:
        check = verify_command(folder, model, encoder.revision)
        output.print_analysis(outcome, plan.layout.folder, check, out)
    if quiet and not outcome.completed:
        output.print_analysis_failures(outcome)
    return progress.exit_code(outcome.completed, "not every image was completed", quiet=quiet)


def _result(plan: Any, folder: Path, rows: Any, summary: Any) -> dict[str, Any]:
    return {
        "analysis": plan.config.analysis,
        "model": plan.settings["model_id"],
        "revision": plan.settings["model_revision"],
        "out": str(folder),
        "rows": [without_nan(row) for row in rows],
        "summary": summary,
    }


def _estimate(plan: Any, folder: Path, overwrite: str) -> dict[str, Any]:
    """Time an evaluation of one image, and count what the analysis of an image takes, roughly."""
    from hf_equiv.analyses import pairs
    from hf_equiv.runs import resume

    items = [subject.entry() for subject in plan.subjects]
    there = resume.refuse_early(folder, plan.settings, overwrite, plan.layout, items)
    encoder, settings = plan.encoder, plan.settings
    seconds = seconds_per_evaluation(encoder)
    jacobian = (1 + 2 * encoder.embedding_dim) / 3
    if plan.config.analysis == "spectrum":
        k = settings["k"]
        evals = jacobian + 8 if k is None else min(jacobian, 4 / 3 * (2 * k + 7)) + 8
    elif plan.config.analysis == "lipschitz":
        directions = sum(settings["directions"].values())
        forwards = 2 * len(settings["radii"]) + (30 if settings["linearity"] else 0)
        evals = jacobian + directions * (forwards + 4) / 3 + (250 if settings["regional"] else 0)
        evals += 300 if "match" in settings["directions"] else 0
    else:
        each = {"random": 15, "away": 15, "nearest": 100}.get(settings["heading"], 30)  # a point, at most
        evals = jacobian + settings["num_steps"] * each * min(1, settings["step"]) + (300 if settings["solver"] else 0)
    left, failing = len(plan.subjects) - there, sum(bool(subject.unusable) for subject in plan.subjects)
    return {
        "model": settings["model_id"],
        "revision": settings["model_revision"],
        "embedding": f"{settings['readout']}, D = {encoder.embedding_dim}, N = {math.prod(encoder.input_shape)}",
        "images": f"{len(plan.subjects)} of {settings['data_id']}",
        "images_there": there,
        "images_to_do": left,
        "images_of_status_error": failing,
        "unusable_images": pairs.unusable_images(plan.subjects),
        "choices": [in_flags(choice) for choice in plan.choices],
        "out": str(folder),
        "seconds_per_evaluation": round(seconds, 4),
        "evaluations_per_image": round(evals),
        "estimated_seconds": round((left - failing) * evals * seconds, 1),
    }
