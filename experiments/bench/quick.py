"""Under two minutes: matrix peak, encoder, training step, scoring, --help; see compare_speed.py."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from bench import encoder, peak, towers, workload
from medclip_jax.detectors import memory_bank

SIDE = 4096  # of the matrices of the peak


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tower", default="ViT-B/16", choices=["ViT-B/16", "ViT-L/14", "tiny"])
    parser.add_argument("--side", type=int, default=SIDE, help="of the matrices of the peak")
    parser.add_argument("--images", type=int, default=8, help="of a call of encoder and scoring")
    parser.add_argument("--k", type=int, default=16, help="supports in the memory")
    parser.add_argument("--times", type=int, default=5)


def run(args: argparse.Namespace) -> dict:
    """The best of a few seconds of each part; what depends on no machine is beside them."""
    size = towers.SIZES[args.tower]
    images = towers.images(size, args.images)
    runs = {
        "encode": encoder.Encoder(size, towers.parameters(size), images, "float32"),
        "train step": trainer(args.tower),
        "score": scorer(size, args.images, args.k),
        "help": usage,
    }
    found = {name: min(times) for name, times in workload.in_turn(runs, args.times).items()}
    rates = {t: peak.gigaflops(t, [args.side], args.times)[str(args.side)] for t in peak.DTYPES}
    found |= {f"matmul {t}": 2 * args.side**3 / rate / 1e9 for t, rate in rates.items()}
    per_second = args.images / found["encode"]
    share = per_second * towers.flops(size) / 1e9 / rates["float32"]
    for name, seconds in found.items():
        print(f"{name:16} {seconds:9.4f} s")
    print(f"encoder {per_second:.2f} images/s, {share:.0%} of {rates['float32']:.0f} GFLOP/s")
    told = {"images_per_second": per_second, "share_of_matmul_peak": share, "gigaflops": rates}
    return {"seconds": found} | told


def trainer(name: str) -> Callable[[], float]:
    """A step of joint training of one copy on 8 rows of tokens and 21 prompts."""
    work = workload.build(name, 1, 4)  # support and query: 4 rows each
    return workload.Runner(work, *workload.step(work, "joint", 0))


def scorer(size: towers.Size, images: int, k: int) -> Callable[[], float]:
    """Distance of the images' patches of three levels to those of k supports."""
    rng, patches = np.random.default_rng(2), (size.pixels // size.patch) ** 2

    def tokens(*lead: int):
        drawn = (rng.standard_normal((*lead, size.width)).astype(np.float32) for _ in range(3))
        return tuple(map(jax.device_put, drawn))

    return partial(
        timed, jax.jit(memory_bank.memory_distance), tokens(images, patches), tokens(k * patches)
    )


def timed(function: Callable, *given) -> float:
    """Seconds of one call until its result is there."""
    begin = time.perf_counter()
    jax.block_until_ready(function(*given))
    return time.perf_counter() - begin


def usage() -> float:
    """Seconds of `medclip_jax.main --help` in a process of its own."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "medclip_jax.main", "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin
