"""Tokens of images that the program makes itself, kept in the bank by the content of their pixels.

<cache>/bank/<recipe>/<sha256 of the pixels>-<name>.safetensors, one file per stack of images.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from medclip_jax import features, processes
from medclip_jax.structs import Features

VERSION = 1


def encode(
    bank: features.Bank,
    stacks: Float[np.ndarray, "k v s s"],
    how: Callable[[Float[np.ndarray, "n s s"]], Features],
    name: str,
) -> list[Features]:
    """Tokens of each stack of images, on the host, in the bank's number format.

    how: images -> tokens, run on the stacks that the bank lacks. name: what names `how`; with
    the pixels and the bank's recipe it must say all that shapes the tokens.
    """
    paths = [place(bank, x, name) for x in stacks]
    missing = processes.agreed([not features.whole(p) for p in paths])
    for path, images in [
        (p, x) for p, x, lacks in zip(paths, stacks, missing, strict=True) if lacks
    ]:
        features.write(path, bank, how(np.asarray(images)), slice(None))
    processes.seen(paths)
    return [features._tokens(features.load(p)) for p in paths]


def place(bank: features.Bank, images: Float[np.ndarray, "v s s"], name: str) -> Path:
    """The bank file of a stack of images; equal pixels have one."""
    pixels = np.ascontiguousarray(images, np.float32)
    found = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return bank.folder / f"{found}-{features.digest('kept', VERSION, name)}.safetensors"
