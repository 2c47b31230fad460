"""Every kind of pixel that PNG, JPEG, BMP and TIFF may hold, against values made by hand."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
import tifffile

from medclip_jax.errors import DataError
from medclip_jax.io import image, pillow, read
from medclip_jax.io import tiff as tiff_reader

LUMA = np.array(image.LUMA)
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
WORDS = RNG.integers(0, 65536, (12, 20)).astype(np.uint16)
UNIT = WORDS / 65535
RGB = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
RGB_WORDS = RNG.integers(0, 65536, (12, 20, 3)).astype(np.uint16)
TURNED = {  # as TIFF 6.0 says: what is stored -> upright
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


def stretched(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return (values - values.min()) / np.ptp(values)


def tiff(path: Path, stored: np.ndarray, **options) -> image.Image:
    tifffile.imwrite(path / "a.tif", stored, **options)
    return read.read(path / "a.tif")


# ---------------------------------------------------------------- TIFF


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f2", "f8", "u8"])
def test_grey_tiff_of_every_type(tmp_path, kind, photometric, compression, order):
    stored = {"u": WORDS, "i": WORDS.view(np.int16), "f": UNIT}[kind[0]].astype(kind)
    if kind in ("u4", "i4", "u8"):
        stored = stored * stored.dtype.type(7) + stored.dtype.type(2000)
    options = {"photometric": photometric, "compression": compression, "byteorder": order}
    found = tiff(tmp_path, stored, **options)
    white = {"u1": 255, "u2": 65535, "f2": 1, "f4": 1, "f8": 1}.get(kind)
    expected = stored.astype(np.float64) / white if white else stretched(stored)
    expected = 1 - expected if photometric == "miniswhite" else expected
    np.testing.assert_allclose(found.pixels[0], expected, atol=1e-6)
    said = f"0 to {white}" if white else f"its values: {stored.min():.6g} to {stored.max():.6g}"
    assert found.range == said or kind == "u1"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_colour_tiff(tmp_path, kind, planar, order):
    stored = {"u1": RGB, "u2": RGB_WORDS, "f4": (RGB_WORDS / 65535).astype("f4")}[kind]
    white = {"u1": 255, "u2": 65535, "f4": 1}[kind]
    bands = np.moveaxis(stored, 2, 0) if planar == "separate" else stored
    found = tiff(tmp_path, bands, photometric="rgb", planarconfig=planar, byteorder=order)
    np.testing.assert_allclose(found.pixels[0], stored @ LUMA / white, atol=1e-5)


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_alpha_of_a_tiff(tmp_path, kind):
    colour, grey, white = (RGB, BYTES, 255) if kind == "u1" else (RGB_WORDS, WORDS, 65535)
    stored = np.concatenate([colour, grey[..., None]], 2)
    for extra, alpha in (("unassalpha", grey / white), ("unspecified", 1)):
        found = tiff(tmp_path, stored, photometric="rgb", extrasamples=[extra])
        np.testing.assert_allclose(
            found.pixels[0], stored[..., :3] @ LUMA / white * alpha, atol=1e-5
        )


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
@pytest.mark.parametrize("white_is_zero", [True, False])
def test_grey_tiff_of_few_bits(tmp_path, bits, white_is_zero):
    """Written by hand: one strip, rows padded to bytes."""
    values = WORDS >> (16 - bits)
    places = np.arange(bits - 1, -1, -1)
    rows = ((values[..., None] >> places) & 1).astype(np.uint8).reshape(12, -1)
    data = b"".join(np.packbits(row).tobytes() for row in rows)
    tags = {256: 20, 257: 12, 258: bits, 259: 1, 262: int(not white_is_zero), 277: 1, 278: 12}
    tags |= {273: 200, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", k, 4, 1, tags[k]) for k in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(head.ljust(200, b"\0") + data)
    expected = values / (2**bits - 1)
    if bits == 12 and white_is_zero:
        with pytest.raises(
            DataError, match=r"a\.tif is a TIFF of 1 x 12 bits .* is not read: save"
        ):
            read.read(tmp_path / "a.tif")
        return
    found = read.read(tmp_path / "a.tif").pixels[0]
    np.testing.assert_allclose(found, 1 - expected if white_is_zero else expected, atol=1e-6)


@pytest.mark.parametrize("turn", TURNED)
@pytest.mark.parametrize(
    "stored", [BYTES, WORDS, UNIT.astype("f4"), RGB], ids=["u1", "u2", "f4", "rgb"]
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_orientation_of_a_tiff(tmp_path, turn, stored, compression):
    options = {"photometric": "rgb"} if stored.ndim == 3 else {}
    tags = [(274, "H", 1, turn, True)]
    found = tiff(tmp_path, stored, extratags=tags, compression=compression, **options)
    grey = stored @ LUMA if stored.ndim == 3 else stored
    white = {"u1": 255, "u2": 65535, "f4": 1}[stored.dtype.str[1:]]
    np.testing.assert_allclose(found.pixels[0], TURNED[turn](grey) / white, atol=1e-5)


def one_directory(path: Path, stack: np.ndarray, order: str = "<", **options) -> Path:
    """As ImageJ writes large stacks: one directory, all images behind its own."""
    description = f"ImageJ=1.54\nimages={len(stack)}\nslices={len(stack)}\n"
    tifffile.imwrite(
        path, stack[0], byteorder=order, description=description, metadata=None, **options
    )
    with tifffile.TiffFile(path) as tif:
        end = tif.pages[0].dataoffsets[-1] + tif.pages[0].databytecounts[-1]
    more = stack[1:].astype(stack.dtype.newbyteorder(order)).tobytes()
    path.write_bytes(path.read_bytes()[:end] + more)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4", "rgb"])
def test_a_stack_in_one_directory(tmp_path, kind, order):
    one = RGB if kind == "rgb" else WORDS.astype("f4") if kind == "f4" else WORDS.astype(kind)
    stack = np.stack([one, one[::-1], one[:, ::-1]])
    options = {"photometric": "rgb" if kind == "rgb" else "minisblack"}
    path = one_directory(tmp_path / "a.tif", stack, order, **options)
    expected = stretched(stack) if kind == "f4" else stack / np.iinfo(stack.dtype).max
    expected = expected @ LUMA if kind == "rgb" else expected
    np.testing.assert_allclose(read.read(path).pixels, expected, atol=1e-6)
    assert read.pixels_of(path) == 3 * 12 * 20
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a\.tif holds .* bytes of its 3 images: it is truncated"):
        read.read(path)


def test_stacks_that_cannot_be_told_apart_or_are_too_large(tmp_path):
    path = one_directory(tmp_path / "a.tif", np.stack([BYTES] * 3), compression="zlib")
    with pytest.raises(DataError, match="3 images in one directory, packed"):
        read.read(path)
    path = one_directory(tmp_path / "a.tif", np.stack([BYTES] * 3))
    path.write_bytes(path.read_bytes().replace(b"images=3", b"images=9"))
    with pytest.raises(DataError, match="9 images: it is truncated"):
        read.read(path)
    text = "ImageJ=1.54\nimages=99999\n"
    with pytest.raises(DataError, match="99,999 frames and at most 10,000"):
        tiff(tmp_path, BYTES, description=text, metadata=None)


def test_stacks_of_several_directories(tmp_path):
    stack = np.stack([WORDS, WORDS[::-1], WORDS[:, ::-1]])
    for options in ({"imagej": True}, {"ome": True}, {"bigtiff": True}, {"tile": (16, 16)}):
        found = tiff(tmp_path, stack, photometric="minisblack", **options)
        np.testing.assert_allclose(found.pixels, stack / 65535, atol=1e-6)
    truncated = {"photometric": "minisblack", "contiguous": True, "truncate": True}
    np.testing.assert_allclose(tiff(tmp_path, stack, **truncated).pixels, stack / 65535, atol=1e-6)


def test_palette_cmyk_and_thumbnails_of_a_tiff(tmp_path):
    table = RNG.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    found = tiff(tmp_path, BYTES, photometric="palette", colormap=table)
    np.testing.assert_allclose(
        found.pixels[0],
        LUMA @ table[:, BYTES].reshape(3, -1).reshape(3, *BYTES.shape).transpose(1, 0, 2) / 65535,
        atol=1e-5,
    )
    inks = RNG.integers(0, 256, (12, 20, 4), dtype=np.uint8)
    expected = ((1 - inks[..., :3] / 255) * (1 - inks[..., 3:] / 255)) @ LUMA
    np.testing.assert_allclose(
        tiff(tmp_path, inks, photometric="separated").pixels[0], expected, atol=1 / 255
    )
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(WORDS)
        file.write(WORDS[::2, ::2], subfiletype=1)
    np.testing.assert_allclose(read.read(tmp_path / "a.tif").pixels, UNIT[None], atol=1e-6)


@pytest.mark.parametrize("mode", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize("predictor", [1, 2])
def test_lzw_with_and_without_predictor(tmp_path, mode, predictor):
    stored = {"u1": BYTES, "u2": WORDS, "i2": WORDS, "f4": UNIT.astype("f4")}[mode]
    predictor = 3 if mode == "f4" and predictor == 2 else predictor
    tags = {317: predictor, **({339: 2} if mode == "i2" else {})}
    PIL.Image.fromarray(stored).save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo=tags)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert (tif.pages[0].compression, tif.pages[0].predictor) == (5, predictor)
    expected = {"u1": BYTES / 255, "i2": stretched(WORDS.view(np.int16))}.get(mode, UNIT)
    np.testing.assert_allclose(read.read(tmp_path / "a.tif").pixels[0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["i2", "u4", "i4", "f4"])
@pytest.mark.parametrize("spike", [1, -1])
def test_a_spike_does_not_flatten_a_tiff(tmp_path, kind, spike):
    values = np.random.default_rng(1).integers(100, 400, (64, 64)).astype(kind)
    clean = stretched(values)
    values[3, 3] = spike * 30_000 if kind != "u4" else 4e9
    found = tiff(tmp_path, values)
    assert (np.abs(found.pixels[0] - clean) > 0.02).sum() == 1
    assert "percentile: spikes lie beyond" in found.range


def test_sixteen_unsigned_bits_have_a_fixed_range(tmp_path):
    values = np.random.default_rng(1).integers(100, 400, (64, 64)).astype(np.uint16)
    values[3, 3] = 65535
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    for found in (tiff(tmp_path, values), read.read(tmp_path / "a.png")):
        np.testing.assert_allclose(found.pixels[0], values / 65535, atol=1e-6)
        assert found.range == "0 to 65535"


def test_values_far_from_zero_keep_their_steps(tmp_path):
    values = (np.arange(240).reshape(12, 20) + 4_000_000_000).astype(np.uint32)
    np.testing.assert_allclose(tiff(tmp_path, values).pixels[0], stretched(values), atol=1e-6)


@pytest.mark.parametrize(
    "stored, words",
    [
        (UNIT.astype(np.complex64), "complex64"),
        (np.where(UNIT > 0.5, np.nan, UNIT), "NaN, infinite"),
        (np.where(UNIT > 0.5, np.inf, UNIT), "NaN, infinite"),
        (np.zeros((12, 20, 7), np.uint8), "7 values"),
        (np.zeros((12, 20, 3), np.uint8), "3 values"),  # of which none is the grey
        (np.zeros((12, 20, 3), np.uint16), "3 values"),
        (np.zeros((12, 20, 4), np.float32), "4 values"),
    ],
)
def test_what_a_tiff_may_hold_but_nobody_can_show(tmp_path, stored, words):
    with pytest.raises(DataError, match=rf"a\.tif .*{words}"):
        tiff(tmp_path, stored, photometric="minisblack", planarconfig="contig")


# ---------------------------------------------------------------- PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(path: Path, values: np.ndarray, bits: int, kind: int, *chunks: bytes) -> np.ndarray:
    """Written by hand: rows without filter, or (16 bits) as differences from the left pixel."""
    flat = values.reshape(len(values), -1)
    if bits >= 8:
        bytes_ = flat.astype(f">u{bits // 8}").view(np.uint8)
        if step := bits // 8 * flat.shape[1] // values.shape[1] if bits == 16 else 0:
            bytes_[:, step:] -= bytes_[:, :-step].copy()
        rows = [(b"\1" if step else b"\0") + row.tobytes() for row in bytes_]
    else:
        places = np.arange(bits - 1, -1, -1)
        packed = ((flat[..., None] >> places) & 1).astype(np.uint8).reshape(len(values), -1)
        rows = [b"\0" + np.packbits(row).tobytes() for row in packed]
    head = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, kind, 0, 0, 0)
    content = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(b"".join(rows)))]
    file = path / "a.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content) + chunk(b"IEND", b""))
    return read.read(file).pixels[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_png_and_its_transparent_value(tmp_path, bits):
    values = WORDS >> (16 - bits)
    unit = values / (2**bits - 1)
    np.testing.assert_allclose(png(tmp_path, values, bits, 0), unit, atol=1e-6)
    clear = int(values.max())
    found = png(tmp_path, values, bits, 0, chunk(b"tRNS", struct.pack(">H", clear)))
    np.testing.assert_allclose(found, np.where(values == clear, 0, unit), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_png_with_transparent_entries(tmp_path, bits):
    values = WORDS >> (16 - bits)
    table = RNG.integers(0, 256, (2**bits, 3), dtype=np.uint8)
    alpha = RNG.integers(0, 256, 2**bits, dtype=np.uint8)
    chunks = chunk(b"PLTE", table.tobytes()), chunk(b"tRNS", alpha.tobytes())
    expected = table[values] @ LUMA / 255
    np.testing.assert_allclose(png(tmp_path, values, bits, 3, chunks[0]), expected, atol=1e-6)
    found = png(tmp_path, values, bits, 3, *chunks)
    np.testing.assert_allclose(found, expected * (alpha[values] / 255), atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_png_with_alpha(tmp_path, bits):
    values = np.stack([WORDS, WORDS[::-1]], -1) >> (16 - bits)
    expected = values[..., 0] / (2**bits - 1) * (values[..., 1] / (2**bits - 1))
    np.testing.assert_allclose(png(tmp_path, values, bits, 4), expected, atol=1e-6)


@pytest.mark.parametrize("orientation", [1, 6])
def test_colour_png_of_16_bits(tmp_path, orientation):
    exif = chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHIII", 274, 3, 1, orientation, 0))
    values = RGB_WORDS.copy()
    values[3, 4] = values[2, 5] ^ np.uint16([0, 1, 0])  # not the transparent colour
    unit = values @ LUMA / 65535
    found = png(tmp_path, values, 16, 2, exif)
    np.testing.assert_allclose(found, TURNED[orientation](unit), atol=1e-6)
    clear = chunk(b"tRNS", struct.pack(">3H", *values[2, 5]))
    found, unit[2, 5] = png(tmp_path, values, 16, 2, exif, clear), 0
    np.testing.assert_allclose(found, TURNED[orientation](unit), atol=1e-6)
    alpha = np.concatenate([values, WORDS[..., None]], -1)
    found, unit = png(tmp_path, alpha, 16, 6, exif), values @ LUMA / 65535 * UNIT
    np.testing.assert_allclose(found, TURNED[orientation](unit), atol=1e-6)


def test_gamma_and_significant_bits_change_nothing(tmp_path):
    for extra in (chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"sBIT", bytes([12]))):
        np.testing.assert_allclose(png(tmp_path, WORDS, 16, 0, extra), UNIT, atol=1e-6)


def test_frames_of_an_animated_png(tmp_path):
    frames = [BYTES, BYTES[::-1].copy(), BYTES[:, ::-1].copy()]
    first, *more = map(PIL.Image.fromarray, frames)
    first.save(tmp_path / "a.png", save_all=True, append_images=more)
    np.testing.assert_allclose(read.read(tmp_path / "a.png").pixels, np.stack(frames) / 255)
    for kind in ("GIF", "WEBP"):
        first.save(tmp_path / "b.png", kind, save_all=True, append_images=more)
        with pytest.raises(DataError, match=r"b\.png is not a PNG, JPEG, BMP or TIFF image"):
            read.read(tmp_path / "b.png")


def test_png_with_a_large_profile_or_text(tmp_path):
    picture, text = PIL.Image.fromarray(np.eye(9, dtype=np.uint8) * 255), None
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("note", "x" * (3 << 20), zip=True)
    picture.save(tmp_path / "text.png", pnginfo=text)
    picture.save(tmp_path / "profile.png", icc_profile=bytes(3 << 20))
    for name in ("text.png", "profile.png"):
        np.testing.assert_array_equal(read.read(tmp_path / name).pixels[0], np.eye(9))


# ---------------------------------------------------------------- JPEG, BMP, and what is no file


def smooth() -> np.ndarray:
    grey = np.add.outer(np.arange(24) * 4, np.arange(40) * 3).astype(np.uint8)
    return np.stack([grey, 255 - grey, grey // 2], -1)


def test_ycck_jpeg(tmp_path):
    """Adobe's inverted inks with their own colour transform."""
    rgb, buffer = smooth(), io.BytesIO()
    ybr = np.asarray(PIL.Image.fromarray(255 - rgb).convert("YCbCr"))
    inks = np.concatenate([255 - ybr, np.zeros((24, 40, 1), np.uint8)], 2)  # saving inverts them
    PIL.Image.fromarray(inks, "CMYK").save(buffer, "JPEG", quality=98, subsampling=0)
    raw = buffer.getvalue()
    place = raw.index(b"Adobe") + 11
    (tmp_path / "a.jpg").write_bytes(raw[:place] + b"\2" + raw[place + 1 :])
    np.testing.assert_allclose(read.read(tmp_path / "a.jpg").pixels[0], rgb @ LUMA / 255, atol=0.03)


def test_a_jpeg_of_12_bits_is_called_so(tmp_path):
    buffer = io.BytesIO()
    PIL.Image.fromarray(smooth()[..., 0]).save(buffer, "JPEG")
    raw = bytearray(buffer.getvalue())
    place = raw.index(b"\xff\xc0")
    raw[place + 1], raw[place + 4] = 0xC1, 12  # extended sequential, 12 bits
    (tmp_path / "a.jpg").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.jpg is a JPEG of 12 bits or without loss"):
        read.read(tmp_path / "a.jpg")


def bmp(path: Path, bits: int, compression: int, height: int, data: bytes, table=b"") -> np.ndarray:
    head = struct.pack("<IiiHHIIiiII", 40, 20, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    start = 54 + len(table)
    lead = b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start)
    (path / "a.bmp").write_bytes(lead + head + table + data)
    return read.read(path / "a.bmp").pixels[0]


def test_bmp_of_every_kind(tmp_path):
    table = b"".join(bytes([i, i, i, 0]) for i in range(256))
    found = bmp(tmp_path, 8, 0, 12, BYTES[::-1].tobytes(), table)
    np.testing.assert_allclose(found, BYTES / 255, atol=1e-6)
    found = bmp(tmp_path, 8, 0, -12, BYTES.tobytes(), table)  # top-down
    np.testing.assert_allclose(found, BYTES / 255, atol=1e-6)
    runs = b"".join(
        b"".join(bytes([1, value]) for value in row.tolist()) + b"\0\0" for row in BYTES[::-1]
    )
    found = bmp(tmp_path, 8, 1, 12, runs + b"\0\1", table)  # RLE
    np.testing.assert_allclose(found, BYTES / 255, atol=1e-6)
    unused = np.concatenate([RGB[::-1, :, ::-1], np.zeros((12, 20, 1), np.uint8)], 2)
    found = bmp(tmp_path, 32, 0, 12, unused.tobytes())  # its fourth byte is no alpha
    np.testing.assert_allclose(found, RGB @ LUMA / 255, atol=1e-6)
    bits = RGB[::-1].astype(np.uint16) >> 3
    packed = (bits[..., 0] << 10 | bits[..., 1] << 5 | bits[..., 2]).astype("<u2")
    found = bmp(tmp_path, 16, 0, 12, packed.tobytes())
    np.testing.assert_allclose(found, (RGB >> 3) @ LUMA / 31, atol=0.01)


def test_pipes_devices_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.tif").symlink_to("/dev/zero")
    (tmp_path / "c.jpg").mkdir()
    for name in ("a.png", "b.tif", "c.jpg"):
        for function in (pillow.open_pillow, tiff_reader.open_tiff, read.pixels_of):
            with pytest.raises(DataError, match=rf"{name} is no regular file"):
                function(tmp_path / name)


@pytest.mark.parametrize("way", ["pages", "one directory", "by Pillow"])
def test_many_pages_are_decoded_when_they_are_needed(tmp_path, monkeypatch, way):
    stack = np.stack([WORDS + np.uint16(i) for i in range(5)])
    path = tmp_path / "a.tif"
    if way == "one directory":
        one_directory(path, stack)
    else:
        options = {"compression": "lzma"} if way == "by Pillow" else {}
        tifffile.imwrite(path, stack, photometric="minisblack", **options)
    whole = read.read(path).pixels
    monkeypatch.setattr(tiff_reader, "MAX_PIXELS", 300)
    frames = read.open_image(path)
    assert frames.shape == (5, 12, 20) and frames.nbytes == path.stat().st_size
    path.unlink()
    path.write_bytes(b"gone")  # what is needed was read
    np.testing.assert_array_equal(frames.part(3, 5), whole[3:5])
    np.testing.assert_array_equal(frames.part(0, 5), whole)


def test_a_piece_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((12, 20), np.uint16), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        place = tif.pages[0].tags["StripByteCounts"].valueoffset
        start = tif.pages[0].dataoffsets[0]
    bomb = zlib.compress(bytes(50_000_000))
    raw = bytearray((tmp_path / "a.tif").read_bytes()[:start])
    raw[place : place + 4] = len(bomb).to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(bytes(raw) + bomb)
    with pytest.raises(
        DataError, match=r"a\.tif cannot be decoded \(a piece of it unpacks to more"
    ):
        read.read(tmp_path / "a.tif")


def test_too_many_bytes_of_a_page_are_refused_by_the_header(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((12, 20, 3)), photometric="rgb")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        tags = [tif.pages[0].tags[name].valueoffset for name in ("ImageWidth", "ImageLength")]
        rows = tif.pages[0].tags["RowsPerStrip"].valueoffset
    raw = bytearray((tmp_path / "a.tif").read_bytes())
    for place in (*tags, rows):
        raw[place : place + 2] = (7000).to_bytes(2, "little")
    (tmp_path / "a.tif").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.tif unpacks to 1,176,000,000 bytes and at most"):
        read.read(tmp_path / "a.tif")


def test_a_large_colour_picture_is_read_in_bands_with_the_same_values(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for mode, channels in (("RGB", 3), ("RGBA", 4), ("CMYK", 4)):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        values = rng.integers(0, 256, (7, 5, channels)).astype(np.uint8)
        PIL.Image.fromarray(values, mode).save(path)
        whole = read.read(path).pixels
        monkeypatch.setattr(image, "BAND", 10)
        np.testing.assert_array_equal(read.read(path).pixels, whole)
        monkeypatch.undo()


def test_a_picture_of_one_very_long_line_is_refused(tmp_path):
    """Resizing it would take a gigabyte of weights."""
    PIL.Image.new("L", (1, 65_536)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="1 x 65536 pixels and at most 65,535 a side are read"):
        read.read(tmp_path / "a.png")
