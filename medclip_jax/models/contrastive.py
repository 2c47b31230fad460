"""SimCLR (equation 12): two augmentations of a healthy image are to be alike after a small head.

Chen et al. 2020. An image is the mean of its adapted patch tokens over patches and levels, so what
is learned reaches the adapters; the head is dropped when scoring. Both augmentations come from the
feature_cache, where the augmented copies of the supports lie.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medclip_jax.models import losses, similarity

TEMPERATURE = 0.5  # Chen et al., for small batches
STREAM = 53  # keeps these draws apart from others of the same seed


def init(key: jax.Array, width: int) -> dict:
    """The projection head: width -> width, ReLU, -> width / 2; uniform as the adapters."""
    sizes, bound = ((width, width), (width, max(width // 2, 1))), width**-0.5
    draw = dict(minval=-bound, maxval=bound)
    return {
        name: {"kernel": jax.random.uniform(k, size, **draw), "bias": jnp.zeros(size[1])}
        for name, k, size in zip(("hidden", "out"), jax.random.split(key), sizes, strict=True)
    }


def project(head: Mapping, levels: tuple[Float[Array, "n p j"], ...]) -> Float[Array, "n m"]:
    """Adapted patch tokens of each level -> one vector per image, not normalised."""
    x = sum(level.mean(1) for level in levels) / len(levels)
    hidden = jax.nn.relu(x @ head["hidden"]["kernel"] + head["hidden"]["bias"][None])
    return hidden @ head["out"]["kernel"] + head["out"]["bias"][None]


def ntxent(
    one: Float[Array, "n m"],
    two: Float[Array, "n m"],
    image: Int[Array, " n"],
    valid: Bool[Array, " n"],
    temperature: float = TEMPERATURE,
) -> Float[Array, ""]:
    """NT-Xent, mean over the anchors of the valid rows; 0 if there is none.

    Row i of `one` and of `two` are augmentations of image number image[i]. An anchor's positive is
    its partner, its negatives are the rows of other images. Equal to optax.losses.ntxent where all
    images differ and all rows are valid; optax cannot leave rows out, and its gradient is NaN where
    an anchor has no negative (K = 1).
    """
    n = len(one)
    both = jnp.concatenate([one, two])
    image, valid = jnp.concatenate([image] * 2), jnp.concatenate([valid] * 2)
    partner = jnp.asarray(np.roll(np.eye(2 * n, dtype=bool), n, axis=1))
    negative = (image[:, None] != image[None]) & valid[None]
    logits = similarity.cosine(both, both) / temperature
    each = losses.infonce(jnp.where(partner | negative, logits, -jnp.inf), partner)
    return losses.row_mean(each, valid)
