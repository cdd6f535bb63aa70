"""Finding and loading checkpoints: folders, a loopback Hub, and everything that must be refused clearly."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants, errors
from loopback_hub import Hub
from safetensors.torch import load_file, save_file
from tiny_models import save

from hf_equiv.models.checkpoint import HubFiles, find_checkpoint, quiet
from hf_equiv.models.encoder import Encoder
from hf_equiv.models.loading import multiply_patches

CLOSED = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    with quiet():
        return save("vit_head", tmp_path / "vit")


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_revision_of_a_folder_is_the_digest_of_its_weights(vit: Path) -> None:
    digest = hashlib.sha256((vit / "model.safetensors").read_bytes()).hexdigest()
    assert find_checkpoint(HubFiles(str(vit))).revision == f"sha256:{digest}"
    assert find_checkpoint(HubFiles(str(vit.parent), subfolder="vit")).revision == f"sha256:{digest}"
    with pytest.raises(ValueError, match=r"`revision` must be None for a local folder; got 'main'"):
        find_checkpoint(HubFiles(str(vit)), revision="main")


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "~/no/such/folder"])
def test_folder_that_does_not_exist(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"existing folder, a Hub id or 'builtin'; got '.*no/such/folder'"):
        Encoder.from_pretrained(name)


@pytest.mark.parametrize(("name", "message"), [("", "empty string"), ("a b/c!", "must be a Hub id such as")])
def test_malformed_ids(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(name)


def test_folder_with_a_name_that_safetensors_does_not_open(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"odd\xff")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`model_id` must be a name in UTF-8; .* Rename the folder\."):
        Encoder.from_pretrained(folder)


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        Encoder.from_pretrained(tmp_path)


def test_no_safetensors(vit: Path) -> None:
    (vit / "model.safetensors").rename(vit / "pytorch_model.bin")
    message = r"must hold its weights as safetensors; .* has only pytorch_model.bin\. Pickled weights can run code"
    with pytest.raises(FileNotFoundError, match=message):
        Encoder.from_pretrained(vit)


@pytest.mark.parametrize("keep", [0, 5, 1000, -10])
def test_damaged_weights(vit: Path, keep: int) -> None:
    file = vit / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(OSError, match=r"must be a readable safetensors file; it is damaged or cut short .* Fetch it"):
        Encoder.from_pretrained(vit)


def test_sharded_weights(vit: Path, tmp_path: Path) -> None:
    x = torch.rand(1, 3, 32, 32)
    z = Encoder.from_pretrained(vit)(x)
    with quiet():
        model = transformers.ViTForImageClassification.from_pretrained(vit)
        model.save_pretrained(tmp_path / "s", max_shard_size="40KB")
    (tmp_path / "s" / "preprocessor_config.json").write_bytes((vit / "preprocessor_config.json").read_bytes())
    assert not (tmp_path / "s" / "model.safetensors").exists()
    assert torch.equal(Encoder.from_pretrained(tmp_path / "s")(x), z)
    shard = sorted((tmp_path / "s").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"must be complete; .* lacks '{shard.name}'"):
        Encoder.from_pretrained(tmp_path / "s")


def test_missing_weights_are_not_made_up(vit: Path) -> None:
    file = vit / "model.safetensors"
    weights = load_file(file)
    key = next(k for k in weights if "layernorm_after" in k)
    del weights[key]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold every weight of ViTForImageClassification; .* lacks 1 of them"):
        Encoder.from_pretrained(vit)


def test_head_that_is_not_in_the_checkpoint(vit: Path) -> None:
    file = vit / "model.safetensors"
    save_file({k: w for k, w in load_file(file).items() if "classifier" not in k}, file, metadata={"format": "pt"})
    encoder = Encoder.from_pretrained(vit)
    assert not encoder.has_head
    assert encoder.label_names is None
    assert "logits" not in encoder.readouts


def test_half_precision_checkpoint_is_loaded_as_asked(vit: Path) -> None:
    file = vit / "model.safetensors"
    save_file({k: w.half() for k, w in load_file(file).items()}, file, metadata={"format": "pt"})
    edit(vit, dtype="float16")
    assert Encoder.from_pretrained(vit)(torch.rand(1, 3, 32, 32)).dtype == torch.float32


def test_text_only_model(tmp_path: Path) -> None:
    with quiet():
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        transformers.BertModel(transformers.BertConfig(vocab_size=20, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must name an image encoder \(pixels in.* is a 'bert' model"):
        Encoder.from_pretrained(tmp_path)


def test_unknown_architecture_and_remote_code(vit: Path) -> None:
    edit(vit, model_type="no_such_model", architectures=["NoSuchModel"])
    with pytest.raises(ValueError, match=r"must hold a config.json that transformers .* knows"):
        Encoder.from_pretrained(vit)
    edit(vit, auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    (vit / "own.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(ValueError, match=r"`trust_remote_code` must be True for .* Read that code first"):
        Encoder.from_pretrained(vit)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_cuda_asked_for_and_absent(vit: Path) -> None:
    with pytest.raises(ValueError, match=r"`device` must be present; got 'cuda', .* Use device='cpu'"):
        Encoder.from_pretrained(vit, device="cuda")
    with pytest.raises(ValueError, match=r"`device` must be a PyTorch device; got 'gpu'"):
        Encoder.from_pretrained(vit, device="gpu")


def test_labels_need_a_tokenizer_that_knows_them(tmp_path: Path) -> None:
    with quiet():
        encoder = Encoder.from_pretrained(save("clip", tmp_path / "clip"))  # no tokenizer files: transformers makes one
    with pytest.raises(
        OSError, match=r"that of '.*clip' has 2 entries and none for 'cat'\. Copy the tokenizer's files"
    ):
        encoder.classify(torch.rand(1, *encoder.input_shape), labels=["cat", "dog"])


# A process of its own: the clients read HF_HUB_OFFLINE when they are imported.
OFFLINE = """
import json, sys
from hf_equiv.models.encoder import Encoder
import torch

encoder = Encoder.from_pretrained("acme/vit", cache_dir=sys.argv[1])
print(encoder.revision, float(encoder(torch.full((1, 3, 32, 32), 0.25)).double().sum()))
try:
    Encoder.from_pretrained("acme/other", cache_dir=sys.argv[1])
except ConnectionError as error:
    print(error)
"""


def test_hub_checkpoint_is_pinned_and_works_offline(
    vit: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sha = hub.add("models", "acme/vit", vit).at("main").sha
    encoder = Encoder.from_pretrained("acme/vit", cache_dir=tmp_path / "cache", device="cpu")
    assert capfd.readouterr() == ("", "")  # nothing of the clients reaches the user
    assert (encoder.revision, encoder.provenance["model_id"]) == (sha, "acme/vit")
    x = torch.full((1, 3, 32, 32), 0.25)
    assert torch.equal(encoder(x), Encoder.from_pretrained(vit, device="cpu")(x))
    closed = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": CLOSED, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, tmp_path / "cache"], env=os.environ | closed, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stderr == ""
    revision, total, message = done.stdout.split(maxsplit=2)
    assert revision == sha
    assert float(total) == pytest.approx(float(encoder(x).double().sum()), rel=1e-5)
    assert message == (
        "'acme/other' is no folder here, its file 'config.json' is not in the cache, and HF_HUB_OFFLINE=1 is set. "
        "Correct the path or the name, or pass a local folder or 'builtin', or unset it.\n"
    )


def test_a_hub_that_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    told = f"{CLOSED} cannot be reached. Correct the path or the name"
    with pytest.raises(ConnectionError, match=re.escape(told)):
        Encoder.from_pretrained("acme/other")


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        (
            "nothing", {}, errors.RepositoryNotFoundError,
            "'acme/nothing' is no folder here, and on the Hub there is no such model or it is private. Check",
        ),
        (
            "private", {"token": False}, errors.RepositoryNotFoundError,
            "for a private one log in with `hf auth login`, or set HF_TOKEN",
        ),
        ("gated", {"token": False}, errors.GatedRepoError, "'acme/gated' is gated. Ask for access at http://127.0.0.1"),
        (
            "vit", {"revision": "v9"}, errors.RevisionNotFoundError,
            "`revision` must exist in the model 'acme/vit'; got 'v9'.",
        ),
        ("pickled", {}, FileNotFoundError, "weights as safetensors; 'acme/pickled' has only pytorch_model.bin"),
        (
            "vit", {"subfolder": "nope"}, errors.RemoteEntryNotFoundError,
            "has no file 'config.json'. Check the id and `subfolder`",
        ),
        (
            "vit", {"local_files_only": True}, ConnectionError,
            "is not in the cache, and `local_files_only=True`. Correct the path or the name",
        ),
    ],
    ids=["unknown", "private", "gated", "revision", "pickled", "subfolder", "local"],
)  # fmt: skip
def test_what_the_hub_refuses(
    name: str, options: dict[str, Any], kind: type[Exception], message: str, vit: Path, hub: Hub, tmp_path: Path
) -> None:
    if name != "nothing":
        pickled = {"config.json": (vit / "config.json").read_bytes(), "pytorch_model.bin": b""}
        facts = {name: True} if name in ("private", "gated") else {}
        hub.add("models", f"acme/{name}", pickled if name == "pickled" else vit, **facts)
    with pytest.raises(kind, match=re.escape(message)):
        Encoder.from_pretrained(f"acme/{name}", cache_dir=tmp_path / "cache", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "options"), [((8, 12), {}), ((9, 14), {}), ((8, 12), {"bias": False})])
def test_products_of_patches_are_the_convolution_and_its_derivatives(size: Any, options: Any, dtype: Any) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(3, 5, (4, 2), stride=(4, 2), dtype=dtype, **options).requires_grad_(False)
    quick = multiply_patches(copy.deepcopy(torch.nn.Sequential(plain)))
    x, v = torch.randn(2, 2, 3, *size, dtype=dtype)
    u = torch.randn(4, *plain(x).shape, dtype=dtype)
    (own, pushed), (wanted, moved) = (torch.func.jvp(f, (x,), (v,)) for f in (quick, plain))
    assert torch.equal(own, wanted)
    torch.testing.assert_close(pushed, moved)
    pulled = [
        torch.autograd.grad(f(y := x.clone().requires_grad_()), y, u, is_grads_batched=True)[0] for f in (quick, plain)
    ]
    torch.testing.assert_close(*pulled)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 3}, {"kernel_size": 1, "stride": 1}]
)
def test_other_convolutions_stay(options: dict[str, Any]) -> None:
    convolution = torch.nn.Conv2d(3, 6, **{"kernel_size": 4, "stride": 4, **options})
    assert type(multiply_patches(convolution)) is torch.nn.Conv2d
