"""The card of a published dataset: what its runs found, how to load and check them. What the owner wrote is kept."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK, DatasetCard

from hf_equiv.analyses.config import SINGLE
from hf_equiv.geometry.levelset import STOP
from hf_equiv.geometry.secants import RADII
from hf_equiv.runs import card
from hf_equiv.runs.directory import RUNS, analysis_of, is_withheld, run_name
from hf_equiv.runs.schema import LAYOUTS, MATCH

Runs = Mapping[str, Mapping[str, Any]]
"""Records by place: "" for the root, or `runs/NAME`."""


START = "<!-- hf_equiv: from here to the end mark the text is replaced by `hf-equiv publish`; text outside is kept -->"


END = "<!-- hf_equiv: end -->"


_BLOCK = re.compile(r"<!-- hf_equiv: from here .*?-->.*?<!-- hf_equiv: end -->", re.DOTALL)


_PAPER = "https://arxiv.org/abs/2401.15568"


_TAGS = {"match": "embedding-matching", "spectrum": "jacobian", "lipschitz": "lipschitz", "walk": "level-set"}


_TITLES = {
    "match": "images that share an embedding",
    "spectrum": "Jacobian spectra",
    "lipschitz": "directional Lipschitz constants",
    "walk": "walks through images that share an embedding",
}


def dataset_card(repo_id: str, runs: Runs, previous: str | None = None, before: Runs | None = None) -> str:
    """Write the card of a dataset.

    Args:
        repo_id: `USER/NAME`.
        runs: its runs, by place.
        previous: the card that is there: its text outside the marks, its tags and what its owner set stay.
        before: the runs that card was written for.

    Returns:
        Markdown with a YAML header that declares the configurations.

    Raises:
        ValueError: the YAML header of the previous card cannot be read.
    """
    made, earlier = _facts(runs), _facts(before) if before else {}
    there, text = split_header(previous or "")
    facts = dict(there)
    for key, value in made.items():
        if key == "tags":
            old = [there[key]] if isinstance(there.get(key), str) else list(there.get(key) or [])
            facts[key] = [*old, *(tag for tag in value if tag not in old)]
        elif key == "configs":
            own = {layout.folder for layout in LAYOUTS.values()}
            kept = [item for item in there.get(key) or [] if item.get("config_name") not in own]
            facts[key] = [*value, *kept]
        elif key not in there or there[key] == earlier.get(key):
            facts[key] = value
    for key in ("license",):  # no run's any more, and not the owner's word
        if key in facts and key not in made and there[key] == earlier.get(key):
            del facts[key]
    block = f"{START}\n\n{card_text(repo_id, runs)}\n{END}"
    text = put_block(text, block, "the dataset")
    return f"---\n{DatasetCardData(**facts).to_yaml()}\n---\n{text}"


def put_block(text: str, block: str, where: str) -> str:
    """Put the generated part into a text without header: in place of an earlier one, else at the end."""
    if text.count("<!-- hf_equiv: from here ") != text.count(END):
        raise ValueError(
            f"README.md of {where} must have as many end marks as start marks of the part that is written anew "
            f"({END}). Restore the missing one on the Hub, then publish again."
        )
    found = _BLOCK.search(text)
    if found is not None:
        return text[: found.start()] + block + text[found.end() :]
    return (text.rstrip() + "\n\n" if text.strip() else "\n") + block + "\n"


def generated_text(content: str) -> str | None:
    """The generated part of a card, or None if it has none."""
    found = _BLOCK.search(content)
    return None if found is None else found.group()


def header(content: str) -> dict[str, Any]:
    """The YAML header of a card."""
    return split_header(content)[0]


def split_header(content: str, where: str = "the dataset") -> tuple[dict[str, Any], str]:
    """The YAML header of a card, and the text below it."""
    if REGEX_YAML_BLOCK.search(content) is None:  # asked here, for `DatasetCard` would warn
        return {}, content
    try:
        parsed = DatasetCard(content)
    except Exception as error:  # whatever YAML raises
        raise ValueError(
            f"the YAML header of README.md in {where} cannot be read ({type(error).__name__}). Correct it on the Hub, "
            "then publish again."
        ) from None
    return parsed.data.to_dict(), parsed.text


def configs_of(runs: Runs) -> list[dict[str, Any]]:
    """The configurations of a dataset: one for each kind of analysis, over all its runs."""
    made: list[dict[str, Any]] = []
    for analysis, layout in LAYOUTS.items():
        places = [place for place, record in runs.items() if analysis_of(record) == analysis]
        patterns = ([f"{layout.folder}/*.parquet"] if "" in places else []) + (
            [f"{RUNS}/*/{layout.folder}/*.parquet"] if any(places) else []
        )
        if patterns:
            first = {"default": True} if not made else {}
            made.append({"config_name": layout.folder, **first, "data_files": [{"split": "train", "path": patterns}]})
    return made


def _facts(runs: Runs) -> dict[str, Any]:
    """The YAML header that the runs alone would have."""
    analyses = sorted({analysis_of(record) for record in runs.values()}, key=list(LAYOUTS).index)
    licences = {record.get("license") for record in runs.values()} - {None}
    facts: dict[str, Any] = {"pretty_name": _title(runs)}
    if licences:
        facts["license"] = licences.pop() if len(licences) == 1 else "other"
    rows = sum(_rows(record) for record in runs.values())
    return facts | {
        "task_categories": ["image-classification"],
        "tags": ["hf_equiv", *(_TAGS[name] for name in analyses)],
        "size_categories": [_size(rows)],
        "configs": configs_of(runs),
    }


def _title(runs: Runs) -> str:
    models = sorted({str(record["settings"]["model_id"]) for record in runs.values()})
    analyses = sorted({analysis_of(record) for record in runs.values()}, key=list(LAYOUTS).index)
    what = _TITLES[analyses[0]] if len(analyses) == 1 else "equivalence structure of embeddings"
    return f"{what[0].upper()}{what[1:]}: {', '.join(models[:3])}{' and others' if len(models) > 3 else ''}"


def _rows(record: Mapping[str, Any]) -> int:
    summary = record.get("summary") or {}
    return int(summary.get("pairs") or summary.get("rows") or 0)


def _size(rows: int) -> str:
    for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if rows < limit:
            return name
    return "1M<n<10M"


def card_text(repo_id: str, runs: Runs) -> str:
    """The generated part of a card: a function of the records alone, so that it can be checked."""
    ordered = dict(sorted(runs.items()))
    first = configs_of(ordered)[0]["config_name"]
    table = [
        "| run | analysis | model | images | rows | photos |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_line(place, record) for place, record in ordered.items()),
    ]
    parts = [
        f"# {_title(ordered)}",
        f"An image encoder maps an image to a few hundred numbers, so very many images must share an embedding; what "
        f"that means for vision transformers is the subject of [arXiv:2401.15568]({_PAPER}) (Salman, Shams, Liu). This "
        "dataset holds measurements of it, made with `hf_equiv`. Every number can be recomputed from the images and "
        "the model named in the same row, but where photos are withheld.",
        "## Runs",
        "\n".join(table),
        *(_section(place, record) for place, record in ordered.items()),
        "## Load",
        _load(repo_id, ordered, first),
        "## Check",
        f"`hf-equiv verify {repo_id}` downloads the dataset, loads each recorded model at its recorded revision, and "
        "recomputes the rows.",
        "## Licence",
        "\n".join(f"* {_rights(record)}" for record in ordered.values()),
    ]
    return "\n\n".join(parts) + "\n"


def _line(place: str, record: Mapping[str, Any]) -> str:
    settings, name = record["settings"], run_name(record)
    data = card.one_line(settings["data_id"])
    link = f"[{name}]({place}/README.md)" if place else name
    cells = (link, analysis_of(record), f"`{settings['model_id']}`", data, str(_rows(record)),
             "withheld" if is_withheld(record) else "published")  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _section(place: str, record: Mapping[str, Any]) -> str:
    settings, summary = record["settings"], record["summary"]
    analysis = analysis_of(record)
    prefix = f"{place}/" if place else ""
    figures = sorted(name for name in record["files"] if name.startswith("figures/"))
    parts = [f"### {run_name(record)}", summary["verdict"]]
    parts += [f"![{name.split('/')[-1].split('.')[0]}]({prefix}{name})" for name in figures]
    if analysis == MATCH.analysis:
        made = card.run_card(MATCH, settings, summary, ()).splitlines()
        parts.append("\n".join(line for line in made if line.startswith("|")))
    else:
        parts.append("| | |\n| --- | --- |\n" + "\n".join(f"| {key} | {value} |" for key, value in _numbers(summary)))
    data = card.one_line(settings["data_id"])
    versions = json.loads(record["versions"]) if record.get("versions") else {}
    made_with = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    parts.append(
        f"Model `{settings['model_id']}` at `{settings['model_revision']}`, readout `{settings['readout']}`, "
        f"{settings['dtype']}; images from `{data}` at `{settings['data_revision']}`; seed "
        f"{settings['seed']}" + (f"; {made_with}" if made_with else "") + f". Repeat: `{command_of(record)}`"
    )
    return "\n\n".join(parts)


def _numbers(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The scalars of a summary, named by their path."""
    found: list[tuple[str, str]] = []

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{path} {key}".strip().replace("_", " "), inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((path, f"{value:.6g}"))

    walk("", {key: value for key, value in summary.items() if key != "verdict"})
    return found


def _load(repo_id: str, runs: Runs, config: str) -> str:
    others = ", ".join(f"`{item['config_name']}`" for item in configs_of(runs))
    place, record = [item for item in runs.items() if LAYOUTS[analysis_of(item[1])].folder == config][-1]
    files = f"{place}/{config}/*.parquet" if place else f"{config}/*.parquet"
    return (
        "```python\n"
        "from datasets import load_dataset\n\n"
        f'rows = load_dataset("{repo_id}", "{config}", split="train")\n'
        "```\n\n"
        f"Configurations: {others}. Rows of several runs are in one table; `model_id`, `readout`, `data_id` and the "
        "other columns at the end tell model, readout and data. Runs of other settings are loaded one by one: "
        f'`load_dataset("{repo_id}", data_files="{files}", split="train")`, or with `hf_equiv`, which also gives the '
        f'float matches on request, `hf_equiv.load_results("{repo_id}", "{config}", run="{run_name(record)}")`.'
    )


def _rights(record: Mapping[str, Any]) -> str:
    name, why = run_name(record), record.get("rights") or "not stated"
    if is_withheld(record):
        return (
            f"`{name}`: the photos are withheld, so that image columns are empty ({why}). Numbers, ids and labels stay."
        )
    return f"`{name}`: with photos; {why}. A match or frame is a changed photo, under the licence of the photo."


def command_of(record: Mapping[str, Any]) -> str:
    """The command that makes a run again, given the same images; paths are not recorded, names are."""
    settings, analysis = record["settings"], analysis_of(record)
    words: list[str] = ["hf-equiv", analysis, str(settings["model_id"])]
    revision = str(settings["model_revision"])
    if not revision.startswith("sha256:"):
        words += ["--revision", revision]
    words += _images(analysis, settings)
    defaults: Sequence[tuple[str, Any]] = (
        ("readout", "auto"), ("dtype", "float32"), ("image_column", None), ("label_column", None), ("solver", "lbfgs"),
        ("radius", None), ("rtol", 1e-5), ("max_evals", 1000), ("k", None), ("regional", None), ("heading", "random"),
        ("step", 1.0), ("num_steps", 100), ("stop", STOP), ("seed", 0),
    )  # fmt: skip
    for key, usual in defaults:
        if settings.get(key) not in (None, usual) and (key != "solver" or analysis == MATCH.analysis):
            words += ["--" + key.replace("_", "-"), str(settings[key])]
    if settings.get("norm") == "l2" and (settings.get("radius") or settings.get("regional")):
        words += ["--norm", "l2"]
    if isinstance(settings.get("directions"), Mapping):
        kinds = (k if k in SINGLE else f"{k}:{n}" for k, n in settings["directions"].items())
        words += ["--directions", ",".join(kinds)]
    for key in ("radii", "labels"):
        if settings.get(key) and settings[key] != list(RADII):
            words += ["--" + key, ",".join(map(str, settings[key]))]
    words += ["--" + key for key in ("normalize", "vectors", "linearity") if settings.get(key)]
    words += ["--no-refine"] if settings.get("refine") is False else []
    return shlex.join(words)


def _images(analysis: str, settings: Mapping[str, Any]) -> list[str]:
    names = str(settings["data_id"]).split(" + ")
    if analysis == MATCH.analysis and settings["drawn"]:
        return ["--data", names[0], "--pairs", str(settings["num_pairs"])]
    if names == ["builtin"] and (analysis != MATCH.analysis or settings["num_pairs"] == 1):
        return []
    if analysis != MATCH.analysis and len(names) == 1:
        return ["--data", names[0], "--limit", str(settings["num_images"])]
    return ["--source", names[0]] + (["--target", names[-1]] if analysis == MATCH.analysis or len(names) > 1 else [])
