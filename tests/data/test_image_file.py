"""Which files are decoded, at which bit depth, and which PNG files count as stored images."""

import struct

import numpy as np
import pytest
from hostile import BOMB, NO_PHOTOS, NOT_STORED, PIXELS, PLAIN, RGB, ROWS, as_file, chunk, png, tiled_tiff
from PIL import Image

from hf_equiv import limits
from hf_equiv.data import image_file
from hf_equiv.data.image_file import FORMATS, decode_png, open_array, open_image, stored_image

GREY = np.array([[0, 100, 252]])


def levels(data: bytes) -> list[list[int]]:
    return np.asarray(open_image(data)).reshape(-1, 3).tolist()


@pytest.mark.parametrize("kind", NO_PHOTOS)
def test_no_other_decoder_runs(kind, tmp_path, monkeypatch):
    program, started = tmp_path / "gs", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "x.png").write_bytes(NO_PHOTOS[kind])
    for data in (NO_PHOTOS[kind], tmp_path / "x.png"):
        with pytest.raises(ValueError, match="must be an image file"):
            open_image(data)
    with pytest.raises(ValueError, match="a stored image must be"):
        decode_png(NO_PHOTOS[kind])
    assert not started.exists()


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_photos_of_every_promised_format_are_read(kind):
    assert open_image(as_file(RGB, kind)).size == (16, 16)


@pytest.mark.parametrize(
    "before",
    [
        chunk(b"iCCP", b"x\0\0" + BOMB),
        chunk(b"zTXt", b"x\0\0" + BOMB),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
        chunk(b"tEXt", b"Raw profile type exif\0no\nhex\nat\nall"),
        chunk(b"tEXt", b"x\0" + bytes(70_000_000)),
        chunk(b"tEXt", b"x\0y")[:-1] + b"\0",
        chunk(b"eXIf", b"II*\0no exif"),
        chunk(b"eXIf", b"II*\0")[:-1] + b"\0",
    ],
)
def test_texts_and_profiles_do_not_spoil_the_pixels(before):
    assert (np.asarray(open_image(png(ROWS, 8, 2, 16, before))) == PIXELS).all()


@pytest.mark.parametrize("before", [b"", chunk(b"PLTE", b"\1\2\3") + chunk(b"tRNS", bytes(300))])
def test_a_damaged_palette_is_named(before):
    with pytest.raises(ValueError, match=r"image 'x' is damaged or truncated \(.*\)\. Copy"):
        open_image(png(np.zeros((4, 4), np.uint8), 8, 3, 4, before), "x")


def test_a_rotation_in_a_text_is_applied():
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    assert (np.asarray(open_image(png(ROWS, 8, 2, 16, chunk(b"iTXt", xmp)))) == np.rot90(PIXELS, -1)).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_every_depth_lies_over_white(depth):
    most, width = 2**depth - 1, 16
    values = np.arange(width) % (most + 1) if depth < 8 else np.linspace(0, most, width).astype(int)
    bits = (values[:, None] >> np.arange(depth)[::-1]) & 1
    key = int(values[1])
    data = png(np.packbits(bits.reshape(1, -1), axis=1), depth, 0, width, chunk(b"tRNS", struct.pack(">H", key)))
    wanted = np.where(values == key, 255, np.rint(values * 255 / most)).astype(int)
    assert levels(data) == [[v] * 3 for v in wanted.tolist()]


def test_the_transparent_colour_of_16_bit_is_compared_with_both_bytes():
    colours = np.array([[256, 512, 768], [257, 512, 768], [65535, 0, 0]], dtype=">u2")
    data = png(colours.reshape(1, -1), 16, 2, 3, chunk(b"tRNS", struct.pack(">3H", 256, 512, 768)))
    assert levels(data) == [[255] * 3, [1, 2, 3], [255, 0, 0]]
    turned = chunk(b"eXIf", as_file(RGB, "PNG", exif=_turned()).partition(b"eXIf")[2].partition(b"IDAT")[0][:-8])
    data = png(colours.reshape(1, -1), 16, 2, 3, turned + chunk(b"tRNS", struct.pack(">3H", 256, 512, 768)))
    assert np.asarray(open_image(data)).tolist() == [[[255] * 3], [[1, 2, 3]], [[255, 0, 0]]]


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_integers_in_a_wide_container_are_of_8_bit_unless_they_are_above_255():
    for scale, kind in ((1, np.int32), (257, np.int32), (257, np.uint16)):
        data = as_file(Image.fromarray((GREY * scale).astype(kind)), "TIFF")
        assert levels(data) == [[v] * 3 for v in GREY[0].tolist()]
    for image in (Image.fromarray(GREY.astype(np.uint16)), Image.fromarray(GREY.astype(np.int32))):
        for kind in ("TIFF", "PNG", "PPM"):
            assert levels(as_file(image, kind)) == [[v] * 3 for v in GREY[0].tolist()]


def test_colours_up_to_255_in_a_png_file_of_16_bit_are_of_8_bit():
    colours = np.array([[[0, 100, 252], [7, 8, 9]]])
    for scale in (1, 257):
        rows = (colours * scale).astype(">u2").view(np.uint8).reshape(1, -1)
        assert levels(png(rows, 16, 2, 2)) == colours[0].tolist()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64"])
def test_arrays_of_any_integers_are_levels(dtype):
    assert np.asarray(open_array(GREY.astype(dtype), "x"))[..., 1].tolist() == GREY.tolist()
    assert (np.asarray(open_array(PIXELS.astype("int64").tolist(), "x")) == PIXELS).all()
    assert (np.asarray(open_array(PIXELS.astype("int64") * 257, "x")) == PIXELS).all()
    assert np.asarray(open_array(GREY > 50, "x"))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[0.5]], "must hold whole numbers"),
        ([[1, 2], [3]], "must have rows of one length"),
        ([[1, None]], "must hold whole numbers"),
        ([[-1]], "from 0 to 65535"),
        ([[70_000]], "from 0 to 65535"),
        (np.zeros((3, 8, 8), int), r"must have the shape .* got \(3, 8, 8\)"),
        ([[]], "must hold whole numbers"),
    ],
)
def test_arrays_that_are_no_levels_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        open_array(values, "x")


def test_the_size_is_known_before_anything_is_decoded(monkeypatch, tmp_path):
    assert open_image(tiled_tiff(8, 64)).size == (8, 8)
    monkeypatch.setattr(image_file, "MAX_PIXELS", 100)
    for data in (PLAIN, as_file(RGB, "GIF"), as_file(RGB, "WEBP"), as_file(RGB, "JPEG", progressive=True)):
        with pytest.raises(ValueError, match="must have at most 100 pixels; got 16 x 16"):
            open_image(data)
    assert open_image(as_file(RGB, "JPEG")).size == (8, 8)  # decoded smaller
    with pytest.raises(ValueError, match="must have at most 100 pixels; got 64 x 64"):
        open_image(tiled_tiff(8, 64))
    with pytest.raises(ValueError, match="at most 100 pixels"):
        open_array(PIXELS, "x")
    monkeypatch.setattr(image_file, "MAX_BYTES", 300)
    (tmp_path / "x.bmp").write_bytes(as_file(RGB, "BMP"))
    for data in (tmp_path / "x.bmp", PLAIN):
        with pytest.raises(ValueError, match="must be a file of at most 300 bytes"):
            open_image(data)
    assert limits.MAX_BYTES == 6 * limits.MAX_PIXELS


def test_a_device_is_no_file():
    with pytest.raises(ValueError, match="must be an image file; got a device or a pipe"):
        open_image("/dev/zero")


@pytest.mark.parametrize("kind", NOT_STORED)
def test_a_stored_image_holds_its_pixels_alone(kind):
    with pytest.raises(ValueError, match=r"^a stored image must be a PNG of 8-bit RGB pixels and nothing else; "):
        stored_image(NOT_STORED[kind])


def test_a_stored_image_may_come_from_another_zlib():
    for level in (0, 1, 9):
        data = as_file(RGB, "PNG", compress_level=level)
        assert (np.asarray(stored_image(data)) == PIXELS).all()
    assert (np.asarray(stored_image(PLAIN)) == PIXELS).all()
