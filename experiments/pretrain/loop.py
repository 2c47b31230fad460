"""The training loop: a wall-clock budget, steps that depend only on their number, checkpoints."""

import functools
import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import CLIPTokenizerFast

from . import captions, objective, tokens, views
from .encoders import Encoders, Params

LENGTH = 32  # text tokens in training; the later positions of the context stay as they began


class Plan(NamedTuple):
    """Everything that decides a run."""

    hours: float = 1.5  # budget; the schedule is a function of the fraction used
    steps: int | None = None  # a step budget instead (exactly repeatable)
    batch: int = 64
    patches: int = 98  # patches kept of 196 ...
    full_tail: float = 0.1  # ... but all of them in this last fraction
    rate: float = 8e-4
    seed: int = 0
    findings: bool = True
    save_minutes: float = 4.0
    weights: objective.Weights = objective.Weights()


class Material(NamedTuple):
    """What the loop reads: cached views, their rows, the channel scales, the tokenizer, phrases."""

    shards: list[views.Shard]
    rows: list[views.Row]
    scales: dict[str, tuple[np.ndarray, np.ndarray]]
    tokenizer: CLIPTokenizerFast
    phrases: list[str]
    meaning: np.ndarray


class State(NamedTuple):
    params: dict
    moments: tuple
    average: dict


def channel_scales(shards: list[views.Shard]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of each teacher channel over the first shards."""
    out = {}
    for name in ("fine", "coarse", "pooled"):
        values = [np.asarray(getattr(s, name)[:256], np.float32) for s in shards[:4]]
        flat = np.concatenate([v.reshape(-1, v.shape[-1]) for v in values])
        out[name] = flat.mean(0), flat.std(0) + 1e-6
    return out


def make_batch(material: Material, plan: Plan, number: int, kept: int) -> objective.Batch:
    """The batch of step `number`: a function of the seed and the number alone."""
    rng = np.random.default_rng([plan.seed, 13, number])
    per_shard = len(material.shards[0].index)
    chosen = rng.integers(per_shard * len(material.shards), size=plan.batch)
    flips = rng.random(plan.batch) < 0.5
    columns = {name: [] for name in views.Shard._fields}
    for place, flip in zip(chosen, flips, strict=True):
        shard = material.shards[place // per_shard]
        for name in views.Shard._fields:
            value = getattr(shard, name)[place % per_shard]
            turned = flip and name in ("pixels", "fine", "coarse")
            columns[name].append(np.flip(value, 1) if turned else value)
    rows = [material.rows[i] for i in columns["index"]]
    keep = np.argsort(rng.random((plan.batch, 196)), axis=1)[:, :kept].astype(np.int32)

    def standard(name):
        mean, sd = material.scales[name]
        return (np.asarray(np.stack(columns[name]), np.float32) - mean) / sd

    def patches(name):
        grid = standard(name).reshape(plan.batch, 196, -1)
        return np.take_along_axis(grid, keep[..., None], 1)

    own = [captions.make_caption(row, rng, plan.findings) for row in rows]
    other = rng.integers(len(material.phrases), size=plan.batch)
    texts = [c.text for c in own] + [material.phrases[i] for i in other]
    ids = tokens.encode(material.tokenizer, texts, LENGTH)
    return objective.Batch(
        pixels=np.stack(columns["pixels"]),
        keep=keep,
        fine=patches("fine"),
        coarse=patches("coarse"),
        pooled=standard("pooled"),
        captions=ids[: plan.batch],
        match=captions.matches(own, rows),
        phrases=ids[plan.batch :],
        meaning=material.meaning[other],
    )


def rate_at(plan: Plan, fraction: float, number: int) -> np.float32:
    """Linear warm-up over 100 steps, then cosine over the fraction of the budget used."""
    cosine = 0.5 * (1 + np.cos(np.pi * min(fraction, 1.0)))
    return np.float32(plan.rate * min(1.0, (number + 1) / 100) * max(cosine, 0.01))


def save(path: Path, state: State, number: int, elapsed: float) -> None:
    """One file, replaced atomically."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}
    half_written = path.with_suffix(".part")
    save_file(arrays, half_written, metadata={"step": str(number), "elapsed": repr(elapsed)})
    os.replace(half_written, path)


def restore(path: Path, template: State) -> tuple[State, int, float]:
    """State, next step's number and elapsed seconds from `save`."""
    with safe_open(path, "numpy") as file:
        about = file.metadata()
        paths, tree = jax.tree_util.tree_flatten_with_path(template)
        leaves = [file.get_tensor(jax.tree_util.keystr(k)) for k, _ in paths]
    state = jax.tree_util.tree_unflatten(tree, leaves)
    return state, int(about["step"]), float(about["elapsed"])


def start(clip: Params, encoders: Encoders, seed: int) -> State:
    params = {"clip": clip, "heads": objective.init_heads(encoders, seed)}
    moments = jax.tree.map(np.asarray, objective.make_optimiser().init(params))
    return State(params, moments, clip)


def _check(parts: dict[str, float], number: int) -> None:
    bad = [name for name, value in parts.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {number}: {', '.join(bad)} is not finite")


def _line(number: int, used: float, speed: float, parts: dict[str, float]) -> str:
    values = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
    return f"step {number} {used / 60:.1f} min {speed:.0f} images/s {values}"


@functools.cache
def compiled_step(encoders: Encoders, weights: objective.Weights):
    """`objective.step` for one CLIP, compiled once per process; its state is donated."""
    fixed = {"encoders": encoders, "weights": weights, "optimiser": objective.make_optimiser()}
    return jax.jit(functools.partial(objective.step, **fixed), donate_argnums=(0, 1, 2))


def counted(times: list[float]) -> float:
    """Seconds the last step counts for: at most five median steps, however long it was stopped."""
    return min(times[-1], 5 * float(np.median(times)))


def run(material: Material, encoders: Encoders, plan: Plan, state: State, path: Path) -> State:
    """Trains from `state`, or from the checkpoint at `path`, until the budget is used up.

    A process may be stopped and continued without losing budget (see `counted`).
    """
    number, elapsed, times = 0, 0.0, []
    if path.exists():
        state, number, elapsed = restore(path, state)
    mesh = jax.make_mesh((jax.device_count(),), ("n",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("n"))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    step = compiled_step(encoders, plan.weights)
    saved = elapsed
    while True:
        fraction = number / plan.steps if plan.steps else elapsed / (plan.hours * 3600)
        if fraction >= 1:
            break
        begun = time.monotonic()
        kept = 196 if fraction >= 1 - plan.full_tail else plan.patches
        batch = jax.device_put(make_batch(material, plan, number, kept), split)
        rate = rate_at(plan, fraction, number)
        *changed, parts = step(*state, rate, batch)
        state = State(*changed)
        parts = {name: float(value) for name, value in parts.items()}
        _check(parts, number)
        number += 1
        times = [*times[-50:], time.monotonic() - begun]
        elapsed += counted(times)
        line = _line(number, elapsed, plan.batch / np.median(times), parts)
        print(f"\r{line}", end="" if number % 20 else "\n", flush=True)
        if elapsed - saved > plan.save_minutes * 60:
            save(path, state, number, elapsed)
            saved = elapsed
    save(path, state, number, elapsed)
    return state
