"""The Space: its files, deploying it to the loopback Hub through the real clients, and serving it here."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import types
import urllib.request
import warnings
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from hubcases import call
from huggingface_hub import constants, errors

from hf_equiv.cli import space as space_command
from hf_equiv.hub import space, space_files
from hf_equiv.hub.space import SpaceError, deploy_space
from hf_equiv.hub.space_files import DATASET, MODELS, REQUIREMENTS, App, app_of
from hf_equiv.runs.directory import CARD

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces_app"
NAME = "alice/app"
TEMPLATE = (SPACE / CARD).read_bytes()
SMALL = App(
    {"app.py": b"new", REQUIREMENTS: b"hf-equiv==9.9\n", "a.png": b"\x89A", "b.png": b"\x89B", "c.png": b"\x89C",
     CARD: TEMPLATE},
    "hf-equiv==9.9",
)  # fmt: skip
GIVEN = {"dataset": "alice/results", "models": ["alice/vit"]}
OTHERS_APP = {"app.py": b"theirs", CARD: b"---\nsdk: gradio\ntitle: Theirs\n---\nTheir words.\n"}


@pytest.fixture(autouse=True)
def waits(monkeypatch, tmp_path) -> list[float]:
    """Waiting takes no time, and is written down; nothing is in the cache; the app is small."""
    asked: list[float] = []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", asked.append)
    monkeypatch.setattr(space, "app_of", lambda wheel: SMALL if wheel is None else app_of(wheel))
    return asked


@pytest.fixture
def hub(hub):
    hub.add("datasets", "alice/results", {"README.md": b""})
    hub.add("models", "alice/vit", {"config.json": b"{}"})
    return hub


def files(hub, name=NAME) -> dict[str, bytes]:
    return hub.files("spaces", name)


def header(hub, name=NAME) -> dict[str, object]:
    text = files(hub, name)[CARD].decode()
    return yaml.safe_load(text.split("---")[1])


def commits(hub, name=NAME) -> int:
    return len(hub.repos["spaces", name].commits) - 1  # without the one that made the Space


def written(hub) -> list[tuple[str, str]]:
    """Requests since the log was cleared that may have changed something."""
    harmless = ("preupload", "objects/batch", "validate-yaml", "paths-info")
    return [(m, p) for m, p, *_ in hub.log if m not in ("GET", "HEAD") and not p.endswith(harmless)
            and "/preupload/" not in p]  # fmt: skip


# --- the files ---


def test_the_header_is_complete_and_fits_the_project():
    facts = yaml.safe_load(TEMPLATE.decode().split("---")[1])
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert (facts["sdk"], facts["sdk_version"], facts["app_file"]) == ("gradio", constraints["gradio"], "app.py")
    assert facts["python_version"] == "3.11"  # a string: as a number 3.10 would become 3.1
    assert facts["license"] == "apache-2.0"
    assert facts["suggested_hardware"] == "cpu-basic"
    assert len(facts["short_description"]) <= 60
    assert facts["pinned"] is False
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {facts["colorFrom"], facts["colorTo"]} <= colours
    assert len(facts["emoji"]) == 1
    assert "hf_equiv" in facts["tags"]
    body = TEMPLATE.decode()
    assert all(name in body for name in (DATASET, MODELS, "HF_EQUIV_MAX_EVALS", "HF_EQUIV_TIME_LIMIT"))


def test_requirements_are_pinned_to_what_the_tests_run_on():
    exact = r"^([\w.-]+)==(\S+)$"
    library, space = (ROOT / "constraints.txt").read_text().split("# space")
    constraints = dict(re.findall(exact, space, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (SPACE / REQUIREMENTS).read_text()
    pins = dict(re.findall(exact, text, re.MULTILINE))
    assert pins.pop("hf-equiv") == project["version"]
    assert pins == dict(re.findall(exact, library, re.MULTILINE))
    needed = {re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"]}
    assert needed <= {name.lower() for name in pins}
    assert "://" not in text
    assert re.search(r"^spaces$", text, re.MULTILINE)
    bound = next(line for line in project["optional-dependencies"]["space"] if line.startswith("gradio"))
    assert tuple(map(int, constraints["gradio"].split("."))) >= tuple(map(int, bound.split(">=")[1].split(".")))


def test_the_library_is_brought_along_and_works_beside_the_app(tmp_path):
    """Laid out as in a Space: the app imports what lies beside it, which knows its version."""
    app = app_of(None)
    assert app.library.endswith("brought along as installed here")
    lines = app.files[REQUIREMENTS].decode().splitlines()
    assert not [line for line in lines if line.startswith("hf-equiv")]
    assert {"torch==2.13.0", "safetensors==0.8.0", "spaces", "pillow==12.3.0"} <= set(lines)
    assert [line for line in lines if line and line[0] != "#" and "==" not in line] == ["spaces"]
    assert app.files["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert not [line for line in lines if "extra" in line or line.startswith(("gradio", "pytest"))]
    assert not [name for name in app.files if name.startswith("hf_equiv/spaces_app/") or "__pycache__" in name]
    for name, data in app.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    script = (
        "import sys; sys.path.insert(0, '.'); import hf_equiv; print(hf_equiv.__file__); print(hf_equiv.__version__);"
        "from importlib.metadata import version; print(version('hf-equiv'));"
        "print(len(hf_equiv.load_images('builtin')))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    where, own, known, photos = told.stdout.splitlines()
    assert Path(tmp_path / where).is_relative_to(tmp_path)
    assert own == known == metadata.version("hf-equiv")
    assert photos == "4"


def test_a_version_from_an_index_is_pinned(monkeypatch):
    installed = types.SimpleNamespace(version="1.2.3", read_text=lambda name: None)
    monkeypatch.setattr(space_files.metadata, "distribution", lambda name: installed)
    app = app_of(None)
    assert app.library == "hf-equiv==1.2.3"
    assert "hf-equiv==1.2.3" in app.files[REQUIREMENTS].decode().splitlines()
    assert not [name for name in app.files if name.startswith("hf_equiv")]


def test_a_wheel_is_brought_along(tmp_path):
    wheel = tmp_path / "hf_equiv-4.5-py3-none-any.whl"
    facts = (
        "Metadata-Version: 2.4\nName: hf-equiv\nVersion: 4.5\nRequires-Dist: torch>=2.9\nRequires-Dist: rich>=13.0\n"
    )
    facts += 'Requires-Dist: gradio>=6.29.1; extra == "space"\n\nlong text\nRequires-Dist: none\n'
    held = {"hf_equiv/a.py": "a", "hf_equiv-4.5.dist-info/METADATA": facts, "hf_equiv-4.5.dist-info/RECORD": ""}
    inside = {"app.py": "app", REQUIREMENTS: "hf-equiv==4.5\ntorch==2.13.0\n", CARD: TEMPLATE.decode()}

    def write(parts):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in parts.items():
                archive.writestr(name, text)

    write(held | {f"hf_equiv/spaces_app/{name}": text for name, text in inside.items()})
    app = app_of(wheel)
    assert set(app.files) == {*inside, "hf_equiv/a.py", "hf_equiv-4.5.dist-info/METADATA"}
    assert app.files[REQUIREMENTS] == b"rich>=13.0\ntorch==2.13.0\n"
    assert app.library == f"hf-equiv 4.5, brought along from {wheel.name}"
    write(held)
    with pytest.raises(ValueError, match="`wheel` must hold the app of the Space"):
        app_of(wheel)
    write({"other-1.dist-info/METADATA": "Name: other\n\n"})
    with pytest.raises(ValueError, match="`wheel` must be a wheel of hf-equiv"):
        app_of(wheel)
    wheel.write_bytes(b"none")
    with pytest.raises(ValueError, match="`wheel` must be a wheel file"):
        app_of(wheel)


# --- deploying ---


def test_a_new_space(hub):
    done = deploy_space(NAME, **GIVEN, token="hf_alice")
    repo = hub.repos["spaces", NAME]
    assert (done.made, done.changed, done.private, done.stage) == (True, True, True, "RUNNING")
    assert done.commit == repo.at("main").sha
    assert done.url == f"{hub.endpoint}/spaces/{NAME}"
    assert commits(hub) == 1
    assert repo.private
    assert repo.sdk == "gradio"
    assert repo.variables == done.variables == {DATASET: "alice/results", MODELS: "alice/vit"}
    assert repo.secrets == {}
    assert {name: data for name, data in files(hub).items() if name not in (CARD, ".gitattributes")} == {
        name: data for name, data in SMALL.files.items() if name != CARD
    }
    facts = header(hub)
    assert (facts["datasets"], facts["models"]) == (["alice/results"], ["alice/vit"])
    assert facts["tags"][0] == "hf_equiv"
    assert done.warnings == ()
    assert not [data for data in files(hub).values() if b"hf_alice" in data]


def test_with_the_real_app(hub, monkeypatch):
    monkeypatch.setattr(space, "app_of", app_of)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of data files in a Space: the app comes with results
        done = deploy_space(NAME, private=False)
    there = files(hub)
    assert done.files == len(done.uploaded) == len(there) - 1  # .gitattributes
    assert (
        there["hf_equiv/assets/builtin/model.safetensors"]
        == (ROOT / "hf_equiv" / "assets" / "builtin" / "model.safetensors").read_bytes()
    )
    assert there["app.py"] == (SPACE / "app.py").read_bytes()
    assert commits(hub) == 1
    assert not hub.repos["spaces", NAME].private
    monkeypatch.setattr(space, "app_of", lambda wheel: SMALL)  # pinned now: the copy of the library goes
    again = deploy_space(NAME)
    assert not [name for name in files(hub) if name.startswith("hf_equiv")]
    assert len(again.deleted) > 50
    assert commits(hub) == 2


def test_nothing_has_changed(hub):
    deploy_space(NAME, **GIVEN)
    hub.log.clear()
    done = deploy_space(NAME, **GIVEN)
    assert (done.made, done.changed, done.uploaded, done.stage) == (False, False, (), "RUNNING")
    assert done.commit == hub.repos["spaces", NAME].at("main").sha
    assert written(hub) == []


def test_what_the_owner_did_stays(hub):
    deploy_space(NAME, **GIVEN)
    repo = hub.repos["spaces", NAME]
    there = files(hub)
    text = there[CARD].decode().replace("title: Looks like one thing, seen as another", "title: Mine\nhf_oauth: true")
    text = text.replace("sdk_version: 6.31.0", "sdk_version: 5.0.0").replace("\n- hf_equiv\n", "\n- hf_equiv\n- mine\n")
    text = text.replace("datasets:\n- alice/results", "datasets:\n- alice/results\n- else/where") + "\nMy words.\n"
    hub.add("spaces", NAME, there | {CARD: text.encode(), "app.py": b"old", "notes/mine.txt": b"mine"})
    repo.variables["OTHER"] = "1"
    hub.add("datasets", "alice/newer", {"README.md": b""})
    done = deploy_space(NAME, dataset="alice/newer")
    facts, now = header(hub), files(hub)
    assert (facts["title"], facts["hf_oauth"], facts["sdk_version"]) == ("Mine", True, "6.31.0")
    assert facts["tags"][-1] == "mine"
    assert facts["datasets"] == ["alice/newer", "else/where"]
    assert facts["models"] == ["alice/vit"]
    assert now[CARD].decode().endswith("My words.\n")
    assert now[CARD].decode().count("# Looks like one thing, seen as another") == 1
    assert (now["app.py"], now["notes/mine.txt"]) == (b"new", b"mine")
    assert repo.variables == {DATASET: "alice/newer", MODELS: "alice/vit", "OTHER": "1"}
    assert {path for path, _ in done.uploaded} == {"app.py", CARD}
    deploy_space(NAME, dataset="", models=["builtin"])
    assert repo.variables == {"OTHER": "1"}
    assert header(hub)["datasets"] == ["else/where"]
    assert "models" not in header(hub)


def test_a_revision_is_kept(hub):
    sha = hub.repos["datasets", "alice/results"].at("main").sha
    deploy_space(NAME, dataset=f"alice/results@{sha}", models=["builtin", "alice/vit", "alice/vit"])
    assert hub.repos["spaces", NAME].variables == {DATASET: f"alice/results@{sha}", MODELS: "alice/vit"}
    assert header(hub)["datasets"] == ["alice/results"]


def test_visibility(hub):
    repo = None
    for private, seen in ((False, False), (None, False), (True, True), (None, True), (False, False)):
        done = deploy_space(NAME, private=private)
        repo = hub.repos["spaces", NAME]
        assert (done.private, repo.private) == (seen, seen)
    assert commits(hub) == 1


def test_hardware(hub):
    hub.pays = True
    assert deploy_space(NAME, hardware="t4-small").hardware == "t4-small"
    assert hub.repos["spaces", NAME].hardware == "t4-small"
    hub.log.clear()
    assert not deploy_space(NAME, hardware="t4-small").changed
    assert written(hub) == []
    assert deploy_space(NAME, hardware="cpu-basic").changed
    assert hub.repos["spaces", NAME].hardware == "cpu-basic"


def test_what_the_space_cannot_read(hub):
    hub.add("datasets", "alice/secret", {"README.md": b""}, private=True)
    hub.add("models", "bob/gated", {"config.json": b""}, gated=True)
    done = deploy_space(NAME, dataset="alice/secret", models=["bob/gated"], private=False)
    assert len(done.warnings) == 2
    assert "'alice/secret' is private: the Space cannot read it without a token" in done.warnings[0]
    assert f"secret HF_TOKEN at {done.url}/settings" in done.warnings[0]
    assert "'bob/gated' is gated" in done.warnings[1]
    assert hub.repos["spaces", NAME].secrets == {}


# --- when something goes wrong ---

EVERYWHERE = [
    ("GET", "/api/datasets/"), ("GET", "/api/models/"), ("GET", "/api/spaces/alice/app$"), ("GET", "/tree/"),
    ("GET", "/resolve/"), ("GET", "/variables"), ("POST", "/preupload/"), ("POST", "objects/batch"), ("PUT", "/_lfs/"),
    ("POST", "/_lfs/.*/verify"), ("POST", "validate-yaml"), ("POST", "/commit/"), ("POST", "/variables"),
    ("POST", "/hardware"), ("PUT", "/settings"), ("GET", "/runtime"),
]  # fmt: skip
ON_CREATION = {"/api/spaces/alice/app$", "/variables", "/hardware", "/settings"}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("status", [0, 409, 412, 429, 500, 503])
def test_what_passes_everywhere(status, after, hub):
    """One failure of each request of an update, before or after the Hub has carried it out."""
    hub.pays = True
    hub.add("spaces", NAME, OTHERS_APP | {"mine.txt": b"mine"}, sdk="gradio")
    for method, path in EVERYWHERE:
        hub.fail(method, path, status, after=after)
    done = deploy_space(NAME, **GIVEN, private=True, hardware="t4-small", force=True)
    repo = hub.repos["spaces", NAME]
    assert not hub.faults
    assert (done.changed, done.stage, done.commit) == (True, "RUNNING", repo.at("main").sha)
    assert commits(hub) == 1
    assert (repo.private, repo.hardware) == (True, "t4-small")
    assert repo.variables == {DATASET: "alice/results", MODELS: "alice/vit"}
    assert files(hub)["app.py"] == b"new"
    assert files(hub)["mine.txt"] == b"mine"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("status", [0, 412, 429, 500, 503])  # 409 says that the Space is there, and is believed
def test_what_passes_when_a_space_is_made(status, after, hub):
    for method, path in (("POST", "/repos/create"), *EVERYWHERE):
        if path not in ON_CREATION and path != "/resolve/":
            hub.fail(method, path, status, after=after)
    done = deploy_space(NAME, **GIVEN)
    assert not hub.faults
    assert (done.made, done.stage) == (True, "RUNNING")
    assert commits(hub) == 1
    assert hub.repos["spaces", NAME].variables == done.variables
    assert hub.repos["spaces", NAME].private


@pytest.mark.parametrize(("status", "after"), [(0, True), (0, False), (500, True), (503, False), (412, False)])
def test_what_does_not_pass_leaves_all_or_nothing(status, after, hub):
    deploy_space(NAME, **GIVEN)
    hub.add("spaces", NAME, files(hub) | {"app.py": b"old"})
    before = files(hub)
    hub.fail("POST", "/commit/", status, times=1000, after=after)
    if after:  # the second try finds that the first was carried out
        assert deploy_space(NAME).changed
        assert files(hub)["app.py"] == b"new"
        return
    with pytest.raises((errors.HfHubHTTPError, ConnectionError)) as caught:
        deploy_space(NAME)
    assert "ry again" in str(caught.value)
    assert files(hub) == before
    hub.faults.clear()
    assert deploy_space(NAME).changed
    assert files(hub)["app.py"] == b"new"


def test_the_network_is_lost(hub, capsys):
    deploy_space(NAME)
    hub.add("spaces", NAME, files(hub) | {"app.py": b"old"})
    for method in ("GET", "POST", "PUT", "HEAD"):
        hub.fail(method, "/", 0, times=1000)
    code, out, err = call(capsys, "space", "deploy", NAME)
    assert (code, out) == (2, "")
    assert f"error: '{NAME}' was not deployed: {hub.endpoint} cannot be reached. Check the network" in err
    hub.faults.clear()
    assert files(hub)["app.py"] == b"old"
    hub.fail("GET", "/runtime", 0, times=1000)
    code, out, err = call(capsys, "space", "deploy", NAME)
    assert code == 1
    assert "is deployed, but whether it runs could not be asked (the connection was cut)" in err
    assert files(hub)["app.py"] == b"new"


def test_somebody_else_commits_in_between(hub, monkeypatch):
    deploy_space(NAME)
    hub.add("spaces", NAME, files(hub) | {"app.py": b"old"})
    from hf_equiv.hub import repository, space

    send, others = repository.send, [b"1", b"2"]

    def late(*arguments, **options):
        if others:
            hub.add("spaces", NAME, files(hub) | {"other.txt": others.pop()})
        return send(*arguments, **options)

    monkeypatch.setattr(space, "send", late)
    deploy_space(NAME)
    assert files(hub)["app.py"] == b"new"
    assert files(hub)["other.txt"] == b"1"


# --- until it runs ---


@pytest.mark.parametrize(
    ("builds", "stage", "told"),
    [
        (["RUNNING"], "RUNNING", ""),
        (["BUILDING", "RUNNING"], "RUNNING", ""),
        (["RUNNING", "RUNNING_BUILDING", "RUNNING_APP_STARTING", "RUNNING"], "RUNNING", ""),
        (["NO_APP_FILE", "BUILDING", "RUNNING"], "RUNNING", ""),
        (["BUILD_ERROR", "BUILDING", "RUNNING"], "RUNNING", ""),
        (["SLEEPING"], "SLEEPING", "does not run after 600 s (stage SLEEPING)"),
        (["BUILDING", "BUILD_ERROR"], "BUILD_ERROR",
         "could not be built (BUILD_ERROR). The log is at {url}?logs=build."),
        (["APP_STARTING", "RUNTIME_ERROR"], "RUNTIME_ERROR",
         "could not be started (RUNTIME_ERROR). The log is at {url}?logs=container."),
        (["CONFIG_ERROR"], "CONFIG_ERROR",
         "has no valid configuration (CONFIG_ERROR). The log is at {url}?logs=build."),
        (["PAUSED"], "PAUSED", "is paused, so it does not run. Restart it at {url}/settings."),
        (["BUILDING"], "BUILDING",
         "does not run after 600 s (stage BUILDING). It goes on by itself; the log is at {url}"),
        (["DELETING"], "DELETING", "is deleting, so it does not run"),
    ],
)  # fmt: skip
def test_stages(builds, stage, told, hub, capsys):
    hub.builds = builds
    code, out, err = call(capsys, "space", "deploy", NAME, "--json")
    result = json.loads(out)
    assert result["stage"] == stage
    assert code == (1 if told else 0)
    assert bool(result["error"]) == bool(told)
    assert told.format(url=result["url"]) in err
    assert commits(hub) == 1


def test_a_stage_of_the_commit_before_is_not_believed(hub, waits):
    """Also where the Space does not say which commit it runs."""
    deploy_space(NAME)
    repo = hub.repos["spaces", NAME]
    hub.add("spaces", NAME, files(hub) | {"app.py": b"old"})
    repo.runtime = {"sha": None}
    hub.builds = ["BUILD_ERROR", "BUILD_ERROR", "BUILDING", "RUNNING"]
    assert deploy_space(NAME).stage == "RUNNING"
    waits.clear()
    assert deploy_space(NAME).stage == "RUNNING"  # nothing has changed: at once
    assert waits == []
    hub.add("spaces", NAME, files(hub) | {"app.py": b"old"})
    hub.builds = ["RUNNING"]
    assert deploy_space(NAME).stage == "RUNNING"  # after a while
    assert sum(waits) >= space._GRACE


@pytest.mark.parametrize("stage", ["SLEEPING", "STOPPED"])
def test_a_space_that_sleeps_is_woken(stage, hub):
    deploy_space(NAME)
    hub.repos["spaces", NAME].stages = [stage]
    hub.log.clear()
    assert deploy_space(NAME).stage == "RUNNING"
    assert [path for method, path in written(hub)] == [f"/api/spaces/{NAME}/restart"]


def test_what_the_space_says_of_its_failure(hub):
    hub.builds = ["BUILDING", "RUNTIME_ERROR"]
    deploy_space(NAME, wait=False)
    hub.repos["spaces", NAME].runtime = {"errorMessage": "Exit code: 1.\nReason: no module"}
    with pytest.raises(
        SpaceError, match=r"could not be started \(RUNTIME_ERROR: Exit code: 1. Reason: no module\)"
    ) as e:
        deploy_space(NAME)
    assert e.value.deployment.stage == "RUNTIME_ERROR"


def test_not_waiting(hub):
    done = deploy_space(NAME, wait=False)
    assert done.stage is None
    assert not [path for _, path, *_ in hub.log if path.endswith("/runtime")]


def test_a_timeout_is_kept(hub, waits):
    hub.builds = ["BUILDING"]
    with pytest.raises(SpaceError, match="does not run after 30 s"):
        deploy_space(NAME, timeout=30)
    assert sum(waits) == pytest.approx(30, abs=0.5)


# --- the command ---


def test_dry_run(hub, capsys):
    code, out, _ = call(
        capsys, "space", "deploy", NAME, "--dataset", "alice/results", "--model", "alice/vit", "--hardware", "t4-small",
        "--dry-run",
    )  # fmt: skip
    assert code == 0
    assert "would do:  make the Space; nothing was written" in out
    assert all(name in out for name in (*SMALL.files, f"{DATASET}=alice/results", f"{MODELS}=alice/vit", "t4-small"))
    assert "(private)" in out
    assert "hardware:  t4-small" in out
    assert written(hub) == []
    assert ("spaces", NAME) not in hub.repos
    deploy_space(NAME, **GIVEN)
    hub.log.clear()
    code, out, _ = call(capsys, "space", "deploy", NAME, "--dry-run")
    assert "nothing: the Space is up to date" in out
    code, out, _ = call(capsys, "space", "deploy", NAME, "--public", "--dry-run", "--json")
    plan = json.loads(out)
    assert (plan["dry_run"], plan["changed"], plan["private"], plan["uploaded"]) == (True, True, False, [])
    assert written(hub) == []


def test_for_people(hub, capsys):
    code, out, err = call(capsys, "space", "deploy", NAME, "--dataset", "alice/results", "--public")
    assert code == 0
    assert f"made:      {len(SMALL.files)} files" in out
    assert f"space:     {hub.endpoint}/spaces/{NAME} (public)" in out
    assert "library:   hf-equiv==9.9" in out
    assert "stage:     running" in out
    assert re.findall(r"^(building|app starting|running)$", err, re.MULTILINE) == [
        "building",
        "app starting",
        "running",
    ]
    assert call(capsys, "space", "deploy", NAME, "-q") == (0, "", "")
    assert "unchanged: the Space is up to date" in call(capsys, "space", "deploy", NAME)[1]


@pytest.mark.parametrize(
    ("token", "name", "flags", "message"),
    [
        ("", NAME, [], "deploying a Space needs a token of the Hub and there is none. Log in with `hf auth login`"),
        ("hf_nobody", NAME, [], "the Hub does not accept the token. Log in again"),
        ("hf_alice_reads", NAME, [], "the token can only read. Make a write token at"),
        ("hf_alice_reads", "alice/ours", [], "the token can only read. Make a write token at"),
        ("hf_bob", "acme/app", [], "your role in 'acme' is 'read'. Ask its owners for the role 'write'."),
        ("hf_bob", "alice/ours", [], "'alice' is neither you nor an organisation of yours. Deploy to 'bob/NAME'."),
        ("hf_alice", NAME, ["--hardware", "t4-small"], "the Hub wants to be paid for 'alice/app' (HTTP 402: Payment "
         "required: add a payment method or subscribe to PRO). Free accounts get "
         "--hardware cpu-basic"),
        ("hf_alice", "alice/ours", ["--hardware", "t4-small"], "the Hub wants to be paid"),
        ("hf_alice", "alice/theirs", [], "`repo_id` must be a new Space or one that hf_equiv has deployed; "
         "'alice/theirs' holds another app (sdk gradio). Choose another name, or pass --force to replace its "
         "app."),
        ("hf_alice", "alice/docker", [], "'alice/docker' holds another app (sdk docker)"),
        ("hf_alice", "datasets/alice/x", [], "`repo_id` must be the name of a Space, USER/NAME; got "
         "'datasets/alice/x'. That is a dataset: the app is deployed to a Space."),
        ("hf_alice", "app", [], "Put your user name or organisation before it."),
        ("hf_alice", NAME, ["--dataset", "alice/none"], "there is no such dataset or it is private"),
        ("hf_alice", NAME, ["--dataset", "alice/results@v9"], "`revision` must exist in the dataset 'alice/results'; "
         "got 'v9'"),
        ("hf_alice", NAME, ["--dataset", "spaces/alice/x"], "--dataset must be the name of a dataset"),
        ("hf_alice", NAME, ["--model", "alice/none"], "there is no such model or it is private"),
        ("hf_alice", NAME, ["--model", "./folder"], "--model must be the name of a model"),
        ("hf_alice", NAME, ["--wheel", "pyproject.toml"], "--wheel must be a wheel file"),
    ],
)  # fmt: skip
def test_refusals_name_the_cure(token, name, flags, message, hub, capsys, monkeypatch):
    deploy_space("alice/ours", private=False)
    hub.add("spaces", "alice/ours", files(hub, "alice/ours") | {"app.py": b"old"})
    hub.add("spaces", "alice/theirs", OTHERS_APP, sdk="gradio")
    hub.add("spaces", "alice/docker", {"Dockerfile": b"", CARD: b"---\nsdk: docker\n---\n"}, sdk="docker")
    before = {key: repo.at("main").sha for key, repo in hub.repos.items() if "--hardware" not in flags}
    monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = call(capsys, "space", "deploy", name, *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert token == "" or token not in err
    assert {key: hub.repos[key].at("main").sha for key in before} == before
    assert set(hub.repos) == set(before) or "--hardware" in flags


def test_not_even_a_free_space(hub, capsys):
    hub.pays = None
    code, _, err = call(capsys, "space", "deploy", NAME)
    assert code == 2
    assert "some no Gradio Space at all: then deploy from a PRO account or a paying organisation." in err
    assert ("spaces", NAME) not in hub.repos


def test_force_replaces_another_app(hub):
    hub.add(
        "spaces",
        "alice/docker",
        {"Dockerfile": b"", CARD: b"---\nsdk: docker\ntitle: T\nx: 1\n---\nWords."},
        sdk="docker",
    )
    deploy_space("alice/docker", force=True)
    facts = header(hub, "alice/docker")
    assert (facts["sdk"], facts["title"], facts["x"]) == ("gradio", "Looks like one thing, seen as another", 1)
    assert files(hub, "alice/docker")["Dockerfile"] == b""
    assert b"Words." in files(hub, "alice/docker")[CARD]
    assert not deploy_space("alice/docker").changed  # ours now


@pytest.mark.parametrize("flags", [[], ["--json"], ["--dry-run"], ["-q"]])
def test_the_token_is_in_no_output(flags, hub, capsys, monkeypatch):
    secret = "hf_alice"
    monkeypatch.setenv("HF_TOKEN", secret)
    hub.add("datasets", "alice/secret", {"README.md": b""}, private=True)
    hub.fail("GET", "/runtime", 503)
    hub.fail("POST", "/commit/", 500)
    code, out, err = call(capsys, "space", "deploy", NAME, "--dataset", "alice/secret", *flags)
    assert code == 0
    assert secret not in out + err
    if "--dry-run" not in flags:
        repo = hub.repos["spaces", NAME]
        assert not [data for data in files(hub).values() if secret.encode() in data]
        assert secret not in json.dumps([repo.variables, repo.secrets, repo.at("main").title, repo.at("main").message])
        assert repo.secrets == {}


# --- serving it here ---


def test_run_tells_the_app_what_to_show(capsys, monkeypatch):
    for name in (DATASET, MODELS):
        monkeypatch.delenv(name, raising=False)
    served = []
    fake = types.SimpleNamespace(
        main=lambda **given: served.append((given, os.environ.get(DATASET), os.environ.get(MODELS)))
    )
    monkeypatch.setattr(space_command, "load_app", lambda: fake)
    for check in ("check_port", "check_results", "check_models"):
        monkeypatch.setattr(space_command, check, lambda *_: None)
    usual = {"host": "127.0.0.1", "port": 7860, "share": False}
    assert call(capsys, "space", "run")[0] == 0
    flags = "--host 0.0.0.0 --port 80 --dataset me/x@v1 --model a/b --model folder --share".split()
    assert call(capsys, "space", "run", *flags)[0] == 0
    assert served == [
        (usual, None, None),
        ({"host": "0.0.0.0", "port": 80, "share": True}, "me/x@v1", "a/b,folder"),
    ]
    assert "without commas" in call(capsys, "space", "run", "--model", "a/b,c/d")[2]


def test_run_checks_its_flags_before_the_app_loads(capsys, monkeypatch, tmp_path):
    def load():
        raise AssertionError("the app was loaded")

    monkeypatch.setattr(space_command, "load_app", load)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = call(capsys, "space", "run", "--port", port)
    assert code == 2
    assert port in err
    for flag in ("--model", "--dataset"):
        code, _, err = call(capsys, "space", "run", "--port", "0", flag, str(tmp_path / "none"))
        assert code == 2
        assert str(tmp_path / "none") in err


def test_without_gradio(capsys, monkeypatch):
    monkeypatch.setattr(space_command.importlib.util, "find_spec", lambda name: None)
    code, _, err = call(capsys, "space", "run")
    assert code == 2
    assert "the app needs gradio, which is not installed. Run pip install gradio." in err


def test_the_app_can_be_built_and_served(tmp_path):
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": str(ROOT)}
    serving = subprocess.Popen(
        [sys.executable, "-m", "hf_equiv", "space", "run", "--port", str(port)], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    status, opener, end = None, urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + 120
    try:
        while status is None and serving.poll() is None and time.monotonic() < end:
            try:
                with opener.open(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                    status, page = answer.status, answer.read()
            except OSError:
                serving_again = subprocess.run(["sleep", "0.3"], check=False)  # time.sleep waits no time here
                assert serving_again.returncode == 0
    finally:
        serving.terminate()
        told = serving.communicate(timeout=30)[0]
    assert status == 200, told
    assert b"gradio" in page


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"`port` must be free; got {port}"):
            space_command.space_run.callback(host="127.0.0.1", port=port, dataset=None, models=(), share=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": ("./nothing",)}, "got 'nothing', which is no folder. Check the path."),
        ({"models": ("not a name",)}, "`model_id` must be a Hub id"),
        ({"models": ("a,b",)}, "`models` must be names without commas"),
        ({"dataset": "nothing"}, "'nothing' must be a run directory; it does not exist."),
        ({"dataset": "."}, "`dataset` must hold runs; got '.' without any run.json."),
    ],
)
def test_wrong_names_are_told_before_the_app_is_loaded(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(space_command, "load_app", lambda: pytest.fail("the app was loaded"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"host": "127.0.0.1", "port": port, "dataset": None, "models": (), "share": False}
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        space_command.space_run.callback(**options | given)
