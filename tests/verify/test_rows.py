"""Every column of a row is compared, or named in `UNVERIFIED`."""

from typing import Any

import pytest
import torch
from fakes import TinyEncoder, save_photos

from hf_equiv.analyses import MatchConfig, lipschitz, make_plan, run_analysis
from hf_equiv.analyses.run import VERBS
from hf_equiv.runs import shards
from hf_equiv.runs.directory import read_record
from hf_equiv.runs.schema import LAYOUTS, PROVENANCE_FEATURES
from hf_equiv.verify.rows import agrees, check_item, check_stated
from hf_equiv.verify.unverified import UNVERIFIED

OPTIONS = {
    "spectrum": {},
    "lipschitz": {"directions": "random:1,null:1,toward", "linearity": True, "regional": 0.5},
    "walk": {"num_steps": 2, "step": 0.3, "heading": "toward"},
}
COLUMNS = [
    (analysis, column)
    for analysis, layout in LAYOUTS.items()
    for column in (*layout.images, *layout.features, *PROVENANCE_FEATURES)
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple]:
    """For each verb: layout, run.json, what it lists, and the rows of one pair or image with their floats."""
    place = tmp_path_factory.mktemp("runs")
    photos = save_photos(place / "photos")
    run_analysis(make_plan(MatchConfig(data=str(photos), pairs=1, max_evals=60), TinyEncoder()), place / "match")
    for analysis, options in OPTIONS.items():
        more = {} if analysis == "spectrum" else {"target": str(photos / "class1" / "photo1.png")}
        config = VERBS[analysis].CONFIG(source=str(photos / "class0" / "photo0.png"), **options, **more)
        run_analysis(make_plan(config, TinyEncoder()), place / analysis)
    found = {}
    for analysis, layout in LAYOUTS.items():
        record = read_record(place / analysis)
        (path,) = shards.shard_files(place / analysis, layout)
        floats, costs = {}, {}
        if shards.float_file(path).exists():
            floats, costs = shards.read_floats(shards.float_file(path))
        rows = shards.read_shard(path, images=True, layout=layout)
        rows = [row | {"cost": costs.get(row[layout.item])} for row in rows]
        found[analysis] = (layout, record, record[layout.listed][0], rows, floats)
    return found


def problems_of(run: tuple, rows: list[dict[str, Any]]) -> list:
    layout, record, item, _, floats = run
    found = check_item("folder/rows.parquet", layout, TinyEncoder(), record["settings"], rows, floats)[1]
    listed = item if all(row[layout.item] == item[layout.item] for row in rows) else None
    return [*check_stated("folder/rows.parquet", layout, record, listed, rows), *found]


def changed(value: Any, feature: Any) -> Any:
    """Another value of the same kind, by a little."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else 1.5 * value + 0.1
    if isinstance(value, str):
        return value + "!"
    if isinstance(value, bytes):
        return b""
    if isinstance(value, list):
        return [*value[:-1], changed(value[-1], feature)] if value else [1.0]
    return "!" if getattr(feature, "dtype", "") == "string" else 1.0


@pytest.mark.parametrize("analysis", LAYOUTS)
def test_rows_that_are_as_they_were_made(analysis, runs):
    assert problems_of(runs[analysis], runs[analysis][3]) == []
    if len(rows := runs[analysis][3]) > 2:
        assert problems_of(runs[analysis], [rows[1], rows[0], *rows[2:]])  # in another order


@pytest.mark.parametrize(("analysis", "column"), COLUMNS, ids=["-".join(case) for case in COLUMNS])
def test_every_column_is_compared_or_named(analysis, column, runs):
    layout, _, _, rows, _ = run = runs[analysis]
    last = rows[-1] | {column: changed(rows[-1][column], (layout.features | PROVENANCE_FEATURES).get(column))}
    found = {problem.column for problem in problems_of(run, [*rows[:-1], last])}
    if column in ("seconds", "num_evals", "versions") and (analysis, column) != ("match", "num_evals"):
        assert not found
        assert column in UNVERIFIED
    else:
        assert found & {column, layout.item, "step", "index"}, found


def test_a_fit_that_exists_by_rounding_is_named(runs):
    _, _, _, rows, _ = runs["lipschitz"]
    made = rows[0] | {"regional_at_center": 1.0, "regional_clever": None}
    beside = lipschitz._beside(rows[0] | {"regional_clever": 2.0}, dict(made))
    assert beside["regional_clever"] == 2.0
    assert "regional_clever" in beside["left_open"][0]
    beside = lipschitz._beside(rows[0] | {"regional_clever": 2.0}, made | {"regional_at_center": None})
    assert beside["regional_clever"] is None  # no ball was asked for


def test_a_ninth_of_a_small_error_is_found(runs):
    _, record, _, rows, _ = runs["lipschitz"]
    made = rows[0] | {"largest": 1.0, "least_error": 0.0, "value_error": 4e-14}
    least, _ = lipschitz.tolerances(made, record["settings"] | {"dtype": "float64"})["value_error"]
    assert least > 4e-14 / 9


@pytest.mark.parametrize(
    ("stated", "made", "limit", "holds"),
    [
        (1.0, 1.05, 0.1, True), (1.0, 1.2, 0.1, False), (1.0, 1.2, None, False), (float("nan"), 1.0, 0.1, False),
        (None, None, 0.1, True), (None, 1.0, 0.1, False), (0.0, None, (0.0, 1.0), False), (0.5, 9.0, (0.0, 1.0), True),
        (1.5, 0.5, (0.0, 1.0), False), ("cat", "cat", None, True), ("cat", "dog", None, False),
        ([1.0, 2.0], [1.0, 2.1], [0.0, 0.2], True), ([1.0, 2.0], [1.0, 2.1], 0.05, False),
        ([1.0], [1.0, 2.0], 9, False),
        ([{"a": 1.0, "b": "x"}], [{"a": 1.1, "b": "x"}], [{"a": 0.2}], True),
        ([{"a": 1.0, "b": "x"}], [{"a": 1.1, "b": "y"}], [{"a": 0.2}], False),
        (torch.zeros(3), torch.full((3,), 0.1), 0.2, True), (torch.zeros(3), torch.full((3,), 0.1), None, False),
    ],
)  # fmt: skip
def test_agrees(stated, made, limit, holds):
    assert agrees(stated, made, limit) is holds
