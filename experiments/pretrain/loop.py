"""The training loop: steps that depend only on their number, checkpoints, a log of JSON lines."""

import functools
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import CLIPTokenizerFast

from . import captions, objective, tokens, views
from .encoders import Encoders, Params

LENGTH = 32  # text tokens in training; the later positions of the context stay as they began
GRID = views.SIZE // 16  # of the teacher's patches
WARM_UP = 300  # steps
LOGGED = 20  # steps between lines of the log
AHEAD = 3  # batches made in advance
WHOLE = 300  # steps at the end of the decay that see all patches


class Plan(NamedTuple):
    """Everything that decides a run."""

    steps: int  # in all; the rate is constant but for the warm-up and the decay
    decay: int = 0  # of them the last: the rate falls to 0, and the last of all see all patches
    batch: int = 64
    patches: int = 98  # patches kept of 196
    rate: float = 8e-4
    seed: int = 0
    findings: bool = True
    save_minutes: float = 5.0
    weights: objective.Weights = objective.Weights()


class Material(NamedTuple):
    """What the loop reads: cached views, their rows, the channel scales, the tokenizer, phrases."""

    shards: list[views.Shard]
    places: np.ndarray  # views that may be used, numbered through the shards
    rows: list[views.Row]
    scales: dict[str, tuple[np.ndarray, np.ndarray]]
    tokenizer: CLIPTokenizerFast
    phrases: list[str]
    meaning: np.ndarray


class State(NamedTuple):
    params: dict
    moments: tuple


class Done(NamedTuple):
    """What a checkpoint says of its run: steps, and seconds that they took in all processes."""

    steps: int = 0
    seconds: float = 0.0


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
    chosen = rng.choice(material.places, size=plan.batch)
    flips = rng.random(plan.batch) < 0.5
    keep = np.argsort(rng.random((plan.batch, GRID**2)), axis=1)[:, :kept].astype(np.int32)
    found = [(material.shards[p // per_shard], p % per_shard) for p in chosen]
    rows = [material.rows[shard.index[place]] for shard, place in found]
    flips &= np.array([captions.MODALITIES[row.modality].mirror for row in rows])

    def column(name):
        values = [getattr(shard, name)[place] for shard, place in found]
        return np.stack([np.flip(v, 1) if f else v for v, f in zip(values, flips, strict=True)])

    def patches(name):
        grid = column(name).reshape(plan.batch, GRID**2, -1)
        mean, sd = material.scales[name]
        chosen = np.take_along_axis(grid, keep[..., None], 1)
        return (chosen.astype(np.float32) - mean) / sd

    mean, sd = material.scales["pooled"]
    pooled = np.stack([shard.pooled[place] for shard, place in found]).astype(np.float32)
    own = [captions.make_caption(row, rng, plan.findings) for row in rows]
    other = rng.integers(len(material.phrases), size=plan.batch)
    texts = [c.text for c in own] + [material.phrases[i] for i in other]
    ids = tokens.encode(material.tokenizer, texts, LENGTH)
    return objective.Batch(
        pixels=column("pixels"),
        keep=keep,
        fine=patches("fine"),
        coarse=patches("coarse"),
        pooled=(pooled - mean) / sd,
        captions=ids[: plan.batch],
        match=captions.matches(own, rows),
        phrases=ids[plan.batch :],
        meaning=material.meaning[other],
    )


def rate_at(plan: Plan, number: int) -> np.float32:
    """Linear warm-up, then constant, then linear to 0 over the decay (so any stop will do)."""
    left = (plan.steps - number) / plan.decay if plan.decay else 1.0
    return np.float32(plan.rate * min(1.0, (number + 1) / WARM_UP, left))


def save(path: Path, state: State, done: Done) -> None:
    """One file, replaced atomically; the one before stays beside it."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}
    about = {name: repr(value) for name, value in done._asdict().items()}
    part = path.with_suffix(".part")
    save_file(arrays, part, metadata=about)
    if path.exists():
        os.replace(path, path.with_suffix(".previous"))
    os.replace(part, path)


def restore(path: Path, template: State) -> tuple[State, Done]:
    """State and position of the newest whole file of `save`; `template` if there is none.

    Raises:
      SystemExit: its arrays are not those of the template.
    """
    for file_path in (path, path.with_suffix(".previous")):
        if not file_path.exists():
            continue
        try:
            with safe_open(file_path, "numpy") as file:
                about = file.metadata()
                paths, tree = jax.tree_util.tree_flatten_with_path(template)
                names = [jax.tree_util.keystr(k) for k, _ in paths]
                if sorted(names) != sorted(file.keys()):
                    raise SystemExit(f"{file_path} is of another version of the training")
                leaves = [file.get_tensor(name) for name in names]
        except SafetensorError as error:
            print(f"{file_path}: {error}; the checkpoint before it is taken", flush=True)
            continue
        state = jax.tree_util.tree_unflatten(tree, leaves)
        return state, Done(int(about["steps"]), float(about["seconds"]))
    return template, Done()


def start(clip: Params, encoders: Encoders, seed: int) -> State:
    params = {"clip": clip, "heads": objective.init_heads(encoders, seed)}
    moments = jax.tree.map(np.asarray, objective.make_optimiser().init(params))
    return State(params, moments)


def check(parts: dict[str, float], number: int) -> None:
    bad = [name for name, value in parts.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {number}: {', '.join(bad)} is not finite")


@functools.cache
def compiled_step(encoders: Encoders, weights: objective.Weights):
    """`objective.step` for one CLIP, compiled once per process; its state is donated."""
    fixed = {"encoders": encoders, "weights": weights, "optimiser": objective.make_optimiser()}
    return jax.jit(functools.partial(objective.step, **fixed), donate_argnums=(0, 1))


def batches(material: Material, plan: Plan, number: int, split) -> Iterator[objective.Batch]:
    """Batches from step `number` on, on the devices; threads make the next ones in advance."""

    def make(step: int):
        kept = GRID**2 if step >= plan.steps - min(plan.decay, WHOLE) else plan.patches
        return make_batch(material, plan, step, kept)

    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = [pool.submit(make, n) for n in range(number, min(number + AHEAD, plan.steps))]
        for step in range(number, plan.steps):
            batch = jax.device_put(waiting.pop(0).result(), split)
            if step + AHEAD < plan.steps:
                waiting.append(pool.submit(make, step + AHEAD))
            yield batch


def run(material: Material, encoders: Encoders, plan: Plan, state: State, path: Path) -> State:
    """Trains from `state`, or from the checkpoint at `path`, until all steps are done.

    Appends to log.jsonl beside `path`: step, rate, images/s and the share of the time in which the
    devices waited for data since the line before, and the parts of the loss at that step.
    """
    state, done = restore(path, state)
    mesh = jax.make_mesh((jax.device_count(),), ("n",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(state, whole)
    step = compiled_step(encoders, plan.weights)
    supply = batches(material, plan, done.steps, NamedSharding(mesh, PartitionSpec("n")))
    number, begun, waited, lines = done.steps, time.monotonic(), 0.0, []
    saved = lined = begun

    def position(now: float) -> Done:
        return Done(number, done.seconds + now - begun)

    while number < plan.steps:
        asked = time.monotonic()
        batch = next(supply)
        waited += time.monotonic() - asked
        rate = rate_at(plan, number)
        *changed, parts = step(*state, rate, batch)
        state, number = State(*changed), number + 1
        parts = {name: float(value) for name, value in parts.items()}  # waits for the step
        check(parts, number - 1)
        if number % LOGGED == 0 or number == plan.steps:
            now = time.monotonic()
            speed = plan.batch * (number - max(number - LOGGED, done.steps)) / (now - lined)
            line = {"step": number, "rate": float(rate), "images_per_second": round(speed, 2)}
            line |= {"waiting": round(waited / (now - lined), 3), "shards": len(material.shards)}
            lines.append(json.dumps(line | {k: round(v, 5) for k, v in parts.items()}))
            print(lines[-1], flush=True)
            lined, waited = now, 0.0
        if time.monotonic() - saved > plan.save_minutes * 60 and number < plan.steps:
            saved = _save_all(path, state, position(time.monotonic()), lines)
    _save_all(path, state, position(time.monotonic()), lines)
    return state


def _save_all(path: Path, state: State, done: Done, lines: list[str]) -> float:
    """Checkpoint and the log's lines up to it, which `lines` then no longer holds; the time."""
    save(path, state, done)
    with open(path.with_name("log.jsonl"), "a") as file:
        file.writelines(f"{line}\n" for line in lines)
    lines.clear()
    return time.monotonic()
