"""The feature cache: every image and every synthetic variant goes through the image tower once, ever.

On disk, one safetensors file per source image, named by the content of everything that shaped it:

  <cache>/feature_cache/<recipe>/<image sha256>.safetensors              the image as it is
  <cache>/feature_cache/<recipe>/<image sha256>-<synthesis>.safetensors  its synthetic variants

`recipe` is the digest of checkpoint, levels, frame, pixel mean, number format and preprocessing;
`synthesis` of preset, seed, number of variants, partners and augmentation. So the feature cache serves every
K, seed and method, and whatever changes tokens changes a name. A file appears whole (written
beside, then renamed); one that is damaged is made again. Tensors: `pooled` [v, d], `level0` …
[v, p, d], with refinement `input0` … [v, s, d], for variants also `mask` [v, bytes] (packed bits)
and `kind` [v]; augmented copies follow the variants there.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from medclip_jax.clip import vit
from medclip_jax.clip.outputs import Features
from medclip_jax.data import preprocessing
from medclip_jax.data import records as data_records
from medclip_jax.data.records import Record
from medclip_jax.distributed import multihost, sharding
from medclip_jax.distributed.runtime import batches, progress
from medclip_jax.features import cache

ENCODE_BATCH = 16  # images per call of the tower and device; larger is not faster on a CPU


# --- images as they are ---------------------------------------------------------------------


def encode_images(feature_cache: cache.FeatureCache, records: Sequence[Record]) -> int:
    """Fill the feature cache with the given images; returns how many had to be encoded."""
    missing = cache.lacking(records, lambda r: cache.image_path(feature_cache, r))
    groups = list(batches(missing, batch_size(feature_cache)))
    # this process's rows of each group, which is filled up by going round it again
    rows = [
        sharding.local_rows(batch_size(feature_cache), feature_cache.mesh) % len(group)
        for group in groups
    ]
    wanted = [g[i] for g, own in zip(groups, rows, strict=True) for i in np.unique(own)]
    images = data_records.read_all(wanted, feature_cache.clip.size, feature_cache.fit)
    whole_groups = zip(groups, rows, strict=True)
    for group, own in progress(whole_groups, "encode images", len(groups)):
        pixels = {i: next(images)[1] for i in np.unique(own)}
        features = encode_share(feature_cache, np.stack([pixels[i] for i in own]), len(group))
        for i, record in enumerate(group):
            cache.write(
                cache.image_path(feature_cache, record), feature_cache, features, slice(i, i + 1)
            )
    multihost.wait_for_files([cache.image_path(feature_cache, r) for r in missing])
    return len(missing)


# --- the tower and the files ----------------------------------------------------------------


def encode(feature_cache: cache.FeatureCache, images: Float[np.ndarray, "n s s"]) -> Features:
    """Features of any number of images, on the host; rows spread over the devices."""
    size = batch_size(feature_cache)
    rows, parts = sharding.local_rows(size, feature_cache.mesh), []
    for start in range(0, len(images), size):
        group = images[start : start + size]
        parts.append(encode_share(feature_cache, group[rows % len(group)], len(group)))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def encode_share(
    feature_cache: cache.FeatureCache, images: Float[np.ndarray, "m s s"], real: int
) -> Features:
    """Features of the `real` images of one batch, of which this process holds its share.

    The share has its full length, so there is one shape and one compilation.
    """
    model, images = feature_cache.clip, preprocessing.batch(images, feature_cache.recipe)
    placed = sharding.place(images, feature_cache.mesh)
    features = vit.encode_images(
        feature_cache.vision, placed, tower=model.vision_tower, mean=model.mean, std=model.std
    )
    return jax.tree.map(lambda x: x.astype(feature_cache.dtype), sharding.fetch(features, real))


def batch_size(feature_cache: cache.FeatureCache) -> int:
    return ENCODE_BATCH * feature_cache.mesh.size
