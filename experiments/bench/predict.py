"""Frames per second of --mode predict, its share of time in the encoder, and its peak of memory."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import predict_inputs

WORKER = Path(__file__).with_name("predict_worker.py")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kinds", nargs="+", default=["png", "dicom", "nifti"], choices=KINDS)
    parser.add_argument("--images", type=int, default=240, help="frames of each kind")
    parser.add_argument("--files", type=int, default=20000, help="of the kinds links and listing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="a trained run; one is made if not given")


KINDS = (*predict_inputs.MAKERS, "listing")


def run(args: argparse.Namespace) -> dict:
    """Each kind in a process of its own, so that a peak of memory belongs to one kind.

    "listing" only finds the files of "links" and scores nothing.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        workdir = args.workdir or trained(base)
        for kind in args.kinds:
            what = "links" if kind == "listing" else kind
            count = args.files if what == "links" else args.images
            scans = predict_inputs.MAKERS[what](base / kind, count, args.seed)
            found[kind] = one(workdir, scans, base / f"{kind}-out", kind)
            print(said(kind, found[kind]), flush=True)
    return found


def said(kind: str, f: dict) -> str:
    if kind == "listing":
        return f"listing: {f['items']} files in {f['seconds']:.1f} s, peak {f['peak_mb']} MB"
    return (
        f"{kind}: {f['frames']} frames in {f['seconds']:.1f} s, {f['per_second']:.1f}/s; encoder "
        f"{f['encoder_share']:.0%} of the time ({f['alone_per_second']:.0f}/s when alone: "
        f"{f['of_alone']:.0%} reached); peak {f['peak_mb']} MB, {f['before_mb']} MB before"
    )


def one(workdir: Path, scans: Path, output: Path, kind: str) -> dict:
    """What predict_worker measures. Raises RuntimeError with its last lines if it fails."""
    command = [sys.executable, str(WORKER), str(workdir), str(scans), str(output), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def trained(base: Path) -> Path:
    """A short training on simulated ultrasound, embedded CLIP; its length does not change times."""
    from medclip_jax import config, train
    from medclip_jax.data import phantom

    data = phantom.write_folder(base / "data", "ultrasound", 0, 256, 4, 2, 2)
    c = config.base("k=4,seed=0", name="folder", modality="breast ultrasound", anatomy="breast")
    c.update_from_flattened_dict({"data.root": str(data), "cache": str(base / "cache")})
    c.epochs = 5
    train.run(c, base / "run")
    return base / "run"
