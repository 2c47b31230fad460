"""Images per second from raw files to the tower frame, and memory while scanning a large folder.

python experiments/benchmark.py prepare --root DATA [--sets busi=DIR ...] [--links 100000]

Each set in a process of its own: its list is made from nothing (every image and mask decoded,
checked and hashed), then every image is read again and brought to the tower's square. The large
folder is the MVTec layout with links to a few small images, listed and loaded once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SETS = ("busi=busi", "brain_mri=brain_mri", "chest_xray=chest_xray")
SIZE, SIDE, SOURCES = 224, 32, 16


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, required=True, help="folder of the sets' folders")
    parser.add_argument("--sets", nargs="+", default=SETS, help="name=folder below --root")
    parser.add_argument("--links", type=int, nargs="+", default=[10_000, 100_000])


def run(args: argparse.Namespace) -> dict:
    rows = []
    for given in args.sets:
        name, _, folder = given.partition("=")
        rows.append(one(name, args.root / folder))
    for count in args.links:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one("folder", links(Path(folder) / "data", count)))
    whole = [r for r in rows if r["name"] != "folder"]
    together = sum(r["images"] for r in whole) / sum(r["list"] + r["read"] for r in whole)
    print(f"together: {together:.0f} images/s", flush=True)
    return {"rows": rows, "together_per_second": together}


def one(name: str, root: Path) -> dict:
    """What `worker` says of one set. Raises RuntimeError with its last lines if it fails."""
    command = [sys.executable, "-m", "bench.prepare", name, str(root.resolve())]
    experiments = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=experiments)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name}: {found['images']} images, {found['per_second']:.0f} images/s (list made in "
        f"{found['list']:.1f} s, read in {found['read']:.1f} s); memory {found['before_mb']} MB "
        f"before, {found['peak_mb']} MB at most",
        flush=True,
    )
    return found


def links(folder: Path, count: int) -> Path:
    """MVTec layout: `count` links in train/good to a few images that all differ."""
    train, rng = folder / "train" / "good", np.random.default_rng(0)
    train.mkdir(parents=True)
    for i in range(SOURCES):
        noise = rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"source{i}.png")
    for i in range(count):
        (train / f"{i:06}.png").symlink_to(folder / f"source{i % SOURCES}.png")
    return folder


def worker(name: str, root: Path) -> dict:
    from bench.predict_worker import peak_mb
    from medclip_jax.data import datasets
    from medclip_jax.data import records as data_records  # noqa: F401  (imported, not timed)

    before = peak_mb()
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        records = datasets.load(name, root, Path(cache))
        listed = time.perf_counter() - begin
        count = sum(1 for _ in data_records.read_all(records, SIZE, "stretch"))
        read = time.perf_counter() - begin - listed
    return {
        "name": name,
        "images": count,
        "list": listed,
        "read": read,
        "per_second": count / (listed + read),
        "before_mb": before,
        "peak_mb": peak_mb(),
    }


if __name__ == "__main__":
    print(json.dumps(worker(sys.argv[1], Path(sys.argv[2]))))
