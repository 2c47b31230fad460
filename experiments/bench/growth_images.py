"""A whole job on test sets of growing size: python -m bench.growth_images OUT.json CLIP SIDE N ...

Every set has files of its own (simulated ultrasound of SIDE x SIDE pixels, each with its own noise)
and the same 16 supports. The first set is run twice: its first run compiles and is not told.
"""

import ctypes
import functools
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from bench.metrics import Growth
from medclip_jax import config, train
from medclip_jax.data import phantom
from medclip_jax.data.catalog import PRESETS
from medclip_jax.evaluation import evaluate
from medclip_jax.features import encoder
from medclip_jax.report import html

K, RENDERS, NOISE = 16, 16, 4  # renders: different scenes; noise: sd, grey values
STAGES = {  # stage -> functions that are it
    "encode": (encoder, "encode_images"),
    "score": (evaluate, "score_images"),
    "metrics": (evaluate, "measure"),
    "predictions.npz": (evaluate, "write_predictions"),
    "report": (html, "write"),
}
# one step, no validation and no explanations: they cost the same for every number of images
FIELDS = {"steps": 1, "validations": 0, "explained": 0, "synthesis.variants": 2}


def write_set(root: Path, n: int, side: int, seed: int) -> Path:
    """K supports, the same of every seed, and n test images, every other one with a lesion."""
    scenes, masks = phantom.generate("ultrasound", RENDERS, side, 0, np.arange(RENDERS) % 2 == 1)
    for part in ("train/good", "test/good", "test/lesion", "ground_truth/lesion"):
        (root / part).mkdir(parents=True)
    for i in range(K + n):
        support = i < K
        rng = np.random.default_rng([0 if support else seed, i])
        at = 2 * (i % (RENDERS // 2)) + (0 if support else i % 2)
        grey = 255 * scenes[at] + rng.normal(0, NOISE, scenes[at].shape)
        part = "train/good" if support else "test/lesion" if i % 2 else "test/good"
        pixels = np.clip(np.round(grey), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / part / f"{i:06}.png")
        if part == "test/lesion":
            mask = Image.fromarray(masks[at].astype(np.uint8) * 255)
            mask.save(root / "ground_truth/lesion" / f"{i:06}_mask.png")
    return root


def watch(told: dict[str, dict[str, float]]) -> None:
    """Add seconds and largest growth of memory (MB) of each stage to `told`, from now on."""
    for stage, (module, name) in STAGES.items():
        setattr(module, name, watched(getattr(module, name), stage, told))


def watched(function, stage: str, told: dict):
    @functools.wraps(function)
    def run(*args, **kwargs):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier stage freed must not hide this one's
        with Growth() as memory:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - begin
        row = told.setdefault(stage, {"seconds": 0.0, "megabytes": 0.0})
        row["seconds"] += seconds
        row["megabytes"] = max(row["megabytes"], memory.peak / 1e6)
        return result

    return run


def job(base: Path, clip: str, n: int, side: int, seed: int, told: dict) -> dict:
    """One run on n images: what each stage took, and bytes of the files it left."""
    root, workdir = write_set(base / f"data-{seed}", n, side, seed), base / f"run-{seed}"
    c = config.base(f"k={K}", name="folder", root=str(root), **PRESETS["busi"])
    c.update_from_flattened_dict({**FIELDS, "cache": str(base / "cache"), "clip.checkpoint": clip})
    before = stored(base / "cache" / "feature_cache")
    told.clear()
    workdir.mkdir()
    train.run(c, workdir)
    html.write(workdir)
    sizes = {name: (workdir / name).stat().st_size for name in ("predictions.npz", "report.html")}
    sizes["feature_cache"] = stored(base / "cache" / "feature_cache") - before
    return {"images": n, "stages": {name: dict(told[name]) for name in STAGES}, "bytes": sizes}


def stored(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors"))


def main() -> None:
    out, clip, side, *counts = sys.argv[1:]
    told: dict[str, dict[str, float]] = {}
    watch(told)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder), clip
        runs = [
            job(*given, int(n), int(side), seed, told)
            for seed, n in enumerate([counts[0], *counts], 1)
        ]
    Path(out).write_text(json.dumps(runs[1:]))


if __name__ == "__main__":
    main()
