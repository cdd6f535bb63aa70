"""Publishing from processes of its own: several at once, and one that is killed; always whole, once, nothing stray."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from fakes import TinyEncoder
from hubcases import NAME, titles, whole
from huggingface_hub import HfFileSystem
from runcases import COMMAND, Process

from hf_equiv.hub.publish import publish_results
from hf_equiv.verify import directory


@pytest.fixture(autouse=True)
def _encoder(monkeypatch):
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    HfFileSystem.clear_instance_cache()


class Publisher:
    """`hf-equiv publish` as a process, with a place for temporary files of its own."""

    def __init__(self, temporary: Path, folder: Path, name: str, *options: str) -> None:
        self.folder, self.temporary = folder, temporary
        self.temporary.mkdir()
        self.before = _files(folder)
        self.process = Process(COMMAND, "publish", folder, name, *options, TMPDIR=str(self.temporary))

    def end(self) -> str:
        """Wait for it; returns what it has said."""
        told = self.process.end()
        assert told.returncode == 0, told.stderr
        self._left_nothing()
        return told.stdout + told.stderr

    def kill(self) -> None:
        """Without a chance to say or to clear up anything."""
        assert self.process.runs(), self.process.end()
        assert self.process.kill().returncode == -signal.SIGKILL
        self._left_nothing()

    def _left_nothing(self) -> None:
        assert _files(self.folder) == self.before
        assert not list(self.temporary.iterdir())


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_processes_that_commit_at_the_same_moment(hub, runs, tmp_path):
    """Both have read the same commit, and send theirs on top of it: one is refused, reads anew, and builds upon it."""
    both = hub.delay("POST", "/commit/", times=2)
    publishers = [Publisher(tmp_path / name, runs[name], NAME) for name in ("match", "seed")]
    both.wait(2)
    assert titles(hub) == ["initial commit"]
    both.let_go()
    told = [publisher.end() for publisher in publishers]
    at_root = sum("in runs/" not in text for text in told)
    assert at_root == 1
    assert sum("the Hub answered 412" in text for text in told) == 1
    assert len([path for method, path, *_ in hub.log if method == "POST" and "/commit/" in path]) == 3
    first = ("match", "seed") if "in runs/" not in told[0] else ("seed", "match")
    whole(hub, runs, 3, first)


MOMENTS = {
    "the dataset is made, and nothing is in it": ("POST", "/repos/create", True, 1),
    "a file is under way": ("PUT", "/_lfs/", False, 1),
    "all is there but the commit": ("POST", "/commit/", False, 1),
    "the commit is made, and its answer is under way": ("POST", "/commit/", True, 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(moment, hub, runs, tmp_path):
    method, path, after, commits = MOMENTS[moment]
    held = hub.hold(method, path, after=after)
    publisher = Publisher(tmp_path / "home", runs["match"], NAME)
    held.wait()
    publisher.kill()
    held.let_go()
    assert len(titles(hub)) == commits
    if commits == 2:
        whole(hub, runs, 2, ("match",))
    else:
        assert set(hub.files("datasets", NAME)) == {".gitattributes"}
    already = set(hub.objects)
    hub.log.clear()
    done = publish_results(runs["match"], NAME)
    assert done.changed is (commits == 1)
    whole(hub, runs, 2, ("match",))
    sent = [path.split("/")[2] for method, path, *_ in hub.log if method == "PUT"]
    assert len(sent) == len(set(sent))
    assert not set(sent) & already  # what was there is not sent twice
    assert {blob.lfs for blob in hub.repos["datasets", NAME].at("main").files.values() if blob.lfs} == set(hub.objects)


def test_killed_while_a_pull_request_is_opened(hub, runs, tmp_path):
    """The request is there and its answer is not: the same command finds it, and opens no second one."""
    publish_results(runs["seed"], "bob/results", private=False, token="hf_bob")
    held = hub.hold("POST", "/commit/", after=True)
    publisher = Publisher(tmp_path / "home", runs["match"], "bob/results", "--create-pr")
    held.wait()
    publisher.kill()
    held.let_go()
    again = publish_results(runs["match"], "bob/results", create_pr=True)
    assert again.pr_url.endswith("/discussions/1")
    assert len(hub.repos["datasets", "bob/results"].discussions) == 1
    whole(hub, runs, 3, repo="bob/results", revision="refs/pr/1")
    assert len(titles(hub, "bob/results")) == 2
