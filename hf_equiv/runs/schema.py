"""Define the columns of the rows of every analysis, and the folders that hold them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import datasets

Row = dict[str, Any]
IMAGE_COLUMNS = ("source", "match", "target")

_TEXT, _NUMBER, _WHOLE, _FLAG = (datasets.Value(kind) for kind in ("string", "float64", "int64", "bool"))
_NUMBERS = datasets.List(_NUMBER)
_ZEROS = datasets.List({"cause": _TEXT, "count": _WHOLE, "predicted": _NUMBER, "measured": _NUMBER})
_THROUGH = datasets.List({"transformation": _TEXT, "error": _NUMBER, "worst": _NUMBER, "same_top1": _NUMBER})
_MODELS = datasets.List(
    {
        "model_id": _TEXT, "model_revision": _TEXT, "embedding_error": _NUMBER, "embedding_error_8bit": _NUMBER,
        "noise_floor": _NUMBER,
    }
)  # fmt: skip
_KINDS = {
    "pair_id image_id source_id target_id toward_id source_class target_class image_class target_text": _TEXT,
    "source_label target_label match_label label status method noise_method direction heading": _TEXT,
    "model_id model_revision data_id data_revision readout dtype attention norm solver versions processor": _TEXT,
    "rank nullity patch_nullity index step seed schema_version text_rank source_text_rank": _WHOLE,
    "same_top1 full_exact linearity_at_limit": _FLAG,
    "singular_values error_bound radii secants plateau band_energy channel_energy": _NUMBERS,
    "invariance_map": datasets.List(_NUMBERS),
    "structural_zeros near_structural": _ZEROS,
    "through": _THROUGH,
    "models": _MODELS,
}
"""The types of columns; all other columns hold a number."""


def _columns(names: str) -> dict[str, Any]:
    kinds = {name: kind for some, kind in _KINDS.items() for name in some.split()}
    return {name: kinds.get(name, _NUMBER) for name in names.split()}


ROW_FEATURES = _columns(
    "pair_id source_id target_id source_class target_class status embedding_error embedding_error_8bit "
    "target_quantization_error noise_floor cosine_to_target cosine_to_source cosine_source_target psnr_db ssim linf l2 "
    "num_evals seconds source_label target_label match_label match_prob target_label_prob same_top1 "
    "psnr_full_db ssim_full full_exact through models target_text cosine_to_text text_rank source_text_rank"
)
"""The columns of a match row, in order."""

PROVENANCE_FEATURES = _columns(
    "model_id model_revision data_id data_revision readout dtype attention norm radius rtol solver seed schema_version "
    "versions processor"
)
"""The last columns of every row: the settings that are needed to recompute it."""

SPECTRUM_FEATURES = _columns(
    "image_id singular_values rank nullity structural_zeros near_structural effective_rank sigma_max rank_threshold "
    "method error_bound status participation patch_nullity noise_method image_class num_evals seconds "
    "invariance_map band_energy channel_energy"
)
"""A spectrum row: one image. σ in embedding length per pixel length, pixels in [0, 1]."""

LIPSCHITZ_FEATURES = _columns(
    "image_id direction index value jvp radii secants noise_floor noise_method plateau status value_error unit_factor "
    "linearity_radius linearity_at_limit regional_lower_bound regional_at_center regional_clever toward_id image_class "
    "num_evals seconds"
) | {"noise_floor": _NUMBERS}
"""A lipschitz row: one direction at one image. `regional_*`, `num_evals` and `seconds` belong to the image."""

WALK_FEATURES = _columns(
    "image_id step drift arc_length l2 linf psnr_db label prob status drift_8bit remaining stationarity heading "
    "target_id image_class num_evals seconds"
)
"""A walk row: one point. `drift` to `prob` belong to the float frame, `drift_8bit` to the PNG, `status` to the walk."""


@dataclass(frozen=True)
class Layout:
    """The folder and the columns of the rows of one analysis."""

    analysis: str  # the verb: match, spectrum, lipschitz or walk
    folder: str  # folder of the parquet files; also the name of the dataset configuration
    item: str  # column with the id of the pair or image that a row belongs to
    listed: str  # key of `run.json` that lists the pairs or images
    images: tuple[str, ...]  # image columns, first in every row
    features: Mapping[str, Any]  # the other columns of the analysis
    key: tuple[str, ...]  # columns that identify a row
    added: tuple[str, ...] = ()  # columns that rows of earlier versions lack; None where an option was not asked for

    def of_file(self, columns: Collection[str]) -> Layout:
        """Return the layout of a file with these columns, which an earlier version may have written."""
        lost = {name for name in self.added if name not in columns}
        images = tuple(name for name in self.images if name not in lost)
        features = {name: kind for name, kind in self.features.items() if name not in lost}
        return replace(self, images=images, features=features, added=tuple(n for n in self.added if n not in lost))

    @property
    def all_features(self) -> datasets.Features:
        """Every column in the order of the parquet files: images, columns of the analysis, provenance."""
        images = {name: datasets.Image() for name in self.images}
        return datasets.Features(images | dict(self.features) | PROVENANCE_FEATURES)


MATCH = Layout(
    "match", "matches", "pair_id", "pairs", (*IMAGE_COLUMNS, "match_full"), ROW_FEATURES, ("pair_id",),
    added=(
        "match_full", "psnr_full_db", "ssim_full", "full_exact", "through", "models", "target_text", "cosine_to_text",
        "text_rank", "source_text_rank",
    ),
)  # fmt: skip
SPECTRUM = Layout(
    "spectrum", "spectra", "image_id", "images", ("image",), SPECTRUM_FEATURES, ("image_id",),
    added=("invariance_map", "band_energy", "channel_energy"),
)  # fmt: skip
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
