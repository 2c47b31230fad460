"""Seconds by stage of one job, with empty caches (cold) and again with full ones (warm)."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).parents[2] / "configs" / "phantom.py"
NAMES = ("import", "compile", "load", "read", "preprocess", "synthesise", "encode", "bank")
NAMES += ("train", "score", "metrics", "report", "other")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default=str(CONFIG), help="FILE[:k=...] of the job")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the config"
    )


def run(args: argparse.Namespace) -> dict:
    """Each job is a process of its own with a new workdir; the second finds the first one's caches.

    The operating system's cache of files is left as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: job(args, Path(folder), name) for name in ("cold", "warm")}
    print("| stage | cold, s | warm, s |\n|---|---|---|")
    for stage in NAMES:
        told = [f"{j['stages'][stage]:.2f}" for j in jobs.values()]
        print(f"| {stage} | {' | '.join(told)} |")
    for name in ("seconds", "first_step"):
        told = [f"{j[name]:.2f}" if j[name] is not None else "-" for j in jobs.values()]
        print(f"| {name} | {' | '.join(told)} |")
    return jobs


def job(args: argparse.Namespace, folder: Path, name: str) -> dict:
    """What the worker says of one job, and its seconds from start to end."""
    flags = ["--config", args.config, "--workdir", str(folder / name)]
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
