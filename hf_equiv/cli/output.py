"""What a person sees in the terminal: results on stdout, errors on stderr."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_equiv.formatting import cut, form

if TYPE_CHECKING:
    from hf_equiv.analyses.run import AnalysisOutcome, RunOutcome
    from hf_equiv.report.page import Report
    from hf_equiv.verify.dataset import DatasetReport
    from hf_equiv.verify.directory import VerifyReport

# Messages of the Python interface in the words of the command line: `max_evals` becomes --max-evals.


NAMES = (
    "source", "target", "data", "pairs", "solver", "radius", "norm", "rtol", "max_evals", "labels", "out", "overwrite",
    "seed", "revision", "readout", "normalize", "device", "dtype", "batch_size", "image_column", "label_column",
    "cache_dir", "local_files_only", "limit", "k", "vectors", "directions", "radii", "regional", "linearity", "heading",
    "step", "num_steps", "stop", "create_pr", "license", "i_have_the_right", "withhold_photos", "collection",
    "compile", "streaming",
    "transfer", "label_data", "dataset", "hardware", "wheel", "force", "timeout", "host", "port",
)  # fmt: skip
"""Keywords that are flags with the same name."""


_FLAGS = {name: "--" + name.replace("_", "-") for name in NAMES} | {
    "model_id": "MODEL",
    "repo_id": "USER/NAME",
    "models": "--model",
}


_PHRASES = (
    (" must be None", " must be left out"),
    (", or pass `token=False`", ""),
    ("pass `token`", "set HF_TOKEN"),
    (" and `subfolder`", ""),
    ("`trust_remote_code` must be True for", "remote code would have to be on for"),
    ("then pass `trust_remote_code=True`", "then load it from Python"),
    ("Pass pixels (B", "From Python, pass pixels (B"),
)
"""What the command line says otherwise, or has no flag for."""


_KEYWORD = re.compile(r"`(\w+)`|(?<![\w?&/.=-])`?(\w+)=(?:'([^'`]*)'|([^\s'`,;)]*[^\s'`,;).]))`?")


def in_flags(message: str) -> str:
    """Return `message` with flags in place of keywords in backticks or with a value.

    Args:
        message: of an error or a status.

    Returns:
        The same for the command line.

    Example:
        >>> in_flags("`model_id` must be cached for `local_files_only=True`. Raise `max_evals` or use device='cpu'.")
        'MODEL must be cached for --local-files-only. Raise --max-evals or use --device cpu.'
    """

    def flag(found: re.Match[str]) -> str:
        name, keyword, quoted, plain = found.groups()
        value = quoted if quoted is not None else plain
        told = _FLAGS.get(name or keyword)
        if told is None:
            return found.group()
        return told if value in (None, "True") else f"{told} {value}"

    for python, here in _PHRASES:
        message = message.replace(python, here)
    return _KEYWORD.sub(flag, message)


def verify_command(folder: object, model: str, revision: str) -> str:
    """Return the command that checks a run directory; it names a local checkpoint, whose path no run records.

    Args:
        folder: run directory.
        model: the checkpoint as the user named it.
        revision: of the checkpoint; "sha256:…" for a local folder.

    Returns:
        The command line.
    """
    local = revision.startswith("sha256:") and model != "builtin"
    return shlex.join(["hf-equiv", "verify", str(folder), *(["--model", model] if local else [])])


_FACTS = {
    "D": "embedding size D",
    "N": "pixel values N",
    "head": "classification head",
    "jvp": "forward-mode (JVP)",
    "jvp_error": "no JVP because",
}
"""Names of facts that do not explain themselves."""


_LABEL_WIDTH = 110
"""Columns from which the table has room for labels; the summary in words names them in any case."""


_SHOWN = 5
"""Missing rows that are named; an unfinished run may have thousands."""


def print_summary(report: Report, made: Mapping[str, str], out: Any) -> None:
    """Print what a report says of each checkpoint in a few sentences, and where its files are."""
    from hf_equiv.report.claims import summary

    console = console_of(out)
    for model in report.models:
        console.print(cut(model.title, 100), style="bold", highlight=False, markup=False)
        for sentence in summary(model):
            console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=not console.is_terminal)
        console.print()
    for problem in report.problems:
        console.print(f"not complete: {in_flags(problem)}", highlight=False, markup=False, soft_wrap=True)
    for name, value in made.items():
        console.print(f"{name + ':':<10}{value}", highlight=False, markup=False, soft_wrap=True)


def print_matches(outcome: RunOutcome, check: str, out: Any) -> None:
    """Print the result of a run: a table of rows (the first 20), the summary in words, and where the files are.

    Args:
        outcome: of the run.
        check: the command that verifies it.
        out: stream.
    """
    from hf_equiv.formatting import short

    console = console_of(out)
    table = Table(box=None, pad_edge=False, header_style="bold")
    labelled = console.width >= _LABEL_WIDTH and any(row["match_label"] is not None for row in outcome.rows)
    table.add_column("source -> target", no_wrap=True)  # the one that gives way on a narrow terminal
    table.add_column("status", no_wrap=True, min_width=max(len(row["status"]) for row in outcome.rows))
    for name in ("error", "as PNG", "PSNR dB", "evals", "refine", "seconds"):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(len(name), 6))
    if labelled:
        table.add_column("seen as (source / match / target)", no_wrap=True)
    for row in outcome.rows[:20]:
        cells = [
            escape(cut(row["pair_id"].replace("->", " -> "), 44)),
            row["status"],
            short(row["embedding_error"]),
            short(row["embedding_error_8bit"]),
            form(row["psnr_db"], ".1f"),
            form(row["num_evals"], ".0f"),
            form(outcome.refine_evals.get(row["pair_id"]), ".0f"),
            form(row["seconds"], ".1f"),
        ]
        if labelled:
            seen = (row[key] for key in ("source_label", "match_label", "target_label"))
            cells.append(escape(" / ".join((name or "–").split(",")[0] for name in seen)))
        table.add_row(*cells)
    console.print(table)
    if len(outcome.rows) > 20:
        console.print(f"… and {len(outcome.rows) - 20} more rows")
    console.print()
    console.print(outcome.summary["verdict"], highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for reason in _failures(outcome):
        console.print(reason, highlight=False, markup=False, soft_wrap=not console.is_terminal)
    console.print()
    figure = outcome.out / "figures" / "pairs.png"
    for name, value in (("picture", figure if figure.is_file() else None), ("rows", outcome.out / "matches"),
                        ("check it", check)):  # fmt: skip
        if value is not None:
            console.print(f"{name + ':':<10}{value}", highlight=False, markup=False, soft_wrap=True)


def print_failures(outcome: RunOutcome) -> None:
    """Say on stderr, in one line, how many rows failed and why."""
    failed = sum(row["status"] != "converged" for row in outcome.rows)
    reasons = " ".join(_failures(outcome))
    to_stderr(f"{failed} of {len(outcome.rows)} rows in {outcome.out} did not converge. {reasons}")


def _failures(outcome: RunOutcome) -> list[str]:
    """One sentence for each status that is no success, and for each distinct cause of an error."""
    from hf_equiv.results import Status

    reasons: dict[str, list[str]] = {}
    for row in outcome.rows:
        if row["status"] != Status.CONVERGED:
            why = outcome.errors.get(row["pair_id"]) if row["status"] == Status.ERROR else None
            reasons.setdefault(f"{row['status']}: {why or Status(row['status']).advice}", []).append(row["pair_id"])
    return [
        in_flags(why) + (f" ({len(ids)} rows)" if len(outcome.rows) > 1 and len(ids) > 1 else "")
        for why, ids in sorted(reasons.items())
    ]


def print_dataset_report(report: DatasetReport, where: str, out: Any) -> None:
    """Print what `verify` found of a dataset: each run, what is wrong with the card, and which commit this was."""
    console = console_of(out)
    for run in report.runs:
        print_report(run.report, f"{where} ({run.name})" if len(report.runs) > 1 else where, out)
    for problem in report.card_problems:
        console.print(problem.message, highlight=False, markup=False, soft_wrap=True)
    if len(report.runs) > 1 or report.card_problems:
        held = sum(run.report.holds for run in report.runs)
        card = "; its card does not" if report.card_problems else ""
        console.print(f"{held} of {len(report.runs)} runs of {where} hold{card}.", highlight=False, markup=False)
    if report.commit is not None:
        console.print(f"Verified at commit {report.commit}.", highlight=False, markup=False, soft_wrap=True)


def print_report(report: VerifyReport, directory: str, out: Any) -> None:
    """Print what `verify` found, each problem on a line; of missing rows the first few, the rest as a count."""
    from hf_equiv.formatting import short

    console = console_of(out)
    gone = 0
    for problem in report.problems:
        gone += problem.recomputed == "no row"
        if problem.recomputed != "no row" or gone <= _SHOWN:
            console.print(problem.message, highlight=False, markup=False, soft_wrap=True)
    if gone > _SHOWN:
        what = "rows are" if report.analysis == "match" else "images are listed whose rows are"
        console.print(f"… and {gone - _SHOWN} more {what} missing; --json names each.", highlight=False, markup=False)
    worst = f"; worst embedding error {short(report.worst_embedding_error)}"
    worst += f", as PNG {short(report.worst_embedding_error_8bit)}"
    if report.analysis in ("spectrum", "lipschitz"):
        worst = ""
    elif report.analysis == "walk":
        worst = worst.replace("embedding error", "drift")
    what = "match" if report.analysis == "match" else "number"
    empty = f"; {report.error_rows} of {report.rows} rows are of status error and hold no {what}"
    if not report.problems and not report.holds:
        told = f"Nothing in {directory} can be checked"
        worst = ""
    elif report.withheld and report.holds:
        told = (
            f"Files, list and summary of {directory} hold; {report.withheld} of {report.rows} rows cannot be recomputed"
        )
        told, worst = told + ": photos are withheld", ""
    elif report.holds and report.rows == 1 and not report.error_rows:
        told = f"The row of {directory} holds"
    elif report.holds:
        rows = "matches" if report.error_rows and what == "match" else "rows"
        told = f"All {report.verified} {rows} of {directory} hold"
    else:
        problems = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        told = f"{problems} in {directory}: {report.verified} of {report.verified + report.failed} rows hold"
        if report.withheld:
            told = f"{problems} in {directory}: {report.withheld} rows cannot be recomputed, since photos are withheld "
            told += "(--allow-withheld accepts that)"
    told += (empty if report.error_rows else "") + f"{worst}."
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    if report.holds and report.verified:
        not_verified = f"Not verified: {', '.join(report.unverified)}."
        console.print(not_verified, highlight=False, markup=False, soft_wrap=True)


def print_facts(facts: Mapping[str, Any], out: Any) -> None:
    """Print nested facts as an indented list; settings in JSON one to a line."""
    console = console_of(out)

    def line(indent: int, name: str, value: str) -> None:
        text = f"{'':<{indent}}{name:<{26 - indent}}{value}".rstrip()
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for head, values in facts.items():
        console.print(f"{head}", style="bold", highlight=False, markup=False)
        for key, value in values.items():
            if key == "processor":
                line(2, key, "")
                for name, setting in json.loads(value).items():
                    line(4, name, _plain(setting))
            elif key != "jvp_error" or value is not None:
                line(2, key if head == "versions" else _FACTS.get(key, key.replace("_", " ")), _plain(value))


def print_json(value: Any, out: Any) -> None:
    """Write one JSON object; NaN is refused rather than written."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=out, flush=True)


@contextlib.contextmanager
def result_stream() -> Iterator[Any]:
    """Send whatever libraries print to stderr; the result goes to the stream that is handed out."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield out


def _plain(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def console_of(out: Any) -> Console:
    """A console on a stream, wide where it is no terminal."""
    return Console(file=out, width=None if out.isatty() else 160)


def to_stderr(text: str) -> None:
    """Print a line on stderr."""
    sys.stderr.write(f"{text}\n")  # in one piece: other processes write there too
    sys.stderr.flush()


# What a person sees of a finished spectrum, lipschitz or walk run.


def print_analysis(outcome: AnalysisOutcome, folder: str, check: str, out: Any) -> None:
    """Print the result of a spectrum, lipschitz or walk run: a table, the summary in words, and where the files are.

    Args:
        outcome: of the run.
        folder: of its rows.
        check: the command that verifies it.
        out: stream.
    """
    console = console_of(out)
    table = Table(box=None, pad_edge=False, header_style="bold")
    head, lines = _TABLES[outcome.analysis](outcome)
    for k, name in enumerate(head):
        table.add_column(name, justify="left" if k == 0 else "right", no_wrap=True)
    for line in lines[:20]:
        table.add_row(*(escape(cell) for cell in line))
    console.print(table)
    if len(lines) > 20:
        console.print(f"… and {len(lines) - 20} more")
    console.print()
    console.print(outcome.summary["verdict"], highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for reason in _analysis_failures(outcome):
        console.print(reason, highlight=False, markup=False, soft_wrap=not console.is_terminal)
    console.print()
    figures = outcome.out / "figures"
    for name, value in (("pictures", figures if figures.is_dir() else None), ("rows", outcome.out / folder),
                        ("check it", check)):  # fmt: skip
        if value is not None:
            console.print(f"{name + ':':<10}{value}", highlight=False, markup=False, soft_wrap=True)


def print_analysis_failures(outcome: AnalysisOutcome) -> None:
    """Say on stderr, in one line, how many images failed and why."""
    to_stderr(f"Not every image in {outcome.out} was completed. {' '.join(_analysis_failures(outcome))}")


def _analysis_failures(outcome: AnalysisOutcome) -> list[str]:
    """One sentence for each status that is no success, and for each distinct cause of an error."""
    from hf_equiv.analyses.run import FAILED
    from hf_equiv.results import Status

    reasons: dict[str, set[str]] = {}
    for row in outcome.rows:
        if row["status"] in FAILED[outcome.analysis]:
            why = outcome.errors.get(row["image_id"]) if row["status"] == Status.ERROR else None
            reasons.setdefault(f"{row['status']}: {why or Status(row['status']).advice}", set()).add(row["image_id"])
    return [
        in_flags(why) + (f" ({', '.join(sorted(ids)[:3])}{' …' if len(ids) > 3 else ''})")
        for why, ids in sorted(reasons.items())
    ]


Lines = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _spectrum_table(outcome: AnalysisOutcome) -> Lines:
    from hf_equiv.formatting import short

    lines: list[tuple[str, ...]] = []
    for row in outcome.rows:
        named = [zero["cause"] for zero in (row["structural_zeros"] or []) + (row["near_structural"] or [])]
        bound = [b for b in row["error_bound"] or [] if b is not None]
        lines.append(
            (
                cut(row["image_id"], 36),
                row["status"],
                form(row["sigma_max"], ".4g"),
                _rank(row),
                form(row["nullity"], ",d"),
                form(row["effective_rank"], ".1f"),
                short(max(bound)) if bound else "–",
                ", ".join(named) or "–",
                form(row["seconds"], ".1f"),
            )
        )
    head = ("image", "status", "largest", "rank", "nullity", "eff. rank", "error bound", "zeros", "seconds")
    return head, lines


def _rank(row: dict[str, Any]) -> str:
    if row["rank"] is None:
        return "–"
    values = len(row["singular_values"])
    return f"{row['rank']} of {values}" if values >= row["rank"] else str(row["rank"])  # with --k there are fewer


def _lipschitz_table(outcome: AnalysisOutcome) -> Lines:
    lines: list[tuple[str, ...]] = []
    for kind, found in outcome.summary.get("kinds", {}).items():
        numbers = [form(q, ".4g") for q in found["quantiles"] or [None] * 5]
        share = f"{found['resolved']} of {found['count']}"
        reach = form(found["linearity_radius"], ".2g")
        lines.append((kind, share, *numbers, form(found["largest_jvp"], ".3g"), reach))
    return ("direction", "resolved", "least", "25 %", "median", "75 %", "largest", "largest |Jv|", "linear to"), lines


def _walk_table(outcome: AnalysisOutcome) -> Lines:
    from hf_equiv.formatting import short

    lines: list[tuple[str, ...]] = [
        (
            cut(walk["image_id"], 36),
            walk["status"],
            str(walk["steps"]),
            form(walk["start_l2"], ".3g"),
            form(walk["l2"], ".3g"),
            form(walk["arc_length"], ".3g"),
            form(walk["psnr_db"], ".1f"),
            short(walk["largest_drift"]),
            "–" if walk["largest_drift_8bit"] is None else short(walk["largest_drift_8bit"]),
            form(walk["remaining"], ".3g"),
            " > ".join(label.split(",")[0] for label in walk["labels"]) or "–",
            form(walk["num_evals"], ".0f"),
        )
        for walk in outcome.summary.get("walks", [])
    ]
    head = (
        "image",
        "status",
        "steps",
        "L2 before",
        "L2",
        "length",
        "PSNR dB",
        "drift",
        "as PNG",
        "remaining",
        "seen as",
        "evals",
    )
    return head, lines


_TABLES: dict[str, Callable[[AnalysisOutcome], Lines]] = {
    "spectrum": _spectrum_table,
    "lipschitz": _lipschitz_table,
    "walk": _walk_table,
}
