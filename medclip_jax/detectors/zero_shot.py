"""TODO."""

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.clip import vit
from medclip_jax.clip.outputs import Features
from medclip_jax.detectors import detector
from medclip_jax.models import similarity


def zero_shot(
    params, frozen, design, tower: vit.Clip, tokens: Features | None
) -> detector.Detector:
    """CLIP's own text and image embeddings, healthy against abnormal prompts; nothing is learned.

    Patches are the last level's tokens through the tower's own norm and projection. Values are
    logits: 0 is where both classes are equally likely. `tokens` None: no support (K = 0).
    """
    empty = jnp.zeros((len(design.prompts.ids), 0, tower.text_width))
    words = design.prompts, design.text_tower, design.causal
    read = jax.jit(lambda weights: vit.encode_text(weights, empty, *words))
    text = read(frozen["text"])
    scale, zero = jnp.exp(frozen["logit_scale"]), jnp.asarray(0.0)
    label = design.prompts.label

    @jax.jit
    def patches(batch):
        joint = vit.project(tower.vision, batch.levels[-1], tower.vision_tower)
        return similarity.patch_logit((joint,), text, label, scale, zero, "softmax")

    @jax.jit
    def image(batch):
        pooled = batch.pooled[:, None]
        return similarity.patch_logit((pooled,), text, label, scale, zero, "softmax")[:, 0]

    if tokens is None:
        none = np.zeros((0, design.grid**2), np.float32)
        return detector.Detector(patches, none, None, image, np.zeros(0, np.float32))
    held_out = np.asarray(patches(tokens)), np.asarray(image(tokens))
    k = len(tokens.pooled)
    return detector.Detector(
        patches, *held_out[:1], None, image, held_out[1], lambda _, b: patches(b), k=k
    )
