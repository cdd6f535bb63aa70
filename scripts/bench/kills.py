"""Kill runs at random moments with SIGKILL, start them again with another number of processes, and look at the rows.

    python scripts/bench/kills.py --kills 30

A run of the small built-in checkpoint over drawn photos is made once undisturbed. Then it is made again and again:
started with one to three processes, of which one or all are killed after a random time; restarted; after a few kills
left to finish. After every kill the rows on disk must be whole and different ones; at the end the rows must be those
of the undisturbed run, and so must the bytes of every file but for `seconds`. A process that outlives a killed one must
end by itself.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_equiv.analyses import MatchConfig, WalkConfig, make_plan, run_analysis
from hf_equiv.models.encoder import Encoder
from hf_equiv.runs import shards
from hf_equiv.runs.schema import LAYOUTS

PATIENCE = 600.0
"""Seconds after which a process that should have ended counts as hanging."""


def main() -> int:
    """Run the kills and print what was found; returns 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how many processes or groups of processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--pairs", type=int, default=24, help="pairs of the run")
    parser.add_argument("--analysis", choices=["match", "walk"], default="match")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        return kill_runs(Path(place), given.kills, given.seed, given.pairs, given.analysis)


def kill_runs(place: Path, kills: int, seed: int, pairs: int, analysis: str) -> int:
    """Kill runs in `place`, print a table, and return the number of faults."""
    rng, layout = random.Random(seed), LAYOUTS[analysis]
    plan = make_run(save_photos(place / "photos"), pairs, analysis)
    start = time.monotonic()
    finish(start_processes(plan, place / "whole", 1))
    usual = time.monotonic() - start
    whole = rows_of(place / "whole", layout)
    seen, faults, killed, runs = Counter[str](), list[str](), 0, 0
    while killed < kills:
        runs += 1
        out = place / f"run{runs}"
        for attempt in range(rng.randint(2, 6)):
            if killed == kills:
                break
            count = rng.randint(1, 3) if attempt else 2
            left = 1.0 - (len(rows_of(out, layout)) / len(whole) if out.exists() else 0.0)
            if left == 0.0:
                break
            ends = list(disturb(plan, out, count, rng.uniform(0.0, 0.2 + left * usual / min(count, 2)), rng))
            killed += "killed" in ends  # at least one did not end before
            seen.update(ends)
            faults += [f"run {runs}: {fault}" for fault in damage(out, layout, whole)]
            seen[stage_of(out, layout)] += 1
        count = rng.randint(1, 3)
        if set(finish(start_processes(plan, out, count))) != {0}:
            faults.append(f"run {runs}: {count} processes did not finish it")
        faults += [f"run {runs}: {fault}" for fault in damage(out, layout, whole)]
        if rows_of(out, layout) != whole:
            faults.append(f"run {runs}: other rows than undisturbed")
        files = {path.name for path in shards.shard_files(out, layout)}
        if files != {path.name for path in shards.shard_files(place / "whole", layout)}:
            faults.append(f"run {runs}: other files than undisturbed: {sorted(files)}")
    print(f"{killed} kills in {runs} runs of {len(whole)} rows ({analysis}); undisturbed: {usual:.1f} s")
    for what, number in sorted(seen.items()):
        print(f"  {what:<44}{number:>4}")
    print(f"  {'rows lost, doubled or damaged; hangs':<44}{len(faults):>4}")
    for fault in faults:
        print(f"  {fault}")
    return len(faults)


def disturb(plan, out: Path, count: int, delay: float, rng: random.Random) -> Iterator[str]:
    """Start a run, kill one of its processes or all, wait for the others; yields what happened."""
    children = start_processes(plan, out, count)
    time.sleep(delay)
    chosen = children if rng.random() < 0.5 else [rng.choice(children)]
    for child in chosen:
        os.kill(child, signal.SIGKILL)  # a child that has ended is not reaped yet: its number is still its own
    ends = dict(zip(children, finish(children), strict=True))
    for child in chosen:
        yield "killed" if ends[child] == -signal.SIGKILL else "ended before it was killed"
    for child in set(children) - set(chosen):
        yield "survivor finished the run" if ends[child] == 0 else "survivor ended with a message"


def start_processes(plan, out: Path, count: int) -> list[int]:
    """Fork `count` processes that work on one run, as a launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()  # without paying for the imports
        if child == 0:
            if count > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }  # fmt: skip
            code = 1
            try:
                carry_out(plan, out)
                code = 0
            except (RuntimeError, ValueError, OSError) as error:  # told when the main process was killed
                print(f"    {error}")
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def finish(children: list[int]) -> list[int]:
    """Wait for processes; returns exit codes, negative for signals. One that hangs is killed, and raises."""
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for child in children:
            done, status = (0, 0) if child in codes else os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
            raise SystemExit(f"{len(children) - len(codes)} processes hang")
        time.sleep(0.01)
    return [codes[child] for child in children]


def damage(out: Path, layout, whole: dict) -> list[str]:
    """What is wrong with the rows on disk."""
    try:
        rows = list(shards.read_rows(out, images=True, layout=layout)) if out.exists() else []
    except ValueError as error:
        return [str(error)]
    keys = [key_of(row, layout) for row in rows]
    found = [f"{key} is there {keys.count(key)} times" for key in sorted(set(keys)) if keys.count(key) > 1]
    return found + [f"{key} is another row" for key, row in zip(keys, rows, strict=True) if clean(row) != whole[key]]


def stage_of(out: Path, layout) -> str:
    """Where the run was when it was killed."""
    if not (out / "run.json").exists():
        return "  before run.json"
    if b'"complete": true' in (out / "run.json").read_bytes():
        return "  when it was finished"
    if list((out / layout.folder).glob(".*.merged")):
        return "  while files were merged"
    there = len(shards.shard_files(out, layout))
    return "  before the first row" if not there else "  with some rows, or before it was closed"


def rows_of(out: Path, layout) -> dict:
    """Rows by key, without `seconds`."""
    return {key_of(row, layout): clean(row) for row in shards.read_rows(out, images=True, layout=layout)}


def key_of(row: dict, layout) -> str:
    """What names a row."""
    return f"{row[layout.item]} {row.get('step', '')}".strip()


def clean(row: dict) -> dict:
    """A row without what a clock has told."""
    return {key: value for key, value in row.items() if key != "seconds"}


def make_run(photos: Path, pairs: int, analysis: str):
    """A quick run of the small built-in checkpoint."""
    encoder = Encoder.from_pretrained("builtin-64", device="cpu")
    if analysis == "match":
        return make_plan(MatchConfig(data=str(photos), pairs=pairs, max_evals=8, refine=False), encoder)
    return make_plan(WalkConfig(data=str(photos), limit=pairs, num_steps=2, step=0.3), encoder)


def carry_out(plan, out: Path) -> None:
    """Make the run."""
    run_analysis(plan, out, batch_size=2) if isinstance(plan.config, MatchConfig) else run_analysis(plan, out)


def save_photos(folder: Path, count: int = 12) -> Path:
    """Draw smooth pictures by formula."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[0:64, 0:64] / 64
    for k in range(count):
        bands = [np.sin(2 * np.pi * ((k % 5 + 1) * x + (k % 3) * y + c / 3 + k / 7)) for c in range(3)]
        Image.fromarray(np.uint8(np.rint(127.5 + 110 * np.stack(bands, axis=2)))).save(folder / f"{k:02d}.png")
    return folder


if __name__ == "__main__":
    sys.exit(main())
