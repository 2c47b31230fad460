"""Predicts one folder and prints one JSON line: predict_worker.py WORKDIR SCANS OUTPUT KIND.

The scorer is loaded and has scored a batch before the clock starts, as in a long job, and what
writes results is imported. The time in the encoder is what passes within features.encode, while
readers and writers run beside it. Beside that stands its speed when nothing else of this process
runs, before and after: what a predicted frame takes at least.
"""

import json
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np

ALONE = 8  # batches


def peak_mb(name: str = "VmHWM") -> int:
    """Peak of this process's resident memory; unlike getrusage's it is not its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{name}:"))


def listing(scans: Path) -> dict:
    from medclip_jax.inference import inputs

    before, begin = peak_mb(), time.perf_counter()
    items = inputs.find([str(scans)])
    seconds = time.perf_counter() - begin
    return {"items": len(items), "seconds": seconds, "peak_mb": peak_mb(), "before_mb": before}


def predict(workdir: Path, scans: Path, output: Path) -> dict:
    import highdicom.sc
    import highdicom.seg  # noqa: F401
    import matplotlib  # noqa: F401

    from medclip_jax.features import encoder
    from medclip_jax.inference import predict as inference_predict
    from medclip_jax.inference import predictor

    encode, spent = encoder.encode, [0.0, 0]

    def timed(feature_cache, images):
        begin = time.perf_counter()
        made = encode(
            feature_cache, images
        )  # ends with numpy arrays: nothing is still to be computed
        spent[0] += time.perf_counter() - begin
        spent[1] += 1
        return made

    model = predictor.load(workdir)
    size = predictor.batch_size(model)
    batch = np.random.default_rng(0).random(
        (size, *(model.feature_cache.clip.size,) * 2), np.float32
    )
    predictor.score(model, batch)  # compiles
    before, alone = peak_mb(), [one_batch(encode, model, batch)]
    with (
        mock.patch.object(encoder, "encode", timed),
        mock.patch.object(predictor, "load", lambda _: model),
    ):
        begin, cpu = time.perf_counter(), time.process_time()
        done = inference_predict.run(workdir, [str(scans)], output)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    peak = peak_mb()
    alone.append(one_batch(encode, model, batch))
    if done.unreadable or done.skipped:
        raise RuntimeError(f"not all was scored: {done}")
    with done.table.open() as file:
        frames = sum(1 for _ in file) - 1
    best = size / min(alone)
    return {
        "frames": frames,
        "batches": spent[1],
        "seconds": seconds,
        "cpu_seconds": cpu,
        "per_second": frames / seconds,
        "encoder_seconds": spent[0],
        "encoder_share": spent[0] / seconds,
        "alone_per_second": best,
        "of_alone": frames / seconds / best,
        "peak_mb": peak,
        "before_mb": before,
    }


def one_batch(encode, model, batch: np.ndarray) -> float:
    """Seconds of a batch through the encoder with nothing beside it, median of a few."""
    taken = []
    for _ in range(ALONE):
        begin = time.perf_counter()
        encode(model.feature_cache, batch)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


if __name__ == "__main__":
    workdir, scans, output = map(Path, sys.argv[1:4])
    found = listing(scans) if sys.argv[4] == "listing" else predict(workdir, scans, output)
    print(json.dumps(found))
