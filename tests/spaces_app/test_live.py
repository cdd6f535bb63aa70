"""Live matches: the states, the row at the end, stopping, and two at once."""

from __future__ import annotations

import threading
from itertools import pairwise

import anyio
import gradio as gr
import pytest
import torch
import why_tab
from live import live_match

from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.data.sources import load_images
from hf_equiv.matching.match import match_embedding
from hf_equiv.matching.refine import refine_8bit


@pytest.fixture(scope="module")
def photos():
    return {item.id: item.image for item in load_images("builtin")}


@pytest.fixture(scope="module")
def whole(small, photos):
    return list(live_match(small, photos["cat"], photos["coffee"], rtol=1e-3, every=0.05))


def test_the_last_state_is_what_the_library_computes(small, photos, whole):
    last = whole[-1]
    x = torch.stack([decode_png(encode_png(p)) for p in small.preprocess([photos["cat"], photos["coffee"]])])
    with torch.no_grad():
        z = small(x[1:])
    found = match_embedding(small, x[:1], z, rtol=1e-3, max_evals=400)
    exact = refine_8bit(small, found.images, z, source=x[:1], rtol=1e-3, max_evals=400)
    assert last.stage == "done"
    assert torch.equal(decode_png(last.png), (exact.images[0] * 255).round() / 255)
    assert last.row["num_evals"] == float(found.num_evals[0])
    assert last.row["embedding_error"] == pytest.approx(float(found.errors[0]))
    assert last.row["status"] == "converged"
    assert last.row["match_label"] == last.row["target_label"] != last.row["source_label"]


def test_the_row_is_that_of_the_png(small, whole):
    last = whole[-1]
    with torch.no_grad():
        z, aim = (small(decode_png(png)[None]).double() for png in (last.png, last.target))
    assert last.row["embedding_error_8bit"] == pytest.approx(float((z - aim).norm() / aim.norm()), rel=1e-3)
    assert last.row["model_revision"] == small.revision
    assert last.row["target_prob"] == pytest.approx(last.row["match_prob"], abs=0.01) != last.row["source_prob"]


def test_states_come_in_order_and_the_error_falls(whole):
    order = ["match", "refine", "measure", "done"]
    assert [order.index(s.stage) for s in whole] == sorted(order.index(s.stage) for s in whole)
    curve = whole[-1].curve
    assert all(a[1] <= b[1] for a, b in pairwise(curve)), "evaluations never go back"
    match = [error for stage, _, error in curve if stage == "match"]
    assert all(b <= a for a, b in pairwise(match)), "each stage states the best error so far"
    assert whole[0].error > 100 * whole[-1].error
    assert len(whole) > 4, "there are several states to watch"


def test_stopping_keeps_the_image_so_far(small, photos):
    stop = threading.Event()
    states = []
    for state in live_match(small, photos["cat"], photos["coffee"], every=0.01, stop=stop):
        states.append(state)
        if state.num_evals >= 5:
            stop.set()
    last = states[-1]
    assert last.stage == "stopped"
    assert last.num_evals < 100
    assert "status" not in last.row, "a stopped match has no row of a run"
    assert 0.001 < last.row["embedding_error_8bit"] < states[0].error


def test_the_time_limit_stops(small, photos):
    *_, last = live_match(small, photos["cat"], photos["rocket"], time_limit=1e-6)
    assert last.stage == "stopped"
    assert last.num_evals <= 2


def test_closing_the_iterator_ends_the_work(small, photos):
    states = live_match(small, photos["cat"], photos["coffee"], every=0.01)
    next(states)
    states.close()
    assert not [t for t in threading.enumerate() if t.name == "live match"]


def test_two_at_once_do_not_mix(small, photos):
    def watch(name):
        states[name] = list(live_match(small, photos["cat"], photos[name], max_evals=20, every=0.01))

    states: dict[str, list] = {}
    watch("coffee")
    alone = states["coffee"][-1].png
    threads = [threading.Thread(target=watch, args=(name,)) for name in ("rocket", "coffee")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states["coffee"][-1].png == alone, "the same bytes as alone"
    assert states["rocket"][-1].row["target_label"] == "beacon"


def test_equal_photos_are_refused(small, photos):
    with pytest.raises(ValueError, match="Both photos are the same to the AI model"):
        list(live_match(small, photos["cat"], photos["cat"]))


def test_errors_of_the_thread_are_raised_in_the_caller(small, photos, monkeypatch):
    monkeypatch.setattr("live.match_embedding", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(live_match(small, photos["cat"], photos["coffee"]))


def test_a_photo_chosen_while_another_is_pushed_is_pushed_next():
    with gr.Blocks() as page, gr.Tab() as tab:
        why_tab.why_tab(tab)
    assert {event["trigger_mode"] for event in page.config["dependencies"]} == {"always_last"}


def test_a_photo_is_shown_before_it_is_pushed(monkeypatch):
    async def shown():
        return [views async for views in why_tab._renewed(["top", "null"], "rocket", 50, 60)]

    monkeypatch.setattr(why_tab, "pushed_views", lambda *given: [str(given)])
    begun, ended = anyio.run(shown)
    assert [view.count("Working …") for view in begun] == [1, 1]
    assert ended == ["('rocket', {'top': 50, 'null': 60})"]


def test_directions_of_all_four_photos_are_computed_before_a_visitor_asks(monkeypatch):
    computed = []
    monkeypatch.setattr(why_tab, "_vectors", computed.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    why_tab.warm_up()
    assert sorted(computed) == ["astronaut", "cat", "coffee", "rocket"]


def test_a_direction_that_is_not_here_is_explained(monkeypatch):
    monkeypatch.setattr(why_tab, "_vectors", lambda _: {})
    assert "leads to an image that is not here" in why_tab.moved_view("cat", "top 0", 30)
