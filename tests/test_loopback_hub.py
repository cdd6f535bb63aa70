"""The loopback Hub does what the real clients need of a Hub; every other test of the Hub rests on that."""

from __future__ import annotations

import time

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    errors,
    hf_hub_download,
    snapshot_download,
)
from PIL import Image
from tiny_models import save
from transformers import AutoImageProcessor, AutoModel


@pytest.fixture
def api(hub) -> HfApi:
    HfFileSystem.clear_instance_cache()
    return HfApi(endpoint=hub.endpoint, token="hf_alice")


def names(api: HfApi, repo: str, revision: str | None = None) -> set[str]:
    return set(api.list_repo_files(repo, repo_type="dataset", revision=revision))


def test_repositories(api, hub):
    url = api.create_repo("alice/ds", repo_type="dataset", private=True)
    assert (url.repo_id, url.repo_type) == ("alice/ds", "dataset")
    assert api.create_repo("alice/ds", repo_type="dataset", exist_ok=True).repo_id == "alice/ds"
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_repo("alice/ds", repo_type="dataset")
    assert api.dataset_info("alice/ds").private
    for token in ("hf_bob", False):
        with pytest.raises(errors.RepositoryNotFoundError):
            HfApi(endpoint=hub.endpoint, token=token).dataset_info("alice/ds")
    with pytest.raises(errors.HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.endpoint, token="hf_nobody").whoami()
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.endpoint, token="hf_alice_reads").upload_file(
            path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/ds", repo_type="dataset"
        )
    with pytest.raises(errors.HfHubHTTPError, match="rights"):
        HfApi(endpoint=hub.endpoint, token="hf_bob").create_repo("acme/ds")
    assert api.create_repo("acme/space", repo_type="space", space_sdk="gradio").repo_type == "space"
    assert [org["name"] for org in api.whoami()["orgs"]] == ["acme"]
    api.delete_repo("alice/ds", repo_type="dataset")
    assert not api.repo_exists("alice/ds", repo_type="dataset")


def test_commits(api, hub, tmp_path):
    api.create_repo("alice/ds", repo_type="dataset")
    big = np.random.default_rng(0).bytes(5000)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.parquet").write_bytes(big)
    (tmp_path / "a.txt").write_text("text")
    first = api.upload_folder(folder_path=tmp_path, repo_id="alice/ds", repo_type="dataset")
    assert hub.repos["datasets", "alice/ds"].at(first.oid).files["d/x.parquet"].lfs
    assert names(api, "alice/ds") == {".gitattributes", "a.txt", "d/x.parquet"}
    again = api.upload_folder(folder_path=tmp_path, repo_id="alice/ds", repo_type="dataset")
    assert again.oid == first.oid  # nothing has changed
    path = hf_hub_download("alice/ds", "d/x.parquet", repo_type="dataset", endpoint=hub.endpoint, token="hf_alice")
    with open(path, "rb") as stream:
        assert stream.read() == big
    second = api.create_commit(
        "alice/ds",
        [CommitOperationAdd("b.txt", b"more"), CommitOperationDelete("a.txt")],
        commit_message="change",
        parent_commit=first.oid,
        repo_type="dataset",
    )
    assert names(api, "alice/ds") == {".gitattributes", "b.txt", "d/x.parquet"}
    assert names(api, "alice/ds", first.oid) == {".gitattributes", "a.txt", "d/x.parquet"}
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        api.create_commit(
            "alice/ds", [CommitOperationAdd("c", b"")], commit_message="late", parent_commit=first.oid,
            repo_type="dataset",
        )  # fmt: skip
    listed = api.list_repo_commits("alice/ds", repo_type="dataset")
    assert [c.commit_id for c in listed][:2] == [second.oid, first.oid]
    api.create_tag("alice/ds", tag="v1", revision=first.oid, repo_type="dataset")
    assert "a.txt" in names(api, "alice/ds", "v1")
    with pytest.raises(errors.RevisionNotFoundError):
        names(api, "alice/ds", "v2")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        hf_hub_download("alice/ds", "none", repo_type="dataset", endpoint=hub.endpoint, token="hf_alice")


def test_pull_requests(api, hub):
    api.create_repo("alice/ds", repo_type="dataset")
    bob = HfApi(endpoint=hub.endpoint, token="hf_bob")
    made = bob.create_commit(
        "alice/ds", [CommitOperationAdd("new.txt", b"text")], commit_message="add", create_pr=True, repo_type="dataset"
    )
    assert made.pr_revision == "refs/pr/1"
    assert names(api, "alice/ds") == {".gitattributes"}
    assert "new.txt" in names(api, "alice/ds", "refs/pr/1")
    bob.upload_file(path_or_fileobj=b"2", path_in_repo="2.txt", repo_id="alice/ds", repo_type="dataset", create_pr=True)
    assert [d.num for d in api.get_repo_discussions("alice/ds", repo_type="dataset")] == [1, 2]
    api.merge_pull_request("alice/ds", 1, repo_type="dataset")
    assert "new.txt" in names(api, "alice/ds")
    refs = api.list_repo_refs("alice/ds", repo_type="dataset", include_pull_requests=True)
    assert [ref.name for ref in refs.pull_requests] == ["pr/1", "pr/2"]


def test_cards_are_validated(api):
    api.create_repo("alice/ds", repo_type="dataset")
    for content, fine in ((b"---\ntags:\n- a\n---\n# x\n", True), (b"---\ntags: [\n---\n", False)):
        operation = [CommitOperationAdd("README.md", content)]
        if fine:
            api.create_commit("alice/ds", operation, commit_message="card", repo_type="dataset")
            assert api.dataset_info("alice/ds").tags == ["a"]
            continue
        with pytest.raises(ValueError, match="Invalid metadata"):
            api.create_commit("alice/ds", operation, commit_message="card", repo_type="dataset")


def test_faults(api, hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    api.create_repo("alice/ds", repo_type="dataset")
    hub.fail("POST", "/preupload/", 503, times=2)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/ds", repo_type="dataset")
    assert not hub.faults
    hub.fail("POST", "/commit/", 500)
    with pytest.raises(errors.HfHubHTTPError, match="500"):
        api.upload_file(path_or_fileobj=b"y", path_in_repo="y", repo_id="alice/ds", repo_type="dataset")
    assert "y" not in names(api, "alice/ds")
    hub.fail("POST", "/commit/", 0, after=True)  # carried out, and the answer is lost
    with pytest.raises(Exception, match=r"(?i)disconnect|closed|reset|EOF|response"):
        api.upload_file(path_or_fileobj=b"z", path_in_repo="z", repo_id="alice/ds", repo_type="dataset")
    assert "z" in names(api, "alice/ds")


def test_gated_and_paged_and_redirected(api, hub, tmp_path):
    files = {f"d/{i}.png": bytes([i]) * 10 for i in range(7)} | {"a.txt": b"a"}
    hub.add("datasets", "bob/gated", files, gated=True)
    with pytest.raises(errors.GatedRepoError):
        hf_hub_download("bob/gated", "a.txt", repo_type="dataset", endpoint=hub.endpoint, token="hf_alice")
    hub.add("datasets", "bob/open", files)
    hub.page, hub.cdn = 2, hub.endpoint.replace("127.0.0.1", "localhost")
    try:
        folder = snapshot_download("bob/open", repo_type="dataset", endpoint=hub.endpoint, token="hf_alice")
        with open(f"{folder}/d/3.png", "rb") as stream:
            assert stream.read() == bytes([3]) * 10
        sent = [token for method, path, token, _ in hub.log if path.startswith("/_lfs/") and method == "GET"]
        assert sent
        assert set(sent) == {None}  # the token goes to no other origin
        assert len(HfFileSystem(endpoint=hub.endpoint, token="hf_alice").glob("datasets/bob/open/d/*.png")) == 7
    finally:
        hub.page, hub.cdn = 1000, None


def test_datasets(hub):
    HfFileSystem.clear_instance_cache()
    images = [Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)) for i in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    made = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=features)
    made.push_to_hub("alice/images", "small", split="test", private=True, token="hf_alice")
    back = datasets.load_dataset("alice/images", "small", split="test", token="hf_alice")
    assert back.features["label"].names == ["a", "b"]
    assert np.array_equal(np.array(back[2]["image"]), np.array(images[2]))
    stream = datasets.load_dataset("alice/images", "small", split="test", token="hf_alice", streaming=True)
    assert [row["label"] for row in stream] == [0, 1, 0, 1]


def test_models(hub, tmp_path):
    save("vit_head", tmp_path / "vit")
    hub.add("models", "acme/vit", tmp_path / "vit")
    model = AutoModel.from_pretrained("acme/vit", token="hf_alice")
    local = AutoModel.from_pretrained(tmp_path / "vit")
    assert torch.equal(model.embeddings.cls_token, local.embeddings.cls_token)
    AutoImageProcessor.from_pretrained("acme/vit", token="hf_alice")
    with pytest.raises(OSError, match="acme/none"):
        AutoModel.from_pretrained("acme/none", token="hf_alice")


def test_spaces_and_collections(api, hub):
    api.create_repo("alice/app", repo_type="space", space_sdk="gradio", space_variables=[{"key": "A", "value": "1"}])
    api.add_space_variable("alice/app", "B", "2")
    api.add_space_secret("alice/app", "S", "secret")
    assert {k: v.value for k, v in api.get_space_variables("alice/app").items()} == {"A": "1", "B": "2"}
    hub.repos["spaces", "alice/app"].stages = ["BUILDING", "RUNNING"]
    assert [api.get_space_runtime("alice/app").stage for _ in range(3)] == ["BUILDING", "RUNNING", "RUNNING"]
    api.create_repo("alice/ds", repo_type="dataset")
    made = api.create_collection("My results", namespace="alice", exists_ok=True)
    assert api.create_collection("My results", namespace="alice", exists_ok=True).slug == made.slug
    api.add_collection_item(made.slug, "alice/ds", "dataset", note="matches")
    api.add_collection_item(made.slug, "alice/ds", "dataset", exists_ok=True)
    assert [item.item_id for item in api.get_collection(made.slug).items] == ["alice/ds"]


def test_an_unknown_route_says_so(api, hub):
    api.create_repo("alice/ds")
    with pytest.raises(errors.HfHubHTTPError, match="no such endpoint"):
        list(api.list_repo_likers("alice/ds"))
