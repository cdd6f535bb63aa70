"""Results for a person or a program: tables, sentences and JSON on stdout, errors on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from hf_equiv.cli.options import flag_note
from hf_equiv.formatting import cut, form, short, size

if TYPE_CHECKING:
    from hf_equiv.analyses.run import RunOutcome
    from hf_equiv.hub.publish import Published
    from hf_equiv.hub.space import SpaceDeployment
    from hf_equiv.report.page import Report
    from hf_equiv.verify.dataset import DatasetReport
    from hf_equiv.verify.directory import VerifyReport

MAX_ROWS = 20
MAX_FILES = 40
MAX_MISSING = 5
"""Missing rows that are named; an unfinished run may have thousands."""

LABEL_WIDTH = 110
"""Columns from which a table has room for labels; the summary in words names them in any case."""


@contextlib.contextmanager
def result_stream() -> Iterator[Any]:
    """Send everything that libraries print to stderr, and hand out stdout for the result."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield out


def console_of(out: Any) -> Console:
    """Return a console that prints text as it is; lines are as wide as they need to be."""
    return Console(file=out, width=None if out.isatty() else 160, highlight=False, markup=False, soft_wrap=True)


def print_pairs(console: Console, *pairs: tuple[str, object]) -> None:
    """Print named values, one on a line; empty ones are left out."""
    for name, value in pairs:
        if value:
            console.print(f"{name + ':':<11}{value}")


def to_stderr(text: str) -> None:
    """Print a line on stderr."""
    sys.stderr.write(f"{text}\n")  # in one piece, since other processes write there too
    sys.stderr.flush()


def print_json(value: Any, out: Any) -> None:
    """Print one JSON object; NaN is refused rather than written."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=out, flush=True)


# --- the result of a run ---


def _labels(row: Mapping[str, Any]) -> str:
    if row["match_label"] is None:
        return "–"
    return " / ".join(_first(row[f"{name}_label"] or "–") for name in ("source", "match", "target"))


def _first(label: str) -> str:
    return label.split(",")[0]


def _rank(row: Mapping[str, Any]) -> str:
    if row["rank"] is None or len(row["singular_values"]) < row["rank"]:  # with --k there are fewer values
        return form(row["rank"], "d")
    return f"{row['rank']} of {len(row['singular_values'])}"


def _zeros(row: Mapping[str, Any]) -> str:
    return ", ".join(zero["cause"] for zero in (row["structural_zeros"] or []) + (row["near_structural"] or [])) or "–"


def _quantile(k: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda found: form(found["quantiles"][k] if found["quantiles"] else None, ".4g")


_COLUMNS: dict[str, dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "match": {
        "source -> target": lambda row: cut(row["pair_id"].replace("->", " -> "), 44),
        "status": lambda row: row["status"],
        "error": lambda row: short(row["embedding_error"]),
        "as PNG": lambda row: short(row["embedding_error_8bit"]),
        "PSNR dB": lambda row: form(row["psnr_db"], ".1f"),
        "evals": lambda row: form(row["num_evals"], ".0f"),
        "refine": lambda row: form(row["refine_evals"], ".0f"),
        "seconds": lambda row: form(row["seconds"], ".1f"),
        "seen as (source / match / target)": _labels,
    },
    "spectrum": {
        "image": lambda row: cut(row["image_id"], 36),
        "status": lambda row: row["status"],
        "largest": lambda row: form(row["sigma_max"], ".4g"),
        "rank": _rank,
        "nullity": lambda row: form(row["nullity"], ",d"),
        "eff. rank": lambda row: form(row["effective_rank"], ".1f"),
        "error bound": lambda row: short(max((b for b in row["error_bound"] or [] if b is not None), default=None)),
        "zeros": _zeros,
        "seconds": lambda row: form(row["seconds"], ".1f"),
    },
    "lipschitz": {
        "direction": lambda found: found["kind"],
        "resolved": lambda found: f"{found['resolved']} of {found['count']}",
        "least": _quantile(0),
        "25 %": _quantile(1),
        "median": _quantile(2),
        "75 %": _quantile(3),
        "largest": _quantile(4),
        "largest |Jv|": lambda found: form(found["largest_jvp"], ".3g"),
        "linear to": lambda found: form(found["linearity_radius"], ".2g"),
    },
    "walk": {
        "image": lambda walk: cut(walk["image_id"], 36),
        "status": lambda walk: walk["status"],
        "steps": lambda walk: str(walk["steps"]),
        "L2 before": lambda walk: form(walk["start_l2"], ".3g"),
        "L2": lambda walk: form(walk["l2"], ".3g"),
        "length": lambda walk: form(walk["arc_length"], ".3g"),
        "PSNR dB": lambda walk: form(walk["psnr_db"], ".1f"),
        "drift": lambda walk: short(walk["largest_drift"]),
        "as PNG": lambda walk: short(walk["largest_drift_8bit"]),
        "remaining": lambda walk: form(walk["remaining"], ".3g"),
        "evals": lambda walk: form(walk["num_evals"], ".0f"),
        "seen as": lambda walk: " > ".join(map(_first, walk["labels"])) or "–",
    },
}


def _lines(outcome: RunOutcome) -> list[Mapping[str, Any]]:
    """Return one mapping for each line of the table of a run."""
    analysis = outcome.analysis
    if analysis == "match":
        return [row | {"refine_evals": outcome.refine_evals.get(row["pair_id"])} for row in outcome.rows]
    if analysis == "lipschitz":
        return [found | {"kind": kind} for kind, found in outcome.summary.get("kinds", {}).items()]
    return list(outcome.rows if analysis == "spectrum" else outcome.summary.get("walks", []))


def print_outcome(outcome: RunOutcome, failures: Mapping[str, Any], check: str, out: Any) -> None:
    """Print a finished run: a table, the verdict, the failures, its files, and the command that verifies it."""
    from hf_equiv.runs.schema import LAYOUTS

    console, lines = console_of(out), _lines(outcome)
    table, columns = Table(box=None, pad_edge=False, header_style="bold"), list[list[str]]()
    for name, cell in _COLUMNS[outcome.analysis].items():
        cells, label = [cell(line) for line in lines[:MAX_ROWS]], name.startswith("seen as")
        if label and (console.width < LABEL_WIDTH or set(cells) <= {"–"}):
            continue
        left = label or not columns or name in ("status", "zeros")
        least = max(map(len, (name, *cells))) if columns else None  # the first gives way on a narrow terminal
        table.add_column(name, justify="left" if left else "right", no_wrap=True, min_width=least)
        columns.append(cells)
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    if len(lines) > MAX_ROWS:
        console.print(f"… and {len(lines) - MAX_ROWS} more")
    console.print()
    for sentence in (outcome.summary["verdict"], *reasons(failures)):
        console.print(sentence, soft_wrap=not console.is_terminal)
    console.print()
    figures, rows = outcome.out / "figures", outcome.out / LAYOUTS[outcome.analysis].folder
    print_pairs(console, ("pictures", figures if figures.is_dir() else None), ("rows", rows), ("check it", check))


def failures(outcome: RunOutcome) -> dict[str, list[str]]:
    """Return the ids of the pairs or images that failed, by status and cause."""
    from hf_equiv.results import Status
    from hf_equiv.runs.schema import LAYOUTS

    found: dict[str, list[str]] = {}
    for row in outcome.failed:
        status, name = row["status"], row[LAYOUTS[outcome.analysis].item]
        why = outcome.errors.get(name) if status == Status.ERROR else None
        ids = found.setdefault(f"{status}: {why or Status(status).advice}", [])
        ids += [name] if name not in ids else []
    return dict(sorted(found.items()))


def reasons(failures: Mapping[str, list[str]]) -> list[str]:
    """Return one sentence for each cause, with the number and the first of its pairs or images."""
    return [f"{why} ({len(ids)}: {', '.join(ids[:3])}{', …' if ids[3:] else ''})" for why, ids in failures.items()]


def print_summary(report: Report, made: Mapping[str, str], out: Any) -> None:
    """Print a few sentences of a report on each checkpoint, and the files that it is in."""
    from hf_equiv.report.claims import summary

    console = console_of(out)
    for model in report.models:
        console.print(cut(model.title, 100), style="bold")
        for sentence in summary(model):
            console.print(f"- {sentence}", soft_wrap=not console.is_terminal)
        console.print()
    for problem in report.problems:
        console.print(f"not complete: {problem}")
    print_pairs(console, *made.items())


# --- the result of `verify` ---


def print_dataset_report(report: DatasetReport, where: str, out: Any) -> None:
    """Print the problems and the verdict of each run of a dataset, those of its card, and the verified commit."""
    console, many = console_of(out), len(report.runs) > 1
    for run in report.runs:
        print_report(run, f"{where} ({run.name})" if many else where, out)
    for problem in report.card_problems:
        console.print(problem.message)
    if many or report.card_problems:
        held = sum(run.holds for run in report.runs)
        card = "; its card does not" if report.card_problems else ""
        console.print(f"{held} of {len(report.runs)} runs of {where} hold{card}.")
    if report.commit is not None:
        console.print(f"Verified at commit {report.commit}.")


def print_report(report: VerifyReport, directory: str, out: Any) -> None:
    """Print each problem of a run on a line, of missing rows the first few, and then the verdict."""
    console = console_of(out)
    missing = [problem for problem in report.problems if problem.recomputed == "no row"]
    others = [problem for problem in report.problems if problem.recomputed != "no row"]
    match = report.analysis == "match"
    for problem in others + missing[:MAX_MISSING]:
        console.print(problem.message)
    if len(missing) > MAX_MISSING:
        rows = "rows are" if match else "images are listed whose rows are"
        console.print(f"… and {len(missing) - MAX_MISSING} more {rows} missing; --json names each.")
    if report.problems:
        problems = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        told = [f"{problems} in {directory}: {report.verified} of {report.verified + report.failed} rows hold"]
    elif not report.holds:
        told = [f"Nothing in {directory} can be checked"]
    elif report.withheld:
        told = [f"Files, list and summary of {directory} hold"]
    else:
        told = [
            f"The row of {directory} holds" if report.rows == 1 else f"All {report.verified} rows of {directory} hold"
        ]
    if report.withheld:
        cure = " (--allow-withheld accepts that)" if report.problems else ""
        told.append(f"{report.withheld} of {report.rows} rows cannot be recomputed: photos are withheld{cure}")
    if report.error_rows:
        lack = "match" if match else "number"
        told.append(f"{report.error_rows} of {report.rows} rows are of status error and hold no {lack}")
    if report.worst_embedding_error is not None:
        measure = "drift" if report.analysis == "walk" else "embedding error"
        worst = short(report.worst_embedding_error), short(report.worst_embedding_error_8bit)
        told.append(f"worst {measure} {worst[0]}, as PNG {worst[1]}")
    console.print("; ".join(told) + ".")
    if report.holds and report.verified:
        console.print(f"Not verified: {', '.join(report.unverified)}.")


# --- what goes to the Hub ---


def print_publication(done: Published, out: Any) -> None:
    """Print what was published, or what a dry run would publish."""
    from hf_equiv.runs.schema import LAYOUTS

    console = console_of(out)
    run = done.run + (f" in {done.place}/" if done.place else "")
    private = {True: "private", False: "public", None: "visibility is its owner's"}[done.private]
    _print_change(
        console, done, f"{run} is there as it is here", f"commit {run} to {done.revision}",
        "proposed" if done.pr_url else "published", f"{run}: {_sent(done)}, in one commit {str(done.commit)[:8]}",
    )  # fmt: skip
    if done.dry_run and done.changed:
        console.print("\ncard (README.md of the dataset):")
        for line in done.card.splitlines():
            console.print(f"  | {line}".rstrip())
        console.print()
    collection = done.collection and f"{done.url.split('/datasets/')[0]}/collections/{done.collection}"
    if collection and done.collection_private and done.private is False:
        collection += " (private: only you see it, unlike the dataset; its page lets you make it public)"
    elif collection and done.collection_private is not None:
        collection += " (private)" if done.collection_private else " (public)"
    verb = "would be in" if done.dry_run else "are in"
    photos = f"{verb} ({done.why})" if done.photos else f"WITHHELD: image columns are empty ({done.why})"
    print_pairs(
        console, ("dataset", f"{done.url} ({private})"), ("request", done.pr_url), ("list", collection),
        ("photos", f"{photos}. {_with_flags(done.how_to_change)}"),
        ("refused", done.refused and f"publishing would be, as things are: {_with_flags(done.refused)}"),
    )  # fmt: skip
    if not done.dry_run:
        main, config = done.revision == "main", LAYOUTS[done.run.split("-")[0]].folder
        revision = "" if main else f', revision="{done.revision}"'
        check = f"hf-equiv verify {done.repo_id}" + ("" if main else f"@{done.revision}")
        print_pairs(
            console, ("load", f'datasets.load_dataset("{done.repo_id}", "{config}", split="train"{revision})'),
            ("check it", check + ("" if done.photos else " --allow-withheld")),
        )  # fmt: skip


def _with_flags(text: str) -> str:
    return text + flag_note(text, click.get_current_context().command.params)


def print_deployment(done: SpaceDeployment, out: Any) -> None:
    """Print what was deployed, or what a dry run would deploy."""
    console = console_of(out)
    _print_change(
        console, done, "the Space is as it should be", "make the Space" if done.made else "bring the Space up to date",
        "made" if done.made else "updated", f"{_sent(done)}, commit {str(done.commit)[:8]}",
    )  # fmt: skip
    print_pairs(
        console, ("space", f"{done.url} ({'private' if done.private else 'public'})"), ("library", done.library),
        *(("variable", f"{key}={value}") for key, value in done.variables.items()), ("hardware", done.hardware),
        ("stage", done.stage and done.stage.lower().replace("_", " ")),
        *(("warning", _with_flags(text)) for text in done.warnings),
    )  # fmt: skip


def _sent(done: Published | SpaceDeployment) -> str:
    """Return the amount of a commit in words."""
    new = len(done.uploaded)
    told = f"{new} of {done.files} files" if new < done.files else f"{done.files} files"
    told += f", {size(sum(count for _, count in done.uploaded))}"
    return told + (f", {len(done.deleted)} removed" if done.deleted else "")


def _print_change(
    console: Console, done: Published | SpaceDeployment, same: str, plan: str, name: str, made: str
) -> None:
    """Print that nothing changes, the plan of a dry run with its files, or the commit that was made."""
    if not done.changed and done.dry_run:
        print_pairs(console, ("would do", f"nothing: {same}"))
    elif not done.changed:
        print_pairs(console, ("unchanged", f"{same}; nothing was committed"))
    elif not done.dry_run:
        print_pairs(console, (name, made))
    else:
        print_pairs(console, ("would do", f"{plan}; nothing was written"))
        lines = [f"  + {size(count):>8}  {path}" for path, count in done.uploaded]
        lines += [f"  - {'':>8}  {path}" for path in done.deleted]
        more = [f"  … and {len(lines) - MAX_FILES} more files"] if len(lines) > MAX_FILES else []
        for line in lines[:MAX_FILES] + more:
            console.print(line)
        print_pairs(console, ("in all", _sent(done)))


# --- facts ---

_FACTS = {
    "D": "embedding size D",
    "N": "pixel values N",
    "head": "classification head",
    "jvp": "forward-mode (JVP)",
    "jvp_error": "no JVP because",
}
"""Names of facts that do not explain themselves."""


def print_facts(facts: Mapping[str, Mapping[str, Any]], out: Any) -> None:
    """Print nested facts as an indented list, each setting of the image processor on a line."""
    console = console_of(out)
    for head, values in facts.items():
        console.print(head, style="bold")
        for key, value in values.items():
            if key == "jvp_error" and value is None:
                continue
            name = key if head == "versions" else _FACTS.get(key, key.replace("_", " "))
            settings = json.loads(value) if key == "processor" else {}
            console.print(f"  {name:<24}{'' if settings else _plain(value)}".rstrip())
            for setting, chosen in settings.items():
                console.print(f"    {setting:<22}{_plain(chosen)}")


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
