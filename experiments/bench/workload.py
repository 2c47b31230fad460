"""What is measured: a text encoder of random weights, 21 prompts, and the tokens of a few tasks.

Time does not depend on the values, so the towers of CLIP ViT-B/16 and ViT-L/14 are stood in for by
random ones of their size. Prompts and their lengths are MediCLIP's words (10 + 11, context 8).
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import towers
from medclip_jax.clip import checkpoint, text
from medclip_jax.clip.outputs import Features
from medclip_jax.distributed import sharding
from medclip_jax.features.batch import Batch
from medclip_jax.models import model
from medclip_jax.prompts import tokenize
from medclip_jax.training import step as training_step
from medclip_jax.training.episodes import Episodes
from medclip_jax.training.state import TrainState, start

RATE = 0.01  # inner


class Size(NamedTuple):
    """One CLIP: its text tower, and the image tokens it leaves."""

    width: int
    layers: int
    heads: int
    grid: int
    tokens: int  # width of an image token
    pixels: int


SIZES = {
    "ViT-B/16": Size(512, 12, 8, 14, 768, 224),
    "ViT-L/14": Size(768, 12, 12, 16, 1024, 224),
    "compact": Size(128, 4, 2, 14, 192, 224),  # the embedded CLIP
    "tiny": Size(32, 2, 2, 4, 24, 32),  # for the tests
}
WEIGHTS = {"focal": 1.0, "dice": 1.0, "align": 0.1, "prompt": 0.0}
LEVELS = 3


class Work(NamedTuple):
    """Everything a meta-step needs."""

    design: model.Design
    frozen: dict
    params: dict
    episodes: Episodes  # [task, 1 params, row, ...]


def build(name: str, tasks: int, rows: int) -> Work:
    """Random weights and tokens; `rows` of support and as many of query in each task."""
    size, rng = SIZES[name], np.random.default_rng(0)
    embedded = checkpoint.load("compact")
    words = tokenize.build(
        embedded.tokenizer,
        embedded.eos_id,
        phrases="words",
        anatomy="breast",
        conditions=("tumor",),
        modality="breast ultrasound",
        context=8,
        position="end",
    )
    vocabulary = int(words.ids.max()) + 1
    encoder = text.TextEncoder(
        size.width,
        size.heads,
        4 * size.width,
        size.layers,
        vocabulary,
        tokenize.POSITIONS,
        size.width,
    )
    design = model.Design(words, encoder, size.pixels, size.grid, "softmax", True, True, 0.0)
    ids = jnp.zeros((1, 3), int)
    inputs = jnp.zeros((1, 0, size.width)), ids, ids - 1, jnp.zeros(1, int)
    weights = towers.random_like(encoder, size.width, 0, *inputs)
    frozen = {"text": weights, "logit_scale": np.float32(4.6)}

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    params = {
        "context": normal(len(words.ids), 8, size.width, scale=0.02),
        "adapters": tuple(
            {
                "kernel": normal(size.tokens, size.width, scale=size.tokens**-0.5),
                "bias": np.zeros(size.width, np.float32),
            }
            for _ in range(LEVELS)
        ),
        "scale": np.float32(2.3),
        "offset": np.float32(0.5),
    }

    def side():
        levels = tuple(normal(tasks, 1, rows, size.grid**2, size.tokens) for _ in range(LEVELS))
        pooled = normal(tasks, 1, rows, size.width)
        mask = np.zeros((tasks, 1, rows, size.pixels, size.pixels), np.float32)
        mask[:, :, 1::2, : size.pixels // 2, : size.pixels // 2] = 1
        label = np.broadcast_to(np.arange(rows) % 2, (tasks, 1, rows)).astype(np.int32)
        return Batch(Features(pooled, levels), mask, label, np.ones((tasks, 1, rows), bool))

    episodes = Episodes(side(), side(), np.ones((tasks, 1), bool))
    return jax.tree.map(
        jnp.asarray, Work(design, frozen, params, episodes)._replace(design=None)
    )._replace(design=design)


def step(work: Work, learner: str, inner_steps: int, mesh=None):
    """(compiled step, state) of a learner on this work; one copy of params, Adam.

    On a mesh, `work` must be placed on it already.
    """
    optimizer = optax.adam(1e-3)
    loss = partial(model.loss, design=work.design, weights=WEIGHTS)
    inner = training_step.Learner(learner, inner_rate=RATE).inner(inner_steps)
    objective = joint(loss) if learner == "joint" else training_step.meta_objective(loss, inner)
    state = start(work.params, optimizer, 1, seed=0)
    placed = None
    if mesh is not None:
        placed, state = sharding.replicated(mesh), sharding.replicate(state, mesh)
    made = training_step.make_step(objective, optimizer, placed)
    return made.lower(state, work.frozen, work.episodes).compile(), state


def outer(work: Work, inner_steps: int) -> tuple[float, np.ndarray]:
    """Meta-loss and its gradient with respect to the context, to compare with others'."""
    loss = partial(model.loss, design=work.design, weights=WEIGHTS)
    objective = training_step.meta_objective(
        loss, training_step.Learner("maml", inner_rate=RATE).inner(inner_steps)
    )
    one = jax.tree.map(lambda x: x[:, 0], work.episodes)
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (value, _), gradient = run(work.params, work.frozen, one, jax.random.key(0))
    return float(value), np.asarray(gradient["context"])


def joint(loss: Callable) -> Callable:
    """Joint training on the rows of all tasks, support and query: as many rows as meta-learning."""

    def objective(params, frozen, batch, key):
        def flat(*x):
            both = jnp.concatenate(x, axis=1)
            return both.reshape(-1, *both.shape[2:])

        return loss(params, frozen, jax.tree.map(flat, batch.support, batch.query), key)

    return objective


def peak_memory(compiled) -> int:
    """Bytes that XLA has laid out for one call: arguments, results and the most held between."""
    held = compiled.memory_analysis()
    return (
        held.argument_size_in_bytes
        + held.output_size_in_bytes
        - held.alias_size_in_bytes
        + held.temp_size_in_bytes
    )


def temporary_memory(compiled) -> int:
    """Bytes of it that are neither arguments nor results."""
    return compiled.memory_analysis().temp_size_in_bytes


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

    def __init__(self, work: Work, compiled, state: TrainState):
        self.compiled, self.work = compiled, work
        self.state = jax.tree.map(jnp.copy, state)  # donated

    def __call__(self) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        given = (self.state, self.work.frozen, self.work.episodes)
        self.state, parts = self.compiled(*given)
        jax.block_until_ready((self.state, parts))
        return time.perf_counter() - begin


def in_turn(
    runs: dict[str, Callable[[], float]], times: int, again: bool = False
) -> dict[str, list[float]]:
    """Seconds of each, one after the other, `times` rounds after one that is not counted.

    `again`: in its turn each runs twice and the second counts, as in training, where step follows
    step. A system that takes idle memory back (a virtual machine's host does) makes the first after
    a pause pay for getting it again.
    """
    for run in runs.values():
        run()
    rounds = []
    for _ in range(times):
        rounds.append({})
        for name, run in runs.items():
            if again:
                run()
            rounds[-1][name] = run()
    return {name: [r[name] for r in rounds] for name in runs}


def matmul_peak(times: int = 5, n: int = 2048) -> float:
    """Floating point operations per second of a large float32 matrix product, the best of a few."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()

    def once():
        begin = time.perf_counter()
        product(a).block_until_ready()
        return time.perf_counter() - begin

    return 2 * n**3 / min(once() for _ in range(times))
