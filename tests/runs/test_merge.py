"""Small shards become few files, whatever they were cut like, and whenever the process is killed."""

import json
import shutil

import pytest
from fakes import TinyEncoder, save_photos
from runcases import KilledError, files_of, killed_after, rows_of

from hf_equiv.analyses import MatchConfig, make_plan, run
from hf_equiv.runs import directory, shards
from hf_equiv.runs.schema import MATCH
from hf_equiv.verify.directory import verify_run


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    photos = save_photos(tmp_path_factory.mktemp("photos"))
    return make_plan(MatchConfig(data=str(photos), pairs=7, max_evals=10, refine=False), TinyEncoder())


@pytest.fixture(autouse=True)
def _three_in_a_file(monkeypatch):
    monkeypatch.setattr(shards, "FILE_ITEMS", 3)
    monkeypatch.setattr("hf_equiv.analyses.figures.pairs_figure", lambda *_: None)


@pytest.mark.parametrize("size", [1, 2, 64])
def test_files_do_not_depend_on_how_the_shards_were_cut(plan, tmp_path, size):
    run.run_analysis(plan, tmp_path / "a", batch_size=3)
    run.run_analysis(plan, tmp_path / "b", batch_size=size)
    assert sorted(files_of(tmp_path / "b")) == sorted(
        f"part-0000{i}.{kind}" for i in (0, 3, 6) for kind in ("parquet", "safetensors")
    )
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert [row["pair_id"] for row in shards.read_rows(tmp_path / "b")] == [pair.name for pair in plan.items]


def test_a_kill_at_every_step_of_the_merge(plan, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    run.run_analysis(plan, whole)

    def stop(_, names, *__):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(shards, "merge_shards", stop)
        with pytest.raises(KilledError):
            run.run_analysis(plan, out, batch_size=1)
    assert len(shards.shard_files(out)) == 7
    names = [pair.name for pair in plan.items]
    for step in range(1, 200):
        place = tmp_path / f"at{step}"
        shutil.copytree(out, place)
        with killed_after(step, monkeypatch):
            try:
                shards.merge_shards(place, MATCH, names, 3)
                break
            except KilledError:
                pass
        assert rows_of(place).items() <= rows_of(whole).items()
        if step % 3:  # a third of them, to be quick
            continue
        outcome = run.run_analysis(plan, place, batch_size=2)
        assert rows_of(place) == rows_of(whole)
        assert files_of(place) == files_of(whole)
        assert {row["pair_id"]: row["seconds"] for row in shards.read_rows(out)} == {
            row["pair_id"]: row["seconds"] for row in outcome.rows
        }, "a finished row was made again"
    assert step > 20


def test_shards_that_another_version_cut_elsewhere_are_left(plan, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run.run_analysis(plan, out)
    before = {path.name: path.read_bytes() for path in shards.shard_files(out)}
    shards.merge_shards(out, MATCH, [pair.name for pair in plan.items], 4)
    assert {path.name: path.read_bytes() for path in shards.shard_files(out)} == before


def test_reasons_of_errors_are_kept_with_the_rows(plan, tmp_path, monkeypatch):
    real = type(plan).pixels

    def pixels(self, pair):
        if pair.index in (2, 4):
            raise ValueError(f"photo {pair.index} is torn")
        return real(self, pair)

    monkeypatch.setattr(type(plan), "pixels", pixels)
    run.run_analysis(plan, tmp_path / "out", batch_size=2)
    noted = {k: v for path in shards.shard_files(tmp_path / "out") for k, v in shards.read_errors(path).items()}
    assert noted == {plan.items[i].name: f"photo {i} is torn" for i in (2, 4)}
    record = json.loads((tmp_path / "out" / directory.RECORD).read_text())
    assert record["errors"] == noted
    monkeypatch.setattr("hf_equiv.models.encoder.Encoder.from_pretrained", lambda *_, **__: TinyEncoder())
    assert verify_run(tmp_path / "out").holds


def test_a_full_disk_while_merging_keeps_every_row(plan, tmp_path, monkeypatch):
    real = shards.shard_bytes

    def full(rows, *arguments):
        if len(rows) > 1:
            raise OSError(28, "no space left")
        return real(rows, *arguments)

    monkeypatch.setattr(shards, "shard_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        run.run_analysis(plan, tmp_path / "out", batch_size=1)
    monkeypatch.undo()
    monkeypatch.setattr("hf_equiv.analyses.figures.pairs_figure", lambda *_: None)
    assert len(rows_of(tmp_path / "out")) == 7
    assert len(run.run_analysis(plan, tmp_path / "out").rows) == 7
