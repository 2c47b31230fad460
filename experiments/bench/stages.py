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
NAMES = ("import", "compile", "load", "read", "preprocess", "synthesise", "encode", "feature_cache")
NAMES += ("train", "score", "metrics", "report", "other")
JOBS = {"cold": "first", "again": "first", "warm": "second"}  # name -> workdir, in this order


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default=str(CONFIG), help="FILE[:k=...] of the job")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the config"
    )


def run(args: argparse.Namespace) -> dict:
    """Each job is a process of its own; the later ones find the first one's caches.

    `again` is the same command once more: training is finished in that workdir, so it goes on
    behind it. The operating system's cache of files is left as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: job(args, Path(folder), name, where) for name, where in JOBS.items()}
    print(f"| stage | {', s | '.join(jobs)}, s |\n|---|{'---|' * len(jobs)}")
    for stage in NAMES:
        told = [f"{j['stages'][stage]:.2f}" for j in jobs.values()]
        print(f"| {stage} | {' | '.join(told)} |")
    for name in ("seconds", "first_step"):
        told = [f"{j[name]:.2f}" if j[name] is not None else "-" for j in jobs.values()]
        print(f"| {name} | {' | '.join(told)} |")
    return jobs


def job(args: argparse.Namespace, folder: Path, name: str, workdir: str) -> dict:
    """What the worker says of one job, and its seconds from start to end."""
    flags = ["--config", args.config, "--workdir", str(folder / workdir)]
    flags += [f"--config.{field}" for field in args.set]
    environment = os.environ | {"MEDCLIP_CACHE": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    result, begin = folder / f"{name}.json", time.time()
    command = [sys.executable, "-m", "bench.stages_worker", str(result), str(begin), *flags]
    subprocess.run(command, env=environment, check=True)
    said = json.loads(result.read_text())
    said["seconds"] = time.time() - begin
    said["stages"]["other"] = said["seconds"] - sum(said["stages"].values())
    return said
