"""Prompts of several data sets in one run: every image is compared with those of its own set.

The sets' prompts are laid out the same, healthy ones first, and filled up to the longest; what only
fills the shape has no weight anywhere. Set 0 is the target. The learned context keeps the target's
shape: the context vectors of a prompt are those of the target's prompt of the same class and place,
beginning again where the target has fewer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medclip_jax.models.similarity import Text
from medclip_jax.prompts.tokenize import Prompts


class Sets(NamedTuple):
    """Prompts of s data sets, static."""

    ids: Int[np.ndarray, "s c t"]
    slots: Int[np.ndarray, "s c t"]
    eos: Int[np.ndarray, "s c"]
    row: Int[np.ndarray, "s c"]  # of the learned context
    real: Bool[np.ndarray, "s c"]  # False for what only fills the shape
    label: Int[np.ndarray, " c"]  # 0 healthy, 1 abnormal, of every set


def stack(prompts: Sequence[Prompts]) -> Sets:
    """Prompts of the target, then of the other sets; all have the same positions and context."""
    sides = [[np.flatnonzero(p.label == side) for p in prompts] for side in (0, 1)]
    counts = [max(map(len, side)) for side in sides]
    own: Any = []  # lists of each side, then arrays of both; so are the others
    row: Any = []
    real: Any = []
    for side, count in zip(sides, counts, strict=True):
        place = np.arange(count)
        own.append([of_set[place % len(of_set)] for of_set in side])
        row.append([side[0][place % len(side[0])]] * len(prompts))
        real.append([place < len(of_set) for of_set in side])
    own, row, real = (np.concatenate(x, axis=1) for x in (own, row, real))
    ids, slots, eos = (
        np.stack([getattr(p, name)[rows] for p, rows in zip(prompts, own, strict=True)])
        for name in ("ids", "slots", "eos")
    )
    return Sets(ids, slots, eos, row, real, np.repeat([0, 1], counts))


def text_features(
    context: Float[Array, "_ k d"],
    text: Mapping,
    sets: Sets,
    source: Int[Array, "*n"],
    encoder: nn.Module,
    causal: bool,
) -> Text:
    """Text features of the sets that `source` names: one for all images ([]) or one each ([n]).

    One set alone goes through the text encoder in the first case, all of them in the second.
    """
    length = int(sets.eos.max()) + 1 if causal else sets.ids.shape[2]
    arrays = sets.row, sets.ids[:, :, :length], sets.slots[:, :, :length], sets.eos
    count, width = sets.row.shape
    if source.ndim == 0:
        row, *words = (jnp.asarray(x)[source] for x in arrays)
    else:
        row, *words = (jnp.asarray(x.reshape(count * width, *x.shape[2:])) for x in arrays)
    context = context[row if context.shape[0] > 1 else jnp.zeros_like(row)]
    features: Any = encoder.apply({"params": text}, context, *words, causal)
    if source.ndim > 0:
        features = features.reshape(count, width, -1)[source]
    return Text(features, sets.label, jnp.asarray(sets.real)[source])
