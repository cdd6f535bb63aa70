"""Check that the PNG file of a stored image holds its pixels and nothing else."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache

from hf_equiv.limits import MAX_PIXELS

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@lru_cache(maxsize=16)  # all rows of an image hold the same file
def check_png(data: bytes) -> tuple[int, int]:
    """Return the width and height of a stored PNG file; refuse one that is damaged or holds more than 8-bit RGB."""
    # A profile, a palette, a second frame or bytes at the end show other pixels in other programs. The compressed
    # bytes themselves are free, since they depend on the version of zlib.
    try:
        width, height, packed = _read_plain_png(data)
        wanted, unpacker = height * (1 + 3 * width), zlib.decompressobj()
        rows = unpacker.decompress(packed, wanted + 1)
        if len(rows) != wanted or not unpacker.eof or unpacker.unused_data or max(rows[:: 1 + 3 * width]) > 4:
            raise ValueError(f"its pixels must be those of {width} x {height} and end there")
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(
            f"a stored image must be a PNG of 8-bit RGB pixels and nothing else; {error}. Make the row again."
        ) from None
    return width, height


def _read_plain_png(data: bytes) -> tuple[int, int, bytes]:
    """Return width, height and the compressed pixels of a PNG file that has no other chunks."""
    if not isinstance(data, bytes) or not data.startswith(SIGNATURE):
        raise ValueError("it has no PNG signature")
    parts = list(chunks(data))
    kinds = [kind for kind, _ in parts]
    if b"IEND" in kinds[:-1]:
        raise ValueError("it has bytes after its end")
    if others := sorted({kind.decode("latin-1") for kind in kinds} - {"IHDR", "IDAT", "IEND"}):
        raise ValueError(f"it also holds {', '.join(map(repr, others[:3]))}")
    if kinds[:1] != [b"IHDR"] or set(kinds[1:-1]) != {b"IDAT"} or kinds[-1] != b"IEND":
        raise ValueError("it must be one header, pixels and one end")
    for kind, chunk in parts:
        if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise ValueError(f"its checksum of {kind.decode()} is wrong")
    width, height, *form = struct.unpack(">IIBBBBB", parts[0][1][8:-4])
    if form != [8, 2, 0, 0, 0] or len(parts[-1][1]) != 12:
        raise ValueError(f"it has bit depth {form[0]}, colour type {form[1]}, interlacing {form[4]}")
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it must have 1 to {MAX_PIXELS:,} pixels; got {width} x {height}")
    return width, height, b"".join(chunk[8:-4] for kind, chunk in parts if kind == b"IDAT")


def chunks(png: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield each chunk of a PNG file with its kind; the last one is cut where the file is."""
    view, place = memoryview(png), len(SIGNATURE)
    while place < len(png):
        end = place + 12 + int.from_bytes(view[place : place + 4], "big")
        yield bytes(view[place + 4 : place + 8]), view[place:end]
        place = end
