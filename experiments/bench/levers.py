"""What else could make the image tower faster: each lever against the tower as shipped, in turn.

loop        blocks one after another in the program, not a scan over stacked parameters
apart       queries, keys and values by three products, not one
int8        dense products of dynamically quantised rows and columns, int32 sums
two calls   two threads of one process encode half of the batch each
processes   two processes of one core each encode half of the batch each
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import encoder, towers, workload
from medclip_jax.clip import vit
from medclip_jax.clip.layers import attend, product

LEVERS = ("loop", "apart", "in place", "int8", "two calls", "processes")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tower", default="ViT-B/16", choices=towers.SIZES)
    parser.add_argument("--batch", type=int, default=16, help="even")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--levers", nargs="+", default=list(LEVERS), choices=LEVERS)
    parser.add_argument("--times", type=int, default=5)


def run(args: argparse.Namespace) -> dict:
    """Images per second of each, their ratio to the shipped tower, and how far embeddings move."""
    size, rows = towers.SIZES[args.tower], []
    weights = jax.tree.map(jnp.asarray, towers.parameters(size))
    images = towers.images(size, args.batch)
    for dtype in args.dtype:
        tower = towers.tower(size, dtype)
        shipped = encoder.Encoder(size, weights, images, dtype)
        base = np.asarray(shipped.encode(weights, images).pooled)
        with Workers(size, images, dtype, "processes" in args.levers) as pair:
            runs: dict[str, Callable[[], float]] = {"shipped": shipped}
            moved = {"shipped": 0.0}
            for name in args.levers:
                runs[name], found = lever(name, weights, images, tower, shipped, pair)
                away = 0.0 if found is None else float(np.abs(found - base).max())
                moved[name] = away / float(np.abs(base).max())
            seconds = workload.in_turn(runs, args.times)
        rows += table(dtype, args.batch, seconds, moved)
    return {"rows": rows}


def lever(name, weights, images, tower, shipped, pair) -> tuple[Callable[[], float], Any]:
    """One timed call, and the pooled embeddings that it makes (None: by the shipped program)."""
    if name == "two calls":
        return partial(halves, shipped, ThreadPoolExecutor(2)), None
    if name == "processes":
        return pair, None
    change: dict[str, Any] = {
        "loop": {},
        "apart": {"apart": True},
        "in place": {"attention": in_place},
        "int8": {"dense": quantised},
    }[name]
    encode = jax.jit(partial(looped, tower=tower, **change))
    found = np.asarray(encode(weights, images))
    return partial(seconds_of, lambda: encode(weights, images)), found


def seconds_of(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def table(dtype: str, batch: int, seconds: dict[str, list[float]], moved: dict) -> list[dict]:
    rows, base = [], min(seconds["shipped"])
    for name, values in seconds.items():
        rate, ratio = batch / min(values), base / min(values)
        print(f"{dtype} {name:10} {rate:7.2f} images/s, {ratio:.2f} x shipped, {moved[name]:.1e}")
        said = {"images_per_second": rate, "ratio": ratio, "moved": moved[name]}
        rows.append({"dtype": dtype, "lever": name, "seconds": values, **said})
    return rows


# --- the levers -----------------------------------------------------------------------------


def looped(weights, grey, *, tower: vit.Tower, **change):
    """Pooled embeddings [n, j] with the blocks written out, by `block` where something changes."""
    x = vit.embed(weights, vit.normalise(grey, towers.MEAN, towers.STD), tower)
    for number in range(1, len(weights["blocks"]["fc1"]["bias"]) + 1):
        if change:
            p = jax.tree.map(lambda b, i=number - 1: b[i], weights["blocks"])
            x = block(x, p, tower, **change)
        else:
            x = vit.run_block(weights, x, number, tower)
    return vit.pool(weights, x, tower).astype(jnp.float32)


def block(
    x,
    p,
    tower: vit.Tower,
    dense: Callable = vit._dense,
    attention: Callable = attend,
    apart: bool = False,
):
    """clip.run_block with another dense product or attention, or three products in place of one."""
    n, s, d = x.shape
    y = vit._layer_norm(x, p["norm1"], tower.eps)
    parts = jax.tree.map(lambda w: jnp.split(w, 3, axis=-1), p["qkv"])
    if apart:
        three = [dense(y, {name: part[i] for name, part in parts.items()}) for i in range(3)]
    else:
        three = jnp.split(dense(y, p["qkv"]), 3, axis=-1)
    q, k, v = (z.reshape(n, s, tower.heads, d // tower.heads) for z in three)
    x = x + dense(attention(q, k, v, None).reshape(n, s, d), p["out"])
    hidden = dense(vit._layer_norm(x, p["norm2"], tower.eps), p["fc1"])
    return x + dense(vit._activate(hidden, tower.activation), p["fc2"])


def in_place(q, k, v, _):
    """products.attend without moving the heads."""
    weight = jnp.einsum("nthd,nshd->nhts", q, k, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(weight * q.shape[-1] ** -0.5).astype(q.dtype)
    return product("nhts,nshd->nthd", weight, v)


def quantised(x, p):
    """x @ kernel + bias with both factors in int8: scales by row of x and column of the kernel."""
    row = jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32) / 127
    column = jnp.abs(p["kernel"]).max(0, keepdims=True) / 127
    a = jnp.round(x / jnp.maximum(row, 1e-12)).astype(jnp.int8)
    b = jnp.round(p["kernel"] / jnp.maximum(column, 1e-12)).astype(jnp.int8)
    total = jnp.einsum("nsa,ab->nsb", a, b, preferred_element_type=jnp.int32)
    scaled = total.astype(jnp.float32) * row * column[None] + p["bias"][None, None]
    return scaled.astype(x.dtype)


def halves(shipped: encoder.Encoder, pool: ThreadPoolExecutor) -> float:
    """Seconds of both halves of the batch at once."""
    parts = jnp.split(shipped.images, 2)

    def one(part):
        return jax.block_until_ready(shipped.encode(shipped.weights, part))

    begin = time.perf_counter()
    list(pool.map(one, parts))
    return time.perf_counter() - begin


class Workers:
    """Two processes that each encode half of the batch on a core of their own, as a context."""

    def __init__(self, size: towers.Size, images: np.ndarray, dtype: str, wanted: bool):
        self.given = [(size, half, dtype) for half in np.split(images, 2)] if wanted else []
        self.running: list = []

    def __enter__(self) -> "Workers":
        spawn, cores = multiprocessing.get_context("spawn"), sorted(os.sched_getaffinity(0))
        for i, given in enumerate(self.given):
            here, there = spawn.Pipe()
            process = spawn.Process(target=serve, args=(there, cores[i % len(cores)], *given))
            process.start()
            self.running.append((process, here))
        for _, pipe in self.running:
            pipe.recv()  # ready
        return self

    def __call__(self) -> float:
        begin = time.perf_counter()
        for _, pipe in self.running:
            pipe.send("go")
        for _, pipe in self.running:
            pipe.recv()
        return time.perf_counter() - begin

    def __exit__(self, *_) -> None:
        for process, pipe in self.running:
            pipe.send("")
            process.join(60)


def serve(pipe, core: int, size: towers.Size, images: np.ndarray, dtype: str) -> None:
    """Encode once for every word from the pipe, until an empty one."""
    os.sched_setaffinity(0, {core})  # before JAX makes its threads
    call = encoder.Encoder(size, towers.parameters(size), images, dtype)
    call()
    pipe.send("ready")
    while pipe.recv():
        call()
        pipe.send("done")
