"""The medical language adapter: a residual bottleneck after the text tower.

x + up(gelu(down(x))), d -> d/4 -> d in the joint space. A fresh one has an up-projection of zeros,
so it is exactly the identity. experiments/pretrain_language_adapter.py trains one on paraphrases or
reports; it is kept as a small safetensors file that names the CLIP it was trained for.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax import files
from medclip_jax.errors import CheckpointError

EMBEDDED = Path(__file__).parents[1] / "assets" / "language" / "compact.safetensors"
SHARE = 4  # the bottleneck is a quarter as wide
NAMES = ("down/kernel", "down/bias", "up/kernel", "up/bias")


def init(key: jax.Array, width: int) -> dict[str, Any]:
    """{down: {kernel [d, b], bias [b]}, up: {kernel [b, d] = 0, bias [d] = 0}}."""
    narrow = max(1, width // SHARE)
    kernel = jax.random.normal(key, (width, narrow)) * width**-0.5
    return {
        "down": {"kernel": kernel, "bias": jnp.zeros(narrow)},
        "up": {"kernel": jnp.zeros((narrow, width)), "bias": jnp.zeros(width)},
    }


def adapt(p: Mapping, text: Float[Array, "c d"]) -> Float[Array, "c d"]:
    """Text features, adapted; of any length, since the bottleneck sees them at length 1.

    The change is as long as the features are: x + |x| up(gelu(down(x / |x|))).
    """
    length = jnp.sqrt(jnp.sum(text * text, axis=-1, keepdims=True))
    hidden = text / jnp.maximum(length, 1e-12) @ p["down"]["kernel"] + p["down"]["bias"][None]
    return text + length * (jax.nn.gelu(hidden) @ p["up"]["kernel"] + p["up"]["bias"][None])


def save(path: Path, adapter: Mapping, digest: str, notes: Mapping[str, str]) -> None:
    """Keep an adapter with the digest of its CLIP; notes: what made it, for the record."""
    from safetensors.numpy import save

    parts = {name: name.split("/") for name in NAMES}
    tensors = {n: np.array(adapter[a][b], np.float32, order="C") for n, (a, b) in parts.items()}
    files.write_bytes(path, save(tensors, metadata={**notes, "clip": digest}))


def load(named: str, digest: str, width: int) -> dict[str, Any]:
    """The adapter `embedded`, `fresh` (identity) or of a file, for the CLIP of this digest.

    Raises CheckpointError if the file cannot be read or belongs to another CLIP.
    """
    from safetensors import SafetensorError, safe_open

    if named == "fresh":
        return init(jax.random.key(0), width)
    path = place(named)
    try:
        with safe_open(path, framework="np") as held:
            theirs = (held.metadata() or {}).get("clip")
            found = {name: jnp.asarray(held.get_tensor(name)) for name in NAMES}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"config.model.language {named}: not a language adapter ({error}); give embedded, "
            "fresh, or a file of experiments/pretrain_language_adapter.py"
        ) from None
    if theirs != digest:
        raise CheckpointError(
            f"config.model.language {named} was trained for the CLIP {theirs} and this is "
            f"{digest}: train one with experiments/pretrain_language_adapter.py"
        )
    down, up = found["down/kernel"].shape, found["up/kernel"].shape
    if down[0] != width or up != down[::-1]:
        raise CheckpointError(f"config.model.language {named}: shapes {down}, {up} do not fit")
    return {
        part: {kind: found[f"{part}/{kind}"] for kind in ("kernel", "bias")}
        for part in ("down", "up")
    }


def place(named: str) -> Path:
    return EMBEDDED if named == "embedded" else Path(named).expanduser()


def digest(named: str) -> str:
    """16 hex digits that name what `load` gives; "" for no adapter, "fresh" for a fresh one."""
    if named in ("", "fresh"):
        return named
    try:
        return hashlib.sha256(place(named).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise CheckpointError(
            f"config.model.language {named}: cannot be read ({error.strerror}); restore it"
        ) from None
