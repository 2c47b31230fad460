"""Two image scales as one detector: the whole image and overlapping tiles of it.

A tile is a square of the image read at a higher resolution, so that a lesion of few pixels fills
more of the encoder's view; every detector scores tiles as it scores images. Features are packed
ones (`pack`), which are encoded once and kept in the feature cache.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medclip_jax import stored
from medclip_jax.clip.layers import Features, joined
from medclip_jax.data import augmentation
from medclip_jax.data.layouts import Record
from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.distributed import runtime
from medclip_jax.distributed.runtime import batches, progress
from medclip_jax.features import cache, encoder
from medclip_jax.io import read

FINE = 2  # patches of the fused map per patch of the whole, along a side
VERSION = 1  # of tiles; another number makes new names in the feature cache
OVERLAP = 0.25  # of a tile's side that it shares with the next


@lru_cache
def spreading(grid: int, size: int, tiles: int) -> Float[np.ndarray, "i f p"]:
    """[1 + tiles², fine², grid²]: how each scale's patches reach the fused map.

    Bilinear between the patches' centres, as similarity.to_pixels. Row f of the tiles together
    sums to 1: the average of those that cover the point. The whole is matrix 0.
    """
    fine, frame = FINE * grid, side(size, tiles)
    points = (np.arange(fine) + 0.5) * frame / fine  # middles of the fine cells, in large pixels

    def along(start: float, width: float) -> np.ndarray:
        place = (points - start) / width * grid - 0.5
        inside = (points > start) & (points < start + width)
        hat = np.maximum(0, 1 - np.abs(np.clip(place, 0, grid - 1)[:, None] - np.arange(grid)))
        return hat * inside[:, None]

    whole = np.kron(along(0, frame), along(0, frame))
    corners = starts(size, tiles)
    each = np.stack([np.kron(along(r, size), along(c, size)) for r, c in corners])
    each /= each.sum((0, 2))[None, :, None]
    return np.concatenate([whole[None], each]).astype(np.float32)


def part(packed: Features, i: int, scales: int) -> Features:
    """Scale 0 (the whole) or tile i - 1 of packed tokens, of which each scale has as many."""

    def rows(each: tuple) -> tuple:
        return tuple(jnp.split(x, scales, axis=1)[i] for x in each)

    return packed._replace(levels=rows(packed.levels), inputs=rows(packed.inputs))


def units_of(healthy: Sequence[Float[np.ndarray, "_ _"]]) -> Float[np.ndarray, "2 2"]:
    """Mean and standard deviation of the patches of the whole images, then of the tiles."""
    return np.asarray([(x.mean(), calibration.spread(x.ravel())) for x in healthy], np.float32)


def scorer(
    apply: Callable, tiles: int, grid: int, size: int, pool: Callable | None
) -> Callable[..., Scores]:
    """The `apply` of packed tokens: each scale standardised, tiles averaged, then the scales.

    Params are {whole, tiles, units}: those of `apply` for each scale, and `units_of`. The rest is
    as in `build`.
    """
    spread = spreading(grid, size, tiles)

    def packed_apply(params, packed, key):
        names = ["whole"] + ["tiles"] * tiles**2
        scores = [
            apply(params[name], part(packed, i, len(names)), key) for i, name in enumerate(names)
        ]
        return fused(spread, scores[0].image, [s.patch for s in scores], params["units"], pool)

    return packed_apply


def fused(spread: Any, image: Any, patches: Sequence[Any], units: Any, pool) -> Scores:
    """Mean of the scales; patches: values [n, p] of the whole, then of every tile."""
    total: Any = 0.0
    for i, values in enumerate(patches):
        centre, width = units[min(i, 1)]
        total = total + ((values - centre) / width) @ spread[i].T
    return Scores(total / 2, image if pool is None else pool(total / 2))


def build(
    whole: Detector, small: Detector, tiles: int, grid: int, pool: Callable | None
) -> Detector:
    """A detector of packed tokens, see `scorer`.

    Args:
        whole: of images.
        small: of their tiles; `calibration` are the tiles of the rows of whole's, in order.
        tiles: per side.
        grid: patches per side of the whole. The fused map is FINE times as fine.
        pool: patch values [n, p] -> image scores [n]; None: they are those of the whole image.
    """
    count, spread = 1 + tiles**2, spreading(grid, whole.size, tiles)
    detectors = {"whole": whole, "tiles": small}
    k, image = whole.k, whole.calibration.image
    # of every scale [rows, patches], the tiles of an image in one row
    healthy = [d.calibration.patch.reshape(len(image), -1) for d in detectors.values()]
    units = units_of(healthy)

    of_tiles = small.calibration.patch.reshape(-1, count - 1, grid**2)
    patches = [jnp.asarray(x) for x in (whole.calibration.patch, *np.moveaxis(of_tiles, 1, 0))]
    own = []
    for i in range(k) if k > 1 else ():  # a support is standardised by the others
        of_others = units_of([np.delete(x, i, 0) for x in healthy])
        rows = [x[i : i + 1] for x in patches]
        own.append(fused(spread, image[i : i + 1], rows, of_others, pool))
    own = own or [fused(spread, image, patches, units, pool)]
    folds = {n: d.fold_params for n, d in detectors.items() if d.fold_params is not None}
    return whole._replace(
        apply=scorer(whole.apply, tiles, grid, whole.size, pool),
        params={n: d.params for n, d in detectors.items()} | {"units": jnp.asarray(units)},
        fold_params=folds or None,
        calibration=jax.tree.map(lambda *x: np.concatenate(x), *own),
        read=loader(tiles),
        scales=count,
        proven=tuple(x for x in whole.proven if x == "image" and pool is None),
    )


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
    name = stored.digest(["tiles", VERSION, OVERLAP, tiles])
    return feature_cache.folder / f"{record.sha256}-{name}.safetensors"


def encode_images(feature_cache: cache.FeatureCache, records: Sequence[Record], tiles: int) -> int:
    """Fill the feature cache with the tiles of the images; returns how many images lacked them."""
    missing = cache.missing(records, lambda r: tiles_path(feature_cache, r, tiles))
    size, count = feature_cache.clip.size, tiles**2
    per = max(1, encoder.batch_size(feature_cache) // count)
    groups = list(batches(missing, per))
    arriving = read.read_all(missing, side(size, tiles), feature_cache.fit)
    stacks = (
        cut(np.stack([next(arriving)[1] for _ in group]), size, tiles)
        for group in progress(groups, "encode tiles", len(groups))
    )
    encoded = encoder.encode_batches(feature_cache, stacks, per * count)
    for group, tokens in zip(groups, encoded, strict=True):
        for i, record in enumerate(group):
            own = jax.tree.map(lambda x, i=i: x[i * count : (i + 1) * count], tokens)
            cache.write(feature_cache, tiles_path(feature_cache, record, tiles), own)
    runtime.wait_for_files([tiles_path(feature_cache, r, tiles) for r in missing])
    return len(missing)


def loader(tiles: int) -> Callable[..., Iterator[Features]]:
    """What reads packed tokens as cache.load_images reads tokens; both were encoded before."""

    def load(feature_cache, records: Sequence[Record], size: int) -> Iterator[Features]:
        def packed(record: Record) -> Features:
            whole = cache.load(cache.image_path(feature_cache, record))
            return pack(whole, cache.load(tiles_path(feature_cache, record, tiles)))

        for group in batches(records, size):
            yield joined([packed(r) for r in group])

    return load


def pack(whole: Features, tiles: Features) -> Features:
    """One Features of n images and of their tiles, which are rows of their own, image by image."""

    def with_tiles(v: Any, t: Any) -> Any:  # on the host
        return np.concatenate([v, t.reshape(len(v), -1, v.shape[-1])], 1)

    levels, inputs = (
        tuple(map(with_tiles, own, parts))
        for own, parts in ((whole.levels, tiles.levels), (whole.inputs, tiles.inputs))
    )
    return Features(whole.pooled, levels, inputs)


def unpack(packed: Features, tiles: int) -> Features:
    """The tiles as images of their own, tiles² per image in order; pooled is that of the image."""
    count = tiles**2

    def parts(x: Any) -> Any:
        each = x.shape[1] // (1 + count)
        return x[:, each:].reshape(-1, each, x.shape[-1])

    levels, inputs = (tuple(map(parts, x)) for x in (packed.levels, packed.inputs))
    return Features(packed.pooled.repeat(count, 0), levels, inputs)


def encode(
    feature_cache: cache.FeatureCache, images: Float[np.ndarray, "n b b"], tiles: int
) -> Features:
    """Packed tokens, on the host, of images in the frame of `side`; nothing is stored."""
    size = feature_cache.clip.size
    whole = encoder.encode(feature_cache, np.stack([read.fit(x, size) for x in images]))
    return pack(whole, encoder.encode(feature_cache, cut(images, size, tiles)))


def views(
    pixels: Float[np.ndarray, "h w"], size: int, tiles: int, fit: read.Mode
) -> Float[np.ndarray, "v s s"]:
    """An image in the encoder frame, then its tiles."""
    whole = read.fit(pixels, size, fit)[None]
    if tiles == 1:
        return whole
    return np.concatenate([whole, cut(read.fit(pixels, side(size, tiles), fit)[None], size, tiles)])


def join_views(tokens: Features, count: int) -> Features:
    """Packed tokens of images from those of all their `views`, `count` each, image by image."""
    levels, inputs = (
        tuple(x.reshape(len(x) // count, -1, x.shape[-1]) for x in each)
        for each in (tokens.levels, tokens.inputs)
    )
    return Features(tokens.pooled[::count], levels, inputs)


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
