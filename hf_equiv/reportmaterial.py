"""What the sections of a report are written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_equiv.reportpage import Heading, Text, code
from hf_equiv.reportruns import Checkpoint

Row = Mapping[str, Any]
MODEL = "MODEL"
"""What commands call the checkpoint."""


@dataclass(frozen=True)
class Material:
    """What the sections of one checkpoint are written from.

    Attributes:
        checkpoint: its runs.
        numbers: as from `checkpoint_numbers`.
        measured: as from `measure_run`; None if it could not be measured.
        reason: why not, in a sentence; "" if it was.
        survival: whether survival was asked for.
        transfer: whether a second model was named.
        transfer_note: why it could not be asked; "" if it was.
        labelled: what `--label-data` names; None without.
        prefix: of file names and anchors.
    """

    checkpoint: Checkpoint
    numbers: Row
    measured: Row | None
    reason: str
    survival: bool
    transfer: bool
    labelled: str | None
    prefix: str
    transfer_note: str = ""

    def name(self, what: str) -> str:
        """File name of a figure."""
        return f"{self.prefix}-{what}.png"

    def heading(self, text: str, what: str) -> Heading:
        """Heading of a section."""
        return Heading(text, 3, f"{self.prefix}-{what}")


def missing(what: str, command: str) -> Text:
    """Say which command would give what is not there."""
    return Text(f"Not measured: {what}. To add it: {code(command)} and this report again.", "quiet")


def unmeasured(m: Material, what: str) -> Text:
    """Say why something could not be measured."""
    return Text(f"Not measured: {what}, because {m.reason or 'no match was made'}.", "quiet")


def value(estimate: Row | None) -> float | None:
    """The number alone."""
    return None if estimate is None else float(estimate["value"])
