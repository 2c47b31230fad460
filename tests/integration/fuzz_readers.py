"""Break small files of every format byte by byte and read them.

`python -m tests.integration.fuzz_readers`.

A process of its own: a crash of a decoder, a hang or a growth of memory is seen from outside.
Prints one JSON line: cases, read, refused per format, the slowest case and the peak of memory.
Anything but an image in [0, 1] or a `DataError` ends it with the file, the case and a traceback.
"""

import argparse
import faulthandler
import gzip
import json
import logging
import resource
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from medclip_jax.errors import DataError
from medclip_jax.io import read
from tests.support.damaged import broken, seeds


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
