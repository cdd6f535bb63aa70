"""Matches of a text encoder: continuous ones, texts near them, texts found token by token, and the nearest of many.

    OMP_NUM_THREADS=1 python scripts/bench/text.py --model PATH --pairs 20

Sources and targets are unrelated sentences of the package. The controls are unrelated sentences, and the 20 paraphrases
beside this script. The nearest texts are sought among all sentences that a small grammar makes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hf_equiv import TextEncoder, find_nearest_texts, jacobian_spectrum, match_embedding, refine_tokens, round_tokens
from hf_equiv.analyses.match_config import TEXTS

GRAMMAR = (
    "The cat,A small child,My neighbour,The doctor,An engineer,The old king,A poet,Our teacher,The thief,Her uncle",
    "sat on,painted,forgot,repaired,dreamed of,sold,counted,photographed,hid,stole,described,washed",
    "the table,a red bicycle,two oranges,the piano,a wooden bridge,the letter,some coins,an empty house,the map,a coat",
    "yesterday,in silence,again",
)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--parts", default="float,tokens,nearest", help="parts to run")
    given = parser.parse_args()
    f, texts = TextEncoder.from_pretrained(given.model, device="cpu"), TEXTS.read_text().splitlines()
    sources = texts[: given.pairs]
    targets = [texts[(i + 7) % len(texts)] for i in range(len(sources))]
    print(f"{f}\n\n| part | value |\n| --- | --- |")
    same = Path(__file__).with_name("paraphrases.txt").read_text().splitlines()
    z = f.encode(texts)
    row("unrelated sentences, cosine", [float(z[i] @ z[j]) for i, j in itertools.combinations(range(len(z)), 2)])
    row("paraphrases, cosine", (z[: len(same)] * f.encode(same)).sum(dim=1).tolist())
    parts = given.parts.split(",")
    if "float" in parts:
        continuous(f, sources, targets)
    if "tokens" in parts:
        discrete(f, sources, targets)
    if "nearest" in parts:
        injective(f)
    return 0


def continuous(f: TextEncoder, sources: Sequence[str], targets: Sequence[str]) -> None:
    """Match token embeddings, and round them to the nearest tokens."""
    errors, evals, moved, rounded, ranks = [], [], [], [], []
    for source, target in zip(sources, targets, strict=True):
        x, z = f.embed_tokens(source), f.encode([target])
        found = match_embedding(f, x, z, bounds=None, raise_on_failure=False, progress=False)
        errors.append(float(found.errors[0]))
        evals.append(float(found.num_evals[0]))
        moved.append(float((found.images - x).norm() / x.norm()))
        (text,) = round_tokens(f, found.images)
        rounded.append(float(f.encode([text])[0] @ z[0]))
    for source in sources[:3]:
        spectrum = jacobian_spectrum(f, f.embed_tokens(source), bounds=None, progress=False)
        zeros = ", ".join(f"{zero.cause} ({zero.count})" for zero in spectrum.structural_zeros[0])
        ranks.append(f"{int(spectrum.rank)} of {f.embedding_dim}, {int(spectrum.nullity):,} null directions; {zeros}")
    print(f"| continuous matches, error ≤ 1e-5 | {sum(e <= 1.0e-5 for e in errors)} of {len(errors)} |")
    row("… error", errors, ".1e")
    row("… evaluations", evals, ".0f")
    row("… distance moved over the length of the source", moved)
    row("… rounded to the nearest tokens: cosine to the target", rounded)
    print(f"| rank of J | {'; '.join(dict.fromkeys(ranks))} |", flush=True)


def discrete(f: TextEncoder, sources: Sequence[str], targets: Sequence[str]) -> None:
    """Search token by token."""
    found = refine_tokens(f, sources, targets, progress=False)
    row("token sequences, cosine to the target", found.cosines.tolist(), ".4f")
    row("… share of tokens that the target has too", [float(one) for one in found.shared])
    row("… evaluations", found.num_evals.tolist(), ".0f")
    row("… seconds", found.seconds.tolist(), ".1f")
    for place in (int(found.cosines.argmax()), int(found.cosines.argmin())):
        print(f"| {targets[place]} | {found.texts[place]} ({found.cosines[place]:.3f}) |", flush=True)


def injective(f: TextEncoder) -> None:
    """Find the nearest of many texts in four precisions."""
    texts = [f"{' '.join(words)}." for words in itertools.product(*(part.split(",") for part in GRAMMAR))]
    began = time.perf_counter()
    print("\n| weights | nearest distance | float noise | median distance | pairs | collision | nearest texts |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for one in find_nearest_texts(f, texts, progress=False):
        told = f"{one.distance:.2e} | {one.noise:.1e} | {one.median:.2f} | {one.num_pairs:,} | {one.collides}"
        print(f"| {one.precision} | {told} | {' / '.join(one.pair)} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} seconds")


def row(name: str, values: Sequence[float], spec: str = ".3f") -> None:
    """Print the median and the extremes of some values."""
    told = f"{statistics.median(values):{spec}} ({min(values):{spec}} to {max(values):{spec}}, n = {len(values)})"
    print(f"| {name} | {told} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
