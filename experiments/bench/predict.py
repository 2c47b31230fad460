"""Frames per second of --mode predict, and the peak of its memory, by kind of file."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from bench import clock, predict_inputs


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = list(predict_inputs.MAKERS)
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--images", type=int, default=240, help="frames of each kind")
    parser.add_argument("--few", type=int, default=32, help="frames of the run that is subtracted")
    parser.add_argument("--workdir", type=Path, help="a trained run; else a short one is made")


def run(args: argparse.Namespace) -> dict:
    """Each kind in a process of its own, so that a peak of memory belongs to one kind."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        workdir = args.workdir or trained(base)
        for kind in args.kinds:
            for count in (counts := (args.few, args.images)):
                predict_inputs.MAKERS[kind](base / kind / str(count), count, count)
            results[kind] = r = clock.alone("bench.predict", workdir, base / kind, *counts)
            print(f"{kind}: {r['per_second']:.1f} frames/s, peak {r['peak_megabytes']} MB")
    return results


def trained(base: Path) -> Path:
    """A short training on simulated ultrasound, embedded CLIP; its length does not change times."""
    from medclip_jax import config, train
    from medclip_jax.data import phantom

    data = phantom.write_folder(base / "data", "ultrasound", 0, 256, 4, 2, 2)
    c = config.base("k=4,seed=0", name="folder", modality="breast ultrasound", anatomy="breast")
    c.update_from_flattened_dict({"data.root": str(data), "cache": str(base / "cache"), "steps": 5})
    train.run(c, base / "run", report=False)
    return base / "run"


def worker(workdir: Path, scans: Path, few: int, many: int) -> dict:
    """Predict both folders. What both runs pay, loading and a warm start, is subtracted."""
    from medclip_jax import main

    def seconds(count: int, name: str) -> float:
        begin = time.perf_counter()
        flags = [f"--workdir={workdir}", f"--input={scans / str(count)}"]
        code = main.main(["medclip-jax", "--mode=predict", *flags, f"--output={scans / name}"])
        if code:
            raise SystemExit(code)
        return time.perf_counter() - begin

    seconds(few, "first")  # compiles
    short, long = seconds(few, "short"), seconds(many, "long")
    rate = (many - few) / (long - short)
    return {"per_second": rate, "seconds": [short, long], "peak_megabytes": clock.peak_megabytes()}


if __name__ == "__main__":
    workdir, scans, few, many = sys.argv[1:]
    print(json.dumps(worker(Path(workdir), Path(scans), int(few), int(many))))
