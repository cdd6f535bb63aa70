"""Write the card of a dataset: results of its runs, loading and checking. The owner's own text is kept."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_equiv.formatting import excerpt, printable
from hf_equiv.runs import card as run_card
from hf_equiv.runs.directory import RUNS, analysis_of, check_command, is_withheld, run_name
from hf_equiv.runs.schema import LAYOUTS, MATCH

Runs = Mapping[str, Mapping[str, Any]]  # records by place: "" for the root, or `runs/NAME`

START = "<!-- hf_equiv: from here to the end mark `hf-equiv publish` writes the text (card 2); text outside is kept -->"
END = "<!-- hf_equiv: end -->"
_MARK = "<!-- hf_equiv: from here "
_TEMPLATE = Path(__file__).parents[1] / "templates" / "dataset_card.md.jinja"
_TAGS = {"match": "embedding-matching", "spectrum": "jacobian", "lipschitz": "lipschitz", "walk": "level-set"}
_MOST_PARTS = 1_000_000  # values of a header
_TITLES = {
    "match": "Images that share an embedding",
    "spectrum": "Jacobian spectra",
    "lipschitz": "Directional Lipschitz constants",
    "walk": "Walks through images that share an embedding",
}
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**12, "1M<n<10M"))


def dataset_card(repo_id: str, runs: Runs, previous: str | None = None, before: Runs | None = None) -> str:
    """Write the card of a dataset with these runs; `before` are the runs of the previous card."""
    # Tags, text outside the marks and settings that do not follow from the runs stay as in the previous card.
    there, text = split_header(previous or "")
    made, earlier = _facts(runs), _facts(before) if before else {}
    facts = made | {key: value for key, value in there.items() if value not in (None, earlier.get(key))}
    facts["tags"] = joined(there.get("tags"), made["tags"])
    own = {layout.folder for layout in LAYOUTS.values()}
    facts["configs"] = made["configs"] + [c for c in there.get("configs") or [] if c.get("config_name") not in own]
    above, below = around_block(text, "the dataset")
    config = made["configs"][0]["config_name"]
    place, record = max(item for item in runs.items() if LAYOUTS[analysis_of(item[1])].folder == config)
    return str(
        DatasetCard.from_template(
            DatasetCardData(**facts),
            template_path=str(_TEMPLATE),
            md=run_card.escape, code=run_card.code, run_name=run_name, analysis_of=analysis_of,
            is_withheld=is_withheld, rows_of=_rows, numbers_of=_numbers, versions_of=_versions, before=above,
            after=below, start=START, end=END, title=made["pretty_name"], repo_id=repo_id, config=config,
            runs=sorted(runs.items()), configurations=", ".join(f"`{item['config_name']}`" for item in made["configs"]),
            data_files=f"{place}/{config}/*.parquet" if place else f"{config}/*.parquet",
            run_of_config=run_name(record),
            check=check_command(repo_id, next((s for r in runs.values() if "import" in (s := r["settings"])), {})),
        )
    )  # fmt: skip


def joined(first: Any, then: Iterable[str] = ()) -> list[str]:
    """Join two lists of a header, each entry once; the first may be absent or a single entry."""
    entries = [first] if isinstance(first, str) else list(first or [])
    return [*entries, *(entry for entry in then if entry not in entries)]


def around_block(text: str, where: str) -> tuple[str, str]:
    """Return the text before and after the generated part; a text without that part gets it at the end."""
    if text.count(_MARK) != text.count(END):
        must = f"README.md of {where} must have as many end marks as start marks of the part that is written anew"
        raise ValueError(f"{must} ({END}). Restore the missing one on the Hub, then publish again.")
    if (found := _block(text)) is not None:
        return text[: found.start], text[found.stop :]
    return text.rstrip() + "\n\n" if text.strip() else "\n", "\n"


def generated_parts(card: str, runs: Runs, repo_id: str | None) -> tuple[str, str] | None:
    """Return the generated part of a card, and the one that these runs give; None unless it is there once."""
    there = _block(card)
    if there is None or card.count(_MARK) != 1 or card.count(END) != 1:
        return None
    named = re.search(r'load_dataset\("([^"\n]+)"', card[there])  # a folder has no name of its own
    made = dataset_card(repo_id or (named[1] if named else ""), runs)
    return card[there], made[_block(made) or slice(0)]


def _block(text: str) -> slice | None:
    """Return the place of the first generated part."""
    start = text.find(_MARK)
    closed = text.find("-->", start)
    end = text.find(END, closed)
    return None if min(start, closed, end) < 0 else slice(start, end + len(END))


def unknown_numbers(stated: str, made: str) -> list[str]:
    """Return the lines of tables with a number that another text does not have."""
    known = Counter(number for line in made.splitlines() for number in _cells(line))
    return [line for line in stated.splitlines() if Counter(_cells(line)) - known]


def _cells(line: str) -> list[str]:
    """Return the numbers among the cells of a line of a table."""
    cells = [cell.strip() for cell in line.split("|")] if line.startswith("|") else []
    return [cell for cell in cells if re.match(r"[-+]?\d", cell)]


def split_header(content: str, where: str = "the dataset") -> tuple[dict[str, Any], str]:
    """Return the YAML header of a card, and the text below it."""
    if REGEX_YAML_BLOCK.search(content) is None:  # `DatasetCard` would warn
        return {}, content
    try:
        parsed = DatasetCard(content)
        _refuse_endless(parsed.data.__dict__)
    except Exception as error:  # the YAML reader raises many classes of errors
        told = f"the YAML header of README.md in {where} cannot be read ({type(error).__name__}: {excerpt(error, 80)})"
        raise ValueError(f"{told}. Correct it on the Hub, then publish again.") from None
    return parsed.data.to_dict(), parsed.text


def _refuse_endless(header: Any) -> None:
    """Refuse a header whose aliases, written out, are endless or nearly so."""
    parts, count = [header], 0
    while parts:
        part, count = parts.pop(), count + 1
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        if count > _MOST_PARTS:
            raise ValueError(f"more than {_MOST_PARTS:,} values")


def doubled_keys(content: str) -> list[str]:
    """Return the keys of the YAML header that are there twice; some readers take the first, others the last."""
    header = REGEX_YAML_BLOCK.search(content)
    found = re.findall(r"^([\"']?)([\w-]+)\1\s*:", header[2], re.MULTILINE) if header else []
    return [key for key, count in Counter(key for _, key in found).items() if count > 1]


def configs_of(runs: Runs) -> list[dict[str, Any]]:
    """Return the configurations of a dataset: one for each kind of analysis, over all its runs."""
    made: list[dict[str, Any]] = []
    for analysis, layout in LAYOUTS.items():
        places = [place for place, record in runs.items() if analysis_of(record) == analysis]
        patterns = [f"{layout.folder}/*.parquet"] if "" in places else []
        patterns += [f"{RUNS}/*/{layout.folder}/*.parquet"] if any(places) else []
        if patterns:
            first = {} if made else {"default": True}
            made.append({"config_name": layout.folder, **first, "data_files": [{"split": "train", "path": patterns}]})
    return made


def _facts(runs: Runs) -> dict[str, Any]:
    """Return the YAML header that the runs alone would have."""
    present = {analysis_of(record) for record in runs.values()}
    analyses = [name for name in LAYOUTS if name in present]
    models = sorted({printable(record["settings"]["model_id"]) for record in runs.values()})
    what = _TITLES[analyses[0]] if len(analyses) == 1 else "Equivalence structure of embeddings"
    licences = {record["license"] for record in runs.values() if record.get("license")}
    rows = sum(_rows(record) for record in runs.values())
    return {
        "pretty_name": f"{what}: {', '.join(models[:3])}{' and others' if len(models) > 3 else ''}",
        **({"license": licences.pop() if len(licences) == 1 else "other"} if licences else {}),
        "task_categories": ["image-classification"],
        "tags": ["hf_equiv", *(_TAGS[name] for name in analyses)],
        "size_categories": [next((name for limit, name in _SIZES if rows < limit), "n>1T")],
        "configs": configs_of(runs),
    }


def check_summary(record: Mapping[str, Any], where: str) -> None:
    """Refuse a record whose summary does not hold the numbers of a card."""
    try:
        _rows(record), _numbers(record), _versions(record)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = f"no card can be made of its summary ({type(error).__name__}: {excerpt(error)})"
        raise ValueError(f"{where!r} is damaged: {told}. Make the run again, or publish to a new name.") from error


def _rows(record: Mapping[str, Any]) -> int:
    summary = record["summary"] or {}
    return int(summary.get("pairs") or summary.get("rows") or 0)


def _versions(record: Mapping[str, Any]) -> str:
    versions = json.loads(record.get("versions") or "{}")
    return ", ".join(f"{package} {number}" for package, number in versions.items() if number)


def _numbers(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    is_match = analysis_of(record) == MATCH.analysis
    return run_card.match_numbers(record["summary"]) if is_match else _named("", record["summary"])


def _named(path: str, value: Any) -> list[tuple[str, str]]:
    """Return the numbers of a summary, named by their path."""
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in _named(f"{path} {key}".strip(), part)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [(path.replace("_", " "), f"{value:.6g}")]
    return []
