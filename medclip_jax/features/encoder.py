"""The bank: every image and every synthetic variant goes through the image tower once, ever.

On disk, one safetensors file per source image, named by the content of everything that shaped it:

  <cache>/bank/<recipe>/<image sha256>.safetensors              the image as it is
  <cache>/bank/<recipe>/<image sha256>-<synthesis>.safetensors  its synthetic variants

`recipe` is the digest of checkpoint, levels, frame, pixel mean, number format and preprocessing;
`synthesis` of preset, seed, number of variants, partners and augmentation. So the bank serves every
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


def encode_images(bank: cache.Bank, records: Sequence[Record]) -> int:
    """Fill the bank with the given images; returns how many had to be encoded."""
    missing = cache.lacking(records, lambda r: cache.image_path(bank, r))
    groups = list(batches(missing, batch_size(bank)))
    # this process's rows of each group, which is filled up by going round it again
    rows = [sharding.share(batch_size(bank), bank.mesh) % len(group) for group in groups]
    wanted = [g[i] for g, own in zip(groups, rows, strict=True) for i in np.unique(own)]
    images = data_records.read_all(wanted, bank.clip.size, bank.fit)
    whole_groups = zip(groups, rows, strict=True)
    for group, own in progress(whole_groups, "encode images", len(groups)):
        pixels = {i: next(images)[1] for i in np.unique(own)}
        features = encode_share(bank, np.stack([pixels[i] for i in own]), len(group))
        for i, record in enumerate(group):
            cache.write(cache.image_path(bank, record), bank, features, slice(i, i + 1))
    multihost.seen([cache.image_path(bank, r) for r in missing])
    return len(missing)


# --- the tower and the files ----------------------------------------------------------------


def encode(bank: cache.Bank, images: Float[np.ndarray, "n s s"]) -> Features:
    """Features of any number of images, on the host; rows spread over the devices."""
    size = batch_size(bank)
    rows, parts = sharding.share(size, bank.mesh), []
    for start in range(0, len(images), size):
        group = images[start : start + size]
        parts.append(encode_share(bank, group[rows % len(group)], len(group)))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def encode_share(bank: cache.Bank, images: Float[np.ndarray, "m s s"], real: int) -> Features:
    """Features of the `real` images of one batch, of which this process holds its share.

    The share has its full length, so there is one shape and one compilation.
    """
    model, images = bank.clip, preprocessing.batch(images, bank.recipe)
    placed = sharding.place(images, bank.mesh)
    features = vit.encode_images(
        bank.vision, placed, tower=model.vision_tower, mean=model.mean, std=model.std
    )
    return jax.tree.map(lambda x: x.astype(bank.dtype), sharding.fetch(features, real))


def batch_size(bank: cache.Bank) -> int:
    return ENCODE_BATCH * bank.mesh.size
