"""Small whole files of every format, and the ways in which they are broken."""

import io
from collections.abc import Iterator

import numpy as np
import PIL.Image

from tests.support.reference import data_files, reference_files

LARGEST = 50_000  # bytes of a seed file
PILLOW = {
    "PNG": [("L", {}), ("RGBA", {}), ("P", {}), ("I;16", {})],
    "JPEG": [("L", {}), ("RGB", {}), ("CMYK", {}), ("RGB", {"progressive": True})],
    "BMP": [("L", {}), ("RGB", {})],
    "TIFF": [("L", {}), ("RGB", {"compression": "tiff_lzw"}), ("L", {"save_all": True})],
}


def seeds() -> dict[str, list[tuple[str, bytes]]]:
    """(suffix, bytes) of whole files, by format."""
    rng = np.random.default_rng(0)
    result: dict[str, list[tuple[str, bytes]]] = {}
    for kind, ways in PILLOW.items():
        for mode, options in ways:
            grey = PIL.Image.fromarray(rng.integers(0, 256, (24, 20), dtype=np.uint8))
            options = {**options, "append_images": [grey]} if "save_all" in options else options
            image = grey.convert("I").point(lambda x: x * 257) if mode == "I;16" else grey
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, kind, **options)
            result.setdefault(kind, []).append((f".{kind.lower()}", buffer.getvalue()))
    dicoms = [p for p in reference_files("io/dicom/*") if not p.name.startswith("bad")]
    dicoms += [p for param in data_files("dicom/good/*") if (p := param.values[0])]
    for path in dicoms:
        result.setdefault("DICOM", []).append((".dcm", path.read_bytes()))
    for path in reference_files("io/nifti/*"):
        if not path.name.startswith("bad"):
            packed = path.name.endswith(".gz")
            kind = "NIfTI, gzip" if packed else "NIfTI"
            result.setdefault(kind, []).append((".nii.gz" if packed else ".nii", path.read_bytes()))
    return {k: [s for s in files if len(s[1]) <= LARGEST] for k, files in result.items()}


def one_bit(data: bytes, n: int, seed: int = 0) -> Iterator[bytes]:
    """The same bytes with one bit flipped: n times, spread evenly with the ends among them."""
    rng = np.random.default_rng(seed)
    for place in np.linspace(0, len(data) - 1, n).astype(int):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        yield bytes(flipped)


def broken(rng: np.random.Generator, whole: bytes) -> bytes:
    """Flip bytes (mostly in the header), cut the end, overwrite or repeat a piece."""
    data = bytearray(whole)
    reach = len(data) if rng.random() < 0.4 else min(len(data), 1024)
    way = rng.choice(["flip", "cut", "overwrite", "repeat"], p=[0.6, 0.2, 0.1, 0.1])
    if way == "flip":
        for at in rng.integers(0, reach, rng.integers(1, 9)):
            data[at] ^= int(rng.integers(1, 256))
    elif way == "cut":
        del data[int(rng.integers(0, len(data))) :]
    else:
        at, length = int(rng.integers(0, reach)), int(rng.integers(1, 64))
        piece = bytes([int(rng.choice([0, 1, 127, 255]))]) * length
        data[at : at + (length if way == "overwrite" else 0)] = piece
    return bytes(data)


def altered(value, rng):
    """One value of a JSON tree replaced by what does not belong there."""
    inner = [k for k in (value if isinstance(value, dict) else range(len(value)))]
    key = inner[rng.integers(len(inner))]
    if isinstance(value[key], dict | list) and len(value[key]) and rng.random() < 0.8:
        altered(value[key], rng)
    elif isinstance(value, dict) and rng.random() < 0.2:
        del value[key]
    else:
        odd = [1e9, -1, None, "x", [], {}, True, 10**400, "/dev/zero", {"a": [1]}]
        value[key] = next(x for x in rng.permutation(np.array(odd, object)) if x != value[key])
