"""Break small files of every format byte by byte and read them: `python -m tests.fuzz_readers`.

A process of its own: a crash of a decoder, a hang or a growth of memory is seen from outside.
Prints one JSON line: cases, read, refused per format, the slowest case and the peak of memory.
Anything but an image in [0, 1] or a `DataError` ends it with the file, the case and a traceback.
"""

import argparse
import faulthandler
import gzip
import io
import json
import logging
import resource
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import PIL.Image

from medclip_jax.errors import DataError
from medclip_jax.io import read

from .conftest import reference_files
from .test_dicom import data_files

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
    found: dict[str, list[tuple[str, bytes]]] = {}
    for kind, ways in PILLOW.items():
        for mode, options in ways:
            grey = PIL.Image.fromarray(rng.integers(0, 256, (24, 20), dtype=np.uint8))
            options = {**options, "append_images": [grey]} if "save_all" in options else options
            image = grey.convert("I").point(lambda x: x * 257) if mode == "I;16" else grey
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, kind, **options)
            found.setdefault(kind, []).append((f".{kind.lower()}", buffer.getvalue()))
    dicoms = [p for p in reference_files("io/dicom/*") if not p.name.startswith("bad")]
    dicoms += [p for param in data_files("dicom/good/*") if (p := param.values[0])]
    for path in dicoms:
        found.setdefault("DICOM", []).append((".dcm", path.read_bytes()))
    for path in reference_files("io/nifti/*"):
        if not path.name.startswith("bad"):
            packed = path.name.endswith(".gz")
            kind = "NIfTI, gzip" if packed else "NIfTI"
            found.setdefault(kind, []).append((".nii.gz" if packed else ".nii", path.read_bytes()))
    return {k: [s for s in files if len(s[1]) <= LARGEST] for k, files in found.items()}


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


def run(cases: int, seed: int) -> dict:
    files, rng = seeds(), np.random.default_rng(seed)
    counts = {kind: {"read": 0, "refused": 0} for kind in files}
    slowest, before = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        for case in range(cases):
            kind = list(files)[case % len(files)]
            suffix, whole = files[kind][int(rng.integers(len(files[kind])))]
            path = Path(folder) / f"a{suffix}"
            if suffix == ".nii.gz" and rng.random() < 0.5:  # what the checksum would not find
                path.write_bytes(gzip.compress(broken(rng, gzip.decompress(whole)), 1))
            else:
                path.write_bytes(broken(rng, whole))
            start = time.perf_counter()
            try:
                pixels = read.read(path).pixels
                assert np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1
                counts[kind]["read"] += 1
            except DataError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                counts[kind]["refused"] += 1
            except BaseException:
                kept = Path(tempfile.gettempdir()) / f"fuzz_{seed}_{case}{suffix}"
                kept.write_bytes(path.read_bytes())
                print(f"case {case} of seed {seed} ({kind}): kept as {kept}", flush=True)
                raise
            slowest = max(slowest, time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"cases": cases, "slowest_s": round(slowest, 2), "grown_mb": grown // 1024, **counts}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    print(json.dumps(run(arguments.cases, arguments.seed)))
