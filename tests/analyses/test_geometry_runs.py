"""Runs of spectrum, lipschitz and walk: rows, files, resume, refusals, figures, command line, and what verify says."""

import importlib
import io
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fakes import SIZE, TinyEncoder
from PIL import Image
from runcases import python

from hf_equiv.analyses import figures, lipschitz, make_plan, run, run_analysis, spectrum
from hf_equiv.analyses.config import ImageConfig
from hf_equiv.analyses.lipschitz import LipschitzConfig, parse_directions
from hf_equiv.analyses.measures import open_png
from hf_equiv.analyses.plan import RunRows
from hf_equiv.analyses.run import VERBS
from hf_equiv.cli import environment
from hf_equiv.data.image_file import decode_png
from hf_equiv.models.encoder import Encoder
from hf_equiv.results import Status
from hf_equiv.runs import resume, shards
from hf_equiv.runs.schema import LAYOUTS, PROVENANCE_FEATURES
from hf_equiv.runs.shards import sha256_file
from hf_equiv.verify import directory
from hf_equiv.verify.rows import agrees

main = importlib.import_module("hf_equiv.cli.main")  # `hf_equiv.cli.main` is the function

CONTRACT = {
    "spectrum": "image_id singular_values rank nullity structural_zeros near_structural effective_rank sigma_max "
    "rank_threshold method error_bound",
    "lipschitz": "image_id direction index value jvp radii secants noise_floor noise_method plateau status",
    "walk": "image_id step drift arc_length l2 linf psnr_db label prob",
}
FOLDERS = {"spectrum": "spectra", "lipschitz": "lipschitz", "walk": "paths"}
FIGURES = {
    "spectrum": {"spectra.png", "invariance.png"},
    "lipschitz": {"secants.png", "constants.png"},
    "walk": {"walk.gif", "frames.png", "drift.png"},
}
OPTIONS = {
    "spectrum": {},
    "lipschitz": {"directions": "random:3,top:2,row:2,null:3,gradient,toward", "linearity": True, "regional": 0.5},
    "walk": {"num_steps": 4, "step": 0.3},
}
every_analysis = pytest.mark.parametrize("analysis", OPTIONS)


def config_of(analysis: str, photos: Path, **changes) -> ImageConfig:
    return replace(VERBS[analysis].CONFIG(data=str(photos), limit=2, **OPTIONS[analysis]), **changes)


def finish(analysis: str, photos: Path, out: Path, **changes):
    return run_analysis(make_plan(config_of(analysis, photos, **changes), TinyEncoder()), out)


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory) -> Path:
    from fakes import save_photos

    return save_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def finished(photo_folder, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind, each image in a file of its own."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "FILE_ITEMS", 1)
        for analysis in OPTIONS:
            assert finish(analysis, photo_folder, place / analysis).completed
    return {analysis: place / analysis for analysis in OPTIONS}


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())

    def copy(analysis: str) -> Path:
        return Path(shutil.copytree(finished[analysis], tmp_path / "copy"))

    return copy


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what a run leaves ---


@pytest.mark.parametrize("analysis", ["spectrum", "walk"])
def test_images_made_together_have_the_rows_of_each(analysis, photo_folder, monkeypatch):
    """As on a GPU, where one that fails is made again alone."""
    plan, verb = make_plan(config_of(analysis, photo_folder), TinyEncoder()), VERBS[analysis]
    part = [run._load(plan, item) for item in plan.items]

    def made(some):
        rows, floats = [], {}
        for _, own in verb.make_rows(plan, some, 32, lambda *_, **__: None):
            rows += [{key: value for key, value in row.items() if key != "seconds"} for row in own.rows]
            floats |= {name: image.tolist() for name, image in own.floats.items()}
        return rows, floats

    (first, ours), (second, theirs) = made(part[:1]), made(part[1:])
    assert made(part) == (first + second, ours | theirs)
    if analysis == "walk":
        real, ends = verb.trace_level_set, (Status.ERROR, Status.COMPLETED)
        monkeypatch.setattr(verb, "trace_level_set", lambda *a, **k: replace(real(*a, **k), status=ends))
        rows = verb.make_rows(plan, part, 32, lambda *_, **__: None)
        assert next(rows)[0] is part[1]
        with pytest.raises(RuntimeError, match="The image failed"):
            next(rows)


def test_a_target_that_one_image_cannot_match_leaves_the_other_walks(photo_folder, monkeypatch):
    target = str(photo_folder / "class1" / "photo1.png")
    plan = make_plan(config_of("walk", photo_folder, heading="nearest", target=target, num_steps=1), TinyEncoder())
    part, verb = [run._load(plan, item) for item in plan.items], VERBS["walk"]

    def match(encoder, image, target, *_):
        if image is part[0].image:
            raise RuntimeError("no match of the target")
        return target, 1.0, 0.0

    monkeypatch.setattr(verb, "match_target", match)
    rows = verb.make_rows(plan, part, 32, lambda *_, **__: None)
    assert next(rows)[0] is part[1]
    with pytest.raises(RuntimeError, match="no match of the target"):
        next(rows)


@every_analysis
def test_rows_and_files(analysis, finished):
    out, layout = finished[analysis], LAYOUTS[analysis]
    record = json.loads((out / "run.json").read_text())
    assert record["analysis"] == analysis
    assert record["complete"]
    assert set(record["files"]) == {name for name in snapshot(out) if name != "run.json"}
    assert all(sha256_file(out / name) == digest for name, digest in record["files"].items())
    assert {p.name for p in (out / "figures").iterdir()} == FIGURES[analysis]
    assert [p.name for p in (out / FOLDERS[analysis]).iterdir()].count("part-00000.parquet") == 1
    rows = list(shards.read_rows(out, layout=layout))
    assert list(rows[0])[: len(CONTRACT[analysis].split())] == CONTRACT[analysis].split()
    assert set(PROVENANCE_FEATURES) <= set(rows[0])
    assert {row["model_id"] for row in rows} == {"builtin"}
    columns = pq.read_schema(next((out / FOLDERS[analysis]).iterdir())).names
    assert columns[0] == ("frame" if analysis == "walk" else "image")


@every_analysis
def test_datasets_loads_it(analysis, finished, tmp_path):
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset(str(finished[analysis]), FOLDERS[analysis], split="train", cache_dir=cache)
    assert rows[0]["frame" if analysis == "walk" else "image"].size == (SIZE, SIZE)


def test_spectrum_is_that_of_a_dense_jacobian(finished):
    encoder = TinyEncoder(dtype=torch.float64)
    for row in shards.read_rows(finished["spectrum"], images=True, layout=LAYOUTS["spectrum"]):
        x = (
            torch.tensor(np.asarray(Image.open(io.BytesIO(row["image"]))), dtype=torch.float64).permute(2, 0, 1)[None]
            / 255
        )
        J = torch.autograd.functional.jacobian(encoder, x).flatten(1).view(12, -1)
        assert row["singular_values"] == pytest.approx(torch.linalg.svdvals(J).tolist(), rel=1e-5)
        assert (row["rank"], row["nullity"], row["method"]) == (12, 3 * SIZE * SIZE - 12, "full")


def test_lipschitz_names_every_kind_and_gives_null_no_number(finished):
    rows = list(shards.read_rows(finished["lipschitz"], layout=LAYOUTS["lipschitz"]))
    kinds = [row["direction"] for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "random": 6, "top": 4, "row": 4, "null": 6, "gradient": 2, "toward": 2,
    }  # fmt: skip
    for row in rows:
        assert (row["value"] is None) == (row["status"] != "resolved")
        assert len(row["secants"]) == len(row["noise_floor"]) == len(row["radii"]) == 21
        assert row["linearity_radius"] > 0
        assert row["regional_lower_bound"] >= row["regional_at_center"] > 0
        assert (row["radius"], row["norm"]) == (0.5, "l2")
        if row["direction"] == "null":
            assert row["status"] == "undetermined"
        else:
            assert row["value"] == pytest.approx(row["jvp"], rel=1e-3)


def test_walk_stays_on_the_level_set(finished):
    encoder = TinyEncoder()
    rows = list(shards.read_rows(finished["walk"], images=True, layout=LAYOUTS["walk"]))
    for part in sorted((finished["walk"] / "float").iterdir()):
        floats, _ = shards.read_floats(part)
        (name,) = {key.removesuffix("/frames") for key in floats if key.endswith("/frames")}
        own = [row for row in rows if row["image_id"] == name]
        assert [row["step"] for row in own] == [0, 1, 2, 3, 4]
        z = encoder(floats[f"{name}/frames"]).double()
        assert float(((z - z[0]).norm(dim=1) / z[0].norm()).max()) <= 1.1e-5
        assert own[4]["l2"] == pytest.approx(
            float((floats[f"{name}/frames"][4] - floats[f"{name}/origin"]).norm()), 1e-4
        )
        assert own[4]["l2"] > 0.9
        assert len({row["label"] for row in own}) == 1
        assert own[0]["psnr_db"] is None


def test_vectors_are_kept(photos, tmp_path):
    out = tmp_path / "out"
    outcome = finish("spectrum", photos, out, k=3, vectors=True)
    assert {p.name for p in (out / "figures").iterdir()} == {"spectra.png", "vectors.png"}
    floats, _ = shards.read_floats(out / "float" / "part-00000.safetensors")
    right = floats[f"{outcome.rows[0]['image_id']}/right"].flatten(1)
    assert torch.allclose(right @ right.T, torch.eye(3), atol=1e-5)
    assert outcome.rows[0]["rank"] is None or len(outcome.rows[0]["singular_values"]) == 3


@pytest.mark.parametrize("heading", ["away", "toward", "nearest", "connect"])
def test_headings(heading, photos, tmp_path, monkeypatch):
    target = photos / "class1" / "photo1.png"
    source = photos / "class0" / "photo0.png"
    changes = {"heading": heading, "data": None, "limit": None, "source": str(source)}
    if heading != "away":
        changes["target"] = str(target)
    outcome = finish("walk", photos, tmp_path / "out", **changes)
    assert outcome.completed
    rows = outcome.rows
    if heading in ("toward", "connect"):
        assert rows[-1]["remaining"] < rows[0]["remaining"]
    if heading == "nearest":
        assert rows[-1]["l2"] < rows[0]["l2"]
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    report = directory.verify_run(tmp_path / "out")
    assert report.problems == ()


# --- going on, and refusing to ---


KILLED = """
    import json, os, signal, sys
    from pathlib import Path
    from fakes import TinyEncoder, shorten_searches
    from hf_equiv import analyses

    shorten_searches()

    def kill(progress):
        if progress.done == 1 and progress.stage != "saved":
            os.kill(os.getpid(), signal.SIGKILL)

    name, options = json.loads(sys.argv[1])
    plan = analyses.make_plan(getattr(analyses, name)(**options), TinyEncoder())
    analyses.run_analysis(plan, Path(sys.argv[2]), observer=kill)
"""


@every_analysis
def test_a_killed_run_goes_on(analysis, finished, photo_folder, tmp_path):
    out = tmp_path / "out"
    config = VERBS[analysis].CONFIG.__name__, {"data": str(photo_folder), "limit": 2} | OPTIONS[analysis]
    assert python(KILLED, json.dumps(config), out).returncode == -signal.SIGKILL
    kept = list(shards.read_rows(out, images=True, layout=LAYOUTS[analysis]))
    assert len({row["image_id"] for row in kept}) == 1
    outcome = finish(analysis, photo_folder, out)
    after = list(shards.read_rows(out, images=True, layout=LAYOUTS[analysis]))
    assert after[: len(kept)] == kept  # not made again: `seconds` are the same
    whole = list(shards.read_rows(finished[analysis], layout=LAYOUTS[analysis]))
    timed = ("seconds",)
    assert [{k: v for k, v in row.items() if k not in timed} for row in outcome.rows] == [
        {k: v for k, v in row.items() if k not in timed} for row in whole
    ]


def test_other_settings_are_refused_by_key(finished, photo_folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds a run of other settings: k \(null there, 2 asked\)"):
        finish("spectrum", photo_folder, finished["spectrum"], k=2)
    with pytest.raises(ValueError, match=r"other settings: analysis \(spectrum there, walk asked\)"):
        finish("walk", photo_folder, finished["spectrum"])
    plan = make_plan(config_of("walk", photo_folder), TinyEncoder())
    assert plan.default_out.parent == Path("runs") / "walk" / "builtin"
    assert resume.refuse_early(finished["walk"], plan, "missing") == 2


def test_overwrite_replaces_a_run_of_another_kind(photos, tmp_path):
    finish("walk", photos, tmp_path / "out")
    plan = make_plan(config_of("spectrum", photos), TinyEncoder())
    assert run_analysis(plan, str(tmp_path / "out"), overwrite="always").out == tmp_path / "out"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"spectra", "figures", "README.md", "run.json"}


def test_an_image_that_fails_costs_its_own_rows(photos, tmp_path, monkeypatch):
    real, bad = spectrum.jacobian_spectrum, TinyEncoder().preprocess([Image.open(photos / "class0" / "photo0.png")])[0]

    def fail(encoder, image, **options):
        if torch.equal(image[0], bad):
            raise RuntimeError("out of memory")
        return real(encoder, image, **options)

    monkeypatch.setattr(spectrum, "jacobian_spectrum", fail)
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    outcome = finish("spectrum", photos, tmp_path / "out", limit=6)
    assert sorted(row["status"] for row in outcome.rows) == ["completed"] * 5 + ["error"]
    assert list(outcome.errors.values()) == ["out of memory"]
    assert not outcome.completed
    report = directory.verify_run(tmp_path / "out")
    assert (report.problems, report.verified, report.error_rows) == ((), 5, 1)


@every_analysis
def test_a_torn_photo_of_a_data_set_costs_its_own_rows(analysis, photos, tmp_path):
    (photos / "class0" / "photo3.png").write_bytes(b"torn")
    chosen = {"limit": None, "k": 2} if analysis == "spectrum" else {"limit": None}
    options = {"lipschitz": {"directions": "random:1,toward", "linearity": False, "regional": None}}.get(analysis, {})
    outcome = finish(analysis, photos, tmp_path / "out", **chosen, **options)
    failed = {row["image_id"] for row in outcome.rows if row["status"] == "error"}
    before = {"class0/photo0.png"} if analysis == "lipschitz" else set()  # which is measured toward it
    assert failed == {"class0/photo3.png", *before} == set(outcome.errors)
    assert all("'class0/photo3.png' must be an image" in why for why in outcome.errors.values())
    with pytest.raises(ValueError, match=r"'class0/photo3\.png' must be an image"):
        finish(analysis, photos, tmp_path / "named", data=None, limit=None, source=str(photos))


def test_smaller_passes_are_tried_when_memory_runs_out(photos, tmp_path, monkeypatch):
    tried, real = [], spectrum.jacobian_spectrum

    def full(encoder, image, *, batch, **options):
        tried.append(batch)
        if batch > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(encoder, image, batch=batch, **options)

    monkeypatch.setattr(spectrum, "jacobian_spectrum", full)
    assert finish("spectrum", photos, tmp_path / "out").completed
    assert tried == [32, 16, 8, 8]


def test_the_largest_constant_in_an_linf_ball(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    outcome = finish("lipschitz", photos, tmp_path / "out", limit=1, regional=8 / 255, norm="linf", linearity=False)
    row = outcome.rows[0]
    assert row["regional_lower_bound"] >= row["regional_at_center"] > 0
    assert (row["norm"], row["radius"]) == ("linf", 8 / 255)
    assert directory.verify_run(tmp_path / "out").problems == ()


BAD = [
    ({"limit": 0}, "`limit` must be at least 1"),
    ({"source": "x.png"}, "`data` must not be combined with `source`"),
    ({"k": 0}, "`k` must be"),
    ({"k": 13}, "`k` must be at most the embedding size 12; got 13"),
    ({"target": "x.png"}, "`target` must come with"),
    ({"analysis": "walk", "stop": 0.1}, "`stop` must come with heading 'toward', 'nearest', 'connect'; got 0.1"),
    ({"analysis": "walk", "heading": "toward", "stop": 0.0}, "`stop` must be"),
    ({"analysis": "walk", "heading": "connect"}, "`target` must come with heading 'connect'"),
    ({"analysis": "walk", "heading": "sideways"}, "`heading` must be one of random"),
    ({"analysis": "walk", "step": -1.0}, "`step` must be"),
    ({"analysis": "lipschitz", "directions": "random"}, "`directions` must name each kind once, with a count"),
    ({"analysis": "lipschitz", "directions": "sideways:3"}, "`directions` must be a list of random:N"),
    ({"analysis": "lipschitz", "radii": (1e-3, 1.0)}, "`radii` must be at least 4 numbers; got 2"),
    ({"analysis": "lipschitz", "norm": "linf"}, "`norm` must come with `regional`"),
    ({"analysis": "lipschitz", "regional": 2.0, "norm": "linf"}, "`regional` must lie in (0, 1]"),
    ({"image_column": "picture"}, "`image_column` must come with a parquet file"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(changes, message, photos):
    options = {"analysis": "spectrum", "data": str(photos)} | changes
    config = VERBS[options.pop("analysis")].CONFIG(**options)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_plan(config, TinyEncoder())


def test_directions_are_read():
    assert parse_directions("top:2, gradient") == {"top": 2, "gradient": 1}


def test_radii_below_every_step_leave_a_run_without_figures(photo_folder, tmp_path, monkeypatch):
    radii = (1e-12, 1.5e-12, 2e-12, 3e-12)
    found = finish("lipschitz", photo_folder, tmp_path / "out", radii=radii, linearity=False, regional=None, limit=1)
    assert {row["status"] for row in found.rows} == {"undetermined"}
    assert not (tmp_path / "out" / "figures").exists()
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    assert directory.verify_run(tmp_path / "out").holds


# --- verify ---


def test_the_ladder_of_an_early_run_is_that_of_its_rows(copied):
    out = copied("lipschitz")
    record = json.loads((out / "run.json").read_text())
    record["settings"]["radii"] = None
    (out / "run.json").write_text(json.dumps(record))
    assert directory.verify_run(out).problems == ()


def tamper(out: Path, change, settings=None, analysis: str = "lipschitz") -> None:
    """Change the rows of each file, given with its place, and the settings; the checksums are made to fit."""
    record, layout = json.loads((out / "run.json").read_text()), LAYOUTS[analysis]
    for place, path in enumerate(shards.shard_files(out, layout)):
        rows = shards.read_shard(path, images=True, layout=layout)
        floats, _ = shards.read_floats(out / "float" / f"{path.stem}.safetensors")
        change(place, rows)
        shards.write_shard(out, place, rows, floats, {}, layout)
    record["settings"] |= settings or {}
    record["files"] |= {name: sha256_file(out / name) for name in record["files"]}
    (out / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("radii", [[None] * 4, [math.nan] * 21, [10**400] * 4], ids=lambda radii: str(radii[0])[:9])
def test_settings_with_radii_that_are_no_numbers_are_refused(radii, copied):
    out = copied("lipschitz")
    tamper(out, lambda *_: None, {"radii": radii})
    with pytest.raises(ValueError, match=r"run\.json' is damaged: .* Restore it"):
        directory.verify_run(out)


@pytest.mark.parametrize("radii", ["1e-5:1", {"from": 1e-5}, []], ids=json.dumps)
def test_settings_without_a_ladder_are_named(radii, copied):
    out = copied("lipschitz")
    tamper(out, lambda *_: None, {"radii": radii})
    report = directory.verify_run(out)
    assert {problem.column for problem in report.problems} == {"radii"}
    assert len(report.problems) == 2


@pytest.mark.parametrize("count", [10**9, 2**63])
def test_directions_without_rows_are_not_made(count, copied):
    out = copied("lipschitz")
    tamper(out, lambda *_: None, {"directions": {"random": count}})
    assert {problem.column for problem in directory.verify_run(out).problems} == {"directions"}


@pytest.mark.parametrize("radii", [None, [None] * 21, [math.nan] * 21], ids=str)
def test_an_early_row_without_a_ladder_is_named(radii, copied):
    out = copied("lipschitz")
    tamper(out, lambda place, rows: rows[0].update(radii=radii), {"radii": None})
    assert "radii" in {problem.column for problem in directory.verify_run(out).problems}


def test_an_early_image_with_a_ladder_of_its_own_is_named(copied):
    out = copied("lipschitz")

    def cut(place, rows):
        for row in rows if place == 1 else ():
            row |= {key: row[key][1:] for key in ("radii", "secants", "noise_floor")}

    tamper(out, cut, {"radii": None})
    named = [problem.pair_id for problem in directory.verify_run(out).problems if problem.column == "radii"]
    assert len(named) == 12


@pytest.mark.parametrize(
    ("analysis", "key", "value"),
    [("lipschitz", "directions", "random:2"), ("lipschitz", "linearity", None), ("walk", "step", "1"),
     ("walk", "num_steps", True), ("walk", "stop", "0.1"), ("spectrum", "k", [2]), ("spectrum", "vectors", 1),
     ("walk", "processor", "[1]")],
)  # fmt: skip
def test_damaged_settings_are_named(analysis, key, value, copied):
    out = copied(analysis)
    record = json.loads((out / "run.json").read_text())
    record["settings"][key] = value
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"is damaged: it lacks a valid value of settings\.{key}\."):
        directory.verify_run(out)


def test_another_target_is_named(copied):
    out = copied("lipschitz")
    tamper(out, lambda _, rows: rows[0].update(toward_id="another"))
    assert {problem.column for problem in directory.verify_run(out).problems} == {"toward_id"}


def test_a_borderline_value_is_held_against_the_derivative(copied, monkeypatch):
    out, real = copied("lipschitz"), lipschitz.rows_of

    def borderline(*results):
        return [
            row | {"value": None, "status": "undetermined", "value_error": 0.01 * row["jvp"]} for row in real(*results)
        ]

    def change(place, rows):
        rows[0] |= {"value": 3 * rows[0]["value"]}

    tamper(out, change)
    monkeypatch.setattr(lipschitz, "rows_of", borderline)
    named = [p.pair_id for p in directory.verify_run(out).problems if p.column == "value"]
    assert len(named) == 2
    assert all(name.endswith("random 0") for name in named)


@every_analysis
def test_a_finished_run_holds(analysis, copied):
    report = directory.verify_run(copied(analysis))
    assert report.problems == ()
    assert report.verified == report.rows > 0


TAMPERED = [
    ("spectrum", 0, "singular_values", lambda v: [v[0] * 1.001, *v[1:]]),
    ("spectrum", 0, "rank", lambda v: v - 1),
    ("spectrum", 0, "nullity", lambda v: v + 1),
    ("spectrum", 0, "effective_rank", lambda v: v + 0.1),
    ("spectrum", 0, "error_bound", lambda v: [10 * b for b in v]),
    ("spectrum", 0, "seed", lambda v: v + 1),
    ("lipschitz", 0, "value", lambda v: v * 1.01),
    ("lipschitz", 3, "jvp", lambda v: v * 1.01),
    ("lipschitz", 4, "secants", lambda v: [*v[:-1], v[-1] * 1.05]),
    ("lipschitz", 0, "noise_floor", lambda v: [20 * f for f in v]),
    ("lipschitz", 0, "noise_floor", lambda v: [f / 20 for f in v]),
    ("lipschitz", 0, "noise_method", lambda v: "twin"),
    ("lipschitz", 0, "value_error", lambda v: 0.0),
    ("lipschitz", 8, "value_error", lambda v: -v),
    ("lipschitz", 0, "plateau", lambda v: None),
    ("lipschitz", 0, "plateau", lambda v: v[:1]),
    ("lipschitz", 8, "plateau", lambda v: [1e-3, 1.0]),
    ("lipschitz", 1, "linearity_at_limit", lambda v: not v),
    ("lipschitz", 2, "radii", lambda v: [1.0001 * h for h in v]),
    ("lipschitz", 7, "status", lambda v: "resolved"),
    ("lipschitz", 2, "linearity_radius", lambda v: v * 2),
    ("lipschitz", 0, "regional_lower_bound", lambda v: v * 1.1),
    ("lipschitz", 0, "regional_at_center", lambda v: v * 1.1),
    ("lipschitz", 0, "regional_clever", lambda v: 2 * (v or 1.0)),
    ("lipschitz", 0, "index", lambda v: 5),
    ("walk", 2, "drift", lambda v: v + 1e-4),
    ("walk", 2, "drift_8bit", lambda v: v / 2),
    ("walk", 3, "l2", lambda v: v * 1.01),
    ("walk", 3, "arc_length", lambda v: v * 1.01),
    ("walk", 3, "psnr_db", lambda v: v + 1),
    ("walk", 1, "label", lambda v: "pear"),
    ("walk", 1, "prob", lambda v: v / 2),
    ("walk", 4, "status", lambda v: "drift_exceeded"),
    ("walk", 4, "stationarity", lambda v: 0.0),
]


@pytest.mark.parametrize(("analysis", "index", "column", "change"), TAMPERED, ids=[f"{t[0]}-{t[2]}" for t in TAMPERED])
def test_a_tampered_row_is_named(analysis, index, column, change, copied):
    out, layout = copied(analysis), LAYOUTS[analysis]
    path = shards.shard_files(out, layout)[0]
    rows = shards.read_shard(path, images=True, layout=layout)
    rows[index][column] = change(rows[index][column])
    floats, _ = shards.read_floats(out / "float" / f"{path.stem}.safetensors") if analysis != "spectrum" else ({}, {})
    shards.write_shard(out, 0, rows, floats, {}, layout)
    record = json.loads((out / "run.json").read_text())
    record["files"] |= {name: sha256_file(out / name) for name in record["files"]}
    (out / "run.json").write_text(json.dumps(record))
    report = directory.verify_run(out)
    named = [p for p in report.problems if p.pair_id is not None and p.pair_id.startswith(rows[index]["image_id"])]
    assert named, report.problems
    if column not in ("rank", "index") and not column.startswith("regional_"):
        assert any(p.column == column for p in named), [p.message for p in named]
    assert report.verified < report.rows


def test_a_walk_that_is_said_to_have_come_to_rest(photo_folder, tmp_path, monkeypatch):
    out, layout = tmp_path / "out", LAYOUTS["walk"]
    finish("walk", photo_folder, out, heading="toward", target=str(photo_folder / "class0" / "photo0.png"), limit=2)
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    assert directory.verify_run(out).holds
    path = shards.shard_files(out, layout)[-1]
    rows = shards.read_shard(path, images=True, layout=layout)
    assert rows[-1]["stationarity"] > 0.02
    rows[-1]["stationarity"] = 0.01
    floats, _ = shards.read_floats(out / "float" / f"{path.stem}.safetensors")
    shards.write_shard(out, int(path.stem[-5:]), rows, floats, {}, layout)
    (problem,) = (p for p in directory.verify_run(out).problems if p.pair_id is not None)
    assert problem.column == "stationarity"


def test_a_walk_ends_where_so_little_of_the_way_is_left_as_was_asked(photos, tmp_path, monkeypatch):
    out, given = tmp_path / "out", {"heading": "nearest", "data": None, "limit": None, "num_steps": 60}
    given |= {"source": str(photos / "class0" / "photo0.png"), "target": str(photos / "class1" / "photo1.png")}
    early = finish("walk", photos, out, stop=0.3, **given)
    late = finish("walk", photos, tmp_path / "late", **given)
    assert early.rows[-1]["stationarity"] <= 0.3 < early.rows[-2]["stationarity"]
    assert late.rows[-1]["stationarity"] <= 0.1
    assert len(early.rows) < len(late.rows)
    assert "It is as near as was asked: at most " in early.summary["verdict"]
    settings = make_plan(config_of("walk", photos, **given), TinyEncoder()).settings

    def told(status: str, num_steps: int) -> str:
        rows = [row | {"status": status} for row in early.rows]
        return VERBS["walk"].summarize(None, settings | {"num_steps": num_steps}, RunRows(rows))["verdict"]

    assert "All steps that were asked are made; at most " in told("completed", len(early.rows) - 1)
    assert "No nearer point was found; at most " in told("completed", 60)
    assert "A nearer point could not be brought back" in told("drift_exceeded", 60)
    record = json.loads((out / "run.json").read_text())
    assert (
        record["settings"]["stop"],
        make_plan(config_of("walk", photos, **given), TinyEncoder()).settings["stop"],
    ) == (0.3, 0.01)
    assert "--stop 0.3" in record["command"]
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    assert directory.verify_run(out).problems == ()
    record["settings"]["stop"] = 1e-4
    (out / "run.json").write_text(json.dumps(record))
    (problem,) = directory.verify_run(out).problems
    assert problem.column == "stationarity"
    assert "at most" in problem.message


def test_missing_frames_and_rows_are_named(copied, photo_folder, tmp_path, monkeypatch):
    out = copied("walk")
    (out / "float" / "part-00001.safetensors").unlink()
    (out / "paths" / "part-00000.parquet").unlink()
    messages = " ".join(problem.message for problem in directory.verify_run(out).problems)
    assert "is missing" in messages
    assert "/frames' of row" in messages
    assert "is listed and missing from paths/" in messages


# --- the command line ---


@pytest.fixture
def place(tmp_path, monkeypatch, photos):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "load_encoder", lambda model, **_: TinyEncoder())
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    return tmp_path


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = main._run([str(a) for a in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


FLAGS = {
    "spectrum": ["--k", "3", "--vectors"],
    "lipschitz": ["--directions", "random:2,null:2", "--radii", "1e-3:1", "--linearity"],
    "walk": ["--heading", "random", "--num-steps", "3", "--step", "0.2", "--rtol", "1e-4"],
}


@every_analysis
def test_commands(analysis, place, capsys):
    base = [analysis, "builtin", "--data", "photos", "--limit", "2", *FLAGS[analysis], "--out", "run"]
    code, out, _ = call(capsys, *base, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["dry_run"]["images_to_do"] == 2
    assert not (place / "run").exists()
    code, out, err = call(capsys, *base, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    result = json.loads(out)
    assert list(result) == ["analysis", "model", "revision", "out", "rows", "summary"]
    assert result["analysis"] == analysis
    assert list(result["rows"][0])[: len(CONTRACT[analysis].split())] == CONTRACT[analysis].split()
    code, out, err = call(capsys, *base)
    assert code == 0
    assert "check it:  hf-equiv verify run" in out
    assert "2 of 2 images on disk" in err
    code, out, _ = call(capsys, "verify", "run", "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    code, out, _ = call(capsys, "verify", "run")
    assert "hold" in out
    code, _, err = call(capsys, *base, "--seed", "3")
    assert code == 2
    assert "holds a run of other settings: " in err
    assert "seed (0 there, 3 asked)" in err


@every_analysis
def test_help_is_quick_and_lists_the_flags(analysis):
    start = time.perf_counter()
    script = (
        f"import sys; from hf_equiv.cli.main import _run; _run([{analysis!r}, '--help']); print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 5
    assert told.endswith("False\n")
    shared = """--source --data --limit --out --overwrite --seed --revision --readout --normalize --device --dtype
        --batch-size --image-column --label-column --cache-dir --local-files-only --dry-run --json -q""".split()
    assert all(flag in told for flag in [*shared, *(f for f in FLAGS[analysis] if f.startswith("--"))])


WRONG = [
    (["spectrum", "builtin", "--k", "99"], "--k must be at most the embedding size 12; got 99"),
    (["walk", "builtin", "--source", "photos", "--heading", "connect"], "--target must come with heading 'connect'"),
    (["walk", "builtin", "--step", "0"], "Invalid value for '--step': 0.0 is not in the range x>0."),
    (
        ["lipschitz", "builtin", "--radii", "a,b"],
        "Invalid value for '--radii': 'a,b' is not a list of numbers a,b,c or a range a:b with a below b.",
    ),
    (
        ["lipschitz", "builtin", "--radii", "1:1e-5"],
        "'1:1e-5' is not a list of numbers a,b,c or a range a:b with a below b.",
    ),
    (
        ["lipschitz", "builtin", "--directions", "top:13"],
        "top:K of --directions must ask for at most 12, the embedding size; got 13",
    ),
    (
        ["walk", "builtin", "--heading", "nearest", "--stop", "1.5"],
        "Invalid value for '--stop': 1.5 is not in the range 0<x<1.",
    ),
    (["lipschitz", "builtin", "--directions", "up:3"], "--directions must be a list of random:N"),
    (["spectrum", "builtin", "--limit", "3"], "--limit must come with --data"),
    (["spectrum", "builtin", "--source", "nowhere.png"], "'nowhere.png' does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_commands(arguments, message, place, capsys):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_direction_to_a_match(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "load_recorded", lambda *_: TinyEncoder())
    monkeypatch.setattr(figures, "lipschitz_figures", lambda *_: {})
    out = tmp_path / "out"
    outcome = finish("lipschitz", photos, out, limit=2, directions="toward,match,gradient", regional=None)
    assert [row["direction"] for row in outcome.rows] == ["gradient", "toward", "match"] * 2
    assert {row["status"] for row in outcome.rows} == {"resolved"}
    assert {(row["solver"], row["rtol"]) for row in outcome.rows} == {("lbfgs", 1e-5)}
    (path,) = (out / "float").iterdir()
    floats, encoder = shards.read_floats(path)[0], TinyEncoder()
    row = next(row for row in outcome.rows if row["direction"] == "match")
    source = decode_png(next(iter(shards.read_rows(out, images=True, layout=LAYOUTS["lipschitz"])))["image"])
    match, target = (floats[f"{row['image_id']}/{what}"] for what in ("match", "toward"))
    z = encoder(target[None])
    assert float((encoder(match[None]) - z).norm() / z.norm()) <= 1e-5
    v = (match - source).double()
    _, jvp = torch.func.jvp(lambda x: encoder(x), (source.double()[None],), (v[None] / v.norm(),))
    assert row["jvp"] == pytest.approx(float(jvp.norm()), rel=1e-3)
    assert directory.verify_run(out).problems == ()
    shards.write_atomic(path, shards.float_bytes(floats | {f"{row['image_id']}/match": target * 0.9}, {}))
    told = [problem.message for problem in directory.verify_run(out).problems if problem.column == "match"]
    assert len(told) == 1
    assert "the embedding error of the stored match is 0." in told[0]
    alone = LipschitzConfig(data=str(photos), limit=1, directions="match", target=str(photos / "x.png"))
    alone.check()
    with pytest.raises(ValueError, match="none for gradient, toward and match"):
        replace(alone, directions="match:2").check()


def test_a_spectrum_of_an_earlier_version_keeps_its_rule_of_the_rank():
    """Its threshold was 1000 eps σ₁ and its bounds were averages."""
    folder = Path(__file__).parent / "earlier_spectrum"
    (table,) = (folder / "spectra").glob("*.parquet")
    row = next(row for row in pq.read_table(table).to_pylist() if row["image_id"] == "coffee")
    settings = json.loads((folder / "run.json").read_text())["settings"]
    encoder = Encoder.from_pretrained("builtin-64", device="cpu")
    (made,) = spectrum.remake(encoder, settings, [row | {"image": open_png(encoder, row["image"]["bytes"])}], {})
    limits = spectrum.tolerances(made, settings)
    for column in ("singular_values", "error_bound", "rank_threshold", "rank", "nullity", "structural_zeros"):
        assert agrees(row[column], made[column], limits.get(column)), column
    tampered = row | {"rank_threshold": 2 * row["rank_threshold"], "image": open_png(encoder, row["image"]["bytes"])}
    (made,) = spectrum.remake(encoder, settings, [tampered], {})
    limit = spectrum.tolerances(made, settings)["rank_threshold"]
    assert not agrees(tampered["rank_threshold"], made["rank_threshold"], limit)
