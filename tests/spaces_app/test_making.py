"""Turns of visitors, their uploads, and the words for what they have made."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anyio
import gradio as gr
import make_tab
import numpy as np
import pytest
import shelf
import torch
import views
from gradio.data_classes import ImageData
from hostile import NO_PHOTOS
from making import jobs, outcome, uploads
from making.jobs import Line, address_of
from PIL import Image
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from hf_equiv.data.image_file import encode_png, open_image
from hf_equiv.data.sources import BUILTIN_PHOTOS


def visitor(session: str | None = "a", address: str = "1.1.1.1", **headers: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash=session, headers=headers, client=SimpleNamespace(host=address))


def enter(line: Line, stack: list, *who) -> jobs.Job:
    stack.append(line.entered(visitor(*who)))
    return stack[-1].__enter__()


def leave(stack: list) -> None:
    for place in stack:
        place.__exit__(None, None, None)


def test_turns_are_fair_and_bounded():
    line, stack = Line(1, of_session=2), []
    first, second = (enter(line, stack, "flood", "6.6.6.6") for _ in range(2))
    assert (line._place(first), line._place(second)) == (0, 1)
    with pytest.raises(gr.Error, match="You have 2 requests under way"):
        enter(line, [], "flood", "6.6.6.6")
    other = enter(line, stack, "b", "7.7.7.7")
    assert (line._place(other), line._place(second)) == (1, 2), "a first request goes before a second one"
    for k in range(10):
        enter(line, stack, f"c{k}", "6.6.6.6")
    with pytest.raises(gr.Error, match="Too many requests"):
        enter(line, [], "d", "6.6.6.6")
    enter(line, stack, "d", "8.8.8.8")
    leave(stack)
    assert all(job.stop.is_set() for job in (first, second, other)), "work that nobody awaits is stopped"
    assert line._jobs == []


def test_stop_works_while_waiting_and_for_one_visitor():
    async def places(job):
        return [place async for place in line.turn(job)]

    line, stack = Line(0, of_session=2), []
    mine, theirs, nobodys = (enter(line, stack, session) for session in ("a", "b", ""))
    line.stop(visitor(None))
    line.stop(visitor(""))
    line.stop(visitor("a"))
    assert [job.stop.is_set() for job in (mine, theirs, nobodys)] == [True, False, False]
    assert anyio.run(places, mine) == []
    assert line.stop_of(theirs.key) is theirs.stop
    leave(stack)


def test_waiting_is_shown_and_can_be_stopped(monkeypatch):
    async def watch():
        views, who = [], visitor("a")
        async for view, *_ in make_tab.watch_match("a.png", "b.png", "builtin", "any change", "quick", who):
            views.append(str(view))
            line.stop(who)
        return views

    line = Line(0, of_session=2)
    monkeypatch.setattr(make_tab, "MATCHES", line)
    waiting, ended = anyio.run(watch)
    assert "You are number 1 in the queue" in waiting
    assert ended == '<p class="verdict">You pressed Stop before it began.</p>', "no error"


def test_what_goes_wrong_is_said_in_place_of_an_earlier_result(tmp_path):
    async def watch(*photos):
        who = visitor("a")
        return [shown async for shown in make_tab.watch_match(*photos, "builtin", "any change", "quick", who)]

    photo = tmp_path / "a.png"
    photo.write_bytes(encode_png(torch.zeros(3, 10, 10)))
    for photos, said in (
        ((str(photo), str(photo)), "Both photos are the same to the AI model. Choose another one."),
        ((None, str(photo)), "Choose a photo for “Looks like this” first."),
    ):
        (begun, *_), (ended, key, tools, *_) = anyio.run(watch, *photos)
        assert "up to 120 s, most take less" in begun, "it is said at once what happens"
        assert said in ended
        assert not key
        assert not tools.visible


def test_the_address_of_a_visitor_cannot_be_chosen(monkeypatch):
    chosen = {"x-forwarded-for": "9.9.9.9, 8.8.8.8, 10.0.0.1"}
    assert address_of(visitor("a", "1.1.1.1", **chosen)) == "1.1.1.1"
    monkeypatch.setenv("SPACE_ID", "me/app")  # behind the proxies of the Hub, which append what they see
    assert address_of(visitor("a", "10.0.0.2", **chosen)) == "8.8.8.8"
    assert address_of(visitor("a", "10.0.0.2")) == "10.0.0.2"
    assert address_of(visitor("a", "2a01:4f8::1")) == address_of(visitor("a", "2a01:4f8::2:1"))


def photo_files() -> dict[str, bytes]:
    """A photo in every format, with what goes wrong where something else reads it first."""
    rgb = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image, files = Image.fromarray(rgb), {}

    def save(name: str, picture: Image.Image, kind: str, **options) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files[name] = buffer.getvalue()

    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    save("clear.png", clear, "PNG")
    save("deep.png", Image.fromarray(rgb[..., 0].astype(np.uint16) * 257), "PNG")
    save("palette.png", image.quantize(16), "PNG")
    exif = Image.Exif()
    exif[274] = 6
    save("turned.jpg", image, "JPEG", exif=exif)
    for name, kind in (
        ("a.tif", "TIFF"),
        ("a.jp2", "JPEG2000"),
        ("a.webp", "WEBP"),
        ("a.gif", "GIF"),
        ("a.bmp", "BMP"),
    ):
        save(name, image, kind)
    return files


@pytest.mark.parametrize("name", photo_files())
def test_an_upload_is_read_as_the_command_line_reads_the_file(tmp_path, name):
    (tmp_path / name).write_bytes(photo_files()[name])
    path, want = str(tmp_path / name), open_image(tmp_path / name)
    first = uploads.Photo(type="filepath")
    again = first.__class__(**first.constructor_args)  # as gradio makes it once an answer has changed it
    for photo in (first, again):
        assert photo.preprocess(ImageData(path=path)) == path
    image = uploads.read_upload(path, "Seen as this")
    assert image.tobytes() == want.tobytes()
    seen = uploads.shown(path, image)
    assert (seen is not None) == (name in ("a.tif", "a.jp2"))
    if seen:
        assert open_image(seen).tobytes() == want.tobytes()
    assert first.get_block_name() == "image"


def test_uploads_that_cannot_be_used_are_refused_in_words(tmp_path, monkeypatch):
    for name, data in NO_PHOTOS.items():
        (tmp_path / f"{name}.png").write_bytes(data)
        with pytest.raises(gr.Error, match=r"^.This is not a picture\. Choose a JPEG, PNG,"):
            uploads.read_upload(str(tmp_path / f"{name}.png"), "Seen as this")
    with pytest.raises(gr.Error, match="is gone: files are deleted after an hour") as caught:
        uploads.read_upload(str(tmp_path / "nothing.png"), "Seen as this")
    assert str(tmp_path) not in caught.value.message
    (tmp_path / "a.png").write_bytes(encode_png(torch.zeros(3, 10, 10)))
    (tmp_path / "cut.jpg").write_bytes(BUILTIN_PHOTOS["cat"].read_bytes()[:9000])
    with pytest.raises(gr.Error, match=r"^.This photo is damaged\. Copy or"):
        uploads.read_upload(str(tmp_path / "cut.jpg"), "Seen as this")
    monkeypatch.setattr(uploads, "MOST_PIXELS", 99)
    with pytest.raises(gr.Error, match=r"has over 0 megapixels, or a rare format\. Save it as a smaller"):
        uploads.read_upload(str(tmp_path / "a.png"), "Seen as this")


def test_uploads_of_one_address_are_limited(monkeypatch):
    monkeypatch.setattr(uploads, "OF_ADDRESS", 100)
    client = TestClient(uploads.UploadLimit(PlainTextResponse("taken")))
    sent = [client.post("/gradio_api/upload?upload_id=1", content=b"x" * 60) for _ in range(2)]
    assert [answer.status_code for answer in sent] == [200, 429]
    assert sent[1].text == "That was a lot of uploads for one hour. Try again later."
    assert client.post("/gradio_api/upload", content=iter([b"x"])).status_code == 411
    assert client.post("/gradio_api/queue/join", content=b"x" * 200).status_code == 200


def test_temporary_files_are_deleted_after_an_hour_also_those_of_an_earlier_process(tmp_path, monkeypatch):
    own, dead, alive, foreign = (tmp_path / f"{name}" for name in (*map("hf_equiv_space_{}".format, "abc"), "other"))
    for folder in (own, dead, alive, foreign):
        folder.mkdir()
        for name in ("old", "kept", "new"):
            (folder / name).write_text("")
            os.utime(folder / name, (time.time() - (10 if name == "new" else 4000),) * 2)
    for folder in (dead, foreign):
        os.utime(folder, (time.time() - 4000,) * 2)
    monkeypatch.setattr(shelf, "FOLDER", own)
    shelf.sweep({str(own / "kept")})
    assert sorted(path.name for path in own.iterdir()) == ["kept", "new"]
    assert not dead.exists()
    assert len([*alive.iterdir()]) == len([*foreign.iterdir()]) == 3
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(own))
    assert shelf.file_of(b"1", "a.png").startswith(str(own))


ROW = {
    "embedding_error_8bit": 1e-5, "source_label": "Egyptian cat", "match_label": "espresso, coffee",
    "target_label": "espresso, coffee", "same_top1": True, "stopped": False, "radius": None, "match_prob": 0.9,
    "psnr_db": 40.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "It looks like the photo. The AI model sees an espresso."),
        ({"match_prob": 0.37}, "The AI model guesses an espresso (37 %), as for the other photo."),
        ({"source_label": "espresso, coffee"}, "Both photos are seen as an espresso, and so is the lookalike."),
        ({"match_label": None}, "It looks like the photo; to the AI model it is the other one."),
        (
            {"embedding_error_8bit": 0.16, "stopped": True},
            "Stopped early: 84 % the same so far, and already an espresso.",
        ),
        (
            {"embedding_error_8bit": 0.16, "match_label": "Egyptian cat", "same_top1": False},
            "Not all the way: 84 % the same, but still seen as an Egyptian cat.",
        ),
        (
            {"embedding_error_8bit": 2.0, "match_label": "pizza", "same_top1": False, "stopped": True},
            "Stopped early: 0 % the same so far, and seen as a pizza, which is neither.",
        ),
        ({"embedding_error_8bit": 0.5, "match_label": None, "stopped": True}, "Stopped early: 50 % the same so far."),
    ],
)
def test_the_labels_lead_and_failure_does_not_contradict_them(given, said):
    assert views.making.headline(ROW | given).replace("\xa0", " ") == said


@pytest.mark.parametrize(("seconds", "said"), [(119.9, "You pressed <em>Stop</em>."), (120.0, "Time was up (120 s).")])
def test_a_match_that_was_ended_says_why(seconds, said):
    assert views.making.advice(ROW | {"embedding_error_8bit": 0.16, "stopped": True}, 120.0, seconds) == said


@pytest.mark.parametrize(("psnr", "seen"), [(40.0, False), (35.7, True), (None, False)])
def test_specks_are_stated_where_they_are_seen(psnr, seen):
    assert ("Look closely and you see specks." in views.making.advice(ROW | {"psnr_db": psnr}, 120.0, 1.0)) == seen


def test_a_lookalike_that_breaks_says_so():
    made = outcome.Made(ROW, "builtin", 1.0, "")
    for label, error, said in (
        (
            "espresso, coffee",
            0.98,
            "<strong>Broken:</strong>\n 2 % the same instead of 99.999 % (still guessed an espresso).",
        ),
        ("Egyptian cat", 0.5, "(now guessed <strong>an Egyptian cat</strong>, no longer an espresso)."),
        ("espresso, coffee", 1e-4, "<strong>It holds:</strong>"),
        (None, None, "<p>This picture could not be measured.</p>"),
    ):
        now = outcome.Changed("Save as JPEG", torch.zeros(3, 2, 2), outcome.Sight(label, 0.4), error)
        assert said in views.making.broken(made, now, b"").replace("\xa0", " ")


def test_a_small_model_says_what_it_knows(encoder):
    (sight,) = outcome.sights(encoder, torch.full((1, 3, *encoder.input_shape[1:]), 0.5))
    assert sight.known == encoder.label_names
    for probability, verb in ((0.4, "guesses"), (0.6, "sees")):
        said = views.making.seen(replace(sight, probability=probability))
        assert f"AI {verb} <strong>" in said
        assert f"This small model knows only {len(encoder.label_names)} things" in said


def test_a_made_match_is_kept_for_an_hour(monkeypatch):
    made = outcome.Shelf()
    key = made.put(outcome.Made({}, "builtin", 1.0, ""))
    assert len(key) >= 16
    assert made.get(key).model == "builtin"
    for wrong in ("nothing", None, 5):
        with pytest.raises(gr.Error, match="is gone: they are kept for an hour"):
            made.get(wrong)
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(gr.Error, match="is gone"):
        made.get(key)


def test_a_link_to_a_match_that_is_gone_says_so():
    view, *_, source, target = make_tab._open_page(SimpleNamespace(query_params={"made": "unknown"}))
    assert "This lookalike is gone" in view
    assert "Egyptian cat" in source
    assert "espresso" in target


def test_a_slow_dataset_delays_nobody_else(monkeypatch):
    started, release = shelf.threading.Event(), shelf.threading.Event()

    def slow(name, **_):
        started.set()
        assert release.wait(30)
        return name

    monkeypatch.setattr(shelf, "open_showcase", slow)
    waiting = shelf.threading.Thread(target=shelf.named_results, args=("slow/data",))
    waiting.start()
    assert started.wait(30)
    with monkeypatch.context() as quick:
        quick.setattr(shelf, "open_showcase", lambda name, **_: name)
        assert shelf.named_results("quick/data") == "quick/data", "another one is opened meanwhile"
    for k in range(shelf._AWAITED - 1):
        shelf._strangers[f"pending/{k}"] = shelf.Future()
    with pytest.raises(gr.Error, match="Other datasets are being opened"):
        shelf.named_results("one/more")
    release.set()
    waiting.join(30)
    shelf._strangers.clear()


def test_a_local_run_is_shown_by_its_name(tmp_path):
    run = shutil.copytree(Path(shelf.__file__).parent / "results" / "match", tmp_path / "runs" / "deit")
    script = "import shelf; print(shelf.DATASET, len(shelf.named_results('deit').matches), shelf.home_of('matches'))"
    env = os.environ | {"HF_EQUIV_DATASET": str(run), "GRADIO_TEMP_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(shelf.__file__).parent), *sys.path])
    told = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    assert told.split() == ["deit", "12", "deit"]
