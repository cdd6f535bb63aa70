"""The benchmark measures what it says: the meter counts right, and the script runs and reports."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

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


def test_the_calls_and_their_backward_passes_are_noted(meter):
    x = images(2).requires_grad_(True)
    with meter.measure():
        z = meter(x)
        torch.autograd.grad(z, x, torch.ones(3, *z.shape), is_grads_batched=True, retain_graph=True)
        torch.autograd.grad(z, x, torch.ones_like(z))
        meter(images(1))
    assert [meter_module.shape_of(call) for call in meter.calls] == [(2, 3, 1), (1,)]


def test_what_is_done_outside_the_encoder_is_counted():
    f, x = meter_module.Watched(smooth_mlp()), images(2).requires_grad_(True)
    ones = torch.ones(2, DIM)

    def work():
        for _ in range(4):
            (gradient,) = torch.autograd.grad(f(x), x, ones)
            float(gradient.view(-1).sum())  # a view, a sum, and a look that waits for it
            gradient[gradient > 0]  # a mask, and an index that waits for its size
        torch.autograd.grad(f(x), x, ones.expand(5, 2, DIM), is_grads_batched=True)
        with torch.no_grad():
            f(x)

    _, seen = meter_module.outside(f, x.detach(), work)
    assert seen == {"operations": 4 * 5 + 1, "synchronisations": 4 * 2}  # and the `expand`


def test_the_clock_stands_still_while_a_call_is_repeated_bare(monkeypatch):
    clock, f = SimpleNamespace(now=0.0), linear()
    monkeypatch.setattr(meter_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slow(x):
        clock.now += len(x)
        return f(x)

    paired, x = meter_module.Paired(slow, images(1), every=2), images(2).requires_grad_(True)
    with paired.measure():
        for _ in range(6):
            paired(x).sum().backward()
            clock.now += 0.5
    assert paired.seconds == 6 * 2 + 6 * 0.5
    assert len(paired.times[2, 1]) == 3  # after 1, 3 and 5 evaluations
    assert (paired.seconds_of((2, 1)), paired.seconds_of((1,)), paired.num_evals) == (2.0, 1.0, 12.0)


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


def test_throughput_reports_every_part(monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        throughput = importlib.import_module("throughput")
    for name in ("throughput", "match", "meter", "methods"):
        monkeypatch.delitem(sys.modules, name)

    class Here:
        """Carries out in this process what is meant for another."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, work, *given):
            return SimpleNamespace(result=lambda: work(*given))

    monkeypatch.setattr(throughput, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(throughput, "lower_peak", lambda _: None)  # which changes how this process takes memory
    given = ["--model", "builtin-64", "--batch", "2", "--dtype", "bfloat16", "--max-evals", "12", "--device", "cpu"]
    throughput.main([*given, "--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")])
    (row,) = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["rows"]
    assert row["seconds"]["match"]["evaluations"] == sum(row["seconds"]["evaluations_match"]) == 24
    assert all(min(row["seconds"][name].values()) > 0 for name in ("match", "refine"))
    assert min(row["counts"]["evaluation"].values()) > 0
    assert min(row["memory"].values()) >= 0
    text = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    assert "| builtin-64 | cpu, bfloat16 | 2 | 0 of 2 |" in text
