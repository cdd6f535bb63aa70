"""How the classes of a folder are found, and that nothing is left out in silence."""

import hashlib
import io
import itertools
import os
from pathlib import Path

import pytest
from fakes import TinyEncoder, draw_photo

from hf_equiv.analyses import MatchConfig, make_plan
from hf_equiv.data import sources
from hf_equiv.data.image_set import file_digest
from hf_equiv.data.sources import load_images


def fill(folder, files):
    for k, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(files, dict) and files[name] is not None:
            path.write_bytes(files[name])
        else:
            buffer = io.BytesIO()
            draw_photo(k).save(buffer, "PNG")
            path.write_bytes(buffer.getvalue())
    return str(folder)


def said(images) -> str:
    return "; ".join(images.choices)


@pytest.mark.parametrize(
    ("files", "labels", "told"),
    [
        (["ant/a.png", "bee/b.png"], ["ant", "bee"], "taking the names of folders as classes: ant, bee"),
        (["train/a.png", "test/b.png"], [None, None], "taking the folders test, train for splits"),
        (["train2017/a.png", "val2017/b.png"], [None, None], "taking the folders train2017, val2017 for splits"),
        (["test/ant/a.png", "train/bee/b.png"], ["ant", "bee"], "classes: ant, bee"),
        (["train/ant/a.png", "train/bee/b.png"], ["ant", "bee"], "classes: ant, bee"),
        (["bus/a.png", "train/b.png"], ["bus", "train"], "classes: bus, train"),
        (["images/a.png", "images/b.png"], [None, None], "the folder 'images' is no class"),
        (["ant/images/a.png", "bee/images/b.png"], ["ant", "bee"], "classes: ant, bee"),
        (["train/images/a.png", "val/images/b.png"], [None, None], "taking the folders train, val for splits"),
        (["train/a.png"], [None], "taking the folders train for splits"),
        (["a.png"], [None], ""),
    ],
)
def test_classes_from_folders(tmp_path, files, labels, told):
    images = load_images(fill(tmp_path, files))
    assert list(images.labels) == labels
    assert told in said(images)
    assert bool(told) == bool(images.choices)


@pytest.mark.parametrize(
    ("name", "text", "column"),
    [
        ("labels.csv", "\ufefffile,label\r\na.png,ant\r\nb.png,bee\r\n", "label"),
        ("labels.csv", "file;label\na.png;ant\nb.png;bee\n", "label"),
        ("labels.csv", " file , name \na.png,ant\nb.png,bee\n", "name"),
        ("metadata.csv", "file_name,label\na.png,ant\nb.png,bee\n", "label"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "class": "ant"}\n\n{"file_name": "b.png", "class": "bee"}\n',
            "class",
        ),
    ],
)
def test_classes_from_tables(tmp_path, name, text, column):
    images = load_images(fill(tmp_path, {"a.png": None, "b.png": None, name: text.encode()}))
    assert images.labels == ("ant", "bee")
    assert images.choices == (f"taking classes from the column {column!r} of {name} (2 images)",)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("metadata.csv", b"file_name,text\na.png,hi\n", "metadata.csv gives no classes: it must have the columns"),
        ("metadata.csv", b"file_name,label\na.png,ant\n../b.png,x\n/etc/y,z\n", "not there (2): ../b.png, /etc/y"),
        ("labels.csv", b"file,label\na.png,ant\n", "images without a class in labels.csv (1): b.png"),
    ],
)
def test_tables_that_do_not_fit_are_told(tmp_path, name, text, told):
    assert told in said(load_images(fill(tmp_path, {"a.png": None, "b.png": None, name: text})))


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("labels.csv", "file,label\na.png,é\n".encode("latin-1"), "'labels.csv' must be a CSV file in UTF-8"),
        ("labels.csv", b"file,label\na.png," + b"x" * 200_000, "field larger than field limit"),
        ("labels.csv", b"file,label\na.png,1\na.png,2\n", "must have one class for each file"),
        ("metadata.jsonl", b'{"file_name": ', "must be a file of JSON lines"),
        ("metadata.jsonl", b"[" * 100_000, "must be a file of JSON lines"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(tmp_path, name, text, told):
    with pytest.raises(ValueError, match=told):
        load_images(fill(tmp_path, {"a.png": None, name: text}))


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder = tmp_path / "photos"
    fill(folder, ["ant/a.png"])
    fill(tmp_path / "other", ["b.png"])
    (folder / "bee").symlink_to(tmp_path / "other")
    (folder / "ant" / "again").symlink_to(folder)
    (folder / "up").symlink_to("..")
    (folder / "gone.png").symlink_to("nowhere")
    images = load_images(str(folder))
    assert dict(zip(images.ids, images.labels, strict=True)) == {"ant/a.png": "ant", "bee/b.png": "bee"}
    assert images[1].image.size == draw_photo(0).size
    assert images.choices[-1] == "leaving out 3 files: ant/again, gone.png, up"


def test_a_plan_tells_which_files_are_left_out(tmp_path):
    names = {"a.png": None, "b.png": None, "c.heic": b"x", "d.txt": b"x", ".e.png": b"x", ".DS_Store": b"x"}
    names |= {"run/run.json": b"{}", "run/figures/pairs.png": None}
    plan = make_plan(MatchConfig(data=fill(tmp_path, names), pairs=1), TinyEncoder())
    assert plan.choices == ("leaving out 5 files: .e.png, c.heic, d.txt, run/figures/pairs.png, …",)
    fill(tmp_path / "none", {"c.heic": b"x"})
    with pytest.raises(ValueError, match=r"leaving out 1 file, no image or table: c\.heic"):
        load_images(str(tmp_path / "none"))


def test_links_that_multiply_are_left_out(tmp_path):
    names = [f"n{k}" for k in range(12)]
    fill(tmp_path, ["a.png", "n0/b.png"])
    for before, name in itertools.pairwise(names):
        (tmp_path / name).mkdir()
        for link in ("l", "r"):
            (tmp_path / name / link).symlink_to(tmp_path / before)
    images = load_images(str(tmp_path))
    assert len(images) <= 20
    assert any("leaving out" in told for told in images.choices)


def test_a_name_that_is_too_long_costs_its_own_file(tmp_path, monkeypatch):
    fill(tmp_path, ["a.png"])
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    Path("b.png").write_bytes(b"x")
    assert load_images(str(tmp_path)).ids == ("a.png",)


def test_files_that_are_never_opened_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 10)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("the file was read"))
    fill(tmp_path, ["a.png"])
    assert load_images(str(tmp_path)).ids == ("a.png",)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a file of the kernel")
def test_a_link_to_a_file_of_the_kernel_is_an_empty_file(tmp_path):
    (tmp_path / "a.png").symlink_to("/proc/version")
    assert file_digest(tmp_path / "a.png") == hashlib.sha256().hexdigest()
    with pytest.raises(ValueError, match=r"empty file \(0 bytes\)"):
        load_images(str(tmp_path))[0]
