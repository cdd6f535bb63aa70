"""The columns of the rows of every analysis, and the folders that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets

Row = dict[str, Any]
IMAGE_COLUMNS = ("source", "match", "target")

_TEXT, _NUMBER, _WHOLE = datasets.Value("string"), datasets.Value("float64"), datasets.Value("int64")
_NUMBERS = datasets.List(_NUMBER)
_ZEROS = datasets.List({"cause": _TEXT, "count": _WHOLE, "predicted": _NUMBER, "measured": _NUMBER})
_COST = {"image_class": _TEXT, "num_evals": _NUMBER, "seconds": _NUMBER}

ROW_FEATURES: dict[str, Any] = {
    **dict.fromkeys(("pair_id", "source_id", "target_id", "source_class", "target_class", "status"), _TEXT),
    **dict.fromkeys(("embedding_error", "embedding_error_8bit", "target_quantization_error", "noise_floor"), _NUMBER),
    **dict.fromkeys(("cosine_to_target", "cosine_to_source", "cosine_source_target"), _NUMBER),
    **dict.fromkeys(("psnr_db", "ssim", "linf", "l2", "num_evals", "seconds"), _NUMBER),
    **dict.fromkeys(("source_label", "target_label", "match_label"), _TEXT),
    **dict.fromkeys(("match_prob", "target_label_prob"), _NUMBER),
    "same_top1": datasets.Value("bool"),
}
"""The columns of a match row, in order."""

PROVENANCE_FEATURES: dict[str, Any] = {
    **dict.fromkeys(("model_id", "model_revision", "data_id", "data_revision", "readout", "dtype"), _TEXT),
    **dict.fromkeys(("attention", "norm"), _TEXT),
    **dict.fromkeys(("radius", "rtol"), _NUMBER),
    "solver": _TEXT,
    "seed": _WHOLE,
    "schema_version": _WHOLE,
    "versions": _TEXT,
    "processor": _TEXT,
}
"""The last columns of every row: the settings that make the row again."""

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
    **dict.fromkeys(("regional_lower_bound", "regional_at_center", "regional_clever"), _NUMBER),
    "toward_id": _TEXT,
    **_COST,
}
"""A lipschitz row: one direction at one image. `regional_*`, `num_evals` and `seconds` belong to the image."""

WALK_FEATURES: dict[str, Any] = {
    "image_id": _TEXT,
    "step": _WHOLE,
    **dict.fromkeys(("drift", "arc_length", "l2", "linf", "psnr_db"), _NUMBER),
    "label": _TEXT,
    "prob": _NUMBER,
    "status": _TEXT,
    **dict.fromkeys(("drift_8bit", "remaining", "stationarity"), _NUMBER),
    "heading": _TEXT,
    "target_id": _TEXT,
    **_COST,
}
"""A walk row: one point. `drift` to `prob` belong to the float frame, `drift_8bit` to the PNG, `status` to the walk."""


@dataclass(frozen=True)
class Layout:
    """The folder and the columns of the rows of one analysis.

    Attributes:
        analysis: the verb: match, spectrum, lipschitz or walk.
        folder: folder of the parquet files; also the name of the dataset configuration.
        item: column with the id of the pair or image that a row belongs to.
        listed: key of `run.json` that lists the pairs or images.
        images: image columns, first in every row.
        features: the other columns of the analysis.
        key: columns that tell a row from all others.
    """

    analysis: str
    folder: str
    item: str
    listed: str
    images: tuple[str, ...]
    features: Mapping[str, Any]
    key: tuple[str, ...]

    @property
    def all_features(self) -> datasets.Features:
        """Every column in the order of the parquet files: images, own columns, provenance."""
        images = {name: datasets.Image() for name in self.images}
        return datasets.Features(images | dict(self.features) | PROVENANCE_FEATURES)


MATCH = Layout("match", "matches", "pair_id", "pairs", IMAGE_COLUMNS, ROW_FEATURES, ("pair_id",))
SPECTRUM = Layout("spectrum", "spectra", "image_id", "images", ("image",), SPECTRUM_FEATURES, ("image_id",))
LIPSCHITZ = Layout(
    "lipschitz", "lipschitz", "image_id", "images", ("image",), LIPSCHITZ_FEATURES, ("image_id", "direction", "index")
)
WALK = Layout("walk", "paths", "image_id", "images", ("frame",), WALK_FEATURES, ("image_id", "step"))
LAYOUTS = {layout.analysis: layout for layout in (MATCH, SPECTRUM, LIPSCHITZ, WALK)}


def row_name(analysis: str, row: Row) -> str:
    """Name a row in words: `cat`, `cat null 3`, `cat step 12`."""
    if analysis == "lipschitz" and row["direction"] is not None:
        return f"{row['image_id']} {row['direction']} {row['index']}"
    if analysis == "walk":
        return f"{row['image_id']} step {row['step']}"
    return str(row[LAYOUTS[analysis].item])
