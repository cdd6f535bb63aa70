"""Files that strangers send: PNG files chunk by chunk, and formats that no decoder here may read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
BOMB = zlib.compress(bytes(4_000_000))


def as_file(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows: np.ndarray, depth: int, colour: int, width: int, before: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG file of packed rows (H, bytes), with chunks before the pixels and bytes at the end of their stream."""
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)) + more
    return SIGNATURE + chunk(b"IHDR", head) + before + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
ROWS = PIXELS.reshape(16, -1)
PLAIN = png(ROWS, 8, 2, 16)
RGB = Image.fromarray(PIXELS)


def tiled_tiff(side: int, tile: int) -> bytes:
    """A grey TIFF file of side x side pixels in one tile, which is decoded whole."""
    data, numbers = zlib.compress(bytes(tile * tile)), {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1}
    numbers |= {322: tile, 323: tile, 324: 8 + 2 + 12 * 10 + 4, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in numbers.items())
    return b"II*\0" + struct.pack("<IH", 8, len(numbers)) + entries + bytes(4) + data


NO_PHOTOS = {
    "eps": EPS,
    "binary eps": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS,
    "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 16, 8, 3) + bytes(1000),
    "fits": b"SIMPLE  =                    T".ljust(2880) + bytes(2880),
    "svg": b"<svg><image href='file:///etc/passwd'/></svg>",
    **{kind: as_file(RGB, kind) for kind in ("PCX", "TGA", "ICO", "SGI", "IM", "DDS", "PDF")},
}
"""Files that Pillow knows, under whatever name."""

NOT_STORED = {
    "eps": EPS,
    "jpeg": as_file(RGB, "JPEG"),
    "tail": PLAIN + b"PK\3\4",
    "gamma": png(ROWS, 8, 2, 16, chunk(b"gAMA", struct.pack(">I", 1))),
    "profile": png(ROWS, 8, 2, 16, chunk(b"iCCP", b"x\0\0" + BOMB)),
    "rotation": png(ROWS, 8, 2, 16, chunk(b"eXIf", b"II*\0")),
    "second frame": as_file(RGB, "PNG", save_all=True, append_images=[Image.new("RGB", (16, 16))]),
    "palette": as_file(RGB.quantize(8), "PNG"),
    "alpha": as_file(RGB.convert("RGBA"), "PNG"),
    "16 bit": png(np.zeros((16, 96), np.uint8), 16, 2, 16),
    "more rows": png(np.vstack([ROWS, ROWS]), 8, 2, 16).replace(struct.pack(">II", 16, 32), struct.pack(">II", 16, 16)),
    "hidden bytes": png(ROWS, 8, 2, 16, more=b"hidden"),
    "checksum": PLAIN[:-6] + b"\0" + PLAIN[-5:],
    "30000 px": PLAIN.replace(struct.pack(">II", 16, 16), struct.pack(">II", 30_000, 30_000)),
}
"""Files that are no image of a stored run, although some programs show them as the right one."""
