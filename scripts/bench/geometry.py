"""Geometry, side by side: singular values, Lipschitz constants and level-set walks, against the peers.

Every method gets the same images; the truth is a dense Jacobian in float64, taken apart by LAPACK's SVD:

    python scripts/bench/geometry.py --model facebook/deit-tiny-patch16-224 --data photos/ --limit 5 --markdown bench.md

What is compared, and how it is kept fair:

* One image at a time, on the CPU. A counter around the encoder counts every image that goes forward and every product
  with J (tangents) or Jᵀ (cotangents), by whichever mode; evaluations = (forwards + 2·cotangents + 2·tangents) / 3, and
  a pass is one product with each. Of this library the larger of the counter's and its own count is stated, which
  includes what it spends in float64 on its error bounds. A peer's checks of its model are counted too; they are few.
* **top**: the k largest singular values at each image; error = max |s − σ| / σ₁ over the values returned. "Bound" is
  the largest error bound that the method states, over σ₁, and how often every value kept its own. SciPy and skerch get
  this library's products with J and Jᵀ, so that those rows compare algorithms; curvlinops and plenoptic bring their
  own. All values, and J alone in a plain loop of VJPs, are run in turn, three times each; the medians are stated.
  plenoptic's power method also finds the k smallest, which is half of its passes. To bound its time it is held to 25
  iterations of its default of at most 1000, so its error is that of this budget and not of its limit.
* **lipschitz, local**: constants at the image itself, where the truth is known: σ₁ for what claims to be the local
  constant, ‖Jv‖ in float64 along a direction. Null directions have the constant 0: any number stated for them is
  round-off, so the best answer is none. A forward secant at h = 1e-7 moves few pixels: float32 rounds most
  steps away, and a 0 it states means that, not a small constant. `attack` and, by default, `noise_norm` of torchlip
  are secants over steps as long as the image; they are set against σ₁ because that is what they are said to estimate,
  locally around the sample.
* **lipschitz, regional**: the largest constant within L2 distance 1 and [0, 1]. Its truth is not known, but every lower
  bound is attained at an image in the ball, and ‖J(x′)v‖ is recomputed there in float64; an estimate below a lower
  bound is too small. ART's `clever_t` estimates the constant of one logit margin g = logit_c − logit_j (c the
  prediction, j the runner-up) and returns the radius min(g(x) / constant, 1): the constant is read back as
  g(x) / radius, which is an upper limit of it where the radius is 1. So this library gets the same margin
  x -> g(x) (B, 1) and the same ball, and its bound is turned into a radius likewise: the most that the true constant
  of this ball can certify.
* **walk**: 100 steps along one random direction v. This library corrects every point to a drift of 1e-5. The other walk
  is the idea of SiMEC in pixels: x ← clip(x + h·P_null v / ‖P_null v‖) with a fresh Jacobian at every point and no
  correction, from this library's own Jacobian and projection; h is searched so that the walk ends at a drift of 1e-4,
  and only the final walk is charged. Where many pixels are at 0 or 1 it drifts by the clip too, which its projection
  does not know of. Drifts are recomputed in float64.
* Medians over images. The peers come with `pip install -c constraints.txt ".[bench]"`; what is absent, fails or does
  not fit into memory is skipped with a note. curvlinops is not among them: it asks for torchvision by way of backpack,
  and neither uses it; beside the CPU build of torch it breaks transformers. Install it by hand, then uninstall
  torchvision.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the peers' progress bars

import torch
from geometry_rows import Bench, Exact, local_rows, regional_rows, top_rows
from geometry_tables import tables
from geometry_walk import walk_rows
from match import machine, versions

from hf_equiv import Encoder, load_images
from hf_equiv.precision import no_tf32

PACKAGES = ("deel-torchlip", "curvlinops-for-pytorch", "skerch")
SECTIONS = ("top", "lipschitz", "walk")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description="Geometry, side by side with the peers.")
    parser.add_argument("--model", default="builtin", help="checkpoint: a Hub id, a folder or builtin")
    parser.add_argument("--data", default="builtin", help="photos: a file, a folder, a Hub dataset or builtin")
    parser.add_argument("--limit", type=int, default=5, help="images: the first so many")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--readout", default="auto", help="which embedding")
    parser.add_argument("--k", type=int, default=8, help="singular values")
    parser.add_argument("--num-steps", type=int, default=100, help="steps of a walk")
    parser.add_argument("--walk-images", type=int, default=1, help="images to walk from: the first so many")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rows here, after every image")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the tables here")
    args = parser.parse_args(argv)
    args.sections = list(dict.fromkeys(args.sections.split(",")))
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"unknown section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    for name in ("limit", "k", "num_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run every section on every image, then print the tables."""
    args = parse(argv)
    warnings.filterwarnings("ignore", module=r"plenoptic|art\.|deel\.|skerch|curvlinops")
    bench = Bench()
    encoder = Encoder.from_pretrained(args.model, readout=args.readout, device="cpu")
    photos = load_images(args.data)
    count = min(args.limit, len(photos))
    installed_packages = versions()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed_packages[package] = importlib.metadata.version(package)
    report: dict[str, Any] = {
        "model": encoder.model_id,
        "revision": encoder.revision,
        "readout": encoder.readout,
        "data": photos.data_id,
        "settings": {key: getattr(args, key) for key in ("limit", "seed", "k", "num_steps", "walk_images", "sections")},
        "machine": machine(torch.device("cpu")),
        "versions": installed_packages,
        "skipped": bench.skipped,
        "top": [],
        "local": [],
        "regional": [],
        "walk": [],
    }
    for index in range(count):
        item = photos[index]
        image = encoder.preprocess([item.image])

        def note(section: str, rows: list[dict[str, Any]], index: int = index, item: Any = item) -> None:
            report[section] += [{"image_id": item.id, **row} for row in rows]
            print(f"image {index + 1}/{count}: {section} done", file=sys.stderr, flush=True)

        with no_tf32():
            if "top" in args.sections or "lipschitz" in args.sections:
                exact = Exact.at(encoder, image)
            if "top" in args.sections:
                note("top", top_rows(bench, encoder, image, exact, args.k, args.seed))
            if "lipschitz" in args.sections:
                note("local", local_rows(bench, encoder, image, exact, args.seed))
                note("regional", regional_rows(bench, encoder, image, float(exact.sigma[0]), args.seed))
            if "walk" in args.sections and index < args.walk_images:
                note("walk", walk_rows(encoder, image, args.num_steps, args.seed))
        if args.json:
            args.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    text = tables(report)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
