"""What matching and 8-bit refinement cost beside the bare encoder: time, operations, synchronisations, memory.

    python scripts/bench/throughput.py --model facebook/deit-tiny-patch16-224 --data photos/ --batch 1 8
    python scripts/bench/throughput.py --random vit-base --data photos/ --batch 64 --dtype float32 bfloat16

The first B of the pairs that `--seed` draws are matched as one batch of B by `match_embedding` and refined by
`refine_8bit`. A meter around the encoder notes each call: its images, and the cotangents of its backward passes.

* **matched**: pairs with an error of at most 1e-5. The figures of the others say little.
* **matches/s**: B over the seconds of the match, and over those of match and refinement.
* **share of f**: evaluations × (seconds of a bare forward and backward pass of B images) / B / seconds, for the match
  and for both. One evaluation is (forwards + 2·cotangents) / 3 of an image. Images that leave the batch lower it.
* **× f+b**: seconds of the match over Σ evaluations × (seconds of a bare forward and backward pass of b images) / b
  over its calls, where b is the number of images of a call.
* **× calls**: seconds of match and refinement over those of the very same calls on the bare encoder: forwards and
  products with Jᵀ, of as many images and cotangents.
* Bare passes are timed in the same process, in turn with the match: every 10 evaluations its clock stands still while
  its last call is repeated on the bare encoder. Each is a mean, so that slow moments of the machine fall on both.
  `torch.cuda.synchronize` stands around every time on a GPU.
* **operations, syncs**: what a `TorchDispatchMode` sees, less what it sees in the same calls on the bare encoder, for a
  batched evaluation (of the first 100, without end game), for a whole match of an image and for its refinement. Views
  are operations. Synchronisations are the operations of `meter.WAITS`, an index by a boolean mask, and a blocking copy
  between devices. A CPU has no such copy, so a GPU may have more.
* **MiB**: largest memory in use above that of a bare pass of B images, over B: `torch.cuda.max_memory_allocated`, or
  the resident size of the process with every tensor of 64 KiB or more mapped by itself. The match runs 100 evaluations
  without its end game, so that its history is full. The end game adds the Jacobian (**J**, D·N numbers) of an image.

The checks of f, made once for an encoder, are in no number. With `--dtype bfloat16` the match starts on the encoder in
bfloat16, as `hf-equiv match --dtype bf16` does. Matches by random weights are about time alone.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from match import machine, versions
from meter import Paired, Watched, bare, lower_peak, outside, peak, shape_of
from torch import Tensor
from transformers import ViTConfig, ViTModel

from hf_equiv import LBFGS, Encoder, MatchResult, draw_pairs, load_images, match_embedding, refine_8bit
from hf_equiv.analyses.stages import HALF
from hf_equiv.precision import no_tf32

RANDOM = {"vit-base": ViTConfig()}  # ViT-B/16: 12 layers, width 768
PARTS = ("seconds", "counts", "memory")
FILLED = 100  # evaluations after which the history of a match is full


class Embedding(torch.nn.Module):
    """The CLS token of a vision transformer with random weights."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = ViTModel(config, add_pooling_layer=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised images."""
        return self.body(pixel_values=pixels).last_hidden_state[:, 0]


class Case:
    """B pairs, an encoder, and what is measured on them."""

    def __init__(self, args: argparse.Namespace, dtype: str, batch: int) -> None:
        if args.random:
            size, name = RANDOM[args.random].image_size, f"{args.random}, random weights"
            module = Embedding(RANDOM[args.random])
            self.encoder = Encoder.wrap(module, size=size, mean=0.5, std=0.5, name=name, device=args.device)
        else:
            self.encoder = Encoder.from_pretrained(args.model, device=args.device)
        photos, self.max_evals = load_images(args.data), args.max_evals
        places = [place for pair in draw_pairs(photos, batch, args.seed) for place in pair]
        pixels = self.encoder.preprocess([photos[i].image for i in places]).to(args.device)
        self.source = pixels[0::2].contiguous()
        with torch.no_grad():
            self.z = self.encoder(pixels[1::2])
        self.steps = [("match", self.encoder, self.match), ("refine", self.encoder, self.refine)]
        if dtype in HALF:
            half, self.near = HALF[dtype]
            self.steps.insert(0, ("match", self.encoder.in_dtype(half), self.draft))

    def draft(self, f: Any, _: Any, most: int) -> MatchResult:
        """Come near the targets in half precision."""
        goal = {"rtol": self.near, "max_evals": max(1, most // 5), "raise_on_failure": False, "progress": False}
        return match_embedding(f, self.source, self.z, LBFGS(newton=False), **goal)

    def match(self, f: Any, start: MatchResult | None, most: int, newton: bool = True) -> MatchResult:
        """Match the pairs."""
        solver = LBFGS(newton=newton) if start is None else LBFGS(newton=newton, warmup=0)
        goal = {"max_evals": most, "raise_on_failure": False, "start": start, "progress": False}
        return match_embedding(f, self.source, self.z, solver, **goal)

    def refine(self, f: Any, found: MatchResult | None, most: int) -> MatchResult:
        """Refine matches on the 8-bit grid."""
        images = self.source if found is None else found.images
        return refine_8bit(f, images, self.z, source=self.source, max_evals=most, progress=False)

    def seconds(self) -> dict[str, Any]:
        """Time both verbs beside the bare encoder."""
        row: dict[str, Any] = collections.defaultdict(collections.Counter)
        batch, found = len(self.source), None
        for name, encoder, run in self.steps:
            f = Paired(encoder, self.source)
            run(f, found, 2)  # the checks of f
            with f.measure():
                found = run(f, found, self.max_evals)
            shapes = [shape_of(call) for call in f.calls]
            spent = {
                "seconds": f.seconds,
                "evaluations": f.num_evals,
                "full_passes": f.num_evals * f.seconds_of((batch, 1)) / batch,
                "passes": sum((1 + 2 * sum(s[1:])) / 3 * f.seconds_of((s[0], 1)) for s in shapes),
                "calls": sum(map(f.seconds_of, shapes)),
            }
            row[name].update(spent)  # adds
            row |= {f"errors_{name}": found.errors.tolist(), f"evaluations_{name}": found.num_evals.tolist()}
        return row

    def counts(self) -> dict[str, Any]:
        """Count operations and synchronisations outside the encoder, of an evaluation and of whole images."""
        descent = ("evaluation", self.encoder, lambda f, _, most: self.match(f, None, min(most, FILLED), newton=False))
        row, found = collections.defaultdict(collections.Counter), None
        for name, encoder, run in [*self.steps, descent]:  # which starts anew
            f = Watched(encoder)
            run(f, found, 2)
            found, seen = outside(f, self.source, partial(run, f, found, self.max_evals))
            per = float(found.num_evals.max()) if name == "evaluation" else len(self.source)
            row[name].update({key: count / per for key, count in seen.items()})
        return row

    def memory(self) -> dict[str, float]:
        """Measure the bytes of an image above those of a bare pass."""
        f, batch, found = self.encoder, len(self.source), lower_peak(self.source.device)
        for _, encoder, run in self.steps:
            found = run(encoder, found, 2)  # the checks of f
        full = partial(self.match, f, None, FILLED, newton=False)
        levels = []
        for work in (bare(f, self.source, (batch, 1)), full, partial(self.refine, f, found, self.max_evals)):
            lower_peak(self.source.device)
            work()
            levels.append(peak(self.source.device))
        return {"match": (levels[1] - levels[0]) / batch, "refine": (levels[2] - levels[0]) / batch}


def measure(args: argparse.Namespace, dtype: str, batch: int, part: str, threads: int) -> dict[str, Any]:
    """Measure one part of a row."""
    torch.set_num_threads(threads)
    with no_tf32():
        case = Case(args, dtype, batch)
        size = len(case.z[0]) * case.source[0].numel() * case.source.element_size()
        return {"model": case.encoder.model_id, "jacobian": size, part: getattr(case, part)()}


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a row by the heads of their columns."""
    found = {"model": row["model"], "device, dtype": f"{row['device']}, {row['dtype']}", "B": str(row["batch"])}
    if times := row.get("seconds"):
        match, refine = times["match"], times["refine"]
        both = {key: match[key] + refine[key] for key in match}
        found["matched"] = f"{sum(error <= 1e-5 for error in times['errors_match'])} of {row['batch']}"
        found["matches/s"] = ", ".join(f"{row['batch'] / one['seconds']:.3g}" for one in (match, both))
        found["share of f"] = ", ".join(f"{one['full_passes'] / one['seconds']:.0%}" for one in (match, both))
        found["× f+b"] = f"{match['seconds'] / match['passes']:.2f}"
        found["× calls"] = ", ".join(f"{one['seconds'] / one['calls']:.2f}" for one in (match, refine))
    for name in ("evaluation", "match", "refine") if "counts" in row else ():
        one = row["counts"][name]
        found[f"operations, syncs: {name}"] = f"{one['operations']:,.0f}, {one['synchronisations']:,.1f}"
    if memory := row.get("memory"):
        sizes = [f"{size / 2**20:,.0f}" for size in (memory["match"], memory["refine"], row["jacobian"])]
        found["MiB: match, refine (J)"] = "{}, {} ({})".format(*sizes)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    found = [cells(row) for row in rows]
    lines = ["| " + " | ".join(found[0]) + " |", "| --- | --- " + "| ---: " * (len(found[0]) - 2) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(one.values()) + " |" for one in found)])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description="What matching costs beside the bare encoder.")
    parser.add_argument("--model", default="builtin", help="checkpoint: a Hub id, a folder or builtin")
    parser.add_argument("--random", choices=[*RANDOM], help="a model with random weights instead")
    parser.add_argument("--data", default="builtin", help="photos: a file, a folder, a Hub dataset or builtin")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--dtype", nargs="+", choices=["float32", *HALF], default=["float32"], help="of the start")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-evals", type=int, default=1000, help="evaluations a match, and a refinement, may spend")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures here, after every part")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure each part of each row in a process of its own, then print the table."""
    args = parse(argv)
    report = {"machine": machine(torch.device(args.device)), "versions": versions(), "rows": []}
    for dtype, batch in itertools.product(args.dtype, args.batch):
        row = {"device": args.device, "dtype": dtype, "batch": batch}
        report["rows"].append(row)
        for part in args.parts:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row |= pool.submit(measure, args, dtype, batch, part, torch.get_num_threads()).result()
            print(f"{row['model']}, batch {batch}, {dtype}: {part}", file=sys.stderr)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    told = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    text = f"{table(report['rows'])}\n\nMachine: {report['machine']}.  \nVersions: {told}."
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
