"""One BUSI run with a ViT-B/16-sized CLIP against the peer's shipped schedule, from measured parts.

Ours, in seconds, with v variants of each of K supports, b images in a batch and c copies of params
(one of them, plus one per held-out fold):

    (test + K + K v) / encoded + steps (step + rows) + validations judged + test / b scored

    encoded   images per second of the image tower
    step      one optimisation step of all copies on b rows, as fit.run makes it
    rows      reading and putting together those rows; in a run a thread does it meanwhile, so to
              count it is to our disadvantage
    judged    one validation of the held-out copies
    scored    b images: prompt map 3 + folds + passes times (map, held-out copies, Grad-CAM as two
              maps, dropout), memory map 3 times (map and Grad-CAM)

The peer (MediCLIP as released, ViT-B/16, b = 8) encodes every image at every use:

    shipped   steps peer_step + epochs test/b peer_batch      tests after every epoch
    once      steps peer_step + test/b peer_batch             tests at the end alone

peer_step and peer_batch were measured on two cores before (issue 8); give your own. Not counted on
either side: start, compilation, reading images, synthesis, metrics, report; a tower of random
weights takes as long as a trained one.
"""

import argparse
import math
import time
from functools import partial

import jax
import numpy as np
import optax

from bench import encoder, quick, towers, workload
from medclip_jax import config
from medclip_jax.distributed import sharding
from medclip_jax.features import training_pool
from medclip_jax.models import model
from medclip_jax.training import loop, validation
from medclip_jax.training import step as training_step
from medclip_jax.training.state import TrainState

TEST, BATCH = 748, 8


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tower", default="ViT-B/16", choices=["ViT-B/16", "ViT-L/14", "tiny"])
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--variants", type=int, nargs="+", default=[200, 50])
    parser.add_argument("--peer-step", type=float, default=3.29, help="seconds")
    parser.add_argument("--peer-batch", type=float, default=2.42, help="seconds")
    parser.add_argument("--times", type=int, default=3)


def run(args: argparse.Namespace) -> dict:
    parts = {c: measure(args.tower, args.k, c, args.times) for c in (1, 5)}
    steps = args.epochs * math.ceil(args.k / BATCH)
    peer = theirs(steps, args.epochs, args.peer_step, args.peer_batch)
    rows = []
    for copies, seconds in parts.items():
        print(copies, "copies:", ", ".join(f"{n} {s:.4f} s" for n, s in seconds.items()))
        for variants in args.variants:
            total = ours(seconds, args.k, variants, steps, args.epochs)
            ratio = {name: value / total for name, value in peer.items()}
            rows.append({"copies": copies, "variants": variants, "seconds": total, "ratio": ratio})
            told = ", ".join(f"{r:.1f} x {n}" for n, r in ratio.items())
            print(f"{copies} copies, {variants} variants: {total:.0f} s; {told}")
    return {"parts": {str(c): s for c, s in parts.items()}, "peer": peer, "rows": rows}


def ours(s: dict[str, float], k: int, variants: int, steps: int, validations: int) -> float:
    """Seconds of our run by the formula above, of measured seconds by part."""
    encoding = (TEST + k + k * variants) * s["encode"] / BATCH
    return (
        encoding
        + steps * (s["step"] + s["rows"])
        + validations * s.get("judge", 0.0)
        + TEST / BATCH * s["score"]
    )


def theirs(steps: int, epochs: int, step: float, batch: float) -> dict[str, float]:
    """Seconds of the peer's run, as shipped and with one test at the end."""
    test = math.ceil(TEST / BATCH) * batch
    return {"shipped": steps * step + epochs * test, "once": steps * step + test}


def measure(name: str, k: int, copies: int, times: int) -> dict[str, float]:
    """The best seconds of each part with so many copies of params, taken in turn."""
    size, work = towers.SIZES[name], workload.build(name, 1, BATCH // 2)
    pool, groups = tokens(name, k), loop.folds(k, copies - 1)
    images = towers.images(size, BATCH)
    mesh = sharding.mesh()
    own = training_step.supports(k, groups)

    def rows(step: int = 0):
        return training_step.batch_at(step, pool, own, BATCH, 0)

    trained = Trainer(work, rows(), copies)
    runs = {
        "encode": encoder.Encoder(size, towers.parameters(size), images, "float32"),
        "step": trained,
        "rows": partial(quick.timed, rows),
        "score": partial(scored, prompted(work, copies), quick.scorer(size, BATCH, k), copies),
    }
    judge = validation.judge(pool, groups, work.design, 0.05, mesh)
    if judge is not None:
        runs["judge"] = partial(quick.timed, judge, copied(work.params, copies), work.frozen)
    return {part: min(each) for part, each in workload.in_turn(runs, times).items()}


def copied(params, copies: int):
    return jax.tree.map(lambda x: np.broadcast_to(x, (copies, *np.shape(x))).copy(), params)


def tokens(name: str, k: int) -> training_pool.Pool:
    """A pool of random tokens, 4 variants of each support, in memory."""
    size, rng = workload.SIZES[name], np.random.default_rng(3)
    bits = -(-(size.pixels**2) // 8)

    def one(count: int):
        shapes = {f"level{i}": (size.grid**2, size.tokens) for i in range(3)}
        shapes["pooled"] = (size.width,)
        held = {n: rng.standard_normal((count, *s), np.float32) for n, s in shapes.items()}
        held["mask"] = rng.integers(256, size=(count, bits)).astype(np.uint8)
        return held.__getitem__

    clean, altered = (tuple(one(n) for _ in range(k)) for n in (1, 4))
    return training_pool.Pool(clean, altered, 3, size.pixels, 4, np.zeros((k, 4), int))


class Trainer:
    """Joint training of all copies, as fit.run makes it, timed call by call."""

    def __init__(self, work: workload.Work, batch, copies: int):
        optimizer = optax.adam(1e-3)
        loss = partial(model.loss, design=work.design, weights=config.base().loss.to_dict())
        params = copied(work.params, copies)
        key = jax.random.key_data(jax.random.key(0))
        self.state = TrainState(np.asarray(0), params, jax.vmap(optimizer.init)(params), key)
        self.step = training_step.make_step(loss, optimizer)
        self.given = work.frozen, jax.device_put(batch)

    def __call__(self) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        self.state, parts = self.step(self.state, *self.given)
        jax.block_until_ready((self.state, parts))
        return time.perf_counter() - begin


def prompted(work: workload.Work, copies: int):
    """One timed prompt map of a batch; the text features are made before, as in a run."""
    sides = [jax.tree.map(lambda x: x[0, 0], s.features) for s in work.episodes[:2]]
    batch = jax.tree.map(lambda *x: np.concatenate(x), *sides)
    text = jax.jit(partial(model.text_features, design=work.design))(work.params, work.frozen)
    mapped = jax.jit(lambda t, w, b: model.forward(t, w, b, work.design).logit)
    return partial(quick.timed, mapped, work.params, text, batch)


def scored(prompt_map, memory_map, copies: int) -> float:
    """Seconds that a batch takes to be scored, by the counts above."""
    passes = config.base().score.passes
    return (3 + copies - 1 + passes) * prompt_map() + 3 * memory_map()
