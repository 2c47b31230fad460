"""TODO."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open

from medclip_jax.clip.outputs import Features
from medclip_jax.data import augmentation, records
from medclip_jax.data.records import Record
from medclip_jax.data.synthetic_variants import Synthesis, variants
from medclip_jax.distributed import multihost
from medclip_jax.distributed.runtime import progress
from medclip_jax.features import cache, encoder
from medclip_jax.features.batch import Batch
from medclip_jax.synthesis import generate

# --- synthetic variants ---------------------------------------------------------------------


def encode_variants(
    feature_cache: cache.FeatureCache, supports: Sequence[Record], recipe: Synthesis
) -> int:
    """Fill the feature cache with variants of each support; returns how many had to be encoded."""
    todo = cache.lacking(supports, lambda s: variant_path(feature_cache, s, supports, recipe))
    if not todo or not recipe.variants:
        return 0
    pixels = {
        r.id: x for r, x in records.read_all(supports, feature_cache.clip.size, feature_cache.fit)
    }
    partners = np.stack([pixels[s.id] for s in supports])
    for support in progress(todo, "make variants", len(todo)):
        images, masks, kinds = variants(support, pixels[support.id], partners, recipe)
        features = encoder.encode(feature_cache, images)
        extra = {"mask": np.packbits(masks.reshape(len(masks), -1) > 0.5, axis=1), "kind": kinds}
        cache.write(
            variant_path(feature_cache, support, supports, recipe),
            feature_cache,
            features,
            slice(None),
            extra,
        )
    multihost.wait_for_files([variant_path(feature_cache, s, supports, recipe) for s in todo])
    return len(todo) * (recipe.variants + recipe.copies)


def variant_path(
    feature_cache: cache.FeatureCache, record: Record, supports: Sequence[Record], recipe: Synthesis
) -> Path:
    partners = [s.sha256 for s in supports] if recipe.partner == "support" else []
    plain, changes = recipe[:4], (augmentation.VERSION, recipe.copies, recipe.strengths)
    parts = generate.VERSION, plain, partners, *([changes] if recipe.copies else [])
    return feature_cache.folder / f"{record.sha256}-{cache.digest(*parts)}.safetensors"


class Pool(NamedTuple):
    """Supports and their variants, opened but not read: training takes rows as it needs them."""

    clean: tuple[Callable[[str], Any], ...]  # per support: name -> lazily sliced tensor
    anomalous: tuple[Callable[[str], Any], ...]
    levels: int
    size: int  # pixels per side of the masks
    variants: int
    kinds: Int[np.ndarray, "k v"]  # of each variant, index into synthesis.KINDS
    copies: int = 0  # augmented copies per support, clean
    # a teacher's patch logits per support, [1 + variants + copies, p]; () where there is none
    teacher: tuple[Float[np.ndarray, "_ p"], ...] = ()
    inputs: bool = False  # tokens hold the tapped blocks' inputs
    source: Int[np.ndarray, " k"] | None = None  # data set of each support; None: all of one


def open_pool(
    feature_cache: cache.FeatureCache, supports: Sequence[Record], recipe: Synthesis
) -> Pool:
    """Encode what is missing and open the supports for training."""
    encoder.encode_images(feature_cache, supports)
    encode_variants(feature_cache, supports, recipe)

    def opened(paths):
        return tuple(safe_open(path, framework="np").get_slice for path in paths)

    altered = (
        opened(variant_path(feature_cache, s, supports, recipe) for s in supports)
        if recipe.variants
        else ()
    )
    kinds = [tensor("kind")[: recipe.variants] for tensor in altered] or np.zeros(
        (len(supports), 0), int
    )
    return Pool(
        opened(cache.image_path(feature_cache, s) for s in supports),
        altered,
        len(feature_cache.clip.vision_tower.levels),
        feature_cache.clip.size,
        recipe.variants,
        np.asarray(kinds),
        recipe.copies if recipe.variants else 0,
        inputs=feature_cache.clip.vision_tower.inputs,
    )


def join(pools: Sequence[Pool]) -> Pool:
    """One pool of several with the same tower and number of variants; images in order."""
    sizes = [len(p.clean) for p in pools]
    return pools[0]._replace(
        clean=sum((p.clean for p in pools), ()),
        anomalous=sum((p.anomalous for p in pools), ()),
        kinds=np.concatenate([p.kinds for p in pools]),
        teacher=sum((p.teacher for p in pools), ()),
        source=np.repeat(np.arange(len(pools)), sizes) if len(pools) > 1 else None,
    )


def take(pool: Pool, support: Int[np.ndarray, " n"], variant: Int[np.ndarray, " n"]) -> Batch:
    """Rows of the pool as a batch on the host.

    variant: -1 is the image itself (Identity), -2 - c its augmented copy c, both clean.
    """

    def row(s, v, name: str) -> np.ndarray:
        if v == -1:
            return pool.clean[s](name)[0]
        return pool.anomalous[s](name)[int(v) if v >= 0 else pool.variants - int(v) - 2]

    # the copies of params often meet the same row in one step: each is read once
    distinct, place = np.unique(np.stack([support, variant], 1), axis=0, return_inverse=True)

    def rows(name: str) -> Any:  # of the host, until a step takes it
        return np.stack([row(s, v, name) for s, v in distinct])[place.ravel()]

    v = np.asarray(variant)
    taught: Any = None
    if pool.teacher:
        at = np.where(v >= -1, v + 1, pool.variants - v - 1)
        taught = np.stack([pool.teacher[s][i] for s, i in zip(support, at, strict=True)])
    empty = np.zeros(-(-(bits := pool.size**2) // 8), np.uint8)
    packed = np.stack([row(s, v, "mask") if v >= 0 else empty for s, v in distinct])
    mask: Any = np.unpackbits(packed, axis=1, count=bits)
    mask = mask.reshape(-1, pool.size, pool.size)[place.ravel()]
    label: Any = (v >= 0).astype(np.int32)
    valid: Any = np.ones(len(support), bool)
    return Batch(
        Features(
            rows("pooled"),
            tuple(rows(f"level{i}") for i in range(pool.levels)),
            tuple(rows(f"input{i}") for i in range(pool.levels if pool.inputs else 0)),
        ),
        *(mask, label, valid),
        teacher=taught,
        source=None if pool.source is None else pool.source[support],
    )
