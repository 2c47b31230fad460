"""Cost against images, image size, prompts and tasks, with exponents; for devices see `scaling`."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np

from bench import growth_images, quick, towers, workload
from medclip_jax.clip import vit
from medclip_jax.prompts.prompts import Prompts

BATCH, ROWS = 16, 4  # images of an encoder call; rows of support and of query of a task


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, nargs="+", default=[20, 200, 2000], help="to score")
    parser.add_argument("--side", type=int, default=256, help="pixels of those image files")
    parser.add_argument("--clip", default="compact", help="checkpoint that scores them")
    parser.add_argument("--pixels", type=int, nargs="+", default=[112, 224, 336], help="of frames")
    parser.add_argument("--prompts", type=int, nargs="+", default=[21, 42, 84, 168])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tower", default="compact", choices=sorted(workload.SIZES))
    parser.add_argument("--times", type=int, default=3)


def run(args: argparse.Namespace) -> dict:
    """Rows of every axis, printed as a table; seconds are the best of a few but for `images`."""
    print("| what | against | at | seconds | MB | exponent | of the last two |")
    print("|---|---|---|---|---|---|---|", flush=True)
    jobs = images(args)
    rows = []
    for stage in growth_images.STAGES:
        each = [j["stages"][stage] for j in jobs]
        rows.append(
            row(
                stage,
                "images",
                args.images,
                [x["seconds"] for x in each],
                [x["megabytes"] for x in each],
            )
        )
    rows.append(frames(args))
    rows.append(prompted(args))
    rows.append(tasked(args))
    per = bytes_per_image(jobs)
    told = ", ".join(f"{name} {value:,.0f}" for name, value in per.items())
    print(f"bytes an image adds: {told}")
    return {"rows": rows, "jobs": jobs, "bytes_per_image": per}


def row(what: str, axis: str, at: list[int], seconds: list[float], megabytes: list[float]) -> dict:
    """One line of the table, printed."""
    both = exponent(at, seconds), exponent(at[-2:], seconds[-2:])
    cells = [" / ".join(f"{x:{f}}" for x in v) for v, f in ((seconds, ".3f"), (megabytes, ".0f"))]
    cells += [f"{x:.2f}" for x in both]
    shown = " / ".join(map(str, at))
    print(
        f"| {what} | {axis} | {shown} | {cells[0]} | {cells[1]} | {both[0]:.2f} | {both[1]:.2f} |"
    )
    sys.stdout.flush()
    found = {"what": what, "axis": axis, "at": at, "seconds": seconds, "megabytes": megabytes}
    return found | {"exponent": both[0], "exponent_last": both[1]}


def exponent(at: list[int], seconds: list[float]) -> float:
    """Slope of a line through the logarithms of both: 1 is proportional, 0 is constant."""
    return float(np.polyfit(np.log(at), np.log(seconds), 1)[0])


def images(args: argparse.Namespace) -> list[dict]:
    """Jobs on growing test sets, in a process of their own, whose memory they share with nobody."""
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "growth.json"
        given = [out, args.clip, args.side, *args.images]
        command = [sys.executable, "-m", "bench.growth_images", *map(str, given)]
        subprocess.run(command, env=environment, check=True)
        return json.loads(out.read_text())


def bytes_per_image(jobs: list[dict]) -> dict[str, float]:
    """Bytes of every file that grows, per further image."""
    first, last = jobs[0], jobs[-1]
    more = last["images"] - first["images"]
    return {name: (last["bytes"][name] - size) / more for name, size in first["bytes"].items()}


def frames(args: argparse.Namespace) -> dict:
    """The encoder on frames of other sizes; the patch stays, so tokens go with the square."""
    runs, sizes = {}, []
    for pixels in args.pixels:
        size = towers.SIZES[args.tower]._replace(pixels=pixels)
        given = jax.device_put((towers.parameters(size), towers.images(size, BATCH)))
        like = dict(tower=towers.tower(size), mean=towers.MEAN, std=towers.STD)
        compiled = vit.encode_images.lower(*given, **like).compile()
        runs[str(pixels)] = partial(quick.timed, compiled, *given)
        sizes.append(workload.peak_memory(compiled) / 1e6)
    seconds = [min(x) for x in workload.in_turn(runs, args.times).values()]
    return row(f"encode {BATCH} images", "pixels of a side", args.pixels, seconds, sizes)


def prompted(args: argparse.Namespace) -> dict:
    """A training step of 8 rows with more and more prompts, the same ones over and over."""
    work = workload.build(args.tower, 1, ROWS)
    return steps("training step", "prompts", args, args.prompts, lambda n: with_prompts(work, n), 0)


def with_prompts(work: workload.Work, n: int) -> workload.Work:
    """The work with n prompts."""
    p = work.design.prompts
    at = np.arange(n) % len(p.ids)
    arrays = (np.asarray(x)[at] for x in (p.ids, p.slots, p.eos, p.label))
    more = Prompts(*arrays, tuple(p.text[i] for i in at))
    params = work.params | {"context": work.params["context"][at]}
    return work._replace(design=work.design._replace(prompts=more), params=params)


def tasked(args: argparse.Namespace) -> dict:
    """An exact meta-step of one inner step over more and more tasks."""

    def make(n: int) -> workload.Work:
        return workload.build(args.tower, n, ROWS)

    return steps("exact meta-step", "tasks", args, args.tasks, make, 1)


def steps(what: str, axis: str, args: argparse.Namespace, at: list[int], make, inner: int) -> dict:
    """Steps of joint training (inner 0) or of exact meta-learning, timed in turn."""
    runs, sizes = {}, []
    for n in at:
        work = make(n)
        compiled, state = workload.step(work, "maml" if inner else "joint", inner)
        runs[str(n)] = workload.Runner(work, compiled, state)
        sizes.append(workload.peak_memory(compiled) / 1e6)
    seconds = [min(x) for x in workload.in_turn(runs, args.times, again=True).values()]
    return row(what, axis, at, seconds, sizes)
