"""Parquet files as one table: the same rows whatever their row groups, little memory, and no half a copy."""

import base64
import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import arrow_writer
from fakes import draw_photo
from pyarrow.parquet.encryption import CryptoFactory, EncryptionConfiguration, KmsClient, KmsConnectionConfig
from runcases import python

from hf_equiv.data import tables
from hf_equiv.data.sources import load_images
from hf_equiv.runs import shards
from hf_equiv.runs.schema import MATCH


def write(path, first: int, count: int, group: int = 2) -> None:
    def png(k):
        buffer = io.BytesIO()
        draw_photo(k).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = [{"image": png(k), "label": k % 2} for k in range(first, first + count)]
    pq.write_table(datasets.Dataset.from_list(rows, features=features).data.table, path, row_group_size=group)


def test_rows_are_those_that_datasets_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 3)
    folder = tmp_path / "photos"
    folder.mkdir()
    write(folder / "a.parquet", 0, 5)
    write(folder / "b.parquet", 5, 4, group=9)
    images = load_images(str(folder), cache_dir=str(tmp_path / "cache"))
    files = [str(folder / name) for name in ("a.parquet", "b.parquet")]
    known = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "other"))
    assert images.ids == tuple(map(str, range(9)))
    assert images.labels == tuple(("ant", "bee")[k] for k in known["label"])
    assert [item.image.tobytes() for item in images] == [row["image"].tobytes() for row in known]
    (copy,) = (tmp_path / "cache" / "hf_equiv").iterdir()
    assert copy.name == images.data_revision.removeprefix("sha256:") + ".arrow"

    def never(*_):
        raise AssertionError("copied again")

    monkeypatch.setattr(tables, "_copy", never)
    again = load_images(str(folder), cache_dir=str(tmp_path / "cache"))
    assert again[8].image.tobytes() == images[8].image.tobytes()


def test_memory_is_that_of_a_few_rows(tmp_path, monkeypatch):
    rng, held, real = np.random.default_rng(0), [], arrow_writer.table_cast
    cells = [{"bytes": rng.bytes(50_000), "path": None} for _ in range(400)]
    # a single row group, of pages of 16 rows: a page is the least that can be read
    pq.write_table(pa.table({"image": cells}), tmp_path / "one.parquet", compression="none", write_batch_size=16)
    del cells
    before = pa.total_allocated_bytes()

    def cast(table, schema):
        held.append(pa.total_allocated_bytes() - before)
        return real(table, schema)

    monkeypatch.setattr(arrow_writer, "table_cast", cast)
    images = load_images(str(tmp_path / "one.parquet"), cache_dir=str(tmp_path / "cache"))
    assert len(images) == 400
    assert len(held) == 25
    assert max(held) < 6_000_000, "of 20 MB"


def test_files_that_change_or_do_not_fit(tmp_path, monkeypatch):
    folder, real = tmp_path / "photos", tables._copy
    folder.mkdir()
    write(folder / "a.parquet", 0, 3)

    def copy(paths, to, *more):
        real(paths, to, *more)
        write(folder / "a.parquet", 0, 4)  # by another program

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_copy", copy)
        with pytest.raises(ValueError, match="'photos' cannot be read: it was written to while it was read"):
            load_images(str(folder), cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "hf_equiv").iterdir())
    assert len(load_images(str(folder), cache_dir=str(tmp_path / "cache"))) == 4
    pq.write_table(pa.table({"text": ["no image"]}), folder / "b.parquet")
    with pytest.raises(ValueError, match="parquet data 'photos' cannot be read"):
        load_images(str(folder), cache_dir=str(tmp_path / "cache"))
    (folder / "b.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-100])
    with pytest.raises(ValueError, match="parquet data 'photos' cannot be read"):
        load_images(str(folder), cache_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "hf_equiv").iterdir())) == 1


def test_what_is_no_column_of_images_is_refused_in_words(tmp_path):
    buffer = io.BytesIO()
    draw_photo(0).save(buffer, "PNG")
    numbers = pa.array([list(buffer.getvalue())], pa.list_(pa.uint8()))
    pq.write_table(pa.table({"image": numbers}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="must hold images; got List"):
        load_images(str(tmp_path / "numbers.parquet"), cache_dir=str(tmp_path / "cache"))
    twice = pa.array([buffer.getvalue()])
    pq.write_table(pa.Table.from_arrays([twice, twice], ["image", "image"]), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"'twice\.parquet' cannot be read"):
        load_images(str(tmp_path / "twice.parquet"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("columns", "labels", "said"),
    [
        ({"fine_label": [0, 1], "label": [2, 3]}, ("2", "3"), "label column 'label' of label, fine_label;"),
        ({"label": [[0, 1], [2]]}, (None, None), "rows without a class in column 'label': 2 of 2"),
        ({"label": [0, None]}, ("0", None), "rows without a class in column 'label': 1 of 2"),
        ({"label": [0, 1]}, ("0", "1"), ""),
    ],
)
def test_guesses_about_classes_are_said(tmp_path, columns, labels, said):
    pq.write_table(pa.table({"image": ["a" * 300, "b.png"], **columns}), tmp_path / "t.parquet")
    images = load_images(str(tmp_path / "t.parquet"), cache_dir=str(tmp_path))
    assert images.labels == labels
    assert said in (images.choices or [""])[0]
    with pytest.raises(FileNotFoundError, match=r"'t\.parquet row 0' does not exist"):
        images[0]


@pytest.mark.parametrize("text", ['{"info": null}', "5", '{"info": {"features": "x"}}', "[" * 50_000])
def test_damaged_metadata_of_columns_are_named(tmp_path, text):
    table = pa.table({"image": [b"x"]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match=r"parquet data 'odd\.parquet' cannot be read"):
        load_images(str(tmp_path / "odd.parquet"), cache_dir=str(tmp_path / "cache"))


NO_TEXT = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff"]).buffers()[1:]])


@pytest.mark.parametrize(
    "labels",
    [
        NO_TEXT,
        pa.array([2**31 - 1], pa.date32()),
        pa.array([2**62], pa.duration("s")),
        pa.array([1], pa.timestamp("s", tz="No/Where")),
    ],
)
def test_labels_that_cannot_be_read_are_named(tmp_path, labels):
    pq.write_table(pa.table({"image": [b"x"], "label": labels}), tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match=r"column 'label' of 'odd\.parquet' must hold classes"):
        load_images(str(tmp_path / "odd.parquet"), cache_dir=str(tmp_path / "cache"))


def test_a_cell_that_cannot_be_read_costs_its_own_row(tmp_path):
    pq.write_table(pa.table({"image": NO_TEXT}), tmp_path / "odd.parquet")
    images = load_images(str(tmp_path / "odd.parquet"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"odd\.parquet row 0 cannot be read"):
        images[0]


def test_names_of_classes_are_text(tmp_path):
    features = {"image": {"dtype": "binary", "_type": "Value"}, "label": {"names": [1, 2], "_type": "ClassLabel"}}
    table = pa.table({"image": [b"x"], "label": [1]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "odd.parquet")
    assert load_images(str(tmp_path / "odd.parquet"), cache_dir=str(tmp_path / "cache")).labels == ("2",)


class PlainKeys(KmsClient):
    def wrap_key(self, key_bytes, master_key_identifier):
        return base64.b64encode(key_bytes).decode()


@pytest.mark.parametrize("column", ["image", "label"])
def test_an_encrypted_column_is_refused_and_does_not_end_the_process(tmp_path, column):
    keys = CryptoFactory(lambda _: PlainKeys())
    how = EncryptionConfiguration(footer_key="a", column_keys={"b": [column]}, plaintext_footer=True)
    table, path = pa.table({"image": [b"x"], "label": ["a"]}), tmp_path / "secret.parquet"
    secret = keys.file_encryption_properties(KmsConnectionConfig(), how)
    with pq.ParquetWriter(path, table.schema, encryption_properties=secret) as writer:
        writer.write_table(table)
    code = "import sys; from hf_equiv.data.sources import load_images; load_images(sys.argv[1], cache_dir=sys.argv[2])"
    found = python(code, path, tmp_path / "cache")
    assert f"cannot be read: column '{column}' is encrypted" in found.stderr
    with pytest.raises(ValueError, match=f"column '{column}' is encrypted"):
        list(shards.faults_of_schema(path, MATCH, {}))
