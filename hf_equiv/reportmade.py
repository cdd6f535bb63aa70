"""Sections of a report on how it was made, and on several checkpoints side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_equiv.metrics import short
from hf_equiv.publishcard import command_of
from hf_equiv.reportmaterial import Material
from hf_equiv.reportpage import Block, Bullets, Code, Heading, Table, Text, code, plain
from hf_equiv.reportruns import Run
from hf_equiv.reportwords import ball, count, near_budget, number, tenth, three

Row = Mapping[str, Any]


def made_section(m: Material) -> list[Block]:
    """Model, runs, commands, versions, and limits."""
    n, s = m.numbers, m.checkpoint.settings
    blocks: list[Block] = [m.heading("How this was made", "made")]
    size = f"{n['dim']} numbers from {n['pixels']:,} pixel values" if n["dim"] and n["pixels"] else "–"
    facts = [
        ("model", code(n["model_id"])),
        ("revision", code(n["revision"])),
        ("readout", f"{plain(n['readout'])}{', scaled to length 1' if n['normalize'] else ''}, {plain(s['dtype'])}"),
        ("embedding", size),
    ]
    blocks.append(Table(("", "value"), tuple(facts), stacked=True))
    lines = tuple(
        (
            code(run["name"]),
            run["analysis"],
            f"{run['there']} of {run['listed']}",
            str(run["error_rows"]),
            plain(run["data_id"]),
            plain(run["data_revision"])[:19],
            str(run["seed"]),
        )
        for run in n["runs"]
    )
    head = ("run directory", "verb", "there", "errors", "data", "data revision", "seed")
    blocks.append(Table(head, lines, "Every run directory holds run.json with all settings.", stacked=True))
    blocks.append(Code("\n".join(_commands(run) for run in m.checkpoint.runs)))
    blocks.append(Code("\n".join(dict.fromkeys(_check(run) for run in m.checkpoint.runs))))
    versions = sorted({str(row["versions"]) for run in m.checkpoint.runs for row in run.rows if row["versions"]})
    if versions:
        blocks.append(Text("Versions: " + plain("; ".join(versions)).replace('"', "").strip("{}"), "quiet"))
    blocks.append(Bullets(tuple(_limits(m))))
    return blocks


def _limits(m: Material) -> list[str]:
    match, limits = m.numbers["match"], []
    if match:
        if match["pairs"] < 30:
            limits.append(
                f"{match['pairs']} pair{'s' if match['pairs'] > 1 else ''} only: the intervals are wide, and "
                "those of the bootstrap are too narrow for so few."
            )
        limits.append(
            f"The pairs share {match['photos']} photos, and the intervals take them as independent; they say nothing "
            "of "
            "other kinds of photos."
        )
        if match["measured_pairs"] and match["measured_pairs"] < match["pairs"]:
            limits.append(
                f"Controls, survival, transfer and retrieval are of the first {match['measured_pairs']} of "
                f"{match['pairs']} pairs."
            )
    limits.append("A match that was not found may exist: the solver had a budget of evaluations.")
    if any(run.settings.get("normalize") for run in m.checkpoint.runs):
        limits.append("Embeddings are scaled to length 1: distances are at most 2.")
    return limits


def _commands(run: Run) -> str:
    """The command that makes the run again, as far as run.json tells; the data is named by its id."""
    return plain(command_of({"analysis": run.analysis, "settings": run.settings}))


def _check(run: Run) -> str:
    """The command that recomputes the rows; of a dataset on the Hub those of all its runs."""
    local = run.settings["model_revision"].startswith("sha256:") and run.settings["model_id"] != "builtin"
    return f"hf-equiv verify {plain(run.name).split('@')[0]}" + (" --model PATH" if local else "")


_BUDGET = ("radius", "norm", "solver", "max_evals", "rtol", "refine")


def comparison(materials: Sequence[Material]) -> list[Block]:
    """Several checkpoints side by side: is one more exposed than another?

    Args:
        materials: of the checkpoints.

    Returns:
        Heading, table and how to read it.
    """

    def cells(label: str, pick: Any) -> tuple[str, ...]:
        return (label, *(pick(m.numbers) for m in materials))

    def of(part: str, *keys: str) -> Any:
        def pick(numbers: Row) -> Any:
            value: Any = numbers[part]
            for key in keys:
                value = None if value is None else value.get(key)
            return value

        return pick

    def say(pick: Any, form: Any = short) -> Any:
        return lambda numbers: number(pick(numbers), form)

    def near(numbers: Row) -> str:
        found = near_budget(numbers)
        return "–" if found is None else ball(found["radius"], found["norm"])

    rows = [
        cells("pairs", lambda n: str(n["match"]["pairs"]) if n["match"] else "–"),
        cells(
            "budget of the numbers below",
            lambda n: ball(n["match"]["radius"], n["match"]["norm"]) if n["match"] else "–",
        ),
        cells("float matches that converged", lambda n: count(n["match"]["converged"]) if n["match"] else "–"),
        cells(
            "PNG matches within 1 % of unrelated photos", lambda n: count(n["match"]["matched"]) if n["match"] else "–"
        ),
        cells("PNG error", say(of("match", "embedding_error_8bit"))),
        cells("PSNR to the source [dB]", say(of("match", "psnr_db"), tenth)),
        cells("L2 to the source", say(of("match", "l2"), three)),
        cells("smallest budget that is enough", near),
        cells("matches with the target's label", lambda n: count(n["heads"]["flipped"]) if n["heads"] else "–"),
        cells("PNG error after JPEG 75", say(of("survival", "JPEG 75", "error"))),
        cells("the same of the target (control)", say(of("survival", "JPEG 75", "control"))),
        cells("largest singular value σ₁", say(of("spectrum", "sigma_max"), three)),
        cells("effective rank", say(of("spectrum", "effective_rank"), tenth)),
    ]
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    head = ("", *(plain(m.checkpoint.title) for m in materials))
    same = (
        len(
            {
                (
                    m.numbers["match"]["pairs"],
                    m.checkpoint.matches[0].settings["data_revision"],
                    m.checkpoint.matches[0].settings["seed"],
                    *(m.checkpoint.matches[0].settings.get(key) for key in _BUDGET),
                )
                for m in materials
                if m.numbers["match"]
            }
        )
        <= 1
    )
    told = "Overlapping intervals mean that the difference may be chance."
    if not same:
        told += (
            " The checkpoints were not measured on the same pairs with the same budget, or not with as many: "
            "differences may come from that."
        )
    told += " σ₁ depends on how large the embeddings of a model are; the relative distances do not."
    return [Heading("Side by side", 2, "side-by-side"), Table(head, tuple(rows), told, stacked=True)]
