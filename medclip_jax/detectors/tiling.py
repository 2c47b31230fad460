"""Two image scales as one detector: the whole image and overlapping tiles of it.

A tile is a square of the image read at a higher resolution, so that a lesion of few pixels fills
more of the encoder's view. Every detector scores tiles as it scores images. Each scale's values are
standardised on its held-out supports (a support by the others, when it calibrates); where tiles
overlap they are averaged, and the scales are averaged after that. Features are packed ones
(features/tiles.py).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medclip_jax.clip.layers import Features
from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.features import tiles as features_tiles

FINE = 2  # patches of the fused map per patch of the whole, along a side


@functools.cache
def spreading(grid: int, size: int, tiles: int) -> Float[np.ndarray, "i f p"]:
    """[1 + tiles², fine², grid²]: how each scale's patches reach the fused map.

    Bilinear with aligned corners, as similarity.to_pixels. Row f of the tiles together sums to 1:
    the average of those that cover the point. The whole is matrix 0.
    """
    fine, frame = FINE * grid, features_tiles.side(size, tiles)
    points = np.arange(fine) * (frame - 1) / (fine - 1)  # pixels of the large frame

    def along(start: float, width: float) -> np.ndarray:
        place = (points - start) / (width - 1) * (grid - 1)
        inside = (place > -1e-9) & (place < grid - 1 + 1e-9)
        hat = np.maximum(0, 1 - np.abs(np.clip(place, 0, grid - 1)[:, None] - np.arange(grid)))
        return hat * inside[:, None]

    whole = np.kron(along(0, frame), along(0, frame))
    corners = features_tiles.starts(size, tiles)
    each = np.stack([np.kron(along(r, size), along(c, size)) for r, c in corners])
    each /= each.sum((0, 2))[None, :, None]
    return np.concatenate([whole[None], each]).astype(np.float32)


def part(packed: Features, i: int, patches: int) -> Features:
    """Scale 0 (the whole) or tile i - 1 of packed tokens."""
    rows = slice(i * patches, (i + 1) * patches)
    return packed._replace(levels=tuple(x[:, rows] for x in packed.levels))


def units_of(healthy: Sequence[Float[np.ndarray, "_ _"]]) -> Float[np.ndarray, "2 2"]:
    """Mean and standard deviation of the patches of the whole images, then of the tiles."""
    return np.asarray([(x.mean(), calibration.spread(x.ravel())) for x in healthy], np.float32)


def build(
    whole: Detector, small: Detector, tiles: int, grid: int, pool: Callable | None
) -> Detector:
    """A detector of packed tokens.

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

    def fused(image: Any, patches: list, units) -> Scores:
        """Mean of the scales; patches: values [n, p] of the whole, then of every tile."""
        total: Any = 0.0
        for i, values in enumerate(patches):
            centre, width = units[min(i, 1)]
            total = total + ((values - centre) / width) @ spread[i].T
        return Scores(total / 2, image if pool is None else pool(total / 2))

    def apply(params, packed, key):
        names = ["whole"] + ["tiles"] * (count - 1)
        scores = [
            detectors[name].apply(params[name], part(packed, i, grid**2), key)
            for i, name in enumerate(names)
        ]
        return fused(scores[0].image, [s.patch for s in scores], params["units"])

    of_tiles = small.calibration.patch.reshape(-1, count - 1, grid**2)
    patches = [jnp.asarray(x) for x in (whole.calibration.patch, *np.moveaxis(of_tiles, 1, 0))]
    own = []
    for i in range(k) if k > 1 else ():  # a support is standardised by the others
        of_others = units_of([np.delete(x, i, 0) for x in healthy])
        own.append(fused(image[i : i + 1], [x[i : i + 1] for x in patches], of_others))
    own = own or [fused(image, patches, units)]
    folds = {n: d.fold_params for n, d in detectors.items() if d.fold_params is not None}
    return whole._replace(
        apply=apply,
        params={n: d.params for n, d in detectors.items()} | {"units": jnp.asarray(units)},
        fold_params=folds or None,
        calibration=jax.tree.map(lambda *x: np.concatenate(x), *own),
        read=features_tiles.loader(tiles),
        proven=tuple(x for x in whole.proven if x == "image" and pool is None),
    )
