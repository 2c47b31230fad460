"""Parameters of an encoder's blocks as the device keeps them: in a smaller format, or stacked."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def compress(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A block's parameters as the device keeps them for an encoder of this dtype.

    Of int8, every kernel is whole numbers up to 127 and a scale per output; see `decompress`.
    """
    result: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            result[name] = compress(value, dtype)
        elif name == "kernel" and dtype == "int8":
            scale = np.maximum(np.abs(value).max(0, keepdims=True), 1e-30) / np.float32(127)
            result[name] = {"int8": np.rint(value / scale).astype(np.int8), "scale": scale}
        else:
            narrow = name == "kernel" and dtype == "bfloat16"
            result[name] = np.asarray(value).astype(jnp.bfloat16) if narrow else value
    return result


def decompress(params: Any) -> Any:
    """The same with every kernel as one array: in a loop over blocks, of one block at a time."""
    if not isinstance(params, Mapping):
        return params
    if "int8" in params:
        return params["int8"].astype(jnp.float32) * params["scale"]
    return {name: decompress(value) for name, value in params.items()}


def compute_dtype(dtype: str) -> str:
    """What an encoder of this dtype computes in: with weights of int8, bfloat16."""
    return "bfloat16" if dtype == "int8" else dtype


def stack(layers: Mapping[str, Any]) -> Any:
    """Parameters of blocks "0", "1", ... stacked on a leading axis."""
    rows = [layers[str(i)] for i in range(len(layers))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def unstack(layers: Any) -> dict[str, Any]:
    """Undoes `stack`."""
    depth = len(jax.tree.leaves(layers)[0])
    return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(depth)}
