"""Publishing when something goes wrong: always whole or not at all; and every kind of tampering found by `verify`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import TinyEncoder, reseal
from hubcases import NAME, call, contents, record_of, titles, whole
from huggingface_hub import HfFileSystem, constants, errors
from safetensors.torch import save_file

from hf_equiv.hub import publish, repository
from hf_equiv.hub.load import download_results, load_results
from hf_equiv.hub.publish import publish_results
from hf_equiv.runs import shards
from hf_equiv.verify import directory
from hf_equiv.verify.dataset import verify_results

EVERYWHERE = [
    ("GET", "/api/datasets/"), ("GET", "/tree/"), ("GET", "/resolve/"), ("POST", "/preupload/"),
    ("POST", "objects/batch"), ("PUT", "/_lfs/"), ("POST", "/_lfs/.*/verify"), ("POST", "validate-yaml"),
    ("POST", "/commit/"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def waits(monkeypatch, tmp_path) -> list[float]:
    """Waiting takes no time, and is written down; nothing is in the cache."""
    asked: list[float] = []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    monkeypatch.setattr(time, "sleep", asked.append)
    HfFileSystem.clear_instance_cache()
    return asked


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("status", [0, 409, 412, 429, 500, 503])
def test_what_passes_everywhere(status, after, hub, runs):
    """One failure of each request of a publication, before or after the Hub has carried it out."""
    publish_results(runs["seed"], NAME)
    for method, path in EVERYWHERE:
        hub.fail(method, path, status, after=after)
    done = publish_results(runs["match"], NAME)
    assert done.changed
    assert not hub.faults
    whole(hub, runs, 3)


@pytest.mark.parametrize(("status", "after"), [(0, True), (0, False), (500, True), (503, False), (412, False)])
def test_what_does_not_pass_leaves_all_or_nothing(status, after, hub, runs):
    publish_results(runs["seed"], NAME)
    before = hub.files("datasets", NAME)
    hub.fail("POST", "/commit/", status, times=1000, after=after)
    if after:  # the second try finds that the first was carried out
        assert publish_results(runs["match"], NAME).changed
        hub.faults.clear()
        whole(hub, runs, 3)
        return
    with pytest.raises((errors.HfHubHTTPError, ConnectionError)) as caught:
        publish_results(runs["match"], NAME)
    assert "ry again" in str(caught.value)
    assert hub.files("datasets", NAME) == before
    hub.faults.clear()
    hub.log.clear()
    publish_results(runs["match"], NAME)
    whole(hub, runs, 3)
    assert not [path for method, path, *_ in hub.log if method == "PUT"]  # what was uploaded is not sent twice


@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "/_lfs/", "/tree/", "/api/datasets/alice"])
def test_a_network_that_is_lost_half_way(path, hub, runs, capsys):
    publish_results(runs["seed"], NAME)
    before = hub.files("datasets", NAME)
    for method in ("POST", "PUT", "GET", "HEAD"):
        hub.fail(method, path, 0, times=1000)
    code, out, err = call(capsys, "publish", runs["match"], NAME, "-q")
    assert (code, out) == (2, "")
    assert "was not published" in err
    assert "Traceback" not in err
    hub.faults.clear()
    assert hub.files("datasets", NAME) == before
    publish_results(runs["match"], NAME)
    whole(hub, runs, 3)


def test_a_rate_limit_is_waited_for(hub, runs, waits):
    publish_results(runs["seed"], NAME)
    hub.fail("POST", "/commit/", 429, headers={"RateLimit": '"api";r=0;t=37', "RateLimit-Policy": '"fixed window"'})
    publish_results(runs["match"], NAME)
    assert 38 in waits
    hub.fail("POST", "/commit/", 429, headers={"RateLimit": '"api";r=0;t=99999'})
    publish_results(runs["walk"], NAME)
    assert max(waits) == 310
    assert verify_results(NAME).holds


def test_the_answer_to_a_pull_request_is_lost(hub, runs):
    publish_results(runs["seed"], "bob/results", private=False, token="hf_bob")
    hub.fail("POST", "/commit/", 0, after=True)
    done = publish_results(runs["match"], "bob/results", create_pr=True)
    assert done.pr_url.endswith("/discussions/1")
    assert len(hub.repos["datasets", "bob/results"].discussions) == 1


def test_somebody_else_commits_in_between(hub, runs, monkeypatch):
    publish_results(runs["seed"], NAME)
    send, others = repository.send, ["walk", "spectrum"]

    def late(*arguments, **options):
        if others:  # each time this one is ready, another has just been faster
            other = others.pop()
            monkeypatch.setattr(publish, "send", send)
            publish_results(runs[other], NAME)
            monkeypatch.setattr(publish, "send", late)
        return send(*arguments, **options)

    monkeypatch.setattr(publish, "send", late)
    publish_results(runs["match"], NAME)
    report = verify_results(NAME)
    assert report.problems == ()
    assert len(report.runs) == 4
    assert len(titles(hub)) == 5


def test_a_run_that_changes_while_it_is_published(hub, runs, tmp_path, monkeypatch):
    out = Path(shutil.copytree(runs["match"], tmp_path / "out"))
    send = repository.send

    def late(*arguments, **options):
        (out / "figures" / "pairs.png").write_bytes(b"another")
        return send(*arguments, **options)

    monkeypatch.setattr(publish, "send", late)
    with pytest.raises(ValueError, match=r"figures/pairs.png changed while it was published"):
        publish_results(out, NAME)
    assert titles(hub) == ["initial commit"]


def test_the_owners_gitignore_leaves_nothing_out(hub, runs):
    hub.add("datasets", NAME, {".gitignore": b"*.png\nfloat/\n"})
    publish_results(runs["match"], NAME)
    assert set(contents(runs["match"])) <= set(hub.files("datasets", NAME))


# --- who may, and what may be published ---


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("", NAME, "there is none. Log in with `hf auth login`"),
        ("hf_nobody", NAME, "the Hub does not accept the token. Log in again with `hf auth login`"),
        ("hf_alice_reads", NAME, "the token can only read. Make a write token at"),
        ("hf_bob", "acme/results", "your role in 'acme' is 'read'"),
        ("hf_bob", "alice/open", "'alice' is neither you nor an organisation of yours. Publish as 'bob/NAME'. To "
         "propose the results to the owner of a dataset that exists, pass --create-pr"),
        ("hf_bob", "alice/new", "'alice' is neither you nor an organisation of yours"),
        ("hf_alice", "bob/gated", "bob/gated"),
        ("hf_alice", "alice/foreign", "must be empty or hold runs of hf_equiv; it holds data/train.parquet"),
        ("hf_alice", "spaces/alice/app", "got 'spaces/alice/app'. That is a space: results are published as datasets"),
        ("hf_alice", "alice", "must be the name of a dataset, USER/NAME; got 'alice'"),
        ("hf_alice", "alice/a b", "Use letters, digits"),
    ],
)  # fmt: skip
def test_refusals_name_the_cure(token, name, message, hub, runs, capsys, monkeypatch):
    hub.add("datasets", "alice/open", {"README.md": b""})
    hub.add("datasets", "bob/gated", {"README.md": b""}, gated=True)
    hub.add("datasets", "alice/foreign", {"data/train.parquet": b"1"})
    before = {key: repo.at("main").sha for key, repo in hub.repos.items()}
    monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = call(capsys, "publish", runs["match"], name)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not token or token not in err
    assert {key: repo.at("main").sha for key, repo in hub.repos.items()} == before


@pytest.mark.parametrize(
    ("token", "name", "flags", "message"),
    [
        ("", NAME, (), "publishing needs a token of the Hub and there is none. Log in with"),
        ("hf_alice_reads", NAME, (), "the token can only read. Make a write token at"),
        ("hf_bob", "acme/results", (), "your role in 'acme' is 'read'"),
        ("hf_bob", "alice/open", (), "'alice' is neither you nor an organisation of yours. Publish as 'bob/NAME'"),
        ("hf_bob", "alice/new", ("--create-pr",), "'alice' is neither you nor an organisation of yours"),
        ("hf_bob", "alice/open", ("--create-pr",), None),
        ("hf_alice", "acme/results", (), None),
        ("hf_alice", NAME, (), None),
    ],
)
def test_a_dry_run_says_what_would_be_refused(token, name, flags, message, hub, runs, capsys, monkeypatch):
    """The publication itself goes the way that was foretold."""
    hub.add("datasets", "alice/open", {"README.md": b""})
    monkeypatch.setenv("HF_TOKEN", token)
    code, out, _ = call(capsys, "publish", runs["match"], name, *flags, "--dry-run")
    assert code == 0
    assert ("refused:" in out) is (message is not None)
    assert message is None or message in out
    code, out, _ = call(capsys, "publish", runs["match"], name, *flags, "--dry-run", "--json")
    assert code == 0
    refused = json.loads(out)["refused"]
    assert refused is None if message is None else message in refused
    assert call(capsys, "publish", runs["match"], name, *flags)[0] == (0 if message is None else 2)


def test_a_model_of_the_same_name_is_in_nobodys_way(hub, runs):
    hub.add("models", NAME, {"config.json": b"{}"})
    hub.add("spaces", NAME, {"app.py": b""}, sdk="gradio")
    publish_results(runs["match"], NAME)
    assert len(load_results(NAME)) == 2
    assert set(hub.files("models", NAME)) == {"config.json"}


def test_a_hub_that_is_switched_off(hub, runs, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = call(capsys, "publish", runs["match"], NAME)
    assert code == 2
    assert "was not published: HF_HUB_OFFLINE=1 is set. Unset it" in err
    code, _, err = call(capsys, "verify", NAME)
    assert code == 2
    assert "HF_HUB_OFFLINE=1 is set" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(complete=False), "must be a finished run; rows are missing. Run the same match command"),
        (lambda r: r.update(schema_version=99), "schema_version 99; this version of hf_equiv knows up to 1. Upgrade"),
        (lambda r: r.update(analysis="dance"), "a run of 'dance', which this version of hf_equiv does not know"),
        (lambda r: r["files"].pop("README.md"), "README.md is not listed"),
        (lambda r: r["files"].update({"figures/pairs.png": "0" * 64}), "figures/pairs.png has changed. `hf-equiv"),
        (lambda r: r["files"].update({"../secret": "0" * 64}), "../secret is outside the run directory"),
        (lambda r: r["files"].update({"figures/none.png": "0" * 64}), "figures/none.png is missing"),
    ],
)
def test_runs_that_are_not_published(change, message, hub, runs, tmp_path, capsys):
    out = Path(shutil.copytree(runs["match"], tmp_path / "out"))
    record = json.loads((out / "run.json").read_text())
    change(record)
    (out / "run.json").write_text(json.dumps(record))
    code, _, err = call(capsys, "publish", out, NAME)
    assert code == 2
    assert message in err
    assert not hub.repos


def test_a_dataset_of_a_newer_version_is_left_alone(hub, runs):
    publish_results(runs["seed"], NAME)
    newer = record_of(hub) | {"schema_version": 99}
    hub.add("datasets", NAME, hub.files("datasets", NAME) | {"run.json": json.dumps(newer).encode()})
    with pytest.raises(ValueError, match=r"holds a run of a newer hf_equiv .* Upgrade hf_equiv, or publish to a new"):
        publish_results(runs["match"], NAME)
    for damaged in (b"{", b" " * 100_000_001):
        hub.add("datasets", NAME, hub.files("datasets", NAME) | {"run.json": damaged})
        with pytest.raises(ValueError, match=r"run.json of 'alice/results' is damaged"):
            publish_results(runs["match"], NAME)


def test_a_run_of_more_pairs_than_any(hub, runs):
    publish_results(runs["seed"], NAME)
    record = record_of(hub)
    record["summary"]["pairs"] = 10**18
    hub.add("datasets", NAME, hub.files("datasets", NAME) | {"run.json": json.dumps(record).encode()})
    assert publish_results(runs["match"], NAME).changed


# --- tampering ---


def cells(folder: Path, column: str, change: Callable[[list], list]) -> None:
    path = sorted((folder / "matches").glob("*.parquet"))[0]
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    made = pa.array(change(table.column(column).to_pylist()), table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), made), path)


def pixel(cell: dict) -> dict:
    from hf_equiv.data.image_file import decode_png, encode_png

    image = decode_png(cell["bytes"])
    image[1, 3, 4] = (image[1, 3, 4] + 16 / 255) % 1
    return {"bytes": encode_png(image), "path": None}


def column(name: str, change: Callable) -> Callable[[Path], None]:
    return lambda folder: cells(folder, name, lambda values: [change(v) for v in values])


def record(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / "run.json").read_text())
        change(data)
        (folder / "run.json").write_text(json.dumps(data))

    return edit


def text(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        card = folder / "README.md"
        before = card.read_text()
        assert old in before
        card.write_text(before.replace(old, new, 1))

    return edit


def floats(folder: Path) -> None:
    path = sorted((folder / "float").glob("*.safetensors"))[0]
    tensors, costs = shards.read_floats(path)
    moved = {name: (image + 0.01).clamp(0, 1) for name, image in tensors.items()}
    save_file(moved, path, metadata={"num_evals": json.dumps(costs)})


def remove_rows(folder: Path) -> None:
    (file,) = (folder / "matches").glob("*.parquet")
    pq.write_table(pq.read_table(file).slice(1), file)


def double_rows(folder: Path) -> None:
    first = sorted((folder / "matches").glob("*.parquet"))[0]
    shutil.copy(first, first.with_name("part-00009.parquet"))


def swap(folder: Path) -> None:
    a, b = folder / "matches" / "part-00000.parquet", folder / "float" / "part-00000.safetensors"
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)


def figure(folder: Path) -> None:
    (folder / "figures" / "pairs.png").write_bytes(b"another picture")


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "pixel of the source": (column("source", pixel), "psnr_db"),
    "pixel of the match": (column("match", pixel), "psnr_db"),
    "pixel of the target": (column("target", pixel), "embedding_error"),
    "match removed": (column("match", lambda _: None), "match"),
    "float match": (floats, "embedding_error"),
    "embedding error": (column("embedding_error", lambda v: v / 2 + 1e-3), "embedding_error"),
    "error of the PNG": (column("embedding_error_8bit", lambda v: v + 1e-3), "embedding_error_8bit"),
    "PSNR": (column("psnr_db", lambda v: v + 0.1), "psnr_db"),
    "cosine": (column("cosine_to_target", lambda v: v - 1e-3), "cosine_to_target"),
    "probability": (column("match_prob", lambda v: v / 2), "match_prob"),
    "evaluations": (column("num_evals", lambda v: v - 1), "num_evals"),
    "not a number": (column("l2", lambda _: float("nan")), "l2"),
    "label": (column("match_label", lambda v: "boat" if v != "boat" else "dune"), "match_label"),
    "same label": (column("same_top1", lambda v: not v), "same_top1"),
    "class": (column("source_class", lambda _: "zebra"), "source_class"),
    "row id": (column("pair_id", lambda v: v + "!"), "pair_id"),
    "status": (column("status", lambda v: "stalled" if v == "converged" else "converged"), "status"),
    "model in the row": (column("model_id", lambda _: "somebody/else"), "model_id"),
    "revision in the row": (column("model_revision", lambda _: "sha256:" + "1" * 64), "model_revision"),
    "data in the row": (column("data_revision", lambda _: "sha256:" + "1" * 64), "data_revision"),
    "seed in the row": (column("seed", lambda v: v + 1), "seed"),
    "schema of the row": (column("schema_version", lambda _: 99), "schema_version"),
    "row removed": (remove_rows, "pair_id"),
    "row doubled": (double_rows, "pair_id"),
    "files swapped": (swap, "sha256"),
    "figure": (figure, "sha256"),
    "revision in run.json": (
        record(lambda r: r["settings"].update(model_revision="sha256:" + "1" * 64)),
        "model_revision",
    ),
    "tolerance in run.json": (record(lambda r: r["settings"].update(rtol=1.0)), "rtol"),
    "pair unlisted": (record(lambda r: r["pairs"].pop()), "pair_id"),
    "verdict": (record(lambda r: r["summary"].update(verdict="All is well.")), "summary.verdict"),
    "median": (record(lambda r: r["summary"]["median"].update(psnr_db=99.0)), "summary.median.psnr_db"),
    "unfinished": (record(lambda r: r.update(complete=False)), "complete"),
    "said to be withheld": (record(lambda r: r.update(photos="withheld")), "photos"),
    "number in the card": (text("| pairs | 2 |", "| pairs | 200 |"), "pairs"),
    "another number in the card": (text("| pairs | 2 |", "| pairs | 2 |\n| prizes | 3 |"), "prizes"),
    "configuration in the card": (text("matches/*.parquet", "other/*.parquet"), "configs.matches"),
    "another configuration": (text("configs:", "configs:\n- config_name: more\n  data_files: a.csv"), "configs.more"),
    "configuration twice": (text("configs:", "configs:\n- config_name: matches\n  data_files: a"), "configs.matches"),
    "dataset_info in the card": (text("configs:", "dataset_info: {}\nconfigs:"), "dataset_info"),
    "rows of another dataset": (
        text(f'rows = load_dataset("{NAME}"', 'rows = load_dataset("mallory/results"'),
        'rows = load_dataset("mallory/results", "matches", split="train")',
    ),
}


# Files that change places with their hashes are the same run; a figure follows from rows, which are checked.
BY_HASH = ("files swapped", "figure")
CASES = [(what, careful) for what in TAMPERING for careful in (False, True) if not (careful and what in BY_HASH)]


@pytest.fixture(scope="module")
def published(loopback, runs, tmp_path_factory) -> Path:
    """A published dataset on disk, not to be changed."""
    loopback.reset()
    publish_results(runs["match"], NAME)
    folder, _ = download_results(NAME, cache_dir=tmp_path_factory.mktemp("cache"))
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("published") / "copy"))


@pytest.mark.parametrize(("what", "careful"), CASES, ids=[f"{w}{', resealed' if c else ''}" for w, c in CASES])
def test_tampering_is_found(what, careful, published, hub, tmp_path):
    """Of a published dataset; a careful forger brings the hashes up to date."""
    tamper, wanted = TAMPERING[what]
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    tamper(copy)
    if careful:
        reseal(copy, more=[path.relative_to(copy).as_posix() for path in (copy / "matches").glob("*")])
    hub.add("datasets", NAME, copy)
    report = verify_results(NAME)
    assert not report.holds
    found = {problem.column for problem in report.problems}
    if what == "tolerance in run.json":
        assert found & {wanted, "status"}
    elif not careful and wanted not in found:  # the file's hash was enough
        assert "sha256" in found
    else:
        assert wanted in found, found
    assert all(np.all([problem.message, problem.file]) for problem in report.problems)
    json.dumps(report.to_json(), allow_nan=False)


def test_tampering_with_a_run_that_was_added(hub, runs, tmp_path):
    publish_results(runs["seed"], NAME)
    place = publish_results(runs["match"], NAME).place
    copy = Path(shutil.copytree(download_results(NAME)[0], tmp_path / "copy"))
    cells(copy / place, "psnr_db", lambda values: [v + 1 for v in values])
    reseal(copy / place)
    (copy / place / "more.csv").write_text("1")
    hub.add("datasets", NAME, copy)
    report = verify_results(NAME)
    assert [p.file for p in report.card_problems] == [f"{place}/more.csv"]  # it is not downloaded
    problems = [p for p in report.problems if p.column == "psnr_db"]
    assert [p.file for p in problems] == [f"{place}/matches/part-00000.parquet"] * 2
    assert all(p.message.startswith(p.file) for p in problems)
    (copy / place).rename(copy / "runs" / "match-other-00000000")
    (copy / "runs" / "empty").mkdir()
    (copy / "runs" / "empty" / "notes.txt").write_text("")
    found = {(p.file, p.column) for p in verify_results(copy).problems}
    assert ("runs/match-other-00000000/run.json", "settings") in found
    assert ("runs/empty", "file") in found
