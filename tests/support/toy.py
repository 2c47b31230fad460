"""Small params and a loss of the same form as model.loss, which compiles in no time."""

import jax
import jax.numpy as jnp

from medclip_jax.models import losses


def toy_params(width):
    kernel, bias, context = jax.random.split(jax.random.key(0), 3)
    adapter = {
        "kernel": jax.random.normal(kernel, (width, 4)) / width,
        "bias": jax.random.normal(bias, (4,)),
    }
    context = jax.random.normal(context, (4,))
    return {"adapters": (adapter,), "context": context, "scale": jnp.asarray(0.1)}


def toy_loss(params, frozen, batch, key):
    """Two layers on the first patch of every image, which shows the shift or not."""
    x = batch.features.levels[0][:, 0]
    if key is not None:
        keep = jax.random.bernoulli(key, 0.7, x.shape)
        x = jnp.where(keep, x / 0.7, 0.0)
    (p,) = params["adapters"]
    hidden = jnp.tanh(x @ p["kernel"] + p["bias"][None])
    z = jnp.exp(params["scale"]) * (hidden @ params["context"])
    y = batch.mask[:, 0, 0]
    loss = losses.row_mean(jax.nn.softplus(z) - y * z, batch.valid)
    return loss, {"loss": loss}
