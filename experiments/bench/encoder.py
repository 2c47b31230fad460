"""Images per second of the image tower, ours against PyTorch's with the same weights, in turn."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench import peak, peer, towers, workload
from medclip_jax.clip import checkpoint

WORKER = Path(__file__).with_name("torch_encoder.py")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tower", default="ViT-B/16", choices=towers.SIZES)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=peak.DTYPES)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument(
        "--python", default=sys.executable, help="a Python with PyTorch; '' is none"
    )


def run(args: argparse.Namespace) -> dict:
    size = towers.SIZES[args.tower]
    weights = towers.parameters(size)
    images = towers.images(size, max(args.batch))
    top, rows, checked = peak.best(), [], None
    with tempfile.TemporaryDirectory() as folder:
        worker = start(args.python, Path(folder) / "work.npz", size, weights, images)
        try:
            if worker:
                checked = compare(size, weights, images, peer.ask(worker, "check"))
            for batch in args.batch:
                runs = timed(args.dtype, batch, size, weights, images, worker)
                seconds = workload.in_turn(runs, args.times)
                rows.append(row(batch, seconds, size, top))
        finally:
            if worker:
                worker.stdin.close()
                worker.wait(60)
    said = {"rows": rows, "matmul_gigaflops": top / 1e9, "largest_difference": checked}
    return said | {"gigaflop_per_image": towers.flops(size) / 1e9}


def timed(dtypes, batch, size, weights, images, worker) -> dict[str, Callable[[], float]]:
    """Name -> one timed call; the names are "ours DTYPE" and "torch DTYPE"."""
    runs: dict[str, Callable[[], float]] = {}
    for dtype in dtypes:
        runs[f"ours {dtype}"] = Encoder(size, weights, images[:batch], dtype)
        if worker:
            runs[f"torch {dtype}"] = partial(call, worker, f"{dtype} {batch}")
    return runs


def call(worker: subprocess.Popen, what: str) -> float:
    return peer.ask(worker, what)["seconds"]


class Encoder:
    """The package's own encoder on images that lie on the device, timed call by call."""

    def __init__(self, size: towers.Size, weights: dict, images: np.ndarray, dtype: str):
        encoder, self.images = towers.encoder(size, dtype), jnp.asarray(images)
        self.weights = encoder.prepare(jax.tree.map(jnp.asarray, weights))
        self.encode = partial(
            checkpoint.encode_images, encoder=encoder, mean=towers.MEAN, std=towers.STD
        )

    def __call__(self) -> float:
        """Seconds of one call."""
        begin = time.perf_counter()
        jax.block_until_ready(self.encode(self.weights, self.images))
        return time.perf_counter() - begin


def row(batch: int, seconds: dict[str, list[float]], size: towers.Size, top: float) -> dict:
    """Images per second of each, its share of the float32 peak, and its ratio to PyTorch's."""
    rate = {name: batch / min(values) for name, values in seconds.items()}
    share = {name: r * towers.flops(size) / top for name, r in rate.items()}
    base = rate.get("torch float32")
    ratio = {name: r / base for name, r in rate.items()} if base else {}
    for name, r in rate.items():
        more = f", {ratio[name]:.2f} x torch float32" if base else ""
        print(f"batch {batch:3} {name:15} {r:7.2f} images/s, {share[name]:.0%} of peak{more}")
    return {
        "batch": batch,
        "seconds": seconds,
        "images_per_second": rate,
        "share_of_matmul_peak": share,
        "ratio": ratio,
    }


def start(python: str, path: Path, size, weights, images) -> subprocess.Popen | None:
    """PyTorch's process, given weights and normalised images in a file; None without a python."""
    if not python:
        return None
    flat = jax.tree_util.tree_flatten_with_path(weights)[0]
    arrays = {"w." + ".".join(k.key for k in where): x for where, x in flat}
    arrays |= {"heads": size.heads, "patch": size.patch, "pixels": size.pixels, "eps": towers.EPS}
    arrays["pixels_nhwc"] = np.asarray(
        checkpoint.normalise(jnp.asarray(images), towers.MEAN, towers.STD)
    )
    np.savez(path, **arrays)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([python, str(WORKER), str(path)], **pipes)


def compare(size, weights, images, theirs: list) -> float:
    """Difference of pooled embeddings over the largest value; RuntimeError unless it is small.

    The two must compute the same before their times are worth comparing.
    """
    encoder = towers.encoder(size)
    weights = encoder.prepare(weights)
    given = jnp.asarray(images[:2])
    ours = checkpoint.encode_images(
        weights, given, encoder=encoder, mean=towers.MEAN, std=towers.STD
    ).pooled
    away = float(np.abs(ours - np.array(theirs)).max() / np.abs(theirs).max())
    print(f"pooled embeddings differ by {away:.1e} of the largest")
    if not away < 1e-3:
        raise RuntimeError(f"the two towers do not compute the same: {away}")
    return away
