"""What each branch of the fused detector sees, on held-out supports, on probes and on test images.

python experiments/branches.py --config configs/busi.py configs/brain_mri.py --k 16 --draws 5 \
  --out runs/branches [--look probes] [--sum asinh] [--set data.root=DIR ...]

A run of each draw is trained once (method ours; seed i is draw i) and its tokens are read from the
feature_cache. Then every branch gives one value per image: of the supports (each held out), of probes
painted on them (data/probes: kinds that training never shows) and of the test images. These values
are kept, one file per draw, and fusions of them are compared without running anything again.

--look probes (default) prints what supports and probes say and never opens a test label: choices
are made there. --look test prints the test image AUROC of every fusion, to be reported in full.
--sum says what of the standardised values is summed: their asinh, as the package does, or
themselves (plain).
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import compare
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import roc_auc_score

from medclip_jax import build, train
from medclip_jax import config as config_module
from medclip_jax.clip import vit
from medclip_jax.data import datasets, splits
from medclip_jax.detectors import (
    calibration,
    detector,
    ensemble,
    memory_bank,
    prompt_detector,
    zero_shot,
)
from medclip_jax.distributed import sharding
from medclip_jax.evaluation import evaluate
from medclip_jax.features import cache as features_cache
from medclip_jax.features import encoder, support_images
from medclip_jax.models import similarity
from medclip_jax.synthesis import probes
from medclip_jax.training import checkpoints, loop

WINDOW = 2  # patches: how far the aligned memory looks around a patch's own place
VARIANTS = 12  # probes per support

SUMS: dict[str, Callable] = {"asinh": np.arcsinh, "plain": lambda values: values}
# fusion -> the branches whose standardised values are summed
FUSIONS = {
    "learned": ("learned",),
    "memory": ("memory",),
    "zero-shot": ("zero_shot",),
    "pooled": ("pooled",),
    "memory, mirrored supports": ("mirrored",),
    "memory, aligned": ("aligned",),
    "learned + memory": ("learned", "memory"),
    "learned + mirrored": ("learned", "mirrored"),
    "memory + zero-shot": ("memory", "zero_shot"),
    "learned + memory + zero-shot": ("learned", "memory", "zero_shot"),
    "learned + mirrored + zero-shot": ("learned", "mirrored", "zero_shot"),
    "learned + memory + zero-shot + pooled": ("learned", "memory", "zero_shot", "pooled"),
}


def main() -> None:
    args = arguments()
    for config in args.config:
        for k in args.k:
            held = [draw(args, config, k, seed) for seed in range(args.draws)]
            print(f"\n{config.stem}, K = {k}, {len(held)} draws")
            (of_probes if args.look == "probes" else of_test)(held, SUMS[args.sum])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, nargs="+", required=True)
    parser.add_argument("--k", type=int, nargs="+", default=[16])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--look", choices=("probes", "test"), default="probes")
    parser.add_argument("--sum", choices=SUMS, default="asinh")
    parser.add_argument("--set", action="append", default=[], help="field=value, as --config.field")
    return parser.parse_args()


def draw(args, config: Path, k: int, seed: int) -> dict[str, np.ndarray]:
    """Values of every branch in a draw: NAME/held [k], NAME/probe [k, v], NAME/test [n], label."""
    path = args.out / f"{config.stem}-k{k}-{seed}.npz"
    if not path.is_file():
        workdir = args.out / "runs" / f"{config.stem}-k{k}-{seed}"
        c = settings(args, config, k, seed)
        if not (workdir / "metrics.json").is_file():
            train.run(c, workdir, pictures=False)
            (workdir / "predictions.npz").unlink()
        np.savez(path, **values(config_module.resolve(c), workdir))
    with np.load(path) as found:
        return dict(found)


def settings(args, config: Path, k: int, seed: int):
    return compare.settings(argparse.Namespace(config=config, set=args.set), k, "ours", seed)


def values(c, workdir: Path) -> dict[str, np.ndarray]:
    """What `draw` keeps, from a trained workdir."""
    tower = vit.load(c.clip.checkpoint, tuple(c.clip.levels), c.clip.dtype, c.model.refine)
    root, cache = Path(c.data.root) if c.data.root else None, Path(c.cache)
    records = datasets.load(c.data.name, root, cache, c.k, (c.data.uncertain, c.data.blank))
    split = splits.split(records, c.k, c.seed, c.data.pool, c.data.split, cache)
    mesh = sharding.mesh()
    feature_cache = features_cache.open_cache(
        cache, tower, c.data.fit, c.cache_dtype, mesh, c.data.recipe
    )
    design, frozen = build.build(c, tower)
    groups = loop.folds(c.k, c.calibration.folds)
    params = trained(c, workdir, tower, design, 1 + len(groups))

    images = support_images.healthy_images(feature_cache, split.support)
    painted = probes.paint(images, probes.kinds_of(c.data.modality), VARIANTS, c.seed)
    tokens = features_cache.encode(
        feature_cache, painted.images, partial(encoder.encode, feature_cache), "branches"
    )
    shown = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for t in tokens]
    read = evaluate.scorer(tower.size, c.score.top)
    made = branches(c, params, frozen, design, feature_cache, split.support, images, groups)
    found = {name: ensemble.evidence(b, shown, read) for name, b in made.items()}
    test = {name: [] for name in made}
    for batch in features_cache.load_images(feature_cache, split.test, 32):
        batch = jax.tree.map(jnp.asarray, batch)
        for name, b in made.items():
            of = b.image(batch) if b.image is not None else read(b.patches(batch))
            test[name].append(np.asarray(of))
    result = {"label": np.array([r.label for r in split.test])}
    for name, e in found.items():
        own = e.image, e.probe_image, np.concatenate(test[name])
        result |= {f"{name}/{x}": y for x, y in zip(("held", "probe", "test"), own, strict=True)}
    return result


def trained(c, workdir: Path, tower, design, copies: int):
    """Theta of a trained workdir, all copies."""
    optimizer = optax.adam(c.optimizer.learning_rate, b1=c.optimizer.b1, b2=c.optimizer.b2)
    manager = checkpoints.open(workdir)
    with checkpoints.finishing(manager):
        state = checkpoints.restore(manager, loop.start(c, tower, design, optimizer, copies))
    return jax.device_get(state.params)


def branches(c, params, frozen, design, feature_cache, supports, images, groups):
    """Every detector that is looked at."""
    tokens, _ = support_images.healthy_tokens(feature_cache, supports)
    other = encoder.encode(feature_cache, images[:, :, ::-1])
    both = jax.tree.map(
        lambda a, b: jnp.stack([a, jnp.asarray(b, jnp.float32)], 1).reshape(-1, *a.shape[1:]),
        *(tokens, other),
    )
    mirrored = memory_bank.remember(both, rows=2)
    plain, _ = build.build(c, feature_cache.clip, context=0)
    return {
        "learned": prompt_detector.learned(params, frozen, design, tokens, groups),
        "memory": memory_bank.remember(tokens),
        "mirrored": mirrored._replace(held_out=mirrored.held_out[::2], k=len(supports)),
        "aligned": aligned(tokens, feature_cache.clip.grid),
        "zero_shot": zero_shot.zero_shot(params, frozen, plain, feature_cache.clip, tokens),
        "pooled": pooled(tokens, feature_cache.clip.grid),
    }


def aligned(tokens, grid: int) -> detector.Detector:
    """A memory that compares a patch with those of about the same place (aligned anatomy)."""
    at = np.stack(np.divmod(np.arange(grid**2), grid), 1)
    near = jnp.asarray(np.abs(at[:, None] - at[None]).max(-1) <= WINDOW)
    memory = tuple(memory_bank.neighbourhood(x) for x in tokens.levels)
    k = len(memory[0])

    @jax.jit
    def patches(batch, use):
        total = 0.0
        for x, m in zip(batch.levels, memory, strict=True):
            alike = jnp.einsum(
                "npd,kqd->nkpq", *map(similarity.unit, (memory_bank.neighbourhood(x), m))
            )
            alike = jnp.where(near[None, None] & use[None, :, None, None], alike, -1.0)
            total += 1 - alike.max((1, 3))
        return total / len(memory)

    def without(i, batch):
        return patches(batch, jnp.arange(k) != i)

    own = [without(i, jax.tree.map(lambda x, i=i: x[i : i + 1], tokens)) for i in range(k)]
    everything = partial(patches, use=jnp.ones(k, bool))
    return detector.Detector(everything, np.concatenate(own), None, without=without, k=k)


def pooled(tokens, grid: int) -> detector.Detector:
    """Cosine distance of the pooled embedding to the nearest support's; the same in every patch."""
    memory = similarity.unit(tokens.pooled)
    k = len(memory)

    def patches(batch, use):
        alike = jnp.where(use[None], similarity.unit(batch.pooled) @ memory.T, -1.0)
        return jnp.broadcast_to(1 - alike.max(-1, keepdims=True), (len(alike), grid**2))

    def without(i, batch):
        return patches(batch, jnp.arange(k) != i)

    own = [without(i, jax.tree.map(lambda x, i=i: x[i : i + 1], tokens)) for i in range(k)]
    everything = partial(patches, use=jnp.ones(k, bool))
    return detector.Detector(everything, np.concatenate(own), None, without=without, k=k)


# --- fusions of what was kept ------------------------------------------------------------------


def parts(
    held: dict[str, np.ndarray], names: tuple[str, ...], part: str, form: Callable
) -> list[np.ndarray]:
    """`form` of each branch's values of a part, standardised on the held-out supports."""
    found = []
    for name in names:
        own = held[f"{name}/held"]
        found.append(form((held[f"{name}/{part}"] - own.mean()) / calibration.spread(own)))
    return found


def of_probes(held: list[dict[str, np.ndarray]], form: Callable) -> None:
    """How far probes move an image in units of the healthy spread, and their AUROC.

    Last: the largest share that one branch has in the sum of the branches' variances.
    """

    def line(names):
        shift, area, largest = [], [], []
        for one in held:
            healthy, altered = (parts(one, names, part, form) for part in ("held", "probe"))
            own, other = sum(healthy), sum(altered)
            shift.append((other - own[:, None]).mean() / own.std(ddof=1))
            area.append(ensemble.auroc(own, other.ravel()))
            spread = np.array([values.var() for values in altered])
            largest.append(spread.max() / spread.sum())
        return np.array(shift), np.array(area), np.array(largest)

    show(line, ("shift, healthy sd", "AUROC of probes", "largest share of variance"))


def of_test(held: list[dict[str, np.ndarray]], form: Callable) -> None:
    """Image AUROC of the test images."""

    def line(names):
        scores = [(one["label"], sum(parts(one, names, "test", form))) for one in held]
        return (np.array([roc_auc_score(*pair) for pair in scores]),)

    show(line, ("test AUROC",))


def show(line: Callable, columns: tuple[str, ...]) -> None:
    print(f"| fusion | {' | '.join(columns)} |\n{'|---' * (1 + len(columns))}|")
    for name, names in FUSIONS.items():
        cells = []
        for found in line(names):
            low, high = compare.interval(found)
            cells.append(f"{found.mean():.3f} ± {(high - low) / 2:.3f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
