"""The app as programs use it: endpoints, answers that agree with the library, bad input, many visitors."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from appserver import served
from gradio_client import Client, handle_file
from PIL import Image

from hf_equiv.data.image_file import decode_png
from hf_equiv.hub.publish import publish_results

PHOTOS = Path(__file__).parents[2] / "hf_equiv" / "assets" / "photos"
CAT, COFFEE = (str(PHOTOS / f"{name}.jpg") for name in ("cat", "coffee"))
NAMES = ["check_match", "get_match", "get_walk", "list_matches", "list_walks", "look_along", "make_match"]


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def make(
    client: Client, source: str, target: str = COFFEE, model: str = "my-model", budget: str = "any change",
    effort: str = "quick",
):  # fmt: skip
    """A match by its endpoint: the PNG's path and the row."""
    return client.predict(handle_file(source), handle_file(target), model, budget, effort, api_name="/make_match")


def test_every_action_has_a_named_endpoint_with_words(client):
    api = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert sorted(name.strip("/") for name in api) == NAMES
    assert all(len(endpoint["description"]) > 20 for endpoint in api.values())


def test_matches_can_be_listed_read_and_checked(client):
    rows = client.predict(api_name="/list_matches")
    assert len(rows) == 12
    row = client.predict(key=rows[0]["key"], api_name="/get_match")
    assert row["embedding_error_8bit"] == rows[0]["embedding_error_8bit"] < 1e-4
    check = client.predict(key=rows[0]["key"], api_name="/check_match")
    assert check["holds"]
    assert check["numbers"]["embedding_error_8bit"]["now"] == pytest.approx(row["embedding_error_8bit"], abs=1e-6)


def test_a_match_is_what_it_says(client, small):
    """By the checkpoint of a folder, which goes by its name."""
    png, row = make(client, CAT, effort="normal")
    image = decode_png(Path(png).read_bytes())
    with torch.no_grad():
        z = small(image[None]).double()
        aim = small(small.preprocess([Image.open(COFFEE)])).double()
    assert float((z - aim).norm() / aim.norm()) == pytest.approx(row["embedding_error_8bit"], abs=1e-6)
    assert row["embedding_error_8bit"] < 1e-4
    assert row["model_id"] == "my-model"
    assert row["match_label"] == row["target_label"] == "espresso"
    assert not row["stopped"]


def test_a_budget_is_kept(client, small):
    png, row = make(client, CAT, budget="4 of 255")
    source = small.preprocess([Image.open(CAT)])[0]
    gap = (decode_png(Path(png).read_bytes()) - source).abs().max()
    assert 0 < float(gap) <= 4 / 255 + 1e-6
    assert row["linf"] == pytest.approx(float(gap), abs=1e-6)


def test_null_and_top_directions(client):
    null = client.predict("cat", "null 0", 0.4, api_name="/look_along")
    top = client.predict("cat", "top 0", 0.4, api_name="/look_along")
    assert null["distance"] < 0.02 < 0.3 < top["distance"]
    assert top["classes"][0][0] != null["classes"][0][0] == "Egyptian cat"


def test_a_walk_stays_on_its_level_set(client):
    (name,) = client.predict(api_name="/list_walks")
    points = client.predict(name, api_name="/get_walk")
    assert max(point["drift"] for point in points) <= 1e-5
    assert points[-1]["l2"] > 30


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("/list_matches", "/etc"), "Name a dataset of the Hub as USER/NAME"),
        (("/list_matches", "../results/match"), "Name a dataset of the Hub as USER/NAME"),
        (("/list_matches", "nobody/nothing"), "cannot be shown"),
        (("/list_matches", 5), "`dataset` must be text; got 5."),
        (("/get_walk", ["nowhere"]), "`name` must be text"),
        (("/get_match", "1.nothing"), "There is no lookalike"),
        (("/get_walk", "nowhere"), "There is no walk"),
        (("/look_along", "dog", "top 0", 1.0), "no constants of 'dog'"),
        (("/look_along", "cat", "up", 1.0), "no direction"),
        (("/look_along", "cat", "top 0", 1e9), "from −16 to 16"),
    ],
)
def test_bad_input_is_answered_in_words(client, call, said):
    with pytest.raises(Exception, match=re.escape(said)) as caught:
        client.predict(*call[1:], api_name=call[0])
    assert "Traceback" not in str(caught.value)


def _odd(folder: Path, kind: str) -> str:
    path = folder / {"text": "text.png", "empty": "empty.png", "svg": "x.svg", "cut": "cut.png"}[kind]
    whole = (PHOTOS / "cat.jpg").read_bytes()
    path.write_bytes({"text": b"hello", "empty": b"", "svg": b"<svg><script/></svg>", "cut": whole[:2000]}[kind])
    return str(path)


@pytest.mark.parametrize("kind", ["text", "empty", "svg", "cut"])
def test_odd_uploads_are_refused_in_words(client, tmp_path, kind):
    with pytest.raises(Exception, match=r"This is not a picture|This photo is damaged") as caught:
        make(client, _odd(tmp_path, kind))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("kind", ["animation", "one pixel"])
def test_odd_uploads_that_are_images_are_used(client, tmp_path, kind):
    frames = [Image.new("RGB", (80, 60), (40 * i, 90, 30)) for i in range(3)]
    path = tmp_path / ("a.gif" if kind == "animation" else "one.png")
    if kind == "animation":
        frames[0].save(path, save_all=True, append_images=frames[1:])
    else:
        Image.new("RGB", (1, 1), (200, 10, 10)).save(path)
    _, row = make(client, str(path))
    assert row["embedding_error_8bit"] < 0.05


def test_other_checkpoints_are_refused(client):
    with pytest.raises(Exception, match=r"not in the list"):
        make(client, CAT, model="/etc")


def test_visitors_are_not_mixed_up_and_others_can_browse(url, client):
    answers: dict[str, dict] = {}

    def visit(name: str) -> None:
        own = Client(url, verbose=False)
        png, row = make(own, CAT, str(PHOTOS / f"{name}.jpg"))
        answers[name] = row | {"png": Path(png).read_bytes()}

    threads = [threading.Thread(target=visit, args=(name,)) for name in ("coffee", "rocket", "astronaut")]
    for thread in threads:
        thread.start()
    browsed = len(client.predict(api_name="/list_matches"))  # while they wait
    still = sum(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join()
    assert browsed == 12
    assert still > 0, "browsing did not wait for the matches"
    seen = {name: answer["match_label"] for name, answer in answers.items()}
    assert seen == {"coffee": "espresso", "rocket": "beacon", "astronaut": "sports car"}
    assert len({answer["png"] for answer in answers.values()}) == 3


def test_no_token_and_no_path_is_told(client):
    config = json.dumps(client.config)
    assert "hf_secret" not in config
    assert "my-model" in config
    assert "/my-model" not in config
    assert str(Path.home()) not in config


def test_results_on_the_hub_by_name(hub, tmp_path):
    results = Path(__file__).parents[2] / "spaces_app" / "results"
    publish_results(results / "match", "alice/mine")
    publish_results(results / "match", "alice/open", private=False)
    publish_results(results / "match", "alice/closed")
    online = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "home")}
    with served(tmp_path, "--dataset", "alice/mine", **online) as address:
        own = Client(address, verbose=False)
        for name in ("alice/mine", "alice/open"):  # the owner's, private as it is; and one that anybody may see
            rows = own.predict(name, api_name="/list_matches")
            assert len(rows) == 12
            assert own.predict(rows[0]["key"], name, api_name="/check_match")["holds"]
        with pytest.raises(Exception, match="no such dataset, or it is private"):
            own.predict("alice/closed", api_name="/list_matches")
    log = (tmp_path / "app.log").read_text(encoding="utf-8")
    assert "hf_alice" not in log
