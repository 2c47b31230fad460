"""Operations and chip hours of the table of three sets: XLA's counts of a step times its runs.

No weights are needed and nothing of the table is run. What the host does (reading images and
tokens, metrics, reports) is not in it, nor is the token refinement of `paper`.
"""

import argparse
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from bench import sizes, workload
from medclip_jax import build, config
from medclip_jax.data.augmentation import COPIES
from medclip_jax.models import model, similarity
from medclip_jax.training import step as training_step

TEST = {"busi": 748, "brain_mri": 220, "chest_xray": 624}  # images, peer split
POOL = {"busi": 32, "brain_mri": 32}  # healthy images; of the others each draw has its own


class Part(NamedTuple):
    """One line of the table."""

    name: str
    times: int
    flops: float  # each


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="ViT-L/14", choices=sizes.SIZES)
    methods = ["ours", "mediclip", "paper"]
    parser.add_argument("--method", nargs="+", default=methods[:1], choices=methods)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--tflops", type=float, default=197, help="of a chip: TPU v5e, bfloat16")
    parser.add_argument("--share", type=float, default=0.4, help="of it that is reached: assumed")


def run(args: argparse.Namespace) -> dict:
    result = {}
    for method in args.method:
        rows = parts(method, args.size, args.k, args.draws)
        whole = sum(times * flops for _, times, flops in rows)
        hours = whole / (1e12 * args.tflops * args.share) / 3600
        for name, times, flops in rows:
            share = f"{times * flops / whole:.0%}"
            print(f"{method} | {name} | {times:,} | {flops / 1e9:,.2f} GFLOP | {share}")
        print(f"{method}: {whole / 1e15:.3g} PFLOP, {hours:.3g} chip hours")
        result[method] = {"pflop": whole / 1e15, "chip_hours": hours, "parts": rows}
    return result


def parts(method: str, size: str, ks: list[int], draws: int) -> list[Part]:
    """Everything that the accelerator does for one method."""
    settings = {k: config.resolve(config.base(f"k={k},method={method}")) for k in ks}
    c = settings[max(ks)]
    models, views = 1 + build.FOLDS, 1 + (c.score.tiles**2 if c.score.tiles > 1 else 0)
    own = {name: POOL.get(name, draws * max(ks)) for name in TEST}
    each = 1 + c.synthesis.variants + (COPIES if c.augment else 0)
    supports = sum(own.values()) * each
    if method == "mediclip":  # its variants take parts of the other supports of the draw
        supports = sum(own.values()) + len(TEST) * draws * sum(ks) * c.synthesis.variants
    rows = {k: min(8, k) for k in ks}
    work = {n: workload.build(size, max(1, c.meta.tasks), n) for n in {*rows.values()}}
    first = work[max(work)]
    result = [Part("image encoder", (sum(TEST.values()) + supports) * views, sizes.flops(size))]
    for k, n in rows.items():
        times = len(TEST) * draws * models * settings[k].steps
        name = "exact meta-step" if c.learner == "maml" else "gradient"
        flops = gradient(work[n], c.learner == "maml", method != "mediclip")
        result.append(Part(f"{name}, {n} rows, K = {k}", times, flops))
    scored = sum(TEST.values()) * draws * len(ks)
    # the map, the fold params and twice a map for the gradient of Grad-CAM
    maps = scored * (models + c.score.passes + 2) * views
    result.append(Part("map by prompts", maps, prompt_map(first)))
    if "memory" in c.branches:
        for k in ks:
            times = scored // len(ks) * 3 * views
            result.append(Part(f"map by memory, K = {k}", times, memory_map(first, k)))
    return result


def counted(function, *given) -> float:
    """Operations of one call as XLA counts them before it optimises; nothing is compiled."""
    return float(jax.jit(function).lower(*given).cost_analysis()["flops"])


def gradient(work: workload.Work, meta: bool, causal: bool) -> float:
    """Of one set of params; not causal is MediCLIP's text encoder, which reads all positions."""
    design = work.design._replace(causal=causal)
    loss = partial(model.loss, design=design, weights=workload.WEIGHTS)
    batch = jax.tree.map(lambda x: x[:, 0], work.episodes)
    if meta:
        inner = training_step.Learner("maml", 1, workload.RATE).inner(1)
        loss = training_step.meta_objective(loss, inner)
    else:
        batch = jax.tree.map(lambda x: x[0], batch.support)
    slopes = jax.grad(loss, has_aux=True)
    return counted(slopes, work.params, work.frozen, batch, jax.random.key(0))


def prompt_map(work: workload.Work) -> float:
    """Adapted tokens and logits of one image; the prompts are encoded once a run."""
    features = jax.tree.map(lambda x: x[0, 0, :1], work.episodes.support.features)
    text = np.zeros((len(work.design.prompts.ids), work.params["adapters"][0]["bias"].shape[0]))

    def logit(params, text, features):
        return model.forward(params, text, features, work.design).logit

    return counted(logit, work.params, text.astype(np.float32), features)


def memory_map(work: workload.Work, k: int) -> float:
    """Cosine of one image's patches with those of k supports, at each level."""
    levels = [x[0, 0, 0] for x in work.episodes.support.features.levels]
    return sum(
        counted(similarity.cosine, x, jax.ShapeDtypeStruct((k * len(x), x.shape[1]), x.dtype))
        for x in levels
    )
