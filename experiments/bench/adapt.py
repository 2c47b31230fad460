"""Seconds from a new site's healthy image files to a ready detector, warm, embedded CLIP."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import medclip_jax
from medclip_jax import config, train
from medclip_jax.data import phantom
from medclip_jax.inference import adapt


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k", type=int, default=4, help="healthy images of the new site")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of the meta-training before")
    parser.add_argument("--workdir", type=Path, help="a meta-trained run; one is made if not given")


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        workdir = args.workdir or meta_trained(Path(folder), args)
        data = phantom.write_folder(Path(folder) / "site", "ultrasound", 7, 256, args.k, 1, 1)
        images = sorted((data / "train" / "good").iterdir())
        loaded, start = timed(lambda: adapt.load(workdir))
        seconds, readies = several(lambda: adapt.adapt(start, images), args.times)
        scorer = medclip_jax.load(workdir)
        by_call, scorers = several(lambda: scorer.adapt(images), args.times)
        held = scorers[-1].predict(images)
    if (
        not np.isfinite(readies[-1].limits.image.value)
        or not np.isfinite([r.score for r in held]).all()
    ):
        raise RuntimeError("the detector has no finite threshold or score")
    print(f"loaded in {loaded:.2f} s; first adaptation {seconds[0]:.2f} s, with compilation")
    print(f"{args.k} images decoded, encoded, adapted, calibrated: {min(seconds[1:]):.2f} s warm")
    print(f"the same by Scorer.adapt: {min(by_call[1:]):.2f} s warm")
    return {
        "load_seconds": loaded,
        "first_seconds": seconds[0],
        "warm_seconds": seconds[1:],
        "scorer_first_seconds": by_call[0],
        "scorer_warm_seconds": by_call[1:],
    }


def timed(call: Callable) -> tuple[float, Any]:
    """(seconds, what it returned)"""
    begin = time.perf_counter()
    made = call()
    return time.perf_counter() - begin, made


def several(call: Callable, times: int) -> tuple[list[float], list]:
    """`timed` once, with compilation, and `times` more."""
    seconds, made = zip(*(timed(call) for _ in range(1 + times)), strict=True)
    return list(seconds), list(made)


def meta_trained(folder: Path, args: argparse.Namespace) -> Path:
    """A short meta-training on simulated ultrasound; its length does not change the time."""
    c = config.base("k=4,seed=0", name="folder", modality="breast ultrasound", anatomy="breast")
    data = phantom.write_folder(folder / "data", "ultrasound", 0, 256, 4, 2, 2)
    c.update_from_flattened_dict(
        {
            "data.root": str(data),
            "cache": str(folder / "cache"),
            "learner": "maml",
            "steps": args.steps,
            "synthesis.variants": 16,
            "score.passes": 1,
        }
    )
    train.run(c, folder / "run")
    return folder / "run"
