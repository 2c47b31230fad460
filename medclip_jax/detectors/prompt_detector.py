"""TODO."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.clip.outputs import Features
from medclip_jax.detectors import detector
from medclip_jax.models import mc_dropout, model


def learned(
    params, frozen, design, tokens: Features, groups, healthy: Features | None = None
) -> detector.Detector:
    """Prompts and adapters: copy 0 scores, copy 1 + f scores the supports of fold f.

    Without folds copy 0 scores `healthy` (the supports themselves if that is None).
    """
    read = jax.jit(jax.vmap(partial(model.text_features, design=design), (0, None)))
    texts = read(params, frozen)
    pick = [jax.tree.map(lambda x, i=i: x[i], (params, texts)) for i in range(1 + len(groups))]

    @jax.jit
    def patches(copy, batch):
        params, text = copy
        return model.forward(params, text, batch, design).logit

    @jax.jit
    def passes(copy, batch, keys):
        params, text = copy
        return mc_dropout.logits(params, text, batch, design, keys)

    shown = tokens if len(groups) or healthy is None else healthy
    held_out = np.zeros((len(shown.pooled), design.grid**2), np.float32)
    copies = pick[1:] or pick
    held = [*groups] or [np.arange(len(held_out))]
    for copy, group in zip(copies, held, strict=True):
        held_out[group] = patches(copy, jax.tree.map(lambda x, g=group: x[g], shown))
    fold_of = {int(i): f for f, group in enumerate(held) for i in group}
    return detector.Detector(
        partial(patches, pick[0]),
        held_out,
        partial(passes, pick[0]) if design.dropout > 0 else None,
        without=lambda i, batch: patches(copies[fold_of[i]], batch),
        k=len(tokens.pooled),
        copies=(lambda b: jnp.stack([patches(c, b) for c in copies])) if len(copies) > 1 else None,
        choose=lambda _: pick[0],
        chosen=lambda batch, copy: patches(copy, batch),
    )
