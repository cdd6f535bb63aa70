"""`match_photos` and what a notebook shows: pictures, files, bars and one-line results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from hf_equiv import (
    Directions,
    Encoder,
    MatchResult,
    Progress,
    Status,
    bars,
    directional_lipschitz,
    linearity_radius,
    load_images,
    make_directions,
    match_embedding,
    match_photos,
    regional_lipschitz,
    trace_level_set,
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """A small random network with a head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.GELU(), nn.Conv2d(16, 24, 2, 2), nn.AdaptiveAvgPool2d(1))
        return Encoder.wrap(body, size=32, mean=0.5, std=0.5, head=nn.Linear(24, 3), labels="dim lit odd".split())


@pytest.fixture(scope="module")
def match(encoder: Encoder) -> MatchResult:
    cat, coffee, *_ = load_images("builtin")
    return match_photos(cat, coffee, encoder)


def test_a_match_is_made_and_described(encoder, match):
    x, t = encoder.preprocess([item.image for item in load_images("builtin").select([0, 1])]).split(1)
    assert torch.equal(match.source, x)
    assert torch.equal(match.target, t)
    assert torch.equal((match.images * 255).round() / 255, match.images)
    z, wanted = encoder(match.images).double(), encoder(t).double()
    assert float(match.errors[0]) == pytest.approx(float((z - wanted).norm() / wanted.norm()), rel=1e-6)
    assert match.status[0] in (Status.CONVERGED, Status.REFINED)
    assert float(match.psnr_db) == pytest.approx(-10 * float((match.images - x).square().mean().log10()), abs=1e-3)
    names = [encoder.label_names[k] for k in encoder.classify(torch.cat([x, match.images, t])).argmax(dim=1)]
    assert match.labels == (tuple(names),)
    counts = [count for count, _ in match.traces[0]]
    assert counts == sorted(counts)
    assert counts[-1] <= float(match.num_evals)
    assert repr(match).startswith("MatchResult(1 of 3×32×32: 1 ")
    assert f"{names[0]!r} seen as {names[1]!r}" in repr(match)


def test_vectors_are_neither_drawn_nor_saved(tmp_path):
    x = torch.full((1, 8), 0.4)
    match = match_embedding(lambda v: v[:, :3], x, x[:, :3] + 0.1)
    assert "PSNR" not in repr(match)
    for act in (match.show, lambda: match.save(tmp_path / "out")):
        with pytest.raises(ValueError, match=r"must hold images \(B, C, H, W\)"):
            act()
    assert not (tmp_path / "out").exists()


def test_a_match_is_saved_shown_and_drawn(encoder, match, tmp_path, monkeypatch, capsys):
    folder = match.save(tmp_path / "new" / "place")
    names = ("match.json", "match.png", "picture.png", "source.png", "target.png")
    assert sorted(path.name for path in folder.iterdir()) == list(names)
    (entry,) = json.loads((folder / "match.json").read_text())
    assert entry["embedding_error_8bit"] == float(match.errors)
    assert entry["embedding_error"] == float(match.float_errors)
    assert entry["embedding_error"] in [error for _, error in match.traces[0]]
    assert entry["match_label"] == match.labels[0][1]
    assert torch.equal(encoder.preprocess(folder / "match.png"), match.images)
    (image,) = encoder.to_pil(match.images)
    assert image.tobytes() == Image.open(folder / "match.png").tobytes()
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda picture: shown.append(picture.size))
    monkeypatch.setenv("DISPLAY", ":0")
    match.show()
    assert shown == [Image.open(folder / "picture.png").size]
    assert capsys.readouterr().out == ""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    match.show()
    assert Path(capsys.readouterr().out.strip()).read_bytes() == (folder / "picture.png").read_bytes()
    (line,) = match.plot().lines
    assert list(zip(*line.get_data(), strict=True)) == list(match.traces[0])


def test_what_a_result_does_not_know_is_left_out(match, tmp_path):
    bare = MatchResult(match.images + 1e-3, match.errors, match.num_evals, match.seconds, match.status, match.traces)
    folder = bare.save(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["match.json", "match.png", "picture.png"]
    (entry,) = json.loads((folder / "match.json").read_text())
    assert entry["embedding_error"] == float(match.errors)
    assert entry["psnr_db"] is entry["embedding_error_8bit"] is None


@pytest.mark.parametrize(("watched", "progress", "bar"), [(0, None, 0), (1, None, 1), (1, False, 0), (0, True, 1)])
def test_a_bar_where_somebody_watches(watched, progress, bar, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(watched))
    with bars.shown(progress, "matching", bars.count) as hook:
        assert (hook is not None) == bool(bar)
        if hook is not None:
            hook(1, 4)
    assert ("matching:" in capsys.readouterr().err) == bool(bar)


def test_the_pace_of_a_resumed_run_is_its_own(monkeypatch):
    bar = SimpleNamespace(n=0.0, initial=0.0, update=lambda _: None, close=lambda: None)
    bar.set_postfix_str = lambda *_, **__: None
    monkeypatch.setattr(bars, "_open", lambda _: bar)
    with bars.shown(True, "matching", bars.count) as hook:
        for done in (2, 3):
            hook(done, 4)
            assert bar.initial == 50


def test_a_hook_of_the_caller_is_used_and_others_are_refused():
    with bars.shown(print, "matching", bars.count) as hook:
        assert hook is print
    with (
        pytest.raises(TypeError, match="`progress` must be a function, True, False or None; got str"),
        bars.shown("yes", "matching", bars.count),
    ):
        pass


def test_the_bar_of_a_match_goes_from_the_first_error_to_the_tolerance():
    read = bars.errors_to(1e-4)
    for errors, active, share in (
        ([1.0, torch.inf], [True, True], 0.0),
        ([1e-2, 1e3], [True, True], 0.25),
        ([1e-4, 1e3], [False, True], 0.5),
        ([1e-4, 0.5], [False, False], 1.0),
    ):
        numbers = torch.tensor(errors, dtype=torch.float64), torch.tensor([7.0, 7.0]), torch.tensor(active)
        done, text = read(Progress(torch.zeros(2, 3, 4, 4), *numbers))
        assert done == pytest.approx(share)
    assert text == "error 5.0e-01, 14 evaluations, 2 of 2 done"


def test_draws_do_not_depend_on_the_global_generator(encoder, match):
    x, seen = match.source.double(), []
    f = encoder.double()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        walk = trace_level_set(f, x, heading="random", step=0.1, num_steps=1)
        directions = make_directions(f, x, random=1, null=1)
        assert torch.equal(torch.get_rng_state(), before)
        seen.append((walk.images, directions.vectors))
    assert all(map(torch.equal, *seen))
    assert repr(directions) == "Directions(1 of 3×32×32: random 1, null 1)"


def test_results_are_one_line(encoder, match):
    x, along = match.source, Directions(torch.ones(1, 1, *encoder.input_shape) / 3072**0.5, ("given",), (0,))
    points = trace_level_set(encoder, x, heading="away", step=0.1, num_steps=1, keep_points=True)
    found = [
        directional_lipschitz(encoder, x, along),
        linearity_radius(encoder, x, along),
        regional_lipschitz(encoder, x, 0.1, num_steps=2, num_batches=0),
        points,
        points.paths[0][-1],
        Progress(match.images, match.errors, match.num_evals, torch.tensor([False])),
        load_images("builtin"),
    ]
    for one in found:
        assert "\n" not in repr(one)
        assert "tensor(" not in repr(one)
        assert len(repr(one)) < 250
