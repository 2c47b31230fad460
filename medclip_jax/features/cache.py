"""TODO."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medclip_jax import files
from medclip_jax.clip import vit
from medclip_jax.clip.outputs import Features
from medclip_jax.data import preprocessing
from medclip_jax.data.records import Record, unique
from medclip_jax.distributed import multihost, sharding
from medclip_jax.distributed.runtime import batches
from medclip_jax.errors import ConfigError
from medclip_jax.io import read


class FeatureCache(NamedTuple):
    """Where tokens are kept and how they are made."""

    folder: Path
    clip: vit.Clip
    fit: read.Mode
    dtype: str  # of the tokens on disk
    mesh: Any
    vision: Any  # the tower's parameters, on every device
    recipe: tuple[str, ...] = ()  # preprocess.STEPS that images go through before the tower


def open_cache(cache: Path, model: vit.Clip, fit: Any, dtype: str, mesh, recipe="") -> FeatureCache:
    """A feature_cache below `cache`. Raises ConfigError for an unknown fit, dtype or recipe."""
    if fit not in ("stretch", "pad"):
        raise ConfigError(f"data.fit {fit!r}: choose 'stretch' or 'pad'")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"cache_dtype {dtype!r}: choose 'float32', 'bfloat16' or 'float16'")
    vision = sharding.replicate(model.vision, mesh)
    return with_recipe(
        FeatureCache(cache / "feature_cache" / "-", model, fit, dtype, mesh, vision), recipe
    )


def with_recipe(feature_cache: FeatureCache, recipe: str | Sequence[str]) -> FeatureCache:
    """The same feature_cache for images that are preprocessed otherwise. Raises ConfigError if unknown."""
    model, tower = feature_cache.clip, feature_cache.clip.vision_tower
    pixels = model.size, model.mean, model.std, feature_cache.fit
    steps = preprocessing.steps(recipe)
    named: list[Any] = [(preprocessing.VERSION, steps)] if steps else []
    named += ["inputs"] if tower.inputs else []
    name = digest(2, model.digest, tower.levels, tower.dtype, pixels, feature_cache.dtype, *named)
    return feature_cache._replace(folder=feature_cache.folder.with_name(name), recipe=steps)


def digest(*parts: Any) -> str:
    """16 hex digits that name the given JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_images(
    feature_cache: FeatureCache, records: Sequence[Record], size: int
) -> Iterator[Features]:
    """Features of the given images in order, `size` at a time; encode_images comes first."""
    for group in batches(records, size):
        held = [load(image_path(feature_cache, r)) for r in group]
        yield jax.tree.map(lambda *rows: np.concatenate(rows), *map(_tokens, held))


def image_path(feature_cache: FeatureCache, record: Record) -> Path:
    return feature_cache.folder / f"{record.sha256}.safetensors"


def lacking(records: Iterable[Record], path: Callable[[Record], Path]) -> list[Record]:
    """Records of different content without an undamaged file, the same list in every process."""
    kept = unique(records)
    missing = multihost.any_process([not whole(path(r)) for r in kept])
    return [r for r, lacks in zip(kept, missing, strict=True) if lacks]


def whole(path: Path) -> bool:
    """Whether there is an undamaged feature_cache file; a damaged one is removed."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="np"):
            return True
    except SafetensorError:
        logging.warning("%s is damaged and will be made again", path.name)
        path.unlink(missing_ok=True)
        return False


def load(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as held:
        return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118


def write(
    path: Path,
    feature_cache: FeatureCache,
    features: Features,
    rows: slice,
    extra: dict | None = None,
):
    """One feature_cache file, in one piece, by the main process. Raises WorkdirError if it cannot be."""
    if not sharding.is_main():
        return
    tensors = {"pooled": features.pooled[rows], **(extra or {})}
    tensors |= {f"level{i}": x[rows] for i, x in enumerate(features.levels)}
    tensors |= {f"input{i}": x[rows] for i, x in enumerate(features.inputs)}
    files.write_bytes(path, save({n: np.ascontiguousarray(x) for n, x in tensors.items()}))


def _tokens(held: dict[str, Any]) -> Features:
    levels, inputs = (sum(n.startswith(part) for n in held) for part in ("level", "input"))
    return Features(
        held["pooled"],
        tuple(held[f"level{i}"] for i in range(levels)),
        tuple(held[f"input{i}"] for i in range(inputs)),
    )


VERSION = 1


def encode(
    feature_cache: FeatureCache,
    stacks: Float[np.ndarray, "k v s s"],
    how: Callable[[Float[np.ndarray, "n s s"]], Features],
    name: str,
) -> list[Features]:
    """Tokens of each stack of images, on the host, in the feature cache's number format.

    how: images -> tokens, run on the stacks that the feature cache lacks. name: what names `how`; with
    the pixels and the feature cache's recipe it must say all that shapes the tokens.
    """
    paths = [place(feature_cache, x, name) for x in stacks]
    missing = multihost.any_process([not whole(p) for p in paths])
    for path, images in [
        (p, x) for p, x, lacks in zip(paths, stacks, missing, strict=True) if lacks
    ]:
        write(path, feature_cache, how(np.asarray(images)), slice(None))
    multihost.wait_for_files(paths)
    return [_tokens(load(p)) for p in paths]


def place(feature_cache: FeatureCache, images: Float[np.ndarray, "v s s"], name: str) -> Path:
    """The feature cache file of a stack of images; equal pixels have one."""
    pixels = np.ascontiguousarray(images, np.float32)
    found = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return feature_cache.folder / f"{found}-{digest('kept', VERSION, name)}.safetensors"
