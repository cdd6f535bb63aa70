"""Train the small ViT that ships with hf_equiv, from any `datasets` image-classification set.

The student is an ordinary ``transformers.ViTForImageClassification``. It can learn from the labels alone, or also from
the logits of a named teacher, which are computed once and cached. All images are held in memory as uint8 tensors and
augmented in batches; checkpoints are safetensors files, from which an interrupted run resumes.

With ``--robust`` it keeps the embeddings of the checkpoint ``--init``, whatever changes of up to 4/255 the pixels take
(FARE: Schlarmann et al., 2024, arXiv:2402.12336), and learns from no labels.

Example:
    python scripts/train_builtin.py --dataset zh-plus/tiny-imagenet --validation-split valid --output out/vit

On a machine whose cores are shared, the environment variable ``OMP_WAIT_POLICY=passive`` makes it several times faster.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_equiv.data.tables import table_images

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PATH_OPTIONS = {"train_file", "validation_file", "work_dir", "output", "teacher", "init"}
# Options that may differ between the run that wrote a checkpoint and the run that resumes from it.
NOT_RECIPE = PATH_OPTIONS | {"threads", "fresh", "blend", "license", "data_description", "teacher_description"}

CARD = """\
---
license: {license}
library_name: transformers
pipeline_tag: image-classification
tags:
- vit
- image-classification
- hf_equiv
metrics:
- accuracy
---

# hf_equiv built-in ViT

A small, ordinary `ViTForImageClassification`: {params:,} parameters, {image_size} px input, patch {patch_size}, width
{width}, depth {depth}, {heads} heads, MLP width {mlp}, class-token readout. It ships with `hf_equiv` so that examples,
tests and demos run on trained weights without a download.

| | |
| --- | --- |
| top-1 on the {n_val:,} validation images | **{top1:.1%}** |
| top-5 | {top5:.1%} |
{robust}| weights | float16 safetensors, {megabytes:.1f} MB |

Both numbers were measured with these exported float16 files, reloaded in float32 with
`AutoModelForImageClassification` and `AutoImageProcessor`.

## Classes

{classes}

## Data

{data}

## Recipe

{recipe}

```
{command}
```

## Use

```python
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = "{output}"
model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
processor = AutoImageProcessor.from_pretrained(folder)
```

Meant for demonstrating and testing `hf_equiv`: it has trained attention and realistic activations, and it is small
enough for a laptop CPU.

## Limits

- It knows {n_classes} classes and answers with one of them whatever it is shown.
- It sees {image_size} x {image_size} pixels: small objects and fine texture are lost, and photos that are not square
  are squeezed.
- It is not {what} and not calibrated, its data carry the usual biases of web photos, and it should not be used for
  decisions about anything.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="Hub id of an image-classification data set")
    data.add_argument("--dataset-config", help="configuration name of --dataset")
    data.add_argument("--train-file", help="parquet file with the training images (instead of --dataset)")
    data.add_argument("--validation-file", help="parquet file with the validation images")
    data.add_argument("--train-split", default="train", help="split to train on (default: %(default)s)")
    data.add_argument("--validation-split", default="validation", help="split to measure on (default: %(default)s)")
    data.add_argument("--image-column", default="image", help="column with the images (default: %(default)s)")
    data.add_argument("--label-column", default="label", help="column with the class index (default: %(default)s)")
    data.add_argument("--data-description", default="", help="sentence about the data, for the model card")

    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", help="Hub id or folder of an image-classification checkpoint to distil from")
    teacher.add_argument("--teacher-label-column", help="column with each image's class index in the teacher")
    teacher.add_argument("--teacher-init", action="store_true", help="start from the first layers of a ViT teacher")
    teacher.add_argument("--init", help="folder of a ViT to start from instead, such as one of a smaller input size")
    teacher.add_argument("--blend", type=float, default=1.0, help="share of trained weights, the rest as they started")
    teacher.add_argument("--teacher-views", type=int, choices=(1, 2), default=1, help="1: original; 2: also mirrored")
    teacher.add_argument("--teacher-size", type=int, help="pixels given to the teacher (default: its own input size)")
    teacher.add_argument("--teacher-description", default="", help="name of the teacher, for the model card")
    teacher.add_argument("--distill-weight", type=float, default=0.7, help="teacher's weight (default: %(default)s)")
    teacher.add_argument("--temperature", type=float, default=2.0, help="softmax temperature (default: %(default)s)")

    model = parser.add_argument_group("model")
    model.add_argument("--image-size", type=int, default=64, help="input side in pixels (default: %(default)s)")
    model.add_argument("--stored-size", type=int, help="side of the images before enlarging (default: the same)")
    model.add_argument("--patch-size", type=int, default=8, help="patch side in pixels (default: %(default)s)")
    model.add_argument("--width", type=int, default=192, help="hidden size (default: %(default)s)")
    model.add_argument("--depth", type=int, default=5, help="number of layers (default: %(default)s)")
    model.add_argument("--heads", type=int, default=3, help="attention heads (default: %(default)s)")
    model.add_argument("--mlp", type=int, default=384, help="MLP width (default: %(default)s)")

    model.add_argument("--init-std", type=float, default=0.02, help="of untrained weights (default: %(default)s)")

    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, default=30, help="number of epochs (default: %(default)s)")
    train.add_argument("--batch-size", type=int, default=128, help="images per step (default: %(default)s)")
    train.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    train.add_argument("--weight-decay", type=float, default=0.05, help="AdamW weight decay (default: %(default)s)")
    train.add_argument("--warmup-epochs", type=float, default=2.0, help="linear warm-up (default: %(default)s)")
    train.add_argument("--label-smoothing", type=float, default=0.1, help="for the label loss (default: %(default)s)")
    train.add_argument("--mixup", type=float, default=0.3, help="share of images mixed (default: %(default)s)")
    train.add_argument("--min-crop", type=float, default=0.4, help="smallest crop area (default: %(default)s)")
    train.add_argument("--jitter", type=float, default=0.3, help="colour jitter strength (default: %(default)s)")
    train.add_argument("--sharpness", type=float, default=0.0, help="most sharpening and blur (default: %(default)s)")
    train.add_argument("--detail", type=float, default=0.0, help="most detail of other photos (default: %(default)s)")
    train.add_argument("--erase", type=float, default=0.25, help="probability of random erasing (default: %(default)s)")
    train.add_argument("--token-keep", type=float, default=1.0, help="share of patches used at first (default: all)")
    train.add_argument("--token-keep-until", type=float, default=0.75, help="share of training with --token-keep")
    train.add_argument("--robust", action="store_true", help="keep the embeddings of --init under small changes (FARE)")
    train.add_argument(
        "--epsilon", type=float, default=4, help="levels of 255 that a pixel may change (default: %(default)s)"
    )
    train.add_argument(
        "--attack-steps", type=int, default=3, help="steps to find the worst change (default: %(default)s)"
    )
    train.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    train.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")

    files = parser.add_argument_group("files")
    files.add_argument("--work-dir", default="train_builtin_work", help="checkpoint and cache (default: %(default)s)")
    files.add_argument("--output", required=True, help="folder for the exported model")
    files.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint in --work-dir")
    files.add_argument("--license", default="apache-2.0", help="licence named in the model card")
    args = parser.parse_args(argv)
    if bool(args.dataset) == bool(args.train_file and args.validation_file):
        parser.error("give either --dataset, or both --train-file and --validation-file")
    if args.teacher_init and not args.teacher:
        parser.error("--teacher-init needs --teacher")
    if args.robust and not args.init:
        parser.error("--robust needs --init, the checkpoint whose embeddings it keeps")
    args.stored_size = args.stored_size or args.image_size
    return args


@dataclass
class Split:
    """One split in memory: uint8 images ``[N, 3, H, W]``, class indices, and the teacher's indices where known."""

    images: Tensor
    labels: Tensor
    teacher_labels: Tensor | None

    @classmethod
    def from_dataset(cls, dataset: Dataset, args: argparse.Namespace) -> Split:
        """Decodes and resizes every image of a split."""
        size, names = args.stored_size, dataset.column_names
        photos = table_images(dataset, "", "the split", args.image_column, args.label_column)
        images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
        for index, item in enumerate(tqdm(photos, desc="decoding", leave=False)):
            image = item.image
            resized = image.resize((size, size), resample=3) if image.size != (size, size) else image
            pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
            images[index] = pixels.view(size, size, 3).permute(2, 0, 1)
        labels = torch.tensor(dataset[args.label_column][:])
        column = args.teacher_label_column
        return cls(images, labels, torch.tensor(dataset[column][:]) if column in names else None)


def load_data(args: argparse.Namespace) -> tuple[DatasetDict, list[str]]:
    """Loads the data set and returns it with readable class names (the first synonym where that is unique)."""
    if args.dataset:
        data = load_dataset(args.dataset, args.dataset_config)
    else:
        files = {args.train_split: args.train_file, args.validation_split: args.validation_file}
        data = load_dataset("parquet", data_files=files)
    feature = data[args.train_split].features[args.label_column]
    if isinstance(feature, ClassLabel):
        short = [name.split(",")[0].strip() for name in feature.names]
        return data, short if len(set(short)) == len(short) else feature.names
    return data, [f"class {index}" for index in range(max(data[args.train_split][args.label_column][:]) + 1)]


def normalise(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """Turns uint8 (or float 0..255) images into normalised float images."""
    return (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def enlarge(images: Tensor, size: int) -> Tensor:
    """Resizes float images in 0..255 to a square of ``size`` pixels."""
    if images.shape[-1] == size:
        return images
    return functional.interpolate(images, size=(size, size), mode="bicubic").clamp(0, 255)


def random_crop_flip(images: Tensor, size: int, min_area: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Takes a random crop (area and aspect ratio) of every image at ``size``, mirrors half, and says which."""
    count = len(images)
    area, aspect, x, y, mirror = torch.rand(5, count, generator=generator)
    area = min_area + (1 - min_area) * area
    aspect = ((2 * aspect - 1) * math.log(4 / 3)).exp()
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    flipped = mirror < 0.5
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.where(flipped, -wide, wide)
    theta[:, 1, 1] = high
    theta[:, 0, 2] = (2 * x - 1) * (1 - wide)
    theta[:, 1, 2] = (2 * y - 1) * (1 - high)
    grid = functional.affine_grid(theta, [count, 3, size, size], align_corners=False)
    mode = "bicubic" if size > images.shape[-1] else "bilinear"
    crops = functional.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)
    return crops.clamp(0, 255), flipped


def jitter_colours(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Changes brightness, contrast and saturation of images in 0..255 by up to ``strength``."""
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1)
    images = images * factors[0]
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True).expand_as(images), images, factors[1])
    return torch.lerp(images.mean(1, keepdim=True).expand_as(images), images, factors[2]).clamp(0, 255)


def high_pass(images: Tensor) -> Tensor:
    """Returns what an image loses when it is shrunk to a quarter and enlarged again."""
    small = functional.avg_pool2d(images, 4)
    return images - functional.interpolate(small, size=images.shape[-2:], mode="bilinear")


def change_sharpness(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Blurs or sharpens images in 0..255, each by a random amount up to ``strength``."""
    amount = torch.rand(len(images), 1, 1, 1, generator=generator) * (1 + strength) - 1
    return torch.addcmul(images, high_pass(images), amount).clamp(0, 255)


def add_detail(images: Tensor, photos: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Adds fine detail, as photos of this size have and enlarged ones lack: that of ``photos`` laid side by side."""
    count, size, side = len(images), images.shape[-1], photos.shape[-1]
    tiles = math.ceil(size / side)
    chosen = torch.randint(len(photos), (count // 16, tiles * tiles), generator=generator)
    mosaic = photos[chosen].float().unflatten(1, (tiles, tiles)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    detail = high_pass(mosaic)[..., :size, :size]
    number = torch.randint(len(detail), (count,), generator=generator)
    amount = strength * torch.rand(count, 1, 1, 1, generator=generator) ** 2
    return torch.addcmul(images, detail[number], amount).clamp(0, 255)


def erase_rectangles(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Sets one random rectangle in some of the (normalised) images to the mean colour."""
    count, _, height, width = images.shape
    chosen, top, left, high, wide = torch.rand(5, count, 1, generator=generator)
    high, wide = height * (0.15 + 0.35 * high), width * (0.15 + 0.35 * wide)
    top, left = top * (height - high), left * (width - wide)
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows, in_columns = (rows >= top) & (rows < top + high), (columns >= left) & (columns < left + wide)
    mask = in_rows[:, :, None] & in_columns[:, None, :] & (chosen < probability)[:, :, None]
    return images.masked_fill(mask[:, None], 0.0)


@torch.no_grad()
def teacher_logits(teacher: PreTrainedModel, images: Tensor, args: argparse.Namespace) -> Tensor:
    """Returns the teacher's logits ``[N, views, classes]`` on the training images, from the cache where it has them.

    The teacher sees the student's pixels, enlarged. The cache file is named after a digest of the teacher's weights, of
    the images and of the options that matter here.
    """
    size = args.teacher_size or teacher.config.image_size
    digest = hashlib.sha256(images.numpy().tobytes() + f"{size} {args.teacher_views}".encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    cache = Path(args.work_dir) / f"teacher-{digest.hexdigest()[:16]}.safetensors"
    if cache.exists():
        return load_file(cache)["logits"].float()
    processor = AutoImageProcessor.from_pretrained(args.teacher)
    resampled = {"interpolate_pos_encoding": True} if size != teacher.config.image_size else {}
    views = []
    for view in range(args.teacher_views):
        parts = []
        for batch in tqdm(images.split(64), desc=f"teacher, view {view + 1}"):
            pixels = batch.flip(-1) if view else batch
            pixels = normalise(enlarge(pixels.float(), size), processor.image_mean, processor.image_std)
            parts.append(teacher(pixel_values=pixels, **resampled).logits)
        views.append(torch.cat(parts))
    logits = torch.stack(views, 1).half()
    save_file({"logits": logits}, cache)
    return logits.float()


def teacher_classes(split: Split, num_classes: int) -> Tensor | None:
    """Returns the teacher's class index for each of the student's classes (None: they are the same)."""
    if split.teacher_labels is None:
        return None
    pairs = torch.stack([split.labels, split.teacher_labels], 1).unique(dim=0)
    if pairs[:, 0].tolist() != list(range(num_classes)):
        raise ValueError("each class must have exactly one class of the teacher")
    return pairs[:, 1]


def resize_filters(filters: Tensor, start: Tensor) -> Tensor:
    """Returns patch filters of the size of ``start`` that act on an image as ``filters`` do on it at their own size.

    Smaller filters are sums over blocks of pixels. Larger ones are interpolated; their fine detail is that of
    ``start``, and an enlarged image has none to meet it.
    """
    old, new = filters.shape[-1], start.shape[-1]
    if new <= old:
        factor = old // new
        return functional.avg_pool2d(filters, factor) * factor**2
    coarse = functional.interpolate(start, size=(old, old), mode="area")
    detail = start - functional.interpolate(coarse, size=(new, new), mode="bicubic")
    return functional.interpolate(filters, size=(new, new), mode="bicubic") * (old / new) ** 2 + detail


@torch.no_grad()
def start_from(student: PreTrainedModel, model: PreTrainedModel, classes: Tensor | None) -> None:
    """Copies the first layers of a ViT of equal width into the student, cut down where the student is smaller.

    Position embeddings are interpolated. A narrower MLP keeps the neurons with the largest weights, and the classifier
    keeps the rows of the student's classes. The model is taken to expect the same normalisation (``MEAN``, ``STD``).
    """
    source, target = model.state_dict(), student.state_dict()
    for name, old in target.items():
        new = source[name]
        if name.endswith("projection.weight"):
            new = resize_filters(new, old)
        elif name.endswith("position_embeddings"):
            side, goal = (math.isqrt(t.shape[1] - 1) for t in (new, old))
            grid = new[:, 1:].transpose(1, 2).unflatten(2, (side, side))
            grid = functional.interpolate(grid, size=(goal, goal), mode="bicubic", antialias=True)
            new = torch.cat([new[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        elif ".mlp." in name and new.shape != old.shape:
            prefix = name[: name.index(".mlp.")]
            first, second = source[f"{prefix}.mlp.fc1.weight"], source[f"{prefix}.mlp.fc2.weight"]
            neurons = (first.norm(dim=1) * second.norm(dim=0)).topk(student.config.intermediate_size).indices
            new = new[:, neurons] if name.endswith("fc2.weight") else new[neurons]
        elif name.startswith("classifier") and classes is not None:
            new = new[classes]
        old.copy_(new)  # refuses a model of another width


class TokenDrop:
    """Forward hook on the embeddings: in training, keeps the class token and a random share of the patch tokens."""

    def __init__(self, generator: torch.Generator) -> None:
        """Starts with every token kept."""
        self.keep = 1.0
        self.generator = generator

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], tokens: Tensor) -> Tensor | None:
        """Drops patch tokens, a different choice for every image."""
        if not module.training or self.keep >= 1:
            return None
        count, patches = len(tokens), tokens.shape[1] - 1
        order = torch.rand(count, patches, generator=self.generator).argsort(1)[:, : round(self.keep * patches)] + 1
        order = torch.cat([torch.zeros(count, 1, dtype=order.dtype), order], 1)
        return tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def make_student(args: argparse.Namespace, names: list[str]) -> ViTForImageClassification:
    """Builds the untrained student."""
    config = ViTConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.width,
        num_hidden_layers=args.depth,
        num_attention_heads=args.heads,
        intermediate_size=args.mlp,
        encoder_stride=args.patch_size,
        initializer_range=args.init_std,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


@torch.inference_mode()
def evaluate(model: PreTrainedModel, batches: Iterable[Tensor], labels: Tensor) -> tuple[float, float]:
    """Returns top-1 and top-5 accuracy on batches of normalised images."""
    model.eval()
    logits = torch.cat([model(pixel_values=batch).logits for batch in batches])
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return hits[:, 0].float().mean().item(), hits.any(1).float().mean().item()


class Trainer:
    """Trains the student, with checkpoints after every epoch."""

    def __init__(
        self, student: PreTrainedModel, train: Split, targets: Tensor | None, args: argparse.Namespace
    ) -> None:
        """Sets up optimizer, averaged weights and token dropping; ``targets`` are the teacher's logits."""
        self.student, self.train, self.targets, self.args = student, train, targets, args
        self.start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        self.ema = {name: tensor.clone() for name, tensor in self.start.items()}
        self.generator = torch.Generator()
        self.drop = TokenDrop(self.generator)
        student.vit.embeddings.register_forward_hook(self.drop)
        matrices = [p for p in student.parameters() if p.ndim == 2]
        others = [p for p in student.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr)
        self.epoch, self.seconds = 0, 0.0
        self.steps_per_epoch = len(train.labels) // args.batch_size
        self.checkpoint = Path(args.work_dir) / "last.safetensors"
        self.recipe = json.dumps({k: v for k, v in sorted(vars(args).items()) if k not in NOT_RECIPE})

    def result(self) -> dict[str, Tensor]:
        """Returns the averaged weights, blended with those that the training started from (Wortsman et al., 2022)."""
        return {name: torch.lerp(self.start[name], tensor, self.args.blend) for name, tensor in self.ema.items()}

    def save(self) -> None:
        """Writes model, averaged weights and optimizer state to one file, replacing the last one in one go."""
        tensors = {f"model/{name}": tensor for name, tensor in self.student.state_dict().items()}
        tensors |= {f"ema/{name}": tensor for name, tensor in self.ema.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in state.items()}
        metadata = {"epoch": str(self.epoch), "seconds": str(self.seconds), "recipe": self.recipe}
        temporary = self.checkpoint.with_suffix(".tmp")
        save_file(tensors, temporary, metadata)
        os.replace(temporary, self.checkpoint)

    def resume(self) -> None:
        """Continues from the last checkpoint where there is one."""
        if self.args.fresh or not self.checkpoint.exists():
            return
        with safe_open(self.checkpoint, "pt") as file:
            metadata = file.metadata()
        if metadata["recipe"] != self.recipe:
            raise SystemExit(f"{self.checkpoint} was written with other options: use --fresh or another --work-dir")
        state: dict[int, dict[str, Tensor]] = {}
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
        for key, tensor in load_file(self.checkpoint).items():
            kind, name = key.split("/", 1)
            if kind == "optimizer":
                index, name = name.split("/")
                state.setdefault(int(index), {})[name] = tensor
            else:
                parts[kind][name] = tensor
        self.student.load_state_dict(parts["model"])
        self.ema = parts["ema"]
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.epoch, self.seconds = int(metadata["epoch"]), float(metadata["seconds"])
        print(f"resuming after epoch {self.epoch}")

    def photos(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns augmented images in 0..255, and which are mirrored."""
        args, generator = self.args, self.generator
        images = jitter_colours(self.train.images[index].float(), args.jitter, generator)
        images, flipped = random_crop_flip(images, args.image_size, args.min_crop, generator)
        if args.sharpness:
            images = change_sharpness(images, args.sharpness, generator)
        if args.detail:
            images = add_detail(images, self.train.images, args.detail, generator)
        return images, flipped

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns normalised images with their label distribution and the teacher's logits."""
        args, generator = self.args, self.generator
        images, flipped = self.photos(index)
        pixels = normalise(images)
        pixels = erase_rectangles(pixels, args.erase, generator)
        labels = functional.one_hot(self.train.labels[index], self.student.config.num_labels).float()
        teacher = None
        if self.targets is not None:
            teacher = self.targets[index, flipped.long() % self.targets.shape[1]]
            teacher = (teacher / args.temperature).softmax(-1)
        if args.mixup > 0:
            mixed, share = torch.rand(2, len(index), 1, generator=generator)
            share = torch.where(mixed < args.mixup, 0.5 + 0.5 * share, 1.0)
            order = torch.randperm(len(index), generator=generator)
            pixels = torch.lerp(pixels[order], pixels, share[:, :, None, None])
            labels = torch.lerp(labels[order], labels, share)
            teacher = None if teacher is None else torch.lerp(teacher[order], teacher, share)
        return pixels, labels, teacher

    def loss(self, index: Tensor) -> Tensor:
        """Cross-entropy with the (smoothed) labels, mixed with the divergence from the teacher."""
        args = self.args
        pixels, labels, teacher = self.batch(index)
        logits = self.student(pixel_values=pixels).logits
        loss = functional.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
        if teacher is None:
            return loss
        student = (logits / args.temperature).log_softmax(-1)
        distilled = functional.kl_div(student, teacher, reduction="batchmean") * args.temperature**2
        return torch.lerp(loss, distilled, args.distill_weight)

    def schedule(self, progress: float) -> None:
        """Sets learning rate (linear warm-up, cosine) and share of patches for a point of the training in 0..1."""
        args = self.args
        warmup = min(args.warmup_epochs / args.epochs, 0.5)
        if progress < warmup:
            rate = progress / warmup
        else:
            rate = (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * max(rate, 1e-3)
        self.drop.keep = args.token_keep if progress < args.token_keep_until else 1.0

    def train_epoch(self) -> float:
        """Trains one epoch and returns its mean loss. Its random numbers depend on seed and epoch only."""
        started, total = time.monotonic(), 0.0
        self.student.train()
        self.generator.manual_seed(self.args.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.train.labels), generator=self.generator)
        batches = order.split(self.args.batch_size)[: self.steps_per_epoch]
        for number, index in enumerate(tqdm(batches, desc=f"epoch {self.epoch + 1}", leave=False, mininterval=5)):
            step = self.epoch * self.steps_per_epoch + number
            self.schedule((step + 1) / (self.args.epochs * self.steps_per_epoch))
            loss = self.loss(index)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            decay = min(self.args.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, tensor in self.student.state_dict().items():
                    self.ema[name].lerp_(tensor, 1 - decay)
            total += loss.item()
        self.epoch += 1
        self.seconds += time.monotonic() - started
        return total / self.steps_per_epoch


class RobustTrainer(Trainer):
    """Keeps the embeddings of the checkpoint it starts from under every L∞ change of the pixels up to ε."""

    def __init__(
        self, student: PreTrainedModel, train: Split, targets: Tensor | None, args: argparse.Namespace
    ) -> None:
        """Keeps a copy of the student, whose embeddings are wanted."""
        super().__init__(student, train, targets, args)
        self.original = copy.deepcopy(student).eval().requires_grad_(False)

    def loss(self, index: Tensor) -> Tensor:
        """Returns the mean of max over δ of ‖φ(x + δ) − φ₀(x)‖², ‖δ‖∞ ≤ ε, the maximum by projected gradient steps."""
        images, _ = self.photos(index)
        wanted = embed(self.original, images).detach()
        attacked = attack(
            images, self.args.epsilon, self.args.attack_steps, self.generator,
            lambda x: (embed(self.student, x) - wanted).square().sum(),
        )  # fmt: skip
        return (embed(self.student, attacked) - wanted).square().sum(dim=1).mean()


def embed(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Returns the class token after the last LayerNorm for images in 0..255."""
    return model.vit(pixel_values=normalise(images)).last_hidden_state[:, 0]


def attack(
    images: Tensor, epsilon: float, steps: int, generator: torch.Generator, gain: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns images in 0..255 within ``epsilon`` of these that raise ``gain``, by projected steps of its sign."""
    low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=255)
    x = torch.lerp(low, high, torch.rand(images.shape, generator=generator))
    for _ in range(steps):
        x.requires_grad_(True)
        (slope,) = torch.autograd.grad(gain(x), x)
        x = torch.clamp(x.detach() + 2.5 * epsilon / steps * slope.sign(), low, high)
    return x


def robust_accuracy(model: PreTrainedModel, images: Tensor, labels: Tensor, epsilon: float, steps: int = 50) -> float:
    """Returns the top-1 accuracy on images in 0..255 that are attacked by the gradient of their cross-entropy."""
    model.eval()
    hits, generator = 0.0, torch.Generator().manual_seed(0)
    for batch, own in zip(images.split(100), labels.split(100), strict=True):
        x = attack(
            batch, epsilon, steps, generator,
            lambda x, own=own: functional.cross_entropy(model(pixel_values=normalise(x)).logits, own, reduction="sum"),
        )  # fmt: skip
        hits += evaluate(model, [normalise(x)], own)[0] * len(own)
    return hits / len(labels)


def shown_command(argv: list[str]) -> str:
    """Returns the command line for the model card, with placeholders for this machine's folders."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    words = [f"path/to/{Path(word).name}" if Path(word).is_absolute() else word for word in words]
    words = [f"\\\n    {word}" if word.startswith("--") else shlex.quote(word) for word in words]
    return " ".join(["python scripts/train_builtin.py", *words])


def card_sections(trainer: Trainer, names: list[str], validation_count: int) -> dict[str, str]:
    """Returns the wrapped paragraphs of the model card about classes, data and recipe."""
    args = trainer.args
    source = args.data_description or args.dataset or Path(args.train_file).name
    teacher = args.teacher_description or Path(args.teacher or "").name
    recipe = [
        "AdamW, cosine schedule with warm-up, label smoothing, random crops, mirroring, colour jitter, random erasing, "
        "mixup, gradient clipping, averaged weights."
    ]
    if args.robust:
        recipe = [
            "AdamW, cosine schedule with warm-up, random crops, mirroring, colour jitter, gradient clipping, averaged "
            f"weights. No labels: the weights started from {Path(args.init).name} and keep its embeddings under the "
            f"worst change of up to {args.epsilon:g}/255 of every pixel value, found by "
            f"{args.attack_steps} steps along the sign of the gradient from a random start (FARE: Schlarmann et al., "
            "arXiv:2402.12336)."
        ]
    if args.token_keep < 1:
        recipe.append(
            f"For the first {args.token_keep_until:.0%} of the training, a random {args.token_keep:.0%} of the patches "
            "enters the network, then all of them."
        )
    if args.teacher_init:
        recipe.append(f"The weights started from the first layers of {teacher}, cut down to this size.")
    if args.init and not args.robust:
        recipe.append(
            f"The weights started from {Path(args.init).name}. Its patch filters were enlarged and got the fine detail "
            "of a random initialisation, which the training hardly changed: it makes the checkpoint sensitive to "
            "single pixels, as a ViT is that learnt from photos of this size."
        )
    if args.stored_size < args.image_size:
        recipe.append("The photos were enlarged with random blur and sharpening, and with fine detail of other photos.")
    if args.teacher and args.distill_weight > 0:
        recipe.append(f"Distilled from {teacher}; its logits were computed once on the enlarged training images.")
    recipe.append(
        f"{args.epochs} epochs, {trainer.seconds / 60:.0f} minutes on {torch.get_num_threads()} CPU threads. The "
        "exported weights are the moving average after the last epoch; no epoch was picked by its validation accuracy."
    )
    if args.blend < 1:
        recipe.append(
            f"They are {args.blend:.0%} of these weights and {1 - args.blend:.0%} of those at the start, "
            "which helps with photos unlike those of the training (Wortsman et al., arXiv:2109.01903)."
        )
    if args.teacher:
        recipe.append(
            "The teacher may have been trained on some of the validation images, which flatters the accuracy."
        )
    paragraphs = {
        "classes": ", ".join(names) + ".",
        "data": f"{source}: {len(trainer.train.labels):,} training and {validation_count:,} validation images, at "
        f"{args.stored_size} x {args.stored_size} pixels. The images are not part of this folder.",
        "recipe": " ".join(recipe),
    }
    return {key: textwrap.fill(text, 120) for key, text in paragraphs.items()}


def export(trainer: Trainer, names: list[str], validation_data: Dataset) -> None:
    """Writes float16 weights, both configurations and the model card; the card quotes the reloaded files' accuracy."""
    args, folder = trainer.args, Path(trainer.args.output)
    model = make_student(args, names)
    model.load_state_dict(trainer.result())
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": args.image_size, "width": args.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")

    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    loaded = AutoImageProcessor.from_pretrained(folder)
    photos = table_images(validation_data, "", "the validation split", args.image_column, args.label_column)
    batches = (loaded(item.image, return_tensors="pt").pixel_values for item in photos)
    top1, top5 = evaluate(model, batches, torch.tensor(validation_data[args.label_column][:]))
    robust = ""
    if args.robust:
        few = Split.from_dataset(validation_data.select(range(0, len(validation_data), 5)), args)
        images = enlarge(few.images.float(), args.image_size)
        start = AutoModelForImageClassification.from_pretrained(args.init, dtype=torch.float32)
        kept = [robust_accuracy(one, images, few.labels, args.epsilon) for one in (model, start)]
        robust = (
            f"| top-1 under changes of {args.epsilon:g}/255, 50 steps, {len(few.labels)} images | **{kept[0]:.1%}**, "
            f"of the start {kept[1]:.1%} |\n"
        )
    card = CARD.format(
        **{**vars(args), "robust": robust},
        what="robust to larger changes" if args.robust else "robust",
        **card_sections(trainer, names, len(validation_data)),
        params=model.num_parameters(),
        n_classes=len(names),
        n_val=len(validation_data),
        top1=top1,
        top5=top5,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        command=shown_command(sys.argv[1:]),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"exported to {folder}: top-1 {top1:.1%}, top-5 {top5:.1%}, {model.num_parameters():,} parameters")


def main() -> None:
    """Runs the whole recipe: data, teacher, training, export."""
    args = parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)

    data, names = load_data(args)
    train = Split.from_dataset(data[args.train_split], args)
    validation = Split.from_dataset(data[args.validation_split], args)
    student = make_student(args, names)
    print(f"{len(train.labels):,} + {len(validation.labels):,} images, {student.num_parameters():,} parameters")
    targets = None
    if args.teacher:
        teacher = AutoModelForImageClassification.from_pretrained(args.teacher, dtype=torch.float32).eval()
        classes = teacher_classes(train, len(names))
        if args.distill_weight > 0:
            targets = teacher_logits(teacher, train.images, args)
            targets = targets if classes is None else targets[..., classes]
            agreement = (targets[:, 0].argmax(-1) == train.labels).float().mean()
            print(f"teacher's top-1 on the training images: {agreement:.1%}")
        if args.teacher_init:
            start_from(student, teacher, classes)
        del teacher
    if args.init:
        start_from(student, AutoModelForImageClassification.from_pretrained(args.init, dtype=torch.float32), None)

    trainer = (RobustTrainer if args.robust else Trainer)(student, train, targets, args)
    trainer.resume()
    averaged = make_student(args, names)
    while trainer.epoch < args.epochs:
        loss = trainer.train_epoch()
        trainer.save()
        averaged.load_state_dict(trainer.result())
        batches = (normalise(enlarge(batch.float(), args.image_size)) for batch in validation.images.split(250))
        top1, _ = evaluate(averaged, batches, validation.labels)
        minutes = trainer.seconds / 60
        print(f"epoch {trainer.epoch}/{args.epochs}: loss {loss:.3f}, top-1 {top1:.1%}, {minutes:.1f} min", flush=True)
    export(trainer, names, data[args.validation_split])


if __name__ == "__main__":
    main()
