"""TODO."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medclip_jax.data.records import Record
from medclip_jax.detectors import detector, memory_bank, prompt_detector, zero_shot
from medclip_jax.features import cache, support_images
from medclip_jax.models import model


def build(
    method: str,
    params: Any,
    frozen: dict,
    design: model.Design | None,
    feature_cache: cache.FeatureCache,
    supports: Sequence[Record],
    groups: Sequence[np.ndarray],
    coreset: float = 1.0,
    mirror: bool = False,
) -> detector.Detector:
    """The detector of a method; `params` [1 + folds, ...] as fit.run leaves it.

    coreset: share of the healthy patches that a memory keeps, in (0, 1]. mirror: it remembers the
    supports mirrored left and right as well.
    """
    tokens, healthy = support_images.healthy_tokens(feature_cache, supports)
    if method == "zero_shot" or tokens is None:
        return zero_shot.zero_shot(params, frozen, design, feature_cache.clip, healthy)._replace(
            k=len(supports)
        )
    if method == "memory":
        tokens = memory_bank.mirrored(feature_cache, supports) if mirror else tokens
        return memory_bank.remember(tokens, coreset, healthy, rows=1 + mirror, asked=1)
    return prompt_detector.learned(params, frozen, design, tokens, groups, healthy)
