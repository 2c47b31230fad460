"""NIfTI against nibabel's arrays in the reference set, hostile headers, and saving maps."""

import gzip
import json
import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medclip_jax.data import readers
from medclip_jax.errors import DataError
from medclip_jax.io import nifti, nifti_header, read
from medclip_jax.io.nifti import write_nifti
from tests.support.reference import data_files, reference_files

EXPECTED = reference_files("io/expected.json")[0]
CASES = json.loads(EXPECTED.read_text())["nifti"]
ARRAYS = np.load(EXPECTED.with_suffix(".npz"))
GOOD = [k for k, v in CASES.items() if v["status"] == "readable"]
BAD = {  # what the message must say
    "bad_truncated": "damaged or truncated gzip",
    "bad_truncated_raw": "4,500 of the 5,500 bytes",
    "bad_text_renamed": "not a NIfTI file",
    "bad_text_renamed_gz": "not gzip",
    "bad_empty": "is empty",
    "bad_magic": "not a NIfTI file",
    "bad_datatype": "4096 not recognized",
    "bad_corrupt_gz": "CRC check failed",
}


def file(name: str) -> Path:
    return EXPECTED.parent / CASES[name]["file"]


def frames_first(volume: np.ndarray) -> np.ndarray:
    """[z, rows, columns, t] -> [t * z, rows, columns]."""
    if volume.ndim == 3:
        return volume
    return np.moveaxis(volume, 3, 0).reshape(-1, *volume.shape[1:3])


@pytest.mark.parametrize("name", GOOD)
def test_volume_equals_nibabels_canonical_one(name):
    volume = nifti.nifti_volume(file(name))
    wanted = ARRAYS[f"{name}__canonical"]
    largest = np.abs(wanted[np.isfinite(wanted)]).max()
    np.testing.assert_allclose(volume.voxels, wanted, rtol=1e-6, atol=1e-6 * largest)
    np.testing.assert_allclose(volume.affine, ARRAYS[f"{name}__canonical_affine"], atol=1e-6)


@pytest.mark.parametrize("name", [n for n in GOOD if n != "nan_voxels_f32"])
def test_slices_lie_as_a_radiologist_sees_them(name):
    image = readers.read(file(name))
    wanted = frames_first(ARRAYS[f"{name}__axial_radiological"])
    unit = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    np.testing.assert_allclose(image.pixels, unit, atol=1e-6)
    affine = ARRAYS[f"{name}__canonical_affine"]
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(image.spacing, (sizes[1], sizes[0]), rtol=1e-6)
    assert image.meta == {"format": "NIfTI"}


@pytest.mark.parametrize("axis", nifti.AXES)
def test_each_axis_against_its_definition(axis):
    """Voxel by voxel: rows run away from anterior or superior, columns away from patient right."""
    canonical = ARRAYS["permuted_flipped_i16__canonical"]
    found = nifti.slices(canonical, axis)
    x, y, z = (n - 1 for n in canonical.shape)
    for f, r, c in ((0, 0, 0), (1, 2, 3), (-1, -1, -1)):
        f, r, c = f % found.shape[0], r % found.shape[1], c % found.shape[2]
        wanted = {
            "axial": lambda f, r, c: canonical[x - c, y - r, f],
            "coronal": lambda f, r, c: canonical[x - c, f, z - r],
            "sagittal": lambda f, r, c: canonical[f, y - c, z - r],
        }[axis]
        assert found[f, r, c] == wanted(f, r, c)


def test_a_range_of_slices_keeps_the_scale_of_the_whole():
    path = file("fourd_f32")
    whole = read.read(path, axis="coronal").pixels
    np.testing.assert_array_equal(read.read(path, "coronal", (4, 12)).pixels, whole[4:12])
    with pytest.raises(DataError, match="27 frame"):
        read.read(path, "coronal", (4, 28))


def test_nan_voxels_are_refused_by_number_and_kept_in_the_volume():
    path = file("nan_voxels_f32")
    count = int((~np.isfinite(ARRAYS["nan_voxels_f32__canonical"])).sum())
    with pytest.raises(DataError, match=f"has {count} voxels that are NaN"):
        read.read(path)
    assert np.isnan(nifti.nifti_volume(path).voxels).any()


def test_unknown_orientation_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        read.read(file("no_form_f32"))
    assert "no_form_f32.nii does not say how the patient lay" in caplog.text


@pytest.mark.parametrize("name", [k for k in CASES if k not in GOOD])
def test_malformed_files_are_told_apart(name):
    with pytest.raises(DataError) as caught:
        read.read(file(name))
    message = str(caught.value)
    assert BAD[name] in message and str(file(name)) in message and "\n" not in message


def test_pairs_and_what_is_missing_of_them(tmp_path):
    values = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16)
    nibabel.Nifti1Pair(values, np.eye(4)).to_filename(tmp_path / "a.img")
    wanted = nifti.slices(values / values.max(), "axial")
    for name in ("a.hdr", "a.img"):
        np.testing.assert_allclose(read.read(tmp_path / name).pixels, wanted, atol=1e-6)
    (tmp_path / "a.img").unlink()
    with pytest.raises(DataError, match=r"a\.img does not exist"):
        read.read(tmp_path / "a.hdr")


def test_units_are_mm(tmp_path):
    for unit, scale in (("meter", 1000), ("mm", 1), ("micron", 0.001)):
        image = nibabel.Nifti1Image(np.eye(4)[:, :, None], np.diag([2, 3, 4, 1.0]))
        image.header.set_xyzt_units(unit)
        image.to_filename(tmp_path / "a.nii")
        np.testing.assert_allclose(
            read.read(tmp_path / "a.nii").spacing, (3 * scale, 2 * scale), rtol=1e-6
        )


def header(shape, offset=352) -> bytes:
    head = nibabel.Nifti1Header()
    head.set_data_dtype(np.uint8)
    head.set_data_shape(shape)
    head["magic"], head["vox_offset"] = b"n+1", offset
    return head.binaryblock + bytes(4)


@pytest.mark.parametrize("shape", [(8001, 8001, 1), (4000, 4000, 20), (20000, 20000, 20000)])
def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch, shape):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header(shape) + bytes(10_000_000)))
    sizes = []
    real = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: sizes.append(n) or real(self, n))
    with pytest.raises(DataError, match=r"at most (64,000,000|268,435,456)"):
        read.read(tmp_path / "a.nii.gz")
    assert sizes == [nifti_header.HEADER_BYTES]


def test_a_gzip_that_unpacks_for_ever_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(nifti_header, "MAX_BYTES", 5_000_000)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header((4, 4, 4)) + bytes(20_000_000)))
    with pytest.raises(DataError, match="unpacks to more than 5,000,000 bytes"):
        read.read(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(header((4, 4, 4), 2_000_000_000)))
    with pytest.raises(DataError, match="says it holds 2,000,000,064 bytes"):
        read.read(tmp_path / "b.nii.gz")


def test_texts_of_a_header_stay_in_the_file(tmp_path):
    image = nibabel.Nifti1Image(np.eye(5)[:, :, None], np.eye(4))
    image.header["descrip"] = image.header["db_name"] = b"DOE^JANE"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    image.to_filename(tmp_path / "a.nii")
    assert b"DOE" in (tmp_path / "a.nii").read_bytes()
    assert "DOE" not in str(read.read(tmp_path / "a.nii"))
    write_nifti(tmp_path / "b.nii.gz", tmp_path / "a.nii", np.zeros((1, 5, 5), np.uint16))
    assert b"DOE" not in gzip.decompress((tmp_path / "b.nii.gz").read_bytes())


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(
    "sizes, codes, known",
    [
        ((0, 0, 0), (0, 0), None),
        ((2, 0, 3), (1, 0), None),
        ((0, 0, 0), (0, 1), (1.5, 2.5)),  # of the sform
        ((2, 3, 4), (0, 0), (3, 2)),
    ],
)
def test_voxels_of_no_size_have_none(tmp_path, kind, sizes, codes, known):
    """nibabel makes 1 mm of 0."""
    volume = kind(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([2.5, 1.5, 2, 1]))
    path = tmp_path / "a.nii"
    volume.to_filename(path)
    header, raw = volume.header.copy(), path.read_bytes()
    header["pixdim"][1:4], header["magic"] = sizes, header.single_magic
    header["qform_code"], header["sform_code"] = codes
    header.set_data_offset(header.single_vox_offset)
    path.write_bytes(header.binaryblock + raw[len(header.binaryblock) :])
    assert readers.read(path, axis="axial").spacing == known


@pytest.mark.parametrize(
    "name", ["oblique_lefthanded_i16", "las_lefthanded_u8", "qform_only_f32", "fourd_f32"]
)
def test_a_saved_map_lies_over_its_volume(tmp_path, name):
    codes = np.round(readers.read(file(name)).pixels * 65535).astype(np.uint16)
    write_nifti(tmp_path / "map.nii.gz", file(name), codes)
    saved, source = nibabel.load(tmp_path / "map.nii.gz"), nibabel.load(file(name))
    values = source.get_fdata()
    unit = (values - values.min()) / (values.max() - values.min())
    np.testing.assert_allclose(saved.get_fdata(), unit, atol=3e-5)
    np.testing.assert_allclose(saved.affine, source.affine, atol=1e-5)


@pytest.mark.parametrize("path", data_files("nifti/*"))
def test_files_of_others(path):
    """The volume nibabel reads, or a refusal for a reason that the file gives."""
    refused = {
        "analyze.hdr": "not a NIfTI",
        "nifti1.hdr": "img does not exist",
        "nifti2.hdr": "img does not exist",
        "resampled_anat_moved.nii": "153 voxels that are NaN",
        "row_major.dconn.nii": "6 axes",
    }
    if path.name in refused:
        with pytest.raises(DataError, match=refused[path.name]):
            read.read(path)
        return
    peer = nibabel.as_closest_canonical(nibabel.load(path))
    wanted = peer.get_fdata()
    volume = nifti.nifti_volume(path)
    np.testing.assert_allclose(volume.voxels, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_allclose(volume.affine, peer.affine, atol=1e-5)
    image = read.read(path)
    assert image.pixels.min() == 0 and image.pixels.max() == 1
    slices = {"standard.nii.gz": 5}  # of 1 x 3 x 2 mm: along its second axis, all others axial
    assert len(image.pixels) == slices.get(path.name, int(np.prod(wanted.shape[2:])))


def test_values_near_the_end_of_float32_still_fill_the_unit_range(tmp_path):
    values = np.array([-3e38, 0, 1e38, 3e38], np.float32).reshape(2, 2, 1)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "a.nii")
    found = np.sort(read.read(tmp_path / "a.nii").pixels.ravel())
    np.testing.assert_allclose(found, [0, 0.5, 4 / 6, 1], atol=1e-6)


def test_content_decides_on_gzip_not_the_suffix(tmp_path):
    values = np.random.default_rng(0).integers(0, 99, (40, 30, 6)).astype(np.int16)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "a.nii")
    raw = (tmp_path / "a.nii").read_bytes()
    expected = read.read(tmp_path / "a.nii").pixels
    for name, content in (("plain.nii.gz", raw), ("packed.nii", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read.read(tmp_path / name).pixels, expected)
        codes = np.round(expected * 65535).astype(np.uint16)
        write_nifti(tmp_path / "map.nii.gz", tmp_path / name, codes)
        saved = nibabel.load(tmp_path / "map.nii.gz").get_fdata()
        np.testing.assert_allclose(saved, (values - values.min()) / np.ptp(values), atol=3e-5)


@pytest.mark.parametrize("sizes, axis", [((5, 1.5, 1.5), "sagittal"), ((1, 4, 1), "coronal")])
def test_a_volume_is_sliced_as_it_was_acquired(tmp_path, sizes, axis):
    """As scanners store it: the slow axis last, so that the affine permutes."""
    rng, slow = np.random.default_rng(0), int(np.argmax(sizes))
    shape = [12, 14, 16]
    shape[slow] = 6
    canonical = rng.integers(0, 99, shape).astype(np.int16)
    order = [*(a for a in range(3) if a != slow), slow]
    affine = np.zeros((4, 4))
    for stored, a in enumerate(order):
        affine[a, stored] = sizes[a]
    affine[3, 3] = 1
    path = tmp_path / "a.nii.gz"
    nibabel.Nifti1Image(np.transpose(canonical, order), affine).to_filename(path)
    image = nifti.open_nifti(path)
    expected = nifti.slices(canonical / canonical.max(), axis)
    assert image.axis == axis and image.shape[0] == 6
    np.testing.assert_allclose(image.part(0, 6), expected, atol=1e-6)
    across = [s for i, s in enumerate(sizes) if i != slow]
    assert sorted(image.spacing) == pytest.approx(sorted(across))
    codes = np.round(expected * 65535).astype(np.uint16)
    write_nifti(tmp_path / "map.nii.gz", path, codes, axis)
    saved = nibabel.load(tmp_path / "map.nii.gz")
    assert np.allclose(saved.affine, affine)
    np.testing.assert_allclose(
        saved.get_fdata(), np.transpose(canonical, order) / canonical.max(), atol=3e-5
    )


def test_the_axis_that_a_model_is_configured_with(tmp_path):
    path = tmp_path / "a.nii"
    nibabel.Nifti1Image(VOXELS, np.diag([1, 1, 5, 1])).to_filename(path)
    unit = (VOXELS - VOXELS.min()) / np.ptp(VOXELS)
    for text, axis in (("", "axial"), ("coronal", "coronal"), ("sagittal", "sagittal")):
        found = read.open_image(path, window=text)
        assert found.axis == axis
        np.testing.assert_allclose(
            found.part(0, found.shape[0]), nifti.slices(unit, axis), atol=1e-6
        )
    windowed = read.read(path, window="coronal,500/400").pixels
    wanted = np.clip((nifti.slices(VOXELS * 1.0, "coronal") - 500) / 400 + 0.5, 0, 1)
    np.testing.assert_allclose(windowed, wanted, atol=1e-6)
    assert read.open_image(path, "axial", "coronal").axis == "axial"  # who names it wins


def test_one_slice_is_one_frame_whichever_way_it_lies(tmp_path):
    for slow in range(3):
        shape = [7, 8, 9]
        shape[slow] = 1
        voxels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
        nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "a.nii")
        assert len(read.read(tmp_path / "a.nii").pixels) == 1


@pytest.mark.parametrize("place, spike", [((0, 0, 0), 1e6), ((3, 3, 3), -1e6), ((1, 2, 3), 2000)])
def test_a_spike_does_not_flatten_the_others(tmp_path, place, spike):
    voxels = np.random.default_rng(0).integers(10, 200, (40, 40, 5)).astype(np.float32)
    clean = nifti.slices((voxels - 10) / (199 - 10), "axial")
    voxels[place] = spike
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "a.nii")
    image = read.read(tmp_path / "a.nii")
    changed = np.abs(image.pixels - np.clip(clean, 0, 1)) > 0.02
    assert changed.sum() <= 1 and image.pixels.max() == 1
    assert "spikes lie beyond" in image.range
    small = np.zeros((40, 40, 5), np.float32)
    small[place] = 1  # nothing else has contrast: this is the picture
    nibabel.Nifti1Image(small, np.eye(4)).to_filename(tmp_path / "a.nii")
    assert read.read(tmp_path / "a.nii").pixels.sum() == 1


def test_axes_of_length_one_at_the_end_hold_nothing(tmp_path):
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "a.nii")
    nibabel.Nifti1Image(voxels[..., None, None, None], np.eye(4)).to_filename(tmp_path / "b.nii")
    one, two = (read.read(tmp_path / f"{n}.nii").pixels for n in "ab")
    np.testing.assert_array_equal(one, two)


def test_an_extension_that_cannot_be_parsed_is_not(tmp_path):
    nibabel.Nifti1Image(np.eye(4)[:, :, None], np.eye(4)).to_filename(tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[348:352] = b"\1\0\0\0"
    raw[108:112] = np.float32(368).tobytes()
    extended = (
        bytes(raw[:352]) + b"\xff\xff\xff\x7f\xff\xff\xff\xff" + b"\xfe" * 8 + bytes(raw[352:])
    )
    (tmp_path / "b.nii").write_bytes(extended)
    one, two = (read.read(tmp_path / f"{n}.nii").pixels for n in "ab")
    np.testing.assert_array_equal(one, two)
    write_nifti(tmp_path / "m.nii.gz", tmp_path / "b.nii", np.zeros((1, 4, 4), np.uint16))


VOXELS = np.random.default_rng(0).integers(0, 1000, (5, 6, 4)).astype(np.int16)


def expected(values: np.ndarray) -> np.ndarray:
    unit = values.astype(np.float64)
    return nifti.slices((unit - unit.min()) / np.ptp(unit), "axial")


def stored(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    affine = np.eye(4) if affine is None else affine
    nibabel.Nifti1Image(voxels, affine, dtype=voxels.dtype).to_filename(path)
    return path


def patched(path: Path, **fields) -> Path:
    """The volume with fields of its header overwritten, however wrong."""
    raw = bytearray(stored(path, VOXELS).read_bytes())
    for name, value in fields.items():
        kind, offset = nibabel.Nifti1Header().template_dtype.fields[name][:2]
        content = np.array(value, kind.base).tobytes()
        raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("kind", "u1 i1 u2 i2 u4 i4 u8 i8 f4 f8".split())
@pytest.mark.parametrize("order", "<>")
def test_voxels_of_every_type(tmp_path, kind, order):
    values = (VOXELS // 16 - (30 if kind[0] == "i" else 0)).astype(kind)
    values = values << 40 if kind in ("u8", "i8") else values
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_shape(values.shape)
    header.set_data_dtype(values.dtype)
    header["magic"], header["vox_offset"] = b"n+1", 352
    header.set_sform(np.diag([2, 3, 4, 1]), 1)
    data = values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + data)
    image = read.read(tmp_path / "a.nii")
    np.testing.assert_allclose(image.pixels, expected(values), atol=1e-6)
    assert image.spacing == (3, 2)


@pytest.mark.parametrize("bands", ["RGB", "RGBA"])
def test_colour_voxels(tmp_path, bands):
    voxels = np.zeros((5, 6, 4), [(band, "u1") for band in bands])
    for band in bands:
        voxels[band] = np.random.default_rng(ord(band)).integers(0, 256, (5, 6, 4))
    grey = 0.299 * voxels["R"] + 0.587 * voxels["G"] + 0.114 * voxels["B"]
    grey = grey * (voxels["A"] / 255 if "A" in bands else 1)
    path = stored(tmp_path / "a.nii", voxels)
    np.testing.assert_allclose(read.read(path).pixels, expected(grey), atol=1e-5)


@pytest.mark.parametrize("kind", [np.complex64, np.complex128])
def test_complex_voxels_are_refused(tmp_path, kind):
    with pytest.raises(
        DataError, match=r"a\.nii holds voxels of kind 'complex.*: save real numbers"
    ):
        read.read(stored(tmp_path / "a.nii", VOXELS.astype(kind)))


@pytest.mark.parametrize(
    "slope, intercept, values",
    [(2, -100, VOXELS * 2.0 - 100), (-1, 5, 5.0 - VOXELS), (1e-30, 0, VOXELS)]
    + [(0, 0, VOXELS), (0, 5, VOXELS), (np.nan, np.nan, VOXELS), (np.nan, 0, VOXELS)],
)
def test_slopes_that_mean_something_or_nothing(tmp_path, slope, intercept, values):
    path = patched(tmp_path / "a.nii", scl_slope=slope, scl_inter=intercept)
    np.testing.assert_allclose(read.read(path).pixels, expected(values), atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"dim": [4, 5, 6, 4, 0]},
        {"dim": [5, 5, 6, 4, 1, 0]},
        {"dim": [3, 5, 6, 4, 77]},
        {"pixdim": [0, 1, 1, 1]},
        {"pixdim": [1, -2, 3, 4]},
        {"bitpix": 8},
        {"sizeof_hdr": 0},
        {"vox_offset": 0},
        {"quatern_b": 3, "quatern_c": 3},
        {"srow_x": [0, 0, 0, 0], "qform_code": 1},
        {"srow_x": [np.nan] * 4, "qform_code": 1},
        {"srow_x": [np.inf] * 4, "qform_code": 1},
    ],
)
def test_headers_that_are_wrong_and_harmless(tmp_path, fields):
    path = patched(tmp_path / "a.nii", **fields)
    np.testing.assert_allclose(read.read(path).pixels, expected(VOXELS), atol=1e-6)
    write_nifti(tmp_path / "m.nii.gz", path, np.zeros((4, 6, 5), np.uint16))
    assert nibabel.load(tmp_path / "m.nii.gz").shape == (5, 6, 4)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"dim": [3, 5, 6, -4]}, "says it has 5 x 6 x -4 pixels"),
        ({"dim": [5, 5, 6, 2, 1, 2]}, "has 5 axes and 2 to 4 are read"),
        ({"dim": [1, 5]}, "has 1 axes"),
        ({"datatype": 0}, "cannot be read as NIfTI .data code 0 not"),
        ({"datatype": 1}, "cannot be read as NIfTI .data code 1 not"),
        ({"vox_offset": 1e9}, "says it holds 1,000,000,240 bytes"),
        ({"srow_x": [0, 0, 0, 0]}, "has an affine that flattens space"),
        ({"magic": b"\0\0\0\0"}, "is not a NIfTI file but Analyze 7.5"),
    ],
)
def test_headers_that_are_refused_by_name(tmp_path, fields, words):
    with pytest.raises(DataError, match=rf"a\.nii {words}"):
        read.read(patched(tmp_path / "a.nii", **fields))


def test_sform_before_qform(tmp_path):
    image = nibabel.Nifti1Image(VOXELS, np.eye(4))
    image.set_qform(np.diag([-2, 3, 4, 1]), 1)
    image.set_sform(np.diag([5, 1, 1, 1]), 2)
    image.to_filename(tmp_path / "a.nii")
    found = nifti.open_nifti(tmp_path / "a.nii")
    assert found.axis == "sagittal" and found.spacing == (1, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_none(tmp_path, bad):
    voxels = VOXELS.astype(np.float64)
    voxels[1, 2, 3] = bad
    with pytest.raises(DataError, match="has 1 voxels that are NaN, infinite or beyond float32"):
        read.read(stored(tmp_path / "a.nii", voxels))


def test_pairs_packed_and_analyze(tmp_path):
    nibabel.Nifti1Pair(VOXELS, np.eye(4)).to_filename(tmp_path / "a.img")
    for name in ("a.hdr", "a.img"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    np.testing.assert_allclose(read.read(tmp_path / "a.hdr").pixels, expected(VOXELS), atol=1e-6)
    nibabel.AnalyzeImage(VOXELS, np.eye(4)).to_filename(tmp_path / "b.img")
    for name in ("b.hdr", "b.img"):
        with pytest.raises(DataError, match=r"b\.hdr is not a NIfTI file but Analyze 7\.5"):
            read.read(tmp_path / name)


def test_gzip_in_pieces_or_with_something_behind_it(tmp_path):
    raw = stored(tmp_path / "a.nii", VOXELS).read_bytes()
    for content in (gzip.compress(raw[:500]) + gzip.compress(raw[500:]), gzip.compress(raw + b"x")):
        (tmp_path / "b.nii.gz").write_bytes(content)
        found = read.read(tmp_path / "b.nii.gz").pixels
        np.testing.assert_allclose(found, expected(VOXELS), atol=1e-6)
