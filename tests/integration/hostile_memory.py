"""Each kind of tests.support.hostile alone through prediction: what it gives, memory and seconds.

`python -m tests.integration.hostile_memory --workdir=TRAINED --table=FILE.csv [--only=REGEX]`.

All in one process; the high-water mark is reset before each file, so that a row's peak is that of a
fresh process which predicts this file: its memory once the detector is loaded, and what was added.
Exits with 1 where a file gives neither a result nor a sentence, takes 2 GB, or too long.
"""

import argparse
import csv
import ctypes
import gc
import logging
import re
import shutil
import tempfile
import time
from pathlib import Path

from medclip_jax import build_detector
from medclip_jax.errors import UserError
from medclip_jax.inference import inputs, predict
from tests.support import hostile
from tests.support.predicting import table

MOST_MB, MOST_SECONDS = 2000, 90  # of the processor, and a tenth of a second per frame


def memory(name: str) -> int:
    """MB of this process by a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", text)[1]) // 1024


def settled() -> int:
    """MB in use, with the high-water mark brought down to it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def outcome(predictor, path: Path, output: Path) -> tuple[str, int]:
    """hostile.READ, the reason in unreadable.csv, or nothing; rows of results."""
    try:
        predict.run(predict.in_process(predictor), inputs.find([str(path.parent)]), output)
    except UserError:
        pass  # of a single unreadable file; the table says why
    if rows := len(table(output)):
        return hostile.READ, rows
    return next((row["reason"] for row in table(output, "unreadable.csv")), ""), 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--only", default="", help="of the labels")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    predictor, bad = build_detector.load_predictor(given.workdir), 0
    base, families = settled(), {}
    with given.table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("family", "kind", "outcome", "mb", "seconds"))
        for label, one in hostile.KINDS.items():
            if not re.search(given.only, label):
                continue
            folder = Path(tempfile.mkdtemp())
            (path,) = hostile.write(folder / "in", {label}).values()
            before, start = settled(), time.process_time()
            said, frames = outcome(predictor, path, folder / "out")
            seconds, peak = time.process_time() - start, base + memory("VmHWM") - before
            shutil.rmtree(folder)
            rows.writerow((one.family, label, said, peak, f"{seconds:.1f}"))
            file.flush()
            families[one.family] = max(families.get(one.family, 0), peak)
            read = said == hostile.READ
            wrong = read != (one.expect == hostile.READ) or (not read and one.expect not in said)
            if wrong or not said or peak >= MOST_MB or seconds > MOST_SECONDS + frames / 10:
                print(f"{label}: {said!r}, {peak} MB, {seconds:.0f} s")
                bad += 1
    print({"loaded": base} | families)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
