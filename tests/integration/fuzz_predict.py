"""Broken files of every format through prediction.

`python -m tests.integration.fuzz_predict --cases 2000`.

Files are broken as in fuzz_readers and laid out so that broken DICOM slices also come as series,
under hostile names. Prediction must end by itself with each file in results.csv or in
unreadable.csv. Prints one JSON line: files, items scored, items refused, seconds, memory grown.
"""

import argparse
import csv
import gzip
import json
import logging
import resource
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from tests.support.damaged import broken, seeds
from tests.support.runs import make_world

NAMES = ("a", "b c", "=cmd()", "x" * 150, "né\u202e", "n\nl", "a..", "-rf", "%s{0}", "\udcff")


def lay_out(folder: Path, cases: int, seed: int) -> int:
    """Write broken files, eight to a folder; a third of the folders hold slices of one series."""
    files, rng = seeds(), np.random.default_rng(seed)
    kinds = list(files)
    for case in range(cases):
        place = folder / f"{case // 8}"
        place.mkdir(parents=True, exist_ok=True)
        if case % 8 == 0:
            of_one = "DICOM" if "DICOM" in files and case % 24 == 0 else ""
            shared = files[of_one][int(rng.integers(len(files[of_one])))] if of_one else None
        kind = kinds[case % len(kinds)]
        suffix, whole = shared or files[kind][int(rng.integers(len(files[kind])))]
        if suffix == ".nii.gz" and rng.random() < 0.5:  # what the checksum would not find
            data = gzip.compress(broken(rng, gzip.decompress(whole)), 1)
        else:
            data = broken(rng, whole)
        (place / f"{NAMES[case % len(NAMES)]}{case}{suffix}").write_bytes(data)
    return cases


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def trained(base: Path) -> Path:
    """A tiny scorer, trained in a process of its own."""
    workdir = base / "run"
    process = make_world(base / "world").start(workdir, "--config.steps=5")
    _, said = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(said[-3000:])
    return workdir


def run(cases: int, seed: int, base: Path, workdir: Path) -> dict:
    """Raises whatever prediction raises, AssertionError if a file is in neither table."""
    from medclip_jax.build_detector import load_predictor
    from medclip_jax.inference import inputs, predict

    scans, output = base / "scans", base / "out"
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    lay_out(scans, cases, seed)
    items = inputs.find([str(scans)])
    assert sum(len(item.paths) for item in items) == cases
    done = predict.run(predict.in_process(load_predictor(workdir)), items, output)
    good, bad = rows(output / "results.csv"), rows(output / "unreadable.csv")
    scored = {row["result"] for row in good}
    assert len(scored) == done.scored and len(bad) == done.unreadable
    assert {r["source"] for r in bad} | {r["source"] for r in good} == {i.source for i in items}
    assert done.scored + done.unreadable == len(items)
    assert all(row["reason"].isprintable() and len(row["reason"]) > 20 for row in bad)
    assert all(0 <= float(row["score"]) <= 1 for row in good)
    assert {p.resolve().parent for p in output.iterdir()} == {output.resolve()}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found = {"files": cases, "items": len(items), "scored": done.scored, "refused": len(bad)}
    return found | {"seconds": round(time.perf_counter() - start), "grown_mb": grown // 1024}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="a trained one; without it a tiny one is made")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        print(json.dumps(run(given.cases, given.seed, base, given.workdir or trained(base))))


if __name__ == "__main__":
    main()
