"""Overlapping tiles of images: cut at a higher resolution, encoded once, kept in the feature cache.

Tokens of an image and of its tiles travel as one Features: `pooled` of the whole, and in every
layer the patches of the whole followed by those of the tiles, row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medclip_jax.clip.layers import Features
from medclip_jax.data import augmentation
from medclip_jax.data.records import Record
from medclip_jax.distributed import multihost
from medclip_jax.distributed.runtime import batches, progress
from medclip_jax.features import cache, encoder
from medclip_jax.io import read

VERSION = 1  # of tiles; another number makes new names in the feature cache
OVERLAP = 0.25  # of a tile's side that it shares with the next


def side(size: int, tiles: int) -> int:
    """Pixels of the frame that `tiles` overlapping squares of `size` cover along a side."""
    return round(size * (tiles - (tiles - 1) * OVERLAP))


def starts(size: int, tiles: int) -> list[tuple[int, int]]:
    """Upper left corner of every tile in a frame of `side`, row by row; the last ends with it."""
    at = [round(i * (side(size, tiles) - size) / (tiles - 1)) for i in range(tiles)]
    return [(row, column) for row in at for column in at]


def cut(images: Float[np.ndarray, "n b b"], size: int, tiles: int) -> Float[np.ndarray, "m s s"]:
    """The tiles of images in the large frame: tiles² per image, in order."""
    each = [images[:, r : r + size, c : c + size] for r, c in starts(size, tiles)]
    return np.stack(each, 1).reshape(-1, size, size)


def tiles_path(feature_cache: cache.FeatureCache, record: Record, tiles: int) -> Path:
    """The feature cache file of an image's tiles."""
    name = cache.digest("tiles", VERSION, OVERLAP, tiles)
    return feature_cache.folder / f"{record.sha256}-{name}.safetensors"


def encode_images(feature_cache: cache.FeatureCache, records: Sequence[Record], tiles: int) -> int:
    """Fill the feature cache with the tiles of the images; returns how many images lacked them."""
    missing = cache.missing(records, lambda r: tiles_path(feature_cache, r, tiles))
    size, count = feature_cache.clip.size, tiles**2
    arriving = read.read_all(missing, side(size, tiles), feature_cache.fit)
    per = max(1, encoder.batch_size(feature_cache) // count)
    for group in progress(batches(arriving, per), "encode tiles", -(-len(missing) // per)):
        tokens = encoder.encode(feature_cache, cut(np.stack([x for _, x in group]), size, tiles))
        for i, (record, _) in enumerate(group):
            own = jax.tree.map(lambda x, i=i: x[i * count : (i + 1) * count], tokens)
            cache.write(tiles_path(feature_cache, record, tiles), own)
    multihost.wait_for_files([tiles_path(feature_cache, r, tiles) for r in missing])
    return len(missing)


def loader(tiles: int) -> Callable[..., Iterator[Features]]:
    """What reads packed tokens in the place of cache.load_images, with its arguments.

    encode_images comes first, for images and for tiles.
    """

    def load(feature_cache, records: Sequence[Record], size: int) -> Iterator[Features]:
        whole = cache.load_images(feature_cache, records, size)
        for group, tokens in zip(batches(records, size), whole, strict=True):
            rows = [cache.load(tiles_path(feature_cache, r, tiles)) for r in group]
            parts = [np.stack([x.levels[i] for x in rows]) for i in range(len(tokens.levels))]
            yield pack(tokens, parts)

    return load


def pack(whole: Features, tiles: Sequence[Any]) -> Features:
    """One Features of images and of their tiles; tiles: per layer [n, tiles², p, d]."""
    levels: list[Any] = [  # on the host
        np.concatenate([v, t.reshape(len(v), -1, v.shape[-1])], 1)
        for v, t in zip(whole.levels, tiles, strict=True)
    ]
    return Features(whole.pooled, tuple(levels))


def unpack(packed: Features, tiles: int) -> Features:
    """The tiles as images of their own, tiles² per image in order; pooled is that of the image."""
    count = tiles**2
    patches = packed.levels[0].shape[1] // (1 + count)
    levels = tuple(x[:, patches:].reshape(-1, patches, x.shape[-1]) for x in packed.levels)
    return Features(packed.pooled.repeat(count, 0), levels)


def encode(
    feature_cache: cache.FeatureCache, images: Float[np.ndarray, "n b b"], tiles: int
) -> Features:
    """Packed tokens, on the host, of images in the frame of `side`; nothing is stored."""
    size = feature_cache.clip.size
    whole = encoder.encode(feature_cache, np.stack([read.fit(x, size) for x in images]))
    tokens = encoder.encode(feature_cache, cut(images, size, tiles))
    shape = (len(images), tiles**2)
    return pack(whole, [x.reshape(*shape, *x.shape[1:]) for x in tokens.levels])


# --- the supports ---


class Supports(NamedTuple):
    """Tokens of k supports, float32; `calibrating` are the same, or views of a single one."""

    k: int
    tokens: Features
    calibrating: Features
    # the same of their tiles, tiles² rows per image; None where images are not tiled
    tile_tokens: Features | None
    tile_calibrating: Features | None


def load_supports(
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
        (packed,) = loader(per_side)(feature_cache, supports, k)
        of_tiles = calibrating_tiles = unpack(packed, per_side)
        if k == 1:
            frame = side(feature_cache.clip.size, per_side)
            views = healthy_images(feature_cache, supports, frame)[None]
            how = partial(encode, tiles=per_side)
            (packed,) = encoder.encode_stacks(feature_cache, views, f"{per_side} tiles", how)
            calibrating_tiles = unpack(packed, per_side)
    found: Any = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32),
        (tokens, calibrating, of_tiles, calibrating_tiles),
    )
    return Supports(k, *found)


def healthy_images(
    feature_cache: cache.FeatureCache, supports: Sequence[Record], size: int | None = None
) -> Float[np.ndarray, "m s s"]:
    """Pixels of the images that calibrate, in the encoder frame; size: another side of it."""
    size = size or feature_cache.clip.size
    found = {r.id: x for r, x in read.read_all(supports, size, feature_cache.fit)}
    images = np.stack([found[r.id] for r in supports])
    return augmentation.crops(images[0]) if len(supports) == 1 else images
