"""Datasets by name from the Hub: configurations, splits, columns, odd images, gates, and streaming."""

import importlib
import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import SIZE, TinyEncoder, draw_photo
from hostile import EPS
from huggingface_hub import HfApi, constants
from loopback_hub import HubError, _Handler
from PIL import Image

from hf_equiv import limits
from hf_equiv.analyses import MatchConfig, SpectrumConfig, WalkConfig, make_plan, run
from hf_equiv.cli import environment
from hf_equiv.data import tables
from hf_equiv.data.sources import draw_pairs, load_images

main = importlib.import_module("hf_equiv.cli.main")  # `hf_equiv.cli.main` is the function


def png(k: int, size: tuple[int, int] = (40, 40), mode: str = "RGB") -> dict:
    buffer = io.BytesIO()
    draw_photo(k).resize(size).convert(mode).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def push(tables: dict[str, datasets.Dataset], repo: str = "alice/photos", card: str = "") -> str:
    """Upload parquet files by hand, as a Hub dataset is laid out; returns the commit."""
    api = HfApi()
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    sha = ""
    for path, table in tables.items():
        buffer = io.BytesIO()
        table.to_parquet(buffer)
        sha = api.upload_file(
            path_or_fileobj=buffer.getvalue(), path_in_repo=path, repo_id=repo, repo_type="dataset"
        ).oid
    if card:
        sha = api.upload_file(
            path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo, repo_type="dataset"
        ).oid
    return sha


def table(count: int = 6, classes: tuple[str, ...] | None = ("ant", "bee"), first: int = 0) -> datasets.Dataset:
    features = {"image": datasets.Image()} | ({"label": datasets.ClassLabel(names=list(classes))} if classes else {})
    rows = [{"image": png(first + k)} | ({"label": k % len(classes)} if classes else {}) for k in range(count)]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


CONFIGS = """---
configs:
- config_name: big
  data_files:
  - {split: train, path: big/train.parquet}
- config_name: small
  data_files:
  - {split: train, path: small/train.parquet}
  - {split: test, path: small/test.parquet}
---
"""


def test_configurations_splits_and_the_commit(hub, tmp_path):
    sha = push(
        {"big/train.parquet": table(6), "small/train.parquet": table(4), "small/test.parquet": table(3)}, card=CONFIGS
    )
    for name, data_id, size in (
        ("alice/photos", "alice/photos:big:train", 6),
        ("alice/photos:small", "alice/photos:small:test", 3),
        ("alice/photos:small:train", "alice/photos:small:train", 4),
    ):
        images = load_images(name, cache_dir=str(tmp_path))
        assert (images.data_id, images.data_revision, len(images)) == (data_id, sha, size)
    assert images.labels == ("ant", "bee", "ant", "bee")
    assert images.choices == ()
    with pytest.raises(ValueError, match=r"has no 'tiny'; configurations: big, small; splits of 'big': train"):
        load_images("alice/photos:tiny", cache_dir=str(tmp_path))


def test_a_dataset_in_the_cache_is_opened_at_its_last_commit(hub, tmp_path):
    sha = push({"train.parquet": table()})
    load_images("alice/photos", cache_dir=str(tmp_path))
    hub.fail("GET", "/api/datasets/alice/photos$", 503, times=99)
    images = load_images("alice/photos", cache_dir=str(tmp_path), local_files_only=True)
    assert (images.data_revision, len(images)) == (sha, 6)


def test_a_split_that_nobody_named_is_said_aloud(hub, tmp_path, capsys, monkeypatch):
    push({"big/train.parquet": table(6), "small/train.parquet": table(4), "small/test.parquet": table(3)}, card=CONFIGS)
    monkeypatch.setattr(environment, "load_encoder", lambda *_, **__: TinyEncoder())
    monkeypatch.chdir(tmp_path)
    given = ["match", "builtin", "--pairs", "1", "--max-evals", "3", "--no-refine", "--cache-dir", "cache", "--data"]
    split = "taking split test of train, test; name another as alice/photos:small:SPLIT"
    config = "taking configuration big of big, small; name another as alice/photos:CONFIG"
    for what, said in (("alice/photos:small", [split]), ("alice/photos", [config]), ("alice/photos:small:test", [])):
        for dry in ([], ["--dry-run"]):
            main._run([*given, what, *dry])
            out, err = capsys.readouterr()
            assert [line for line in err.splitlines() if line.startswith("taking")] == ([] if dry else said)
            assert (f" {'; '.join(said)}\n" in out if said else "choices" not in out) or not dry
        main._run([*given, what, "--dry-run", "--json"])
        out, err = capsys.readouterr()
        assert json.loads(out)["dry_run"]["choices"] == said
        assert "taking" not in err
    main._run(["spectrum", "builtin", "--k", "2", "--cache-dir", "cache", "--data", "alice/photos:small"])
    assert split in capsys.readouterr().err.splitlines()


def test_a_dataset_like_coco(hub, tmp_path):
    features = datasets.Features({
        "photo": datasets.Image(), "width": datasets.Value("int64"), "height": datasets.Value("int64"),
        "objects": {"bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                    "category": datasets.List(datasets.Value("int64"))},
    })  # fmt: skip
    sizes = [(40, 30), (64, 64), (17, 90), (33, 20)]
    rows = [
        {"photo": png(k, size, "L" if k == 3 else "RGB"), "width": size[0], "height": size[1],
         "objects": {"bbox": [[0.0, 1.0, 2.0, 3.0]] * k, "category": [k] * k}}
        for k, size in enumerate(sizes)
    ]  # fmt: skip
    push({"data/train.parquet": datasets.Dataset.from_list(rows, features=features)})
    images = load_images("alice/photos", image_column="photo", cache_dir=str(tmp_path))
    assert images.labels == (None,) * 4
    assert [item.image.size for item in images] == sizes
    assert {item.image.mode for item in images} == {"RGB"}
    plan = make_plan(MatchConfig(data="alice/photos", pairs=6), TinyEncoder(), cache_dir=str(tmp_path))
    assert len(plan.items) == 6
    assert plan.pixels(plan.items[0])[0].shape == (3, SIZE, SIZE)
    labelled = load_images("alice/photos", label_column="width", cache_dir=str(tmp_path))
    assert labelled.labels == ("40", "64", "17", "33")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_card_without_header_is_no_warning(hub, tmp_path, caplog, streaming):
    push({"train.parquet": table()}, card="Only text.\n")
    assert len(load_images("alice/photos", cache_dir=str(tmp_path), most=6, streaming=streaming)) == 6
    assert [record.getMessage() for record in caplog.records if record.name.startswith("huggingface_hub")] == []


def test_a_torn_image_in_the_middle_marks_its_rows(hub, tmp_path):
    rows = [{"image": png(k)} for k in range(5)]
    rows[2] = {"image": {"bytes": b"\x89PNG torn", "path": None}}
    push({"train.parquet": datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()}))})
    config = MatchConfig(data="alice/photos", pairs=10, max_evals=5, refine=False)
    outcome = run.run_analysis(make_plan(config, TinyEncoder(), cache_dir=str(tmp_path)), tmp_path / "out")
    bad = {row["pair_id"] for row in outcome.rows if row["status"] == "error"}
    assert bad == {row["pair_id"] for row in outcome.rows if "2" in (row["source_id"], row["target_id"])} != set()
    assert len(bad) < 10
    assert all("alice/photos:default:train row 2" in why for why in outcome.errors.values())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_of_the_hub_opens_no_other_file(hub, tmp_path, streamed):
    (tmp_path / "own.png").write_bytes(png(0)["bytes"])
    rows = [{"image": {"bytes": None, "path": str(tmp_path / "own.png")}}, {"image": png(1)}]
    # written by hand: `datasets` would take the file into the table
    cells = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([row["image"] for row in rows], cells)}), buffer)
    api = HfApi()
    api.create_repo("alice/sly", repo_type="dataset")
    api.upload_file(
        path_or_fileobj=buffer.getvalue(), path_in_repo="train.parquet", repo_id="alice/sly", repo_type="dataset"
    )
    more = {"streaming": True, "most": 2} if streamed else {}
    images = load_images("alice/sly", cache_dir=str(tmp_path / "cache"), **more)
    assert images[1].image.size == (40, 40)
    with pytest.raises(ValueError, match="row 0 must hold an image"):
        _ = images[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_no_row_of_a_dataset_leads_elsewhere(hub, tmp_path, streamed):
    api = HfApi()
    for repo in ("alice/secret", "alice/sly"):
        api.create_repo(repo, repo_type="dataset")
    api.upload_file(
        path_or_fileobj=png(0)["bytes"], path_in_repo="own.png", repo_id="alice/secret", repo_type="dataset"
    )
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "own.png").write_bytes(png(0)["bytes"])
    paths = [
        str(tmp_path / "cache" / "own.png"), "own.png", "hf://datasets/alice/secret/own.png", "http://127.0.0.1:9/x.png",
        "file:///etc/hostname::hf://datasets/alice/sly/x",
    ]  # fmt: skip
    cells = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": path} for path in paths] + [{"bytes": png(1)["bytes"], "path": __file__}]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(rows, cells)}), buffer)
    push_bytes(buffer.getvalue(), "alice/sly")
    (tmp_path / "local.parquet").write_bytes(buffer.getvalue())
    more = {"streaming": True, "most": 6} if streamed else {}
    seen = len([path for _, path, *_ in hub.log if "secret" in path])
    for images in (
        load_images("alice/sly", cache_dir=str(tmp_path / "cache"), **more),
        load_images(str(tmp_path / "local.parquet"), cache_dir=str(tmp_path / "cache")),
    ):
        assert images[5].image.size == (40, 40)
        for k in range(5):
            with pytest.raises(ValueError, match=f"row {k} must hold an image; got the path of a file elsewhere"):
                _ = images[k]
    assert len([path for _, path, *_ in hub.log if "secret" in path]) == seen


def push_bytes(data: bytes, repo: str) -> None:
    HfApi().upload_file(path_or_fileobj=data, path_in_repo="train.parquet", repo_id=repo, repo_type="dataset")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_that_swells_is_refused(hub, tmp_path, monkeypatch, streamed):
    monkeypatch.setattr(limits, "MAX_BYTES", 200_000)
    monkeypatch.setattr(tables, "MAX_BYTES", 200_000)
    monkeypatch.setattr(tables, "LARGE", 200_000)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [bytes(100_000)] * 20}), buffer, compression="zstd")
    HfApi().create_repo("alice/bomb", repo_type="dataset")
    push_bytes(buffer.getvalue(), "alice/bomb")
    more = {"streaming": True, "most": 20} if streamed else {}
    with pytest.raises(ValueError, match="cannot be loaded: its parquet files are too large in memory"):
        load_images("alice/bomb", cache_dir=str(tmp_path), **more)


@pytest.mark.parametrize("name", ["own.png", "sub/../own.png", "ABSOLUTE", "../out.png", "link.png", "own.png\0"])
def test_a_column_of_names_leads_to_files_beside_the_table(tmp_path, name):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for place in (folder / "own.png", tmp_path / "out.png"):
        place.write_bytes(png(0)["bytes"])
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    name = str(folder / "own.png") if name == "ABSOLUTE" else name
    pq.write_table(pa.table({"image": [name]}), folder / "names.parquet")
    images = load_images(str(folder / "names.parquet"), cache_dir=str(tmp_path / "cache"))
    if name.endswith("own.png"):
        assert images[0].image.size == (40, 40)
    else:
        with pytest.raises(ValueError, match="got the path of a file elsewhere, which is never opened"):
            _ = images[0]


def test_other_columns_of_a_row_are_not_decoded(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    cells = [{"image": png(0), "label": {"bytes": EPS, "path": None}}]
    datasets.Dataset.from_list(cells, features=features).to_parquet(str(tmp_path / "two.parquet"))
    images = load_images(str(tmp_path / "two.parquet"), cache_dir=str(tmp_path / "cache"))
    assert images.labels == (None,)
    assert images[0].image.size == (40, 40)


@pytest.mark.parametrize("kind", ["list", "Array2D", "Image"])
def test_grey_levels_of_any_integers(tmp_path, kind):
    levels = np.array([[0, 100], [252, 7]], dtype=np.int64)
    feature = {"Array2D": datasets.Array2D((2, 2), "int64"), "Image": datasets.Image()}.get(kind)
    features = datasets.Features({"image": feature}) if feature else None
    cell = Image.fromarray(levels.astype(np.int32)) if kind == "Image" else levels.tolist()
    datasets.Dataset.from_dict({"image": [cell]}, features=features).to_parquet(str(tmp_path / "grey.parquet"))
    image = load_images(str(tmp_path / "grey.parquet"), cache_dir=str(tmp_path / "cache"))[0].image
    assert np.asarray(image)[..., 0].tolist() == levels.tolist()


def test_image_files_of_a_dataset_are_read(hub, tmp_path):
    api = HfApi()
    api.create_repo("alice/files", repo_type="dataset")
    for k in range(2):
        api.upload_file(
            path_or_fileobj=png(k)["bytes"], path_in_repo=f"{k}.png", repo_id="alice/files", repo_type="dataset"
        )
    images = load_images("alice/files", cache_dir=str(tmp_path / "cache"))
    assert [item.image.size for item in images] == [(40, 40)] * 2
    streamed = load_images("alice/files", cache_dir=str(tmp_path / "cache"), streaming=True, most=2)
    assert [item.image.size for item in streamed] == [(40, 40)] * 2


def test_datasets_that_cannot_be_used(hub, tmp_path, monkeypatch):
    push({"train.parquet": datasets.Dataset.from_dict({"text": ["a", "b"]})}, "alice/texts")
    with pytest.raises(ValueError, match=r"'alice/texts:default:train' must have an image column; it has text"):
        load_images("alice/texts", cache_dir=str(tmp_path))
    push({"train.parquet": table()})
    with pytest.raises(ValueError, match="'alice/none' is no folder here, and on the Hub there is no such dataset"):
        load_images("alice/none", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="must have a column 'name'"):
        load_images("alice/photos", label_column="name", cache_dir=str(tmp_path))
    hub.repos["datasets", "alice/photos"].gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(ValueError, match=r"'alice/photos' is a gated dataset on the Hub"):
        load_images("alice/photos", cache_dir=str(tmp_path))


@pytest.mark.parametrize("code", ["RepoNotFound", None])  # of a name of one word the Hub gives no code
@pytest.mark.parametrize("name", ["nosuch", "alice/nosuch"])
def test_a_name_that_nothing_has(hub, monkeypatch, name, code):
    def refuse(*_):
        raise HubError(404, "Sorry, we can't find the page you are looking for.", code)

    monkeypatch.setattr(_Handler, "_route", refuse)
    with pytest.raises(
        ValueError, match=rf"^'{name}' is no folder here, and on the Hub there is no such dataset .* spelling"
    ):
        load_images(name)


# --- streaming ---


@pytest.fixture
def shards_on_hub(hub):
    return push({f"data/train-0000{k}-of-00004.parquet": table(5, first=5 * k) for k in range(4)})


def test_streaming_takes_the_first_images(shards_on_hub, tmp_path):
    whole = load_images("alice/photos", cache_dir=str(tmp_path / "a"))
    few = load_images("alice/photos", limit=7, streaming=True, cache_dir=str(tmp_path / "b"))
    assert few.data_id == "alice/photos:default:train[:7]"
    assert few.data_revision == whole.data_revision == shards_on_hub
    assert few.ids == whole.ids[:7]
    assert few.labels == whole.labels[:7]
    assert [a.image.tobytes() for a in few] == [whole[i].image.tobytes() for i in range(7)]


def test_a_stream_that_is_sorted_by_class_is_told(hub, tmp_path):
    push({"train.parquet": table(10).sort("label")})
    few = load_images("alice/photos", limit=5, streaming=True, cache_dir=str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"the first 5 images .* are 'ant': it is sorted by class. Leave `streaming`"):
        draw_pairs(few, 2, seed=0)
    assert draw_pairs(load_images("alice/photos", cache_dir=str(tmp_path / "b")), 2, seed=0)
    assert draw_pairs(load_images("alice/photos", limit=6, streaming=True, cache_dir=str(tmp_path / "c")), 2, seed=0)


def test_a_run_over_a_stream_goes_on_without_asking_again(shards_on_hub, tmp_path, monkeypatch):
    config = MatchConfig(data="alice/photos", pairs=4, streaming=True, max_evals=5, refine=False)
    plan = make_plan(config, TinyEncoder(), cache_dir=str(tmp_path))
    assert plan.settings["data_id"] == "alice/photos:default:train[:100]"
    again = make_plan(config, TinyEncoder(), cache_dir=str(tmp_path))
    assert again.settings == plan.settings
    assert again.items == plan.items
    assert run.run_analysis(plan, tmp_path / "out").rows


def test_large_datasets_are_streamed_unasked_where_a_number_is_known(shards_on_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "is_large", lambda *_: True)
    config = SpectrumConfig(data="alice/photos", limit=3, k=2)
    plan = make_plan(config, TinyEncoder(), cache_dir=str(tmp_path))
    assert plan.settings["data_id"] == "alice/photos:default:train[:3]"
    assert [subject.name for subject in plan.items] == ["0", "1", "2"]
    plan = make_plan(SpectrumConfig(data="alice/photos", k=2), TinyEncoder(), cache_dir=str(tmp_path))
    assert len(plan.items) == 20


def test_the_size_comes_from_the_card(hub, monkeypatch):
    card = "---\ndataset_info:\n  download_size: 6000000000\n  features:\n  - {name: image, dtype: image}\n"
    sha = push(
        {"train.parquet": table(classes=None)}, card=card + "  splits:\n  - {name: train, num_examples: 6}\n---\n"
    )
    assert tables.is_large("alice/photos", "default", sha)


def test_photos_that_are_files_of_their_own_are_streamed(hub, tmp_path):
    api = HfApi()
    api.create_repo("alice/files", repo_type="dataset")
    for k, kind in enumerate(("ant", "bee", "ant")):
        api.upload_file(
            path_or_fileobj=png(k)["bytes"], path_in_repo=f"train/{kind}/{k}.png", repo_id="alice/files",
            repo_type="dataset",
        )  # fmt: skip
    images = load_images("alice/files", limit=2, streaming=True, cache_dir=str(tmp_path))
    assert len(images) == 2
    assert isinstance(images[1].image, Image.Image)
    assert images.labels == ("ant", "ant")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MatchConfig(streaming=True), "`streaming` must come with `data`"),
        (MatchConfig(data="builtin", streaming=True), "'builtin' is here already. Leave it out"),
        (WalkConfig(data="a/b", streaming=True), "`streaming` must come with `data` and `limit`"),
    ],
)
def test_streaming_of_what_is_no_stream(config, message):
    with pytest.raises(ValueError, match=message):
        make_plan(config, TinyEncoder())


def test_images_that_arrived_damaged_are_fetched_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.add("datasets", "alice/photos", {f"train/{k}.png": png(k)["bytes"] for k in range(3)})
    hub.spoil("GET", "/resolve/.*/1.png", times=2)
    images = load_images("alice/photos", cache_dir=str(tmp_path / "tables"))
    assert not hub.faults
    assert images[1].image.tobytes() == Image.open(io.BytesIO(png(1)["bytes"])).tobytes()
    assert len(images) == 3


def test_a_cache_that_cannot_be_used_is_named(tmp_path):
    table().to_parquet(tmp_path / "some.parquet")
    with pytest.raises(
        OSError, match=r"the cache of downloads cannot be used: Not a directory: .* Set HF_HOME, or pass"
    ):
        load_images(tmp_path / "some.parquet", cache_dir=tmp_path / "some.parquet" / "cache")
