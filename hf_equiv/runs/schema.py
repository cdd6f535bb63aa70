"""The columns of spectrum, lipschitz and walk rows, and where they are on disk."""

from __future__ import annotations

import datasets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


IMAGE_COLUMNS = ("source", "match", "target")


_TEXT, _NUMBER = datasets.Value("string"), datasets.Value("float64")


ROW_FEATURES: dict[str, datasets.Value] = {
    "pair_id": _TEXT,
    "source_id": _TEXT,
    "target_id": _TEXT,
    "source_class": _TEXT,
    "target_class": _TEXT,
    "status": _TEXT,
    "embedding_error": _NUMBER,
    "embedding_error_8bit": _NUMBER,
    "target_quantization_error": _NUMBER,
    "noise_floor": _NUMBER,
    "cosine_to_target": _NUMBER,
    "cosine_to_source": _NUMBER,
    "cosine_source_target": _NUMBER,
    "psnr_db": _NUMBER,
    "ssim": _NUMBER,
    "linf": _NUMBER,
    "l2": _NUMBER,
    "num_evals": _NUMBER,
    "seconds": _NUMBER,
    "source_label": _TEXT,
    "target_label": _TEXT,
    "match_label": _TEXT,
    "match_prob": _NUMBER,
    "target_label_prob": _NUMBER,
    "same_top1": datasets.Value("bool"),
}
"""The columns of a match row, in order."""


PROVENANCE_FEATURES: dict[str, datasets.Value] = {
    "model_id": _TEXT,
    "model_revision": _TEXT,
    "data_id": _TEXT,
    "data_revision": _TEXT,
    "readout": _TEXT,
    "dtype": _TEXT,
    "attention": _TEXT,
    "norm": _TEXT,
    "radius": _NUMBER,
    "rtol": _NUMBER,
    "solver": _TEXT,
    "seed": datasets.Value("int64"),
    "schema_version": datasets.Value("int64"),
    "versions": _TEXT,
    "processor": _TEXT,
}
"""What is needed to make a row again; in every row."""


@dataclass(frozen=True)
class Layout:
    """Where the rows of one kind of analysis are, and which columns they have.

    Attributes:
        analysis: the verb: match, spectrum, lipschitz or walk.
        folder: of the parquet files; also the name of the dataset configuration, but for `match`.
        item: column that names what rows are made of: a pair or an image.
        listed: where `run.json` lists those.
        images: image columns, first in every row.
        features: the other columns of its own.
    """

    analysis: str
    folder: str
    item: str
    listed: str
    images: tuple[str, ...]
    features: Mapping[str, Any]


MATCH = Layout("match", "matches", "pair_id", "pairs", IMAGE_COLUMNS, ROW_FEATURES)


_TEXT, _NUMBER, _WHOLE = datasets.Value("string"), datasets.Value("float64"), datasets.Value("int64")


_NUMBERS = datasets.List(_NUMBER)


_ZEROS = datasets.List({"cause": _TEXT, "count": _WHOLE, "predicted": _NUMBER, "measured": _NUMBER})


_COST = {"image_class": _TEXT, "num_evals": _NUMBER, "seconds": _NUMBER}


SPECTRUM_FEATURES: dict[str, Any] = {
    "image_id": _TEXT,
    "singular_values": _NUMBERS,
    "rank": _WHOLE,
    "nullity": _WHOLE,
    "structural_zeros": _ZEROS,
    "near_structural": _ZEROS,
    "effective_rank": _NUMBER,
    "sigma_max": _NUMBER,
    "rank_threshold": _NUMBER,
    "method": _TEXT,
    "error_bound": _NUMBERS,
    "status": _TEXT,
    "participation": _NUMBER,
    "patch_nullity": _WHOLE,
    "noise_method": _TEXT,
    **_COST,
}
"""A spectrum row: one image. σ in embedding length per pixel length, pixels in [0, 1]."""


LIPSCHITZ_FEATURES: dict[str, Any] = {
    "image_id": _TEXT,
    "direction": _TEXT,
    "index": _WHOLE,
    "value": _NUMBER,
    "jvp": _NUMBER,
    "radii": _NUMBERS,
    "secants": _NUMBERS,
    "noise_floor": _NUMBERS,
    "noise_method": _TEXT,
    "plateau": _NUMBERS,
    "status": _TEXT,
    "value_error": _NUMBER,
    "unit_factor": _NUMBER,
    "linearity_radius": _NUMBER,
    "linearity_at_limit": datasets.Value("bool"),
    "regional_lower_bound": _NUMBER,
    "regional_at_center": _NUMBER,
    "regional_clever": _NUMBER,
    "toward_id": _TEXT,
    **_COST,
}
"""A lipschitz row: one direction at one image. The `regional_` columns, `num_evals` and `seconds` are the image's."""


WALK_FEATURES: dict[str, Any] = {
    "image_id": _TEXT,
    "step": _WHOLE,
    "drift": _NUMBER,
    "arc_length": _NUMBER,
    "l2": _NUMBER,
    "linf": _NUMBER,
    "psnr_db": _NUMBER,
    "label": _TEXT,
    "prob": _NUMBER,
    "status": _TEXT,
    "drift_8bit": _NUMBER,
    "remaining": _NUMBER,
    "stationarity": _NUMBER,
    "heading": _TEXT,
    "target_id": _TEXT,
    **_COST,
}
"""A walk row: one point. `drift` to `prob` are of the float frame, `drift_8bit` of the PNG; `status` is the walk's."""


SPECTRUM = Layout("spectrum", "spectra", "image_id", "images", ("image",), SPECTRUM_FEATURES)


LIPSCHITZ = Layout("lipschitz", "lipschitz", "image_id", "images", ("image",), LIPSCHITZ_FEATURES)


WALK = Layout("walk", "paths", "image_id", "images", ("frame",), WALK_FEATURES)


LAYOUTS = {layout.analysis: layout for layout in (MATCH, SPECTRUM, LIPSCHITZ, WALK)}


ROW_KEYS: dict[str, tuple[str, ...]] = {
    "match": ("pair_id",),
    "spectrum": ("image_id",),
    "lipschitz": ("image_id", "direction", "index"),
    "walk": ("image_id", "step"),
}
"""The columns that name a row among the others."""


def row_name(analysis: str, row: dict[str, Any]) -> str:
    """Name a row in words: `cat`, `cat null 3`, `cat step 12`."""
    if analysis == "lipschitz" and row["direction"] is not None:
        return f"{row['image_id']} {row['direction']} {row['index']}"
    if analysis == "walk":
        return f"{row['image_id']} step {row['step']}"
    return str(row[ROW_KEYS[analysis][0]])
