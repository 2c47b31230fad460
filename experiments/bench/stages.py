"""Seconds by stage of a job: caches empty (cold), the same workdir again, a new one (warm)."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).parents[2] / "configs" / "phantom.py"
JOBS = {"cold": "first", "again": "first", "warm": "second"}  # name -> workdir, in this order


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default=str(CONFIG), help="FILE[:k=...] of the job")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the config"
    )


def run(args: argparse.Namespace) -> dict:
    """Each job is a process of its own; the later ones find the first one's caches.

    `again` is the same command once more: its run is finished, so nothing is repeated. The
    operating system's cache of files is left as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: job(args, Path(folder), where) for name, where in JOBS.items()}
    print(f"| stage | {', s | '.join(jobs)}, s |\n|---|{'---|' * len(jobs)}")
    for stage in jobs["cold"]:
        print(f"| {stage} | {' | '.join(f'{j.get(stage, 0):.2f}' for j in jobs.values())} |")
    return jobs


def job(args: argparse.Namespace, folder: Path, workdir: str) -> dict[str, float]:
    """Seconds of the stages that the job timed itself, of the rest, and in all."""
    flags = [f"--config={args.config}", f"--workdir={folder / workdir}"]
    flags += [f"--config.{field}" for field in args.set]
    environment = os.environ | {"MEDCLIP_CACHE": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    metrics = folder / workdir / "metrics.json"
    before, begin = metrics.stat().st_mtime_ns if metrics.is_file() else None, time.perf_counter()
    command = [sys.executable, "-m", "medclip_jax.main", *flags]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    fresh = metrics.stat().st_mtime_ns != before
    stages = json.loads(metrics.read_text())["timing"] if fresh else {}
    rest = {"start, compile checks, report": seconds - sum(stages.values())}
    return {**stages, **rest, "in all": seconds}
