"""Seconds by stage and peak of a job: caches empty (cold), the same workdir again, another (warm).

With a large encoder: --config configs/busi.py:k=16 --size ViT-L/14 --jobs cold.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import clock, sizes
from medclip_jax.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "phantom.py"
JOBS = {"cold": "first", "again": "first", "warm": "second"}  # name -> workdir, in this order


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default=str(CONFIG), help="FILE[:k=...] of the job")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of the config")
    parser.add_argument("--size", choices=sizes.SIZES, help="of a CLIP of random weights")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)


def run(args: argparse.Namespace) -> dict:
    """Each job is a process of its own; the later ones find the first one's caches.

    `again` is the same command once more: its run is finished, so nothing is repeated. The
    operating system's cache of files is left as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        if args.size:
            args.set.append(f"clip.checkpoint={sizes.write(args.size, Path(folder) / 'clip')}")
        jobs = {name: job(args, Path(folder), JOBS[name]) for name in args.jobs}
    print(f"| stage | {', s | '.join(jobs)}, s |\n|---|{'---|' * len(jobs)}")
    for stage in jobs[args.jobs[0]]:
        print(f"| {stage} | {' | '.join(f'{j.get(stage, 0):.2f}' for j in jobs.values())} |")
    return jobs


def job(args: argparse.Namespace, folder: Path, workdir: str) -> dict[str, float]:
    """Seconds of the stages that the job timed itself, of the rest, and in all; peak of memory."""
    flags = [f"--config={args.config}", f"--workdir={folder / workdir}"]
    flags += [f"--config.{field}" for field in args.set]
    environment = os.environ | {"MEDCLIP_CACHE": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    metrics = folder / workdir / "metrics.json"
    before, begin = metrics.stat().st_mtime_ns if metrics.is_file() else None, time.perf_counter()
    command = [sys.executable, "-m", "medclip_jax.main", *flags]
    said = folder / "stderr"
    with said.open("w") as log, subprocess.Popen(command, env=environment, stderr=log) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, clock.peak_megabytes(process.pid))
            time.sleep(0.05)
    seconds = time.perf_counter() - begin
    if process.returncode:
        last = said.read_text(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"the job ended with code {process.returncode}: {last}")
    fresh = metrics.stat().st_mtime_ns != before
    stages = json.loads(metrics.read_text())["timing"] if fresh else {}
    rest = {"start, compile checks, report": seconds - sum(stages.values())}
    return {**stages, **rest, "in all": seconds, "peak, GB": peak / 1e3}
