"""Reports from run directories: what the page says follows from the rows; unfinished, withheld, empty, damaged runs."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fakes import TinyEncoder, save_photos
from pages import checked, tables_of

from hf_equiv.analyses import MatchConfig, SpectrumConfig, make_plan, run_analysis
from hf_equiv.analyses import figures as run_figures
from hf_equiv.analyses import spectrum as spectrum_analysis
from hf_equiv.analyses.run import VERBS
from hf_equiv.cli import audit as audit_command
from hf_equiv.cli.main import cli
from hf_equiv.cli.main import main as command
from hf_equiv.data.image_file import encode_png
from hf_equiv.formatting import ball, short, visibility
from hf_equiv.geometry import spectrum
from hf_equiv.report import claims as claim_rules
from hf_equiv.report import collect, measure, page, render
from hf_equiv.report.claims import NO, NO_FEW, OPEN, PARTLY, UNDECIDED, YES, answer, claims, near_budget, say
from hf_equiv.report.collect import default_out, find_runs, group_runs
from hf_equiv.report.numbers import CheckpointNumbers
from hf_equiv.report.page import Report, make_report
from hf_equiv.report.statistics import Estimate, Share
from hf_equiv.report.statistics import share as share_of
from hf_equiv.runs import directory, schema, shards

OPTIONS = {
    "spectrum": {},
    "lipschitz": {"directions": "random:4,top:2,row:2,null:4,gradient,toward", "linearity": True, "regional": 0.5},
    "walk": {"num_steps": 4, "step": 0.3},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Runs of every verb on one encoder: two budgets, and all geometry."""
    place = tmp_path_factory.mktemp("made")
    photos = save_photos(place / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_equiv.analyses.figures.pairs_figure", lambda *_: None)
        patch.setattr(run_figures, "png_of", blank)
        for name, radius in (("free", None), ("near", 16 / 255)):
            config = MatchConfig(data=str(photos), pairs=5, max_evals=60, radius=radius)
            run_analysis(make_plan(config, TinyEncoder()), place / "runs" / name, batch_size=2)
        for analysis, options in OPTIONS.items():
            config = VERBS[analysis].CONFIG(data=str(photos), limit=2, **options)
            run_analysis(make_plan(config, TinyEncoder()), place / "runs" / analysis)
    return place / "runs"


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    """Figures are made and not drawn, which is most of the time of a report; but in tests that ask for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(run_figures, "png_of", blank)


@pytest.fixture
def drawn() -> None:
    """Figures are drawn."""


def blank(figure) -> bytes:
    """A picture in place of a figure that has been made."""
    assert figure.axes
    return encode_png(torch.zeros(3, 2, 2))


@pytest.fixture
def runs(made, tmp_path, monkeypatch) -> Path:
    """A copy of them, whose model is found."""
    monkeypatch.setattr(collect, "load_recorded", lambda s, *_: TinyEncoder(int(s["model_revision"][7:])))
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "runs"))


@pytest.fixture(scope="module")
def model(made) -> CheckpointNumbers:
    """The numbers of a report on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "load_recorded", lambda s, *_: TinyEncoder(int(s["model_revision"][7:])))
        patch.setattr(run_figures, "png_of", blank)
        return numbers_of(made)


def edit(folder: Path, change, *, images: bool = True) -> None:
    """Rewrite the rows of a match run, and its record where the digests are."""
    for path in shards.shard_files(folder):
        rows = shards.read_shard(path, images=images)
        floats, costs = shards.read_floats(folder / "float" / f"{path.stem}.safetensors")
        index = int(path.stem.split("-")[1])
        shards.write_shard(folder, index, [change(row) for row in rows], floats, costs)
    update(folder, lambda record: record | {"files": _digests_of(folder)})


def _digests_of(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): shards.sha256_file(p) for p in directory.own_files(folder)}


def update(folder: Path, change) -> None:
    path = folder / directory.RECORD
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def words_of(report: Report) -> str:
    return " ".join("".join(checked(report.html).text).split())


# --- the whole page ---


def test_everything_is_there(runs, drawn, tmp_path):
    report = make_report([runs])
    text, page = words_of(report), checked(report.html)
    assert page.tags.count("img") == len(report.pictures) + 3 == 5 * 4 + 8 + 3  # three pictures are also at the top
    assert "Photo A The encoder sees: " in text
    assert "Of 5 pairs, this is the middle one by PSNR." in text
    assert "All 5 pairs are shown" in text
    parts = ["Is builtin exposed?", "Exposed: in all 5", "What it means for you", "Matching:", "The paper's claims"]
    for format_ in (text, report.markdown.replace("\\", "")):
        assert sorted(parts, key=format_.index) == parts
    for table in tables_of(report.markdown):
        assert len({len(row) for row in table}) == 1, table
    for name in report.pictures:
        assert f"](report_files/{name})" in report.markdown
    assert "<" not in "".join(line for line in report.markdown.splitlines() if not line.startswith("    "))
    for told in (
        "hf-equiv match builtin",
        "hf-equiv verify runs/free",
        "Where this disagrees with the paper",
        "JPEG 95",
        "control: random step",
        "How to cite",
        "rank",
    ):
        assert told in text
    assert re.search(r"Singular values of the Jacobian, largest [\d.]+, rank \d+( to \d+)?\.", report.html)
    assert report.problems == ()
    (model,) = report.numbers["models"]
    assert model["match"]["pairs"] == 5
    assert [b["radius"] for b in model["budgets"]] == [None, 16 / 255]
    report.write(tmp_path / "report.html")
    assert sorted(p.name for p in (tmp_path / "report_files").iterdir()) == sorted(report.pictures)
    make_report([runs / "free"], survival=False).write(tmp_path / "report.html")
    assert len(list((tmp_path / "report_files").iterdir())) < len(report.pictures)
    assert json.loads(json.dumps(report.numbers, allow_nan=False)) == report.numbers
    assert len(say("summary", report.models[0])) == 4
    assert len(claims(report.models[0])) == 7
    assert not any("prove" in line.lower() for line in (report.html, report.markdown))


def test_paths_as_text_and_one_or_several(runs, tmp_path):
    page = make_report("runs/free", survival=False, out="page.html")
    page.write("page.html")
    several = make_report([Path("runs/free")], survival=False, out=Path("page.html"), model=Path("nowhere"))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html == several.html
    assert (tmp_path / "page_files").is_dir()


def test_the_same_again_to_the_byte_with_and_without_what_was_kept(runs, drawn, tmp_path):
    out = tmp_path / "out" / "page.html"
    first = make_report([runs], out=out)
    assert len(list((tmp_path / "out" / "page_files").glob("measured-*.json"))) == 1
    again = make_report([runs], out=out)
    shutil.move(out.parent, tmp_path / "other")
    anew = make_report([runs], out=out)
    for other in (again, anew):
        assert (other.html, other.markdown, other.pictures) == (first.html, first.markdown, first.pictures)
    kept = next((tmp_path / "out" / "page_files").glob("measured-*.json"))
    kept.write_text("{")
    assert make_report([runs], out=out).html == first.html


def test_what_was_kept_is_used_and_forgotten_when_the_rows_change(runs, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    make_report([runs], out=out)
    calls = []
    original = measure.measure_run.__globals__["_measure_run"]
    monkeypatch.setitem(measure.measure_run.__globals__, "_measure_run", lambda *a: calls.append(1) or original(*a))
    make_report([runs], out=out)
    assert calls == []
    make_report([runs], out=out, survival=False)
    edit(runs / "free", lambda row: row | {"seconds": 1.0})
    make_report([runs], out=out)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ("embedding_error_8bit", "1.2e-1 "),
        ("embedding_error", "0.12 "),
        ("psnr_db", "12.3 dB"),
        ("num_evals", "4,321 "),
        ("target_label_prob", "0.123"),
    ],
)
def test_numbers_come_from_the_rows(runs, column, told):
    numbers = {"embedding_error_8bit": 0.123, "embedding_error": 0.123, "psnr_db": 12.3, "num_evals": 4321.0000001,
               "target_label_prob": 0.1234}  # fmt: skip
    before = words_of(make_report([runs / "free"], survival=False))
    edit(runs / "free", lambda row: row | {column: numbers[column]})
    after = words_of(make_report([runs / "free"], survival=False))
    told = {"embedding_error_8bit": "0.12 "}.get(column, told)
    assert after.count(told) > before.count(told)


def test_labels_are_counted_from_the_rows(runs):
    def change(row):
        here = row["pair_id"] < "class1"
        return row | {"source_label": "a", "target_label": "b", "match_label": "b" if here else "a", "same_top1": here}

    edit(runs / "free", change)
    rows = list(shards.read_rows(runs / "free"))
    hits = sum(row["same_top1"] for row in rows)
    (model,) = make_report([runs / "free"], survival=False).numbers["models"]
    assert (model["heads"]["flipped"]["hits"], model["heads"]["flipped"]["n"]) == (hits, 5)
    assert model["heads"]["kept"]["hits"] == 5 - hits
    assert 0 < hits < 5


def test_controls_mean_what_they_say(runs):
    (model,) = make_report([runs]).numbers["models"]
    match = model["match"]
    stated = json.loads((runs / "free" / directory.RECORD).read_text())["summary"]["baseline"]
    assert match["unrelated"]["median"] == pytest.approx(stated["distance"]["median"], rel=1e-6)
    assert match["unrelated"]["n"] == stated["num_pairs"]
    assert match["random_l2"]["value"] == pytest.approx(match["l2"]["value"], rel=0.02)
    assert match["random_error"]["value"] > 10 * match["embedding_error_8bit"]["value"]
    assert match["rounded_error"]["value"] > match["embedding_error"]["value"]
    assert model["retrieval"]["first"]["hits"] == 5
    assert model["retrieval"]["overlap"]["value"] == 1.0


# --- what can be missing ---


def test_data_ids_cannot_run(runs):
    nasty = '<script>alert(1)</script>|`x` & "y"'
    named = dict.fromkeys(("source_id", "target_id", "source_label", "match_label", "source_class", "versions"), nasty)
    edit(runs / "free", lambda row: row | named)
    update(
        runs / "free", lambda record: record | {"settings": record["settings"] | {"data_id": nasty, "solver": nasty}}
    )
    page = make_report([runs])
    assert words_of(page).count("alert(1)") > 10
    lines = [re.sub("`[^`]*`", "", line) for line in page.markdown.splitlines() if line[:4] != "    "]  # without code
    assert not [line for line in lines if "<" in line.replace("\\<", "")]
    for table in tables_of(page.markdown):
        assert len({len(row) for row in table}) == 1, table


def test_photos_withheld(runs):
    edit(runs / "free", lambda row: row | dict.fromkeys(schema.IMAGE_COLUMNS))
    report = make_report([runs / "free"])
    text = words_of(report)
    assert "withheld" in text
    assert report.problems == ()
    (model,) = report.numbers["models"]
    assert model["survival"] is None
    assert model["match"]["embedding_error_8bit"]["n"] == 5
    assert model["match"]["unrelated"]["median"] > 0.5  # as the run's own summary has it
    assert not [name for name in report.pictures if "pair" in name]


def keep(folder, count):
    """Leave a run the rows of its first pairs alone."""
    names = [pair["pair_id"] for pair in json.loads((folder / directory.RECORD).read_text())["pairs"]][:count]
    (path,) = shards.shard_files(folder)
    rows = [row for row in shards.read_shard(path, images=True) if row["pair_id"] in names]
    floats, costs = shards.read_floats(folder / "float" / f"{path.stem}.safetensors")
    shards.write_shard(folder, 0, rows, {n: floats[n] for n in names}, {n: costs[n] for n in names})


def test_partial_run(runs, drawn):
    keep(runs / "free", 2)
    update(runs / "free", lambda record: record | {"complete": False, "summary": None, "files": {}})
    report = make_report([runs / "free"])
    assert "holds 2 of 5 pairs; the run is not finished" in words_of(report)
    assert report.numbers["models"][0]["match"]["pairs"] == 2


def test_one_pair_has_no_interval(runs, drawn):
    def one(record):
        return record | {"pairs": record["pairs"][:1]}

    keep(runs / "free", 1)
    update(runs / "free", lambda record: one(record) | {"files": _digests_of(runs / "free")})
    report = make_report([runs / "free"])
    text, match = words_of(report), report.numbers["models"][0]["match"]
    assert "n = 1, no interval" in text
    assert "Only 1 pair: " in text
    assert "middle one by PSNR" not in text
    assert match["embedding_error"]["low"] is None
    assert match["converged"]["low"] is None
    assert match["unrelated"]["n"] == 1
    assert all(c.verdict != YES for c in claims(report.models[0]) if not c.claim.startswith("Null"))


def test_rows_of_status_error_are_left_out_and_counted(runs, drawn):
    names = sorted(row["pair_id"] for row in shards.read_rows(runs / "free"))

    def change(row, bad):
        keep = ("source", "target", "pair_id", "source_id", "target_id", "source_class", "target_class")
        empty = dict.fromkeys(schema.ROW_FEATURES) | {"match": None, "match_full": None} | {k: row[k] for k in keep}
        own = {k: v for k, v in row.items() if k in schema.PROVENANCE_FEATURES}
        return empty | own | {"status": "error"} if row["pair_id"] in bad else row

    edit(runs / "free", lambda row: change(row, names[:1]))
    report = make_report([runs / "free"])
    match = report.numbers["models"][0]["match"]
    assert (match["rows"], match["pairs"], match["converged"]["n"]) == (5, 4, 5)
    assert "1 error" in words_of(report)
    edit(runs / "free", lambda row: change(row, names))
    report = make_report([runs / "free"])
    assert report.numbers["models"][0]["match"] is None
    assert "Every pair of the match run ended in an error" in words_of(report)


def test_without_a_head_the_probe_stands_in(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "load_recorded", lambda *_: TinyEncoder(head=False))
    keys = ("source_label", "target_label", "match_label", "match_prob", "target_label_prob", "same_top1")
    edit(runs / "free", lambda row: row | dict.fromkeys(keys))
    photos = save_photos(tmp_path / "labelled", count=12, classes=2)
    report = make_report([runs / "free"], label_data=str(photos))
    model = report.numbers["models"][0]
    assert "no classification head" in words_of(report)
    assert model["heads"]["flipped"] is None
    assert model["probe"]["photos"] >= 12
    assert model["survival"]["JPEG 75"]["label"] is None
    with pytest.raises(ValueError, match="must hold photos with classes"):
        make_report([runs / "free"], label_data=str(photos / "class0" / "photo0.png"))


def test_only_geometry_or_only_a_match(runs, drawn):
    text = words_of(make_report([runs / "spectrum"]))
    assert "Not measured: no photos were matched." in text
    assert "To measure it: hf-equiv match builtin --readout cls --data " in text
    assert "match your own photos first" in text
    text = words_of(make_report([runs / "free"], survival=False))
    for told in ("hf-equiv spectrum builtin", "hf-equiv lipschitz builtin", "hf-equiv walk builtin", "--no-survival",
                 "--out runs/free-spectrum-", "; hf-equiv report runs/free runs/free-spectrum-",
                 "hf-equiv report runs/free --transfer ", "What helps? It was not measured whether JPEG",
                 "To measure what helps: hf-equiv report runs/free"):  # fmt: skip
        assert told in text


def test_a_spectrum_of_the_largest_values_has_no_rank(tmp_path, monkeypatch):
    topmost = partial(spectrum.jacobian_spectrum, method="golub_kahan")  # unasked only of larger models
    monkeypatch.setattr(spectrum_analysis, "jacobian_spectrum", topmost)
    plan = make_plan(SpectrumConfig(data="builtin", limit=2, k=2), TinyEncoder())
    run_analysis(plan, tmp_path / "runs")
    report = make_report(tmp_path / "runs")
    assert "rank []" not in report.html + report.markdown
    assert re.search(r"Singular values of the Jacobian, largest [\d.]+\.\"", report.html)
    text = words_of(report)
    assert "Not measured: rank and nullity. To add it: hf-equiv spectrum builtin --readout cls --data builtin" in text
    (null,) = (claim for claim in claims(report.models[0]) if claim.claim.startswith("Null space"))
    assert (null.measured, null.verdict) == (
        "the spectrum has no rank: only its largest values were computed", OPEN,
    )  # fmt: skip
    assert null.measured in text


def test_model_that_is_not_found_leaves_the_rest(runs, monkeypatch):
    def lost(*_):
        raise FileNotFoundError("model 'x' is not in the cache.")

    monkeypatch.setattr(collect, "load_recorded", lost)
    report = make_report([runs])
    assert report.problems == ("builtin: its model could not be loaded: model 'x' is not in the cache",)
    assert "because its model could not be loaded" in words_of(report)
    assert report.numbers["models"][0]["match"]["embedding_error"]["n"] == 5
    monkeypatch.setattr(collect, "load_recorded", lambda *_: TinyEncoder(7))
    assert "the run used" in make_report([runs]).problems[0]


def test_a_model_that_is_gone_leaves_what_was_measured(runs, monkeypatch):
    before = make_report([runs / "free"], out="page.html")
    monkeypatch.setattr(collect, "load_recorded", lambda *_: TinyEncoder(7))
    after = make_report([runs / "free"], out="page.html", survival=False)
    assert after.numbers["models"] == before.numbers["models"]
    assert "the run used" in after.problems[0]
    assert "The model cannot be checked now: its model could not be loaded" in words_of(after)
    assert "because its model" not in words_of(after)
    edit(runs / "free", lambda row: row | {"source_class": None, "target_class": None})
    monkeypatch.setattr(collect, "load_recorded", lambda *_: TinyEncoder())
    make_report([runs / "free"], out="page.html", survival=False)
    monkeypatch.setattr(collect, "load_recorded", lambda *_: TinyEncoder(7))
    for asked in (True, False):
        text = words_of(make_report([runs / "free"], out="page.html", survival=asked))
        for what in ("survival", "the kNN probe"):
            assert f"Not measured: {what}, because its model could not be loaded" in text
        assert "To measure what helps" not in text
        assert "--label-data" not in text
    edit(runs / "free", lambda row: row | {"seconds": 1.0})  # other rows: nothing was measured of them
    assert make_report([runs / "free"], out="page.html").numbers["models"][0]["survival"] is None


def split(folder: Path, count: int) -> None:
    """Put the first pairs of a run of one shard into a shard, and the others into another; its record says so."""
    (path,) = shards.shard_files(folder)
    rows = sorted(shards.read_shard(path, images=True), key=lambda row: _listed(folder).index(row["pair_id"]))
    floats, costs = shards.read_floats(folder / "float" / f"{path.stem}.safetensors")
    for start, own in ((0, rows[:count]), (count, rows[count:])):
        names = [row["pair_id"] for row in own]
        shards.write_shard(folder, start, own, {n: floats[n] for n in names}, {n: costs[n] for n in names})
    update(folder, lambda record: record | {"files": _digests_of(folder)})


def _listed(folder: Path) -> list[str]:
    return [pair["pair_id"] for pair in json.loads((folder / directory.RECORD).read_text())["pairs"]]


def test_rows_of_a_changed_file_count_nowhere(runs, tmp_path):
    """The numbers are those of the other rows alone, whatever the changed file says."""
    split(runs / "free", 3)
    shutil.copytree(runs / "free", tmp_path / "kept")
    keep_first(tmp_path / "kept", 3)
    honest = make_report([tmp_path / "kept"])
    second = runs / "free" / "matches" / "part-00003.parquet"
    rows = shards.read_shard(second, images=True)
    forged = [row | {"embedding_error_8bit": 1e-9, "psnr_db": 99.0, "same_top1": True} for row in rows]
    forged += [forged[0] | {"pair_id": _listed(runs / "free")[0]}]  # and one of the pairs that are not in it
    second.write_bytes(shards.shard_bytes(forged, schema.MATCH, {}))
    report = make_report([runs / "free"])
    (there,), (alone,) = report.numbers["models"], honest.numbers["models"]
    for key in ("embedding_error_8bit", "psnr_db", "converged", "matched", "within", "random_error", "rounded_error"):
        assert there["match"][key] == alone["match"][key], key
    for key in ("heads", "survival", "retrieval", "probe"):
        assert there[key] == alone[key], key
    assert [b["pairs"] for b in there["budgets"]] == [3]
    (run_,) = there["runs"]
    assert (run_["left_out"], run_["changed_files"]) == (2, ["matches/part-00003.parquet"])
    assert report.problems == (
        "free: matches/part-00003.parquet not as recorded (SHA-256); 2 of 5 pairs are left out of every number",
    )
    text = words_of(report)
    assert "the file matches/part-00003.parquet is not as run.json states (SHA-256). 2 of 5 pairs are left out" in text
    assert "the run is not finished" not in text


def keep_first(folder: Path, count: int) -> None:
    """Leave a run the pairs of its first shard, honestly recorded."""
    for name in ("matches", "float"):
        for path in sorted((folder / name).iterdir())[1:]:
            path.unlink()
    update(folder, lambda record: record | {"pairs": record["pairs"][:count], "files": _digests_of(folder)})


def test_a_shard_that_is_not_listed_counts_nowhere(runs):
    honest = make_report([runs / "free"]).numbers["models"][0]["match"]
    (path,) = shards.shard_files(runs / "free")
    rows = [row | {"psnr_db": 99.0} for row in shards.read_shard(path, images=True)]
    path.with_name("part-00000-0.parquet").write_bytes(shards.shard_bytes(rows, schema.MATCH, {}))
    report = make_report([runs / "free"])
    assert report.numbers["models"][0]["match"] == honest
    assert report.problems[0].endswith("part-00000-0.parquet not as recorded (SHA-256); nothing is read from it")
    path.with_name("part-00000-0.parquet").unlink()
    (runs / "free" / "float" / "part-00000.safetensors").write_bytes(b"another")
    report = make_report([runs / "free"])
    match = report.numbers["models"][0]["match"]
    assert match["rounded_error"] is None
    assert match["embedding_error"] == honest["embedding_error"]


def test_a_run_with_no_row_as_recorded_is_left_out(runs):
    for name in ("near", "spectrum", "lipschitz", "walk"):
        update(runs / name, lambda record: record | {"files": dict.fromkeys(record["files"], "0" * 64)})
    report = make_report([runs])
    (model,) = report.numbers["models"]
    assert [b["run"] for b in model["budgets"]] == ["runs/free"]
    assert (model["spectrum"], model["lipschitz"], model["walk"]) == (None, None, None)
    assert len(report.problems) == 4
    text = words_of(report)
    assert "The run is left out of every number: none of its 5 pairs is as recorded" in text
    assert "none of its 2 images is as recorded" in text
    assert "hf-equiv spectrum builtin" in text  # as for a verb that was not run


# --- several checkpoints ---


def test_side_by_side(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_equiv.analyses.figures.pairs_figure", lambda *_: None)
    photos = save_photos(tmp_path / "photos")
    config = MatchConfig(data=str(photos), pairs=5, max_evals=60)
    run_analysis(make_plan(config, TinyEncoder(1)), tmp_path / "other")
    report = make_report([runs, "other"], transfer=["builtin"])
    checked(report.html)
    first, second = report.numbers["models"]
    assert (first["title"], second["title"]) == ("builtin @ 00000000",) * 2 or first["title"] != second["title"]
    table = next(t for t in tables_of(report.markdown) if t[0][0] == "")
    assert len(table[0]) == 3
    assert any(row[0] == "PNG error" for row in table)
    assert "Side by side" in words_of(report)
    assert [b["radius"] for b in second["budgets"]] == [None]


def test_transfer(runs, monkeypatch):
    others = {"itself": TinyEncoder(), "same": TinyEncoder(), "stranger": TinyEncoder(3)}
    others["same"].revision = "the same function, under another revision"
    monkeypatch.setattr(collect, "load_other", lambda name, _: others[name])
    report = make_report([runs / "free"], transfer=list(others), survival=False)
    same, stranger = report.numbers["models"][0]["transfer"]
    match = report.numbers["models"][0]["match"]
    assert same["error"]["value"] == pytest.approx(match["embedding_error_8bit"]["value"], rel=1e-4)
    assert same["distance"]["value"] == pytest.approx(match["distance"]["value"], rel=1e-6)
    assert stranger["error"]["value"] > 100 * same["error"]["value"]
    told = words_of(report)
    assert "A second encoder does not help: for builtin, all 5 are nearer to the other photo." in told
    assert "A second encoder helps: for builtin, none of 5 are nearer to the other photo. Only 5 pairs: try 10." in told


def test_transfer_model_that_is_not_there(runs):
    report = make_report([runs / "free"], transfer=["./nowhere"], survival=False, local_files_only=True)
    assert "transfer to ./nowhere" in report.problems[0]
    assert "nowhere" in report.html
    assert "because no match was made" not in report.html


def test_grouping_and_names(made, tmp_path):
    found = find_runs([("runs", made), ("again", made / "free")])
    assert [r.name for r in found] == [f"runs/{n}" for n in ("free", "lipschitz", "near", "spectrum", "walk")]
    (one,) = group_runs(found)
    assert [r.name for r in one.matches] == ["runs/free", "runs/near"]
    other = replace(found[0], record=found[0].record | {"settings": found[0].settings | {"readout": "mean"}})
    assert [c.title for c in group_runs([*found, other])] == ["builtin (cls)", "builtin (mean)"]
    exact = replace(found[0], record=found[0].record | {"settings": found[0].settings | {"dtype": "float64"}})
    single, double = group_runs([*found, exact])
    assert (single.title, double.title) == ("builtin (float32)", "builtin (float64)")
    assert (len(single.runs), len(double.runs)) == (5, 1)
    assert [c.title for c in group_runs([found[0], other, exact])] == [
        "builtin (cls, float32)", "builtin (mean, float32)", "builtin (cls, float64)",
    ]  # fmt: skip
    published = tmp_path / "published"
    shutil.copytree(made / "free", published)
    shutil.copytree(made / "walk", published / "runs" / "walk")
    assert [r.name for r in find_runs([("me/set", published)])] == ["me/set", "me/set/runs/walk"]


def test_a_dataset_by_name(runs, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, **where):
        asked.append((repo_id, where["revision"], where["local_files_only"]))
        return runs / "free", "0123456789abcdef"

    # the part that fetches has its own tests, with the real clients
    monkeypatch.setattr("hf_equiv.report.collect.download_results", download)
    report = make_report(["me/matches", "me/matches@v1"], survival=False, local_files_only=True)
    assert asked == [("me/matches", None, True), ("me/matches", "v1", True)]
    assert report.numbers["models"][0]["match"]["run"] == "me/matches@01234567"
    assert default_out(["me/matches@v1"]) == Path("reports/me--matches.html")


# --- verdicts ---


def numbers_of(runs: Path) -> CheckpointNumbers:
    return make_report([runs]).models[0]


def shares(hits: int, n: int) -> Share:
    return share_of([k < hits for k in range(n)])


def test_verdicts_follow_their_rules(model):

    def verdict(start: str, **changes) -> str:
        return next(c.verdict for c in claims(replace(model, **changes)) if c.claim.startswith(start))

    good, few, none = (shares(hits, n) for hits, n in ((50, 50), (5, 5), (2, 50)))
    for share, expected in ((good, YES), (few, PARTLY), (none, NO)):
        assert verdict("Matching", match=replace(model.match, matched=share)) == expected
        assert verdict("Downstream", heads=replace(model.heads, flipped=share), probe=None) == expected
    assert verdict("Matching", match=None) == OPEN
    for apart, expected in (
        (Estimate(32.0, 31.0, 33.0, 50), NO),
        (Estimate(32.0, 31.0, 33.0, 9), NO_FEW),
        (Estimate(30.0, 29.0, 31.0, 50), UNDECIDED),
    ):
        assert verdict("Equivalence", match=replace(model.match, psnr_match_target=apart)) == expected
    for share, expected in (
        (Share(0.0, 0.0, 0.39, 6, 0), NO_FEW),
        (Share(0.0, 0.0, 0.66, 2, 0), UNDECIDED),
        (Share(0.42, 0.19, 0.68, 12, 5), UNDECIDED),
        (Share(0.58, 0.32, 0.81, 12, 7), UNDECIDED),
        (Share(1.0, None, None, 1, 1), UNDECIDED),
    ):
        assert verdict("Matching", match=replace(model.match, matched=share)) == expected
    assert verdict("Null", spectrum=replace(model.spectrum, full=2, nullity=0)) == NO_FEW
    near, far = Estimate(0.5, 0.4, 0.6, 20), Estimate(5.0, 4.0, 6.0, 20)
    close, lone = Estimate(0.2, 0.1, 0.3, 20), Estimate(0.1, None, None, 1)
    kinds = model.lipschitz.kinds
    bent = replace(model.lipschitz, kinds=kinds | {"null": replace(kinds["null"], linearity=near)})
    many = replace(bent, images=20)
    for geometry, distance, expected in (
        (many, far, NO),
        (bent, far, NO_FEW),  # four photos
        (many, replace(far, low=0.55), UNDECIDED),
        (many, near, UNDECIDED),
        (many, close, YES),
        (bent, close, PARTLY),  # four photos
        (many, lone, UNDECIDED),
    ):
        assert verdict("Locally", lipschitz=geometry, match=replace(model.match, l2=distance)) == expected
    assert verdict("Locally", lipschitz=None) == OPEN
    assert verdict("Null", spectrum=replace(model.spectrum, full=20)) == YES
    assert verdict("Null", spectrum=model.spectrum) == PARTLY
    assert verdict("Null", spectrum=replace(model.spectrum, full=20, nullity=0)) == NO
    told = say("against", replace(model, lipschitz=bent, match=replace(model.match, l2=far)))
    assert any("no exactly linear region" in text and "beyond it" in text for text in told)
    wide = replace(model.match, l2=replace(far, low=0.55))
    told = " ".join(say("against", replace(model, lipschitz=bent, match=wide)))
    assert "the intervals overlap: it is not decided" in told
    assert "beyond it" not in told


def test_look_alikes_that_fall_short_of_the_rule_are_told(model):
    first, second = model.budgets
    psnr = Estimate(29.97, 29.0, 30.5, 50)
    near = replace(second, psnr_db=psnr, nearer=Share(0.9, 0.8, 0.95, 50, 45))
    far = replace(first, psnr_db=replace(psnr, value=21.0))

    def claim(*budgets):
        return next(c for c in claims(replace(model, budgets=budgets)) if c.claim.startswith("Look-alikes"))

    short_of = claim(far, near)
    assert short_of.verdict == UNDECIDED
    assert "ε = 16/255, PSNR 29.97 dB to the source, short of the 30 dB of the rule: 45 of 50" in short_of.measured
    assert claim(far, replace(near, psnr_db=replace(psnr, value=30.0))).verdict == YES
    assert claim(replace(near, psnr_db=None)).verdict == OPEN


def test_each_budget_is_set_against_its_own_data(runs, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_equiv.analyses.figures.pairs_figure", lambda *_: None)
    config = MatchConfig(data="builtin", pairs=3, max_evals=60, radius=64 / 255)
    run_analysis(make_plan(config, TinyEncoder()), tmp_path / "runs" / "elsewhere", batch_size=3)
    (model,) = (report := make_report([runs], survival=False)).models
    free, wide, near = model.budgets
    stated = json.loads((runs / "elsewhere" / directory.RECORD).read_text())["summary"]["baseline"]["distance"]
    assert free.unrelated == near.unrelated == model.match.unrelated.median
    assert wide.unrelated == stated["median"] != free.unrelated
    assert "The budgets have different photos" in words_of(report)
    assert "ε = 64/255, builtin" in words_of(report)
    wide = replace(wide, embedding_error_8bit=Estimate(0.05, 0.04, 0.06, 5))
    assert near_budget(replace(model, budgets=(free, replace(wide, unrelated=0.6)))) is None  # it has fewer pairs
    wide = replace(wide, rows=free.rows)
    for apart, enough in ((0.6, True), (0.4, False)):  # a tenth of the distance in its own data, not in the first run's
        budgets = (free, replace(wide, unrelated=apart))
        assert (near_budget(replace(model, budgets=budgets)) is not None) is enough
    told = say("against", replace(model, budgets=(replace(wide, unrelated=4.0),)))
    assert any(f"with {short(4.0)} between unrelated photos" in text for text in told)


def test_fractions_of_an_evaluation_are_explained(runs):
    assert "(forwards + 2 cotangents + 2 tangents) / 3" in words_of(make_report([runs / "free"], survival=False))


def test_words_for_numbers():
    assert render.number(None) == "–"
    assert render.count(Share(5 / 6, 0.4365, 0.97, 6, 5)) == "5 of 6 (95 % CI 44 % to 97 %)"
    assert render.number(Estimate(1.2e-5, 1e-5, 2e-5, 9)) == "1.2e-5 (95 % CI 1e-5 to 2e-5, n = 9)"
    assert render.number(Estimate(1.2, 1.0, 2.0, 3, coverage=0.75)) == "1.20 (range 1.00 to 2.00, n = 3)"
    assert render.number(Estimate(1.0, 1.0, 1.0, 3, coverage=0.75)) == "1.00 (equal values, n = 3)"
    assert [render.tally(k, 3) for k in (0, 2, 3)] == ["none of 3", "2 of 3", "all 3"]
    assert [visibility(psnr) for psnr in (29.9, 30.0, 35.9, 36.0)] == [
        "visible", "visible on a close look", "visible on a close look", "invisible at a glance",
    ]  # fmt: skip
    assert ball(8 / 255, "linf") == "ε = 8/255"
    assert ball(2.0, "l2") == "L2 ε = 2"


@pytest.mark.parametrize(
    ("pairs", "psnr", "changes", "told"),
    [
        (10, 40.8, {}, "Exposed: in all 10 pairs, a change that is invisible at a glance (40.8 dB) gave the photo the "
         "other's embedding and label; JPEG 75 undid it."),
        (10, 33.0, {"flipped": shares(7, 9)}, "on a close look (33.0 dB) gave the photo the other's embedding; JPEG"),
        (10, 26.6, {"flipped": None}, "in all 10 pairs, a change that is visible (26.6 dB) gave the photo the other's "
         "embedding; JPEG 75 undid it."),
        (3, 40.8, {}, "Exposed: in all 3 pairs tried, a change"),
        (3, 40.8, {}, "and label; JPEG 75 undid it (only 3 pairs: try 10)."),
        (1, 40.8, {}, "Exposed: in the one pair tried, a change that is invisible at a glance (40.8 dB) gave the "
         "photo the other's embedding and label; JPEG 75 undid it (only 1 pair: try 10)."),
        (10, 40.8, {"radius": 4 / 255}, "at a glance (40.8 dB, at most 4/255) gave the photo the other's"),
        (10, 40.8, {"radius": 3.0, "norm": "l2"}, "at a glance (40.8 dB, at most 3 in L2) gave the photo the other's"),
        (10, 40.8, {"psnr_db": None}, "Exposed: in all 10 pairs, a change gave the photo the other's embedding"),
        (10, 40.8, {"matched": shares(4, 10), "nearer": shares(6, 10)}, "Partly exposed: in 4 of 10 pairs, a change"),
        (10, 40.8, {"matched": None, "nearer": shares(2, 10)}, "Partly exposed: in 2 of 10 pairs, a change that is "
         "invisible at a glance (40.8 dB) moved the photo's embedding nearer to the other's than to the original; "),
        (10, 40.8, {"matched": shares(4, 10)}, "the photo's embedding nearer to the other's than to the original; "),
        (10, 44.0, {"matched": shares(0, 10)}, "Exposed: in all 10 pairs, a change that is invisible at a glance (44"),
        (12, 44.0, {"matched": shares(0, 12), "nearer": shares(0, 12)},
         "Not exposed in this test: in none of the 12 pairs could the photo be made to pass for the other one."),
        (12, 44.0, {"matched": shares(0, 12), "nearer": shares(0, 12), "radius": 8 / 255},
         "in none of the 12 pairs could the photo be made to pass for the other one within 8/255."),
        (3, 44.0, {"matched": shares(0, 3), "nearer": shares(0, 3)}, "Undecided: in none of the 3 pairs could the "
         "photo be made to pass for the other one, which is too few to tell."),
        (12, 44.0, {"matched": shares(0, 12), "nearer": shares(0, 12), "cut_short": 2}, "Undecided: in none of the 12 "
         "pairs could the photo be made to pass for the other one, but the search ended early."),
    ],
)  # fmt: skip
def test_the_answer(model, pairs, psnr, changes, told):
    whole = shares(pairs, pairs)
    found = None if pairs == 1 else psnr - 1
    usual = {"rows": pairs, "pairs": pairs, "matched": whole, "nearer": whole, "flipped": whole,
             "psnr_db": Estimate(psnr, found, found and psnr + 1, pairs), "cut_short": 0}  # fmt: skip
    budget = replace(model.budgets[0], **usual | changes)
    jpeg = replace(model.survival["JPEG 75"], taken=shares(0, pairs), label=shares(2, 5))
    model = replace(model, match=replace(model.match, rows=pairs), budgets=(budget,), survival={"JPEG 75": jpeg})
    given = answer(model)
    assert told in given["sentence"]
    helps = {
        True: f"before embedding: JPEG 75 (undid {render.tally(pairs, pairs)}, but 2 of 5 keep the other label).",
        False: "",
    }
    assert helps["xposed:" in given["sentence"]] in given["helps"]
    assert ("pair: try 10." in given["helps"].replace("pairs", "pair")) is (
        pairs < 10 and "xposed:" in given["sentence"]
    )
    assert given["sentence"].startswith(given["verdict"])
    assert (given["tone"] in ("bad", "partly")) is ("xposed:" in given["sentence"])
    alike = replace(budget, run="alike", radius=0.5)  # of as many pairs; less visible changes would override
    assert answer(replace(model, budgets=(budget, alike))) == given
    smaller = replace(budget, run="other", rows=pairs - 1, matched=shares(0, pairs), nearer=None, psnr_db=None)
    assert answer(replace(model, budgets=(smaller, budget))) == given


def test_the_exposure_is_judged_once_for_a_page(runs, monkeypatch):
    asked = []
    rules = [(verdict, exact, lambda b, holds=holds: asked.append(b) or holds(b), order)
             for verdict, exact, holds, order in claim_rules.EXPOSURE]  # fmt: skip
    monkeypatch.setattr(claim_rules, "EXPOSURE", rules)
    budgets = make_report([runs / "free"], survival=False).models[0].budgets
    assert len(asked) <= len(rules) * len(budgets)


def test_an_unfinished_audit_names_the_command_that_completes_it(runs, tmp_path):
    audit = tmp_path / "my audit"
    for name, own in (("free", "match"), ("near", "match-16"), ("spectrum", "spectrum")):
        shutil.copytree(runs / name, audit / own)
    update(audit / "match", lambda record: record | {"command": record["command"].replace(" --max-evals 60", "")})
    told = r"To finish this audit: (hf-equiv audit builtin --readout cls --data \S+ --pairs 5 --out 'my audit')"
    found = re.search(told, words_of(make_report(audit, survival=False)))
    assert audit_command.audit.make_context("audit", shlex.split(found[1])[2:]).params["pairs"] == 5
    update(audit / "match-16", lambda record: record | {"complete": False})
    assert re.search(told, words_of(make_report(audit, survival=False)))
    update(audit / "match", lambda record: record | {"command": record["command"] + " --solver adam"})
    text = words_of(make_report(audit, survival=False))  # these runs were made one by one, with options of match
    assert "To finish this audit" not in text
    assert re.search(r"To finish a run: hf-equiv match .*--out 'my audit/match-16'", text)
    (tmp_path / "one").mkdir()
    shutil.move(audit / "match-16", tmp_path / "one" / "mine")
    assert "To finish" not in words_of(make_report(audit, survival=False))
    text = words_of(make_report("one/mine", survival=False))
    assert re.search(r"To finish a run: hf-equiv match builtin .* --radius 16/255 .*--out one/mine ", text)


@pytest.mark.parametrize(
    ("name", "told"), [("near", "--radius 16/255 --norm linf --out "), ("free", "--pairs 5 --out ")]
)
def test_a_longer_search_has_the_budget_of_the_run_that_ended_early(runs, name, told):
    lost = {"embedding_error_8bit": 1.0, "cosine_to_target": 0.0, "cosine_to_source": 1.0}
    for other in ("free", "near"):
        edit(runs / other, lambda row: row | lost)
    first = _listed(runs / name)[0]
    edit(runs / name, lambda row: row | {"status": "max_evals", "cosine_to_target": 2.0 * (row["pair_id"] == first)})
    text = words_of(make_report([runs], survival=False))
    assert re.search(f"To search longer: hf-equiv match builtin .*{told}", text)


def test_more_runs_go_where_the_same_report_finds_them(runs):
    text = words_of(make_report([runs], survival=False, out="runs/page.html"))
    assert re.search(r"--pairs 10 .*--out runs/match-[0-9a-f]{4}; hf-equiv report runs --out runs/page\.html", text)


def test_a_smaller_run_of_other_photos_overrides_nothing(runs, model, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_equiv.analyses.figures.pairs_figure", lambda *_: None)
    config = MatchConfig(data="builtin", pairs=1, max_evals=60)  # without a ball, as the larger run
    run_analysis(make_plan(config, TinyEncoder()), tmp_path / "runs" / "a")
    after = numbers_of(runs)
    assert (after.match, after.survival, answer(after)) == (model.match, model.survival, answer(model))
    assert len(after.budgets) == 3


# --- the command ---


def test_command_writes_and_says_where(runs, tmp_path):
    done = CliRunner().invoke(cli, ["report", "runs", "--no-survival"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "reports" / "builtin.html").is_file()
    assert "reports/builtin.html" in done.output
    text = (tmp_path / "reports" / "builtin.md").read_text()
    assert str(tmp_path) not in text + (tmp_path / "reports" / "builtin.html").read_text()
    assert all((tmp_path / "reports" / name).is_file() for name in _linked(text))
    done = CliRunner().invoke(cli, ["report", str(runs), "--json", "--no-survival", "--out", "x/y.html"])
    told = json.loads(done.stdout)
    assert told["analysis"] == "report"
    assert told["out"] == "x/y.html"
    assert told["models"][0]["match"]["pairs"] == 5


def _linked(markdown: str) -> list[str]:
    return re.findall(r"\]\((builtin_files/[^)]+)\)", markdown)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "does not exist"),
        (["empty"], "has no run.json"),
        (["damaged"], "is damaged"),
        (["forged"], "in forged no file of rows is as run.json states (SHA-256)"),
        (["newer"], "Upgrade hf_equiv"),
        (["without"], "it lacks settings.radius"),
        (["runs", "--out", "runs/free/run.json/page.html"], "cannot be written"),
        (["runs", "--out", "page.pdf"], "must be a file name ending in .html"),
        (["runs", "--label-data", "nowhere.parquet"], "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(runs, tmp_path, capfd, words, told):
    (tmp_path / "empty").mkdir()
    for name in ("damaged", "forged", "newer", "without"):
        shutil.copytree(runs / "free", tmp_path / name)
    for name in ("damaged", "forged"):
        shards.shard_files(tmp_path / name)[0].write_bytes(b"PAR1")
    update(tmp_path / "damaged", lambda record: record | {"complete": False})
    update(tmp_path / "newer", lambda record: record | {"schema_version": 99})
    without = {
        k: v for k, v in json.loads((runs / "free" / "run.json").read_text())["settings"].items() if k != "radius"
    }
    update(tmp_path / "without", lambda record: record | {"settings": without})
    with pytest.raises(SystemExit) as stopped:
        command(["report", *words, "-q"])
    assert stopped.value.code == 2
    errors = capfd.readouterr().err
    assert told in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "reports").exists()


def test_a_copy_of_a_run_counts_once(runs):
    (before,) = make_report([runs], survival=False).numbers["models"]
    shutil.copytree(runs / "walk", runs / "walkcopy")
    (after,) = make_report([runs], survival=False).numbers["models"]
    assert after["walk"]["l2"] == before["walk"]["l2"]


def test_transfer_to_the_model_itself_is_said_to_be_that(runs, monkeypatch):
    monkeypatch.setattr(page, "_differ", lambda other, own: False)
    report = make_report([runs / "free"], survival=False, transfer=["builtin"])
    assert "the named model is the one the matches were made for" in report.html
