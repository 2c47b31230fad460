"""The bank: every image and every synthetic variant goes through the image tower once, ever.

On disk, one safetensors file per source image, named by the content of everything that shaped it:

  <cache>/bank/<recipe>/<image sha256>.safetensors              the image as it is
  <cache>/bank/<recipe>/<image sha256>-<synthesis>.safetensors  its synthetic variants

`recipe` is the digest of checkpoint, levels, frame, pixel mean, number format and preprocessing;
`synthesis` of preset, seed, number of variants, partners and augmentation. So the bank serves every
K, seed and method, and whatever changes tokens changes a name. A file appears whole (written
beside, then renamed); one that is damaged is made again. Tensors: `pooled` [v, d], `level0` …
[v, p, d], for variants also `mask` [v, bytes] (packed bits) and `kind` [v]; augmented copies follow
the variants there.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medclip_jax import clip, files, sharding
from medclip_jax.data import augment, preprocess, readers, synthesis
from medclip_jax.errors import ConfigError
from medclip_jax.groups import batches, progress, unique
from medclip_jax.structs import Batch, Features, Record

ENCODE_BATCH = 16  # images per call of the tower and device; larger is not faster on a CPU


class Bank(NamedTuple):
    """Where tokens are kept and how they are made."""

    folder: Path
    clip: clip.Clip
    fit: str  # "stretch" or "pad"
    dtype: str  # of the tokens on disk
    mesh: Any
    vision: Any  # the tower's parameters, on every device
    recipe: tuple[str, ...] = ()  # preprocess.STEPS that images go through before the tower


class Synthesis(NamedTuple):
    """How anomalies are made."""

    preset: str  # synthesis.Preset
    variants: int  # anomalous variants per image
    seed: int
    partner: str  # CutPaste copies from "self" or from any "support"
    copies: int = 0  # augmented copies per image; they and the image are what variants are made of
    strengths: augment.Strengths = augment.Strengths()


def open_bank(cache: Path, model: clip.Clip, fit: str, dtype: str, mesh, recipe="") -> Bank:
    """A bank below `cache`. Raises ConfigError for an unknown fit, dtype or recipe."""
    if fit not in ("stretch", "pad"):
        raise ConfigError(f"data.fit {fit!r}: choose 'stretch' or 'pad'")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"bank_dtype {dtype!r}: choose 'float32', 'bfloat16' or 'float16'")
    tower = model.vision_tower
    pixels = model.size, model.mean, model.std, fit
    steps = preprocess.steps(recipe)
    named = [(preprocess.VERSION, steps)] if steps else []
    name = digest(2, model.digest, tower.levels, tower.dtype, pixels, dtype, *named)
    vision = sharding.replicate(model.vision, mesh)
    return Bank(cache / "bank" / name, model, fit, dtype, mesh, vision, steps)


def digest(*parts: Any) -> str:
    """16 hex digits that name the given JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# --- images as they are ---------------------------------------------------------------------


def encode_images(bank: Bank, records: Sequence[Record]) -> int:
    """Fill the bank with the given images; returns how many had to be encoded."""
    missing = unique(r for r in records if not whole(image_path(bank, r)))
    images = readers.read_all(missing, bank.clip.size, bank.fit)
    groups = batches(images, batch_size(bank))
    for group in progress(groups, "encode images", -(-len(missing) // batch_size(bank))):
        features = encode(bank, np.stack([pixels for _, pixels in group]))
        for i, (record, _) in enumerate(group):
            write(image_path(bank, record), bank, features, slice(i, i + 1))
    return len(missing)


def load_images(bank: Bank, records: Sequence[Record], size: int) -> Iterator[Features]:
    """Features of the given images in order, `size` at a time; encode_images comes first."""
    for group in batches(records, size):
        held = [load(image_path(bank, r)) for r in group]
        yield _features([np.concatenate(rows) for rows in zip(*map(_tokens, held), strict=True)])


def image_path(bank: Bank, record: Record) -> Path:
    return bank.folder / f"{record.sha256}.safetensors"


# --- synthetic variants ---------------------------------------------------------------------


def encode_variants(bank: Bank, supports: Sequence[Record], recipe: Synthesis) -> int:
    """Fill the bank with variants of each support; returns how many had to be encoded."""
    todo = unique(s for s in supports if not whole(variant_path(bank, s, supports, recipe)))
    if not todo or not recipe.variants:
        return 0
    pixels = {r.id: x for r, x in readers.read_all(supports, bank.clip.size, bank.fit)}
    partners = np.stack([pixels[s.id] for s in supports])
    for support in progress(todo, "make variants", len(todo)):
        images, masks, kinds = variants(support, pixels[support.id], partners, recipe)
        features = encode(bank, images)
        extra = {"mask": np.packbits(masks.reshape(len(masks), -1) > 0.5, axis=1), "kind": kinds}
        write(variant_path(bank, support, supports, recipe), bank, features, slice(None), extra)
    return len(todo) * (recipe.variants + recipe.copies)


def variants(
    record: Record,
    image: Float[np.ndarray, "s s"],
    partners: Float[np.ndarray, "k s s"],
    recipe: Synthesis,
) -> tuple[Float[np.ndarray, "v s s"], Float[np.ndarray, "v s s"], Int[np.ndarray, " v"]]:
    """Anomalous variants of one image: (images, masks, kinds), then its augmented copies.

    Variant i is a function of (seed, image content, i) and, if partners are shared, of them. It is
    made of the image or of a copy, in turn: what is augmented is not for that an anomaly.
    """
    name = int(record.sha256[:16], 16)
    keys = jnp.stack([synthesis.key_for(recipe.seed, name, v) for v in range(recipe.variants)])
    rng = np.random.default_rng([recipe.seed, name])
    kinds = rng.integers(len(synthesis.KINDS) - 1, size=recipe.variants)
    chosen = rng.integers(len(partners), size=recipe.variants)
    bases = augment.copies(recipe.seed, name, image, recipe.copies, recipe.strengths)
    images = bases[np.arange(recipe.variants) % len(bases)]
    sources = images if recipe.partner == "self" else partners[chosen]
    changed, masks = synthesis.batch(keys, images, sources, kinds, recipe.preset)
    if not recipe.copies:
        return changed, masks, kinds
    clean = np.full(recipe.copies, synthesis.KINDS.index("identity"))
    return (
        np.concatenate([changed, bases[1:]]),
        np.concatenate([masks, np.zeros_like(bases[1:])]),
        np.concatenate([kinds, clean]),
    )


def variant_path(bank: Bank, record: Record, supports: Sequence[Record], recipe: Synthesis) -> Path:
    partners = [s.sha256 for s in supports] if recipe.partner == "support" else []
    plain, changes = recipe[:4], (augment.VERSION, recipe.copies, recipe.strengths)
    parts = synthesis.VERSION, plain, partners, *([changes] if recipe.copies else [])
    return bank.folder / f"{record.sha256}-{digest(*parts)}.safetensors"


class Pool(NamedTuple):
    """Supports and their variants, opened but not read: training takes rows as it needs them."""

    clean: tuple[Callable[[str], Any], ...]  # per support: name -> lazily sliced tensor
    anomalous: tuple[Callable[[str], Any], ...]
    levels: int
    size: int  # pixels per side of the masks
    variants: int
    kinds: Int[np.ndarray, "k v"]  # of each variant, index into synthesis.KINDS
    copies: int = 0  # augmented copies per support, clean


def open_pool(bank: Bank, supports: Sequence[Record], recipe: Synthesis) -> Pool:
    """Encode what is missing and open the supports for training."""
    encode_images(bank, supports)
    encode_variants(bank, supports, recipe)

    def opened(paths):
        return tuple(safe_open(path, framework="np").get_slice for path in paths)

    altered = (
        opened(variant_path(bank, s, supports, recipe) for s in supports) if recipe.variants else ()
    )
    kinds = [tensor("kind")[: recipe.variants] for tensor in altered] or np.zeros(
        (len(supports), 0), int
    )
    return Pool(
        opened(image_path(bank, s) for s in supports),
        altered,
        len(bank.clip.vision_tower.levels),
        bank.clip.size,
        recipe.variants,
        np.asarray(kinds),
        recipe.copies if recipe.variants else 0,
    )


def join(pools: Sequence[Pool]) -> Pool:
    """One pool of several with the same bank and number of variants; images in order."""
    return pools[0]._replace(
        clean=sum((p.clean for p in pools), ()),
        anomalous=sum((p.anomalous for p in pools), ()),
        kinds=np.concatenate([p.kinds for p in pools]),
    )


def take(pool: Pool, support: Int[np.ndarray, " n"], variant: Int[np.ndarray, " n"]) -> Batch:
    """Rows of the pool as a batch on the host.

    variant: -1 is the image itself (Identity), -2 - c its augmented copy c, both clean.
    """

    def row(s, v, name: str) -> np.ndarray:
        if v == -1:
            return pool.clean[s](name)[0]
        return pool.anomalous[s](name)[int(v) if v >= 0 else pool.variants - int(v) - 2]

    def rows(name: str) -> np.ndarray:
        return np.stack([row(s, v, name) for s, v in zip(support, variant, strict=True)])

    bits = pool.size * pool.size
    empty = np.zeros(-(-bits // 8), np.uint8)
    packed = [row(s, v, "mask") if v >= 0 else empty for s, v in zip(support, variant, strict=True)]
    mask = np.unpackbits(np.stack(packed), axis=1, count=bits).reshape(-1, pool.size, pool.size)
    return Batch(
        Features(rows("pooled"), tuple(rows(f"level{i}") for i in range(pool.levels))),
        mask.astype(np.float32),
        (np.asarray(variant) >= 0).astype(np.int32),
        np.ones(len(support), bool),
    )


# --- the tower and the files ----------------------------------------------------------------


def encode(bank: Bank, images: Float[np.ndarray, "n s s"]) -> Features:
    """Features of any number of images, on the host; rows spread over the devices."""
    model, size = bank.clip, batch_size(bank)
    parts = []
    for start in range(0, len(images), size):
        group = images[start : start + size]
        group = preprocess.batch(group, bank.recipe)
        full = np.resize(group, (size, *group.shape[1:]))  # one shape, one compilation
        placed, _ = sharding.put(full, bank.mesh)
        features = clip.encode_images(
            bank.vision, placed, tower=model.vision_tower, mean=model.mean, std=model.std
        )
        held = jax.device_get(features)
        real = len(group)
        parts.append(jax.tree.map(lambda x, real=real: x[:real], held))
    return jax.tree.map(lambda *x: np.concatenate(x).astype(bank.dtype), *parts)


def batch_size(bank: Bank) -> int:
    return ENCODE_BATCH * bank.mesh.size


def whole(path: Path) -> bool:
    """Whether there is an undamaged bank file; a damaged one is removed."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="np"):
            return True
    except SafetensorError:
        logging.warning("%s is damaged and will be made again", path.name)
        path.unlink(missing_ok=True)
        return False


def load(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as held:
        return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118


def write(path: Path, bank: Bank, features: Features, rows: slice, extra: dict | None = None):
    """One bank file, in one piece. Raises WorkdirError if it cannot be written."""
    tensors = {"pooled": features.pooled[rows], **(extra or {})}
    tensors |= {f"level{i}": x[rows] for i, x in enumerate(features.levels)}
    files.write_bytes(path, save({n: np.ascontiguousarray(x) for n, x in tensors.items()}))


def _tokens(held: dict[str, np.ndarray]) -> list[np.ndarray]:
    levels = sum(name.startswith("level") for name in held)
    return [held["pooled"], *(held[f"level{i}"] for i in range(levels))]


def _features(tensors: list[np.ndarray]) -> Features:
    pooled, *levels = tensors
    return Features(pooled, tuple(levels))
