"""What runs cost beside the bare matching: speed-up of two processes, overhead, memory as the data set grows.

    OMP_NUM_THREADS=1 python scripts/bench/scaling.py --pairs 24

* **speed-up**: one run by 1 and by 2 processes of one thread each, forked after the imports, so that only the work is
  timed. The load of the machine before the run is stated: two processes need two idle cores.
* **overhead**: all the time of a run by one process, against the time inside `match_embedding` and `refine_8bit`: what
  is left is reading photos, PNG, the measures of each row (16 forwards, 2 of them in float64), shards, merging,
  summary, card and figure.
* **memory**: largest resident size of a process that plans and carries out 4 pairs of a parquet file, over what it had
  after the imports, for a file of 200 and one of 2000 photos.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from kills import finish, save_photos, start_processes

from hf_equiv.analyses import MatchConfig, make_plan, run_analysis
from hf_equiv.models.encoder import Encoder
from hf_equiv.runs import shards


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--max-evals", type=int, default=100)
    parser.add_argument("--skip", default="", help="speed, overhead or memory, comma-separated")
    given = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        encoder = Encoder.from_pretrained(given.model, device="cpu")
        data = str(save_photos(place / "photos"))
        plan = make_plan(MatchConfig(data=data, pairs=given.pairs, max_evals=given.max_evals), encoder)
        if "speed" not in given.skip:
            speed(plan, place)
        if "overhead" not in given.skip:
            overhead(plan, place)
        if "memory" not in given.skip:
            memory(encoder, place)
    return 0


def speed(plan, place: Path) -> None:
    """Time one and two processes, in turn."""
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    seconds = {}
    for count in (1, 2):
        start = time.monotonic()
        assert finish(start_processes(plan, place / f"by{count}", count)) == [0] * count
        seconds[count] = time.monotonic() - start
    print(f"{len(plan.items)} pairs: 1 process {seconds[1]:.1f} s, 2 processes {seconds[2]:.1f} s: "
          f"{seconds[1] / seconds[2]:.2f} x")  # fmt: skip


def overhead(plan, place: Path) -> None:
    """Compare all the time of a run with that inside the matching; loading of libraries is not part of it."""
    import matplotlib.backends.backend_agg  # noqa: F401

    out = place / "alone"
    start = time.monotonic()
    run_analysis(plan, out)
    whole = time.monotonic() - start
    bare = sum(row["seconds"] for row in shards.read_rows(out))
    print(f"{len(plan.items)} pairs by one process: {whole:.1f} s, of which matching and refining {bare:.1f} s: "
          f"overhead {100 * (whole / bare - 1):.1f} %")  # fmt: skip


def memory(encoder, place: Path) -> None:
    """Grow the data set tenfold."""
    torch.manual_seed(0)
    for count in (200, 2000):
        path = place / f"{count}.parquet"
        write_parquet(path, count)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            config = MatchConfig(data=str(path), pairs=4, max_evals=10, refine=False)
            cache = str(place / f"cache{count}")
            run_analysis(make_plan(config, encoder, cache_dir=cache), place / f"out{count}")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"{count} photos ({path.stat().st_size / 1e6:.0f} MB): {before / 1024:.0f} MiB after the imports, "
                  f"{peak / 1024:.0f} MiB at most", flush=True)  # fmt: skip
            os._exit(0)
        os.waitpid(child, 0)


def write_parquet(path: Path, count: int) -> None:
    """Photos of noise, which does not compress: about 60 kB each."""
    import numpy as np
    from PIL import Image

    def rows():
        rng = np.random.default_rng(0)
        for k in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (144, 144, 3), dtype=np.uint8)).save(buffer, "PNG")
            yield {"image": {"bytes": buffer.getvalue(), "path": None}, "label": k % 10}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_generator(rows, features=features, cache_dir=str(path.parent / "made")).to_parquet(str(path))


if __name__ == "__main__":
    sys.exit(main())
