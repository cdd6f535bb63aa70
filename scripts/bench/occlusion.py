"""Whether cells that hold much of the row space are those whose change moves the embedding most.

    OMP_NUM_THREADS=1 python scripts/bench/occlusion.py --model PATH --data PHOTOS --images 20

Each cell of the invariance map is changed alone, a little (noise, a tenth of the way to the mean colour) or wholly (the
mean colour, grey, black, a blur, noise). The table has the rank correlation (Spearman) of the map with the distances
that the embedding moves, its median and extremes over the images. The last columns are the correlation of these
distances with those of the mean colour: they say how far two ways of covering a cell agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from hf_equiv import Encoder, jacobian_spectrum, load_images

DRAWS, BATCH = 3, 28


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--images", type=int, default=4)
    given = parser.parse_args()
    encoder, photos = Encoder.from_pretrained(given.model, device="cpu"), load_images(given.data)
    found: dict[str, list[tuple[float, float]]] = {}
    for k in range(min(given.images, len(photos))):
        (x,) = encoder.preprocess([photos[k].image])
        seen = jacobian_spectrum(encoder, x[None], progress=False).invariance_map[0].flatten()
        moved = {name: distances(encoder, x, change) for name, change in CHANGES.items()}
        for name, one in moved.items():
            found.setdefault(name, []).append((rank(seen, one), rank(moved["mean colour"], one)))
        print(f"{k + 1} of {given.images}: {photos.ids[k]}", file=sys.stderr)
    print(f"| {given.model}, {given.images} images | with the map | least | most | with the mean colour |")
    print("| --- | --- | --- | --- | --- |")
    for name, pairs in found.items():
        own, mean = zip(*pairs, strict=True)
        told = f"{statistics.median(own):.2f} | {min(own):.2f} | {max(own):.2f} | {statistics.median(mean):.2f}"
        print(f"| {name} | {told} |")
    return 0


def rank(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation."""
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def noise(sigma: float) -> Callable[[Tensor], Iterator[Tensor]]:
    """Gaussian noise, a few draws."""

    def draws(x: Tensor) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(DRAWS):
            yield x + sigma * torch.randn(x.shape, generator=generator)

    return draws


def towards_mean(share: float) -> Callable[[Tensor], Iterator[Tensor]]:
    """A part of the way to the mean colour of the photo."""
    return lambda x: iter([torch.lerp(x, x.mean((1, 2), keepdim=True).expand_as(x), share)])


def blur(x: Tensor) -> Iterator[Tensor]:
    """The mean of 17 × 17 pixels."""
    yield avg_pool2d(pad(x[None], (8,) * 4, mode="reflect"), 17, stride=1)[0]


CHANGES = {
    "noise, 4/255": noise(4 / 255),
    "a tenth to the mean colour": towards_mean(0.1),
    "half to the mean colour": towards_mean(0.5),
    "mean colour": towards_mean(1.0),
    "grey": lambda x: iter([torch.full_like(x, 0.5)]),
    "black": lambda x: iter([torch.zeros_like(x)]),
    "blur": blur,
    "uniform noise": lambda x: iter([torch.rand(x.shape, generator=torch.Generator().manual_seed(0))]),
}


@torch.no_grad()
def distances(encoder: Encoder, x: Tensor, change: Callable[[Tensor], Iterator[Tensor]], grid: int = 14) -> Tensor:
    """Mean distances that the embedding moves when one cell is changed, (cells,)."""
    z, side, found = encoder(x[None]).double(), x.shape[1] // grid, []
    for there in change(x):
        covered = []
        for i in range(grid):
            for j in range(grid):
                part = (slice(None), slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side))
                one = x.clone()
                one[part] = there[part]
                covered.append(one)
        found.append(torch.cat([(encoder(own).double() - z).norm(dim=1) for own in torch.stack(covered).split(BATCH)]))
    return torch.stack(found).mean(dim=0)


if __name__ == "__main__":
    sys.exit(main())
