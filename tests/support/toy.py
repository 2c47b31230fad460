"""Small params, a loss of the same form as model.loss that compiles in no time, and a pool."""

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.features import training_pool
from medclip_jax.models import losses

VARIANTS = 9


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


def planted_pool(
    grid: int, size: int, width: int, levels: int, joint: int
) -> training_pool.TrainingPool:
    """Four images; a variant's left or right half is anomalous, its tokens moved by a vector."""
    rng = np.random.default_rng(0)
    shift = 3 * rng.normal(size=(levels, width))
    clean, anomalous = [], []
    for _ in range(4):
        base = rng.normal(size=(levels, 1, grid, grid, width))
        sides = np.zeros((VARIANTS, 1, grid), bool)
        sides[::2, :, : grid // 2], sides[1::2, :, grid // 2 :] = True, True
        shown = np.broadcast_to(sides, (VARIANTS, grid, grid))
        moved = base + shown[None, ..., None] * shift[:, None, None, None]
        mask = shown.repeat(size // grid, 1).repeat(size // grid, 2).reshape(VARIANTS, -1)
        for into, x in ((clean, base), (anomalous, moved)):
            n = x.shape[1]
            tokens = x.reshape(levels, n, grid * grid, width).astype(np.float32)
            arrays = {f"level{i}": level for i, level in enumerate(tokens)}
            arrays["pooled"] = np.zeros((n, joint), np.float32)
            into.append((arrays | {"mask": np.packbits(mask, axis=1)}).__getitem__)
    kinds = np.tile(np.arange(VARIANTS) % 3, (4, 1))
    return training_pool.TrainingPool(tuple(clean), tuple(anomalous), levels, size, VARIANTS, kinds)
