"""What turns tokens into one value per patch: a trained model, a memory, or plain prompts.

Every detector also scores each support as if it had never seen it; those values calibrate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip.outputs import Features

Values = Float[Array, "n p"]


class Detector(NamedTuple):
    """`patches` scores images; `held_out` are the supports' values, each left out in turn.

    With one support nothing can be left out: `held_out` are then gentle views of it (data/views).
    With none it has no rows. In both cases no false-alarm rate can be promised.
    """

    patches: Callable[[Features], Values]  # larger is more anomalous
    held_out: Float[np.ndarray, "k p"]
    # MC-dropout: (features, keys [t]) -> values [t, n, p]; None where nothing is random
    passes: Callable[[Features, Any], Float[Array, "t n p"]] | None
    # image scores that do not come from the patch values: (features) -> [n]
    image: Callable[[Features], Float[Array, " n"]] | None = None
    held_out_image: Float[np.ndarray, " k"] | None = None
    # (i, features) -> values as of a detector that never saw support i
    without: Callable[[int, Features], Values] | None = None
    # image scores of every pass where they do not come from the patches: (features, keys) -> [t, n]
    image_passes: Callable[[Features, Any], Float[Array, "t n"]] | None = None
    k: int = 0  # supports
    # reads images otherwise than features.load_images, with its arguments
    load: Callable[..., Any] | None = None
    # the held-out copies of what was learned, as an ensemble: features -> values [f, n, p]
    copies: Callable[[Features], Float[Array, "f n p"]] | None = None
    image_copies: Callable[[Features], Float[Array, "f n"]] | None = None  # as image_passes
    # for gradients: what `patches` reads beside the features and chooses in them (a memory's
    # nearest rows), and (features, choice) -> values with that choice held: no second search
    choose: Callable[[Features], Any] | None = None
    chosen: Callable[[Features, Any], Values] | None = None
