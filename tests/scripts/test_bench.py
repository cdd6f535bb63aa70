"""The benchmark measures what it says: the meter counts right, and the script runs and reports."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from cases import DIM, images, linear, smooth_mlp
from runcases import SCRIPT, python

from hf_equiv import LBFGS, Adam, GradientDescent, match_embedding, refine_8bit
from hf_equiv.conditions import admit

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
spec = importlib.util.spec_from_file_location("meter", BENCH / "meter.py")
meter_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(meter_module)
Meter = meter_module.Meter


@pytest.fixture
def meter():
    return Meter(smooth_mlp(), images(1, seed=1), rtol=1e-5, max_evals=50)


def test_only_what_happens_while_measuring_counts(meter):
    meter(images(4))
    assert meter.num_evals == 0
    with meter.measure():
        meter(images(4))
    assert meter.num_evals == pytest.approx(4 / 3)


def test_forward_and_backward_of_one_image_is_one_evaluation(meter):
    x = images(4).requires_grad_(True)
    with meter.measure():
        meter(x).sum().backward()
    assert (meter.forwards, meter.cotangents, meter.num_evals) == (4, 4, 4.0)


def test_batched_cotangents_are_counted_each(meter):
    x = images(1).requires_grad_(True)
    basis = torch.eye(DIM)[:, None]
    with meter.measure():
        torch.autograd.grad(meter(x), x, basis, is_grads_batched=True)
    assert (meter.forwards, meter.cotangents) == (1, DIM)
    with meter.measure():
        _, vjp = torch.func.vjp(meter, images(1))
        torch.vmap(vjp)(basis)
    assert (meter.forwards, meter.cotangents) == (2, 2 * DIM)
    assert meter.num_evals == pytest.approx(2 * (1 + 2 * DIM) / 3)


def test_tangents_are_counted_each(meter):
    x = images(2)
    with meter.measure():
        torch.func.jvp(meter, (x,), (torch.ones_like(x),))
    assert (meter.forwards, meter.tangents, meter.cotangents) == (2, 2, 0)
    with meter.measure():
        torch.vmap(lambda v: torch.func.jvp(meter, (x,), (v,))[1])(torch.ones(5, *x.shape))
    assert (meter.forwards, meter.tangents) == (4, 12)


def test_a_peer_is_stopped_at_its_budget(meter):
    with meter.measure(stops=True):
        while True:
            meter(images(1).requires_grad_(True)).sum().backward()
    assert meter.num_evals == 50


def test_a_peer_is_stopped_at_the_tolerance(meter):
    arrived = False
    with meter.measure(stops=True):
        meter(meter.target.clone().requires_grad_(True))
        arrived = True
    assert not arrived
    assert meter.best_error == 0.0
    assert set(meter.reached) == set(meter_module.LEVELS)


def test_an_image_outside_the_box_counts_as_its_clipped_image():
    target = images(1, seed=1)
    f = linear()
    meter = Meter(f, target, rtol=1e-5, max_evals=50)
    null = torch.linalg.svd(f.A).Vh[-1].view(target.shape).float()
    outside = target + 20 * null  # embeds as the target, far outside the box
    assert meter.error(outside) < 1e-5
    with meter.measure():
        meter(outside)
    assert torch.equal(meter.best_image, outside.clamp(0, 1))
    assert meter.best_error == pytest.approx(meter.error(outside.clamp(0, 1)))
    assert meter.best_error > 1e-3
    assert meter.num_evals == pytest.approx(1 / 3)


@pytest.mark.parametrize("solver", [LBFGS(), Adam(), GradientDescent()], ids=lambda solver: type(solver).__name__)
def test_the_library_counts_its_evaluations_as_the_meter_does(solver, meter):
    source = images(1)
    admit(meter, source, noise=True)
    with meter.measure():
        match = match_embedding(meter, source, meter.z, solver, rtol=1e-5, max_evals=50, raise_on_failure=False)
    assert match.num_evals.item() == pytest.approx(meter.num_evals)
    before = meter.num_evals
    with meter.measure():
        exact = refine_8bit(meter, match.images, meter.z, source=source, max_evals=50)
    assert exact.num_evals.item() == pytest.approx(meter.num_evals - before)


def test_script_reports_every_method_and_skips_absent_peers(tmp_path):
    given = ["--model", "builtin-64", "--pairs", "1", "--max-evals", "60"]
    given += ["--methods", "lbfgs,paper,scipy,plenoptic-adam", "--json", "bench.json", "--markdown", "bench.md"]
    done = python(SCRIPT, BENCH / "match.py", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    names = ["lbfgs", "paper", "scipy", *([] if report["skipped"] else ["plenoptic-adam"])]
    assert [row["method"] for row in report["rows"]] == [row["method"] for row in report["summary"]] == names
    if report["skipped"]:
        assert "plenoptic-adam is skipped: plenoptic is not installed." in done.stderr
    rows = {row["method"]: row for row in report["rows"]}
    assert rows["lbfgs"]["error"] < rows["paper"]["error"]
    assert rows["lbfgs"]["error_8bit"] <= rows["lbfgs"]["error_rounded"]
    assert all(rows[name]["num_evals"] <= 61 for name in names)
    table = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 1 + len(names)
    assert f"torch {torch.__version__}" in table


def test_script_names_unknown_methods(tmp_path):
    done = python(SCRIPT, BENCH / "match.py", "--methods", "magic", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown method magic" in done.stderr
