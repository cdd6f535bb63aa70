"""The rows of one image of an analysis, and how their columns are compared (private to `verify`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_equiv.layouts import row_name
from hf_equiv.rowcheck import Findings
from hf_equiv.shards import Row

if TYPE_CHECKING:
    from hf_equiv.encoder import Encoder


class Columns:
    """Compares columns with what was recomputed, and notes what does not agree.

    Args:
        analysis: `spectrum`, `lipschitz` or `walk`.
        file: where the rows are.
        encoder: f.
        settings: of the run.
        floats: of the shard.
        found: collects what does not hold.
    """

    def __init__(
        self, analysis: str, file: str, encoder: Encoder, settings: Row, floats: Mapping[str, Tensor], found: Findings
    ) -> None:
        self.analysis, self.file, self.encoder, self.settings = analysis, file, encoder, settings
        self.floats, self.found = floats, found
        self.dtype = torch.float64 if encoder.dtype == torch.float64 else torch.float32

    def name(self, row: Row) -> str:
        """What a row is called in messages."""
        return row_name(self.analysis, row)

    def say(self, row: Row, column: str, wanted: str, why: str) -> None:
        """Note a problem that is no number."""
        name = self.name(row)
        self.found.say(self.file, name, column, wanted, None, f"row {name!r}, {column}: {why}")

    def near(self, row: Row, column: str, made: float | None, tolerance: float, stated: Any = ...) -> None:
        """Note a number that is off by more than `tolerance`."""
        value = row[column] if stated is ... else stated
        if value is None or made is None:
            if value is not made:
                self.found.add(self.file, self.name(row), column, value, made)
        elif not abs(value - made) <= tolerance:  # written so that NaN is a problem
            self.found.add(self.file, self.name(row), column, value, made, f"tolerance {tolerance:.1e}")

    def same(self, row: Row, column: str, made: Any) -> None:
        """Note what is not the same."""
        if row[column] != made:
            self.found.add(self.file, self.name(row), column, row[column], made)

    def ladder(self, row: Row, column: str, made: Sequence[float | None], tolerances: Sequence[float]) -> None:
        """Note the first number of a list that is off."""
        stated = row[column]
        if stated is None or len(stated) != len(made):
            self.same(row, column, list(made))
            return
        for i, (value, own, tolerance) in enumerate(zip(stated, made, tolerances, strict=True)):
            both = value is not None and own is not None
            if (both and not abs(value - own) <= tolerance) or (not both and value is not own):
                told = f"number {i + 1} of {len(made)}; tolerance {tolerance:.1e}"
                self.found.add(self.file, self.name(row), column, value, own, told)
                return
