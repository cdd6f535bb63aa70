"""Runs that also write each match as a file of the size of its photo."""

import dataclasses
import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fakes import SIZE, TinyEncoder, draw_photo, reseal
from PIL import Image

from hf_equiv.analyses import MatchConfig, make_plan, run_analysis
from hf_equiv.data.image_file import encode_png, stored_image
from hf_equiv.runs import shards
from hf_equiv.verify import directory
from hf_equiv.verify.record import _unknown_encoder


def hard(image: Image.Image) -> Image.Image:
    """Make most of a photo black and white, beside which many levels cannot be had."""
    return image.point(lambda v: 255 if v > 150 else 0 if v < 100 else v)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place") / "photos"
    folder.mkdir()
    for name, image in {
        "a": draw_photo(1), "b": draw_photo(2, 61), "hard": hard(draw_photo(3, 33)), "small": draw_photo(4, SIZE - 1),
    }.items():  # fmt: skip
        image.save(folder / f"{name}.png")
    draw_photo(5, 20).save(folder.parent / "target.png")
    return folder


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    plan = make_plan(config(photos), TinyEncoder())
    return run_analysis(plan, out)


def config(photos, **more):
    return MatchConfig(source=str(photos), target=str(photos.parent / "target.png"), rtol=1e-3, full_size=True, **more)


@pytest.fixture
def out(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    return shutil.copytree(finished.out, tmp_path / "out")


def test_each_file_becomes_the_match_byte_for_byte(finished, photos):
    rows = {row["source_id"]: row for row in shards.read_rows(finished.out, images=True)}
    for name in ("a", "b", "hard"):
        row = rows[f"{name}.png"]
        file, photo = Image.open(io.BytesIO(row["match_full"])), Image.open(photos / f"{name}.png")
        assert (file.size, file.mode, row["full_exact"]) == (photo.size, "RGB", True)
        assert encode_png(TinyEncoder().preprocess([file])[0]) == row["match"]
        error = np.square(np.asarray(file) / 255 - np.asarray(photo) / 255).mean()
        assert row["psnr_full_db"] == pytest.approx(-10 * np.log10(error))
        assert row["embedding_error"] <= 1e-3
        assert row["embedding_error_8bit"] < 1e-2
    assert rows["a.png"]["psnr_full_db"] > rows["a.png"]["psnr_db"] - 1.5


def test_a_photo_that_is_too_small_costs_its_own_row(finished):
    (name,) = [row["pair_id"] for row in finished.rows if row["status"] == "error"]
    assert name == "small.png->target.png"
    told = "photos must be at least 16 x 16 pixels for the image processor of 'builtin', which enlarges smaller ones"
    assert told in finished.errors[name]
    assert finished.summary["full_size"]["exact"] == 3
    assert "3 of 4 files of full size become the match" in finished.summary["verdict"]


def test_verify_puts_each_file_through_the_image_processor(out, photos):
    assert not directory.verify_run(out).problems
    path = next((out / "matches").glob("*.parquet"))
    table = pq.read_table(path)
    cells = table.column("match_full").to_pylist()
    pixels = np.array(stored_image(cells[0]["bytes"]))
    pixels[20:24, 20:24] ^= 4
    cells[0]["bytes"] = encode_png(torch.from_numpy(pixels).movedim(2, 0) / 255)
    place = table.schema.get_field_index("match_full")
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(cells, field.type)), path)
    reseal(out)
    (problem,) = directory.verify_run(out).problems
    assert (problem.column, problem.stated, problem.recomputed) == ("full_exact", True, False)


def test_another_image_processor_proves_nothing(out, monkeypatch):
    other = TinyEncoder()
    other.provenance["processor"] = "{}"
    monkeypatch.setattr(directory, "load_recorded", lambda *_: other)
    report = directory.verify_run(out)
    assert "`processor` must be that of the run" in report.problems[0].message


def test_a_ball_holds_for_the_match_of_the_file(photos, tmp_path):
    plan = make_plan(config(photos, radius=20 / 255, max_evals=100), TinyEncoder())
    rows = [row for row in run_analysis(plan, tmp_path / "out").rows if row["status"] != "error"]
    assert all(row["linf"] <= 20 / 255 + 1e-6 for row in rows)
    assert sum(row["full_exact"] for row in rows) >= 2


def test_what_survives_is_measured_on_the_file(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    plan = make_plan(config(photos, through=("jpeg:75",), max_evals=60), TinyEncoder())
    run_analysis(plan, tmp_path / "out")
    row = next(row for row in shards.read_rows(tmp_path / "out", images=True) if row["source_id"] == "a.png")
    buffer, encoder = io.BytesIO(), TinyEncoder()
    Image.open(io.BytesIO(row["match_full"])).save(buffer, "JPEG", quality=75)
    z, z_target = encoder(encoder.preprocess([Image.open(buffer), Image.open(photos.parent / "target.png")])).double()
    ((_, error),) = [(one["transformation"], one["error"]) for one in row["through"]]
    assert error == pytest.approx(float((z - z_target).norm() / z_target.norm()), rel=1e-5)
    assert not directory.verify_run(tmp_path / "out").problems


def test_bad_options(photos):
    with pytest.raises(ValueError, match="`full_size` must come with the 8-bit refinement"):
        config(photos, refine=False).check()
    nearest = TinyEncoder()
    nearest.preprocess = lambda images: torch.stack(
        [torch.from_numpy(np.array(one.resize((SIZE, SIZE), 0))).movedim(2, 0) / 255 for one in images]
    )
    with pytest.raises(ValueError, match="image processor of 'builtin' must resize by a filter of Pillow"):
        make_plan(config(photos), nearest)


def test_runs_without_it_have_no_setting_of_it(photos):
    plan = make_plan(dataclasses.replace(config(photos), full_size=False), TinyEncoder())
    assert "full_size" not in plan.settings
    assert "--full-size" in make_plan(config(photos), TinyEncoder()).command


def test_settings_are_made_again_without_an_encoder(photos):
    settings = make_plan(config(photos), TinyEncoder()).settings
    assert config(photos).settings(_unknown_encoder(settings))["full_size"] is True
