"""TODO."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medclip_jax.clip.outputs import Features
from medclip_jax.data import augmentation, records
from medclip_jax.data.records import Record
from medclip_jax.features import cache, encoder


def healthy_tokens(
    feature_cache: cache.FeatureCache, supports: Sequence[Record]
) -> tuple[Features | None, Features | None]:
    """Tokens of the supports, and those that calibrate: the supports, or views of a single one."""
    if not supports:
        return None, None
    (tokens,) = cache.load_images(feature_cache, supports, len(supports))
    tokens = healthy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tokens)
    if len(supports) == 1:
        images = healthy_images(feature_cache, supports)[None]
        (made,) = encoder.encode_stacks(feature_cache, images, "views")
        healthy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made)
    return tokens, healthy


def healthy_images(
    feature_cache: cache.FeatureCache, supports: Sequence[Record], size: int | None = None
) -> Float[np.ndarray, "m s s"]:
    """Pixels of the images that calibrate, in the tower frame; size: another side of it."""
    images = pixels(feature_cache, supports, size or feature_cache.clip.size)
    return augmentation.crops(images[0]) if len(supports) == 1 else images


def pixels(
    feature_cache: cache.FeatureCache, supports: Sequence[Record], size: int
) -> Float[np.ndarray, "k s s"]:
    """Pixels of the supports in a frame of `size` per side."""
    found = {r.id: x for r, x in records.read_all(supports, size, feature_cache.fit)}
    return np.stack([found[r.id] for r in supports])
