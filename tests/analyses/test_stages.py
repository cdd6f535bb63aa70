"""Matches that start with a cheaper form of the encoder end with the encoder itself."""

import shutil

import pytest
import torch
from fakes import TinyEncoder

from hf_equiv.analyses import MatchConfig, make_plan, run
from hf_equiv.analyses.run import VERBS
from hf_equiv.matching.lbfgs import LBFGS
from hf_equiv.matching.match import match_embedding
from hf_equiv.models.encoder import Encoder
from hf_equiv.verify import directory


class Tiny(TinyEncoder):
    """With forms of itself in other types."""

    def in_dtype(self, dtype):
        return Tiny(self.seed, dtype=dtype)


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch):
    monkeypatch.setattr("hf_equiv.analyses.figures.pairs_figure", lambda *_: None)


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "float16"])
@pytest.mark.parametrize("radius", [None, 90 / 255])
def test_half_precision_leads_and_float32_ends(photos, tmp_path, monkeypatch, name, radius):
    config = MatchConfig(data=str(photos), pairs=4, dtype=name, radius=radius)
    plan = make_plan(config, Tiny())
    assert plan.settings["dtype"] == plan.provenance["dtype"] == "float32"
    full = "float16" if name == "float16" else "bfloat16"
    assert plan.settings["solver"] == f"lbfgs, {full} start"
    assert plan.default_out != make_plan(MatchConfig(data=str(photos), pairs=4, radius=radius), Tiny()).default_out
    outcome = run.run_analysis(plan, tmp_path / "out")
    assert outcome.completed
    assert all(row["embedding_error"] <= 1e-5 and row["solver"] == f"lbfgs, {full} start" for row in outcome.rows)
    monkeypatch.setattr(directory, "load_recorded", lambda *_: Tiny())
    assert directory.verify_run(tmp_path / "out").holds


def test_a_draft_counts_and_keeps_to_the_budget(photos, tmp_path):
    for most in (1, 2, 7, 30):
        plan = make_plan(MatchConfig(data=str(photos), pairs=4, dtype="bf16", max_evals=most, refine=False), Tiny())
        rows = run.run_analysis(plan, tmp_path / str(most)).rows
        assert all(0 < row["num_evals"] <= most for row in rows)


def test_rows_do_not_depend_on_the_batch(photos, tmp_path):
    plan = make_plan(MatchConfig(data=str(photos), pairs=5, dtype="bf16", max_evals=60), Tiny())
    one, all_ = (run.run_analysis(plan, tmp_path / str(size), batch_size=size).rows for size in (1, 5))
    assert [row | {"seconds": 0} for row in one] == [row | {"seconds": 0} for row in all_]


def test_a_copy_of_an_encoder_in_bfloat16(photos):
    encoder = Encoder.from_pretrained("builtin-64", device="cpu")
    pixels = encoder.preprocess([item.image for item in _builtin()])
    half = encoder.in_dtype(torch.bfloat16)
    z, low = encoder(pixels), half(pixels)
    assert low.dtype == torch.bfloat16
    assert 1e-4 < float((low.float() - z).norm() / z.norm()) < 5e-2
    assert torch.equal(low, torch.cat([half(one) for one in pixels.split(1)]))
    assert encoder.dtype == torch.float32
    assert torch.equal(encoder(pixels), z)


def _builtin():
    from hf_equiv.data.sources import load_images

    return load_images("builtin")


def test_going_on_from_a_result(tiny):
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(2, *tiny.input_shape, generator=generator)
    target = torch.rand(2, *tiny.input_shape, generator=generator)
    first = match_embedding(tiny, source, target, max_evals=20, radius=0.3, raise_on_failure=False)
    found = match_embedding(tiny, source, target, LBFGS(warmup=0), radius=0.3, start=first)
    assert bool((found.num_evals > first.num_evals).all())
    assert bool((found.seconds >= first.seconds).all())
    assert bool((found.images - source).abs().max() <= 0.3 + 1e-6)
    assert found.traces[0][0][0] == first.num_evals[0] + 1
    with pytest.raises(ValueError, match=r"`start` must hold images of the shape of `source`"):
        match_embedding(tiny, source[:1], target[:1], start=first)


@pytest.mark.parametrize("analysis", ["spectrum", "lipschitz", "walk"])
@pytest.mark.parametrize("name", ["bf16", "float16"])
def test_half_precision_is_refused_for_derivatives(analysis, name):
    with pytest.raises(
        ValueError, match=rf"got '{name}'\. Half precision is for the early iterations of `match` alone"
    ):
        VERBS[analysis].CONFIG(dtype=name).check()


def test_compiling_needs_a_compiler(photos, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"`compile` must have a C\+\+ compiler; 'no-such-compiler' was not found"):
        make_plan(MatchConfig(data=str(photos), pairs=2, compile=True), Tiny())


def test_a_compiled_match_is_ended_and_stated_by_the_plain_encoder(photos, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda f: made.append(f) or (lambda x: f(x) * (1 + 1e-3)))  # off by far
    monkeypatch.setenv("CXX", shutil.which("python3") or "sh")
    plan = make_plan(MatchConfig(data=str(photos), pairs=3, compile=True), Tiny())
    assert plan.settings["solver"] == "lbfgs, compiled"
    outcome = run.run_analysis(plan, tmp_path / "out")
    assert len(made) == 1
    assert outcome.completed
    monkeypatch.setattr(directory, "load_recorded", lambda *_: Tiny())
    assert directory.verify_run(tmp_path / "out").holds


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_torch_compile(tmp_path):
    encoder = Encoder.from_pretrained("builtin-64", device="cpu")
    drafts = MatchConfig(compile=True).drafts(encoder)
    pixels = encoder.preprocess([item.image for item in _builtin()])
    assert torch.allclose(drafts[0].f(pixels), encoder(pixels), rtol=1e-4, atol=1e-4)
