"""What a parquet file takes in memory is known before it is read, whatever repeats in it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_equiv import limits
from hf_equiv.limits import read_batches

LARGE = bytes(40_000)


def repeated(values: pa.Array, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), values)


BOMBS = {
    "a value": (pa.array([bytes(3_000_000)]), {"use_dictionary": False}),
    "repeated values": (pa.array([LARGE] * 100), {"use_dictionary": True}),
    "a dictionary": (repeated(pa.array([LARGE]), 100), {}),
    "a dictionary in a struct": (pa.StructArray.from_arrays([repeated(pa.array([LARGE]), 100)], ["bytes"]), {}),
    "a dictionary of text": (repeated(pa.array(["x" * 40_000]), 100), {}),
    "zeros": (pa.array([np.zeros(1_000_000, np.int64)]), {}),
    "nulls": (pa.array([None] * 2_000_000, pa.int64()), {}),
    "cells": (pa.array([None] * 20_000, pa.null()), {}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_files_that_are_far_larger_in_memory_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", 1_000_000)
    values, options = BOMBS[name]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": values}), path, compression="zstd", **options)
    assert path.stat().st_size < 1_000_000 / limits.EXPANSION
    rows = []
    with pytest.raises(ValueError, match="must take at most 1 MiB once it is read"):
        rows.extend(batch.num_rows for batch in read_batches(path, rows=1024))
    assert max(rows, default=0) <= 16  # a few rows of large values


def test_a_large_file_of_photos_is_read_whatever_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", 1_000)
    cells = [np.random.default_rng(k).bytes(2_000) for k in range(40)]
    pq.write_table(pa.table({"image": cells, "label": ["ant"] * 40}), tmp_path / "x.parquet")
    batches = list(read_batches(tmp_path / "x.parquet"))
    assert [cell for batch in batches for cell in batch.column(0).to_pylist()] == cells
