"""The meta-step that is measured: a text encoder of random weights, 21 prompts, tokens of tasks.

Prompts and their lengths are MediCLIP's words (10 + 11, context 8).
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import clock, sizes
from medclip_jax import build as build_objects
from medclip_jax import config
from medclip_jax.clip.layers import Features
from medclip_jax.distributed import sharding
from medclip_jax.features.training_pool import Batch
from medclip_jax.models import model
from medclip_jax.training import loop
from medclip_jax.training import step as training_step
from medclip_jax.training.episodes import Episodes

RATE = 0.01  # inner
WEIGHTS = {"focal": 1.0, "dice": 1.0, "align": 0.1, "prompt": 0.0}


class Work(NamedTuple):
    """Everything a meta-step needs."""

    design: model.Design
    frozen: dict
    params: dict
    episodes: Episodes  # [task, 1 params, row, ...]


def build(name: str, tasks: int, rows: int) -> Work:
    """Random weights and tokens; `rows` of support and as many of query in each task."""
    c = config.base(f"k={rows}", modality="breast ultrasound", anatomy="breast")
    c.update_from_flattened_dict({"prompts.phrases": "words", "model.dropout": 0.0})
    c.data.conditions = ("tumor",)
    with tempfile.TemporaryDirectory() as folder:
        layers = {"layers": 3}  # all tapped; more would only be written and read
        c.clip.checkpoint = str(sizes.write(name, Path(folder) / "clip", **layers))
        c.clip.layers = (1, 2, 3)
        c = config.resolve(c)
        clip = build_objects.load_clip(c)
    design, frozen = build_objects.model_parts(c, clip, ())
    params = build_objects.fresh_params(c, clip, design)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal((tasks, 1, rows, *shape), np.float32)

    def side():
        levels = tuple(normal(clip.grid**2, width) for width in clip.widths)
        mask = np.zeros((tasks, 1, rows, clip.size, clip.size), np.float32)
        mask[:, :, 1::2, : clip.size // 2, : clip.size // 2] = 1
        label = np.broadcast_to(np.arange(rows) % 2, (tasks, 1, rows)).astype(np.int32)
        valid = np.ones((tasks, 1, rows), bool)
        return Batch(Features(normal(clip.joint), levels), mask, label, valid)

    episodes = Episodes(side(), side(), np.ones((tasks, 1), bool))
    frozen, params, episodes = jax.tree.map(jnp.asarray, (frozen, params, episodes))
    return Work(design, frozen, params, episodes)


def step(work: Work, learner: str, inner_steps: int, mesh=None):
    """(compiled step, state) of a learner on this work; one params, Adam.

    On a mesh, `work` must be placed on it already.
    """
    optimizer = loop.adam(1e-3)
    loss = partial(model.loss, design=work.design, weights=WEIGHTS)
    inner = training_step.Learner(learner, inner_steps, RATE).inner(inner_steps)
    objective = joint(loss) if learner == "joint" else training_step.meta_objective(loss, inner)
    begin = training_step.start(work.params, optimizer, 1, 0)
    placed = None
    if mesh is not None:
        placed, begin = sharding.replicated(mesh), sharding.replicate(begin, mesh)
    make = training_step.make_step(objective, optimizer, placed)
    return make.lower(begin, work.frozen, work.episodes).compile(), begin


def joint(loss: Callable) -> Callable:
    """Joint training on the rows of all tasks, support and query: as many rows as meta-learning."""

    def objective(params, frozen, batch, key):
        def flat(*x):
            both = jnp.concatenate(x, axis=1)
            return both.reshape(-1, *both.shape[2:])

        return loss(params, frozen, jax.tree.map(flat, batch.support, batch.query), key)

    return objective


def memory(compiled) -> tuple[int, int]:
    """Bytes that XLA has laid out for one call: at its peak, and neither arguments nor results."""
    m = compiled.memory_analysis()
    whole = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return whole + m.temp_size_in_bytes, m.temp_size_in_bytes


def flops(compiled) -> float:
    """What XLA counts of one call; the body of a loop counts once, however often it runs."""
    return float(compiled.cost_analysis()["flops"])


def operations(work: Work, learner: str, inner_steps: int, compiled) -> float:
    """Floating point operations of one call of `compiled`, which is `step` of the same arguments.

    The inner steps after the first are a loop: each costs what two steps cost more than one.
    """
    if inner_steps < 2:
        return flops(compiled)
    one = flops(step(work, learner, 1)[0])
    return one + (inner_steps - 1) * (flops(compiled) - one)


class Runner:
    """A compiled step with its state, timed call by call."""

    def __init__(self, work: Work, compiled, begin: training_step.TrainState):
        self.compiled, self.work = compiled, work
        self.state = jax.tree.map(jnp.copy, begin)  # donated

    def __call__(self) -> float:
        """Seconds of one step."""
        return clock.seconds_of(self.step)

    def step(self):
        self.state, parts = self.compiled(self.state, self.work.frozen, self.work.episodes)
        return self.state, parts
