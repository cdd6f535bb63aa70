"""Defences in front of an encoder: old matches and new ones behind them, their price, and a detector."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import TinyEncoder, save_photos
from PIL import Image

from hf_equiv.analyses import MatchConfig, make_plan, run_analysis
from hf_equiv.data.sources import load_images
from hf_equiv.report import collect, defences, numbers, page
from hf_equiv.runs import shards


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("made")
    save_photos(place / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_equiv.analyses.figures.pairs_figure", lambda *_: None)
        config = MatchConfig(data=str(place / "photos"), pairs=3, max_evals=100, radius=24 / 255)
        run_analysis(make_plan(config, TinyEncoder()), place / "run")
    return place


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(defences, "_EVALS", 240)
    monkeypatch.setattr(defences, "_VIEWS", 32)
    monkeypatch.setattr(defences, "_DRAWS", 100)
    monkeypatch.setattr(defences, "_ATTACK", {"num_steps": 2, "draws": 4, "restarts": 1, "n": 50})


def measure(place, names, encoder=None, labelled=None, **more):
    (run,) = collect.find_runs([("run", place / "run")])
    given = {"labelled": labelled, "cache": None, "tell": lambda *_: None} | more
    return defences.measure_defences(run, encoder or TinyEncoder(), names, 3, **given)


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def test_an_old_match_is_judged_behind_the_defence(place):
    (found,) = measure(place, ["jpeg:50"])["defences"]
    rows, encoder = list(shards.read_rows(place / "run", images=True)), TinyEncoder()

    def behind(png):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png)).save(buffer, "JPEG", quality=50)
        return encoder(torch.from_numpy(np.array(Image.open(buffer))).movedim(2, 0)[None].float() / 255)[0]

    for own, row in zip(found["static"], rows, strict=True):
        source, match, target = (behind(row[name]) for name in ("source", "match", "target"))
        assert own["cosine_to_target"] == pytest.approx(cosine(match, target), abs=1e-5)
        assert own["cosine_to_source"] == pytest.approx(cosine(match, source), abs=1e-5)
        assert own["taken"] == (own["cosine_to_target"] > own["cosine_to_source"])
        assert own["psnr_db"] == pytest.approx(row["psnr_db"])


@pytest.mark.parametrize("name", ["jpeg:50", "resize:0.5", "smooth:0.3"])
def test_new_matches_are_made_for_the_defence_and_stay_in_the_ball(name, place, monkeypatch):
    images, plain = [], defences._Deployed.adapt
    monkeypatch.setattr(defences._Deployed, "adapt", lambda *own: images.extend(made := plain(*own)) or made)
    (found,) = measure(place, [name])["defences"]
    old, new = ([own["cosine_to_target"] for own in found[kind]] for kind in ("static", "adaptive"))
    assert all(b > a - 0.02 for a, b in zip(old, new, strict=True))  # an attacker keeps what is better
    assert sum(new) > sum(old) + 0.02 or name == "smooth:0.3"  # so smooth an encoder averages to itself
    for row, image in zip(shards.read_rows(place / "run", images=True), images, strict=False):
        levels = torch.from_numpy(np.array(Image.open(io.BytesIO(row["source"])))).movedim(2, 0)
        assert float((255 * image - levels).abs().max()) <= 24 + 1e-3
        assert torch.equal((255 * image).round() / 255, image)


def test_smoothing_is_certified_and_attacked(place):
    (found,) = measure(place, ["smooth:0.3"])["defences"]
    own = found["smoothing"]
    assert own["radii"] == [0.075, 0.15, 0.3, 0.6]
    for low, attained in zip(own["certified"], own["attained"], strict=True):
        assert low == sorted(low, reverse=True)
        assert all(a <= b + 0.02 for a, b in zip(low, attained, strict=True))


def test_the_price_is_measured_on_photos(place):
    (found,) = measure(place, ["blur:6"], labelled=load_images(place / "photos"))["defences"]
    photos = {row[name] for row in shards.read_rows(place / "run") for name in ("source_id", "target_id")}
    assert len(found["kept"]) == len(photos)
    assert found["accuracy"]["photos"] == 6
    assert not all(found["kept"])


def test_a_detector_has_a_curve_and_an_area():
    stored = {"photos": [0.1, 0.2, 0.3, None], "static": [0.25, 0.4], "adaptive": [0.1, 0.2, 0.3]}
    found = numbers._detector(stored)
    assert found.photos == 3
    assert found.static.auc.value == pytest.approx(5 / 6)
    assert (found.static.found.hits, found.static.found.n) == (1, 2)
    assert found.static.curve[0] == (0, 0)
    assert found.static.curve[-1] == (1, 1)
    assert found.adaptive.auc.value == pytest.approx(0.5)


def test_a_second_report_computes_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "load_recorded", lambda *_: TinyEncoder())
    given = {
        "defences": ["jpeg:50", "smooth:0.3"],
        "defence_pairs": 2,
        "survival": False,
        "out": tmp_path / "page.html",
    }
    first = page.make_report(place / "run", **given)
    monkeypatch.setattr(TinyEncoder, "__call__", lambda *_: pytest.fail("an image was embedded"))
    again = page.make_report(place / "run", **given)
    assert again.html == first.html
    assert again.numbers["models"][0]["defences"][0]["name"] == "jpeg:50"
    for told in ("Does a defence help?", "jpeg:50", "certified", "A detector"):
        assert told in first.markdown
    assert {"model-detector.png", "model-smoothing-1.png"} <= set(first.pictures)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["jpg:75"], "`defences` must name smooth, jpeg, resize, blur or noise"),
        (["jpeg:0"], "`defences` must give jpeg a whole quality from 1 to 100"),
        (["smooth:0"], "`defences` must give smooth a standard deviation from 0.001 to 10"),
        (["smooth:x"], "`defences` must give smooth a standard deviation"),
        (["jpeg:75", "jpeg:75"], "`defences` must name a defence once; got 'jpeg:75' twice"),
    ],
)
def test_bad_names(names, told, place):
    with pytest.raises(ValueError, match=told):
        page.make_report(place / "run", defences=names)
