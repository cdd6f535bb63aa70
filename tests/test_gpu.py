"""What only a CUDA device can show: its rows hold on a CPU, TF32 stays off, memory that runs out, a shared card."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from hf_equiv import (
    Encoder,
    LipschitzConfig,
    MatchConfig,
    SpectrumConfig,
    WalkConfig,
    directional_lipschitz,
    jacobian_spectrum,
    make_directions,
    make_plan,
    match_embedding,
    run_analysis,
    trace_level_set,
    verify_run,
)

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and a PyTorch built for it"),
]

RUNS = {
    "match": MatchConfig(data="builtin", pairs=2),
    "match with a ball": MatchConfig(data="builtin", pairs=2, radius=0.1, rtol=1e-2),
    "match from bf16": MatchConfig(data="builtin", pairs=2, dtype="bf16"),
    "spectrum": SpectrumConfig(data="builtin", limit=1, vectors=True),
    "lipschitz": LipschitzConfig(data="builtin", limit=1, directions="random:2,top:2,null:2,toward", linearity=True),
    "walk": WalkConfig(data="builtin", limit=1, num_steps=3),
}


@pytest.mark.parametrize("name", RUNS)
def test_rows_made_on_the_gpu_hold_on_a_cpu(name, tmp_path):
    encoder = Encoder.from_pretrained("builtin-64", device=DEVICE)
    outcome = run_analysis(make_plan(RUNS[name], encoder), tmp_path / "run", observer=False)
    assert outcome.completed, outcome.errors
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert ("bfloat16 start" in str(settings.get("solver"))) == (name == "match from bf16")
    report = verify_run(tmp_path / "run", device="cpu")
    assert (report.problems, report.verified) == ((), len(outcome.rows))


@contextmanager
def precision(rule: str):
    """What float32 products on a GPU are for the caller: `ieee` or `tf32`."""
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = rule
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


walk = partial(trace_level_set, heading="away", num_steps=3, keep_points=True, progress=False)
VERBS = {
    "match": lambda f, x, z: match_embedding(f, x, z, max_evals=20, raise_on_failure=False, progress=False).errors,
    "spectrum": lambda f, x, z: jacobian_spectrum(f, x, progress=False).singular_values,
    "lipschitz": lambda f, x, z: directional_lipschitz(f, x, make_directions(f, x, top=2), progress=False).jvp,
    "walk": lambda f, x, z: walk(f, x).paths[0][-1].pixels,
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_caller_who_allows_tf32_gets_the_same_numbers(verb, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    body = [torch.nn.Conv2d(3, 32, 4, 4), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(2048, 64)]
    f = torch.nn.Sequential(*body).eval().requires_grad_(False).to(DEVICE)
    x, z = torch.rand(1, 3, 32, 32).to(DEVICE), torch.randn(1, 64).to(DEVICE)
    plain, found = {}, {}
    for rule in ("ieee", "tf32"):
        with precision(rule):
            plain[rule], found[rule] = f(x), VERBS[verb](f, x, z)
    torch.testing.assert_close(found["tf32"], found["ieee"], rtol=1e-5, atol=1e-6)
    if torch.equal(plain["ieee"], plain["tf32"]):
        pytest.skip("this device has no TF32, so the rule made no difference")


class Crowded(Encoder):
    """Asks for a petabyte if it is to derive three images or more."""

    def __call__(self, pixels):
        torch.empty(pixels.requires_grad * len(pixels) // 3 * 2**50, dtype=torch.uint8, device=pixels.device)
        return super().__call__(pixels)


def test_a_batch_is_halved_when_the_device_runs_out_of_memory(tmp_path):
    plan = make_plan(MatchConfig(data="builtin", pairs=6), Crowded.from_pretrained("builtin-64", device=DEVICE))
    outcome = run_analysis(plan, tmp_path / "run", batch_size=6)
    assert outcome.completed, outcome.errors


def test_two_processes_share_a_card(tmp_path):
    given = ["match", "builtin-64", "--data", "builtin", "--pairs", "2", "--device", DEVICE, "--json"]
    runs = [
        subprocess.Popen([sys.executable, "-m", "hf_equiv", *given, "--out", tmp_path / out], stdout=subprocess.PIPE)
        for out in ("a", "b")
    ]
    rows = [json.loads(run.communicate(timeout=280)[0])["rows"] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert all(row["embedding_error_8bit"] <= 1e-4 for row in [*rows[0], *rows[1]])
