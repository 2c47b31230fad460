"""One MC-dropout pass that shares with the others what does not depend on its key.

Dropout leaves out columns of the adapted tokens, the same of every patch (model.adapt_tokens).
So the product with a text feature is one with a thinned text feature, and the square of a norm is
the product of the squares with the columns that stay. Under `vmap` over keys these are two matrix
products for all passes, where each would else go through all tokens.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from medclip_jax.clip.outputs import Features
from medclip_jax.models import model
from medclip_jax.models import similarity as models_similarity


def logit(
    params: Mapping, text: Float[Array, "c j"], features: Features, design: model.Design, key
) -> Float[Array, "n p"]:
    """`model.forward(...).logit` of each image alone with this key, to rounding.

    A key is one thinned model, the same for every image: what an image's neighbours in the batch
    are does not change its pass.
    """
    levels = model.adapt_tokens(params, model.refined(params, features, design), 0.0, None)
    label = np.asarray(design.prompts.label)
    softmax = design.form == "softmax"
    target = (
        models_similarity.class_features(text, label)
        if softmax
        else text[np.flatnonzero(label == 0)]
    )
    share = 1 - design.dropout

    def stays(i, width):
        """Which columns of layer i stay, [j]; as model.adapt_tokens samples them."""
        return jax.random.bernoulli(jax.random.fold_in(key, i), share, (1, 1, width))[0, 0]

    similarities = [
        cosine(y / share, models_similarity.unit(target), stays(i, y.shape[-1]))
        for i, y in enumerate(levels)
    ]
    scale = model.scale_of(params, design)
    if softmax:
        similarity = models_similarity.level_mean(similarities)
        return scale * (similarity[..., 1] - similarity[..., 0])
    away = models_similarity.level_mean(1 - x.max(-1) for x in similarities)
    return scale * (away - params["offset"])


def cosine(
    y: Float[Array, "n p j"], unit: Float[Array, "c j"], stays: Bool[Array, " j"]
) -> Float[Array, "n p c"]:
    """Cosine of every patch, without the columns that do not stay, with rows of length 1."""
    mask = stays.astype(y.dtype)
    exact = jax.lax.Precision.HIGHEST
    product = jnp.einsum("npj,cj->npc", y, mask[None] * unit, precision=exact)
    square = jnp.einsum("npj,j->np", y * y, mask, precision=exact)
    return product * jax.lax.rsqrt(jnp.maximum(square, 1e-24))[..., None]
