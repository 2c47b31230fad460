"""What the whole table costs with CLIP ViT-L/14: operations counted by XLA, seconds by division.

python experiments/accelerator_cost.py [--methods ours,mediclip,...] [--k 4 8 16 32] [--draws 10] \
  [--peak 197e12] [--share 0.4]

XLA's cost analysis counts the floating-point operations of the encoder, of a training step and of
scoring an image, from shapes alone: no weights are needed and nothing is run. They are multiplied
by how often the reproduction's three data sets need them (peer split, default settings), and
divided by peak x share. The share of the peak that is reached is an assumption, not a measurement,
and what the host does (reading images and tokens, metrics, report) is not in it. Default peak: one
TPU v5e chip in bfloat16 as its maker states it.
"""

import argparse
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from bench import workload

from medclip_jax import config
from medclip_jax.clip import vit
from medclip_jax.models import model, similarity

TOWER = vit.Tower(16, 1e-5, "quick_gelu", 14, (12, 18, 24), "bfloat16")
WIDTH, DEPTH, JOINT, SIZE = 1024, 24, 768, 224
PATCHES = (SIZE // 14) ** 2
TEST = {"busi": 748, "brain_mri": 220, "chest_xray": 624}  # images, peer split
POOL = {"busi": 32, "brain_mri": 32, "chest_xray": None}  # None: each draw has its own supports
TRAINED = {"ours and fomaml": ("ours", "fomaml"), "mediclip": ("mediclip",)}
REMEMBER = ("ours", "fomaml", "memory")
PROMPTED = ("ours", "fomaml", "mediclip", "zero_shot")


class Part(NamedTuple):
    """One line of the table."""

    name: str
    times: int
    flops: float  # each


def flops(function, *shapes) -> float:
    """Operations of one call as XLA counts them before it optimises; nothing is compiled."""
    return float(jax.jit(function).lower(*shapes).cost_analysis()["flops"])


def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def vision() -> dict:
    """Shapes of the ViT-L/14 image tower's parameters, as weights.read names them."""

    def norm(*lead):
        return {"scale": array(*lead, WIDTH), "bias": array(*lead, WIDTH)}

    def dense(a, b):
        return {"kernel": array(DEPTH, a, b), "bias": array(DEPTH, b)}

    return {
        "patch": array(14 * 14 * 3, WIDTH),
        "class": array(WIDTH),
        "position": array(PATCHES + 1, WIDTH),
        "pre": norm(),
        "blocks": {
            "norm1": norm(DEPTH),
            "qkv": dense(WIDTH, 3 * WIDTH),
            "out": dense(WIDTH, WIDTH),
            "norm2": norm(DEPTH),
            "fc1": dense(WIDTH, 4 * WIDTH),
            "fc2": dense(4 * WIDTH, WIDTH),
        },
        "post": norm(),
        "projection": array(WIDTH, JOINT),
    }


def encoder() -> float:
    """Of one image. Blocks are counted one by one: XLA would count the body of a scan once."""
    held, x = vision(), array(1, PATCHES + 1, WIDTH, dtype="bfloat16")
    first = flops(partial(vit.embed, tower=TOWER), held, array(1, SIZE, SIZE, 3))
    block = flops(lambda p, y: vit.run_block(p, y, 1, TOWER), held, x)
    return first + DEPTH * block + flops(partial(vit.pool, tower=TOWER), held, x)


def training_step(rows: int, causal: bool = True) -> float:
    """Gradient of the loss of one copy of params on `rows` images and 21 prompts.

    causal False is MediCLIP's text tower, which reads all 77 positions.
    """
    work = workload.build("ViT-L/14", 1, rows)
    design = work.design._replace(causal=causal)
    batch = jax.tree.map(lambda x: x[0, 0], work.episodes.support)
    loss = partial(model.loss, design=design, weights=workload.WEIGHTS)
    grad = jax.value_and_grad(lambda t, f, b: loss(t, f, b, None)[0])
    return flops(grad, work.params, work.frozen, batch)


def prompt_map() -> float:
    """Adapted tokens and logits of one image; the prompts are encoded once a run."""
    work = workload.build("ViT-L/14", 1, 1)
    batch = jax.tree.map(lambda x: x[0, 0], work.episodes.support).features
    text = array(len(work.design.prompts.ids), JOINT)

    def run(params, text, features):
        return model.forward(params, text, features, work.design).logit

    return flops(run, work.params, text, batch)


def memory_map(k: int) -> float:
    """Distance of one image's patches to those of k supports, all levels in one product."""
    levels = len(TOWER.levels)
    each = flops(similarity.cosine, array(1, PATCHES, WIDTH), array(k * PATCHES, WIDTH))
    return levels * each


def taken(method: str, k: int) -> int:
    """Gradients of one copy of params in a run."""
    c = config.base(f"k={k}")
    c.update({"learner": method} if method in config.LEARNERS else {"method": method})
    c = config.resolve(c)
    return c.steps * config.gradients(c)


def parts(methods: list[str], ks: list[int], draws: int) -> list[Part]:
    """Everything that the accelerator does for the table."""
    c = config.base("k=16")
    folds, passes, variants = c.calibration.folds, c.score.passes, c.synthesis.variants
    images = sum(TEST.values())
    own = {name: pool or draws * max(ks) for name, pool in POOL.items()}
    if {"ours", "fomaml"} & set(methods):
        images += sum(own.values()) * (1 + variants)
    elif methods:
        images += sum(own.values())
    if "mediclip" in methods:  # its variants take parts of the other supports of the draw
        images += len(TEST) * draws * sum(ks) * variants
    found = [Part("image tower", images, encoder())]
    each = len(TEST) * draws * (1 + folds)
    for k in ks:
        rows = min(8, k)
        for name, group in TRAINED.items():
            times = sum(taken(m, k) for m in methods if m in group) * each
            if times:
                one = training_step(rows, name != "mediclip")
                found.append(Part(f"gradient of {name}, {rows} rows, K = {k}", times, one))
    scored = sum(TEST.values()) * draws
    prompted = sum(m in PROMPTED for m in methods) * len(ks)
    # the map, the held-out copies, the gradient of Grad-CAM (twice a map) and the passes
    found.append(Part("map by prompts", scored * prompted * (3 + folds + passes), prompt_map()))
    remembering = sum(m in REMEMBER for m in methods)
    for k in ks:
        times = scored * remembering * 3
        found.append(Part(f"map by memory, K = {k}", times, memory_map(k)))
    return [part for part in found if part.times]


def feature_cache(images: int, bytes_each: int) -> float:
    """Gigabytes of tokens on disk."""
    return images * (len(TOWER.levels) * PATCHES * WIDTH + JOINT) * bytes_each / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = "ours,fomaml,mediclip,memory,zero_shot,thumbnails,grey_level"
    parser.add_argument("--methods", default=known)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--peak", type=float, default=197e12, help="operations per second")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached")
    args = parser.parse_args()
    rows = parts(args.methods.split(","), args.k, args.draws)
    print("| part | times | GFLOP each | PFLOP | seconds |\n|---|---|---|---|---|")
    total = 0.0
    for name, times, each in rows:
        total += times * each
        cost = f"{times * each / 1e15:.2f} | {times * each / args.peak / args.share:,.0f}"
        print(f"| {name} | {times:,} | {each / 1e9:,.2f} | {cost} |")
    print(f"| all | | | {total / 1e15:.2f} | {total / args.peak / args.share:,.0f} |")
    held = [f"{feature_cache(rows[0].times, size):,.0f} GB as {n}" for n, size in BYTES.items()]
    print(f"\nThe feature_cache's {rows[0].times:,} images take {' or '.join(held)}.")


BYTES = {"float32": 4, "bfloat16": 2}

if __name__ == "__main__":
    main()
