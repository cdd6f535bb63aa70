"""What verify cannot prove is named, and what only looks proven is a problem: files, cards, commands, datasets."""

import copy
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fakes import TinyEncoder, reseal

from hf_equiv.analyses import make_plan, run_analysis
from hf_equiv.analyses.run import VERBS
from hf_equiv.cli.main import _run
from hf_equiv.hub.card import END, START, dataset_card
from hf_equiv.runs import shards
from hf_equiv.runs.directory import own_files, read_record, run_name
from hf_equiv.runs.schema import LAYOUTS
from hf_equiv.verify import directory
from hf_equiv.verify.dataset import verify_results
from hf_equiv.verify.record import check_settings

OPTIONS = {
    "match": {"max_evals": 60, "radius": 0.25},
    "spectrum": {"vectors": True},
    "walk": {"num_steps": 2, "step": 0.3},
}


def make_run(name: str, photos: Path, out: Path) -> Path:
    target = {"target": str(photos / "class1" / "photo1.png")} if name == "match" else {}
    config = VERBS[name].CONFIG(source=str(photos / "class0" / "photo0.png"), **target, **OPTIONS[name])
    run_analysis(make_plan(config, TinyEncoder()), out)
    return out


def rewrite(name: str, change):
    return lambda out: (out / name).write_text(change((out / name).read_text()))


def edit(out: Path, analysis: str, change) -> None:
    layout = LAYOUTS[analysis]
    (path,) = shards.shard_files(out, layout)
    rows = shards.read_shard(path, images=True, layout=layout)
    path.write_bytes(shards.shard_bytes([row | change(row) for row in rows], layout, {}))
    reseal(out)


def swap_lines(text: str) -> str:
    lines = text.split("\n")
    first, second = [place for place, line in enumerate(lines) if line.strip() and "hf_equiv: " not in line][-2:]
    lines[first], lines[second] = lines[second], lines[first]
    return "\n".join(lines)


def renumber(out: Path) -> None:
    for folder, kind in (("spectra", "parquet"), ("float", "safetensors")):
        (out / folder / f"part-00000.{kind}").rename(out / folder / f"part-00099.{kind}")


def six_digits(out: Path) -> None:
    for folder, kind in (("spectra", "parquet"), ("float", "safetensors")):
        (out / folder / f"part-00000.{kind}").rename(out / folder / f"part-000000.{kind}")


def rewrite_table(change, name: str = "part-00000.parquet"):
    """Return a tampering with the table of a shard."""

    def tamper(out: Path) -> None:
        table = pq.read_table(out / "spectra" / "part-00000.parquet")
        pq.write_table(change(table), out / "spectra" / name)

    return tamper


def hide_bytes(out: Path) -> None:
    path = out / "spectra" / "part-00000.parquet"
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[:footer] + b"payload" + data[footer:])


def cut_footer(out: Path) -> None:
    path = out / "spectra" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-8] + bytes(4) + b"PAR1")


def behead(out: Path) -> None:
    path = out / "spectra" / "part-00000.parquet"
    path.write_bytes(b"MORE" + path.read_bytes()[4:])


def text_as_seconds(table: pa.Table) -> pa.Table:
    return table.set_column(table.column_names.index("seconds"), "seconds", pa.array(["1"] * len(table)))


def extend_footer(out: Path) -> None:
    path = out / "spectra" / "part-00000.parquet"
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"more": "text"})


def aspect(out: Path) -> None:
    path = out / "figures" / "spectra.png"
    data = bytearray(path.read_bytes())
    data[data.index(b"pHYs") + 7] += 1
    path.write_bytes(bytes(data))


def svg_of_other_software(out: Path) -> None:
    reseal(out, lambda record: record["closed_with"].update(pillow="0"))
    (out / "figures" / "more.svg").write_text("<svg onload='a'/>")


TAMPERINGS = {
    "lines of the card in another order": rewrite("README.md", swap_lines),
    "settings of the loader": lambda out: (out / ".huggingface.yaml").write_text("configs: []"),
    "a pipe": lambda out: os.mkfifo(out / "pipe"),
    "a link": lambda out: (out / "more").symlink_to("/etc"),
    "a file number that hides the figures": renumber,
    "the aspect of a figure": aspect,
    "a file number of six digits": six_digits,
    "a shard without rows": rewrite_table(lambda table: table.slice(0, 0), "part-00007.parquet"),
    "columns in another order": rewrite_table(lambda table: table.select(table.column_names[::-1])),
    "a column twice": rewrite_table(lambda table: table.append_column("status", table["status"])),
    "a column of text": rewrite_table(text_as_seconds),
    "a table without its features": rewrite_table(lambda table: table.replace_schema_metadata(None)),
    "metadata of the footer": extend_footer,
    "a footer of no length": cut_footer,
    "another head": behead,
    "a target of a spectrum": lambda out: reseal(out, lambda record: record["images"][0].update(target_id="x")),
    "bytes between the columns": hide_bytes,
    "a table of the card without the line before it": rewrite("README.md", lambda text: text.replace("\n\n", "\n")),
    "line ends of the card": lambda out: (out / "README.md").write_bytes(
        (out / "README.md").read_bytes().replace(b"\n", b"\r\n")
    ),
    "an active figure of other software": svg_of_other_software,
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_tamperings_that_no_hash_shows(what, copied):
    out = copied("spectrum")
    TAMPERINGS[what](out)
    there = {path.relative_to(out).as_posix(): shards.sha256_file(path) for path in own_files(out)}
    reseal(out, lambda record: record.update(files=there))
    assert directory.verify_run(out).problems


@pytest.mark.parametrize("name", ["figures/spectra.png", "spectra/part-00000.parquet", "float/part-00000.safetensors"])
def test_a_pipe_is_not_read(name, copied):
    out = copied("spectrum")
    (out / name).unlink()
    os.mkfifo(out / name)
    assert directory.verify_run(out).problems


def test_a_command_that_a_shell_reads_otherwise(runs):
    record, layout = read_record(runs["match"]), LAYOUTS["match"]
    assert not [*check_settings(record, layout, TinyEncoder()), *check_settings(record, layout, None)]
    for command in (record["command"].replace("photo0.png", "$(id)", 1), record["command"] + " ; id", "rm -rf photos"):
        for encoder in (TinyEncoder(), None):  # without photos none is loaded
            found = check_settings(record | {"command": command}, layout, encoder)
            assert "command" in {problem.column for problem in found}, command


def test_pairs_that_the_command_asks_for_are_listed(runs):
    record = copy.deepcopy(read_record(runs["match"]))
    record["settings"]["drawn"] = True
    for pairs, holds in ((1, True), (2, False)):
        record["command"] = f"hf-equiv match test/tiny --data photos --max-evals 60 --radius 0.25 --pairs {pairs}"
        found = {problem.column for problem in check_settings(record, LAYOUTS["match"], TinyEncoder())}
        assert ("settings.num_pairs" not in found) is holds


def test_the_rule_of_earlier_versions_is_named(copied):
    out = copied("spectrum")
    assert not [name for name in directory.verify_run(out).unverified if "earlier" in name]
    eps = torch.finfo(torch.float32).eps
    edit(out, "spectrum", lambda row: {"rank_threshold": 1000 * eps * row["sigma_max"]})
    edit(out, "spectrum", lambda row: {"error_bound": [bound / 9 for bound in row["error_bound"]]})
    report = directory.verify_run(out)
    assert report.problems or [name for name in report.unverified if "earlier" in name]


def test_why_rows_failed_is_named(runs):
    for name, status, told in (
        ("match", "infeasible", "why a match was not reached"),
        ("walk", "box_blocked", "why a walk ended early"),
    ):
        layout, record = LAYOUTS[name], read_record(runs[name])
        rows = list(shards.read_rows(runs[name], layout=layout))
        assert told in directory.left_open(record, layout, [row | {"status": status} for row in rows])
        assert told not in directory.left_open(record, layout, [row | {"status": "completed"} for row in rows])


# --- datasets of several runs ---


@pytest.fixture
def dataset(runs, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(directory, "load_recorded", lambda settings, *_: TinyEncoder())
    folder, records = tmp_path / "dataset", {}
    for name, source in runs.items():
        place = f"runs/{run_name(read_record(source))}" if records else ""
        out = shutil.copytree(source, folder / place, dirs_exist_ok=True)
        (row, *_) = shards.read_rows(out, layout=LAYOUTS[name])
        more = {"photos": "published", "license": "mit", "rights": "mine", "versions": row["versions"]}
        reseal(out, lambda record, more=more: record.update(more))
        records[place] = read_record(out)
    records[""] |= {"card": "dataset"}
    del records[""]["files"]["README.md"]
    (folder / "run.json").write_text(json.dumps(records[""]))
    (folder / "README.md").write_text(dataset_card("alice/all", records))
    return folder


def nested(folder: Path) -> Path:
    return sorted((folder / "runs").glob("*"))[0]


def copy_root(folder: Path) -> None:
    out = folder / "runs" / run_name(read_record(folder))
    out.mkdir()
    for name in ("matches", "float", "figures"):
        shutil.copytree(folder / name, out / name)
    record = read_record(folder)
    (out / "run.json").write_text(json.dumps({key: value for key, value in record.items() if key != "card"}))


def free_card(folder: Path) -> None:
    record = read_record(nested(folder)) | {"card": "dataset"}
    del record["files"]["README.md"]
    (nested(folder) / "run.json").write_text(json.dumps(record))
    (nested(folder) / "README.md").write_text("All is proven.")


def inner_runs(folder: Path) -> None:
    (nested(folder) / "runs" / "more").mkdir(parents=True)


def no_root(folder: Path) -> None:
    (folder / "run.json").unlink()
    records = {f"runs/{path.name}": read_record(path) for path in (folder / "runs").glob("*")}
    (folder / "README.md").write_text(dataset_card("alice/all", records))


FOLDERS = {
    "the same run twice": copy_root,
    "a card of its own for a run": free_card,
    "runs inside a run": inner_runs,
    "rows without a run": no_root,
    "settings of the loader": lambda folder: (folder / ".huggingface.yaml").write_text("configs: []"),
    "lines of the card in another order": rewrite("README.md", swap_lines),
    "a key twice": rewrite("README.md", lambda text: text.replace("configs:", "configs: []\nconfigs:", 1)),
    "a second part": rewrite("README.md", lambda text: f"{text}\n{START}\nAll is proven.\n{END}\n"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_tamperings_of_a_dataset(what, dataset):
    FOLDERS[what](dataset)
    assert verify_results(dataset).problems


def test_what_the_owner_wrote_in_the_card_is_named(dataset):
    report = verify_results(dataset)
    assert report.problems == ()
    assert report.elsewhere == ()
    rewrite("README.md", lambda text: text.replace("license: mit", "license: cc0-1.0", 1))(dataset)
    assert verify_results(dataset).elsewhere == ("the owner's own text and header keys in README.md",)
    rewrite("README.md", lambda text: text.replace("(card 2)", "(card 1)") + "\nAll is proven.\n")(dataset)
    report = verify_results(dataset)
    assert len(report.elsewhere) == 2
    assert set(report.elsewhere) <= set(report.to_json()["unverified"])


def test_the_list_names_only_what_the_run_has(copied):
    out = copied("spectrum")
    (out / "LICENSE").write_text("mine")
    report = directory.verify_run(out)
    assert {"command", "num_evals", "rank_threshold within a factor of 2", "content of LICENSE"} <= set(
        report.unverified
    )
    assert not {"solver", "rtol", "max_evals", "step", "drawn", "pair_id"} & set(report.unverified)
    assert report.left_open.startswith(
        "names, origin of the images, method of the search, cost, size of float errors, "
    )
    assert report.left_open.endswith(", content of LICENSE")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("processor", None, "must be None"), ("processor", "[" * 9000, "processor"), ("processor", "7", "processor"),
        ("dtype", "bool", "`dtype` must be"), ("dtype", "none such", "`dtype` must be"),
        ("model_id", "..", "not in the current folder"), ("model_id", "a" * 300, "not in the current folder"),
    ],
)  # fmt: skip
def test_settings_of_a_stranger_that_no_run_has(key, value, told, runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = Path(shutil.copytree(runs["spectrum"], tmp_path / "out"))
    reseal(out, lambda record: record["settings"].update({key: value} if value else {}))
    reseal(out, lambda record: None if value else record["settings"].pop(key))
    assert _run(["verify", str(out)]) in (1, 2)
    printed = "".join(capsys.readouterr())
    assert told in printed
    assert "Error" not in printed


def test_evaluations_that_are_no_numbers(copied):
    out = copied("match")
    path = out / "float" / "part-00000.safetensors"
    floats, costs = shards.read_floats(path)
    for wrong in ({"match": "9", "refine": 1}, {"match": float("nan"), "refine": 1}, 7):
        path.write_bytes(shards.float_bytes(floats, dict.fromkeys(costs, wrong)))
        reseal(out)
        assert "its evaluations must be numbers" in "".join(p.message for p in directory.verify_run(out).problems)
