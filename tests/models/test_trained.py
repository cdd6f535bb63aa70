"""A trained checkpoint and real photos from outside the repository, through the command line, checked independently.

The folder with `models/` and `images/` is named by HF_EQUIV_ASSETS; by default it is `../shared/assets`. The numbers
are made again here from the PNG bytes in the parquet file, with transformers, Pillow and NumPy in float64 and nothing
of the package.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ASSETS = Path(os.environ.get("HF_EQUIV_ASSETS") or Path(__file__).parents[3] / "shared" / "assets").resolve()
MODEL = ASSETS / "models" / "deit-tiny-patch16-224"
PHOTOS = ASSETS / "images" / "sample_100"

pytestmark = [
    pytest.mark.assets,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (MODEL.is_dir() and PHOTOS.is_dir()),
        reason=f"no {MODEL.name} and {PHOTOS.name} in {ASSETS}: set HF_EQUIV_ASSETS",
    ),
]


def hf_equiv(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_equiv", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def pixels(png: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (224, 224))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 255


@pytest.fixture(scope="module")
def reference():
    """x -> (class token, logits): transformers in float64, normalised with what the checkpoint's file says."""
    import transformers

    model = transformers.ViTForImageClassification.from_pretrained(MODEL, attn_implementation="sdpa").double().eval()
    settings = json.loads((MODEL / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (torch.tensor(settings[key]).double().view(1, 3, 1, 1) for key in ("image_mean", "image_std"))

    @torch.no_grad()
    def encode(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        output = model((x - mean) / std, output_hidden_states=True)
        z = model.vit.layernorm(output.hidden_states[-1])[0, 0]
        return z.numpy(), output.logits[0].numpy()

    return encode


def relative(z: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(z - reference) / np.linalg.norm(reference))


def test_two_pairs_through_the_command_line(tmp_path, reference):
    done = hf_equiv(
        "match", MODEL, "--data", PHOTOS, "--pairs", "2", "--seed", "0", "--out", "run", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["summary"]["counts"] == {"converged": 2}
    floats = load_file(tmp_path / "run" / "float" / "part-00000.safetensors")
    stored = {row["pair_id"]: row for row in pq.read_table(tmp_path / "run" / "matches").to_pylist()}
    assert set(stored) == set(floats) == {row["pair_id"] for row in result["rows"]}
    for row in result["rows"]:
        source, match, target = (pixels(stored[row["pair_id"]][key]["bytes"]) for key in ("source", "match", "target"))
        (z_source, _), (z_match, logits), (z_target, wanted) = map(reference, (source, match, target))
        z_float, _ = reference(floats[row["pair_id"]][None].double())
        assert row["num_evals"] <= 1000

        noise = max(3 * row["noise_floor"], 1e-6)
        assert row["embedding_error"] <= 1e-5
        assert relative(z_float, z_target) <= 1e-5 + noise
        assert row["embedding_error_8bit"] <= 1e-3
        assert relative(z_match, z_target) == pytest.approx(row["embedding_error_8bit"], abs=noise)
        assert relative(z_source, z_target) > 0.5  # what the match had to overcome

        gap = (match - source).numpy()
        assert row["psnr_db"] == pytest.approx(-10 * np.log10(np.mean(gap**2)), abs=1e-9)
        assert row["linf"] == pytest.approx(np.abs(gap).max(), abs=1e-12)
        assert row["psnr_db"] > 30
        assert int(logits.argmax()) == int(wanted.argmax())
        assert row["same_top1"] is True

    verified = hf_equiv("verify", "run", "--model", MODEL, "--json", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    report = json.loads(verified.stdout)
    assert (report["verified"], report["failed"], report["problems"]) == (2, 0, [])
