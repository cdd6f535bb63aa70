import csv
import io
import logging
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fakes import draw_photo, save_photos
from PIL import Image

from hf_equiv.data import image_file
from hf_equiv.data.image_file import decode_png, encode_png, open_image
from hf_equiv.data.sources import draw_pairs, load_images

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def as_file(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing: what a decompression bomb looks like at the door."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# --- images that can be read are read right ---


def test_rgb_grey_and_bilevel():
    assert (values(open_image(as_file(Image.fromarray(COLOURS), "PNG"))) == COLOURS).all()
    assert (values(open_image(as_file(Image.fromarray(RAMP), "PNG"))) == RAMP[:, :, None]).all()
    bits = Image.fromarray(RAMP > 128)
    assert (values(open_image(as_file(bits, "PNG")))[:, :, 0] == np.where(RAMP > 128, 255, 0)).all()


def test_palette():
    image = Image.fromarray(COLOURS).quantize(16)
    assert (values(open_image(as_file(image, "PNG"))) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("alpha", [0, 51, 255])
def test_alpha_lies_over_white(alpha):
    rgba = np.dstack([COLOURS, np.full_like(RAMP, alpha)])
    want = COLOURS * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(values(open_image(as_file(Image.fromarray(rgba), "PNG"))) - want).max() <= 1
    grey = np.dstack([RAMP, np.full_like(RAMP, alpha)])
    want = RAMP * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(values(open_image(as_file(Image.fromarray(grey), "PNG")))[:, :, 1] - want).max() <= 1


def test_transparent_palette_and_colour_key():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert (values(open_image(as_file(image, "PNG", transparency=1))) == 255).all()
    assert (values(open_image(as_file(image, "PNG", transparency=0))) == [10, 20, 30]).all()
    keyed = Image.new("RGB", (4, 4), (9, 9, 9))
    assert (values(open_image(as_file(keyed, "PNG", transparency=(9, 9, 9)))) == 255).all()


@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 6), ("TIFF", 0)])
def test_cmyk(kind, tolerance):
    ink = Image.merge("CMYK", [Image.new("L", (16, 16), v) for v in (0, 255, 255, 0)])  # red
    got = values(open_image(as_file(ink, kind))).astype(int)
    assert np.abs(got - [255, 0, 0]).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(kind):
    deep = RAMP.astype(np.uint16) * 257
    assert (values(open_image(as_file(Image.fromarray(deep), kind)))[:, :, 0] == RAMP).all()


def test_1x1_and_a_long_strip():
    assert values(open_image(as_file(Image.new("RGB", (1, 1), (7, 8, 9)), "PNG"))).tolist() == [[[7, 8, 9]]]
    assert open_image(as_file(Image.new("RGB", (20000, 3)), "PNG")).size == (20000, 3)


def test_exif_orientation_is_applied():
    image = Image.fromarray(COLOURS[:8])
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    got = values(open_image(as_file(image, "PNG", exif=exif)))
    assert (got == np.rot90(COLOURS[:8], -1)).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = as_file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (values(open_image(data)) == [255, 0, 0]).all()


def test_huge_jpeg_is_decoded_smaller(monkeypatch):
    monkeypatch.setattr(image_file, "MAX_PIXELS", 10_000)
    data = as_file(Image.new("RGB", (160, 160), (200, 100, 50)), "JPEG")
    assert open_image(data).size == (80, 80)


def test_pillow_limit_is_left_as_it_was():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="at most"):
        open_image(png_header(20000, 20000))
    assert before == Image.MAX_IMAGE_PIXELS


# --- the others are refused, by name ---

BAD = {
    "empty": (b"", r"'photo.bin' must hold an image; got an empty file"),
    "text": (b"not an image at all", r"'photo.bin' must be an image file \(JPEG, .*, AVIF\); got 19 bytes"),
    "html": (b"<html>404</html>" * 40, r"'photo.bin' must be an image file"),
    "truncated jpeg": (as_file(draw_photo(1, 200), "JPEG")[:2000], r"'photo.bin' is damaged or truncated"),
    "truncated png": (as_file(Image.effect_noise((64, 64), 90), "PNG")[:900], r"'photo.bin' is damaged or truncated"),
    "broken png": (png_header(16, 16), r"'photo.bin' is damaged or truncated"),
    "20,000 px": (png_header(20000, 20000), r"'photo.bin' must have at most 178,956,970 pixels; got 20000 x 20000"),
    "float tiff": (as_file(Image.new("F", (4, 4), 0.5), "TIFF"), r"'photo.bin' must hold integers; got floating point"),
    "32-bit": (as_file(Image.new("I", (4, 4), 1 << 20), "TIFF"), r"'photo.bin' must have values from 0 to 65535"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(case, tmp_path):
    data, message = BAD[case]
    path = tmp_path / "photo.bin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_images(str(path))[0]


def test_missing_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist. Check the path"):
        load_images(str(tmp_path / "none.jpg"))
    with pytest.raises(FileNotFoundError, match=r"'cat.jpeg' does not exist"):
        load_images("cat.jpeg")
    with pytest.raises(ValueError, match=r"must be an image file; got a folder"):
        open_image(tmp_path)
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"folder 'void' must hold images; found none"):
        load_images(str(tmp_path / "void"))
    with pytest.raises(ValueError, match=r"images must be named"):
        load_images(" ")
    with pytest.raises(FileNotFoundError, match=r"^'nosuchdir/' does not exist\. Check the path"):
        load_images("nosuchdir/")
    with pytest.raises(FileNotFoundError, match=r"patterns are not expanded\. Name a folder"):
        load_images("photos/*")
    (tmp_path / "notes.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"'notes.csv' must be an image .* A table of images must be a \.parquet file"):
        load_images(str(tmp_path / "notes.csv"))


def test_bad_tables(tmp_path):
    (tmp_path / "labels.csv").write_text("name,number\na.png,1\n")
    draw_photo(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"'labels.csv' must have columns file,label"):
        load_images(str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 this is not parquet PAR1")
    told: list[logging.LogRecord] = []
    watch = logging.Handler()
    watch.emit = told.append
    logging.getLogger("datasets").addHandler(watch)
    with pytest.raises(ValueError, match=r"parquet data 'x.parquet' cannot be read"):
        load_images(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    logging.getLogger("datasets").removeHandler(watch)
    assert not told


def test_unknown_dataset_without_network():
    with pytest.raises(ValueError, match=r"'nobody/nothing' is no folder here, .* not all in the cache, and `local_"):
        load_images("nobody/nothing", local_files_only=True)
    with pytest.raises(ValueError, match=r"id\[:config\]\[:split\]"):
        load_images("a/b:c:d:e", local_files_only=True)


# --- PNG ---


def test_png_holds_every_level_exactly():
    pixels = torch.from_numpy(COLOURS).permute(2, 0, 1).float() / 255
    for dtype in (torch.float32, torch.float64):
        back = decode_png(encode_png(pixels), dtype)
        assert back.dtype == dtype
        assert torch.equal(back, torch.from_numpy(COLOURS).permute(2, 0, 1).to(dtype) / 255)
    assert torch.equal(decode_png(encode_png(pixels + 0.4 / 255)), decode_png(encode_png(pixels)))  # rounds, not cuts


@pytest.mark.parametrize("data", [b"", b"junk", as_file(Image.new("L", (4, 4)), "PNG")])
def test_stored_image_must_be_rgb_png(data):
    with pytest.raises(ValueError, match="a stored image must be"):
        decode_png(data)


# --- sets ---


def test_builtin():
    images = load_images("builtin")
    assert images.ids == ("cat", "coffee", "rocket", "astronaut")
    assert images.data_id == "builtin"
    assert all(item.image.mode == "RGB" and min(item.image.size) >= 64 for item in images)


def test_folder_is_sorted_and_labelled(photos):
    (photos / ".hidden").mkdir()
    draw_photo(9).save(photos / ".hidden" / "no.png")
    (photos / "notes.txt").write_text("no image")
    images = load_images(str(photos))
    assert load_images(photos).data_revision == images.data_revision
    assert images.ids == tuple(sorted(images.ids))
    assert images.ids[0] == "class0/photo0.png"
    assert images.labels == ("class0", "class0", "class1", "class1", "class2", "class2")
    assert images.data_id == "photos"
    assert str(photos) not in repr((images.data_id, images.data_revision, images.ids))
    assert images[-1].id == images.ids[5]


def test_labels_csv_prefers_names(tmp_path):
    for k in range(2):
        draw_photo(k).save(tmp_path / f"{k}.png")
    with (tmp_path / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["file", "label", "wnid", "name"], ["0.png", "7", "n1", "a cat, or so"]])
    assert load_images(str(tmp_path)).labels == ("a cat, or so", None)


def test_revision_follows_content(photos):
    before = load_images(str(photos)).data_revision
    assert before == load_images(str(photos)).data_revision
    assert before.startswith("sha256:")
    draw_photo(11).save(photos / "class0" / "photo0.png")
    assert load_images(str(photos)).data_revision != before


def test_limit_is_a_seeded_draw(photos):
    some = [load_images(str(photos), limit=3, seed=s).ids for s in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    assert all(len(ids) == 3 and list(ids) == sorted(ids) for ids in some)
    assert len(load_images(str(photos), limit=99)) == 6
    with pytest.raises(ValueError, match="`limit` must be at least 1"):
        load_images(str(photos), limit=0)


def test_parquet(tmp_path):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cow", "owl"])})
    rows = [{"picture": draw_photo(k), "kind": k % 2} for k in range(4)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "some.parquet"))
    cache = str(tmp_path / "cache")
    images = load_images(str(tmp_path / "some.parquet"), cache_dir=cache)
    assert images.ids == ("0", "1", "2", "3")
    assert images.labels == ("cow", "owl", "cow", "owl")
    assert (values(images[2].image) == np.asarray(draw_photo(2))).all()
    with pytest.raises(ValueError, match=r"must have an image column 'photo'; it has picture, kind"):
        load_images(str(tmp_path / "some.parquet"), cache_dir=cache, image_column="photo")
    with pytest.raises(ValueError, match=r"must have a column 'sort'"):
        load_images(str(tmp_path / "some.parquet"), cache_dir=cache, label_column="sort")


def test_parquet_without_the_metadata_of_datasets(tmp_path):
    cells = [{"bytes": as_file(draw_photo(k), "PNG"), "path": None} for k in range(2)] + [{"bytes": None, "path": None}]
    pq.write_table(pa.table({"number": [1, 2, 3], "shot": cells}), tmp_path / "some.parquet")
    images = load_images(str(tmp_path / "some.parquet"), cache_dir=str(tmp_path / "cache"))
    assert (values(images[1].image) == np.asarray(draw_photo(1))).all()
    assert images.tabular
    assert images.select([0]).tabular
    assert not load_images("builtin").tabular
    with pytest.raises(ValueError, match=r"some.parquet row 2 must hold an image; column 'shot' is empty there"):
        images[2]


# --- pairs ---


def test_pairs_are_deterministic_and_different(photos):
    images = load_images(str(photos))
    pairs = draw_pairs(images, 12, 0)
    assert pairs == draw_pairs(images, 12, 0) != draw_pairs(images, 12, 1)
    assert pairs[:5] == draw_pairs(images, 5, 0)
    assert len(set(pairs)) == 12
    assert all(images.labels[i] != images.labels[j] for i, j in pairs)


def test_all_pairs_and_one_too_many(photos, tmp_path):
    images = load_images(str(photos))
    assert len(set(draw_pairs(images, 24, 0))) == 24  # 6·5 less the 6 of equal class
    with pytest.raises(ValueError, match=r"`pairs` must be at most 24 for 'photos'"):
        draw_pairs(images, 25, 0)
    with pytest.raises(ValueError, match=r"`pairs` must be at least 1"):
        draw_pairs(images, 0, 0)
    alone = load_images(str(save_photos(tmp_path / "one", 1)))
    with pytest.raises(ValueError, match=r"`data` must hold at least 2 images"):
        draw_pairs(alone, 1, 0)


def test_pairs_that_do_not_differ_are_left_out(photos):
    images = load_images(str(photos))
    plain = draw_pairs(images, 8, 0)
    drawn = draw_pairs(images, 8, 0, lambda i, j: (i, j) != plain[2])
    assert drawn[:-1] == [pair for pair in plain if pair != plain[2]]
    assert plain[2] not in draw_pairs(images, 23, 0, lambda i, j: (i, j) != plain[2])
    assert len(draw_pairs(images, None, 0)) == 10
    assert len(draw_pairs(images.select([0, 1, 2]), None, 0)) == 4
    with pytest.raises(ValueError, match=r"`pairs` must be at most 0"):
        draw_pairs(images, None, 0, lambda i, j: False)


def test_reading_leaves_paths_out_of_messages(tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.png") as caught:
        load_images(str(tmp_path))[0]
    assert str(tmp_path) not in str(caught.value)
