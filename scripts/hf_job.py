# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-equiv"]
# ///
r"""Run one analysis, check it, and publish it: as a job on the Hub's machines, or anywhere.

    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN scripts/hf_job.py \
        --model facebook/deit-tiny-patch16-224 --data USER/photos --pairs 50 --repo USER/deit-tiny-matches

It calls the command line three times: the analysis, `hf-equiv verify`, and `hf-equiv publish` if `--repo` is given and
the rows hold. Published datasets are private unless `--public` is given. Everything after `--` goes to the analysis:

    python scripts/hf_job.py --verb lipschitz --model builtin --data photos/ -- --directions random:16,null:16
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

VERBS = ("match", "spectrum", "lipschitz", "walk")


def main(arguments: list[str] | None = None) -> int:
    """Run the commands in turn; returns the exit code of the first that cannot go on, or of the analysis."""
    given, more = parse(sys.argv[1:] if arguments is None else arguments)
    for step, command in enumerate(commands(given, more)):
        print("+", shlex.join(command), file=sys.stderr, flush=True)
        code = subprocess.run([sys.executable, "-m", "hf_equiv", *command], check=False).returncode
        if code > (1 if step == 0 and not given.dry_run else 0):  # 1: some row did not converge, which is a result too
            return code
        if given.dry_run:
            break
    return 0


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the arguments into those of this script and those that the analysis gets."""
    own, _, more = " ".join(map(shlex.quote, arguments)).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verb", choices=VERBS, default="match", help="which analysis")
    parser.add_argument("--model", required=True, help="Hub id, folder or 'builtin'")
    parser.add_argument("--data", help="Hub dataset id[:config][:split], folder, parquet file or 'builtin'")
    parser.add_argument("--pairs", type=int, metavar="N", help="pairs to draw (match), or images (other analyses)")
    parser.add_argument(
        "--repo", metavar="USER/NAME", help="dataset repository to publish to; nothing is published without"
    )
    parser.add_argument("--public", action="store_true", help="publish in public")
    parser.add_argument("--out", default="run", help="run directory (default: run)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and how long it takes, and stop")
    return parser.parse_args(shlex.split(own)), shlex.split(more)


def commands(given: argparse.Namespace, more: list[str]) -> list[list[str]]:
    """The calls of `hf-equiv`, in order."""
    analysis = [given.verb, given.model, "--out", given.out]
    if given.data is not None:
        analysis += ["--data", given.data]
    if given.pairs is not None:
        analysis += ["--pairs" if given.verb == "match" else "--limit", str(given.pairs)]
    analysis += [*more, *(["--dry-run"] if given.dry_run else [])]
    publish = ["publish", given.out, given.repo, *(["--public"] if given.public else [])]
    return [analysis, ["verify", given.out], *([publish] if given.repo is not None else [])]


if __name__ == "__main__":
    sys.exit(main())
