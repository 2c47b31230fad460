"""Images of every kind and hostile files."""

import os
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from medclip_jax import files
from medclip_jax.data.layouts import Record
from medclip_jax.errors import DataError
from medclip_jax.io import read


def grey(rng, height=13, width=9):
    return rng.integers(0, 256, (height, width), dtype=np.uint8)


def save(path: Path, array, mode=None, **options) -> Path:
    image = PIL.Image.fromarray(array) if mode is None else PIL.Image.fromarray(array).convert(mode)
    image.save(path, **options)
    return path


def record(path: Path) -> Record:
    return Record(path.name, 0, "", path, (), "")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---------------------------------------------------------------- kinds of pixels


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".PNG"])
def test_grey_is_scaled_by_255(tmp_path, rng, suffix):
    array = grey(rng)
    image = read.read(save(tmp_path / f"a{suffix}", array))
    assert image.pixels.dtype == np.float32 and image.pixels.shape == (1, 13, 9)
    np.testing.assert_array_equal(image.pixels[0], array.astype(np.float32) / 255)
    assert image.spacing is None and set(image.meta) == {"format"}


def test_colour_becomes_bt601_luminance(tmp_path, rng):
    array = rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    pixels = read.read(save(tmp_path / "a.png", array)).pixels[0]
    red, green, blue = np.moveaxis(array.astype(np.float64) / 255, -1, 0)
    np.testing.assert_allclose(pixels, 0.299 * red + 0.587 * green + 0.114 * blue, atol=1e-6)
    assert pixels.max() <= 1


def test_grey_stored_as_colour_equals_grey(tmp_path, rng):
    array = grey(rng)
    as_grey = read.read(save(tmp_path / "l.png", array)).pixels
    as_colour = read.read(save(tmp_path / "rgb.png", array, "RGB")).pixels
    np.testing.assert_allclose(as_colour, as_grey, atol=1e-6)


def test_palette_is_looked_up(tmp_path):
    image = PIL.Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    image.putpalette([10, 10, 10, 200, 200, 200, 255, 0, 0])
    image.save(tmp_path / "p.png")
    expected = np.array([[10, 200], [0.299 * 255, 200]]) / 255
    np.testing.assert_allclose(read.read(tmp_path / "p.png").pixels[0], expected, atol=1e-6)


def test_one_bit(tmp_path):
    array = np.array([[0, 255], [255, 0]], np.uint8)
    pixels = read.read(save(tmp_path / "b.png", array, "1")).pixels[0]
    np.testing.assert_array_equal(pixels, array / 255)


def test_transparent_pixels_fade_to_black(tmp_path):
    array = np.full((1, 3, 4), 200, np.uint8)
    array[0, :, 3] = 0, 51, 255
    pixels = read.read(save(tmp_path / "a.png", array)).pixels[0]
    np.testing.assert_allclose(pixels, [[0, 200 / 255 * 0.2, 200 / 255]], atol=1e-6)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_is_scaled_by_65535(tmp_path, suffix):
    array = np.array([[0, 1, 256], [40000, 65534, 65535]], np.uint16)
    pixels = read.read(save(tmp_path / f"a{suffix}", array)).pixels[0]
    np.testing.assert_allclose(pixels, array / 65535, rtol=1e-6)


def test_cmyk_jpeg(tmp_path):
    path = save(tmp_path / "a.jpg", np.full((16, 16, 3), 128, np.uint8), "CMYK", quality=95)
    np.testing.assert_allclose(read.read(path).pixels, 128 / 255, atol=0.02)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16] = 255  # one bright corner
    back = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, -1),  # clockwise
        7: lambda a: np.rot90(a, 2).T,
        8: np.rot90,
    }
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turn[back](upright))
    path = save(tmp_path / "a.jpg", stored, exif=exif, quality=100)
    np.testing.assert_allclose(read.read(path).pixels[0], upright / 255, atol=0.03)


# ---------------------------------------------------------------- hostile and broken files


def test_unknown_suffix_missing_file_folder_and_not_an_image(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    cases = {
        "a.txt": "a suffix that is not read",
        "gone.png": "does not exist",
        "b.png": "not a PNG",
        "empty.png": "is empty: copy it",
        "folder.png": "holds no DICOM image",
    }
    for name, words in cases.items():
        with pytest.raises(DataError) as caught:
            read.read(tmp_path / name)
        assert words in str(caught.value) and str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_truncated_at_every_length(tmp_path, rng, suffix):
    """Refused, or (where only an end mark or a checksum is gone) every pixel as it was."""
    path = save(tmp_path / f"cut{suffix}", grey(rng, 40, 40))
    whole, pixels = path.read_bytes(), read.read(path).pixels
    for length in (0, 1, 7, 8, 20, 33, *range(50, len(whole) - 60, 61)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"cut{suffix}"):
            read.read(path)
    for length in range(len(whole) - 60, len(whole)):
        path.write_bytes(whole[:length])
        try:
            found = read.read(path).pixels
        except DataError:
            continue
        np.testing.assert_array_equal(found, pixels)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bytes_never_escape_as_another_error(tmp_path, rng):
    for suffix in (".png", ".jpg", ".bmp", ".tif"):
        whole = save(tmp_path / f"whole{suffix}", grey(rng, 24, 24)).read_bytes()
        for position in rng.integers(0, len(whole), 60):
            broken = bytearray(whole)
            broken[position] ^= int(rng.integers(1, 256))
            (tmp_path / f"broken{suffix}").write_bytes(broken)
            try:
                pixels = read.read(tmp_path / f"broken{suffix}").pixels
            except DataError:
                continue
            assert np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes whose header promises a huge picture."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


@pytest.mark.parametrize("side", [8_001, 12_000, 100_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb_is_refused_by_its_header(tmp_path, monkeypatch, side):
    def never(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", never)
    with pytest.raises(DataError, match="at most 64,000,000 are read"):
        read.read(bomb(tmp_path / "bomb.png", side, side))


def test_pages_of_a_tiff_are_frames(tmp_path, rng):
    pages = [grey(rng) for _ in range(3)]
    first, *more = map(PIL.Image.fromarray, pages)
    first.save(tmp_path / "a.tif", save_all=True, append_images=more)
    pixels = read.read(tmp_path / "a.tif").pixels
    np.testing.assert_array_equal(pixels, np.stack(pages).astype(np.float32) / 255)
    part = read.read(tmp_path / "a.tif", frames=(1, 3)).pixels
    np.testing.assert_array_equal(part, pixels[1:])
    with pytest.raises(DataError, match=r"a\.tif has 3 frame\(s\) and 2 to 4"):
        read.read(tmp_path / "a.tif", frames=(2, 4))
    with pytest.raises(DataError, match="3 frames where one image is needed"):
        next(read.read_all([record(tmp_path / "a.tif")], 8))


def test_pages_of_several_sizes_are_refused(tmp_path, rng):
    pages = [PIL.Image.fromarray(grey(rng, 5 + i, 5)) for i in range(2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="several sizes"):
        read.read(tmp_path / "a.tif")


# ---------------------------------------------------------------- masks


def test_mask_is_the_union_above_127(tmp_path):
    first = save(tmp_path / "1.png", np.array([[0, 127, 128], [0, 0, 0]], np.uint8))
    second = save(tmp_path / "2.png", np.array([[0, 0, 0], [255, 126, 0]], np.uint8))
    mask = read.read_mask([first, second], (2, 3))
    np.testing.assert_array_equal(mask, [[False, False, True], [True, False, False]])
    assert not read.read_mask([], (2, 3)).any()


LESION = np.zeros((24, 30), np.uint8)
LESION[4:13, 5:22] = 1  # 153 pixels
INNER = np.zeros_like(LESION)
INNER[6:11, 8:15] = 1


def paletted(indices: np.ndarray, *colours: tuple[int, int, int]) -> PIL.Image.Image:
    image = PIL.Image.fromarray(indices).convert("P")
    image.putpalette(np.ravel(colours).tolist())
    return image


def coloured(*colour: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(LESION[..., None] * np.array(colour, np.uint8))


def with_alpha(colour: np.ndarray, alpha: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.dstack([colour, colour, colour, alpha]).astype(np.uint8))


FORMS = {  # file name -> how a mask is stored
    "255.png": lambda: PIL.Image.fromarray(LESION * 255),
    "254.png": lambda: PIL.Image.fromarray(LESION * 254),
    "1.png": lambda: PIL.Image.fromarray(LESION),
    "1.bmp": lambda: PIL.Image.fromarray(LESION),
    "one bit.png": lambda: PIL.Image.fromarray(LESION > 0),
    "white is zero.tif": lambda: PIL.Image.fromarray(LESION * 255),
    "16 bits.png": lambda: PIL.Image.fromarray(LESION.astype(np.uint16)),
    "16 bits.tif": lambda: PIL.Image.fromarray(LESION.astype(np.uint16) * 255),
    "32 bits.tif": lambda: PIL.Image.fromarray(LESION.astype(np.int32) * 7),
    "float.tif": lambda: PIL.Image.fromarray(LESION.astype(np.float32)),
    "red.png": lambda: coloured(255, 0, 0),
    "blue.png": lambda: coloured(0, 0, 90),
    "voc.png": lambda: paletted(LESION, (0, 0, 0), (128, 0, 0)),
    "index 2.png": lambda: paletted(LESION * 2, (0, 0, 0), (9, 9, 9), (0, 64, 0)),
    "inverted palette.png": lambda: paletted(1 - LESION, (255, 255, 255), (0, 0, 0)),
    "labels.png": lambda: PIL.Image.fromarray(LESION + INNER),
    "spread labels.png": lambda: PIL.Image.fromarray(LESION * 85 + INNER * 85 + INNER * 85),
    "16-bit labels.png": lambda: PIL.Image.fromarray((LESION + INNER).astype(np.uint16)),
    "voc labels.png": lambda: paletted(
        LESION + INNER, (0, 0, 0), (64, 0, 0), (192, 128, 128), *[(0, 0, 0)] * 3
    ),
    "opaque.png": lambda: with_alpha(LESION * 255, np.full_like(LESION, 255)),
    "opaque 1.png": lambda: with_alpha(LESION, np.full_like(LESION, 255)),
    "cut out.png": lambda: with_alpha(np.full_like(LESION, 255), LESION * 255),
    "half transparent.png": lambda: with_alpha(LESION * 255, LESION * 100),
    "lossy.jpg": lambda: PIL.Image.fromarray(LESION * 255),
    "red.jpg": lambda: coloured(255, 0, 0),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_mask_however_it_is_stored(tmp_path, name):
    options = {"tiffinfo": {262: 0}} if name == "white is zero.tif" else {}
    options |= {"quality": 60} if name.endswith(".jpg") else {}
    FORMS[name]().save(tmp_path / name, **options)
    found = read.read_mask([tmp_path / name], LESION.shape)
    if name == "red.jpg":  # its colour has half the resolution
        assert abs(int(found.sum()) - 153) < 30 and found[6:11, 8:18].all()
    else:
        np.testing.assert_array_equal(found, LESION > 0)


@pytest.mark.parametrize("labels", [LESION, LESION + INNER, LESION * 3 + INNER])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
def test_a_mask_of_nifti(tmp_path, labels, kind):
    stored = labels[::-1, ::-1].T[..., None].astype(kind)
    nibabel.Nifti1Image(stored, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read.read_mask([tmp_path / "a.nii.gz"], (24, 30)), LESION > 0)


def test_soft_edges_and_noise_of_a_mask_are_not_lesion(tmp_path):
    soft = LESION * 255
    soft[3, 5:22], soft[2, 0] = 60, 9  # an edge, and a remnant of JPEG
    found = read.read_mask([save(tmp_path / "a.png", soft)], LESION.shape)
    np.testing.assert_array_equal(found, LESION > 0)


def test_whole_and_empty_masks(tmp_path):
    for value in (1, 255):
        path = save(tmp_path / "a.png", np.full((4, 5), value, np.uint8))
        assert read.read_mask([path], (4, 5)).all()
    for suffix in ("png", "jpg", "tif"):
        path = save(tmp_path / f"a.{suffix}", np.zeros((4, 5), np.uint8))
        assert not read.read_mask([path], (4, 5)).any()


def test_a_mask_is_turned_as_its_image_is(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    stored = np.rot90(LESION * 255)
    for suffix in ("png", "tif"):
        save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif)
        found = read.read_mask([tmp_path / f"a.{suffix}"], LESION.shape)
        np.testing.assert_array_equal(found, LESION > 0)


@pytest.mark.parametrize("values", [(254, 255), (1, 2), (200, 250, 255)])
def test_masks_without_background_are_refused(tmp_path, values):
    array = np.full((4, 5), values[0], np.uint8)
    array[1, : len(values)] = values
    with pytest.raises(DataError, match=r"a\.png has several values and none is bright or none"):
        read.read_mask([save(tmp_path / "a.png", array)], (4, 5))


def test_a_mask_of_several_pages_is_refused(tmp_path):
    pages = [PIL.Image.fromarray(LESION * 255)] * 2
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"a\.tif is 2 frames of 30 x 24 pixels but its image is"):
        read.read_mask([tmp_path / "a.tif"], LESION.shape)


def test_masks_of_several_dark_values_are_refused(tmp_path):
    PIL.Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6) * 3).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png has several values and none is bright"):
        read.read_mask([tmp_path / "a.png"], (5, 6))


def test_mask_of_another_size_names_both(tmp_path):
    path = save(tmp_path / "m.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(DataError, match=r"m\.png is 5 x 4 pixels but its image is 7 x 6"):
        read.read_mask([path], (6, 7))
    with pytest.raises(DataError, match=r"give a mask drawn on mine/i\.png itself"):
        read.read_mask([path], (6, 7), Path("mine/i.png"))


def test_missing_mask(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        read.read_mask([tmp_path / "gone.png"], (6, 7))


# ---------------------------------------------------------------- many images


def test_read_all_keeps_order_and_holds_few(tmp_path, rng, monkeypatch):
    for i in range(30):
        save(tmp_path / f"{i}.png", grey(rng, 10 + i, 12))
    taken = []

    def records():
        for i in range(30):
            taken.append(i)
            yield record(tmp_path / f"{i}.png")

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    stream = read.read_all(records(), 16, "pad")
    first, pixels = next(stream)
    assert first.id == "0.png" and len(taken) <= 9
    np.testing.assert_array_equal(pixels, read.fit(read.read(first.path).pixels[0], 16, "pad"))
    assert [r.id for r, _ in stream] == [f"{i}.png" for i in range(1, 30)]


def test_an_image_changed_since_it_was_listed_is_named(tmp_path, rng):
    """Its tokens would be kept under the digest of what it was."""
    first = save(tmp_path / "a.png", grey(rng))
    listed = record(first)._replace(sha256=files.sha256_of(first))
    assert len(list(read.read_all([listed], 16))) == 1
    save(first, grey(rng))
    with pytest.raises(DataError, match=r"a\.png was changed while it was read"):
        list(read.read_all([listed], 16))


def test_read_all_stops_at_the_broken_image(tmp_path, rng):
    save(tmp_path / "0.png", grey(rng))
    (tmp_path / "1.png").write_bytes(b"broken")
    stream = read.read_all([record(tmp_path / f"{i}.png") for i in range(2)], 16)
    assert next(stream)[0].id == "0.png"
    with pytest.raises(DataError, match=r"1\.png"):
        next(stream)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(tmp_path, rng):
    path = save(tmp_path / "a.png", grey(rng))
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        read.read(path)
