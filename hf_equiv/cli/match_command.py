"""The `match` command: plan, dry run or run, and the result as table or JSON."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_equiv import formatting
from hf_equiv.cli import environment, output, progress
from hf_equiv.cli.output import in_flags, verify_command


def run(model: str, **given: Any) -> int:
    """Carry out `hf-equiv match`; returns the exit code."""
    with output.result_stream() as out:
        return _run(model, given, out)


def _run(model: str, given: dict[str, Any], out: Any) -> int:
    from hf_equiv.analyses.config import RunConfig
    from hf_equiv.analyses.plan import make_plan
    from hf_equiv.runs import resume
    from hf_equiv.runs.schema import MATCH

    as_json, quiet = given["as_json"], given["as_json"] or given["quiet"]
    labels = given["labels"]
    given["labels"] = None if labels is None else tuple(name.strip() for name in labels.split(",") if name.strip())
    given["refine"] = not given["no_refine"]
    config = RunConfig(model=model, **{f.name: given[f.name] for f in fields(RunConfig) if f.name != "model"})
    config.check()
    if given["batch_size"] is not None and given["batch_size"] < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {given['batch_size']}.")
    environment.calm(quiet=quiet)
    where = {key: given[key] for key in ("cache_dir", "local_files_only")}
    options = {key: given[key] for key in ("revision", "readout", "normalize", "device", "dtype")}
    options["dtype"] = "float32" if config.half else config.dtype
    encoder = environment.load_encoder(model, **options, **where)
    plan = make_plan(config, encoder, **where)
    folder: Path = given["out"] or plan.default_out
    progress.say(plan.choices, quiet=quiet or given["dry_run"])
    if given["out"] is None:
        items = [pair.entry() for pair in plan.pairs]
        progress.say(resume.other_states(folder, plan.settings, items, MATCH), quiet=quiet)
    if given["dry_run"]:
        if not progress.is_first():
            return 0
        facts = _estimate(plan, folder, given["overwrite"], given["batch_size"])
        if as_json:
            output.print_json(_result(plan, folder, (), None) | {"dry_run": facts}, out)
        else:
            output.print_facts({"would do": in_words(facts)}, out)
        return 0

    from hf_equiv.analyses.run import run_match
    from hf_equiv.runs import directory

    try:
        with progress.run_progress(quiet=quiet) as observer:
            outcome = run_match(
                plan, folder, overwrite=given["overwrite"], batch_size=given["batch_size"], observer=observer
            )
    except KeyboardInterrupt:
        kept = len(directory.finished_ids(folder)) if folder.is_dir() else 0
        raise KeyboardInterrupt(how_to_go_on(kept, len(plan.pairs), "rows", folder)) from None
    if not outcome.main:
        return 0
    if as_json:
        output.print_json(_result(plan, folder, outcome.rows, outcome.summary), out)
    elif not given["quiet"]:
        output.print_matches(outcome, verify_command(folder, model, encoder.revision), out)
    if quiet and not outcome.converged:
        output.print_failures(outcome)
    return progress.exit_code(outcome.converged, "not every pair converged", quiet=quiet)


def _result(plan: Any, folder: Path, rows: Any, summary: Any) -> dict[str, Any]:
    return {
        "analysis": "match",
        "model": plan.settings["model_id"],
        "revision": plan.settings["model_revision"],
        "out": str(folder),
        "rows": [without_nan(row) for row in rows],
        "summary": summary,
    }


def in_words(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a dry run as its table shows them: unusable images by name, the first ten; only what there is to say."""
    told, unusable = dict(facts), list(facts["unusable_images"])
    told["unusable_images"] = [formatting.cut(name, 60) for name in unusable[:10]]
    told["unusable_images"] += [f"and {len(unusable) - 10} more"] if unusable[10:] else []
    told["choices"] = "; ".join(facts["choices"])
    return {key: value for key, value in told.items() if value or not key.endswith(("_error", "_images", "choices"))}


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null in place of NaN and infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def how_to_go_on(kept: int, total: int, what: str, folder: Path) -> str:
    """What to tell whoever has interrupted a run."""
    typed = given = sys.argv[1:]
    for i in (k for k, word in enumerate(given) if word == "--overwrite"):  # `always` would begin anew
        given = given[:i] + given[i + 2 :]
        break
    given = [word for word in given if not word.startswith("--overwrite=")]
    again = "The same command goes on" if given == typed else "Without --overwrite the same command goes on"
    command = f": hf-equiv {shlex.join(given)}" if given else "."
    return f"interrupted; {kept} of {total} {what} are kept in {folder}. {again}{command}"


def seconds_per_evaluation(encoder: Any) -> float:
    """Time of one forward and one backward of a grey image, the best of three."""
    import time

    import torch

    x = torch.full((1, *encoder.input_shape), 0.5, device=encoder.device, dtype=encoder.dtype, requires_grad=True)
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        torch.autograd.grad(encoder(x).double().square().sum(), x)
        seconds = min(seconds, time.perf_counter() - start)
    return seconds


def _estimate(plan: Any, folder: Path, overwrite: str, batch_size: int | None) -> dict[str, Any]:
    """Time an evaluation of one image; a typical match takes 200 to 400, its refinement a Jacobian and a little."""
    from hf_equiv.analyses import pairs
    from hf_equiv.runs import resume

    there = resume.refuse_early(folder, plan.settings, overwrite, items=[pair.entry() for pair in plan.pairs])
    encoder = plan.encoder
    unusable = pairs.unusable_images(plan.pairs)
    left, failing = len(plan.pairs) - there, sum(bool(pair.unusable) for pair in plan.pairs)
    seconds = seconds_per_evaluation(encoder)
    refining = (1 + 2 * encoder.embedding_dim) / 3 + 10 if plan.config.refine else 0
    usual = min(plan.config.max_evals, 400) + refining
    return {
        "model": plan.settings["model_id"],
        "revision": plan.settings["model_revision"],
        "embedding": f"{plan.settings['readout']}, D = {encoder.embedding_dim}, N = {math.prod(encoder.input_shape)}",
        "images": plan.settings["data_id"],
        "pairs": len(plan.pairs),
        "rows_there": there,
        "rows_to_make": left,
        "rows_of_status_error": failing,
        "unusable_images": unusable,
        "choices": [in_flags(choice) for choice in plan.choices],
        "out": str(folder),
        "batch_size": batch_size or (8 if encoder.device.type == "cpu" else 32),
        "seconds_per_evaluation": round(seconds, 4),
        "estimated_seconds": round((left - failing) * usual * seconds, 1),
    }
