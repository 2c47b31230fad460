"""Seconds to score one image file, and what the passes of MC-dropout add, embedded CLIP."""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

import medclip_jax
from bench import predict, predict_inputs
from bench.predict_worker import peak_mb


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--passes", type=int, nargs=2, default=[1, 20], help="of MC-dropout")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        workdir = predict.trained(base)
        scans = predict_inputs.png(base / "scans", args.images, args.seed)
        files = sorted(scans.iterdir())
        scorers = [medclip_jax.load(with_passes(workdir, passes)) for passes in args.passes]
        for scorer in scorers:  # compiles
            scorer.predict(files[:1])
            scorer.predict(files)
        one, job = alternately(scorers, files, args.times)
    found = {
        "one_image_seconds": dict(zip(args.passes, one, strict=True)),
        "job_seconds": dict(zip(args.passes, job, strict=True)),
        "job_ratio": job[1] / job[0],
        "peak_mb": peak_mb(),
    }
    for passes, single, whole in zip(args.passes, one, job, strict=True):
        rate = args.images / whole
        print(f"{passes} pass(es): one file {1e3 * single:.0f} ms, all files {rate:.1f}/s")
    print(f"job with {args.passes[1]} passes / {args.passes[0]}: {found['job_ratio']:.2f}")
    print(f"peak {found['peak_mb']} MB, training included")
    return found


def with_passes(workdir: Path, passes: int) -> Path:
    """A copy of a workdir that scores with so many passes."""
    held = workdir.with_name(f"passes-{passes}")
    shutil.copytree(workdir, held)
    config = json.loads((held / "config.json").read_text())
    config["score"]["passes"] = passes
    (held / "config.json").write_text(json.dumps(config))
    return held


def alternately(scorers: list, files: list[Path], times: int) -> tuple[list[float], list[float]]:
    """Seconds of one file and of all files with each scorer, in turn: medians."""
    taken = np.empty((2, times, len(scorers)))
    for turn in range(times):
        for which, held in enumerate((files[turn : turn + 1], files)):
            for i, scorer in enumerate(scorers):
                begin = time.perf_counter()
                scorer.predict(held)
                taken[which, turn, i] = time.perf_counter() - begin
    one, job = np.median(taken, axis=1)
    return one.tolist(), job.tolist()
