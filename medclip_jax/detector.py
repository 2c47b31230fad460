"""What turns tokens into one value per patch: a trained model, a memory, or plain prompts.

Every detector also scores each support as if it had never seen it; those values calibrate.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax import clip, features, model, score
from medclip_jax.structs import Features, Record

Values = Float[Array, "n p"]


class Detector(NamedTuple):
    """`patches` scores images; `held_out` are the supports' values, each left out in turn."""

    patches: Callable[[Features], Values]  # larger is more anomalous
    held_out: Float[np.ndarray, "k p"]
    # MC-dropout: (features, keys [t]) -> values [t, n, p]; None where nothing is random
    passes: Callable[[Features, Any], Float[Array, "t n p"]] | None
    # image scores that do not come from the patch values: (features) -> [n]
    image: Callable[[Features], Float[Array, " n"]] | None = None
    held_out_image: Float[np.ndarray, " k"] | None = None
    # reads images otherwise than features.load_images, with its arguments
    load: Callable[..., Any] | None = None


def build(
    method: str,
    theta: Any,
    frozen: dict,
    design: model.Design,
    bank: features.Bank,
    supports: Sequence[Record],
    groups: Sequence[np.ndarray],
) -> Detector:
    """The detector of a method; `theta` [1 + folds, ...] as fit.run leaves it."""
    (tokens,) = features.load_images(bank, supports, len(supports))
    tokens = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tokens)
    if method == "memory":
        return remember(tokens)
    if method == "zero_shot":
        return zero_shot(theta, frozen, design, bank.clip, tokens)
    return learned(theta, frozen, design, tokens, groups)


def learned(theta, frozen, design, tokens: Features, groups) -> Detector:
    """Prompts and adapters: copy 0 scores, copy 1 + f scores the supports of fold f."""
    texts = jax.jit(jax.vmap(lambda t: model.text_features(t, frozen, design)))(theta)
    pick = [jax.tree.map(lambda x, i=i: x[i], (theta, texts)) for i in range(1 + len(groups))]

    @jax.jit
    def patches(copy, batch):
        return model.forward(*copy, batch, design).logit

    @jax.jit
    def passes(copy, batch, keys):
        # Each key is one thinned model, the same for every image: what an image's neighbours in
        # the batch are must not change its uncertainty.
        def one(key, image):
            alone = jax.tree.map(lambda x: x[None], image)
            return model.forward(*copy, alone, design, key).logit[0]

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, batch)

    held_out = np.zeros((len(tokens.pooled), design.grid**2), np.float32)
    for copy, group in zip(pick[1:] or pick, groups or [np.arange(len(held_out))], strict=True):
        held_out[group] = patches(copy, jax.tree.map(lambda x, g=group: x[g], tokens))
    return Detector(
        partial(patches, pick[0]),
        held_out,
        partial(passes, pick[0]) if design.dropout > 0 else None,
    )


def remember(tokens: Features) -> Detector:
    """Nearest healthy patch of the supports; a support is compared with the others only."""
    pooled = tuple(score.neighbourhood(x) for x in tokens.levels)

    @jax.jit
    def patches(batch, memory):
        levels = tuple(score.neighbourhood(x) for x in batch.levels)
        flat = tuple(m.reshape(-1, m.shape[-1]) for m in memory)
        return score.memory_distance(levels, flat)

    k = len(tokens.pooled)
    held_out = []
    for i in range(k):
        others = tuple(np.delete(m, i, axis=0) for m in pooled) if k > 1 else pooled
        held_out.append(patches(jax.tree.map(lambda x, i=i: x[i : i + 1], tokens), others))
    return Detector(lambda batch: patches(batch, pooled), np.concatenate(held_out), None)


def zero_shot(theta, frozen, design, tower: clip.Clip, tokens: Features) -> Detector:
    """CLIP's own text and image embeddings, healthy against abnormal prompts; nothing is learned.

    Patches are the last level's tokens through the tower's own norm and projection.
    """
    empty = jnp.zeros((len(design.prompts.ids), 0, tower.text_width))
    text = clip.encode_text(frozen["text"], empty, design.prompts, design.text_tower, design.causal)
    scale, zero = jnp.exp(frozen["logit_scale"]), jnp.asarray(0.0)
    label = design.prompts.label

    @jax.jit
    def patches(batch):
        joint = clip.project(tower.vision, batch.levels[-1], tower.vision_tower)
        return score.patch_logit((joint,), text, label, scale, zero, "softmax")

    @jax.jit
    def image(batch):
        pooled = batch.pooled[:, None]
        return score.patch_logit((pooled,), text, label, scale, zero, "softmax")[:, 0]

    held_out = np.asarray(patches(tokens)), np.asarray(image(tokens))
    return Detector(patches, held_out[0], None, image, held_out[1])
