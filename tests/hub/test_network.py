"""Between a client and the Hub: storage that refuses, proxies, links that expire, files that arrive damaged."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from fakes import TinyEncoder
from hubcases import NAME, call, whole
from huggingface_hub import HfFileSystem, constants, errors
from loopback_hub import PAGE
from tiny_models import save

from hf_equiv.hub import repository
from hf_equiv.hub.load import download_results, load_results
from hf_equiv.hub.publish import publish_results
from hf_equiv.models.checkpoint import HubFiles, find_checkpoint
from hf_equiv.verify import directory


@pytest.fixture(autouse=True)
def waits(monkeypatch, tmp_path) -> list[float]:
    """Waiting takes no time, and is written down; nothing is in the cache."""
    asked: list[float] = []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    monkeypatch.setattr(time, "sleep", asked.append)
    HfFileSystem.clear_instance_cache()
    return asked


def asked_for(hub, method: str, part: str) -> int:
    return sum(one == method and part in path for one, path, *_ in hub.log)


@pytest.mark.parametrize("status", [400, 404, 413])
def test_storage_that_refuses_is_named(status, hub, runs, capsys, waits):
    hub.fail("PUT", "/_lfs/", status, times=1000, error="EntityTooLarge")
    code, out, err = call(capsys, "publish", runs["match"], NAME, "-q")
    assert (code, out) == (2, "")
    assert f"'{NAME}' was not published: storage answered {status} (EntityTooLarge)." in err
    assert ("too large" in err) is (status == 413)
    assert err.count("\n") == 1
    assert waits == []
    hub.faults.clear()
    publish_results(runs["seed"], NAME)
    publish_results(runs["match"], NAME)
    whole(hub, runs, 3)


def test_an_expired_link_is_asked_for_anew(hub, runs):
    publish_results(runs["seed"], NAME)
    hub.log.clear()
    hub.fail("PUT", "/_lfs/", 403)
    assert publish_results(runs["match"], NAME).changed
    assert asked_for(hub, "POST", "objects/batch") == 2
    whole(hub, runs, 3)


@pytest.mark.parametrize(("method", "path"), [("POST", "/commit/"), ("POST", "/preupload/"), ("POST", "objects/batch")])
def test_the_hub_is_asked_once_what_it_forbids(method, path, hub, runs, capsys):
    publish_results(runs["seed"], NAME)
    hub.log.clear()
    hub.fail(method, path, 403, times=1000, error="not allowed")
    code, _, err = call(capsys, "publish", runs["match"], NAME, "-q")
    assert code == 2
    assert f"you may not write to '{NAME}'" in err
    assert asked_for(hub, method, path) == 1


@pytest.mark.parametrize(
    ("path", "page", "said"),
    [(path, PAGE, "a web page") for path in ("/tree/", "/preupload/", "objects/batch", "/commit/", "validate-yaml")]
    + [
        (path, page, "JSON that no Hub sends")
        for path, page in {
            "/api/datasets/": b"{}", "/api/datasets/alice": b"[" * 50_000, "/tree/": b"[{}]", "/preupload/": b"null",
            "objects/batch": b"{}", "/commit/": b"[5]",
        }.items()
    ],
    ids=repr,
)  # fmt: skip
def test_the_page_of_a_proxy_is_no_answer(path, page, said, hub, runs, capsys):
    publish_results(runs["seed"], NAME)
    before = hub.files("datasets", NAME)
    for method in ("GET", "POST"):
        hub.fail(method, path, 200, times=1000, page=page)
    code, _, err = call(capsys, "publish", runs["match"], NAME, "-q")
    assert code == 2
    assert f"'{NAME}' was not published: {hub.endpoint} answered with {said}" in err
    assert "HTTPS_PROXY" in err
    assert err.count("\n") == 1
    hub.faults.clear()
    assert hub.files("datasets", NAME) == before


@pytest.mark.parametrize("status", [403, 407, 511])
def test_a_proxy_that_refuses_is_no_hub(status, hub, runs, capsys):
    hub.fail("GET", "/api/datasets/", status, times=1000, page=PAGE)
    code, _, err = call(capsys, "verify", NAME)
    assert code == 2
    assert f"(HTTP {status}: a web page, as of a proxy). Log in to the network, or correct HTTPS_PROXY" in err


def test_file_names_that_move_the_cursor(hub, runs, capsys):
    publish_results(runs["match"], NAME)
    hub.add("datasets", NAME, hub.files("datasets", NAME) | {"figures/\x1b[2J.png": b"1"})
    code, _, err = call(capsys, "verify", NAME)
    assert code == 2
    assert r"must have printable file names, which progress bars show; got 'figures/\x1b[2J.png'" in err


@pytest.mark.parametrize("path", ["/api/models/", "/resolve/"])
def test_a_checkpoint_behind_a_login_page(path, hub, tmp_path, capsys):
    hub.add("models", "bob/vit", save("vit_head", tmp_path / "model"))
    for method in ("GET", "HEAD"):
        hub.fail(method, path, 200, times=1000, page=PAGE)
    code, _, err = call(capsys, "match", "bob/vit", "--data", "builtin", "--dry-run")
    assert code == 2
    assert "answered with a web page" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_download_is_fetched_again(file, hub, tmp_path):
    folder = save("vit_head", tmp_path / "model")
    hub.add("models", "bob/vit", folder)
    hub.spoil("GET", f"/resolve/.*/{file}", times=2)
    found = find_checkpoint(HubFiles("bob/vit"))
    assert found.find(file).read_bytes() == Path(folder, file).read_bytes()
    assert not hub.faults


def test_a_download_that_stays_damaged_is_named(hub, runs, tmp_path, capsys):
    hub.add("models", "bob/vit", save("vit_head", tmp_path / "model"))
    hub.spoil("GET", "/resolve/.*/model.safetensors", times=1000)
    code, _, err = call(capsys, "env", "bob/vit")
    assert code == 2
    assert "'model.safetensors' of 'bob/vit' arrived damaged three times" in err
    hub.faults.clear()
    hub.fail("GET", "/resolve/.*/model.safetensors", 200, times=1000, page=PAGE)  # of another size
    code, _, err = call(capsys, "env", "bob/vit")
    assert code == 2
    assert "a file' of 'bob/vit' arrived damaged three times" in err
    publish_results(runs["match"], NAME)
    hub.spoil("GET", "/resolve/.*/pairs.png", times=1000)
    code, _, err = call(capsys, "verify", NAME)
    assert code == 2
    assert f"'pairs.png' of '{NAME}' arrived damaged three times" in err
    hub.faults.clear()
    assert call(capsys, "verify", NAME)[0] == 0


def test_rows_that_arrived_damaged_are_fetched_again(hub, runs):
    publish_results(runs["match"], NAME)
    hub.spoil("GET", "/resolve/.*", times=2)
    folder, _ = download_results(NAME)
    assert not hub.faults
    assert (folder / "figures" / "pairs.png").read_bytes() == hub.files("datasets", NAME)["figures/pairs.png"]
    assert len(load_results(NAME)) == 2


def test_dry_runs_need_no_network(hub, runs, capsys, waits, monkeypatch):
    publish_results(runs["seed"], NAME)
    for method in ("GET", "POST", "HEAD"):
        hub.fail(method, "/", 0, times=1000)
    for words in (
        ("publish", runs["match"], NAME),
        ("space", "deploy", NAME, "--dataset", "alice/a", "--model", "a/b"),
    ):
        code, out, err = call(capsys, *words, "--dry-run")
        assert code == 0, err
        assert "Hub not checked: " in out
        assert "could not be looked at" in out
        assert "nothing was written" in out
    assert "matches/part-00000.parquet" in call(capsys, "publish", runs["match"], NAME, "--dry-run")[1]
    hub.faults.clear()
    hub.hold("GET", "/api/datasets/")  # takes the request and says nothing
    monkeypatch.setattr(repository, "_PATIENCE", 0.2)
    code, out, _ = call(capsys, "publish", runs["match"], NAME, "--dry-run", "--json")
    assert code == 0
    assert "cannot be reached" in json.loads(out)["unchecked"]
    assert json.loads(out)["photos"]
    assert waits == []


@pytest.mark.parametrize("what", [("env", "bob/vit"), ("verify", NAME), ("match", "builtin", "--data", "bob/photos")])
def test_a_cache_that_cannot_be_used_is_named(what, hub, runs, tmp_path, capsys, monkeypatch):
    publish_results(runs["match"], NAME)
    hub.add("models", "bob/vit", save("vit_head", tmp_path / "model"))
    hub.add("datasets", "bob/photos", {"train/a.png": b"1"})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    code, _, err = call(capsys, *what)
    assert code == 2
    assert str(tmp_path / "file") in err
    assert "HF_HOME" in err
    assert err.count("\n") == 1
    with pytest.raises(errors.RepositoryNotFoundError):
        load_results("bob/nothing")
