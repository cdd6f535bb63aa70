"""Results to look at: opening, checks, steps along directions, words and charts."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import views
from charts import Axis, Series, chart
from live import Stop, stops_along
from look_tab import strip_of
from make_tab import curve_view
from melt_tab import film, player
from PIL import Image
from showcase import check_shown, open_showcase
from why_tab import along_view, constants_view, ladder_view, spectrum_view

from hf_equiv.analyses.lipschitz import directions_of_run
from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.verify.directory import verify_run

RESULTS = Path(__file__).parents[2] / "spaces_app" / "results"


@pytest.fixture(scope="module")
def shown():
    return open_showcase(RESULTS)


@pytest.mark.parametrize("run", ["match", "spectrum", pytest.param("lipschitz", marks=pytest.mark.slow)])
def test_the_results_that_ship_hold(run):
    report = verify_run(RESULTS / run)
    assert report.holds, report.problems
    assert report.verified == report.rows > 0


def test_the_walk_that_ships_shares_its_embedding(encoder, shown):
    (path,) = shown.paths.values()  # without its float images, which are 20 MB
    with torch.no_grad():
        z = encoder(torch.stack([decode_png(row["frame"]) for row in path])).double()
    apart = (z - z[0]).norm(dim=1) / z[0].norm()
    assert float(apart.max()) < 1e-2


def test_everything_is_there(shown):
    assert len(shown.matches) == 12
    assert len({row["key"] for row in shown.matches}) == 12
    psnr = [row["psnr_db"] for row in shown.matches]
    assert psnr == sorted(psnr, reverse=True)
    assert {row["image_id"] for row in shown.spectra} == {row["image_id"] for row in shown.constants}
    (path,) = shown.paths.values()
    assert [row["step"] for row in path] == list(range(len(path)))
    assert {row["label"] for row in path} == {"espresso"}


def test_a_run_directory_alone(shown):
    assert open_showcase(RESULTS / "match").matches[0]["key"].endswith("cat->coffee")
    assert len(open_showcase(RESULTS, most=3).matches) == 3


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold runs"):
        open_showcase(tmp_path)


def test_a_check_holds(encoder, shown):
    row = shown.matches[0]
    found = check_shown(encoder, row)
    assert all(c.holds for c in found)
    assert {c.name for c in found} >= {"embedding_error_8bit", "psnr_db", "match_label", "match_prob"}


def test_a_check_finds_one_changed_pixel(encoder, shown):
    row = shown.matches[0]
    image = decode_png(row["match"])
    image[0, 32, 32] = 1.0 - image[0, 32, 32].round()
    found = check_shown(encoder, row | {"match": encode_png(image)})
    assert not {c.name: c.holds for c in found}["embedding_error_8bit"]


@pytest.mark.parametrize(("column", "value"), [("psnr_db", 60.0), ("cosine_to_target", None), ("match_label", "lion")])
def test_a_check_finds_a_changed_number(encoder, shown, column, value):
    row = shown.matches[0]
    found = check_shown(encoder, row | {column: value})
    assert [c.name for c in found if not c.holds] == [column]


def test_another_model_is_refused(encoder, shown):
    row = shown.matches[0]
    with pytest.raises(ValueError, match="model_revision of the row"):
        check_shown(encoder, row | {"model_revision": "sha256:0"})


def test_directions_are_those_of_the_rows(encoder, shown):
    rows = [row for row in shown.constants if row["image_id"] == "cat"]
    images = {row["image_id"]: decode_png(row["image"]) for row in shown.constants}
    toward = next(row["toward_id"] for row in rows if row["direction"] == "toward")
    made = directions_of_run(encoder, images["cat"], images[toward], rows[0]["settings"], "cat")
    assert [(r["direction"], r["index"]) for r in rows] == list(zip(made.kinds, made.indices, strict=True))
    for row, v in zip(rows, made.vectors[0], strict=True):
        if row["direction"] in ("top", "random", "toward"):
            _, jvp = torch.func.jvp(encoder, (images["cat"][None],), (v[None],))
            assert float(jvp.norm()) == pytest.approx(row["jvp"], rel=1e-3)


def test_a_step_along_a_direction(encoder, shown):
    x = decode_png(shown.constants[0]["image"])
    v = torch.zeros_like(x)
    v[1, 3, 4] = 1.0
    here, there = stops_along(encoder, x, v, [0.0, 0.25], jvp=2.0)
    assert here.distance == 0.0
    assert here.png == encode_png(x)
    moved = x.clone()
    moved[1, 3, 4] = (moved[1, 3, 4] + 0.25).clamp(max=1.0)
    with torch.no_grad():
        z, far = encoder(x[None]).double(), encoder(moved[None]).double()
    assert there.distance == pytest.approx(float((far - z).norm() / z.norm()), rel=1e-4)
    assert there.first_order == pytest.approx(0.25 * 2.0 / float(z.norm()))
    assert sum(p for _, p in there.classes) <= 1.0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (0.0, "100.000000 %"),
        (1e-6, "99.9999 %"),
        (2.6e-5, "99.997 %"),
        (0.04, "96 %"),
        (0.014, "98 %"),
        (0.0449, "95 %"),
        (0.87, "13 %"),
        (1.4, "0 %"),
    ],
)
def test_never_more_alike_than_measured(error, said):
    assert views.alike(error) == said
    assert float(said.split()[0]) <= 100 * (1 - min(error, 1.0)) + 1e-9


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (1e-5, "You see a cat. To the AI model it is 99.999 % the same as the coffee."),
        (0.02, "98 % the same as the coffee. It could still tell them apart."),
        (0.5, "only 50 % the same as the coffee."),
    ],
)
def test_the_lead_goes_with_the_error(shown, error, said):
    lead = views.html.lead(shown.matches[0] | {"embedding_error_8bit": error, "target_class": "coffee"})
    assert said in lead.replace("\xa0", " ")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "This cat is an espresso."),
        ({"match_prob": 0.37}, "This cat is an espresso?"),
        ({"source_class": "n02123045"}, "This Egyptian cat is an espresso."),
        ({"source_class": None, "source_label": None}, "This picture is an espresso."),
        ({"target_label": "jeans, denim", "match_label": "jeans, denim"}, "This cat is jeans."),
        ({"target_label": "hourglass"}, "This cat is not an hourglass yet."),
        ({"source_label": "espresso"}, "Two pictures to you, one to the AI model."),
        ({"match_label": None, "embedding_error_8bit": 0.02}, "Two pictures to you, almost one to the AI model."),
        ({"match_label": None, "embedding_error_8bit": 0.5}, "This one did not work."),
        ({"match_label": None, "embedding_error_8bit": None}, "This picture could not be measured."),
    ],
)
def test_labels_lead_and_nothing_else_is_claimed(shown, changed, said):
    (row,) = (row for row in shown.matches if row["key"] == "cat->coffee")
    labels = {"source_label": "Egyptian cat", "match_label": "espresso, coffee", "target_label": "espresso, coffee"}
    assert views.html.headline(row | labels | changed) == said


def test_the_model_guesses_below_one_half(shown):
    row = next(row for row in shown.matches if row["key"] == "cat->coffee") | {"match_prob": 0.37, "target_prob": 0.5}
    told = views.html.match(row).replace("\N{NO-BREAK SPACE}", " ")
    assert "AI guesses <strong>an espresso</strong>, 37 % sure" in told
    assert "AI sees <strong>an espresso</strong>, 50 % sure" in told


def test_a_match_near_its_source_is_still_told_from_its_target(shown):
    row = shown.matches[0] | {"embedding_error_8bit": 1e-5, "psnr_db": 80.0}
    assert "to you" not in views.html.lead(row)


def test_a_model_without_labels_is_proved_without_them():
    number = {"stated": 1e-5, "now": 2e-5, "holds": False}
    told = views.html.verdict({"holds": False, "seconds": 0.21, "numbers": {"embedding_error_8bit": number}})
    assert "Checked just now: 1 of 1 numbers differ from those stated (0.2 s)." in told
    assert "AI sees" not in told


def test_the_pictures_to_share(shown):
    """A preview of the size that sites expect, and the walk as a film of all its pictures, there and back."""
    (name, path) = next(iter(shown.paths.items()))
    preview = Image.open(io.BytesIO(views.share_picture(shown.matches[0] | {"match_label": "x" * 500})))
    assert (preview.format, preview.size) == ("PNG", (1200, 630))
    for kind in ("GIF", "WEBP"):
        moving = Image.open(io.BytesIO(film(name, kind)))
        assert (moving.format, moving.n_frames) == (kind, 2 * len(path) - 2)
    assert film(name, "GIF") == (RESULTS / "walk" / "figures" / "walk.gif").read_bytes(), "drawn once, by the run"


def test_a_leap_and_a_drift_of_none_are_explained(shown):
    leaping = [("match", 1.0, 0.5), ("match", 131.0, 1e-5)]
    assert "by up to 130 tries" in curve_view(leaping, 1e-5)
    assert "leaps" not in curve_view([("match", float(k), 0.5) for k in range(1, 40)], 1e-5)
    (path,) = shown.paths.values()
    assert path[-1]["drift"] == 0.0
    assert "Drawn at 1e-7" in player(path, 1e-5)
    assert "Drawn at" not in player(path[:-1], 1e-5)


def test_shares_are_written_out():
    stop = Stop(step=16.0, distance=1.13, first_order=22.6, png=encode_png(torch.zeros(3, 4, 4)), classes=())
    assert "113 %" in (view := along_view(stop, [replace(stop, step=0.0), stop], "x"))
    assert "2,260 %" in view


def test_names_cannot_become_markup(shown, monkeypatch):
    row = shown.matches[0] | {"source_id": "<script>x</script>", "key": '"><b>', "match_label": "<i>cat</i>"}
    monkeypatch.setattr("look_tab.named_results", lambda _: replace(shown, matches=(row,)))
    page = strip_of("somebody/else", "") + views.html.match(row)
    assert not re.search(r"<script|<b>|<i>", page)


def test_charts_are_well_formed(shown):
    rows = [row for row in shown.constants if row["image_id"] == "cat"]
    (path,) = shown.paths.values()
    pages = [
        constants_view(rows),
        spectrum_view(shown.spectra[0]),
        *(ladder_view(row) for row in rows),
        curve_view([("match", 1.0, 0.5), ("match", 9.0, 1e-3), ("refine", 20.0, 1e-4)], 1e-5),
        curve_view([], 1e-5),
        player(path, 1e-5),
    ]
    for page in pages:
        for drawn in re.findall(r"<svg.*?</svg>", page, re.S):
            ET.fromstring(drawn)
            assert "nan" not in drawn.lower()


def test_a_point_is_drawn_in_its_place():
    drawn = chart("x", [Series([(0, 1.0), (5, 10.0), (10, 100.0)])], Axis("a", low=0, high=10), Axis("b", log=True))
    points = re.search(r'points="([^"]*)"', drawn).group(1).split()
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in points)
    assert x1 == pytest.approx((x0 + x2) / 2)
    assert y1 == pytest.approx((y0 + y2) / 2)
    assert x0 < x2
    assert y2 < y0, "larger is higher"


def test_points_without_a_place_on_an_axis_are_left_out():
    drawn = chart(
        "x", [Series([(1, 0.0), (2, float("nan")), (3, 1.0), (4, 2.0), (5, None)])], Axis("a"), Axis("b", log=True)
    )
    assert len(re.search(r'points="([^"]*)"', drawn).group(1).split()) == 2


def test_an_undetermined_direction_states_no_number(shown):
    row = next(row for row in shown.constants if row["direction"] == "null")
    assert row["value"] is None
    assert "Undetermined" in ladder_view(row)
    assert "the constant is" not in ladder_view(row)


@pytest.mark.parametrize(
    ("column", "value"),
    [("noise_floor", 1e-12), ("target_quantization_error", 0.9), ("ssim", 0.999), ("target_label_prob", 0.1),
     ("same_top1", False), ("linf", 0.0)],
)  # fmt: skip
def test_a_check_covers_every_number_that_is_shown(encoder, shown, column, value):
    row = shown.matches[0]
    found = check_shown(encoder, row | {column: value})
    assert [c.name for c in found if not c.holds] == [column]


def test_labels_without_a_classifier_do_not_hold(encoder, shown, monkeypatch):
    row = shown.matches[0]
    monkeypatch.setattr(encoder, "has_head", False)
    found = check_shown(encoder, row)
    assert "match_label" in {c.name for c in found if not c.holds}


@pytest.mark.parametrize(
    ("column", "value"), [("model_id", "somebody/else"), ("dtype", "float64"), ("normalize", True)]
)
def test_another_precision_scale_or_name_is_refused(encoder, shown, column, value):
    row = shown.matches[0]
    other = {"settings": row["settings"] | {column: value}} if column == "normalize" else {column: value}
    with pytest.raises(ValueError, match=f"{column} of the row"):
        check_shown(encoder, row | other)


def _heights(page: str, style: str) -> list[float]:
    """Places of the points of a line from the top, of a chart."""
    points = re.search(rf'class="line {style}" points="([^"]*)"', page).group(1).split()
    return [float(point.split(",")[1]) for point in points]


def test_a_drift_beyond_the_limit_is_drawn_in_its_place(shown):
    (path,) = shown.paths.values()
    far = [row | {"drift": 10.0 ** -(2 + k % 2)} for k, row in enumerate(path)]
    (limit, *_), one = _heights(player(far, 1e-5), "limit"), _heights(player(far, 1e-5), "one")
    decade = one[1] - one[0]
    assert limit - one[0] == pytest.approx(3 * decade, abs=0.5)


def test_a_walk_of_very_small_drift_is_drawn(shown):
    (path,) = shown.paths.values()
    page = player([row | {"drift": 1e-11} for row in path], 1e-10)
    assert min(_heights(page, "one")) > max(_heights(page, "limit"))
