"""The feature cache: tokens on disk, one safetensors file per image or stack of images.

<folder>/feature_cache/<encoding>/<image sha256>.safetensors is the image as it is, and its variants
are in `encoder.variant_path`. `encoding` names all that shapes tokens, so the cache serves every K,
seed and method. A file appears whole and holds the checksum of all its bytes; a damaged one is
encoded again. Tensors: `pooled` [v, d], `level0` ... [v, p, d], with refinement `input0` ...
[v, s, d]; of variants also `mask` [v, bytes] (packed bits) and `kind` [v], augmented copies last.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from medclip_jax import files, stored
from medclip_jax.clip import checkpoint, lite0, stacked
from medclip_jax.clip.layers import Features, joined
from medclip_jax.data import preprocessing
from medclip_jax.data.layouts import Record, unique
from medclip_jax.distributed import runtime, sharding
from medclip_jax.distributed.runtime import batches
from medclip_jax.io.image import Mode, parse_window


class FeatureCache(NamedTuple):
    """Where tokens lie and how images become tokens."""

    folder: Path
    clip: checkpoint.Clip
    fit: Mode  # into the encoder's square frame: "stretch" or "pad"
    dtype: str  # of the tokens on disk
    mesh: jax.sharding.Mesh
    vision: Any  # the image encoder's parameters, on every device
    recipe: tuple[str, ...] = ()  # preprocessing.STEPS that images go through before the encoder
    window: str = ""  # of CT, that images are read with
    writes: bool = True  # this process writes files; others see them


def open(
    folder: Path,
    clip: checkpoint.Clip,
    fit: Any,
    dtype: str,
    mesh,
    recipe="",
    window: str = "",
) -> FeatureCache:
    """The feature cache below `folder` for images of this recipe, read with this CT window.

    The rest are FeatureCache's fields. Raises ConfigError for an unknown recipe.
    """
    vision = sharding.share(clip.vision, mesh)
    about = clip, fit, stacked.compute_dtype(dtype), mesh, vision
    unnamed = FeatureCache(folder / "feature_cache" / "-", *about)
    feature_cache = with_recipe(unnamed, recipe, window)
    feature_cache = feature_cache._replace(writes=_writes(feature_cache.folder))
    files.sweep(feature_cache.folder)
    return feature_cache


def _writes(folder: Path) -> bool:
    """Does this process write there? Process 0 does, and all that do not see its files."""
    if not runtime.several():
        return True
    main, name = (
        jax.process_index() == 0,
        sharding.broadcast(np.frombuffer(os.urandom(8), np.uint8)),
    )
    mark = folder / f".shared.0.{bytes(name).hex()}.tmp"
    if main:
        with contextlib.suppress(OSError):  # what is there may be all that is needed
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    runtime.any_process(False)
    seen = mark.exists()
    runtime.any_process(False)
    if main:
        mark.unlink(missing_ok=True)
    return main or not seen


def with_recipe(
    feature_cache: FeatureCache, recipe: str | Sequence[str], window: str = ""
) -> FeatureCache:
    """The same for images that are preprocessed otherwise. Raises ConfigError if it is unknown."""
    clip, encoder = feature_cache.clip, feature_cache.clip.image_encoder
    pixels = clip.size, clip.mean, clip.std, feature_cache.fit
    steps = preprocessing.steps(recipe)
    named: list[Any] = [(preprocessing.VERSION, steps)] if steps else []
    named += ["inputs"] if encoder.inputs else []
    named += [parse_window(window)] if window else []
    named += [encoder.implementation] if encoder.implementation != "fused" else []
    made_by = 4, clip.digest, encoder.levels, encoder.dtype, pixels, feature_cache.dtype, *named
    name = stored.digest(made_by)
    folder = feature_cache.folder.with_name(name)
    return feature_cache._replace(folder=folder, recipe=steps, window=window)


def without_memory_encoder(feature_cache: FeatureCache) -> FeatureCache:
    """The same of the CLIP alone: nothing that is trained reads the memory's encoder."""
    if not feature_cache.clip.memory_levels:
        return feature_cache
    clip, vision = lite0.without_memory_encoder(feature_cache.clip), feature_cache.vision["clip"]
    own = feature_cache._replace(clip=clip, vision=vision)
    return with_recipe(own, own.recipe, own.window)


def image_path(feature_cache: FeatureCache, record: Record) -> Path:
    """The file of an image as it is."""
    return feature_cache.folder / f"{record.sha256}.safetensors"


def missing(records: Iterable[Record], path: Callable[[Record], Path]) -> list[Record]:
    """Records of different content without an undamaged file, the same list in every process."""
    distinct = unique(records)
    absent = runtime.any_process([not is_whole(path(r)) for r in distinct])
    return [r for r, lacks in zip(distinct, absent, strict=True) if lacks]


def is_whole(path: Path) -> bool:
    """Whether there is an undamaged file; a damaged one is removed."""
    if not path.is_file():
        return False
    with contextlib.suppress(OSError):
        if stored.has_crc(path, b'"%s"' % _name(path).encode()):
            return True
    logging.warning("%s is damaged and will be encoded again", path.name)
    with contextlib.suppress(OSError):  # in a read-only cache the error comes with the new one
        path.unlink(missing_ok=True)
    return False


def _name(path: Path) -> str:
    """An empty array that says what a file is: one under another's name is not believed."""
    return f"of {path.parent.name}/{path.name}"


def load(path: Path) -> Features:
    """Tokens of one file, on the host."""
    with safe_open(path, framework="np") as tensors:
        names = list(tensors.keys())
        levels, inputs = (sum(n.startswith(part) for n in names) for part in ("level", "input"))
        return Features(
            tensors.get_tensor("pooled"),
            tuple(tensors.get_tensor(f"level{i}") for i in range(levels)),
            tuple(tensors.get_tensor(f"input{i}") for i in range(inputs)),
        )


def load_images(
    feature_cache: FeatureCache, records: Sequence[Record], size: int
) -> Iterator[Features]:
    """Tokens of cached images in order, `size` at a time; encoder.encode_images comes first."""
    for group in batches(records, size):
        yield joined([load(image_path(feature_cache, r)) for r in group])


def write(
    feature_cache: FeatureCache,
    path: Path,
    features: Features,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """Write one file in one piece, in one process for each disk. WorkdirError if it fails."""
    if not feature_cache.writes:
        return
    tensors = {"pooled": features.pooled, **(extra or {})}
    tensors |= {f"level{i}": x for i, x in enumerate(features.levels)}
    tensors |= {f"input{i}": x for i, x in enumerate(features.inputs)}
    rows = {n: np.ascontiguousarray(x) for n, x in tensors.items()}
    rows[_name(path)] = np.zeros(0, np.uint8)
    files.write_bytes(path, stored.with_crc(save(rows, metadata={"crc32": "00000000"})))
