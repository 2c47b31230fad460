"""Prompts: token ids with slots for learnable context, and the phrases they are filled from.

Shape letters of the package: e episodes or tasks, n images, h w pixels, p patches (g x g grid,
row-major), l layers, d width, c prompts, t text positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from medclip_jax.prompts import ontology


class Prompts(NamedTuple):
    """Tokenised prompts with slots for learnable context."""

    ids: Int[np.ndarray, "c t"]  # token ids; what stands under a slot is ignored
    slots: Int[np.ndarray, "c t"]  # context vector that stands here, -1 for a token
    eos: Int[np.ndarray, " c"]  # position of the end-of-text token
    label: Int[np.ndarray, " c"]  # 0 healthy, 1 abnormal
    text: tuple[str, ...]  # the phrases
    start: Int[np.ndarray, " k"] | None = None  # token each context vector starts from, -1 random


HEALTHY = (
    "no signs of {condition}",
    "normal {anatomy} appearance",
    "{modality} of a healthy {anatomy}",
    "{modality} of a normal {anatomy}",
)
ABNORMAL = (
    "signs of {condition}",
    "abnormal {anatomy} appearance",
    "{modality} of a diseased {anatomy}",
    "{modality} of a {anatomy} with {condition}",
)
# In the form of MediCLIP (Zhang et al. 2024): bare words, 10 and 11 of them. Its lists are in its
# repository; these begin with the same three words and are ours from the fourth on.
WORDS_HEALTHY = (
    *("normal", "healthy", "negative", "unremarkable", "clear", "asymptomatic"),
    *("typical", "regular", "undiseased", "intact"),
)
WORDS_ABNORMAL = (
    *("abnormal", "positive", "symptomatic", "diseased", "pathological", "atypical"),
    *("irregular", "unhealthy", "lesioned", "damaged", "anomalous"),
)
PHRASES = {
    "templates": (HEALTHY, ABNORMAL),
    "words": (WORDS_HEALTHY, WORDS_ABNORMAL),
    "ontology": (HEALTHY, ABNORMAL),  # with every synonym
}


def fill(
    templates: Sequence[str], anatomy: str, conditions: Sequence[str], modality: str
) -> list[str]:
    """Every template with every condition it mentions; duplicates once, in order."""
    filled = [
        t.format(anatomy=anatomy, condition=condition, modality=modality)
        for t in templates
        for condition in (conditions if "{condition}" in t else [""])
    ]
    return list(dict.fromkeys(filled))


def fill_synonyms(templates: Sequence[str], words: ontology.Words) -> list[str]:
    """`fill` with synonyms: all conditions; anatomy and modality one at a time, not every pair."""
    anatomy, modality = words.anatomy[0], words.modality[0]
    filled = fill(templates, anatomy, words.conditions, modality)
    for synonym in words.anatomy[1:]:
        filled += fill(templates, synonym, (), modality)
    for synonym in words.modality[1:]:
        filled += fill(templates, anatomy, (), synonym)
    return list(dict.fromkeys(filled))
