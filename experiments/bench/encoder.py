"""Images per second of the image encoder, ours and other engines' of the same weights, in turn."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bench import clock, sizes
from medclip_jax.clip import checkpoint

WORKER = Path(__file__).with_name("torch_encoder.py")
SMALL_TEXT = dict(text_width=32, text_layers=1, text_heads=2)  # it is not measured


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="ViT-B/16", choices=sizes.SIZES)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    dtypes = ["float32", "bfloat16", "int8"]
    parser.add_argument("--dtype", nargs="+", default=dtypes[:1], choices=dtypes)
    engines = ["torch", "compiled", "onnx", "openvino"]
    parser.add_argument("--engine", nargs="+", default=engines[:1], choices=engines)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--python", default=sys.executable, help="with PyTorch; '' for none")


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = sizes.write(args.size, Path(name) / "clip", **SMALL_TEXT)
        clips = {dtype: checkpoint.load(str(folder), dtype=dtype) for dtype in args.dtype}
        first = clips[args.dtype[0]]
        images, peak = sizes.images(first, max(args.batch)), clock.matmul_peak()
        rows, difference, worker = [], None, None
        if args.python:
            worker = others(args.python, Path(name), first, images)
        try:
            if worker:
                difference = compare(folder, images, clock.ask(worker, "check"))
            for batch in args.batch:
                calls = timed(clips, images[:batch], worker, args.engine)
                seconds = clock.in_turn(calls, args.times)
                rows.append(row(batch, seconds, sizes.flops(args.size), peak))
        finally:
            clock.end(worker)
    result = {"rows": rows, "matmul_gigaflops": peak / 1e9, "largest_difference": difference}
    return result | {"gigaflop_per_image": sizes.flops(args.size) / 1e9}


def others(python: str, folder: Path, clip: checkpoint.Clip, images: np.ndarray):
    """The worker with other engines, of the CLIP in folder/clip and these images."""
    pixels = checkpoint.normalise(jnp.asarray(images), clip.mean, clip.std)
    np.save(folder / "pixels.npy", pixels.transpose(0, 3, 1, 2))
    return clock.worker([python, str(WORKER), str(folder)])


def timed(clips: dict, images: np.ndarray, worker, engines) -> dict[str, Callable[[], float]]:
    """Name -> one timed call; the names are "ours DTYPE" and "ENGINE DTYPE"."""
    runs: dict[str, Callable[[], float]] = {}
    for dtype, clip in clips.items():
        runs[f"ours {dtype}"] = partial(clock.seconds_of, encode(clip, images))
        for engine in engines if worker else ():
            line = f"{engine} {dtype} {len(images)}"
            if clock.ask(worker, line) is not None:  # it has the format; also builds it
                runs[f"{engine} {dtype}"] = partial(clock.ask, worker, line)
    return runs


def encode(clip: checkpoint.Clip, images: np.ndarray) -> Callable:
    """The package's own encoder on images that lie on the device."""
    static = {"encoder": clip.image_encoder, "mean": clip.mean, "std": clip.std}
    return partial(checkpoint.encode_images, clip.vision, jnp.asarray(images), **static)


def row(batch: int, seconds: dict[str, list[float]], flops: float, peak: float) -> dict:
    """Images per second of each, its share of the float32 peak, and its ratio to PyTorch's."""
    rate = {name: batch / min(values) for name, values in seconds.items()}
    share = {name: r * flops / peak for name, r in rate.items()}
    base = rate.get("torch float32")
    ratio = {name: r / base for name, r in rate.items()} if base else {}
    for name, r in rate.items():
        more = f", {ratio[name]:.2f} x torch float32" if base else ""
        print(f"batch {batch:3} {name:17} {r:7.2f} images/s, {share[name]:.0%} of peak{more}")
    about = {"batch": batch, "seconds": seconds, "images_per_second": rate}
    return about | {"share_of_matmul_peak": share, "ratio": ratio}


def compare(folder: Path, images: np.ndarray, theirs: list) -> float:
    """Difference of pooled embeddings over the largest value; RuntimeError unless it is small.

    The two must compute the same before their times are worth comparing.
    """
    ours = np.asarray(encode(checkpoint.load(str(folder)), images[:2])().pooled)
    difference = float(np.abs(ours - np.array(theirs)).max() / np.abs(theirs).max())
    print(f"pooled embeddings differ by {difference:.1e} of the largest")
    if not difference < 1e-3:
        raise RuntimeError(f"the two encoders do not compute the same: {difference}")
    return difference
