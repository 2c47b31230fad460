"""The training pool: healthy images and their synthetic variants as tokens, read row by row."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open

from medclip_jax.clip.outputs import Features
from medclip_jax.data import augmentation
from medclip_jax.data.augmentation import Synthesis, variants
from medclip_jax.data.records import Record
from medclip_jax.distributed import multihost
from medclip_jax.distributed.runtime import progress
from medclip_jax.features import cache, encoder
from medclip_jax.features.batch import Batch, Views
from medclip_jax.features.cache import FeatureCache
from medclip_jax.io import read
from medclip_jax.synthesis import generate

Tensors = Callable[[str], Any]  # name -> lazily sliced tensor of a cache file


class TrainingPool(NamedTuple):
    """Images and their variants, opened but not read: training takes rows as it needs them."""

    clean: tuple[Tensors, ...]  # per image
    anomalous: tuple[Tensors, ...]
    levels: int
    size: int  # pixels per side of the masks
    variants: int  # anomalous ones per image
    kinds: Int[np.ndarray, "k v"]  # of each variant, index into generate.KINDS
    copies: int = 0  # augmented copies per image, clean
    # a teacher's patch logits per image, [1 + variants + copies, p]; () where there is none
    teacher: tuple[Float[np.ndarray, "_ p"], ...] = ()
    inputs: bool = False  # tokens hold the tapped layers' inputs
    source: Int[np.ndarray, " k"] | None = None  # dataset of each image; None: all of one


def open(
    feature_cache: FeatureCache, images: Sequence[Record], synthesis: Synthesis
) -> TrainingPool:
    """Encode what the cache lacks and open the images for training.

    Args:
      feature_cache: to read and to fill.
      images: healthy ones.
      synthesis: how their variants are made; variants=0 for none.
    """
    encoder.encode_images(feature_cache, images)
    encode_variants(feature_cache, images, synthesis)

    def opened(paths):
        return tuple(safe_open(path, framework="np").get_slice for path in paths)

    altered = synthesis.variants and images
    anomalous = opened(variant_path(feature_cache, r, images, synthesis) for r in altered or ())
    kinds = [tensor("kind")[: synthesis.variants] for tensor in anomalous]
    return TrainingPool(
        opened(cache.image_path(feature_cache, r) for r in images),
        anomalous,
        len(feature_cache.clip.image_encoder.levels),
        feature_cache.clip.size,
        synthesis.variants,
        np.asarray(kinds or np.zeros((len(images), 0), int)),
        synthesis.copies if synthesis.variants else 0,
        inputs=feature_cache.clip.image_encoder.inputs,
    )


def encode_variants(
    feature_cache: FeatureCache, images: Sequence[Record], synthesis: Synthesis
) -> int:
    """Fill the cache with variants of each image; returns how many had to be encoded."""

    def path(record: Record) -> Path:
        return variant_path(feature_cache, record, images, synthesis)

    todo = cache.missing(images, path)
    if not todo or not synthesis.variants:
        return 0
    size, fit = feature_cache.clip.size, feature_cache.fit
    pixels = {r.id: x for r, x in read.read_all(images, size, fit)}
    partners = np.stack([pixels[r.id] for r in images])
    for record in progress(todo, "make variants", len(todo)):
        altered, masks, kinds = variants(record, pixels[record.id], partners, synthesis)
        packed = np.packbits(masks.reshape(len(masks), -1) > 0.5, axis=1)
        tokens = encoder.encode(feature_cache, altered)
        cache.write(path(record), tokens, {"mask": packed, "kind": kinds})
    multihost.wait_for_files([path(r) for r in todo])
    return len(todo) * (synthesis.variants + synthesis.copies)


def variant_path(
    feature_cache: FeatureCache, record: Record, images: Sequence[Record], synthesis: Synthesis
) -> Path:
    """The file of an image's variants; `images` count where variants copy from them."""
    partners = [r.sha256 for r in images] if synthesis.partner == "support" else []
    changes = (augmentation.VERSION, synthesis.copies, synthesis.strengths)
    parts = generate.VERSION, synthesis[:4], partners, *([changes] if synthesis.copies else [])
    return feature_cache.folder / f"{record.sha256}-{cache.digest(*parts)}.safetensors"


def join(pools: Sequence[TrainingPool]) -> TrainingPool:
    """One pool of several with the same encoder and number of variants; images in order."""
    sizes = [len(p.clean) for p in pools]
    return pools[0]._replace(
        clean=sum((p.clean for p in pools), ()),
        anomalous=sum((p.anomalous for p in pools), ()),
        kinds=np.concatenate([p.kinds for p in pools]),
        teacher=sum((p.teacher for p in pools), ()),
        source=np.repeat(np.arange(len(pools)), sizes) if len(pools) > 1 else None,
    )


def take(
    pool: TrainingPool,
    image: Int[np.ndarray, "*n"],
    variant: Int[np.ndarray, "*n"],
    views: Sequence[np.ndarray] = (),
) -> Batch:
    """Rows of the pool as a batch on the host, in the shape of `image`.

    Args:
      pool: to read.
      image: number of each row's image.
      variant: of the image; -1 is the image itself, -2 - c its augmented copy c, both clean.
      views: variants of two views of each row's image, for SimCLR; or none.
    """
    batch = _rows(pool, image.ravel(), variant.ravel())
    if len(views):
        one, two = (_rows(pool, image.ravel(), view.ravel()).features for view in views)
        number: Any = image.ravel()
        batch = batch._replace(views=Views(one, two, number))
    return jax.tree.map(lambda x: x.reshape(*image.shape, *x.shape[1:]), batch)


def _rows(pool: TrainingPool, image: np.ndarray, variant: np.ndarray) -> Batch:

    def row(i, v, name: str) -> np.ndarray:
        if v == -1:
            return pool.clean[i](name)[0]
        return pool.anomalous[i](name)[int(v) if v >= 0 else pool.variants - int(v) - 2]

    # main and fold params often meet the same row in one step: each is read once
    distinct, place = np.unique(np.stack([image, variant], 1), axis=0, return_inverse=True)
    place = place.ravel()

    def rows(name: str) -> Any:  # of the host, until a step takes it
        return np.stack([row(i, v, name) for i, v in distinct])[place]

    teacher: Any = None
    if pool.teacher:
        number = np.where(variant >= -1, variant + 1, pool.variants - variant - 1)
        teacher = np.stack([pool.teacher[i][j] for i, j in zip(image, number, strict=True)])
    bits = pool.size**2
    empty = np.zeros(-(-bits // 8), np.uint8)
    packed = np.stack([row(i, v, "mask") if v >= 0 else empty for i, v in distinct])
    mask: Any = np.unpackbits(packed, axis=1, count=bits)
    label: Any = (variant >= 0).astype(np.int32)
    valid: Any = np.ones(len(image), bool)
    return Batch(
        Features(
            rows("pooled"),
            tuple(rows(f"level{i}") for i in range(pool.levels)),
            tuple(rows(f"input{i}") for i in range(pool.levels if pool.inputs else 0)),
        ),
        mask.reshape(-1, pool.size, pool.size)[place],
        label,
        valid,
        teacher=teacher,
        source=None if pool.source is None else pool.source[image],
    )
