"""The medical language adapter: a residual bottleneck after the text encoder.

A fresh one has an up-projection of zeros: exactly the identity. One that was trained by
experiments/pretrain_language_adapter.py is a small safetensors file that names its CLIP.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from medclip_jax import files, stored
from medclip_jax.errors import CheckpointError, one_line
from medclip_jax.models.modules import from_key

EMBEDDED = Path(__file__).parents[1] / "assets" / "language" / "compact.safetensors"
MOST_BYTES = 1 << 28  # of a file
SHARE = 4  # the bottleneck is a quarter as wide
NAMES = ("down/kernel", "down/bias", "up/kernel", "up/bias")


class TextAdapter(nn.Module):
    """Text features, adapted; of any length, since the bottleneck sees them at length 1.

    The change is as long as the features are: x + |x| up(gelu(down(x / |x|))).
    """

    down_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, text: Float[Array, "c d"]) -> Float[Array, "c d"]:
        width = text.shape[-1]
        narrow, zeros = max(1, width // SHARE), nn.initializers.zeros
        length = jnp.sqrt(jnp.sum(text * text, axis=-1, keepdims=True))
        down = nn.Dense(narrow, kernel_init=self.down_init, name="down")
        up = nn.Dense(width, kernel_init=zeros, name="up")
        return text + length * up(jax.nn.gelu(down(text / jnp.maximum(length, 1e-12))))


def init(key: jax.Array, width: int) -> dict[str, Any]:
    """Fresh parameters: {down: {kernel [d, b], bias}, up: {kernel [b, d] = 0, bias = 0}}."""
    adapter = TextAdapter(from_key(key, nn.initializers.normal(width**-0.5)))
    return adapter.init(key, jnp.zeros((1, width)))["params"]


def adapt(params: Mapping, text: Float[Array, "c d"]) -> Float[Array, "c d"]:
    adapted: Any = TextAdapter().apply({"params": params}, text)
    return adapted


def save(path: Path, adapter: Mapping, digest: str, notes: Mapping[str, str]) -> None:
    """Write an adapter with the digest of its CLIP; notes: how it was trained, for the record."""
    from safetensors.numpy import save

    flat = flatten_dict(adapter, sep="/")
    tensors = {name: np.array(flat[name], np.float32, order="C") for name in NAMES}
    files.write_bytes(path, save(tensors, metadata={**notes, "clip": digest}))


def load(source: str, digest: str, width: int) -> dict[str, Any]:
    """The adapter `embedded`, `fresh` (identity) or of a file, for the CLIP of this digest.

    Raises CheckpointError if the file cannot be read or belongs to another CLIP.
    """
    from safetensors import SafetensorError, safe_open

    if source == "fresh":
        return init(jax.random.key(0), width)
    try:
        stored.check_file(_path(source), MOST_BYTES)
        with safe_open(_path(source), framework="np") as file:
            clip_digest = (file.metadata() or {}).get("clip")
            tensors = {name: jnp.asarray(file.get_tensor(name)) for name in NAMES}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"config.model.language {source}: not a language adapter ({error}); give embedded, "
            "fresh, or a file of experiments/pretrain_language_adapter.py"
        ) from None
    if clip_digest != digest:
        raise CheckpointError(
            f"config.model.language {source} was trained for the CLIP {clip_digest} and this is "
            f"{digest}: train one with experiments/pretrain_language_adapter.py"
        )
    down, up = tensors["down/kernel"].shape, tensors["up/kernel"].shape
    if down[0] != width or up != down[::-1]:
        raise CheckpointError(f"config.model.language {source}: shapes {down}, {up} do not fit")
    return unflatten_dict(tensors, sep="/")


def _path(source: str) -> Path:
    return EMBEDDED if source == "embedded" else files.expanded(source)


def digest(source: str) -> str:
    """16 hex digits that name what `load` gives; "" for no adapter, "fresh" for a fresh one."""
    if source in ("", "fresh"):
        return source
    try:
        return hashlib.sha256(stored.read_bytes(_path(source), MOST_BYTES)).hexdigest()[:16]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"config.model.language {source}: cannot be read ({one_line(error)}); restore it"
        ) from None
