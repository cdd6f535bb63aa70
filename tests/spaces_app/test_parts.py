"""Limits of the app: a visitor opens no files, loads no weights and stops no matches of somebody else."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import views
from hostile import NOT_STORED
from live import Stop
from showcase import Showcase, open_showcase

from hf_equiv.data.image_file import decode_png, encode_png
from hf_equiv.data.tables import refuse_swollen
from hf_equiv.runs.schema import MATCH
from hf_equiv.runs.shards import read_shard, shard_bytes

APP = Path(__file__).parents[2] / "spaces_app"


@pytest.fixture(scope="module")
def parts():
    """The modules of the app."""
    sys.path.insert(0, str(APP))
    try:
        import look_tab
        import shelf
        from making import outcome, uploads

        yield SimpleNamespace(shelf=shelf, uploads=uploads, look_tab=look_tab, outcome=outcome)
    finally:
        sys.path.remove(str(APP))


def copy_run(to: Path, name: str = "match", settings: dict | None = None, **columns) -> Path:
    """A run of the app with other columns in its rows."""
    shutil.copytree(APP / "results" / name, to)
    record = json.loads((to / "run.json").read_text())
    record["settings"] |= settings or {}
    (to / "run.json").write_text(json.dumps(record))
    for shard in to.glob("matches/*.parquet"):
        rows = [row | columns for row in read_shard(shard, images=True)]
        shard.write_bytes(shard_bytes(rows, MATCH, {}))
    return to


@pytest.mark.parametrize("name", ["runs/mine", "runs/..", "runs/mine@main", "<b>/x", "../runs", "runs\\mine/x"])
def test_a_visitor_opens_no_folder_of_this_machine(parts, tmp_path, monkeypatch, name):
    copy_run(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(gr.Error) as caught:
        parts.shelf.named_results(name)
    assert "<" not in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_no_folder_is_named_to_a_visitor(parts, tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(gr.Error, match="damaged") as caught, parts.shelf.telling("a/b"):
        open_showcase(tmp_path)
    assert str(tmp_path) not in caught.value.message


def test_messages_of_the_app_have_one_door(parts):
    """The page shows the HTML of messages, and only those that are made in one place."""
    evil = "<form action=http://evil.com><input></form>[a](b)\n\x1b[2J\u202e" + "L" * 3000
    with pytest.raises(gr.Error) as caught, parts.shelf.telling(evil):
        raise KeyError(evil)
    for told in (caught.value.message, parts.shelf.refused(evil).message):
        assert "<" not in told
        assert told.isprintable()
        assert len(told) <= 800
    for path in APP.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        made = {ast.unparse(call.func) for call in calls} & {"gr.Error", "gr.Warning", "gr.Info", "gr.Success"}
        assert made == ({"gr.Error"} if path.name == "shelf.py" else set())
        assert not [word for call in calls for word in call.keywords if word.arg == "show_error"]


def test_names_of_models_are_text(parts):
    told = views.html.about_directions(["builtin", "<b>`[a](http://evil.com)"])
    assert "<b>" not in told
    assert "<code>&lt;b&gt;`[a](http://evil.com)</code>" in told


@pytest.mark.parametrize("value", [None, 5])
def test_rows_that_cannot_be_shown_are_refused_in_words(parts, monkeypatch, value):
    row = open_showcase(APP / "results").matches[0] | {"match": value}
    monkeypatch.setattr(parts.look_tab, "named_results", lambda _: Showcase("x", matches=(row,)))
    with pytest.raises(gr.Error, match="'a/broken' cannot be shown"):
        parts.look_tab.strip_of("a/broken", "")


def test_addresses_of_the_hub_stay_in_messages(parts):
    told = "see https://huggingface.co/datasets/a/b, of 'me/data' at refs/pr/1"
    with pytest.raises(gr.Error) as caught, parts.shelf.telling("a/b"):
        raise ValueError(told)
    assert told in caught.value.message


def test_weights_of_a_pull_request_are_not_loaded(parts, monkeypatch):
    asked = []
    monkeypatch.setattr(parts.shelf, "MODELS", {"builtin": "builtin", "org/model": "org/model"})
    monkeypatch.setattr(parts.shelf, "_load", lambda *given: asked.append(given))
    row = {"model_id": "org/model", "model_revision": "5" * 40, "readout": "cls", "dtype": "float64"}
    parts.shelf.recorded_encoder(row | {"settings": {"normalize": True}}, "evil/data")
    assert asked[0][:2] == ("org/model", None)
    assert asked[0][3] is True
    assert str(asked[0][4]) == "torch.float64"
    monkeypatch.setattr(parts.shelf, "DATASET", "me/data")
    parts.shelf.recorded_encoder(row | {"settings": {"normalize": False}}, "me/data")
    assert asked[1][:2] == ("org/model", "5" * 40)
    earlier = {"model_id": "builtin", "model_revision": "sha256:5", "settings": {"normalize": False}}
    parts.shelf.recorded_encoder(row | earlier, "evil/data")
    assert asked[2][:2] == ("builtin", "sha256:5"), "one of those of the package"


def test_a_view_holds_any_name(parts, monkeypatch):
    """Scripts read the names for the address from the view, and the preview names the match in its own."""
    row = open_showcase(APP / "results").matches[0]
    row |= {"key": '0.a&dataset=evil/x#b+c->d"', "model_id": "![](https://evil)<b>"}
    monkeypatch.setattr(parts.look_tab, "row_of", lambda *_: row)
    shown, *_ = parts.look_tab.match_shown('me/"data', row["key"])
    assert 'data-key="0.a&amp;dataset=evil/x#b+c-&gt;d&#34;" data-dataset="me/&#34;data"' in shown
    assert "picture?match=0.a%26dataset%3Devil%2Fx%23b%2Bc-%3Ed%22" in shown
    assert "preview.png?&#34;" in views.html.head(row, "https://x", '"')
    assert "<b>" not in parts.look_tab.note_of(Showcase("x", matches=(row,)))


def test_a_link_to_a_match_that_was_made_leads_to_it(parts):
    import app

    row = open_showcase(APP / "results").matches[0]
    key = parts.outcome.MADE.put(parts.outcome.Made(row, "builtin", 1.0, ""))
    query, found = app.linked(SimpleNamespace(query_params={"made": key}))
    assert (query, found["match"]) == (f"tab=make&made={key}", row["match"])
    assert "You see a photo. To the AI model it is 99.9" in views.html.head(found, "https://x", query)
    assert app.linked(SimpleNamespace(query_params={"made": "gone"}))[0] == "match=cat-%3Ecoffee"


def test_pictures_of_other_sizes_are_refused_unopened(tmp_path):
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    with pytest.raises(ValueError, match="at most 2048 pixels a side; got 30000 x 30000"):
        open_showcase(copy_run(tmp_path / "a", source=huge, match=huge, target=huge))
    with pytest.raises(ValueError, match="must have one size"):
        open_showcase(copy_run(tmp_path / "b", source=encode_png(decode_png(_png()).repeat(1, 2, 2))))
    with pytest.raises(ValueError, match="must be PNG files"):
        open_showcase(copy_run(tmp_path / "c", source=b"<svg/>"))


def test_long_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="texts of a row must have at most 10,000 characters"):
        open_showcase(copy_run(tmp_path / "a", source_id="x" * 10_001))


def _png() -> bytes:
    return open_showcase(APP / "results").matches[0]["source"]


def test_files_that_expand_in_memory_are_refused(tmp_path):
    shard = next(copy_run(tmp_path / "a", source=_png()).glob("matches/*.parquet"))
    most = 16 * 2**20
    left = refuse_swollen([shard], most)
    with pytest.raises(ValueError, match="once it is read"):
        refuse_swollen([shard, shard], 2 * (most - left) - 1)


def test_runs_that_share_names_are_kept_apart(tmp_path):
    shutil.copytree(APP / "results", tmp_path / "all")
    for name in ("walk", "lipschitz", "spectrum"):
        copy_run(tmp_path / "all" / f"{name}-2", name, {"rtol": 0.5, "seed": 7})
    shown = open_showcase(tmp_path / "all")
    assert len(shown.paths) == 2
    assert [path[0]["settings"]["rtol"] for path in shown.paths.values()] == [1e-5, 0.5]
    ids = {row["image_id"] for row in shown.constants}
    seeds = {row["key"]: row["settings"]["seed"] for row in shown.constants}
    assert len(seeds) == 2 * len(ids)
    assert {seeds[key] for key in ids} == {0}
    assert {seeds[key] for key in seeds if key not in ids} == {7}


def test_a_pair_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="once"):
        open_showcase(copy_run(tmp_path / "a", pair_id="cat->coffee"))


def test_a_pushed_photo_says_what_the_model_sees():
    stop = Stop(1.0, 1.13, 2.0, b"", (("espresso", 0.8),))
    moved, still = (views.html.pushed("top", b"", stop, own) for own in ("Egyptian cat", "espresso"))
    assert "moved by 100\xa0% or more" in moved
    assert "seen as-target" in moved, "in the colour of the other photo"
    assert "as-target" not in still


def test_the_eye_is_asked_about_match_and_target():
    shown = open_showcase(APP / "results")
    row = shown.matches[0] | {"embedding_error_8bit": 1e-6, "psnr_db": 70.0, "match_label": None}
    assert views.html.headline(row | {"match": row["source"]}).startswith("Two pictures to you, one to")
    assert views.html.headline(row | {"match": row["target"]}).startswith("Nearly one picture to you")
    assert "To you too, at a glance." in views.html.lead(row | {"match": row["target"]})


@pytest.mark.parametrize(("share", "said"), [(0.999, "over 99 %"), (1.0, "100 %"), (1e-5, "under 1 %"), (0.5, "50 %")])
def test_only_certain_classes_are_called_certain(share, said):
    assert views.percent(share) == said


@pytest.mark.parametrize("kind", ["gamma", "tail", "second frame", "eps", "palette"])
def test_pictures_that_hold_more_than_pixels_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=r"(a PNG of 8-bit RGB pixels and nothing else|be PNG files)"):
        open_showcase(
            copy_run(tmp_path / "a", source=NOT_STORED[kind], match=NOT_STORED[kind], target=NOT_STORED[kind])
        )


def test_the_files_of_a_visitors_dataset_are_deleted(parts, monkeypatch):
    given = {}

    def opened(name, **options):
        given.update(options)
        assert Path(options["cache_dir"]).is_dir()
        return Showcase(name)

    monkeypatch.setattr(parts.shelf, "open_showcase", opened)
    assert parts.shelf.results("somebody/matches").name == "somebody/matches"
    assert not Path(given["cache_dir"]).exists()
    assert given["token"] is False
    assert given["most_bytes"] == parts.shelf.MAX_DOWNLOAD
