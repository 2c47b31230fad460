"""MC-dropout passes without a pass each: what all keys share is computed once.

Dropout leaves out columns of the adapted tokens, the same of every patch (model.adapt_tokens).
So the product with a text feature is one with a thinned text feature, and the square of a norm is
the product of the squares with what is kept: two matrix products for all keys, where a pass of its
own would go through all tokens again.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from medclip_jax.clip.outputs import Features
from medclip_jax.models import model
from medclip_jax.models import similarity as models_similarity


def logits(
    params: Mapping, text: Float[Array, "c j"], features: Features, design: model.Design, keys
) -> Float[Array, "t n p"]:
    """`model.forward(...).logit` of each image alone with each of the keys [t], to rounding.

    Each key is one thinned model, the same for every image: what an image's neighbours in the
    batch are does not change its passes.
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

    def kept(i, width):
        """What each key keeps of level i, [t, j]; as model.adapt_tokens draws it."""
        return jax.vmap(
            lambda key: jax.random.bernoulli(jax.random.fold_in(key, i), share, (1, 1, width))[0, 0]
        )(keys)

    alike = [
        cosine(y / share, models_similarity.unit(target), kept(i, y.shape[-1]))
        for i, y in enumerate(levels)
    ]
    scale = model.scale_of(params, design)
    if softmax:
        similarity = models_similarity.level_mean(alike)
        return scale * (similarity[..., 1] - similarity[..., 0])
    away = models_similarity.level_mean(1 - x.max(-1) for x in alike)
    return scale * (away - params["offset"])


def cosine(
    y: Float[Array, "n p j"], unit: Float[Array, "c j"], kept: Bool[Array, "t j"]
) -> Float[Array, "t n p c"]:
    """Cosine of every patch, thinned by every row of `kept` , with rows of length 1."""
    kept = kept.astype(y.dtype)
    thinned = kept[:, None] * unit[None]
    exact = jax.lax.Precision.HIGHEST
    product = jnp.einsum("npj,tcj->tnpc", y, thinned, precision=exact)
    square = jnp.einsum("npj,tj->tnp", y * y, kept, precision=exact)
    return product * jax.lax.rsqrt(jnp.maximum(square, 1e-24))[..., None]
