"""The geometry benchmark measures what it says: its counts, its truth, its uncorrected walk, and its tables."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from cases import SIGMA, images, linear, smooth_mlp
from runcases import SCRIPT, python

from hf_equiv import Encoder, Jacobian, jacobian_spectrum, load_images
from hf_equiv.conditions import admit

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench():
    """The modules of the script, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        patch.syspath_prepend(str(BENCH))
        found = {name: importlib.import_module(f"geometry_{name}") for name in ("peers", "rows", "walk", "tables")}
        yield {**found, "script": importlib.import_module("geometry")}
    for name in [name for name in sys.modules if name.startswith("geometry") or name in ("match", "meter", "methods")]:
        del sys.modules[name]


def test_products_by_double_backward_are_counted(bench):
    counter = bench["peers"].Watched(smooth_mlp())
    admit(counter, images(1))
    with counter.measure():
        J = Jacobian(counter, images(1)[0])
        J.mv(torch.ones(5, *J.image.shape))
        J.rmv(torch.ones(3, J.shape[0]))
    assert (counter.tangents, counter.cotangents) == (5, 3 + 1)  # one for the graph of the transpose
    assert counter.num_evals == pytest.approx(J.num_evals)


def test_the_library_counts_as_the_counter_does(bench):
    counter = bench["peers"].Watched(linear())
    admit(counter, images(1))
    with counter.measure():
        found = jacobian_spectrum(counter, images(1), k=2, method="golub_kahan")
    # the check that f is deterministic is the one forward the library leaves out
    assert 0 <= counter.num_evals - float(found.num_evals[0]) <= 2 / 3


def test_the_counter_lends_the_attributes_of_the_encoder(bench):
    counter = bench["peers"].Watched(linear())
    assert counter.A is counter.encoder.A
    with pytest.raises(AttributeError):
        counter.double  # noqa: B018


def test_the_truth_is_that_of_the_case(bench):
    exact = bench["rows"].Exact.at(linear(), images(1))
    torch.testing.assert_close(exact.sigma, SIGMA, rtol=1e-12, atol=0)
    v = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (v.flatten(1).double() @ linear().A.T).norm(dim=1).tolist()
    assert exact.lengths(v) == pytest.approx(expected)


def test_top_rows_are_accurate_and_their_bounds_hold(bench):
    f, image, runner = smooth_mlp(), images(1), bench["rows"].Bench()
    rows = {
        row["method"]: row for row in bench["rows"].top_rows(runner, f, image, bench["rows"].Exact.at(f, image), 3, 0)
    }
    ran = {"top", "full", next(name for name in rows if name.startswith("bare"))}
    assert set(rows) >= ran
    assert sum(name.startswith("bare") for name in rows) == 1
    for name in ("top", "full"):
        assert rows[name]["held"]
        assert rows[name]["error"] <= rows[name]["bound"] < 1e-3
    assert rows["full"]["count"] == 12
    titles = {method.title: name for name, method in bench["peers"].TOP.items()}
    skipped = {titles[title] for title in runner.skipped}
    assert set(rows) | skipped | {"bare-8", "bare-48"} == set(bench["peers"].TOP)


@pytest.mark.parametrize("name", ["scipy", "scipy-1e-4", "curvlinops", "skerch", "plenoptic-rsvd", "plenoptic-power"])
def test_peers_find_the_singular_values(bench, name):
    method = bench["peers"].TOP[name]
    if not bench["peers"].installed(method.needs):
        pytest.skip(f"{method.needs} is not installed")
    counter = bench["peers"].Watched(linear())
    values = method.run(counter, images(1), 3, 0).values
    converges = name in ("scipy", "scipy-1e-4", "curvlinops")  # the others stop after a fixed number of passes
    torch.testing.assert_close(values, SIGMA[:3], rtol=1e-4 if converges else 5e-2, atol=0)
    assert min(counter.tangents, counter.cotangents) >= 3


def test_a_peer_that_fails_is_skipped_and_the_library_is_not(bench):
    runner = bench["rows"].Bench()

    def fail():
        raise MemoryError("too large")

    assert runner.attempt("peer", "torch", fail) is None
    assert runner.attempt("absent", "no_such_peer.part", fail) is None
    assert runner.skipped == {"peer": "MemoryError: too large", "absent": "no_such_peer is not installed"}
    with pytest.raises(MemoryError):
        runner.attempt("ours", "hf_equiv", fail)


def test_null_directions_get_no_number_from_the_library(bench):
    f, image = smooth_mlp(), images(1)
    rows = bench["rows"].local_rows(bench["rows"].Bench(), f, image, bench["rows"].Exact.at(f, image), 0)
    rows = {row["method"]: row for row in rows}
    assert rows["**hf_equiv**, null directions"]["stated"] == [None] * 8
    naive = rows["forward secant, h = 1e-05, null directions"]
    assert min(naive["stated"]) > 100 * max(naive["true"])
    for kind in ("the top direction", "random directions"):
        ours = rows[f"**hf_equiv**, {kind}"]
        assert ours["stated"] == pytest.approx(ours["true"], rel=1e-2)
    assert rows["**hf_equiv**, the top direction"]["true"] == pytest.approx([ours["sigma_max"]], rel=1e-4)


def test_the_euler_walk_ends_at_the_drift_that_was_asked_for(bench):
    f, image = smooth_mlp(), images(1)
    rows = bench["walk"].walk_rows(f, image, 5, 0)
    ours, euler = rows
    assert ours["drift"] <= 1.2e-5
    assert euler["drift"] == pytest.approx(1e-4, rel=0.15)
    assert (euler["jacobians"], euler["points"], ours["points"]) == (5, 5, 5)
    assert euler["num_evals"] == pytest.approx(5 * (1 + 2 * 12) / 3)
    assert ours["l2"] > euler["l2"]
    assert euler["l2"] <= euler["arc_length"] * (1 + 1e-9)


def test_regional_rows_compare_one_margin(bench):
    encoder = Encoder.from_pretrained("builtin-64")
    image = encoder.preprocess([load_images("builtin")[0].image])
    sigma = float(jacobian_spectrum(encoder, image, k=1).sigma_max[0])
    runner = bench["rows"].Bench()
    rows = bench["rows"].regional_rows(runner, encoder, image, sigma, 0, num_steps=2, num_batches=5, batch_size=1)
    kinds = [(row["of"], row["method"]) for row in rows]
    assert kinds[:2] == [("embedding", "**hf_equiv**, lower bound"), ("embedding", "hf_equiv, CLEVER (same run)")]
    assert len(rows) == 5 - ("ART clever_t" in runner.skipped)
    for row in rows:
        if row["checked"] is not None:
            assert row["checked"] == pytest.approx(1, abs=1e-4)
            assert row["value"] >= row["at_center"] * (1 - 1e-3)
    if "ART clever_t" not in runner.skipped:
        assert rows[-1]["radius"] <= 1
        assert rows[-1]["num_evals"] == pytest.approx(160, abs=3)
    assert bench["tables"].regional_table(rows).count("\n| ") == 1 + len(rows)


def test_tables_have_a_line_for_every_method(bench):
    f, image, runner = smooth_mlp(), images(1), bench["rows"].Bench()
    exact = bench["rows"].Exact.at(f, image)
    report = {
        "model": "mlp",
        "readout": "cls",
        "data": "noise",
        "settings": {"k": 3, "num_steps": 2, "seed": 0},
        "machine": "this one",
        "versions": {"torch": torch.__version__},
        "skipped": {"magic": "magic is not installed"},
        "top": bench["rows"].top_rows(runner, f, image, exact, 3, 0),
        "local": bench["rows"].local_rows(runner, f, image, exact, 0),
        "regional": [],
        "walk": bench["walk"].walk_rows(f, image, 2, 0),
    }
    for section in ("top", "local", "walk"):
        report[section] = [{"image_id": "0", **row} for row in report[section]]
    json.dumps(report, allow_nan=False)
    text = bench["tables"].tables(report)
    assert text.count("\n| ") == sum(len(report[section]) + 2 for section in ("top", "local", "walk"))
    assert "mlp (cls), 1 image of noise, seed 0" in text
    assert "Skipped: magic (magic is not installed)." in text


def test_script_runs_reports_and_writes(tmp_path):
    given = ["--model", "builtin-64", "--limit", "1", "--num-steps", "1", "--sections", "walk"]
    given += ["--json", "bench.json", "--markdown", "bench.md"]
    done = python(SCRIPT, BENCH / "geometry.py", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in report["walk"]] == ["**hf_equiv**", "Euler in the null space, no correction"]
    assert not report["top"]
    table = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert done.stdout == table
    assert "Walks of 1 steps" in table
    assert f"torch {torch.__version__}" in table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sections", "magic"], "unknown section magic; choose from top, lipschitz, walk"),
        (["--limit", "0"], "--limit must be at least 1; got 0"),
    ],
)
def test_script_refuses_what_it_does_not_know(bench, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        bench["script"].parse(flags)
    assert message in capsys.readouterr().err
