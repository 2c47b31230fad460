"""Tokens of the supports, in every form that a detector may ask for."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medclip_jax.clip.outputs import Features
from medclip_jax.data import augmentation
from medclip_jax.data.records import Record
from medclip_jax.features import cache, encoder, tiles
from medclip_jax.io import read


class Supports(NamedTuple):
    """Tokens of k supports, float32; `calibrating` are the same, or views of a single one."""

    k: int
    tokens: Features
    calibrating: Features
    # the same of their tiles, tiles² rows per image; None where images are not tiled
    tile_tokens: Features | None
    tile_calibrating: Features | None


def load(
    feature_cache: cache.FeatureCache, supports: Sequence[Record], per_side: int = 1
) -> Supports:
    """The tokens of one or more supports; encode_images (of tiles, too) comes first.

    per_side: tiles per side, 1 for none. Views of a single support are stored in the feature cache.
    """
    k = len(supports)
    (tokens,) = cache.load_images(feature_cache, supports, k)
    calibrating = tokens
    if k == 1:
        views = healthy_images(feature_cache, supports)[None]
        (calibrating,) = encoder.encode_stacks(feature_cache, views, "views")
    of_tiles = calibrating_tiles = None
    if per_side > 1:
        (packed,) = tiles.loader(per_side)(feature_cache, supports, k)
        of_tiles = calibrating_tiles = tiles.unpack(packed, per_side)
        if k == 1:
            side = tiles.side(feature_cache.clip.size, per_side)
            views = healthy_images(feature_cache, supports, side)[None]
            how = partial(tiles.encode, tiles=per_side)
            (packed,) = encoder.encode_stacks(feature_cache, views, f"{per_side} tiles", how)
            calibrating_tiles = tiles.unpack(packed, per_side)
    found: Any = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32),
        (tokens, calibrating, of_tiles, calibrating_tiles),
    )
    return Supports(k, *found)


def healthy_images(
    feature_cache: cache.FeatureCache, supports: Sequence[Record], size: int | None = None
) -> Float[np.ndarray, "m s s"]:
    """Pixels of the images that calibrate, in the encoder frame; size: another side of it."""
    images = pixels(feature_cache, supports, size or feature_cache.clip.size)
    return augmentation.crops(images[0]) if len(supports) == 1 else images


def pixels(
    feature_cache: cache.FeatureCache, supports: Sequence[Record], size: int
) -> Float[np.ndarray, "k s s"]:
    """Pixels of the supports in a frame of `size` per side."""
    found = {r.id: x for r, x in read.read_all(supports, size, feature_cache.fit)}
    return np.stack([found[r.id] for r in supports])
