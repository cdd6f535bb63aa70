"""Name the columns, settings, keys and files of a run that its stored images cannot prove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from hf_equiv.runs.schema import Layout, Row

NAMES = (
    "pair_id", "image_id", "source_id", "target_id", "toward_id", "source_class", "target_class", "image_class",
)  # fmt: skip

SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "names": NAMES,
    "origin of the images": (
        "data_id", "data_revision", "drawn", "image_column", "label_column",
        "seed of the draw and images left out",
    ),
    "distance from the photo of full size, which is not stored": ("psnr_full_db", "ssim_full"),
    "method of the search": ("command", "solver", "refine", "max_evals", "rtol", "step", "stop"),
    "cost": ("num_evals", "seconds"),
    "size of float errors": (
        "noise_floor within a factor of 6", "error_bound within a factor of 5", "value_error within a factor of 5",
        "rank_threshold within a factor of 2", "stationarity before the last point",
        "digits of other numbers within their tolerances",
    ),
    "software": (
        "versions", "closed_with", "errors", "compression of PNG and parquet files, with statistics and writer",
    ),
}  # fmt: skip
"""Columns, settings and keys that images cannot prove, by subject. They must agree with each other."""

UNVERIFIED = tuple(chain.from_iterable(SUBJECTS.values()))


def unverified_of(record: Row, layout: Layout) -> Iterator[str]:
    """Yield the entries of `UNVERIFIED` that a run has."""
    known = {*layout.features, *record["settings"], *record, "versions", "digits", "compression"}
    full = set() if record["settings"].get("full_size") else {"psnr_full_db", "ssim_full"}
    yield from (name for name in UNVERIFIED if name.partition(" ")[0] in known - full)
