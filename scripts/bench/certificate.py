"""How far the certified cosine of the smoothed embedding lies below the cosine that an attack attains.

    OMP_NUM_THREADS=1 python scripts/bench/certificate.py --attacks 20 --figure certificate.png

A row of the table is a σ and a radius R = ratio·σ, over all images: the median and least certified cosine, the least
cosine that attacks attain on the smoothed embedding, without the box and inside it, and on the encoder itself. Half of
the attacks, each from another random start with other noise, stay inside the box. An attack violates the certificate of
its image if the upper end of its interval lies below the certified cosine. The gap is the median over the images of the
least cosine attained without the box, less the certified one. Two controls: the cosine of the smoothed embedding with
the embedding itself, and the largest one between smoothed embeddings of two images. Only a certificate above the second
one tells the images apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import combinations
from pathlib import Path

import torch

from hf_equiv import Encoder, attack_smoothed, certified_cosine, load_images

LOOKS = {
    "certified": ("#0072b2", "-", "certified, smoothed"),
    "free": ("#009e73", "-", "attack, smoothed"),
    "boxed": ("#009e73", "--", "attack in the box, smoothed"),
    "plain": ("#d55e00", ":", "attack, not smoothed"),
}


def main() -> int:
    """Print the table of each σ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin-64")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--sigmas", default="0.1,0.25,0.5")
    parser.add_argument("--ratios", default="0.25,0.5,1,1.5,2", help="radii over σ")
    parser.add_argument("--n", type=int, default=4000, help="draws of a certificate")
    parser.add_argument("--confidence", type=float, default=0.999)
    parser.add_argument("--attacks", type=int, default=20, help="attacks of each image, σ and radius")
    parser.add_argument("--attack-n", type=int, default=50, help="draws for the cosine of an attack")
    parser.add_argument("--num-steps", type=int, default=6)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--json", type=Path, help="keep every attack here")
    parser.add_argument("--figure", type=Path, help="draw cosine against radius here, a panel for each σ")
    given = parser.parse_args()
    torch.set_num_threads(1)
    encoder = Encoder.from_pretrained(given.model, device="cpu")
    images = encoder.preprocess([item.image for item in load_images(given.data).select(range(given.images))])
    rows = []
    for sigma in map(float, given.sigmas.split(",")):
        rows += measure(encoder, images, sigma, given)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if given.figure:
        draw(rows, given.figure)
    return 0


def measure(encoder, images, sigma: float, given) -> list[dict]:
    """Print the table of one σ; return its rows."""
    radii, start = [sigma * float(ratio) for ratio in given.ratios.split(",")], time.monotonic()
    certificate = certified_cosine(encoder, images, sigma, radii, given.n, given.confidence, progress=False)
    with torch.no_grad():
        plain = torch.cosine_similarity(encoder(images).double(), certificate.embeddings, dim=1)
    pairs = [torch.cosine_similarity(a, b, dim=0).item() for a, b in combinations(certificate.embeddings, 2)]
    print(
        f"\n{Path(given.model).name}, σ = {sigma:g}, {len(images)} images, n = {given.n}, confidence "
        f"{given.confidence:g}: norm at least {certificate.norm_bound.min():.3f}, variance at most "
        f"{certificate.variance_bound.max():.4f}, {certificate.seconds.sum():.0f} s\n"
        f"cosine with the embedding itself {plain.min():.3f} to {plain.max():.3f}; largest between two images "
        f"{max(pairs, default=float('nan')):.3f}\n\n"
        "| R | certified, median (least) | attack | in the box | not smoothed | attacks | violations | gap |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    rows = []
    for k, radius in enumerate(radii):
        least = certificate.cosine[:, k]
        row = {"model": given.model, "sigma": sigma, "radius": radius, "certified": least.tolist(), "attacks": []}
        for seed in range(given.attacks):
            found = attack_smoothed(
                encoder, images, sigma, radius, num_steps=given.num_steps, draws=given.draws, restarts=1,
                n=given.attack_n, confidence=given.confidence, seed=1000 * k + seed + 1,
                bounds=(0, 1) if seed % 2 else None, progress=False,
            )  # fmt: skip
            row["attacks"] += [
                {"image": b, "boxed": bool(seed % 2), "cosine": cosine, "error": error}
                for b, (cosine, error) in enumerate(zip(found.cosine.tolist(), found.error.tolist(), strict=True))
            ]
        bare = attack_smoothed(encoder, images, 0, radius, num_steps=3 * given.num_steps, progress=False).cosine
        row |= {"plain": bare.tolist()} | {
            name: [
                min(
                    (one["cosine"] for one in row["attacks"] if one["image"] == b and one["boxed"] == inside),
                    default=float("nan"),
                )
                for b in range(len(images))
            ]
            for name, inside in (("free", False), ("boxed", True))
        }
        row["violations"] = sum(one["cosine"] + one["error"] < row["certified"][one["image"]] for one in row["attacks"])
        gap = statistics.median(a - c for a, c in zip(row["free"], row["certified"], strict=True))
        print(
            f"| {radius:.4g} | {statistics.median(least.tolist()):.4f} ({least.min():.4f}) | {min(row['free']):.5f} | "
            f"{min(row['boxed']):.5f} | {bare.min():.3f} | {len(row['attacks'])} | {row['violations']} | {gap:.4f} |",
            flush=True,
        )
        rows.append(row)
    print(f"\n{time.monotonic() - start:.0f} s")
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Draw the median cosine of the images against the radius: certified, attained with and without smoothing."""
    from matplotlib.figure import Figure

    sigmas = sorted({row["sigma"] for row in rows})
    figure = Figure(figsize=(4.2 * len(sigmas), 3.4), layout="constrained")
    for axes, sigma in zip(figure.subplots(1, len(sigmas), squeeze=False)[0], sigmas, strict=True):
        own = [row for row in rows if row["sigma"] == sigma]
        for name, (color, line, label) in LOOKS.items():
            known = [(row["radius"], value) for row in own if (value := statistics.median(row[name])) > -1]
            axes.plot(*zip((0.0, 1.0), *known, strict=True), color=color, ls=line, marker="o", ms=3, label=label)
        axes.set(title=f"σ = {sigma:g}", xlabel="L2 distance, pixels in [0, 1]", ylabel="cosine", ylim=(None, 1.01))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
