"""Write to the standard streams: text is made printable, and a stream that is closed or full loses no result."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from hf_equiv.formatting import printable


def open_streams() -> None:
    """Open the null device in place of streams that are closed, and write what an encoding lacks as an escape."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # else the next file gets their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def writing(stream: TextIO) -> Iterator[TextIO]:
    """Write to a standard stream; text without a reader is dropped, since all results are on disk."""
    try:
        yield stream
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for the rest of the text, and for Python's exit
        if stream is not sys.stderr and not isinstance(error, BrokenPipeError):
            told = f"standard output cannot be written: {error.strerror}"
            raise OSError(f"{told}. The files of the command are complete; redirect its output elsewhere.") from error


def to_stderr(text: str) -> None:
    """Print a line on stderr."""
    with writing(sys.stderr) as stream:
        stream.write(f"{printable(text)}\n")  # in one piece, since other processes write there too
