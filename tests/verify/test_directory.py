import io
import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fakes import SIZE, TinyEncoder, reseal, save_photos
from hostile import NOT_STORED
from PIL import Image
from safetensors.torch import save_file

from hf_equiv.analyses import MatchConfig, make_plan, pairs, run_analysis
from hf_equiv.cli.main import _run
from hf_equiv.data.image_file import encode_png
from hf_equiv.hub.load import load_results
from hf_equiv.report.collect import find_runs, read_pictures
from hf_equiv.runs import shards
from hf_equiv.runs.schema import MATCH
from hf_equiv.verify import directory, rows

MEASURED = [
    "embedding_error", "embedding_error_8bit", "target_quantization_error", "noise_floor", "cosine_to_target",
    "cosine_to_source", "cosine_source_target", "psnr_db", "ssim", "linf", "l2", "match_prob", "target_label_prob",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of four rows in two shards."""
    folder = tmp_path_factory.mktemp("finished")
    config = MatchConfig(data=str(save_photos(folder / "photos")), pairs=4, max_evals=60, radius=60 / 255)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "FILE_ITEMS", 2)
        run_analysis(make_plan(config, TinyEncoder()), folder / "out", batch_size=2)
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path, monkeypatch) -> Path:
    """A copy of that run to tamper with, and a loader that gives its encoder back."""
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_rows_of_an_earlier_version_lack_columns(out):
    earlier = MATCH.of_file(["source"])
    for number in (0, 1):  # the first file alone, then both
        path = shards.shard_path(out, 2 * number)
        path.write_bytes(shards.shard_bytes(shards.read_shard(path, images=True), earlier, {}))
        reseal(out)
        assert not directory.verify_run(out).problems
        table = load_results(out)
        assert table["pair_id"][:] == [row["pair_id"] for row in shards.read_rows(out)]
        assert set(MATCH.added).isdisjoint(table.column_names) == (number == 1)
        assert set(MATCH.added) <= set(next(shards.read_rows(out, images=True)))


def forge(out: Path, column: str, change, row: int = 0, shard: int = 0) -> str:
    """Change one cell of one shard; returns the id of the row."""
    path = out / "matches" / f"part-0000{shard}.parquet"
    table = pq.read_table(path)
    cells = table.column(column).to_pylist()
    cells[row] = change(cells[row])
    place = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(cells, table.schema.field(place).type)), path
    )
    reseal(out)
    return table.column("pair_id")[row].as_py()


def only(report: directory.VerifyReport, **wanted) -> rows.Problem:
    found = [p for p in report.problems if all(getattr(p, k) == v for k, v in wanted.items())]
    assert found, [p.message for p in report.problems]
    return found[0]


def test_rows_in_another_order(out):
    path = out / "matches" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0]), path)
    reseal(out)
    assert "the order of the list" in only(directory.verify_run(out), file="matches/part-00000.parquet").message


def test_an_honest_run_holds(out):
    report = directory.verify_run(out)
    assert report.problems == ()
    assert (report.rows, report.verified, report.failed) == (4, 4, 0)
    rows = list(shards.read_rows(out))
    for key in ("embedding_error", "embedding_error_8bit"):
        assert getattr(report, f"worst_{key}") == pytest.approx(max(row[key] for row in rows), abs=1e-6)
    assert list(report.to_json()) == [
        "rows", "verified", "failed", "worst_embedding_error", "worst_embedding_error_8bit", "problems", "unverified",
    ]  # fmt: skip


@pytest.mark.parametrize("column", MEASURED)
def test_forged_number(out, column):
    name = forge(out, column, lambda v: v + 1e-3)
    report = directory.verify_run(out)
    problem = only(report, pair_id=name, column=column, file="matches/part-00000.parquet")
    assert problem.stated == pytest.approx(problem.recomputed + 1e-3, abs=1e-5)
    assert f"{column} states" in problem.message
    assert (report.verified, report.failed) == (3, 1)


@pytest.mark.parametrize("column", ["embedding_error", "embedding_error_8bit", "psnr_db", "ssim"])
def test_missing_number(out, column):
    name = forge(out, column, lambda _: None)
    only(directory.verify_run(out), pair_id=name, column=column, stated=None)


def test_nan_number(out):
    name = forge(out, "embedding_error_8bit", lambda _: float("nan"))
    report = directory.verify_run(out)
    only(report, pair_id=name, column="embedding_error_8bit", stated="nan")
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("column", ["source_label", "target_label", "match_label"])
def test_forged_label(out, column):
    name = forge(out, column, lambda v: "boat" if v != "boat" else "apple")
    only(directory.verify_run(out), pair_id=name, column=column)


def test_forged_flag_class_status_and_seed(out):
    first = forge(out, "same_top1", lambda v: not v)
    forge(out, "source_class", lambda _: "zebra", row=1)
    forge(out, "status", lambda v: "stalled" if v == "converged" else "converged", shard=2)
    forge(out, "seed", lambda _: 7, row=1, shard=2)
    report = directory.verify_run(out)
    only(report, pair_id=first, column="same_top1")
    only(report, column="source_class", stated="zebra")
    only(report, column="seed", stated=7, recomputed=0)
    assert report.failed >= 3


def test_forged_success(out):
    rows = {row["pair_id"]: row for row in shards.read_rows(out)}
    name = forge(out, "status", lambda v: "stalled" if v == "converged" else "converged")
    error = rows[name]["embedding_error"]
    if abs(error - 1e-5) > 2e-6:
        only(directory.verify_run(out), pair_id=name, column="status")
    for other in ("splendid", "completed"):  # "completed" is the status of other analyses
        forge(out, "status", lambda _, other=other: other)
        only(directory.verify_run(out), pair_id=name, column="status", stated=other)


def test_a_status_that_its_evaluations_contradict(out):
    rows = {row["pair_id"]: row for row in shards.read_rows(out)}
    name = forge(out, "status", lambda _: "max_evals")
    if rows[name]["num_evals"] <= 59:
        only(directory.verify_run(out), pair_id=name, column="status")
    other = forge(out, "num_evals", lambda _: 61.0, row=1)  # more than the run allowed
    only(directory.verify_run(out), pair_id=other, column="num_evals", stated=61.0, recomputed=60)


@pytest.mark.parametrize("column", ["source", "match", "target"])
def test_changed_pixel(out, column):
    def edit(cell):
        pixels = np.array(Image.open(io.BytesIO(cell["bytes"])))
        pixels[3, 4, 1] ^= 16
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    name = forge(out, column, edit)
    report = directory.verify_run(out)
    assert {p.pair_id for p in report.problems} == {name}
    only(report, pair_id=name, column="embedding_error" if column == "target" else "psnr_db")


def test_image_that_is_none(out):
    name = forge(out, "match", lambda _: {"bytes": b"junk", "path": None})
    only(directory.verify_run(out), pair_id=name, column="match", stated="a PNG image")
    name = forge(out, "match", lambda _: None)
    only(directory.verify_run(out), pair_id=name, column="match", stated="a PNG image")


@pytest.mark.parametrize("kind", NOT_STORED)
def test_stored_images_hold_pixels_alone(out, kind):
    """Behind every door of a run: verify, report, load_results, and the run that goes on."""
    name = forge(out, "target", lambda _: {"bytes": NOT_STORED[kind], "path": None})
    report = directory.verify_run(out)
    problem = only(report, pair_id=name, column="target", stated="a PNG image")
    assert "a stored image must be a PNG of 8-bit RGB pixels and nothing else" in problem.message
    for read in (_pictures, load_results, _merge):
        with pytest.raises(ValueError, match="a stored image must be a PNG of 8-bit RGB pixels and nothing else"):
            read(out)


@pytest.mark.parametrize("path", [str(Path(__file__)), "x.png", "hf://datasets/a/b/x.png", "http://127.0.0.1:9/x.png"])
def test_the_path_in_a_cell_is_not_opened(out, path):
    for content in (None, encode_png(torch.zeros(3, SIZE, SIZE))):
        forge(out, "match", lambda _, content=content: {"bytes": content, "path": path})
        assert "not paths of files" in only(directory.verify_run(out), column="file").message
        for read in (_pictures, load_results, _merge):
            with pytest.raises(ValueError, match="column 'match' must hold PNG files, not paths of files"):
                read(out)


def _pictures(out: Path) -> None:
    (run,) = find_runs([("run", out)])
    list(read_pictures(run, [row["pair_id"] for row in run.rows]))


def _merge(out: Path) -> None:
    names = [item["pair_id"] for item in json.loads((out / "run.json").read_text())["pairs"]]
    shards.merge_shards(out, MATCH, names, len(names))


def test_a_column_that_no_run_has_is_not_decoded(out):
    path = out / "matches" / "part-00000.parquet"
    features = datasets.Features({"more": datasets.Image()}).arrow_schema
    table = pq.read_table(path)
    more = pa.array([{"bytes": NOT_STORED["eps"], "path": None}] * len(table), features.field("more").type)
    pq.write_table(table.append_column(features.field("more"), more), path)
    assert "more" not in load_results(out).column_names
    assert load_results(out)[0]["match"].size == (SIZE, SIZE)


def test_an_image_of_another_size_is_not_decoded(out, monkeypatch):
    name = forge(out, "match", lambda _: {"bytes": encode_png(torch.zeros(3, 40, 30)), "path": None})
    problem = only(directory.verify_run(out), pair_id=name, column="match")
    assert (problem.stated, problem.recomputed) == ([3, 40, 30], [3, SIZE, SIZE])


def test_image_outside_the_ball(out):
    def far(cell):
        pixels = 255 - np.array(Image.open(io.BytesIO(cell["bytes"])))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    name = forge(out, "match", far)
    report = directory.verify_run(out)
    problem = only(report, pair_id=name, column="match", file="matches/part-00000.parquet")
    assert "outside the ball" in problem.message


def test_files_are_hashed(out):
    path = out / "matches" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    (out / "figures" / "pairs.png").unlink()
    (out / "matches" / "more.parquet").write_bytes(b"")
    report = directory.verify_run(out)
    assert "the file has changed" in only(report, file="matches/part-00000.parquet", column="sha256").message
    assert "the file is missing" in only(report, file="figures/pairs.png", column="sha256").message
    assert "is not listed in run.json" in only(report, file="matches/more.parquet", column="sha256").message
    only(report, file="matches/part-00000.parquet", column="file")


def test_missing_shard(out):
    (out / "matches" / "part-00002.parquet").unlink()
    reseal(out)
    report = directory.verify_run(out)
    assert sum(p.column == "pair_id" and p.recomputed == "no row" for p in report.problems) == 2
    assert (report.rows, report.verified, report.failed) == (2, 2, 2)
    assert all(
        "' is listed and missing from matches/" in p.message for p in report.problems if p.recomputed == "no row"
    )


def test_doubled_rows(out):
    data = (out / "matches" / "part-00000.parquet").read_bytes()
    (out / "matches" / "part-00009.parquet").write_bytes(data)
    report = directory.verify_run(out)
    assert sum(p.recomputed == "two rows" for p in report.problems) == 2
    assert report.failed == 2


def test_unknown_row_and_newer_row(out):
    forge(out, "pair_id", lambda _: "nobody->nothing")
    name = forge(out, "schema_version", lambda _: 99, row=1)
    report = directory.verify_run(out)
    assert "does not list this pair" in only(report, pair_id="nobody->nothing", column="pair_id").message
    assert "newer hf_equiv" in only(report, pair_id=name, column="schema_version", stated=99).message


def test_float_matches(out):
    path = out / "float" / "part-00000.safetensors"
    tensors, _ = shards.read_floats(path)
    name = sorted(tensors)[0]
    changed = tensors | {name: (tensors[name] + 0.01).clamp(0, 1)}
    save_file(changed, path)
    reseal(out)
    only(directory.verify_run(out), pair_id=name, column="embedding_error")
    save_file(tensors | {name: tensors[name] + 2}, path)
    reseal(out)
    only(directory.verify_run(out), file="float/part-00000.safetensors", pair_id=name, stated="pixels in [0, 1]")
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    reseal(out)
    only(directory.verify_run(out), pair_id=name, stated="a float image")
    path.unlink()
    only(directory.verify_run(out), file="float/part-00000.safetensors", column="file")


def test_forged_summary(out):
    record = json.loads((out / "run.json").read_text())
    record["summary"]["median"]["psnr_db"] += 1
    record["summary"]["baseline"]["distance"]["median"] *= 2
    (out / "run.json").write_text(json.dumps(record))
    report = directory.verify_run(out)
    assert {p.column for p in report.problems} == {"summary.median.psnr_db", "summary.baseline.distance.median"}


@pytest.mark.parametrize("verdict", ["All matches are perfect.", None])
def test_forged_verdict(out, verdict):
    record = json.loads((out / "run.json").read_text())
    record["summary"]["verdict"] = verdict
    (out / "run.json").write_text(json.dumps(record))
    report = directory.verify_run(out)
    assert [p.column for p in report.problems] == ["summary.verdict"]
    assert " of 4 matches reached embedding error 1e-5" in report.problems[0].message


def test_summary_that_is_none_or_has_more(out):
    record = json.loads((out / "run.json").read_text())
    record["summary"]["stars"] = 5
    (out / "run.json").write_text(json.dumps(record))
    assert [p.column for p in directory.verify_run(out).problems] == ["summary.stars"]
    (out / "run.json").write_text(json.dumps(record | {"summary": "splendid"}))
    only(directory.verify_run(out), column="summary.verdict", stated=None)


def test_other_weights(out, monkeypatch):
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder(seed=1))
    report = directory.verify_run(out)
    only(report, file="run.json", column="model_revision", recomputed=f"sha256:{1:064d}")
    assert report.failed == 4


def interrupt(photos, encoder, out, *, pairs: int, after: int) -> None:
    """Leave a run of so many pairs once so many rows are there."""

    def stop(progress):
        if progress.done == after:
            raise KeyboardInterrupt

    plan = make_plan(MatchConfig(data=str(photos), pairs=pairs, max_evals=20), encoder)
    with pytest.raises(KeyboardInterrupt):
        run_analysis(plan, out, batch_size=after, observer=stop)


def test_unfinished_run(photos, tiny, tmp_path, monkeypatch):
    interrupt(photos, tiny, tmp_path / "out", pairs=4, after=2)
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    report = directory.verify_run(tmp_path / "out")
    assert (report.rows, report.verified, report.failed) == (2, 2, 2)
    assert "the run is not finished" in report.problems[0].message


def test_missing_rows_are_counted(photos, tiny, tmp_path, monkeypatch, capsys):
    interrupt(photos, tiny, tmp_path / "out", pairs=10, after=1)
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    assert _run(["verify", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out.splitlines()
    assert sum("is listed and missing from matches/" in line for line in told) == 5
    assert "… and 4 more pairs have no rows; --json names each." in told
    assert told[-1].startswith(f"9 problems in {tmp_path / 'out'}: 1 of 10 rows hold")
    assert _run(["verify", str(tmp_path / "out"), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 9


def test_rows_of_status_error_hold(photos, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "KEPT_BYTES", 0)  # the run reads the photos again
    plan = make_plan(MatchConfig(data=str(photos), pairs=8, max_evals=20), tiny)
    (photos / "class1" / "photo1.png").write_bytes(b"broken")
    outcome = run_analysis(plan, tmp_path / "out")
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    report = directory.verify_run(tmp_path / "out")
    assert report.holds
    assert report.error_rows == len(outcome.errors) > 0
    assert (report.rows, report.verified, report.failed) == (8, 8 - report.error_rows, 0)


def test_a_run_without_one_match_does_not_hold(photos, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pairs, "KEPT_BYTES", 0)  # the run reads the photos again
    plan = make_plan(MatchConfig(data=str(photos), pairs=2, max_evals=20), tiny)
    for photo in photos.rglob("*.png"):
        photo.write_bytes(b"broken")
    run_analysis(plan, tmp_path / "out")
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    report = directory.verify_run(tmp_path / "out")
    assert not report.holds
    assert not report.problems
    monkeypatch.chdir(tmp_path)
    assert _run(["verify", "out"]) == 1
    assert capsys.readouterr().out == (
        "Nothing in out can be checked; 2 of 2 rows are of status error and hold no match.\n"
    )


def test_other_normalisation_is_named(out, monkeypatch):
    other = TinyEncoder()
    other.provenance["processor"] = json.dumps({"resize": SIZE, "image_mean": [0.5, 0.5, 0.5]})
    monkeypatch.setattr(directory, "load_recorded", lambda *_: other)
    only(directory.verify_run(out), column="processor.image_mean", recomputed=[0.5, 0.5, 0.5])


def test_float64_run_holds(photos, tmp_path, monkeypatch):
    encoder = TinyEncoder(dtype=torch.float64)
    config = MatchConfig(data=str(photos), pairs=2, max_evals=40, dtype="float64")
    run_analysis(make_plan(config, encoder), tmp_path / "out")
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder(dtype=torch.float64))
    assert directory.verify_run(tmp_path / "out").holds


def test_not_a_run(tmp_path):
    with pytest.raises(ValueError, match="must be a run directory; it does not exist"):
        directory.verify_run(tmp_path / "none")
    with pytest.raises(ValueError, match=r"must be a run directory; it has no run\.json"):
        directory.verify_run(tmp_path)


def test_local_checkpoint_must_be_named(photos, tmp_path, monkeypatch):
    encoder = TinyEncoder()
    encoder.provenance["model_id"] = "my-model"
    run_analysis(make_plan(MatchConfig(data=str(photos), pairs=1, max_evals=5), encoder), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"local checkpoint 'my-model' .* Name it with --model PATH"):
        directory.verify_run("out")


# Forgeries that agree with themselves


def edit_record(out: Path, change) -> None:
    """Change run.json and bring the hashes up to date."""
    record = json.loads((out / "run.json").read_text())
    change(record)
    (out / "run.json").write_text(json.dumps(record))


def test_a_float_match_that_is_no_match(photos, tmp_path, monkeypatch):
    run_analysis(make_plan(MatchConfig(data=str(photos), pairs=2, max_evals=40), TinyEncoder()), tmp_path / "out")
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    path = tmp_path / "out" / "float" / "part-00000.safetensors"
    tensors, costs = shards.read_floats(path)
    name = sorted(tensors)[0]
    (row,) = (r for r in shards.read_rows(tmp_path / "out", images=True) if r["pair_id"] == name)
    target = torch.from_numpy(np.array(Image.open(io.BytesIO(row["target"])))).permute(2, 0, 1) / 255
    save_file(tensors | {name: target.contiguous()}, path, metadata={"num_evals": json.dumps(costs)})
    forge(tmp_path / "out", "embedding_error", lambda _: 0.0, row=sorted(tensors).index(name))
    report = directory.verify_run(tmp_path / "out")
    assert "an image within" in only(report, column="match", pair_id=name).message


def test_a_png_that_is_not_the_rounded_match(photos, tmp_path, monkeypatch):
    config = MatchConfig(data=str(photos), pairs=1, max_evals=40, refine=False)
    run_analysis(make_plan(config, TinyEncoder()), tmp_path / "out")
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    assert directory.verify_run(tmp_path / "out").holds
    path = tmp_path / "out" / "float" / "part-00000.safetensors"
    tensors, costs = shards.read_floats(path)
    (name,) = tensors
    save_file({name: (tensors[name] + 0.01).clamp(0, 1)}, path, metadata={"num_evals": json.dumps(costs)})
    reseal(tmp_path / "out")
    assert "pixels differ by up to 0.0" in only(directory.verify_run(tmp_path / "out"), column="match").message


def test_a_status_that_its_own_error_contradicts(out):
    (name,) = (r["pair_id"] for r in list(shards.read_rows(out))[:1])
    error = next(r["embedding_error"] for r in shards.read_rows(out) if r["pair_id"] == name)
    edit_record(out, lambda r: r["settings"].update(rtol=error * 1.01))  # so near that recomputing could not tell
    for shard in (0, 2):
        for row in (0, 1):
            forge(out, "rtol", lambda _: error * 1.01, row=row, shard=shard)
    forge(out, "status", lambda _: "stalled")
    only(directory.verify_run(out), pair_id=name, column="status", stated="stalled", recomputed="converged")


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("noise_floor", 0.0, "must be at least"),
        ("noise_floor", -5e-7, "must be at least"),
        ("cosine_to_target", 1.0000005, "must be at least -1 and at most 1"),
        ("num_evals", 0.25, "must be at least 1 and at most 60"),
        ("num_evals", 7.0, "states 7, recomputed"),
        ("seconds", math.inf, "must be at least 0"),
        ("schema_version", 0, "newer hf_equiv"),
    ],
)
def test_forged_by_a_little(out, column, value, told):
    name = forge(out, column, lambda _: value)
    report = directory.verify_run(out)
    assert any(told in p.message for p in report.problems if (p.pair_id, p.column) == (name, column))
    json.dumps(report.to_json(), allow_nan=False)


def test_one_level_of_one_pixel(out):
    def edit(cell):
        pixels = np.array(Image.open(io.BytesIO(cell["bytes"])))
        pixels[3, 4, 1] += 1 if pixels[3, 4, 1] < 255 else -1
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    name = forge(out, "source", edit)
    only(directory.verify_run(out), pair_id=name, column="l2")


def test_a_row_turned_into_an_error(out):
    name = forge(out, "status", lambda _: "error")
    report = directory.verify_run(out)
    only(report, pair_id=name, column="match", stated="an image")
    only(report, pair_id=name, column="num_evals")
    assert "states no error" in only(report, pair_id=name, column="errors").message


def test_an_error_of_a_good_row(out):
    (name,) = (r["pair_id"] for r in list(shards.read_rows(out))[:1])
    edit_record(out, lambda r: r["errors"].update({name: "no reason"}))
    assert "of a row that has none" in only(directory.verify_run(out), pair_id=name, column="errors").message


def test_rows_left_out_of_the_list(out):
    def shorten(record):
        record["settings"]["num_pairs"] += 1

    edit_record(out, shorten)
    assert "ask for 5 pairs; 4 are listed" in only(directory.verify_run(out), column="settings.num_pairs").message


def test_a_run_that_is_said_to_be_unfinished(out):
    edit_record(out, lambda r: r.update(complete=False, files={}, summary={"verdict": "all perfect"}))
    report = directory.verify_run(out)
    assert not report.holds
    assert "the run is not closed" in only(report, column="complete").message


@pytest.mark.parametrize("what", ["number", "unlisted"])
def test_card(out, what):
    path = out / "README.md"
    if what == "number":
        line = next(line for line in path.read_text().splitlines() if line.startswith("| converged |"))
        path.write_text(path.read_text().replace(line, "| converged | 500 |"))
        reseal(out)
        assert "does not say what the rows say" in only(directory.verify_run(out), file="README.md").message
    else:
        path.write_text("nothing")
        edit_record(out, lambda r: r["files"].pop("README.md"))
        assert "is not listed in run.json" in only(directory.verify_run(out), file="README.md").message


def test_more_in_the_folder_than_the_rows(out):
    path = out / "float" / "part-00000.safetensors"
    tensors, costs = shards.read_floats(path)
    more = tensors | {"nobody": next(iter(tensors.values())).clone()}
    save_file(more, path, metadata={"num_evals": json.dumps(costs)})
    reseal(out)
    (out / "matches" / "x").mkdir()
    (out / "matches" / "x" / "part-00000.parquet").write_bytes(b"")
    edit_record(out, lambda r: r["files"].update({"../outside": "0"}))
    report = directory.verify_run(out)
    assert "belongs to no row" in only(report, pair_id="nobody").message
    only(report, file="matches/x/part-00000.parquet", column="sha256")
    assert "outside the run directory" in only(report, file="../outside").message


def test_a_reason_outlives_its_process(photos, tiny, tmp_path, monkeypatch):
    def stop(progress):
        if progress.stage == "saved" and progress.done == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(pairs, "KEPT_BYTES", 0)  # the run reads the photos again
    plan = make_plan(MatchConfig(data=str(photos), pairs=8, max_evals=20), tiny)
    (photos / "class1" / "photo1.png").write_bytes(b"broken")
    with pytest.raises(KeyboardInterrupt):
        run_analysis(plan, tmp_path / "out", observer=stop)
    outcome = run_analysis(plan, tmp_path / "out")
    assert {why.partition("'")[2][:17] for why in outcome.errors.values()} == {"class1/photo1.png"}
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    assert directory.verify_run(tmp_path / "out").holds
