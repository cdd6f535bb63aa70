"""The robust recipe of `scripts/train_builtin.py` keeps embeddings under the worst change of the pixels."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import train_builtin as script

OPTIONS = (
    "--train-file a --validation-file b --robust --init c --output d --image-size 16 --patch-size 8 --width 24 "
    "--depth 1 --heads 2 --mlp 32 --batch-size 16 --epochs 30 --lr 3e-3 "
    "--min-crop 0.9 --jitter 0.1 --ema 0.9 --epsilon 16"
)


def test_the_worst_change_moves_embeddings_less(tmp_path):
    args = script.parse_args([*OPTIONS.split(), "--work-dir", str(tmp_path)])
    torch.manual_seed(0)
    images = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8)
    trainer = script.RobustTrainer(
        script.make_student(args, ["a", "b"]), script.Split(images, torch.arange(32) % 2, None), None, args
    )

    def worst() -> float:
        wanted = script.embed(trainer.original, images.float()).detach()
        away = lambda x: (script.embed(trainer.student.eval(), x) - wanted).square().sum()  # noqa: E731
        return away(script.attack(images.float(), 16, 10, torch.Generator().manual_seed(0), away)).item()

    before = worst()
    head = trainer.student.classifier.weight.clone()
    for _ in range(args.epochs):
        trainer.train_epoch()
    assert worst() < 0.7 * before
    assert torch.equal(trainer.student.classifier.weight, head)


def test_an_attack_stays_near_and_in_range():
    images = 255 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = script.attack(images, 4, 3, torch.Generator().manual_seed(0), lambda x: x.sum())
    assert float((found - images).abs().max()) <= 4 + 1e-3
    torch.testing.assert_close(found, (images + 4).clamp(max=255))


def test_robust_needs_a_start():
    with pytest.raises(SystemExit):
        script.parse_args(["--robust", "--dataset", "a", "--output", "b"])
