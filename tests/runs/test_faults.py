"""A run directory may be moved or deleted while it is written, lack locks, and hold odd names and records."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from fakes import TinyEncoder, draw_photo
from hubcases import call

from hf_equiv.analyses import SpectrumConfig, make_plan, run_analysis
from hf_equiv.cli import environment
from hf_equiv.hub.load import load_results
from hf_equiv.report import collect
from hf_equiv.runs import directory, processes, shards
from hf_equiv.runs.schema import MATCH
from hf_equiv.verify import directory as verify_directory


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for module, name in (
        (environment, "load_encoder"),
        (verify_directory, "load_recorded"),
        (collect, "load_recorded"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: TinyEncoder())
    return tmp_path


# --- the folder goes away ---


def rename(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))


def remake(out: Path) -> None:
    """Another run begins where this one was."""
    rename(out)
    out.mkdir()
    (out / ".lock").touch()


def replace(out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("a file")


@pytest.mark.parametrize("move", [rename, shutil.rmtree, remake, replace])
@pytest.mark.parametrize("when", [1, 3])
def test_a_folder_that_is_moved_stops_the_run(move, when, place):
    plan, out, seen = make_plan(SpectrumConfig(data="builtin"), TinyEncoder()), place / "out", []

    def observe(progress):
        seen.append(progress)
        if progress.stage == "saved" and progress.done == when:
            move(out)

    with pytest.raises(FileNotFoundError, match=r"folder '.*out.*' has been renamed, replaced or deleted while"):
        run_analysis(plan, out, observer=observe)
    assert seen[-1].done == when
    assert not out.is_dir() or [path.name for path in out.iterdir()] == [".lock"]
    if (kept := place / "elsewhere").exists():
        assert len(run_analysis(plan, kept).rows) == 4
        assert not list(kept.rglob(".*.tmp"))


def test_a_command_says_that_its_folder_is_gone(place, capsys, monkeypatch):
    real = shards.write_shard

    def write(folder, *given, **more):
        shutil.rmtree(folder)
        real(folder, *given, **more)

    monkeypatch.setattr(shards, "write_shard", write)
    code, _, err = call(capsys, "spectrum", "builtin", "--out", "out", "-q")
    assert code == 2
    assert err.startswith("error: folder 'out/spectra' has been renamed, replaced or deleted")
    assert err.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_named(number, place, capsys, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(directory.fcntl, "flock", fail)
    code, _, err = call(capsys, "spectrum", "builtin", "--out", "out", "-q")
    assert code == 2
    told = (
        f"run directory 'out' cannot be locked: {os.strerror(number)}. Give another --out on a file system with locks."
    )
    assert err == f"error: {told}\n"
    monkeypatch.setattr(processes.fcntl, "lockf", fail)
    claims = processes.Claims(place, type("State", (), {"is_main_process": True, "num_processes": 2}))
    with pytest.raises(ValueError, match="cannot be locked"):
        claims.__enter__()
    claims.__exit__()


# --- names ---


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("verb", ["match", "spectrum"])
def test_names_that_are_no_utf8(verb, place, capsys):
    folder = os.fsencode(place) + b"/in\xff"
    for k, name in enumerate([b"/caf\xe9/a.png", b"/b\xff.png", b"/c.png"]):
        path = Path(os.fsdecode(folder + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_photo(k).save(path)
    out, odd = "out", os.fsdecode(b"out\xfe")
    for more in ([], ["--dry-run"]):
        code, _, err = call(capsys, verb, "builtin", "--out", odd, "-q", *more)
        assert code == 2
        assert "--out must be a name in UTF-8; got 'out\\udcfe'. Give another --out." in err
        assert not Path(odd).exists()
    more = ["--pairs", "3", "--max-evals", "20", "--rtol", "0.9"] if verb == "match" else []
    code, told, _ = call(capsys, verb, "builtin", "--data", os.fsdecode(folder), "--out", out, "--json", *more)
    assert code == 0
    assert "\\\\udcff.png" in told
    record = json.loads(Path(out, "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["data_id"] == "in\\udcff"
    assert call(capsys, verb, "builtin", "--data", os.fsdecode(folder), "--out", out, *more)[0] == 0
    assert call(capsys, "verify", out)[0] == 0
    assert call(capsys, "report", out, "--no-survival", "--out", "page.html")[0] == 0


def test_folders_that_look_like_addresses(place, capsys):
    draw_photo(1).save(place / "a:b.png")
    assert call(capsys, "spectrum", "builtin", "--source", "a:b.png", "--out", "s3:x:run")[0] == 0
    assert call(capsys, "verify", "s3:x:run")[0] == 0


# --- odd records ---


def edit(change):
    def apply(text: str) -> bytes:
        record = json.loads(text)
        change(record)
        return json.dumps(record).encode()

    return apply


ODD = {
    "empty": lambda text: b"",
    "cut short": lambda text: text[: len(text) // 2].encode(),
    "not UTF-8": lambda text: b"\xff\xfe" + text.encode("latin-1", "replace"),
    "a list": lambda text: b"[]",
    "null": lambda text: b"null",
    "deep": lambda text: b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "deep inside": edit(lambda r: r["summary"].update(median=json.loads("[" * 300 + "]" * 300))),
    "Infinity": edit(lambda r: r["settings"].update(rtol=float("inf"))),
    "too large a float": lambda text: text.replace('"seed": 0', '"seed": 1e999').encode(),
    "too large a number": lambda text: text.replace('"seed": 0', '"seed": ' + "9" * 5000).encode(),
    "half a character": edit(lambda r: r["settings"].update(model_id="\ud800")),
    "no settings": edit(lambda r: r.pop("settings")),
    "settings of another type": edit(lambda r: r.update(settings=[])),
    "no summary": edit(lambda r: r.pop("summary")),
    "no files": edit(lambda r: r.pop("files")),
    "no model": edit(lambda r: r["settings"].pop("model_id")),
    "a number as a model": edit(lambda r: r["settings"].update(model_id=3)),
    "a list as a processor": edit(lambda r: r["settings"].update(processor=[])),
    "text as a version": edit(lambda r: r.update(schema_version="1")),
    "text as files": edit(lambda r: r.update(files="none")),
    "a number as a digest": edit(lambda r: r["files"].update({"figures/pairs.png": 1})),
    "pairs of another type": edit(lambda r: r.update(pairs={"a": 1})),
    "a pair without an id": edit(lambda r: r["pairs"][0].pop("pair_id")),
    "a number as an id": edit(lambda r: r["pairs"][0].update(pair_id=3)),
    "a list as a verb": edit(lambda r: r.update(analysis=["match"])),
    "errors of another type": edit(lambda r: r.update(errors=[])),
    "a licence of another type": edit(lambda r: r.update(license=["mit"])),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_records_are_one_line_that_names_them(kind, runs, place, capsys):
    folder = Path(shutil.copytree(runs["match"], place / "odd"))
    (folder / "run.json").write_bytes(ODD[kind]((folder / "run.json").read_text()))
    again = ["match", "builtin", "--data", "builtin", "--pairs", "2", "--max-evals", "40", "--out", "odd"]
    commands = [
        ["verify", "odd"],
        ["report", "odd"],
        ["publish", "odd", "me/x", "--dry-run"],
        [*again, "--dry-run"],
        again,
    ]
    for arguments in commands:
        code, _, err = call(capsys, *arguments, "-q")
        assert code == 2, (arguments, err)
        assert err.startswith(f"error: '{'odd/run.json'}' is damaged: "), err
        assert "Restore it, or make the run again elsewhere." in err
        assert err.count("\n") == 1
    with pytest.raises(ValueError, match=r"run.json' is damaged"):
        load_results(folder, run="x")


def test_a_damaged_neighbour_is_in_nobodys_way(place, capsys):
    assert call(capsys, "spectrum", "builtin", "-q")[0] == 0
    (record,) = place.glob("runs/**/run.json")
    record.write_bytes(b"[" * 200_000)
    assert call(capsys, "spectrum", "builtin", "--seed", "1", "-q") == (0, "", "")


def test_rows_that_a_run_does_not_list_are_refused_before_any_work(runs, place, capsys):
    folder = Path(shutil.copytree(runs["match"], place / "odd"))
    first = sorted((folder / "matches").glob("*.parquet"))[0]
    rows = [row | {"pair_id": "somebody->else"} for row in shards.read_shard(first, images=True)]
    first.write_bytes(shards.shard_bytes(rows, MATCH, {}))
    again = ["match", "builtin", "--data", "builtin", "--pairs", "2", "--max-evals", "40", "--out", "odd", "-q"]
    code, _, err = call(capsys, *again)
    assert code == 2
    assert err.startswith(
        "error: 'odd' holds rows of 'somebody->else', which its run does not list. Give another --out"
    )


def test_a_summary_of_another_type_is_not_published(runs, place, capsys):
    folder = Path(shutil.copytree(runs["match"], place / "odd"))
    for change in (lambda s: s.update(median=[]), lambda s: s.pop("counts"), lambda s: s["median"].update(psnr_db="x")):
        record = json.loads((runs["match"] / "run.json").read_text())
        change(record["summary"])
        (folder / "run.json").write_text(json.dumps(record))
        code, _, err = call(capsys, "publish", "odd", "me/x", "--dry-run", "-q")
        assert code == 2
        assert "'odd/run.json' is damaged: no card can be made of its summary" in err


def test_a_byte_order_mark_is_no_damage(runs, place):
    folder = Path(shutil.copytree(runs["match"], place / "run"))
    text = (folder / "run.json").read_bytes()
    (folder / "run.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert directory.read_record(folder) == json.loads(text)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(runs, place):
    shutil.copytree(runs["match"], place, dirs_exist_ok=True)
    for path in (shards.shard_path(place, 0), shards.float_file(shards.shard_path(place, 0))):
        path.unlink()
        os.mkfifo(path)
    assert list(shards.read_rows(place)) == []
    assert shards.read_first_floats(place, 1, "match") == {}
    with pytest.raises(ValueError, match="is missing"):
        directory.read_run(place)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a file of the kernel")
def test_a_link_to_a_file_of_the_kernel_has_no_content(tmp_path):
    (tmp_path / "x.png").symlink_to("/proc/version")
    (tmp_path / "empty").touch()
    assert shards.sha256_file(tmp_path / "x.png") == shards.sha256_file(tmp_path / "empty")
