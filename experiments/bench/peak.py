"""What the machine's matrix product reaches: XLA, and PyTorch where there is one."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

WORKER = Path(__file__).with_name("torch_peak.py")
DTYPES = ("float32", "bfloat16")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sides", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--python", help="a Python with PyTorch; without it XLA alone is measured")


def run(args: argparse.Namespace) -> dict:
    """Floating-point operations per second of square products, the best of `times`, in 1e9."""
    found = {"xla": {t: gigaflops(t, args.sides, args.times) for t in DTYPES}}
    if args.python:
        given = [args.python, str(WORKER), json.dumps([args.sides, args.times])]
        said = subprocess.run(given, stdout=subprocess.PIPE, check=True, text=True)
        found["torch"] = json.loads(said.stdout.splitlines()[-1])
    for library, rates in found.items():
        print(library, ", ".join(f"{t} {max(r.values()):.0f} GFLOP/s" for t, r in rates.items()))
    return {"gigaflops": found}


def gigaflops(dtype: str, sides: list[int], times: int) -> dict[str, float]:
    """By side of the square matrices; one product before is not counted."""
    found = {}
    product = jax.jit(jnp.matmul)
    for n in sides:
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        product(a, a).block_until_ready()
        seconds = []
        for _ in range(times):
            begin = time.perf_counter()
            product(a, a).block_until_ready()
            seconds.append(time.perf_counter() - begin)
        found[str(n)] = 2 * n**3 / min(seconds) / 1e9
    return found


def best(dtype: str = "float32") -> float:
    """Operations per second that shares of the peak are told against."""
    return max(gigaflops(dtype, [2048, 4096], 3).values()) * 1e9


if __name__ == "__main__":
    sys.exit("run experiments/benchmark.py peak")
