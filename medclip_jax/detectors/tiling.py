"""Image scales: the whole image and overlapping tiles of it, fused in the original frame.

A tile is a square of the image read at a higher resolution, so that a lesion of few pixels fills
more of the tower's view. Tiles go through the tower once and are kept in the feature cache, by the content
of the image, under a name of their own. Every detector of detector.py scores tiles as it scores
images; the memory is one of tiles, the learned prompts are those of whole images. Each scale's
values are standardised on its held-out supports; where tiles overlap they are averaged, and the
scales are averaged after that.

Tokens of an image and of its tiles travel as one Features: `pooled` of the whole, and in every
level the patches of the whole followed by those of the tiles, row by row.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip.outputs import Features
from medclip_jax.data import records as data_records
from medclip_jax.data.records import Record
from medclip_jax.detectors import calibration, memory_bank
from medclip_jax.detectors.detector import Detector
from medclip_jax.distributed import multihost
from medclip_jax.distributed.runtime import batches, progress
from medclip_jax.errors import ConfigError
from medclip_jax.features import cache, encoder, support_images
from medclip_jax.io import read

VERSION = 1  # of tiles; another number makes new names in the feature cache
OVERLAP = 0.25  # of a tile's side that it shares with the next
FINE = 2  # patches of the fused map per patch of the whole, along a side


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


# --- the feature cache -----------------------------------------------------------------------------------


def tiles_path(feature_cache: cache.FeatureCache, record: Record, tiles: int):
    """The feature cache file of an image's tiles."""
    named = cache.digest("tiles", VERSION, OVERLAP, tiles)
    return feature_cache.folder / f"{record.sha256}-{named}.safetensors"


def encode_images(feature_cache: cache.FeatureCache, records: Sequence[Record], tiles: int) -> int:
    """Fill the feature cache with the tiles of the images; returns how many images lacked them."""
    missing = cache.missing(records, lambda r: tiles_path(feature_cache, r, tiles))
    size, count = feature_cache.clip.size, tiles**2
    arriving = data_records.read_all(missing, side(size, tiles), feature_cache.fit)
    per = max(1, encoder.batch_size(feature_cache) // count)
    for group in progress(batches(arriving, per), "encode tiles", -(-len(missing) // per)):
        tokens = encoder.encode(feature_cache, cut(np.stack([x for _, x in group]), size, tiles))
        for i, (record, _) in enumerate(group):
            own = jax.tree.map(lambda x, i=i: x[i * count : (i + 1) * count], tokens)
            cache.write(tiles_path(feature_cache, record, tiles), own)
    multihost.wait_for_files([tiles_path(feature_cache, r, tiles) for r in missing])
    return len(missing)


def loader(tiles: int) -> Callable:
    """What a detector of tiles reads in place of features.load_images, with its arguments.

    encode_images comes first, for images and for tiles.
    """

    def load(
        feature_cache: cache.FeatureCache, records: Sequence[Record], size: int
    ) -> Iterator[Features]:
        whole = cache.load_images(feature_cache, records, size)
        for group, tokens in zip(batches(records, size), whole, strict=True):
            held = [cache.load(tiles_path(feature_cache, r, tiles)) for r in group]
            parts = [np.stack([x.levels[i] for x in held]) for i in range(len(tokens.levels))]
            yield pack(tokens, parts)

    return load


def pack(whole: Features, tiles: Sequence[Any]) -> Features:
    """One Features of an image and of its tiles; tiles: per level [n, tiles², p, d]."""
    levels: list[Any] = [  # of the host
        np.concatenate([v, t.reshape(len(v), -1, v.shape[-1])], 1)
        for v, t in zip(whole.levels, tiles, strict=True)
    ]
    return Features(whole.pooled, tuple(levels))


def encode(
    feature_cache: cache.FeatureCache, images: Float[np.ndarray, "n b b"], tiles: int
) -> Features:
    """Packed tokens, on the host, of images in the frame of `side`; nothing is kept."""
    size = feature_cache.clip.size
    whole = encoder.encode(feature_cache, np.stack([read.fit(x, size) for x in images]))
    if tiles == 1:
        return whole
    tokens = encoder.encode(feature_cache, cut(images, size, tiles))
    shape = (len(images), tiles**2)
    return pack(whole, [x.reshape(*shape, *x.shape[1:]) for x in tokens.levels])


# --- the detector -------------------------------------------------------------------------------


def build(
    name: str,
    whole: Detector,
    feature_cache: cache.FeatureCache,
    supports: Sequence[Record],
    tiles: int,
    coreset: float,
) -> Detector:
    """The detector `whole` of a method, `name`, widened by tiles; encode_images comes first.

    The memory of tiles holds a support's tiles out together. coreset: as detector.build.
    """
    k, count, grid = len(supports), tiles**2, feature_cache.clip.grid
    (packed,) = loader(tiles)(feature_cache, supports, k)
    held = packed
    if k == 1:
        images = support_images.healthy_images(
            feature_cache, supports, side(feature_cache.clip.size, tiles)
        )
        how = partial(encode, tiles=tiles)
        (held,) = encoder.encode_stacks(feature_cache, images[None], f"{tiles} tiles", how)
    tokens, shown = (side_by_side(x, tiles, grid**2) for x in (packed, held))
    if name == "memory":
        small = memory_bank.remember(tokens, coreset, shown if k == 1 else None, rows=count)
    elif whole.without is not None:
        rows = [slice(i * count, (i + 1) * count) for i in range(len(held.pooled))]
        each = [
            whole.without(i, jax.tree.map(lambda x, r=r: x[r], shown)) for i, r in enumerate(rows)
        ]
        small = whole._replace(held_out=np.concatenate(each))
    else:
        raise ConfigError(f"method {name} holds no support out: train with config.score.tiles=1")
    return widen(whole, small, tiles, grid, feature_cache.clip.size)


def part(packed: Features, i: int, patches: int) -> Features:
    """Scale 0 (the whole) or tile i - 1 of packed tokens."""
    rows = slice(i * patches, (i + 1) * patches)
    return packed._replace(levels=tuple(x[:, rows] for x in packed.levels))


def side_by_side(packed: Features, tiles: int, patches: int) -> Features:
    """The tiles as images of their own, tiles² per image in order."""
    count = tiles**2
    levels = tuple(x[:, patches:].reshape(-1, patches, x.shape[-1]) for x in packed.levels)
    many = Features(jnp.repeat(jnp.asarray(packed.pooled), count, 0), levels)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), many)


@functools.cache
def spreading(grid: int, size: int, tiles: int) -> Float[np.ndarray, "i f p"]:
    """[1 + tiles², fine², grid²]: how each scale's patches reach the fused map.

    Bilinear with aligned corners, as score.to_pixels. Row f of the tiles together sums to 1: the
    average of those that cover the point. The whole is matrix 0.
    """
    fine, frame = FINE * grid, side(size, tiles)
    at = np.arange(fine) * (frame - 1) / (fine - 1)  # pixels of the large frame

    def along(start: float, width: float) -> np.ndarray:
        place = (at - start) / (width - 1) * (grid - 1)
        inside = (place > -1e-9) & (place < grid - 1 + 1e-9)
        hat = np.maximum(0, 1 - np.abs(np.clip(place, 0, grid - 1)[:, None] - np.arange(grid)))
        return hat * inside[:, None]

    whole = np.kron(along(0, frame), along(0, frame))
    each = np.stack([np.kron(along(r, size), along(c, size)) for r, c in starts(size, tiles)])
    each /= each.sum((0, 2))[None, :, None]
    return np.concatenate([whole[None], each]).astype(np.float32)


def widen(whole: Detector, small: Detector, tiles: int, grid: int, size: int) -> Detector:
    """A detector of packed tokens from one of images and one of tiles.

    `small.held_out` are the tiles of what `whole.held_out` are, tiles² each in order. Patch values
    are in units of the healthy spread and stand on a grid FINE times as fine. Image scores that do
    not come from patches are those of the whole image.
    """
    patches, count = grid**2, tiles**2
    spread = jnp.asarray(spreading(grid, size, tiles))
    unit = [(d.held_out.mean(), calibration.spread(d.held_out.ravel())) for d in (whole, small)]

    def fused(read: Callable[[Detector, Features], Array], packed: Features) -> Array:
        """Mean of the scales; read: values [..., p] of tokens that are one scale's."""
        total: Any = 0.0
        for i in range(1 + count):
            (centre, width), one = unit[min(i, 1)], (whole, small)[min(i, 1)]
            z = (read(one, part(packed, i, patches)) - centre) / width
            total = total + jnp.einsum("...p,fp->...f", z, spread[i])
        return total / 2

    def through(name: str) -> Any:
        if getattr(whole, name) is None:
            return None
        return lambda packed, *more: fused(lambda d, x: getattr(d, name)(x, *more), packed)

    def left_out(name: str) -> Any:
        if getattr(whole, name) is None:
            return None
        return lambda i, packed: fused(lambda d, x: getattr(d, name)(i, x), packed)

    of_tiles = small.held_out.reshape(-1, count, patches)
    seen = [whole.held_out, *np.moveaxis(of_tiles, 1, 0)]
    values = 0.0
    for i, raw in enumerate(seen):
        centre, width = unit[min(i, 1)]
        values = values + (raw - centre) / width @ np.asarray(spread[i]).T
    of_whole = whole.image
    image = None if of_whole is None else lambda b: of_whole(part(b, 0, patches))
    return whole._replace(
        patches=through("patches"),
        held_out=np.asarray(values / 2, np.float32),
        passes=through("passes"),
        image=image,
        without=left_out("without"),
        copies=through("copies"),
        load=loader(tiles),
        choose=None,
        chosen=None,
    )
