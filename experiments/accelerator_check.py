"""One command on a machine with an accelerator: is it right, how fast is it, where does time go?

python experiments/accelerator_check.py --out result.json [--minutes 7] [--python PYTHON] [--small]

Prints each part as it is done and writes all so far to --out, so that a stop loses nothing. A part
begins only if the time is not over; the others are listed under "skipped". Times are the best of a
few calls. PyTorch is measured in the same run where PYTHON (this one) has torch and transformers;
where it has not, the result says what is missing.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch and runs take some too

import command
import jax
import numpy as np
from bench import clock, sizes, torch_peer, workload
from bench.encoder import SMALL_TEXT, encode
from benchmark import machine
from PIL import Image

from medclip_jax import files, stored
from medclip_jax.clip import checkpoint
from medclip_jax.models import model
from medclip_jax.training import step as training_step

ROOT = Path(__file__).parents[1]
# largest relative differences from the CPU that still count as the same
LIMITS = {"highest": 1e-4, "default": 2e-2, "bfloat16": 5e-2}
FEW = ("steps=4", "synthesis.variants=4", "validations=0", "explained=0", "score.passes=2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--python", default=sys.executable, help="a Python with PyTorch")
    parser.add_argument("--small", action="store_true", help="tiny sizes, as the tests take")
    args = parser.parse_args()
    end, result = time.monotonic() + 60 * args.minutes, {"devices": devices(), "skipped": []}
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "equality": functools.partial(equality, args.small),
            "runs": functools.partial(runs, Path(folder), args.small),
            "encoder": functools.partial(encoders, args.small),
            "episodes": functools.partial(episodes, args.small),
            "pytorch": functools.partial(pytorch, args.small, args.python, end),
        }
        for name, part in parts.items():
            files.write_json(args.out, result)  # first: --out may be no place for it
            if time.monotonic() > end:
                result["skipped"].append(name)
                continue
            begin = time.monotonic()
            result[name] = part()
            result[name]["seconds_of_this_part"] = time.monotonic() - begin
            result["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
            print(name, result[name], flush=True)
    files.write_json(args.out, result)
    return 0 if result.get("equality", {}).get("same", True) else 1


def devices() -> dict:
    """What computes, and with which versions."""
    first = jax.devices()[0]
    about = {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}
    return about | machine() | {"python": sys.version.split()[0]}


# --- is it right? ---------------------------------------------------------------------------


def equality(small: bool) -> dict:
    """Tokens and the exact meta-gradient on the device, beside the CPU's in full precision."""
    size = "tiny" if small else "compact"
    cpu, own = jax.devices("cpu")[0], jax.devices()[0]
    rows = {}
    for name, value in (("tokens", tokens), ("meta-gradient", gradient)):
        expected = on(cpu, "highest", functools.partial(value, size, "float32"))
        for kind, limit in LIMITS.items():
            if kind == "bfloat16" and name != "tokens":
                continue
            dtype, precision = ("float32", kind) if kind != "bfloat16" else (kind, "default")
            found = on(own, precision, functools.partial(value, size, dtype))
            difference = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            rows[f"{name} {kind}"] = {"difference": difference, "same": difference <= limit}
    return {"rows": rows, "same": all(row["same"] for row in rows.values())}


def on(device, precision: str, value) -> np.ndarray:
    """`value()` computed on a device; "default" leaves the precision of products to it (TF32)."""
    chosen = None if precision == "default" else precision
    with jax.default_device(device), jax.default_matmul_precision(chosen):
        return value()


def clip_of(size: str, dtype: str) -> checkpoint.Clip:
    with tempfile.TemporaryDirectory() as folder:
        return checkpoint.load(str(sizes.write(size, Path(folder), **SMALL_TEXT)), dtype=dtype)


def tokens(size: str, dtype: str) -> np.ndarray:
    clip = clip_of(size, dtype)
    features = encode(clip, sizes.images(clip, 4))()
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(features)])


def gradient(size: str, _: str) -> np.ndarray:
    work = workload.build(size, tasks=2, rows=4)
    loss = functools.partial(model.loss, design=work.design, weights=workload.WEIGHTS)
    inner = training_step.Learner("maml", 1, workload.RATE).inner(1)
    objective = training_step.meta_objective(loss, inner)
    batch = jax.tree.map(lambda x: x[:, 0], work.episodes)
    slopes, _ = jax.jit(jax.grad(objective, has_aux=True))(
        work.params, work.frozen, batch, jax.random.key(0)
    )
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(slopes)])


# --- whole runs -----------------------------------------------------------------------------


def runs(folder: Path, small: bool) -> dict:
    """Seconds by stage: the phantom, its scores again on the CPU, and a data set of BUSI's size."""
    few, result = FEW if small else (), {}
    command = ["--config=configs/phantom.py:k=4" if small else "--config=configs/phantom.py"]
    result["phantom"] = job(command, folder / "phantom", folder, few)
    begin = arrays(folder / "phantom")
    job([*command, "--mode=evaluate"], folder / "phantom", folder / "cpu", few, cpu=True)
    again = arrays(folder / "phantom")
    result["largest_difference_of_a_map"] = float(np.abs(begin["maps"] - again["maps"]).max())
    result["images_whose_rank_differs"] = int((begin["score"] != again["score"]).sum())
    made(folder / "data", *((12, 6) if small else (160, 620)))
    command = [f"--config=configs/folder.py:k={4 if small else 16},root={folder / 'data'}"]
    result["as many images as BUSI"] = job(command, folder / "busi", folder, few)
    return result


def job(flags: list[str], workdir: Path, cache: Path, fields=(), cpu: bool = False) -> dict:
    """A run in a process of its own: seconds by stage and in all."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "medclip_jax.main", *flags, f"--workdir={workdir}"]
    command += [f"--config.{field}" for field in (*fields, f"cache={cache / 'cache'}")]
    more = {"JAX_PLATFORMS": "cpu"} if cpu else {}
    subprocess.run(command, cwd=ROOT, env=os.environ | more, check=True)
    stages = stored.read_json(workdir / "metrics.json")["timing"]
    return stages | {"in all": time.monotonic() - begin}


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "predictions.npz") as stored:
        return {name: stored[name].astype(np.float32) for name in ("score", "maps")}


def made(folder: Path, healthy: int, abnormal: int) -> None:
    """Grey noise of 384 x 320 pixels; abnormal images have a bright square."""
    rng = np.random.default_rng(0)
    parts = {"train/good": healthy // 2, "test/good": healthy - healthy // 2}
    for part, count in (parts | {"test/lesion": abnormal}).items():
        (folder / part).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 160, (320, 384), np.uint8)
            if part == "test/lesion":
                pixels[100:140, 100:140] = 250
            Image.fromarray(pixels).save(folder / part / f"{i}.png")


# --- how fast is it? ------------------------------------------------------------------------


def encoders(small: bool) -> dict:
    """Images per second by encoder, type and batch, with the share of the matmul peak."""
    large = {"ViT-B/16": {}, "ViT-L/14": {"size": 336}, "compact": {}}
    rows, peaks = [], {}
    for dtype in ("float32", "bfloat16"):
        peaks[dtype] = clock.matmul_peak(n=256 if small else 8192, dtype=dtype)
    for size, changes in ({"tiny": {}} if small else large).items():
        for dtype, most in peaks.items():
            with tempfile.TemporaryDirectory() as folder:
                written = sizes.write(size, Path(folder), **SMALL_TEXT, **changes)
                clip = checkpoint.load(str(written), dtype=dtype)
            for batch in (2,) if small else (16, 128):
                call = encode(clip, sizes.images(clip, batch))
                call()
                seconds = min(clock.seconds_of(call) for _ in range(5))
                share = batch / seconds * sizes.flops(size, **changes) / most
                row = {"encoder": size, **changes, "dtype": dtype, "batch": batch}
                row |= {"images_per_second": batch / seconds, "share_of_matmul_peak": share}
                rows.append(row)
                print(row, flush=True)
    return {"rows": rows, "matmul_flops": peaks}


def episodes(small: bool) -> dict:
    """Exact MAML episodes per second by tasks in a step, until the memory is full."""
    rows = []
    for tasks in (2,) if small else (4, 16, 64, 256, 1024, 4096):
        try:
            work = workload.build("tiny" if small else "compact", tasks, 4)
            run = workload.Runner(work, *workload.step(work, "maml", 1))
            run()
            seconds = min(run() for _ in range(3))
        except jax.errors.JaxRuntimeError as error:
            rows.append({"tasks": tasks, "error": str(error).splitlines()[0][:200]})
            break
        rows.append({"tasks": tasks, "episodes_per_second": tasks / seconds})
        print(rows[-1], flush=True)
    return {"rows": rows}


def pytorch(small: bool, python: str, end: float) -> dict:
    """The same by PyTorch; begins no measurement after `end`."""
    if reason := torch_peer.missing(python):
        return {"missing": reason}
    size, batches, tasks = (
        ("tiny", (2,), (2,)) if small else ("ViT-B/16", (16, 128), (4, 256, 4096))
    )
    learner, result = "tiny" if small else "compact", {}
    for name, part in {
        "encoder": lambda: torch_peer.encoders(python, size, batches, end),
        "episodes": lambda: torch_peer.episodes(python, learner, tasks, end),
    }.items():
        try:
            result[name] = part()
        except RuntimeError as error:  # a worker that ended, or another result
            result[name] = {"error": str(error)}
    return result


if __name__ == "__main__":
    command.run(main)
