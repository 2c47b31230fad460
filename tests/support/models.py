"""Tokens, designs and networks of a few numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.clip.layers import Features
from medclip_jax.models import model
from medclip_jax.prompts import tokenize


def tokens(n, seed=0, grid=4, widths=(32, 32), joint=16) -> Features:
    rng = np.random.default_rng(seed)
    levels = tuple(rng.normal(size=(n, grid**2, w)) for w in widths)
    made = Features(rng.normal(size=(n, joint)), levels)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made)


def design_of(clip, dropout=0.0, context=2) -> tuple[model.Design, dict]:
    built = tokenize.tokenise(
        clip.tokenizer,
        clip.eos_id,
        ["normal", "healthy breast", "mass"],
        np.array([0, 0, 1]),
        context,
        "end",
    )
    design = model.Design(
        built, clip.text_encoder, clip.size, clip.grid, "softmax", True, True, dropout
    )
    return design, {"text": clip.text, "logit_scale": jnp.asarray(clip.logit_scale)}


def rows(features, wanted):
    return jax.tree.map(lambda x: x[np.asarray(wanted)], features)


def mlp(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["W1"] + params["b1"][None])
    loss = jnp.mean((hidden @ params["W2"] + params["b2"][None] - y) ** 2)
    return loss, {"mse": loss}
