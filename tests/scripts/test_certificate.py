"""The benchmark of certificates prints its table, keeps every attack and draws the curves."""

from __future__ import annotations

import json
from pathlib import Path

from runcases import SCRIPT, python

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def test_every_part_is_reported(tmp_path):
    given = ["--images", "2", "--sigmas", "0.1", "--ratios", "0.5", "--n", "40", "--attacks", "2", "--attack-n", "10"]
    given += ["--num-steps", "1", "--draws", "2", "--json", "rows.json", "--figure", "cosines.png"]
    done = python(SCRIPT, BENCH / "certificate.py", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["radius"] for row in rows] == [0.05]
    for row in rows:
        assert [(one["image"], one["boxed"]) for one in row["attacks"]] == [
            (0, False),
            (1, False),
            (0, True),
            (1, True),
        ]
        assert row["violations"] == 0
        assert max(row["certified"]) < min(row["free"] + row["boxed"])
    assert done.stdout.count("\n| 0.05 |") == 1
    assert (tmp_path / "cosines.png").read_bytes().startswith(b"\x89PNG")
