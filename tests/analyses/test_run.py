import errno
import hashlib
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from fakes import SIZE, TinyEncoder, draw_photo
from PIL import Image
from runcases import files_of, rows_of

from hf_equiv.analyses import figures, make_plan, match, pairs, run
from hf_equiv.analyses.match import round_into_ball
from hf_equiv.analyses.match_config import MatchConfig
from hf_equiv.runs import directory, execute, processes, shards
from hf_equiv.runs.schema import PROVENANCE_FEATURES, ROW_FEATURES

KEYS = (
    "pair_id source_id target_id source_class target_class status embedding_error embedding_error_8bit "
    "target_quantization_error noise_floor cosine_to_target cosine_to_source cosine_source_target psnr_db ssim linf l2 "
    "num_evals seconds source_label target_label match_label match_prob target_label_prob same_top1 "
    "psnr_full_db ssim_full full_exact through models target_text cosine_to_text text_rank source_text_rank "
    "model_id model_revision data_id data_revision readout dtype attention norm radius rtol solver seed schema_version "
    "versions processor"
).split()


def config_of(photos: Path, **changes) -> MatchConfig:
    return replace(MatchConfig(data=str(photos), pairs=5, max_evals=60), **changes)


@pytest.fixture
def plan(photos, tiny):
    return make_plan(config_of(photos), tiny)


@pytest.fixture(autouse=True)
def _no_figure(request, monkeypatch):
    if request.node.name != "test_rows_files_and_record":
        monkeypatch.setattr(figures, "pairs_figure", lambda *_: None)


def same_rows(a, b) -> bool:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in a] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in b
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what a run leaves ---


def test_rows_files_and_record(plan, tmp_path):
    out = tmp_path / "out"
    outcome = run.run_analysis(plan, out, batch_size=2)
    assert [list(row) for row in outcome.rows] == [KEYS] * 5 == [[*ROW_FEATURES, *PROVENANCE_FEATURES]] * 5
    assert [row["pair_id"] for row in outcome.rows] == [pair.name for pair in plan.items]
    assert sorted(p.name for p in (out / "matches").iterdir()) == ["part-00000.parquet"]
    assert sorted(p.name for p in (out / "float").iterdir()) == ["part-00000.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "figures", "float", "matches", "run.json"]
    record = json.loads((out / "run.json").read_text())
    assert record["complete"]
    assert set(record["files"]) == {p for p in snapshot(out) if p != "run.json"}
    assert all(shards.sha256_file(out / name) == digest for name, digest in record["files"].items())
    assert record["settings"] == plan.settings
    assert [pair["pair_id"] for pair in record["pairs"]] == [row["pair_id"] for row in outcome.rows]
    assert record["summary"]["pairs"] == 5
    assert Image.open(out / "figures" / "pairs.png").size[0] > 800
    written = b"".join(data for name, data in snapshot(out).items() if not name.endswith(".png"))
    assert str(tmp_path).encode() not in written


def test_a_directory_named_as_text(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run.run_analysis(plan, "out", batch_size=2)
    assert outcome.out == Path("out")
    assert same_rows(outcome.rows, run.run_analysis(plan, tmp_path / "out").rows)


def test_datasets_loads_it(plan, tmp_path):
    run.run_analysis(plan, tmp_path / "out")
    rows = datasets.load_dataset(str(tmp_path / "out"), "matches", split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["source", "match", "target", "match_full", *KEYS]
    assert rows[0]["match"].size == (SIZE, SIZE)
    assert rows[0]["match"].mode == "RGB"


def test_numbers_are_those_of_the_files(photos, tiny, tmp_path):
    plan = make_plan(config_of(photos, pairs=3, radius=24 / 255), tiny)
    outcome = run.run_analysis(plan, tmp_path / "out")
    stored = {row["pair_id"]: row for row in shards.read_rows(tmp_path / "out", images=True)}
    floats, costs = shards.read_floats(tmp_path / "out" / "float" / "part-00000.safetensors")
    for row in outcome.rows:
        a, b, t = (_pixels(stored[row["pair_id"]][name]) for name in ("source", "match", "target"))
        zb, zt = (tiny(torch.from_numpy(x).float()[None])[0].double().numpy() for x in (b, t))
        assert row["embedding_error_8bit"] == pytest.approx(np.linalg.norm(zb - zt) / np.linalg.norm(zt), abs=1e-6)
        assert row["cosine_to_target"] == pytest.approx(zb @ zt / np.linalg.norm(zb) / np.linalg.norm(zt), abs=1e-6)
        assert row["psnr_db"] == pytest.approx(-10 * np.log10(((a - b) ** 2).mean()), abs=1e-4)
        assert row["linf"] == pytest.approx(np.abs(a - b).max(), abs=1e-6)
        assert row["linf"] <= 24 / 255 + 1e-6
        assert row["l2"] == pytest.approx(np.linalg.norm(a - b), rel=1e-5)
        image = floats[row["pair_id"]]
        z = tiny(image[None])[0].double().numpy()
        assert row["embedding_error"] == pytest.approx(np.linalg.norm(z - zt) / np.linalg.norm(zt), abs=1e-6)
        assert row["num_evals"] == costs[row["pair_id"]]["match"] <= plan.config.max_evals
    assert outcome.summary["median"]["num_evals"] == np.median([cost["match"] for cost in costs.values()])
    assert outcome.summary["median"]["num_evals_refine"] == np.median([cost["refine"] for cost in costs.values()])


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).transpose(2, 0, 1).astype(np.float64) / 255


def test_default_directory_and_hash(photos, tiny):
    plan = make_plan(config_of(photos), tiny)
    assert plan.default_out.parent == Path("runs") / "match" / "builtin"
    assert make_plan(config_of(photos), tiny).default_out == plan.default_out
    for change in ({"seed": 1}, {"rtol": 1e-4}, {"radius": 0.1}, {"max_evals": 61}, {"pairs": 4}, {"refine": False}):
        assert make_plan(config_of(photos, **change), tiny).default_out != plan.default_out
    draw_photo(12).save(photos / "class0" / "photo0.png")
    assert make_plan(config_of(photos), tiny).default_out != plan.default_out


# --- going on, and refusing to ---


def test_rows_state_errors_after_transformations(photos, tiny, tmp_path):
    names = ("jpeg:60-95", "noise:2/255", "resize:0.5")
    plan = make_plan(config_of(photos, pairs=3, through=names), tiny)
    outcome = run.run_analysis(plan, tmp_path / "a", batch_size=3)
    alone = run.run_analysis(plan, tmp_path / "b", batch_size=1)
    assert same_rows(outcome.rows, alone.rows)
    assert outcome.summary["through"] == alone.summary["through"]
    for row in outcome.rows:
        assert [one["transformation"] for one in row["through"]] == [*names]
        assert all(0 < one["error"] <= one["worst"] for one in row["through"])
        assert row["num_evals"] <= plan.config.max_evals
    errors = [row["through"][2]["error"] for row in outcome.rows]
    assert outcome.summary["through"][2]["error"] == np.median(errors)
    assert f"After {names[0]} the median error is " in outcome.summary["verdict"]
    assert "| median embedding error after noise:2/255 |" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("size", [1, 3, 64])
def test_batch_size_changes_no_number(plan, tmp_path, size):
    whole = run.run_analysis(plan, tmp_path / "a", batch_size=2).rows
    assert same_rows(whole, run.run_analysis(plan, tmp_path / "b", batch_size=size).rows)


def test_uninitialised_memory_is_never_used(plan, tmp_path):
    plain = run.run_analysis(plan, tmp_path / "a").rows
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives with NaN
    try:
        filled = run.run_analysis(plan, tmp_path / "b").rows
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_rows(plain, filled)


def test_interrupted_run_goes_on(plan, tmp_path):
    def stop(progress):
        if progress.done == 2 and progress.stage == "match":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_analysis(plan, tmp_path / "a", batch_size=2, observer=stop)
    kept = list(shards.read_rows(tmp_path / "a", images=True))
    assert not json.loads((tmp_path / "a" / "run.json").read_text())["complete"]
    outcome = run.run_analysis(plan, tmp_path / "a", batch_size=3)
    after = snapshot(tmp_path / "a")
    assert len(kept) == 2
    assert list(shards.read_rows(tmp_path / "a", images=True))[:2] == kept  # not made again: `seconds` are the same
    assert same_rows(outcome.rows, run.run_analysis(plan, tmp_path / "b").rows)
    assert run.run_analysis(plan, tmp_path / "a").summary == outcome.summary
    assert snapshot(tmp_path / "a") == after  # nothing left to do, nothing touched


@pytest.mark.parametrize("every", [1e9, 0.0], ids=["at the interruption", "when finished"])
def test_an_interruption_keeps_the_finished_pairs_of_a_batch(every, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "WRITE_EVERY", every)
    refined = {}

    def stop(progress):
        refined.update(dict.fromkeys(progress.pair_ids if progress.stage == "refine" else ()))
        if len(refined) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_analysis(plan, tmp_path / "a", batch_size=5, observer=stop)
    kept = {row["pair_id"]: row for row in shards.read_rows(tmp_path / "a", images=True)}
    assert set(kept) == {*list(refined)[:2]}
    made = set()
    outcome = run.run_analysis(plan, tmp_path / "a", batch_size=5, observer=lambda p: made.update(p.pair_ids))
    assert made == {row["pair_id"] for row in outcome.rows} - set(kept)
    assert all(row == kept.get(row["pair_id"], row) for row in shards.read_rows(tmp_path / "a", images=True))
    run.run_analysis(plan, tmp_path / "b")
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_leftovers_of_a_kill_are_swept(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILE_ITEMS", 2)
    out = tmp_path / "out"
    outcome = run.run_analysis(plan, out, batch_size=2)
    (out / "matches" / "part-00002.parquet").unlink()  # its float file was renamed, its rows were not
    (out / "matches" / ".part-00002.parquet.77.tmp").write_bytes(b"half a file")
    (out / ".run.json.77.tmp").write_bytes(b"{")
    again = run.run_analysis(plan, out, batch_size=2)
    assert same_rows(outcome.rows, again.rows)
    assert not list(out.rglob("*.tmp"))


def test_other_settings_are_refused_by_name(photos, tiny, tmp_path):
    run.run_analysis(make_plan(config_of(photos), tiny), tmp_path / "out")
    before = snapshot(tmp_path / "out")
    other = make_plan(config_of(photos, rtol=1e-4, seed=1), tiny)
    with pytest.raises(
        ValueError, match=r"other settings: rtol \(1e-05 there, 0.0001 asked\), seed \(0 there, 1 asked\)"
    ):
        run.run_analysis(other, tmp_path / "out")
    with pytest.raises(ValueError, match=r"--overwrite is never"):
        run.run_analysis(other, tmp_path / "out", overwrite="never")
    assert snapshot(tmp_path / "out") == before
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert run.run_analysis(other, tmp_path / "out", overwrite="always").rows[0]["rtol"] == 1e-4
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("overwrite", directory.OVERWRITE)
def test_a_folder_of_other_things_is_left_alone(plan, tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and not a run directory"):
        run.run_analysis(plan, tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_damaged_or_newer_record(plan, tmp_path):
    out = tmp_path / "out"
    run.run_analysis(plan, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version 99; this version of hf_equiv knows up to"):
        run.run_analysis(plan, out)
    (out / "run.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        run.run_analysis(plan, out)


def test_two_runs_at_once(plan, tmp_path):
    with directory.locked(tmp_path / "out"), pytest.raises(ValueError, match=r"is being written by another run"):
        run.run_analysis(plan, tmp_path / "out")
    assert run.run_analysis(plan, tmp_path / "out").rows
    assert not (tmp_path / "out" / ".lock").exists()


def test_lock_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    real = os.open

    def slow(path, *arguments):
        descriptor = real(path, *arguments)
        os.unlink(path)  # the run that had it has ended in between
        return descriptor

    monkeypatch.setattr(directory.os, "open", slow)
    with pytest.raises(ValueError, match="is being written by another run"), directory.locked(tmp_path / "out"):
        pass


def test_full_disk(plan, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"no space left to write .* free some space and run the same command again"):
        run.run_analysis(plan, tmp_path / "out", batch_size=2)
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    kept = [row["pair_id"] for row in shards.read_rows(tmp_path / "out")]
    assert kept == [pair.name for pair in plan.items[:2]]
    assert len(run.run_analysis(plan, tmp_path / "out").rows) == 5


def test_unwritable_directory(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        run.run_analysis(plan, tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="`overwrite` must be one of"):
        run.run_analysis(plan, tmp_path / "out", overwrite="perhaps")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        run.run_analysis(plan, tmp_path / "out", batch_size=-1)


# --- pairs and bad input ---


def test_one_target_for_many_and_zipped(photos, tiny, tmp_path):
    target = tmp_path / "t.png"
    draw_photo(20).save(target)
    plan = make_plan(MatchConfig(source=str(photos), target=str(target)), tiny)
    assert len(plan.items) == 6
    assert plan.items[0].name == "class0/photo0.png->t.png"
    assert plan.settings["data_id"] == "photos + t.png"
    others = tmp_path / "others"
    others.mkdir()
    for k in range(6):
        draw_photo(30 + k).save(others / f"{k}.png")
    plan = make_plan(MatchConfig(source=str(photos), target=str(others)), tiny)
    assert [(p.source, p.target) for p in plan.items] == [(i, i) for i in range(6)]
    (others / "0.png").unlink()
    with pytest.raises(ValueError, match=r"as many as sources; got 6 sources and 5 targets"):
        make_plan(MatchConfig(source=str(photos), target=str(others)), tiny)


def test_a_readout_that_no_pixel_changes_is_refused(photos):
    class Constant(TinyEncoder):
        def _embed(self, x):
            return torch.ones(12, dtype=x.dtype)

    with pytest.raises(ValueError, match=r"`readout` must depend on the image; 'cls' of 'builtin' is the same for all"):
        make_plan(config_of(photos), Constant())


def test_the_prompt_of_zero_shot_labels_is_recorded(photos):
    class TwoTowers(TinyEncoder):
        def classify(self, pixels, labels=None):
            return self(pixels)[:, : len(labels)]

    assert (
        make_plan(config_of(photos, labels=("ant", "bee")), TwoTowers()).settings["prompt"] == "a photo of a {label}."
    )
    assert "prompt" not in make_plan(config_of(photos), TwoTowers()).settings


def test_default_is_cat_to_coffee(tiny):
    assert [pair.name for pair in make_plan(MatchConfig(), tiny).items] == ["cat->coffee"]


def test_source_equal_to_target(photos, tiny, tmp_path):
    photo = str(photos / "class0" / "photo0.png")
    with pytest.raises(ValueError, match="source and target must be different images"):
        make_plan(MatchConfig(source=photo, target=photo), tiny)
    plan = make_plan(MatchConfig(source=str(photos), target=photo, max_evals=5), tiny)
    outcome = run.run_analysis(plan, tmp_path / "run")
    assert [row["status"] == "error" for row in outcome.rows] == [True] + 5 * [False]
    (why,) = outcome.errors.values()
    assert "'class0/photo0.png' and 'photo0.png' are the same pixels" in why


def test_named_bad_image_stops_at_the_door(photos, tiny, tmp_path):
    (photos / "class1" / "photo1.png").write_bytes(b"broken")
    draw_photo(9).save(tmp_path / "t.png")
    with pytest.raises(ValueError, match=r"'class1/photo1\.png' must be an image"):
        make_plan(MatchConfig(source=str(photos), target=str(tmp_path / "t.png")), tiny)


def test_bad_images_of_a_set_stop_at_the_door_together(photos, tiny, tmp_path):
    (photos / "class1" / "photo1.png").write_bytes(b"broken")
    (photos / "class0" / "photo3.png").write_bytes(b"")
    draw_photo(9).save(tmp_path / "t.png")
    with pytest.raises(ValueError, match=r"2 images cannot be used") as caught:
        make_plan(MatchConfig(source=str(photos), target=str(tmp_path / "t.png")), tiny)
    for name in ("class0/photo3.png", "class1/photo1.png"):
        assert str(caught.value).count(name) == 1


def test_bad_images_of_a_data_set_cost_their_own_rows(photos, tiny, tmp_path):
    good = make_plan(config_of(photos, pairs=12), tiny)
    (photos / "class1" / "photo1.png").write_bytes(b"broken")
    plan = make_plan(config_of(photos, pairs=12), tiny)
    assert [pair.name for pair in plan.items] == [pair.name for pair in good.items]
    outcome = run.run_analysis(plan, tmp_path / "out")
    bad = {row["pair_id"] for row in outcome.rows if row["status"] == "error"}
    assert bad == {pair.name for pair in plan.items if "photo1" in pair.name} == set(outcome.errors) != set()
    assert all("'class1/photo1.png' must be an image" in why for why in outcome.errors.values())
    for path in photos.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"6 images cannot be used\. Remove them from the set"):
        make_plan(config_of(photos, pairs=12), tiny)


def test_one_reason_for_all_images_is_told_once(photos, tiny):
    def refuse(_):
        raise ValueError("the processor cannot be built here.")

    tiny.preprocess = refuse
    with pytest.raises(ValueError, match=r"^the processor cannot be built here\. \(images 'class.*', …\)$"):
        make_plan(config_of(photos), tiny)


def test_equal_photos_are_never_a_pair(photos, tiny):
    same = (photos / "class0" / "photo0.png").read_bytes()
    (photos / "class1" / "copy.png").write_bytes(same)
    assert len(make_plan(config_of(photos, pairs=None), tiny).items) == 10
    every = make_plan(config_of(photos, pairs=30), tiny).items  # 7·6 less 2 + 6 + 2 within a class, less the copy's 2
    assert not any({"class0/photo0.png", "class1/copy.png"} <= set(pair.columns.values()) for pair in every)
    with pytest.raises(ValueError, match=r"`pairs` must be at most 30"):
        make_plan(config_of(photos, pairs=31), tiny)


@pytest.mark.parametrize("now", ["torn", "another photo"])
def test_image_that_changes_after_planning_costs_its_rows_only(now, photos, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "KEPT_BYTES", 0)  # as in a run of more images than are kept
    plan = make_plan(config_of(photos, pairs=8), tiny)
    changed = photos / "class1" / "photo1.png"
    changed.write_bytes(b"broken") if now == "torn" else draw_photo(11).save(changed)
    notes = []
    outcome = run.run_analysis(
        plan, tmp_path / "out", observer=lambda p: notes.append(p.message) if p.message else None
    )
    failed = [row for row in outcome.rows if row["status"] == "error"]
    assert {row["pair_id"] for row in failed} == {p.name for p in plan.items if "photo1" in p.name} != set()
    assert len(notes) == len(failed)
    assert "image file 'class1/photo1.png' must not change while it is used" in notes[0]
    assert "Put it back and run the same command again" in outcome.errors[failed[0]["pair_id"]]
    assert not outcome.completed
    assert failed[0]["embedding_error"] is None
    assert failed[0]["model_id"] == "builtin"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(record["errors"]) == set(outcome.errors) == {r["pair_id"] for r in failed}
    assert set(outcome.refine_evals) == {r["pair_id"] for r in outcome.rows} - set(outcome.errors)


def test_a_named_image_that_changes_is_told(photos, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "KEPT_BYTES", 0)
    two = {"data": None, "pairs": None, "source": str(photos / "class0" / "photo0.png")}
    plan = make_plan(config_of(photos, **two, target=str(photos / "class1" / "photo1.png")), tiny)
    draw_photo(11).save(photos / "class0" / "photo0.png")
    outcome = run.run_analysis(plan, tmp_path / "out")
    assert "image file 'photo0.png' must not change" in outcome.errors["photo0.png->photo1.png"]
    with pytest.raises(ValueError, match=r"image file 'photo0.png' must not change"):
        plan.pixels(plan.items[0])


def test_each_image_is_read_once(photos, tiny, tmp_path, monkeypatch):
    seen, real = [], tiny.preprocess
    monkeypatch.setattr(tiny, "preprocess", lambda images: seen.append(images) or real(images))
    plan = make_plan(config_of(photos, pairs=12), tiny)
    for path in photos.rglob("*.png"):
        draw_photo(11).save(path)  # the run has the photos that its plan and its data_revision name
    whole = run.run_analysis(plan, tmp_path / "out")
    assert whole.errors == {}
    assert len(seen) == 6
    digests = {tuple(pair.columns.values()): pair.pixels for pair in plan.items}
    for row in shards.read_rows(tmp_path / "out", images=True):
        two = [tiny.preprocess([Image.open(io.BytesIO(row[name]))])[0] for name in ("source", "target")]
        both = b"".join(hashlib.sha256(x.numpy().tobytes()).digest() for x in two)
        key = tuple(row[name] for name in plan.items[0].columns)
        assert digests[key] == hashlib.sha256(both).hexdigest()


def test_rows_are_read_back_once(plan, tmp_path, monkeypatch):
    reads, before, real, summarize = [], [], shards.read_shard, match.summarize
    monkeypatch.setattr(shards, "read_shard", lambda path, **how: reads.append(path) or real(path, **how))
    monkeypatch.setattr(match, "summarize", lambda *given: before.append(len(reads)) or summarize(*given))
    assert len(run.run_analysis(plan, tmp_path / "out").rows) == 5
    assert before == [len(reads)]  # summary, figures, card and outcome use the rows that were read before


def test_the_command_repeats_the_run(photos, tiny, tmp_path):
    plan = make_plan(config_of(photos, radius=8 / 255, norm="linf", refine=False, labels=None), tiny)
    run.run_analysis(plan, tmp_path / "out")
    command = json.loads((tmp_path / "out" / "run.json").read_text())["command"]
    assert command == plan.command
    assert command == (
        "hf-equiv match builtin --readout cls --data photos --pairs 5 --radius 8/255 --norm linf "
        "--max-evals 60 --no-refine"
    )


def test_photos_that_changed_since_a_run_began_are_not_mixed_in(photos, tiny, tmp_path):
    def stop(progress):
        if progress.done == 2 and progress.stage == "match":
            raise KeyboardInterrupt

    plan = make_plan(config_of(photos), tiny)
    with pytest.raises(KeyboardInterrupt):
        run.run_analysis(plan, tmp_path / "out", batch_size=2, observer=stop)
    before = snapshot(tmp_path / "out")
    draw_photo(11).save(photos / "class2" / "photo5.png")
    later = make_plan(config_of(photos), tiny)
    assert later.default_out != plan.default_out
    with pytest.raises(ValueError, match=r"a run of other settings: the photos changed \(.* there, .* asked\)"):
        run.run_analysis(later, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


def test_encoder_that_fails_on_one_image(photos, tmp_path):
    class Fails(TinyEncoder):
        def __call__(self, pixels):
            if any(torch.equal(x.float(), self.bad) for x in pixels):
                raise RuntimeError("this image is too much")
            return super().__call__(pixels)

    encoder = Fails()
    encoder.bad = torch.zeros(())
    plan = make_plan(config_of(photos), encoder)
    encoder.bad = plan.pixels(plan.items[2])[1]
    outcome = run.run_analysis(plan, tmp_path / "out")
    bad = [row["status"] == "error" for row in outcome.rows]
    assert bad[2]
    assert not all(bad)


BAD_OPTIONS = [
    ({"radius": 0.0}, r"`radius` must lie in \(0, 1\]"),
    ({"radius": -0.1}, r"`radius` must lie in \(0, 1\]"),
    ({"radius": float("nan")}, r"`radius` must lie in"),
    ({"radius": 1.01}, r"`radius` must lie in \(0, 1\]"),
    ({"radius": 28.0, "norm": "l2"}, r"`radius` must lie in \(0, 27.7"),
    ({"radius": float("nan"), "norm": "l2"}, r"`radius` must be finite and above 0; got nan"),
    ({"rtol": 1.0}, r"`rtol` must be below 1, the error of an embedding of zeros; got 1\.0"),
    ({"rtol": 0.0}, r"`rtol` must be finite and above 0"),
    ({"rtol": -1e-3}, r"`rtol` must be finite and above 0"),
    ({"rtol": float("nan")}, r"`rtol` must be finite and above 0"),
    ({"max_evals": 0}, r"`max_evals` must be at least 1"),
    ({"seed": -1}, r"`seed` must be at least 0; got -1"),
    ({"solver": "newton"}, r"`solver` must be one of lbfgs, adam, gd"),
    ({"norm": "l7"}, r"`norm` must be one of linf, l2"),
    ({"dtype": "int8"}, r"`dtype` must be one of float32, float64"),
    ({"labels": ("cat",)}, r"`labels` must be at least two different names"),
    ({"through": ()}, r"`through` must name a transformation; got none"),
    ({"through": ("jpeg:101",)}, r"`through` must give jpeg a whole quality from 1 to 100"),
    ({"labels": ("cat", "dog")}, r"`labels` must be None for this encoder"),
    ({"source": "a.png"}, r"`source` must come with `target`"),
    ({"target": "a.png"}, r"`target` must come with `source`"),
    ({"data": "builtin", "source": "a", "target": "b"}, r"`data` must not be combined"),
    ({"norm": "l2"}, r"`norm` must come with `radius`"),
    ({"image_column": "photo"}, r"`image_column` must come with a parquet file or a dataset; 'builtin' has no columns"),
    ({"pairs": 3}, r"`pairs` must come with `data`"),
    ({"data": "builtin", "pairs": 0}, r"`pairs` must be at least 1"),
    ({"data": "builtin", "pairs": 13}, r"`pairs` must be at most 12"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS)
def test_bad_options(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(MatchConfig(**changes), tiny)


# --- rounding inside the ball ---


@pytest.mark.parametrize(
    ("norm", "radius"), [("linf", 3.4 / 255), ("linf", 8 / 255), ("l2", 0.9), ("l2", 0.11), (None, None)]
)
def test_rounding_stays_inside(norm, radius):
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, 256, (3, 9, 9), generator=generator).float() / 255
    step = torch.randn(source.shape, generator=generator)
    if norm == "linf":
        step = step.clamp(-radius, radius)
    elif norm == "l2":
        step = step * radius / step.norm()
    image = (source + step).clamp(0, 1)
    got = round_into_ball(image, source, radius, norm or "linf")
    gap = got.double() - source.double()
    if norm == "linf":
        assert gap.abs().max() <= radius + 1e-7
    elif norm == "l2":
        assert gap.norm() <= radius + 1e-7
    else:
        assert torch.equal(got, (image * 255).round() / 255)
    assert torch.equal((got * 255).round() / 255, got)
    assert (got - image).abs().max() <= 1.0001 / 255


def test_run_without_refinement(photos, tiny, tmp_path):
    for norm, radius in (("linf", 5.5 / 255), ("l2", 1.1)):
        plan = make_plan(config_of(photos, pairs=2, refine=False, norm=norm, radius=radius), tiny)
        rows = run.run_analysis(plan, tmp_path / norm).rows
        assert all(row[norm] <= radius + 1e-6 for row in rows)


# --- memory runs out ---


class Small(TinyEncoder):
    """Holds `room` images at most."""

    room = 3

    def __call__(self, pixels):
        if len(pixels) > self.room and pixels.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().__call__(pixels)


def test_batches_are_halved_when_memory_runs_out(photos, tiny, tmp_path, monkeypatch):
    told, real = [], match.match_in_stages

    def roomy(encoder, drafts, source, *given, **more):
        if len(source) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(encoder, drafts, source, *given, **more)

    plan = make_plan(config_of(photos, pairs=20), Small())
    run.run_analysis(plan, tmp_path / "whole", batch_size=8, observer=lambda p: told.append(p.message))
    assert not any(told)  # evaluations are halved, and the solvers have room
    monkeypatch.setattr(match, "match_in_stages", roomy)
    outcome = run.run_analysis(plan, tmp_path / "a", batch_size=8, observer=lambda p: told.append(p.message))
    said = [text for text in told if text]
    assert [text.partition(";")[0] for text in said] == [
        "out of memory with 8 at once",
        "out of memory with 4 at once",
    ]
    assert "going on with 2 (--batch-size 2)" in said[-1]
    assert same_rows(outcome.rows, run.run_analysis(make_plan(config_of(photos, pairs=20), tiny), tmp_path / "b").rows)


def test_a_pair_that_never_fits_is_an_error_row(photos, tmp_path, monkeypatch):
    plan = make_plan(config_of(photos, pairs=3), Small())
    monkeypatch.setattr(Small, "room", 0)
    outcome = run.run_analysis(plan, tmp_path / "out", batch_size=2)
    assert {row["status"] for row in outcome.rows} == {"error"}
    assert all(
        why.startswith("out of memory with a single pair: CUDA out of memory") for why in outcome.errors.values()
    )


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("no"), False),
    ],
)
def test_errors_of_memory_are_known(error, full):
    assert processes.ran_out(error) is full


def test_overwrite_always_keeps_no_old_row(tmp_path):
    def made(rtol, overwrite):
        config = MatchConfig(data="builtin", pairs=2, max_evals=5, rtol=rtol)
        return run.run_analysis(make_plan(config, TinyEncoder()), tmp_path / "run", overwrite=overwrite)

    made(1e-1, "missing")
    shutil.move(tmp_path / "run" / "matches", tmp_path / "elsewhere")
    (tmp_path / "run" / "matches").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        made(1e-3, "always")
    (tmp_path / "run" / "matches").unlink()
    assert {row["rtol"] for row in made(1e-3, "always").rows} == {1e-3}


def test_rows_without_their_float_match_are_made_again(tmp_path):
    plan = make_plan(MatchConfig(data="builtin", pairs=2, max_evals=5), TinyEncoder())
    before = run.run_analysis(plan, tmp_path / "run").rows
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"complete": False, "files": {}}))
    (float_file,) = (tmp_path / "run" / "float").iterdir()
    float_file.unlink()
    after = run.run_analysis(plan, tmp_path / "run").rows
    assert float_file.is_file()
    assert [row["embedding_error"] for row in after] == [row["embedding_error"] for row in before]


def test_names_of_any_sign_are_drawn_in_silence(recwarn):
    figure = figures.Figure(figsize=(1, 1))
    figure.suptitle("😀 貓 שלום")
    assert figures.png_of(figure).startswith(b"\x89PNG")
    assert not recwarn.list
