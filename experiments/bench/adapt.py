"""Seconds from a new site's healthy image files to a ready detector, warm, embedded CLIP."""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from medclip_jax import config, site, train
from medclip_jax.data import phantom


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
        begin = time.perf_counter()
        start = site.load(workdir)
        loaded = time.perf_counter() - begin
        seconds = []
        for _ in range(args.times + 1):
            begin = time.perf_counter()
            ready = site.adapt(start, images)
            seconds.append(time.perf_counter() - begin)
    threshold = float(ready.limits.image.value)
    if not np.isfinite(threshold):
        raise RuntimeError("the detector has no finite threshold")
    best = min(seconds[1:])
    print(f"loaded in {loaded:.2f} s; first adaptation {seconds[0]:.2f} s, with compilation")
    print(f"{args.k} images decoded, encoded, adapted, calibrated: {best:.2f} s warm")
    return {"load_seconds": loaded, "first_seconds": seconds[0], "warm_seconds": seconds[1:]}


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
