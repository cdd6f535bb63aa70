"""Publishing to the loopback Hub, and getting back what was published: through the real clients, nothing mocked."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fakes import TinyEncoder, reseal, save_photos
from hubcases import NAME, at_root, call, contents, record_of, surroundings, titles
from huggingface_hub import HfApi, HfFileSystem, errors
from loopback_hub import Hub
from rich.filesize import decimal
from tiny_models import save

from hf_equiv import hub_client
from hf_equiv.analyses import MatchConfig, make_plan, run_analysis
from hf_equiv.cli import progress
from hf_equiv.hub import licences, load, repository
from hf_equiv.hub.card import END, START, dataset_card, generated_parts, split_header
from hf_equiv.hub.licences import photo_rights
from hf_equiv.hub.load import download_results, load_results
from hf_equiv.hub.publish import publish_results
from hf_equiv.models.checkpoint import quiet
from hf_equiv.models.encoder import Encoder
from hf_equiv.runs.shards import read_rows
from hf_equiv.verify import directory
from hf_equiv.verify.dataset import verify_results

main = importlib.import_module("hf_equiv.cli.main")  # `hf_equiv.cli.main` is the function


@pytest.fixture(autouse=True)
def _encoder(monkeypatch):
    """Runs are of an encoder that no Hub has; waiting takes no time."""
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    monkeypatch.setattr(time, "sleep", lambda _: None)
    HfFileSystem.clear_instance_cache()


def header(card: str) -> dict[str, Any]:
    return split_header(card)[0]


# --- what is published ---


def test_one_private_commit_holds_the_run(hub, runs):
    before = {p: p.read_bytes() for p in runs["match"].rglob("*") if p.is_file()}
    done = publish_results(runs["match"], NAME)
    assert titles(hub) == [f"Add {done.run}", "initial commit"]
    assert hub.repos["datasets", NAME].private
    assert at_root(hub) == contents(runs["match"])
    assert (done.changed, done.photos, done.private, done.place, done.pr_url) == (True, True, True, "", None)
    assert done.commit == hub.repos["datasets", NAME].at("main").sha
    assert done.url == f"{hub.endpoint}/datasets/{NAME}"
    assert before == {p: p.read_bytes() for p in runs["match"].rglob("*") if p.is_file()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.commit = "another"
    assert "hf_alice" not in repr(done)
    assert not [path for path, data in hub.files("datasets", NAME).items() if b"hf_alice" in data]
    clients = {agent for _, path, _, agent in hub.log if "/commit/" in path}
    assert all("hf_equiv/" in agent for agent in clients)


def test_nothing_new_makes_no_commit(hub, runs):
    first = publish_results(runs["match"], NAME)
    again = publish_results(runs["match"], NAME)
    assert (again.changed, again.commit, again.uploaded) == (False, first.commit, ())
    assert len(titles(hub)) == 2


def test_an_update_deletes_what_is_no_longer_there(hub, runs, tmp_path):
    other = shutil.copytree(runs["match"], tmp_path / "other")
    (other / "figures" / "more.png").write_bytes(b"picture")
    reseal(other, more=["figures/more.png"])
    publish_results(other, NAME)
    assert "figures/more.png" in hub.files("datasets", NAME)
    done = publish_results(runs["match"], NAME)
    assert done.deleted == ("figures/more.png",)
    assert titles(hub)[0] == f"Update {done.run}"
    assert at_root(hub) == contents(runs["match"])
    assert {path for path, _ in done.uploaded} == {"run.json", "README.md"}


def test_runs_are_added_and_updated_in_place(hub, runs, tmp_path):
    for name in ("match", "seed", "walk", "spectrum", "lipschitz"):
        publish_results(runs[name], NAME)
    places = [publish_results(runs[name], NAME).place for name in ("match", "seed", "walk")]
    assert places[0] == ""
    assert all(place.startswith("runs/") for place in places[1:])
    assert len(titles(hub)) == 6  # the last three had nothing to do
    assert at_root(hub) == contents(runs["match"])
    files = hub.files("datasets", NAME)
    assert {p for p in files if p.startswith(places[2])} == {
        f"{places[2]}/{name}" for name in [*contents(runs["walk"]), "run.json", "README.md"]
    }
    config = {c["config_name"]: c["data_files"][0]["path"] for c in header(files["README.md"].decode())["configs"]}
    assert config == {
        "matches": ["matches/*.parquet", "runs/*/matches/*.parquet"],
        "spectra": ["runs/*/spectra/*.parquet"],
        "lipschitz": ["runs/*/lipschitz/*.parquet"],
        "paths": ["runs/*/paths/*.parquet"],
    }
    counts = {"matches": 4, "spectra": 2, "lipschitz": 4, "paths": 6}
    for name, count in counts.items():
        rows = datasets.load_dataset(NAME, name, split="train")
        mine = load_results(NAME, name)
        assert len(rows) == len(mine) == count
        column = rows.column_names[0]
        assert np.array_equal(np.array(rows[0][column]), np.array(mine[0][column]))
        assert rows[0][column].size == (16, 16)
    report = verify_results(NAME)
    assert report.problems == ()
    assert (report.total.rows, report.total.verified) == (16, 16)
    assert report.commit == hub.repos["datasets", NAME].at("main").sha
    data = report.to_json()
    assert [run["analysis"] for run in data["runs"]] == ["match", "lipschitz", "match", "spectrum", "walk"]
    assert data["commit"] == report.commit
    folder, commit = download_results(NAME, cache_dir=str(tmp_path / "cache"))
    assert commit == report.commit
    assert list(verify_results(folder).to_json())[:2] == ["rows", "verified"]
    offline = download_results(NAME, cache_dir=str(tmp_path / "cache"), local_files_only=True)
    assert offline == (folder, commit)


def test_visibility_changes_only_when_asked(hub, runs):
    repo = lambda: hub.repos["datasets", NAME]  # noqa: E731
    assert publish_results(runs["match"], NAME, private=False).private is False
    assert not repo().private
    assert publish_results(runs["seed"], NAME).private is False
    assert not repo().private
    assert publish_results(runs["seed"], NAME, private=True).private is True
    assert repo().private
    publish_results(runs["match"], NAME)
    assert repo().private
    publish_results(runs["walk"], NAME, private=False)
    assert not repo().private


def test_a_branch(hub, runs):
    publish_results(runs["match"], NAME)
    done = publish_results(runs["seed"], NAME, revision="later")
    assert (done.revision, done.place) == ("later", f"runs/{done.run}")
    assert len(titles(hub)) == 2
    assert len(titles(hub, revision="later")) == 3
    assert len(load_results(NAME)) == 2
    assert len(load_results(NAME, revision="later")) == len(load_results(f"{NAME}@later")) == 4
    assert len(datasets.load_dataset(NAME, "matches", split="train", revision="later")) == 4
    assert verify_results(f"{NAME}@later").total.rows == 4
    hub.repos["datasets", NAME].refs["refs/tags/v1"] = str(done.commit)
    with pytest.raises(ValueError, match=r"`revision` must be a branch; 'v1' is a tag"):
        publish_results(runs["walk"], NAME, revision="v1")
    with pytest.raises(ValueError, match=r"`revision` must be a branch; got the commit"):
        publish_results(runs["walk"], NAME, revision=done.commit)
    with pytest.raises(errors.RevisionNotFoundError, match=r"`revision` must exist in the dataset .* got 'v9'"):
        load_results(NAME, revision="v9")


def test_a_pull_request_to_somebody_else(hub, runs):
    publish_results(runs["match"], "bob/results", private=False, token="hf_bob")
    with pytest.raises(errors.HfHubHTTPError, match=r"'bob' is neither you nor .* pass `create_pr=True`"):
        publish_results(runs["seed"], "bob/results")
    done = publish_results(runs["seed"], "bob/results", create_pr=True)
    assert done.pr_url == f"{hub.endpoint}/datasets/bob/results/discussions/1"
    assert done.revision == "refs/pr/1"
    assert len(titles(hub, "bob/results")) == 2
    assert len(titles(hub, "bob/results", "refs/pr/1")) == 3
    assert len(load_results("bob/results", revision="refs/pr/1")) == 4
    assert len(datasets.load_dataset("bob/results", "matches", split="train", revision="refs/pr/1")) == 4
    assert verify_results("bob/results", revision="refs/pr/1").holds
    again = publish_results(runs["seed"], "bob/results", create_pr=True)
    assert (again.pr_url, again.changed) == (done.pr_url, False)
    assert len(hub.repos["datasets", "bob/results"].discussions) == 1
    hub.repos["datasets", "bob/results"].discussions[0]["status"] = "closed"
    assert publish_results(runs["seed"], "bob/results", create_pr=True).pr_url.endswith("/discussions/2")
    with pytest.raises(ValueError, match="`revision` must be None with `create_pr`"):
        publish_results(runs["seed"], "bob/results", create_pr=True, revision="dev")


def test_a_pull_request_to_a_dataset_of_ones_own_that_is_new(hub, runs):
    done = publish_results(runs["match"], NAME, create_pr=True)
    assert titles(hub) == ["initial commit"]
    assert len(load_results(NAME, revision=done.revision)) == 2


def test_a_dry_run_writes_nothing(hub, runs, capsys):
    code, out, _ = call(capsys, "publish", runs["match"], NAME, "--dry-run")
    assert code == 0
    for told in ("matches/part-00000.parquet", "in all:", "private", "| pairs | 2 |", "photos:", "--withhold-photos"):
        assert told in out
    assert not hub.repos
    assert {method for method, *_ in hub.log} <= {"GET", "HEAD"}
    publish_results(runs["match"], NAME)
    assert "nothing:" in call(capsys, "publish", runs["match"], NAME, "--dry-run")[1]
    plan = publish_results(runs["seed"], NAME, revision="dev", dry_run=True)
    assert plan.place == f"runs/{plan.run}"
    assert len(titles(hub)) == 2


def test_command_line(hub, runs, capsys):
    code, out, err = call(capsys, "publish", runs["match"], NAME)
    assert code == 0
    for told in (
        f"{hub.endpoint}/datasets/{NAME} (private)", f"hf-equiv verify {NAME}", 'load_dataset("alice/results"',
        "photos:    are included (free: builtin",
    ):  # fmt: skip
        assert told in out
    files = hub.files("datasets", NAME)
    size = decimal(sum(len(data) for path, data in files.items() if path != ".gitattributes"))
    assert err.splitlines() == [
        "checking the run and its files", f"making the private dataset {NAME}", "reading the dataset",
        "preparing 5 files", f"uploading 5 files, {size}", "committing 5 files",
        f"done: {hub.endpoint}/datasets/{NAME}",
    ]  # fmt: skip
    err = call(capsys, "publish", runs["match"], NAME)[2]
    assert err.splitlines()[-1] == f"nothing to commit, it is there already: {hub.endpoint}/datasets/{NAME}"
    code, out, err = call(capsys, "publish", runs["match"], NAME, "--json")
    assert json.loads(out)["changed"] is False
    assert err == ""
    assert call(capsys, "publish", runs["match"], NAME, "-q")[1:] == ("", "")
    code, out, _ = call(capsys, "verify", NAME)
    assert code == 0
    assert f"Verified at commit {hub.repos['datasets', NAME].at('main').sha}" in out
    code, out, _ = call(capsys, "verify", NAME, "--json")
    assert {"rows", "verified", "failed", "problems", "dataset", "commit"} <= set(json.loads(out))


@pytest.mark.parametrize("flags", [("--private", "--public"), ("--public", "--private")])
def test_private_and_public_at_once_publish_nothing(flags, hub, runs, capsys):
    for words in (("publish", runs["match"], NAME), ("space", "deploy", NAME)):
        code, out, err = call(capsys, *words, *flags)
        assert (code, out) == (2, "")
        assert err == "error: --private and --public exclude each other; got both. Leave one out.\n"
    assert not hub.repos
    assert not hub.log


def test_interrupted_while_it_uploads(hub, runs, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_equiv.hub.publish.send", stop)
    code, out, err = call(capsys, "publish", runs["match"], NAME, "-q")
    assert (code, out) == (130, "")
    assert err.lstrip().startswith("interrupted. Run the same command to continue: it sends")


def test_progress_counts_what_has_gone(hub, runs, monkeypatch, capsys):
    told: list[tuple[int, int, str]] = []
    monkeypatch.setattr(repository, "_GROUP_BYTES", 1)
    done = publish_results(runs["match"], NAME, progress=lambda *report: told.append(report))
    total = sum(count for _, count in done.uploaded)
    sending = [(sent, whole) for sent, whole, what in told if what == "uploading 5 files"]
    assert len(sending) == len(done.uploaded) == 5
    assert sending == sorted(sending)
    assert {whole for _, whole in sending} == {total}
    assert sending[0][0] == 0 < sending[1][0] < sending[2][0] < total
    assert told[-2:] == [(total, total, "committing 5 files"), (0, 0, f"done: {done.url}")]
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    err = call(capsys, "publish", runs["walk"], NAME)[2]
    assert re.search(r"^uploading \d+ files, [\d.]+ kB of [\d.]+ kB$", err, re.MULTILINE)
    monkeypatch.setattr(repository, "_GROUP_BYTES", 10**9)
    told.clear()
    done = publish_results(runs["seed"], NAME, progress=lambda *report: told.append(report))
    assert sum(what.startswith("uploading") for *_, what in told) == 1


def test_a_folder_of_runs_is_refused_with_the_command_for_each(hub, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("runs/match/a", "runs/walk/b c", "runs/.trash/d"):
        shutil.copytree(runs["match"], tmp_path / place)
    record = json.loads((runs["walk"] / "run.json").read_text()) | {"complete": False}
    (tmp_path / "runs/walk/b c/run.json").write_text(json.dumps(record))
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/run.json").write_text("{")
    code, out, err = call(capsys, "publish", "runs", NAME, "--public", "--license", "cc-by-4.0", "--dry-run")
    assert (code, out) == (2, "")
    flags = f"{NAME} --public --license cc-by-4.0 --dry-run"
    assert err.splitlines() == [
        "error: 'runs' must be one run directory; it is a folder of 3 runs. Name one after the other:",
        f"- hf-equiv publish runs/broken {flags} (its run.json cannot be read)",
        f"- hf-equiv publish runs/match/a {flags}",
        f"- hf-equiv publish 'runs/walk/b c' {flags} (not finished: run the same walk command)",
    ]
    assert "\n- hf-equiv verify runs/match/a\n" in call(capsys, "verify", "runs")[2]
    with pytest.raises(ValueError, match=r"it is a folder of 1 run\. Name one after the other:\n- runs/match/a$"):
        publish_results("runs/match", NAME)
    assert not hub.log


def test_collections(hub, runs):
    slug = publish_results(runs["match"], NAME, collection="My results").collection
    assert hub.collections[slug]["private"]
    again = publish_results(runs["match"], NAME, collection="My results")
    assert (again.changed, again.collection) == (False, slug)
    assert publish_results(runs["seed"], "acme/others", collection=slug).collection == slug
    assert [item["id"] for item in hub.collections[slug]["items"]] == [NAME, "acme/others"]
    with pytest.raises(ValueError, match=r"is published, but it could not be added to the collection"):
        publish_results(runs["match"], NAME, collection="alice/none-" + "0" * 24)


def test_a_collection_says_who_sees_it(hub, runs, capsys):
    words = ("publish", runs["match"], NAME, "--collection", "My results")
    slug = json.loads(call(capsys, *words, "--json")[1])["collection"]
    where = f"list:      {hub.endpoint}/collections/{slug}"
    assert f"{where} (private)\n" in call(capsys, *words)[1]
    assert f"{where} (private: only you see it, unlike the dataset;" in call(capsys, *words, "--public")[1]
    hub.collections[slug]["private"] = False
    assert f"{where} (public)\n" in call(capsys, *words, "--public")[1]


# --- the card ---


def test_the_card_says_what_is_there(hub, runs):
    publish_results(runs["match"], NAME)
    text = hub.files("datasets", NAME)["README.md"].decode()
    facts = header(text)
    assert facts["license"] == "cc0-1.0"
    assert facts["tags"] == ["hf_equiv", "embedding-matching"]
    assert facts["size_categories"] == ["n<1K"]
    assert facts["configs"][0] == {
        "config_name": "matches", "default": True, "data_files": [{"split": "train", "path": ["matches/*.parquet"]}],
    }  # fmt: skip
    for told in (
        "https://arxiv.org/abs/2401.15568", "| converged |", "![pairs](figures/pairs.png)", "hf-equiv verify",
        'load_dataset("alice/results", "matches", split="train")', "seed 0", "torch ",
    ):  # fmt: skip
        assert told in text


def test_what_the_owner_wrote_survives(hub, runs):
    mine = "---\nlicense: mit\ntags:\n- mine\nlanguage: en\nannotations:\n  a: 1\n---\n# My title\n\nMy text.\n"
    hub.add("datasets", NAME, {"README.md": mine.encode()})
    publish_results(runs["match"], NAME)
    first = hub.files("datasets", NAME)["README.md"].decode()
    facts = header(first)
    assert (facts["license"], facts["language"], facts["annotations"]) == ("mit", "en", {"a": 1})
    assert facts["tags"] == ["mine", "hf_equiv", "embedding-matching"]
    assert "# My title\n\nMy text.\n" in first
    edited = first.replace("My text.", "Better text.").replace("n<1K", "1K<n<10K") + "\n## After\n"
    hub.add("datasets", NAME, hub.files("datasets", NAME) | {"README.md": edited.encode()})
    assert verify_results(NAME).holds  # the owner may write
    publish_results(runs["walk"], NAME)
    second = hub.files("datasets", NAME)["README.md"].decode()
    assert "Better text." in second
    assert second.rstrip().endswith("## After")
    assert header(second)["size_categories"] == ["1K<n<10K"]
    assert header(second)["tags"] == ["mine", "hf_equiv", "embedding-matching", "level-set"]
    assert second.count(START) == second.count(END) == 1
    assert verify_results(NAME).holds


def test_a_header_and_marks_without_end(hub, runs):
    with pytest.raises(ValueError, match=r"YAML header of README.md in the dataset cannot be read"):
        split_header("---\ntags: &a [*a, *a]\n---\n")
    assert generated_parts("<!-- hf_equiv: from here " * 50_000, {}, None) is None


def test_a_card_that_cannot_be_read(hub, runs):
    hub.add("datasets", NAME, {"README.md": b"---\ntags: [\n---\n"})
    with pytest.raises(ValueError, match=r"YAML header of README.md in the dataset cannot be read"):
        publish_results(runs["match"], NAME)


def test_a_run_directory_that_was_uploaded_by_hand(hub, runs):
    hub.add("datasets", NAME, runs["match"])
    assert verify_results(NAME).holds
    done = publish_results(runs["walk"], NAME)
    assert done.place.startswith("runs/")
    assert verify_results(NAME).problems == ()
    text = hub.files("datasets", NAME)["README.md"].decode()
    assert text.count("# Embedding matches") == 0  # its own card has become a part of the dataset's


def test_the_command_of_a_run_or_its_settings(hub, runs, tmp_path):
    """The card shows the recorded command; older runs have recorded none."""
    out = Path(shutil.copytree(runs["seed"], tmp_path / "out"))
    record = json.loads((out / "run.json").read_text())
    command = record.pop("command")
    (out / "run.json").write_text(json.dumps(record))
    card = publish_results(out, NAME).card
    assert "| max_evals | 40 |" in card
    assert "```bash" not in card
    assert verify_results(NAME).problems == ()
    record["command"] = command.replace("--data builtin", "--data 'my photos'")  # other options would contradict it
    (out / "run.json").write_text(json.dumps(record))
    card = publish_results(out, NAME).card
    assert f"\n```bash\n{record['command']}\n```\n" in card
    assert "--data 'my photos' " in card
    assert "| max_evals | 40 |" not in card
    assert verify_results(NAME).problems == ()


def test_names_of_strangers_mean_nothing_in_the_card(runs):
    record = json.loads((runs["match"] / "run.json").read_text()) | {"versions": None, "rights": "[a](b) <b>"}
    record["settings"] |= {"data_id": "a|b`c\n# d [e](f) <script>", "model_id": "m`|\n## n"}
    text = dataset_card("a/b", {"": record})
    assert "| a&#124;b&#96;c # d [e]&#40;f) &lt;script&gt; |" in text
    assert "`m&#96;&#124; ## n`" in text
    assert "[a]&#40;b) &lt;b&gt;" in text
    assert not [line for line in text.splitlines() if line.startswith(("# d", "## n"))]
    assert dataset_card("a/b", {"": record}) == text


def test_the_card_of_an_earlier_version_is_checked_by_its_numbers(hub, runs):
    publish_results(runs["match"], NAME)
    card = hub.files("datasets", NAME)["README.md"].decode()
    early = START.replace("`hf-equiv publish` writes the text (card 2)", "the text is replaced by `hf-equiv publish`")
    sentence, number = ("recomputes the rows", "makes them anew"), ("| pairs | 2 |", "| pairs | 2e9 |")
    for (old, new), holds in ((sentence, True), (number, False)):
        text = card.replace(START, early).replace(old, new)
        assert text.count(early) == text.count(new) == 1
        hub.add("datasets", NAME, hub.files("datasets", NAME) | {"README.md": text.encode()})
        assert verify_results(NAME).holds is holds
    publish_results(runs["match"], NAME)
    assert hub.files("datasets", NAME)["README.md"].decode() == card


# --- the photos ---


def test_photos_of_unknown_licence_are_withheld(hub, runs, capsys):
    code, out, _ = call(capsys, "publish", runs["folder"], NAME)
    assert code == 0
    assert "WITHHELD" in out
    assert "as in --license cc-by-4.0. With the right to publish them, pass --i-have-the-right." in out
    assert f"check it:  hf-equiv verify {NAME} --allow-withheld\n" in out
    files = hub.files("datasets", NAME)
    assert set(files) == {".gitattributes", "README.md", "run.json", "matches/part-00000.parquet"}
    assert record_of(hub)["photos"] == "withheld"
    rows = datasets.load_dataset(NAME, "matches", split="train")
    local = {row["pair_id"]: row for row in read_rows(runs["folder"])}
    for row in rows:
        assert (row["source"], row["match"], row["target"]) == (None, None, None)
        assert {k: row[k] for k in local[row["pair_id"]]} == local[row["pair_id"]]
    assert load_results(NAME, with_float=True)[0]["match_float"] is None
    assert "figures/" not in files["README.md"].decode()
    code, out, _ = call(capsys, "verify", NAME)
    assert code == 1
    assert "2 of 2 rows cannot be recomputed: photos are withheld" in out
    code, out, _ = call(capsys, "verify", NAME, "--allow-withheld")
    assert code == 0
    assert "2 of 2 rows cannot be recomputed" in out
    assert verify_results(NAME, allow_withheld=True).to_json()["withheld"] == 2


@pytest.mark.parametrize("analysis", ["walk", "spectrum", "lipschitz"])
def test_no_analysis_lets_a_photo_out(analysis, hub, runs):
    publish_results(runs[analysis], NAME, withhold_photos=True)
    publish_results(runs["match"], NAME, withhold_photos=True)
    files = hub.files("datasets", NAME)
    assert not [path for path in files if path.startswith("float/") or path.endswith("gif")]
    pictures = {path.split("/")[-1] for path in files if "figures/" in path}
    assert pictures <= {"spectra.png", "secants.png", "constants.png", "drift.png"}
    assert not [path for path, data in files.items() if b"\x89PNG" in data and "figures/" not in path]
    assert verify_results(NAME, allow_withheld=True).problems == ()
    assert publish_results(runs[analysis], NAME).changed  # and on a second thought they are published
    assert at_root(hub) == contents(runs[analysis])


def test_withheld_rows_are_checked_as_far_as_they_go(hub, runs):
    publish_results(runs["folder"], NAME)
    folder, _ = download_results(NAME)
    copy = Path(shutil.copytree(folder, folder.parent / "copy", symlinks=False))
    try:
        record = json.loads((copy / "run.json").read_text())
        record["summary"]["median"]["psnr_db"] += 1
        (copy / "run.json").write_text(json.dumps(record))
        found = verify_results(copy, allow_withheld=True).problems
        assert "summary.median.psnr_db" in {p.column for p in found}
        publish_results(copy, "alice/more", i_have_the_right=True)  # there are none to publish
        assert record_of(hub, name="alice/more")["photos"] == "withheld"
    finally:
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("options", "photos", "license", "why"),
    [
        ({}, False, None, "the licence of 'photos' is not known"),
        ({"license": "cc-by-4.0"}, True, "cc-by-4.0", "free: photos: cc-by-4.0"),
        ({"i_have_the_right": True}, True, "other", "the publisher states to have the right"),
        ({"license": "cc-by-4.0", "withhold_photos": True}, False, None, "as asked for"),
    ],
)
def test_who_decides_on_photos_of_a_folder(options, photos, license, why, hub, runs):
    done = publish_results(runs["folder"], NAME, dry_run=True, **options)
    assert (done.photos, done.license) == (photos, license)
    assert why in done.why


@pytest.mark.parametrize(
    ("card", "facts", "options", "published"),
    [
        ("license: cc-by-4.0", {}, {}, True),
        ("license: [mit, cc0-1.0]", {}, {}, True),
        ("license: other", {}, {}, False),
        ("license: other", {}, {"license": "mit"}, False),
        ("license: cc-by-nc-4.0", {}, {}, False),
        ("license: cc-by-nc-4.0", {}, {"i_have_the_right": True}, True),
        ("license: cc-by-4.0", {"gated": True}, {}, False),
        ("license: cc-by-4.0", {"gated": True}, {"license": "mit"}, False),
        ("license: cc-by-4.0", {"gated": True}, {"i_have_the_right": True}, True),
        ("tags: [a]", {}, {}, False),
        ("tags: [a]", {}, {"license": "mit"}, True),
        ("license: cc-by-4.0", {"private": True}, {}, False),
    ],
)
def test_licence_of_a_dataset_of_the_hub(card, facts, options, published, hub):
    repo = hub.add("datasets", "bob/photos", {"README.md": f"---\n{card}\n---\n".encode()}, **facts)
    settings = {"data_id": "bob/photos:default:train", "data_revision": repo.at("main").sha}
    assert licences.photo_rights(settings, **options).published is published
    named = licences.photo_rights(settings | {"data_id": "me/ImageNet-1k:default:test"}, license="cc-by-4.0")
    assert not named.published


def test_licences_of_two_sources(hub, runs):
    settings = json.loads((runs["match"] / "run.json").read_text())["settings"]
    folder = {"data_id": "builtin + my + photos", "data_revision": f"{settings['data_revision']} + sha256:1"}
    assert "is not known" in licences.photo_rights(folder).why
    two = {"data_id": "builtin + mine", "data_revision": f"{settings['data_revision']} + sha256:1"}
    assert licences.photo_rights(two).why == "the licence of 'mine' is not known"
    assert licences.photo_rights(two, license="cc0-1.0").license == "cc0-1.0"
    assert licences.photo_rights(two, license="mit").license == "other"
    other = {"data_id": "builtin", "data_revision": "sha256:1"}  # a folder that is called so
    assert not licences.photo_rights(other).published


# --- back again ---


def test_load_with_floats_from_the_hub_and_from_a_folder(hub, runs):
    publish_results(runs["match"], NAME)
    publish_results(runs["seed"], NAME)
    rows = load_results(NAME, with_float=True)
    assert len(rows) == 4
    for row in rows:
        assert row["match_float"].dtype == torch.float32
        exact = torch.from_numpy(np.array(row["match"])).permute(2, 0, 1) / 255
        assert float((exact - row["match_float"]).abs().max()) < 0.2  # refined on the lattice, near the float match
        assert TinyEncoder()(row["match_float"][None]).shape == (1, 12)
    by_float = {(row["float_file"], row["pair_id"]) for row in rows}
    assert len(by_float) == 4  # two runs may have pairs of the same name
    local = load_results(runs["match"], with_float=True)
    assert torch.equal(local[0]["match_float"], rows[0]["match_float"])
    assert "match_float" not in load_results(runs["match"])[0]


def test_the_rows_of_one_run(hub, runs):
    """Two match runs differ in no column that tells them apart; the names and patterns of the card do."""
    done = {name: publish_results(runs[name], NAME) for name in ("match", "seed", "walk")}
    for name in ("match", "seed"):
        rows, local = load_results(NAME, run=done[name].run, with_float=True), load_results(runs[name])
        assert [row["seconds"] for row in rows] == [row["seconds"] for row in local]
        assert torch.equal(rows[0]["match_float"], load_results(runs[name], with_float=True)[0]["match_float"])
    assert len(load_results(NAME, "paths", run=done["walk"].run)) == 6
    (pattern,) = re.findall(r'data_files="(.*?)"', done["walk"].card)
    (named,) = re.findall(r'run="(.*?)"', done["walk"].card)
    own = next(one for one in done.values() if one.run == named)
    rows = datasets.load_dataset(NAME, data_files=pattern, split="train")
    assert [row["seconds"] for row in rows] == [row["seconds"] for row in load_results(NAME, run=own.run)]
    folder, _ = download_results(NAME)
    assert len(load_results(folder, run=done["seed"].run)) == 2
    for place in (NAME, folder):
        with pytest.raises(
            ValueError, match=rf"`run` must be .* got 'other'; .* {done['match'].run}, .*{done['walk'].run}"
        ):
            load_results(place, run="other")
    with pytest.raises(ValueError, match=r"it has paths"):
        load_results(NAME, run=done["walk"].run)
    with pytest.raises(ValueError, match=r"`run` must be the name of a run .* got 'match-x'; it holds match-"):
        load_results(runs["match"], run="match-x")


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((NAME, "nothing"), ValueError, r"`config` must be one of matches, spectra, lipschitz, paths; got 'nothing'"),
        ((NAME, "paths"), ValueError, r"must hold rows of 'paths'; it has matches"),
        (("./nowhere",), FileNotFoundError, r"'./nowhere' must be a run directory; it does not exist. .* USER/NAME"),
        (("alice/nothing",), errors.RepositoryNotFoundError, r"there is no such dataset or it is private"),
        (("alice/vit",), errors.RepositoryNotFoundError, r"'alice/vit' is a model of the Hub, not a dataset"),
        (("alice/app",), errors.RepositoryNotFoundError, r"'alice/app' is a Space of the Hub, not a dataset"),
        ((f"{NAME}@a", "matches", "b"), ValueError, r"`revision` must be given once; got 'a' and 'b'"),
        (("bob/gated",), errors.GatedRepoError, r"'bob/gated' is gated. Ask for access at"),
    ],
)
def test_what_cannot_be_loaded(arguments, kind, message, hub, runs):
    publish_results(runs["match"], NAME)
    hub.add("models", "alice/vit", {"config.json": b"{}"})
    hub.add("spaces", "alice/app", {"app.py": b""}, sdk="gradio")
    hub.add("datasets", "bob/gated", runs["match"], gated=True)
    with pytest.raises(kind, match=message):
        load_results(*arguments)


def test_private_results_need_their_token(hub, runs, monkeypatch):
    publish_results(runs["match"], NAME)
    with pytest.raises(errors.RepositoryNotFoundError, match=r"log in with `hf auth login`"):
        load_results(NAME, token="hf_bob")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(errors.RepositoryNotFoundError, match=r"log in with `hf auth login`"):
        download_results(NAME)
    assert len(load_results(NAME, token="hf_alice")) == 2


def test_a_dataset_without_a_run(hub):
    hub.add("datasets", "bob/photos", {"README.md": b"photos"})
    with pytest.raises(ValueError, match=r"holds no run of hf_equiv \(no run.json\)"):
        download_results("bob/photos")
    with pytest.raises(ValueError, match=r"must be the name of a dataset, USER/NAME; got 'photos'"):
        download_results("photos")


def test_stray_warnings_of_the_client_are_left_out(hub, runs, capsys, caplog):
    hub.add("datasets", "alice/empty", {"data.csv": b"a\n1\n"})
    hub.add("datasets", NAME, {"README.md": b"---\n---\nMine, without a header.\n"})
    for words in (("verify", "alice/empty"), ("report", "alice/empty"), ("publish", runs["match"], NAME, "--dry-run")):
        call(capsys, *words)
    with pytest.raises(ValueError, match="must hold rows of 'matches'"):
        load_results("alice/empty")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("huggingface_hub")] == []
    with hub_client.hushed():
        logging.getLogger("huggingface_hub.repocard").warning("another one")
    logging.getLogger("huggingface_hub.repocard").warning("Repo card metadata block was not found. Not of ours.")
    assert [record.getMessage()[:9] for record in caplog.records[-2:]] == ["another o", "Repo card"]


def test_what_is_not_all_in_the_cache(hub, runs, tmp_path):
    publish_results(runs["match"], NAME)
    load.load_results(NAME, cache_dir=str(tmp_path))  # fetches the rows alone
    with pytest.raises(errors.LocalEntryNotFoundError, match=r"not in the cache|not all in the cache"):
        download_results(NAME, cache_dir=str(tmp_path), local_files_only=True)


# --- the model by name, and real Xet transfers: in a process of their own ---


def _process(script: str, home: Path, endpoint: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script], env=surroundings(home, endpoint, **environment), capture_output=True,
        text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hf_alice" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_recorded_model_is_loaded_by_name_at_its_revision(tmp_path, monkeypatch, hub):
    with quiet():
        save("vit_head", tmp_path / "vit")
    first = hub.add("models", "acme/vit", tmp_path / "vit").at("main").sha
    monkeypatch.undo()  # the real loader
    encoder = Encoder.from_pretrained("acme/vit", device="cpu")
    run_analysis(make_plan(MatchConfig(model="acme/vit", max_evals=20), encoder), tmp_path / "out")
    assert publish_results(tmp_path / "out", "alice/named").run.startswith("match-acme--vit-")
    report = verify_results("alice/named")
    assert report.holds
    assert (report.runs[0].model, report.runs[0].revision) == ("acme/vit", first)
    weights = (tmp_path / "vit" / "model.safetensors").read_bytes()
    hub.add("models", "acme/vit", hub.files("models", "acme/vit") | {"model.safetensors": weights[:-4] + b"\0" * 4})
    report = verify_results("alice/named", cache_dir=str(tmp_path / "other"))  # main has moved; the recorded commit not
    assert report.holds
    repo = hub.repos["models", "acme/vit"]
    moved = repo.at("main").sha
    del repo.commits[first]
    (problem,) = verify_results("alice/named", cache_dir=str(tmp_path / "fresh")).problems
    assert problem.column == "model_revision"
    assert f"model 'acme/vit' has no revision '{first}': nothing was recomputed" in problem.message
    record = record_of(hub, name="alice/named")
    record["settings"]["model_revision"] = moved  # as if the rows were of the new weights
    files = hub.files("datasets", "alice/named") | {"run.json": json.dumps(record).encode()}
    hub.add("datasets", "alice/named", files)
    columns = {p.column for p in verify_results("alice/named").problems}
    assert "model_revision" in columns


XET = """
import json
from huggingface_hub import constants
from hf_equiv import download_results, load_results, publish_results

assert not constants.HF_HUB_DISABLE_XET
first = publish_results({run!r}, "alice/xet")
again = publish_results({run!r}, "alice/xet")
folder, commit = download_results("alice/xet")
rows = load_results("alice/xet", with_float=True)
print(json.dumps([first.commit, again.changed, commit, rows[0]["match"].size, list(rows[0]["match_float"].shape)]))
"""


def test_xet_transfers_are_one_commit_as_well(tmp_path, runs):
    import hf_xet  # noqa: F401 (without it the client would silently go by LFS)

    server = Hub().start()
    server.xet = tmp_path / "store"
    server.xet.mkdir()
    commit, changed, seen, size, shape = _process(
        XET.format(run=str(runs["match"])), tmp_path / "home", server.endpoint
    )  # fmt: skip
    assert not changed
    assert commit == seen == server.repos["datasets", "alice/xet"].at("main").sha
    assert (size, shape) == ([16, 16], [3, 16, 16])
    assert len(titles(server, "alice/xet")) == 2
    assert at_root(server, "alice/xet") == contents(runs["match"])
    assert any("xet-write-token" in path for _, path, *_ in server.log)
    assert not any(path.startswith("/_lfs/") for method, path, *_ in server.log if method == "PUT")


# --- two at once ---


def test_two_publishers_both_end_up_in_the_dataset(hub, runs):
    names, failed = ["match", "seed", "walk"], []

    def publish(name: str) -> None:
        try:
            publish_results(runs[name], NAME)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=publish, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(titles(hub)) == 4
    report = verify_results(NAME)
    assert report.problems == ()
    assert len(report.runs) == 3
    assert hub.files("datasets", NAME)["README.md"].decode().count("### ") == 3


# --- what must not happen ---


def test_a_folder_that_is_called_builtin_is_not_the_builtin_photos(hub, tmp_path, monkeypatch):
    for path in sorted(save_photos(tmp_path / "builtin").rglob("*.png"))[4:]:
        path.unlink()
    monkeypatch.chdir(tmp_path)
    plan = make_plan(MatchConfig(source="./builtin", target="builtin", max_evals=5), TinyEncoder())
    assert plan.settings["data_id"] == "builtin + builtin"
    assert not photo_rights(plan.settings).published
    plan = make_plan(MatchConfig(source="builtin", target="./builtin", max_evals=5), TinyEncoder())
    assert not photo_rights(plan.settings).published


def test_a_licence_that_is_not_known_to_be_free_is_refused(hub, runs):
    with pytest.raises(ValueError, match=r"`license` must be one that is known to be free; got 'cc-by-40'"):
        publish_results(runs["folder"], NAME, license="cc-by-40")
    assert ("datasets", NAME) not in hub.repos


def test_photos_that_are_there_are_not_removed_unasked(hub, runs):
    publish_results(runs["folder"], NAME, license="cc-by-4.0")
    before = hub.files("datasets", NAME)
    with pytest.raises(ValueError, match="they would be removed"):
        publish_results(runs["folder"], NAME)
    assert hub.files("datasets", NAME) == before
    done = publish_results(runs["folder"], NAME, withhold_photos=True)
    assert not done.photos
    assert "Earlier commits keep what they hold" in done.how_to_change
    assert "license" not in header(done.card)


def test_files_of_others_stay(hub, runs):
    publish_results(runs["match"], NAME)
    HfApi().upload_file(
        path_or_fileobj=b"mine", path_in_repo="figures/owner_plot.png", repo_id=NAME, repo_type="dataset"
    )
    done = publish_results(runs["match"], NAME)
    assert not done.deleted
    assert "figures/owner_plot.png" in hub.files("datasets", NAME)


def test_no_path_of_this_machine_is_published(hub, tmp_path):
    place = save_photos(tmp_path / "photos")
    for path in sorted(place.rglob("*.png"))[:2]:
        path.write_bytes(b"torn")
    plan = make_plan(MatchConfig(data=str(place), pairs=3, max_evals=5), TinyEncoder())
    run_analysis(plan, tmp_path / "run")
    publish_results(tmp_path / "run", NAME)
    assert record_of(hub)["errors"]
    assert all(str(tmp_path).encode() not in data for data in hub.files("datasets", NAME).values())


def test_photos_in_a_foreign_column_are_withheld_and_found(hub, runs, tmp_path):
    copy = Path(shutil.copytree(runs["folder"], tmp_path / "copy"))
    (file,) = (copy / "matches").glob("*.parquet")
    table = pq.read_table(file)
    pictures = pa.array([cell["bytes"] for cell in table["source"].to_pylist()])
    pq.write_table(table.append_column("leak", pictures), file)
    reseal(copy)
    publish_results(copy, NAME)
    (file,) = (download_results(NAME)[0] / "matches").glob("*.parquet")
    assert b"PNG" not in file.read_bytes()
    assert "leak" in {problem.column for problem in verify_results(copy).problems}


def test_an_end_mark_that_is_gone_is_asked_for(hub, runs):
    publish_results(runs["match"], NAME)
    card = hub.files("datasets", NAME)["README.md"].decode()
    broken = (card.replace(END, "") + "\nMy text.\n").encode()
    HfApi().upload_file(path_or_fileobj=broken, path_in_repo="README.md", repo_id=NAME, repo_type="dataset")
    with pytest.raises(ValueError, match="as many end marks as start marks"):
        publish_results(runs["seed"], NAME)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Model `tiny", "Model `google/vit-large"),
        ("; seed 0", "; seed 7"),
        ("recomputes the rows.", "recomputes the rows. Median PNG error: 1e-12."),
        ("\n## Load", "\n**Median PNG error: 1e-12 over 10,000 pairs.**\n\n## Load"),
    ],
)
def test_sentences_of_the_card_are_checked(old, new, hub, runs):
    publish_results(runs["match"], NAME)
    card = hub.files("datasets", NAME)["README.md"].decode()
    if old not in card:
        old = "Model `"
    changed = card.replace(old, new, 1).encode()
    assert changed != card.encode()
    HfApi().upload_file(path_or_fileobj=changed, path_in_repo="README.md", repo_id=NAME, repo_type="dataset")
    assert any(problem.file == "README.md" for problem in verify_results(NAME).problems)
