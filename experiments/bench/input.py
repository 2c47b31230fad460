"""What reading costs by kind of file: CPU ms of an image, cores that feed a consumer, its waiting.

From CPU seconds, so that what else the machine does matters little; threads against processes is a
ratio of times taken in turn.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from bench import clock, predict_inputs, sizes
from bench.encoder import encode
from medclip_jax import files
from medclip_jax.clip import checkpoint
from medclip_jax.io import read

KINDS = ("png", "colour png", "jpeg", "dicom")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--images", type=int, default=48, help="of each kind")
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--consumer", type=float, default=2000, help="images/s it would take")
    parser.add_argument("--size", default="compact", choices=sizes.SIZES, help="of the encoder")


def run(args: argparse.Namespace) -> dict:
    cores, rows = len(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory() as name:
        clip = checkpoint.load(str(sizes.write(args.size, Path(name) / "clip")))
        call = partial(clock.seconds_of, encode(clip, sizes.images(clip, 16)))
        call()
        encoder = cores * 16 / cpu_seconds(call, time.process_time)
        spawn = multiprocessing.get_context("forkserver")
        with ThreadPoolExecutor(cores) as threads, ProcessPoolExecutor(cores, spawn) as processes:
            for kind in args.kinds:
                folder = predict_inputs.MAKERS[kind](Path(name) / kind, args.images, 0)
                paths = sorted(folder.iterdir())
                spent = milliseconds(paths, clip.size)
                runs = {
                    pool: partial(clock.seconds_of, partial(consume, pool, paths, clip.size))
                    for pool in (threads, processes)
                }
                best = [min(x) for x in clock.in_turn(runs, args.times).values()]
                rows.append(row(kind, spent, cores, args.consumer, encoder))
                rows[-1]["processes over threads"] = best[0] / best[1]
                print(", ".join(f"{n} {x:.3g}" if n != "kind" else x for n, x in rows[-1].items()))
    print(f"{args.size} encodes {encoder:.0f} images/s by CPU seconds")
    return {"rows": rows, "encoder_images_per_second": encoder, "cores": cores}


def row(kind: str, spent: dict, cores: int, consumer: float, encoder: float) -> dict:
    """The table's; `spent`: CPU ms of an image by part, of which all cores do as many at once."""
    whole = sum(spent.values()) / 1e3
    rate = cores / whole
    return {
        "kind": kind,
        **spent,
        "images/s": rate,
        f"cores for {consumer:g}/s": consumer * whole,
        f"waits at {consumer:g}/s": max(0.0, 1 - rate / consumer),
        "waits as encoder": max(0.0, 1 - rate / encoder),
    }


def cpu_seconds(call: Callable, of: Callable[[], float] = time.thread_time) -> float:
    begin = of()
    call()
    return of() - begin


def milliseconds(paths: list[Path], size: int) -> dict[str, float]:
    """CPU ms of an image in one thread, by part."""
    pixels = [read.read(path).pixels[0] for path in paths]
    parts = {
        "decode ms": lambda: [read.read(path) for path in paths],
        "resize ms": lambda: [read.fit(x, size) for x in pixels],
        "SHA-256 ms": lambda: [files.sha256_of(path) for path in paths],
    }
    return {name: 1e3 * cpu_seconds(call) / len(paths) for name, call in parts.items()}


def consume(pool: Executor, paths: list[Path], size: int) -> int:
    """Read all and take what arrives."""
    return sum(1 for _ in pool.map(partial(one, size=size), paths, chunksize=4))


def one(path: Path, size: int) -> np.ndarray:
    """All that the host does before the encoder, which normalises."""
    files.sha256_of(path)
    return read.fit(read.read(path).pixels[0], size)
