"""Matching, side by side: this library's solvers, the paper's gradient descent, SciPy, plenoptic and ART.

Every method gets the same pairs, starts at the source image and aims at the embedding of the target image:

    python scripts/bench/match.py --model facebook/deit-tiny-patch16-224 --data photos/ --pairs 20 --markdown bench.md

What is compared, and how it is kept fair:

* One pair at a time. A meter around the encoder counts every image that goes forward or backward through it;
  evaluations = (forwards + 2·cotangents + 2·tangents) / 3, so one forward with its backward is one evaluation.
* Every method is done at the first image with an error of at most `--rtol`, or when `--max-evals` are spent. What the
  peers spend before their first step (shape checks, the target's embedding) is not charged to them, and ART's second
  forward in every step, of the unchanged target, is answered from memory.
* The meter looks at each image a method tries. A peer's result is the best of them, whichever it would have returned.
  The result of this library's solvers is what they return, and everything they do is charged.
* An image outside [0, 1] counts as its clipped image: plenoptic and torch's L-BFGS hold the box only softly.
* error = ‖f(x) − z‖ / ‖z‖. The 8-bit error of this library is that of `refine_8bit`, whose cost is a column of its
  own; the peers have nothing of the kind, so their result is rounded to k/255.
* Medians over pairs. A level that a pair never reached counts as infinite; the share that did is in brackets.

The peers come with `pip install -c constraints.txt ".[bench]"`; those absent are skipped with a note.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the peers' progress bars

import torch
from meter import LEVELS, Meter
from methods import METHODS
from torch import Tensor

from hf_equiv import Encoder, draw_pairs, load_images, refine_8bit
from hf_equiv.precision import no_tf32

PACKAGES = ("hf-equiv", "torch", "transformers", "scipy", "plenoptic", "adversarial-robustness-toolbox")


def psnr_db(image: Tensor, source: Tensor) -> float | None:
    """Peak signal-to-noise ratio of an image against the source, range 1; None where they are equal."""
    mse = float((image.double() - source.double()).square().mean())
    return -10 * math.log10(mse) if mse > 0 else None


def round_8bit(images: Tensor) -> Tensor:
    """The nearest image on the k/255 grid."""
    return (images.clamp(0.0, 1.0) * 255).round() / 255


def measure(name: str, meter: Meter, source: Tensor) -> dict[str, Any]:
    """Run one method on one pair; returns its row."""
    method = METHODS[name]
    image = method.run(meter, source)
    if image is None:
        image = meter.best_image
    row: dict[str, Any] = {
        "method": name,
        "error": meter.error(image),
        "psnr_db": psnr_db(image, source),
        "error_rounded": meter.error(round_8bit(image)),
        "num_evals": meter.num_evals,
        "seconds": meter.seconds,
        "evals_to": {f"{level:.0e}": meter.reached[level][0] if level in meter.reached else None for level in LEVELS},
        "seconds_to": {f"{level:.0e}": meter.reached[level][1] if level in meter.reached else None for level in LEVELS},
        "error_8bit": None,
        "num_evals_8bit": None,
        "seconds_8bit": None,
    }
    if method.is_ours:
        with meter.measure():
            exact = refine_8bit(meter, image, meter.z, source=source, rtol=meter.rtol).images
        if not torch.allclose(exact, round_8bit(exact), rtol=0.0, atol=1e-6):
            raise RuntimeError(f"{name}: `refine_8bit` left the k/255 grid.")
        row["error_8bit"] = meter.error(round_8bit(exact))
        row["num_evals_8bit"] = meter.num_evals - row["num_evals"]
        row["seconds_8bit"] = meter.seconds - row["seconds"]
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one method's rows; a level not reached counts as infinite, an infinite median is None."""

    def middle(values: list[float | None]) -> float | None:
        value = statistics.median(math.inf if v is None else v for v in values)
        return value if math.isfinite(value) else None

    final = [row["error_rounded"] if row["error_8bit"] is None else row["error_8bit"] for row in rows]
    levels = [f"{level:.0e}" for level in LEVELS]
    return {
        "method": rows[0]["method"],
        "pairs": len(rows),
        "error": middle([row["error"] for row in rows]),
        "error_worst": max(row["error"] for row in rows),
        "psnr_db": middle([row["psnr_db"] for row in rows]),
        "error_8bit": middle(final),
        "error_8bit_worst": max(final),
        "num_evals": middle([row["num_evals"] for row in rows]),
        "num_evals_8bit": middle([row["num_evals_8bit"] for row in rows]),
        "seconds": middle([row["seconds"] for row in rows]),
        "evals_to": {level: middle([row["evals_to"][level] for row in rows]) for level in levels},
        "seconds_to": {level: middle([row["seconds_to"][level] for row in rows]) for level in levels},
        "share": {level: sum(row["evals_to"][level] is not None for row in rows) / len(rows) for level in levels},
    }


def table(summaries: list[dict[str, Any]]) -> str:
    """The summaries as a Markdown table."""

    def number(value: float | None, spec: str) -> str:
        return "–" if value is None else format(value, spec)

    def level(summary: dict[str, Any], key: str) -> str:
        share = summary["share"][key]
        if share == 0:
            return "–"
        text = f"{number(summary['evals_to'][key], '.0f')} / {number(summary['seconds_to'][key], '.1f')} s"
        return text if share == 1 else f"{text} ({share:.0%})"

    levels = [f"{level:.0e}" for level in LEVELS]
    head = ["method", "error, median / worst", "PSNR dB", "8-bit error, median / worst", "evaluations", "+ for 8 bit"]
    head += [f"to {key}: evaluations / time" for key in levels]
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for summary in summaries:
        cells = [
            METHODS[summary["method"]].title,
            f"{number(summary['error'], '.1e')} / {summary['error_worst']:.1e}",
            number(summary["psnr_db"], ".1f"),
            f"{number(summary['error_8bit'], '.1e')} / {summary['error_8bit_worst']:.1e}",
            number(summary["num_evals"], ".0f"),
            number(summary["num_evals_8bit"], ".0f"),
            *(level(summary, key) for key in levels),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of Python and of what is installed among the packages compared."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine(device: torch.device) -> str:
    """The processor, its cores, the threads torch uses, and the GPU when one is used."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    text = f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}; {text}" if device.type == "cuda" else text


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description="Matching, side by side with the peers.")
    parser.add_argument("--model", default="builtin", help="checkpoint: a Hub id, a folder or builtin")
    parser.add_argument("--data", default="builtin", help="photos: a file, a folder, a Hub dataset or builtin")
    parser.add_argument("--pairs", type=int, default=20, help="pairs to draw")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--max-evals", type=int, default=400, help="evaluations each method may spend on a pair")
    parser.add_argument("--rtol", type=float, default=1e-5, help="error at which a method is done")
    parser.add_argument("--readout", default="auto", help="which embedding")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"comma-separated, of {', '.join(METHODS)}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write rows and medians here, after every pair")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table here")
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods.split(",")))
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"unknown method {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run every method on every pair, then print the table."""
    args = parse(argv)
    warnings.filterwarnings("ignore", module=r"plenoptic|art\.")
    skipped = {name: METHODS[name].needs for name in args.methods if not importlib.util.find_spec(METHODS[name].needs)}
    for name, package in skipped.items():
        print(f"{name} is skipped: {package} is not installed.", file=sys.stderr)
    names = [name for name in args.methods if name not in skipped]

    encoder = Encoder.from_pretrained(args.model, readout=args.readout, device=args.device)
    photos = load_images(args.data)
    pairs = draw_pairs(photos, args.pairs, args.seed)
    report: dict[str, Any] = {
        "model": encoder.model_id,
        "revision": encoder.revision,
        "readout": encoder.readout,
        "data": photos.data_id,
        "settings": {key: getattr(args, key) for key in ("pairs", "seed", "max_evals", "rtol", "methods")},
        "machine": machine(torch.device(args.device)),
        "versions": versions(),
        "skipped": skipped,
        "rows": [],
        "summary": [],
    }
    for index, (i, j) in enumerate(pairs):
        source_item, target_item = photos[i], photos[j]
        pixels = encoder.preprocess([source_item.image, target_item.image]).to(args.device)
        source, target = pixels[:1], pixels[1:]
        for name in names:
            with no_tf32():
                meter = Meter(encoder, target, args.rtol, args.max_evals)
                row = {"source_id": source_item.id, "target_id": target_item.id, **measure(name, meter, source)}
            report["rows"].append(row)
            print(
                f"pair {index + 1}/{len(pairs)} {name}: error {row['error']:.1e}, {row['num_evals']:.0f} evaluations, "
                f"{row['seconds']:.1f} s",
                file=sys.stderr,
            )
        report["summary"] = [summarise([row for row in report["rows"] if row["method"] == name]) for name in names]
        if args.json:
            args.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    text = "\n\n".join([table(report["summary"]), caption(report)])
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")


def caption(report: dict[str, Any]) -> str:
    """What was run, where and with which versions: the lines under the table."""
    settings = report["settings"]
    count = len({(row["source_id"], row["target_id"]) for row in report["rows"]})
    lines = [
        f"{report['model']} ({report['readout']}), {count} pairs of {report['data']}, seed {settings['seed']}, "
        f"at most {settings['max_evals']} evaluations a pair, done at {settings['rtol']:.0e}; one pair at a time.",
        f"Machine: {report['machine']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
    ]
    if report["skipped"]:
        lines.append("Skipped, not installed: " + ", ".join(report["skipped"]) + ".")
    return "  \n".join(lines)


if __name__ == "__main__":
    main()
