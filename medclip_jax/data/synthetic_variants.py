"""The anomalous variants of one healthy image, made of it and of its augmented copies."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from medclip_jax.data import augmentation
from medclip_jax.data.records import Record
from medclip_jax.synthesis import generate


class Synthesis(NamedTuple):
    """How anomalies are made."""

    preset: generate.Preset
    variants: int  # anomalous variants per image
    seed: int
    partner: str  # CutPaste copies from "self" or from any "support"
    copies: int = 0  # augmented copies per image; they and the image are what variants are made of
    strengths: augmentation.Strengths = augmentation.Strengths()


def variants(
    record: Record,
    image: Float[np.ndarray, "s s"],
    partners: Float[np.ndarray, "k s s"],
    recipe: Synthesis,
) -> tuple[Float[np.ndarray, "v s s"], Float[np.ndarray, "v s s"], Int[np.ndarray, " v"]]:
    """Anomalous variants of one image: (images, masks, kinds), then its augmented copies.

    Variant i is a function of (seed, image content, i) and, if partners are shared, of them. It is
    made of the image or of a copy, in turn, so that augmentation is not learned as an anomaly.
    """
    name = int(record.sha256[:16], 16)
    keys = jnp.stack([generate.key_for(recipe.seed, name, v) for v in range(recipe.variants)])
    rng = np.random.default_rng([recipe.seed, name])
    kinds = rng.integers(len(generate.KINDS) - 1, size=recipe.variants)
    picks = rng.integers(len(partners), size=recipe.variants)
    bases = augmentation.copies(recipe.seed, name, image, recipe.copies, recipe.strengths)
    images = bases[np.arange(recipe.variants) % len(bases)]
    sources = images if recipe.partner == "self" else partners[picks]
    changed, masks = generate.batch(keys, images, sources, kinds, recipe.preset)
    if not recipe.copies:
        return changed, masks, kinds
    clean = np.full(recipe.copies, generate.KINDS.index("identity"))
    return (
        np.concatenate([changed, bases[1:]]),
        np.concatenate([masks, np.zeros_like(bases[1:])]),
        np.concatenate([kinds, clean]),
    )
