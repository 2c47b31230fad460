"""SimCLR (equation 12): two augmentations of a healthy image are to be similar after a small head.

Chen et al. 2020. An image is the mean of its adapted patch tokens over patches and levels, so what
is learned reaches the adapters; the head is dropped when scoring. Both augmentations come from the
feature cache, which has augmented copies of the supports.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medclip_jax.models import adapters, losses, similarity

TEMPERATURE = 0.5  # Chen et al., for small batches
STREAM = 53  # keeps these random numbers apart from others of the same seed


class ProjectionHead(nn.Module):
    """Adapted patch tokens of each level -> one vector per image, half as wide, not normalised."""

    hidden_init: Callable = nn.initializers.lecun_normal()
    out_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, levels: Sequence[Float[Array, "n p j"]]) -> Float[Array, "n m"]:
        x = sum(level.mean(1) for level in levels) / len(levels)
        width = x.shape[-1]
        hidden = nn.Dense(width, kernel_init=self.hidden_init, name="hidden")(x)
        narrow = max(width // 2, 1)
        return nn.Dense(narrow, kernel_init=self.out_init, name="out")(jax.nn.relu(hidden))


def init(key: jax.Array, width: int) -> dict:
    """Fresh parameters of a ProjectionHead: kernels uniform as those of the adapters, biases 0."""
    uniform = adapters.uniform(width**-0.5)
    head = ProjectionHead(*(adapters.from_key(k, uniform) for k in jax.random.split(key)))
    return head.init(key, (jnp.zeros((1, 1, width)),))["params"]


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
