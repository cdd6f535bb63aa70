"""Several encoders as one: the embeddings of files are each model's own, and all else is that of any encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
from fakes import draw_photo, reseal
from torch import nn

from hf_equiv import Encoder, JointEncoder, jacobian_spectrum, match_embedding, refine_8bit, verify_run
from hf_equiv.cli.main import _run as command
from hf_equiv.geometry.levelset import trace_level_set
from hf_equiv.matching.steps import JointSteps, Steps
from hf_equiv.models.recorded import each_model, is_local, load_recorded


def small(size: int, seed: int = 0, **options) -> Encoder:
    generator = torch.Generator().manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Tanh(), nn.Conv2d(8, 6, 2, 2), nn.AdaptiveAvgPool2d(1))
    for weight in body.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / 4
    return Encoder.wrap(body, size=size, mean=0.5, std=0.25, name=f"small-{size}-{seed}", **options)


@pytest.fixture(scope="module")
def joint() -> JointEncoder:
    return JointEncoder([small(24), small(48), small(48, 1), small(32, 2)])


@pytest.fixture(scope="module")
def pixels(joint) -> torch.Tensor:
    return joint.preprocess([draw_photo(1, 60), draw_photo(2, 60)])


def test_embeddings_of_files_are_those_of_each_model_bit_for_bit(joint, pixels):
    assert joint.input_shape == (3, 48, 48)
    assert joint.embedding_dim == 24
    z = joint.of_files()(pixels)
    for one, own, block, scale in zip(
        joint.parts, joint.split(z), z.split(joint.sizes, dim=1), joint.scales, strict=True
    ):
        plain = one(pixels if one.input_shape == joint.input_shape else one.preprocess(joint.to_pil(pixels)))
        assert torch.equal(block, plain / scale)
        torch.testing.assert_close(own, plain)
    assert 0.3 < float(z[:, :6].norm() / z[:, 6:12].norm()) < 3  # no model outweighs another
    smooth = joint(pixels)
    assert 0 < float((smooth - z).norm() / z.norm()) < 0.02
    assert torch.equal(smooth[:, 6:18], z[:, 6:18])


def test_the_smooth_map_has_the_derivative_of_its_secants(joint, pixels):
    f, x = joint.double(), pixels[:1].double() * 0.8 + 0.1
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jv = torch.func.jvp(f, (x,), (v,))[1]
    secant = (f(x + 1e-5 * v) - f(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(jv, secant, rtol=1e-6, atol=1e-9)
    assert joint.jvp_probe()
    assert float(joint.noise_floor(pixels).max()) < 1e-5


def test_a_spectrum_is_that_of_the_stacked_jacobian(joint, pixels):
    x = pixels[:1].double().requires_grad_(True)
    rows = [torch.autograd.grad(z, x, retain_graph=True)[0].flatten() for z in joint.double()(x)[0]]
    wanted = torch.linalg.svdvals(torch.stack(rows))
    found = jacobian_spectrum(joint, pixels[:1], progress=False)
    torch.testing.assert_close(found.singular_values[0], wanted, rtol=1e-4, atol=1e-5)


def test_zeros_of_each_model_are_explained(tmp_path):
    folders = [tiny_models.save("vit", tmp_path / name, processor=name) for name in ("vit", "vit_64")]
    both = JointEncoder.from_pretrained([str(folder) for folder in folders], readout="cls")
    image = both.preprocess([draw_photo(1, 80)])[0]
    exact = [relation for relation in both.left_relations(image) if relation.rows is None]
    J = torch.autograd.functional.jacobian(lambda x: both.double()(x)[0], image[None].double()).flatten(1)
    assert [(relation.cause, relation.left.shape[1]) for relation in exact] == [("LayerNorm centring", 2)]
    for relation in both.left_relations(image):
        rows = torch.zeros_like(relation.left.T @ J) if relation.rows is None else relation.rows
        torch.testing.assert_close(relation.left.T @ J, rows, rtol=1e-5, atol=1e-7 * float(J.norm()))


def test_walks_keep_the_embeddings_of_all(joint, pixels):
    start = 0.1 + 0.8 * pixels[:1]
    walk = trace_level_set(joint, start, heading="random", step=0.1, num_steps=2, keep_points=True, progress=False)
    last = walk.paths[0][-1].pixels
    assert float((last - start[0]).norm()) > 0.1
    there = joint(last[None])
    for a, b in zip(joint.split(there), joint.split(joint(start)), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4


def test_the_effect_of_single_steps_is_exact(joint, pixels):
    torch.manual_seed(0)
    levels = (255 * pixels[0].double()).round()
    views, shape = joint.views, pixels[0].shape
    models = [nn.Linear(one.embedding_dim, 1) for one in joint.parts]
    assert len(models) == 4
    parts = [Steps(torch.randn(2, 3 * (one.input_shape[1]) ** 2).double()) for one in joint.parts]
    steps, r = JointSteps(parts, views, shape), torch.randn(8).double()
    costs = steps.costs(levels.flatten(), r)
    index = torch.arange(17, levels.numel() - 1, 397)

    def seen(k):
        images = joint.of_files().seen((k / 255).view(1, *shape).float())
        values = zip(parts, images, strict=True)
        return torch.cat([part.J @ (255 * x.double()).round().flatten() for part, x in values])

    for way in (1, -1):
        ways = torch.full_like(index, way)
        columns = steps.columns(index, ways)
        for k, column in zip(index.tolist(), columns.T, strict=True):
            if 0 < levels.flatten()[k] < 255:
                there = levels.flatten().clone()
                there[k] += way
                torch.testing.assert_close(way * column, seen(there) - seen(levels.flatten()))
        direct = columns[2:6].square().sum(dim=0) + 2 * way * (r[2:6] @ columns[2:6])
        views_too = columns.square().sum(dim=0) + 2 * way * (r @ columns)
        quiet = (columns[[0, 1, 6, 7]] == 0).all(dim=0)
        torch.testing.assert_close(costs[0 if way == 1 else 1][index][quiet], direct[quiet])
        torch.testing.assert_close(direct[quiet], views_too[quiet], rtol=1e-9, atol=1e-9)
        assert bool(quiet.any())
        assert not bool(quiet.all())


def test_a_refined_match_is_one_for_each_model():
    joint = JointEncoder([small(16, 3), small(64)])
    source, near = joint.preprocess([draw_photo(1, 80), draw_photo(2, 80)]).split(1)
    target = joint.of_files()((255 * (0.1 + 0.7 * source + 0.1 * near)).round() / 255)
    found = match_embedding(joint, source, target, rtol=1e-5, progress=False)
    exact = refine_8bit(joint, found.images, target, source=source, rtol=1e-5, progress=False)
    z = joint.of_files()(exact.images)
    for a, b in zip(joint.split(z), joint.split(target), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-3
    levels = 255 * exact.images.double()
    assert float((levels - levels.round()).abs().max()) < 1e-4


BAD = {
    "one": (lambda: [small(24)], "at least two different encoders"),
    "twice": (lambda: [small(24), small(24)], "'small-24-0' twice"),
    "dtypes": (lambda: [small(24), small(48, dtype=torch.float64)], "one `dtype`; got torch.float32, torch.float64"),
    "normalised": (lambda: [small(24), small(48, normalize=True)], "one `normalize`"),
    "sizes": (lambda: [small((24, 48)), small((48, 24))], "largest in height and width; got 24 × 48 .*small-.*48 × 24"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_encoders_are_refused(case):
    make, told = case
    with pytest.raises(ValueError, match=told):
        JointEncoder(make())


def test_a_processor_that_cannot_be_followed_is_named(monkeypatch):
    one = small(24)
    monkeypatch.setattr(one, "preprocess", lambda image: 1 - Encoder.preprocess(one, image))
    with pytest.raises(ValueError, match=r"image processor of 'small-24-0' must resize by a filter of Pillow"):
        JointEncoder([one, small(48)])


def test_other_sizes_are_refused(joint):
    with pytest.raises(ValueError, match=r"`pixels` must have the shape \(B, 3, 48, 48\)"):
        joint(torch.rand(1, 3, 24, 24))


def test_the_head_of_the_first_model_that_has_one_classifies(pixels):
    body = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    headed = Encoder.wrap(body, size=24, mean=0.5, std=0.25, labels=["ant", "bee"])
    both = JointEncoder([small(48), headed])
    assert both.has_head
    assert both.label_names == ("ant", "bee")
    assert torch.equal(both.of_files().classify(pixels), headed.classify(headed.preprocess(both.to_pil(pixels))))


# --- runs ---


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("joint")
    tiny_models.save("deit", place / "deit")
    tiny_models.save("vit", place / "vit", processor="vit_64")
    for k in (1, 2):
        draw_photo(k, 80).save(place / f"{k}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        given = ["--source", "1.png", "--target", "2.png", "--out", "run", "-q", "--readout", "cls"]
        assert command(["match", "./vit", "./deit", *given]) == 0
        assert (
            command(["spectrum", "./vit", "./deit", "--source", "1.png", "--out", "spectra", "-q", "--readout", "cls"])
            == 0
        )
    return place


def row_of(folder: Path) -> dict:
    return pq.read_table(next((folder / "matches").glob("*.parquet"))).to_pylist()[0]


def test_a_run_states_each_model_and_verifies(run, monkeypatch):
    monkeypatch.chdir(run)
    row, record = row_of(run / "run"), json.loads((run / "run" / "run.json").read_text())
    assert row["model_id"] == record["settings"]["model_id"] == "vit + deit"
    assert record["command"].startswith("hf-equiv match vit deit --readout cls ")
    assert [own["model_id"] for own in row["models"]] == ["vit", "deit"]
    for key in ("embedding_error", "embedding_error_8bit", "noise_floor"):
        assert row[key] == max(own[key] for own in row["models"])
    assert row["embedding_error"] <= 1e-5
    assert row["embedding_error_8bit"] <= 1e-3
    assert "models" not in pq.read_table(next((run / "spectra" / "spectra").glob("*.parquet"))).column_names
    for name in ("run", "spectra"):
        report = verify_run(run / name)
        assert report.holds, report.problems
        assert report.verified == 1
    assert verify_run(run / "run", model="./vit + ./deit").holds
    assert is_local(record["settings"])
    assert [own["readout"] for own in each_model(record["settings"])] == ["cls"] * 2


@pytest.mark.parametrize(
    "key", ["embedding_error", "embedding_error_8bit", "noise_floor", "model_id", "model_revision"]
)
def test_a_forged_entry_is_found(run, tmp_path, monkeypatch, key):
    import shutil

    from hf_equiv.runs import shards
    from hf_equiv.runs.schema import MATCH

    monkeypatch.chdir(run)
    forged = tmp_path / "run"
    shutil.copytree(run / "run", forged)
    path = next((forged / "matches").glob("*.parquet"))
    rows = shards.read_shard(path, images=True, layout=MATCH)
    own = rows[0]["models"][1]
    own[key] = f"{own[key]}0" if isinstance(own[key], str) else 20 * own[key]
    path.write_bytes(shards.shard_bytes(rows, MATCH, {}))
    reseal(forged)
    assert any(problem.column == "models" for problem in verify_run(forged).problems)


CALLS = {
    "twice": (["./vit", "./vit"], "got './vit' twice"),
    "readout": (["./vit", "./deit", "--readout", "cls + mean + cls"], "must be one for each of the 2 models"),
    "revision": (["./vit", "./deit", "--revision", "main"], "must be one for each of the 2 models"),
    "full size": (["./vit", "./deit", "--full-size"], "--full-size must come with one model"),
    "import": (["./vit", "./deit", "--import", "a:b"], "must come with one MODEL; got 2"),
}


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_bad_calls_are_refused(run, monkeypatch, capsys, case):
    words, told = case
    monkeypatch.chdir(run)
    assert command(["match", *words, "--source", "1.png", "--target", "2.png", "--out", "other"]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_encoders_of_a_user_are_put_in_place_of_the_recorded_ones(joint):
    settings = {key: joint.provenance[key] for key in ("model_id", "model_revision", "readout", "dtype", "attention")}
    settings |= {"normalize": False}
    made = load_recorded(settings, joint, "cpu", None, True)
    assert made.revision == joint.revision
    assert made.provenance == joint.provenance
    with pytest.raises(ValueError, match="must be a JointEncoder of 4 models"):
        load_recorded(settings, joint.parts[0], "cpu", None, True)
    assert np.isclose(made.scales, joint.scales).all()


def test_texts_need_one_model(joint):
    with pytest.raises(ValueError, match="must come with a model of images and texts"):
        joint.embed_texts(["a cat"])
