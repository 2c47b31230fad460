"""Images per second and price of a million images by platform, from operations and bytes.

python experiments/fleet.py [--tower ViT-B/16] [--k 16] [--share 0.4] [--cpu-flops F] [--read 193]
  [--price cpu=0.05 v5e=1.2 h100=10]

XLA counts the operations of encoding an image, of its prompt map and of its memory map, from shapes
alone (as experiments/accelerator_cost.py; nothing is run). They are divided by what a platform
does: a CPU core by measurement (`benchmark.py encoder`: --cpu-flops, operations per second of one
core), accelerators by their makers' bfloat16 peak times --share, an assumption. Bytes: weights are
read once a batch of 32, tokens are written once; where the memory's bandwidth is slower than the
arithmetic, it counts. Reading files is the host's: --read is images a second and core, as measured.
Prices are assumptions, in any currency, an hour of one chip or core.
"""

import argparse
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from accelerator_cost import array, flops
from bench import towers

from medclip_jax.clip import vit
from medclip_jax.models import similarity

BATCH, LEVELS, PROMPTS = 32, 3, 21


class Platform(NamedTuple):
    """What a chip, or a core of a CPU, does."""

    name: str
    flops: float  # per second, reached
    bandwidth: float  # bytes per second of its memory
    memory: float  # bytes


CHIPS = {  # name -> (bfloat16 peak, bytes per second, bytes), as their makers state them
    "v5e": (197e12, 819e9, 16e9),
    "h100": (989e12, 3350e9, 80e9),
}


class Work(NamedTuple):
    """Of one image."""

    encode: float  # operations
    prompts: float
    memory: float
    moved: float  # bytes: its share of the weights, its tokens
    kept: float  # bytes of its tokens in a feature_cache


def shapes(size: towers.Size, dtype: str) -> dict:
    """Shapes of the tower's parameters, without drawing them."""
    tree = towers.parameters(towers.SIZES["tiny"])
    n, d, grid = size.layers, size.width, size.pixels // size.patch
    wide = {"qkv": (d, 3 * d), "out": (d, d), "fc1": (d, 4 * d), "fc2": (4 * d, d)}
    whole = {"patch": (size.patch**2 * 3, d), "class": (d,), "position": (grid**2 + 1, d)}
    whole |= {"projection": (d, size.joint)}

    def shape(path, _):
        names = [k.key for k in path]
        if names[0] in whole:
            return array(*whole[names[0]], dtype=dtype)
        lead = (n,) if names[0] == "blocks" else ()
        layer = wide.get(names[1], (d, d)) if lead else (d, d)
        tail = layer if names[-1] == "kernel" else layer[1:]
        return array(*lead, *tail, dtype=dtype)

    return jax.tree_util.tree_map_with_path(shape, tree)


def count(size: towers.Size, k: int, dtype: str = "bfloat16") -> Work:
    """What one image asks for; blocks are counted one by one, XLA counts a scan's body once."""
    tower, held = towers.tower(size, dtype), shapes(size, dtype)
    patches, d = (size.pixels // size.patch) ** 2, size.width
    x = array(1, patches + 1, d, dtype=dtype)
    encode = flops(partial(vit.embed, tower=tower), held, array(1, size.pixels, size.pixels, 3))
    encode += size.layers * flops(lambda p, y: vit.run_block(p, y, 1, tower), held, x)
    encode += flops(partial(vit.pool, tower=tower), held, x)
    rows = array(1, patches, d)
    adapt = flops(jnp.matmul, rows, array(d, size.joint))
    alike = flops(similarity.cosine, array(1, patches, size.joint), array(PROMPTS, size.joint))
    memory = flops(similarity.cosine, rows, array(k * patches, d)) if k else 0.0
    each = jnp.dtype(dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(held)) * each
    kept = (LEVELS * patches * d + size.joint) * each
    prompts = LEVELS * (adapt + alike)
    return Work(encode, prompts, LEVELS * memory, weights / BATCH + kept, kept)


def per_second(work: Work, on: Platform) -> float:
    """Images a second, encoded and scored: arithmetic or memory, whichever is slower."""
    arithmetic = on.flops / (work.encode + work.prompts + work.memory)
    return min(arithmetic, on.bandwidth / work.moved)


def platforms(cpu_flops: float, share: float) -> list[Platform]:
    chips = [Platform(n, share * peak, *rest) for n, (peak, *rest) in CHIPS.items()]
    return [Platform("cpu", cpu_flops, 10e9, 4e9), *chips]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", default="ViT-B/16", choices=towers.SIZES)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.4, help="of an accelerator's peak")
    parser.add_argument("--cpu-flops", type=float, default=157e9, help="of one core, measured")
    parser.add_argument("--read", type=float, default=137.0, help="images/s that a core reads")
    parser.add_argument("--price", nargs="+", default=["cpu=0.05", "v5e=1.2", "h100=10"])
    args = parser.parse_args()
    price = {name: float(value) for name, _, value in (p.partition("=") for p in args.price)}
    work = count(towers.SIZES[args.tower], args.k)
    each = f"{work.encode / 1e9:.2f} to encode, {work.prompts / 1e9:.2f} prompts, "
    print(f"GFLOP an image: {each}{work.memory / 1e9:.2f} memory of {args.k} supports")
    print(
        f"bytes an image: {work.kept / 1e6:.2f} MB in a feature_cache, {work.moved / 1e6:.2f} MB moved\n"
    )
    head = ("platform", "images/s", "cores that read for it", "supports that fit its memory")
    print(f"| {' | '.join(head)} | price of a million images |\n|{'---|' * 5}")
    for on in platforms(args.cpu_flops, args.share):
        rate = per_second(work, on)
        readers, million = rate / args.read, 1e6 / rate / 3600
        cost = million * (price[on.name] + readers * price["cpu"])
        room = on.memory / 2 / work.kept  # half of it is the tower's and the batch's
        print(f"| {on.name} | {rate:,.1f} | {readers:,.2f} | {room:,.0f} | {cost:.2f} |")


if __name__ == "__main__":
    main()
