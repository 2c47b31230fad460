"""Images through the frozen encoder, spread over the devices; the feature cache is filled."""

import collections
import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import safe_open

from medclip_jax import stored
from medclip_jax.clip import checkpoint
from medclip_jax.clip.layers import Features, narrowed
from medclip_jax.data import augmentation, preprocessing
from medclip_jax.data.augmentation import Synthesis, variants
from medclip_jax.data.layouts import Record
from medclip_jax.distributed import runtime, sharding
from medclip_jax.distributed.runtime import batches, progress
from medclip_jax.features import cache
from medclip_jax.features.cache import FeatureCache
from medclip_jax.features.training_pool import TrainingPool
from medclip_jax.io import read
from medclip_jax.synthesis import generate


class Source(NamedTuple):
    """Coarse tokens of one data set that tasks are made of, on the host."""

    healthy: Features  # [h]
    altered: Features  # [h, v] synthetic anomalies of each
    kinds: Int[np.ndarray, "h v"]  # indices into generate.KINDS
    abnormal: Features  # [a] real ones, which may be none
    digest: str  # of its images and their encoding


DEVICE_BATCH = 16  # images per call of the encoder and device; larger is not faster on a CPU
VERSION = 1  # raise when what `encode_stacks` computes changes


def encode_images(feature_cache: FeatureCache, images: Sequence[Record]) -> int:
    """Fill the feature cache with images from disk; returns how many had to be encoded.

    Raises DataError for an image that cannot be read, WorkdirError if the cache cannot be written.
    """
    todo = cache.missing(images, lambda r: cache.image_path(feature_cache, r))
    groups = list(batches(todo, batch_size(feature_cache)))
    # this process's rows of each group, which is filled up by going round it again
    share = sharding.local_rows(batch_size(feature_cache), feature_cache.mesh)
    rows = [share % len(group) for group in groups]
    needed = [g[i] for g, own in zip(groups, rows, strict=True) for i in np.unique(own)]
    arriving = read.read_all(needed, feature_cache.clip.size, feature_cache.fit)

    def shares() -> Iterator[tuple[np.ndarray, int]]:
        work = zip(groups, rows, strict=True)
        for group, own in progress(work, "encode images", len(groups)):
            pixels = {i: next(arriving)[1] for i in np.unique(own)}
            yield np.stack([pixels[i] for i in own]), len(group)

    for group, features in zip(groups, _encode_shares(feature_cache, shares()), strict=True):
        for i, record in enumerate(group):
            one = jax.tree.map(lambda x, i=i: x[i : i + 1], features)
            cache.write(feature_cache, cache.image_path(feature_cache, record), one)
    runtime.wait_for_files([cache.image_path(feature_cache, r) for r in todo])
    return len(todo)


def open_pool(
    feature_cache: FeatureCache, images: Sequence[Record], synthesis: Synthesis
) -> TrainingPool:
    """Encode what the cache lacks and open healthy images for training, with their variants."""
    encode_images(feature_cache, images)
    encode_variants(feature_cache, images, synthesis)

    def opened(paths):
        return tuple(safe_open(path, framework="np").get_slice for path in paths)

    altered = images if synthesis.variants else ()
    anomalous = opened(variant_path(feature_cache, r, images, synthesis) for r in altered)
    kinds = [tensor("kind")[: synthesis.variants] for tensor in anomalous]
    return TrainingPool(
        opened(cache.image_path(feature_cache, r) for r in images),
        anomalous,
        len(feature_cache.clip.image_encoder.levels),
        feature_cache.clip.size,
        synthesis.variants,
        np.asarray(kinds or np.zeros((len(images), 0), int)),
        synthesis.copies if synthesis.variants else 0,
        inputs=feature_cache.clip.image_encoder.inputs,
        digest=stored.digest([r.sha256 for r in images]),
    )


def open_source(
    feature_cache: FeatureCache,
    healthy: Sequence[Record],
    abnormal: Sequence[Record],
    synthesis: Synthesis,
) -> Source:
    """Encode what the cache lacks and read coarse tokens of images and synthetic anomalies."""
    encode_images(feature_cache, [*healthy, *abnormal])
    encode_variants(feature_cache, healthy, synthesis)

    def read_rows(paths: Sequence[Path]) -> Any:
        return [jax.tree.map(np.asarray, _coarse(cache.load(path))) for path in paths]

    def joined(records: Sequence[Record]) -> Features:
        rows = read_rows([cache.image_path(feature_cache, r) for r in records or healthy[:1]])
        whole = jax.tree.map(lambda *x: np.concatenate(x), *rows)
        return whole if records else jax.tree.map(lambda x: x[:0], whole)

    paths = [variant_path(feature_cache, r, healthy, synthesis) for r in healthy]
    altered = jax.tree.map(lambda *x: np.stack(x), *read_rows(paths))
    count = synthesis.variants
    kinds = [safe_open(path, framework="np").get_tensor("kind")[:count] for path in paths]
    altered = jax.tree.map(lambda x: x[:, :count], altered)
    names = [[r.sha256 for r in records] for records in (healthy, abnormal)]
    digest = stored.digest([feature_cache.folder.name, *names, [p.name for p in paths]])
    return Source(joined(healthy), altered, np.stack(kinds), joined(abnormal), digest)


def coarse(features: Features) -> Features:
    """Means over 2 x 2 tokens of the square grid; an odd one's last row and column are narrower."""

    def means(tokens: Float[Array, "n q d"]) -> Float[Array, "n p d"]:
        n, q, d = tokens.shape
        grid = int(round(q**0.5))
        ones = jnp.ones((1, grid, grid, 1), jnp.float32)
        window, zero = (1, 2, 2, 1), np.float32(0)
        image = tokens.astype(jnp.float32).reshape(n, grid, grid, d)
        total, count = (
            jax.lax.reduce_window(x, zero, jax.lax.add, window, window, "SAME")
            for x in (image, ones)
        )
        return (total / count).astype(tokens.dtype).reshape(n, -1, d)

    return Features(features.pooled, tuple(map(means, features.levels)))


_coarse = jax.jit(coarse)


def encode_variants(
    feature_cache: FeatureCache, images: Sequence[Record], synthesis: Synthesis
) -> int:
    """Fill the cache with variants of each image; returns how many had to be encoded."""
    feature_cache = cache.without_memory_encoder(feature_cache)

    def path(record: Record) -> Path:
        return variant_path(feature_cache, record, images, synthesis)

    todo = cache.missing(images, path)
    if not todo or not synthesis.variants:
        return 0
    size, fit = feature_cache.clip.size, feature_cache.fit
    pixels = {r.id: x for r, x in read.read_all(images, size, fit)}
    partners = np.stack([pixels[r.id] for r in images])

    def make(record: Record):
        return record, *variants(record, pixels[record.id], partners, synthesis)

    with contextlib.closing(runtime.prefetch(make, todo)) as made:
        for record, altered, masks, kinds in progress(made, "make variants", len(todo)):
            packed = np.packbits(masks.reshape(len(masks), -1) > 0.5, axis=1)
            tokens = encode(feature_cache, altered)
            cache.write(feature_cache, path(record), tokens, {"mask": packed, "kind": kinds})
    runtime.wait_for_files([path(r) for r in todo])
    return len(todo) * (synthesis.variants + synthesis.copies)


def variant_path(
    feature_cache: FeatureCache, record: Record, images: Sequence[Record], synthesis: Synthesis
) -> Path:
    """The file of an image's variants; `images` count where variants copy from them."""
    folder, partners = cache.without_memory_encoder(feature_cache).folder, []
    if synthesis.partner == "support":
        partners = [r.sha256 for r in images]
        folder /= supports_folder(partners)
    changes = (augmentation.VERSION, synthesis.copies, synthesis.strengths)
    parts = (
        generate.VERSION[synthesis.preset],
        synthesis[:4],
        partners,
        *([changes] if synthesis.copies else []),
    )
    return folder / f"{record.sha256}-{stored.digest(parts)}.safetensors"


def supports_folder(hashes: Sequence[str]) -> str:
    """Folder below an encoding for variants that copy from these supports, so serve no others."""
    return f"supports-{stored.digest([list(hashes)])}"


def encode(
    feature_cache: FeatureCache, images: Float[np.ndarray, "n s s"], size: int = 0
) -> Features:
    """Tokens of images in the encoder's frame, [0, 1], on the host; the cache is not read.

    size: images encoded together; 0 is `batch_size`.
    """
    size = size or batch_size(feature_cache)
    groups = (images[start : start + size] for start in range(0, len(images), size))
    return jax.tree.map(lambda *x: np.concatenate(x), *encode_batches(feature_cache, groups, size))


def encode_batches(
    feature_cache: FeatureCache, groups: Iterable[Float[np.ndarray, "_ s s"]], size: int
) -> Iterator[Features]:
    """`encode` of each group of at most `size` images, of which the next is prepared meanwhile."""
    rows = sharding.local_rows(size, feature_cache.mesh)
    return _encode_shares(feature_cache, ((x[rows % len(x)], len(x)) for x in groups))


def encode_stacks(
    feature_cache: FeatureCache,
    stacks: Float[np.ndarray, "k v s s"],
    name: str,
    how: Callable[[FeatureCache, Float[np.ndarray, "v s s"]], Features] = encode,
) -> list[Features]:
    """Tokens of each stack of images in [0, 1], on the host, from the cache where it has them.

    `how` turns the images of a stack into tokens; its `name`, the pixels and the cache's recipe
    determine them.
    """
    paths = [stack_path(feature_cache, x, name) for x in stacks]
    absent = runtime.any_process([not cache.is_whole(p) for p in paths])
    for path, images, lacks in zip(paths, stacks, absent, strict=True):
        if lacks:
            cache.write(feature_cache, path, how(feature_cache, np.asarray(images)))
    runtime.wait_for_files(paths)
    return [cache.load(p) for p in paths]


def stack_path(feature_cache: FeatureCache, images: Float[np.ndarray, "v s s"], name: str) -> Path:
    """The file of a stack of images; equal pixels have one."""
    pixels = np.ascontiguousarray(images, np.float32)
    content = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return feature_cache.folder / f"{content}-{stored.digest(['stack', VERSION, name])}.safetensors"


def batch_size(feature_cache: FeatureCache) -> int:
    """Images that are encoded together."""
    return DEVICE_BATCH * feature_cache.mesh.size


def _encode_shares(
    feature_cache: FeatureCache, shares: Iterable[tuple[Float[np.ndarray, "m s s"], int]]
) -> Iterator[Features]:
    """Tokens of each batch, of which this process holds its share, and how many images are real.

    The share has its full length, so there is one shape and one compilation.
    """
    clip, line = feature_cache.clip, collections.deque[tuple[Features, int]]()
    static = {"encoder": clip.image_encoder, "mean": clip.mean, "std": clip.std}

    def fetched(most: int) -> Iterator[Features]:
        while len(line) > most:
            yield narrowed(sharding.fetch(*line.popleft()), feature_cache.dtype)

    for images, real in _preprocessed(shares, feature_cache.recipe):
        placed = sharding.place(images, feature_cache.mesh)
        line.append((checkpoint.encode_images(feature_cache.vision, placed, **static), real))
        yield from fetched(batches_ahead(feature_cache.mesh))
    yield from fetched(0)


def _preprocessed(
    shares: Iterable[tuple[np.ndarray, int]], recipe: Sequence[str]
) -> Iterator[tuple[np.ndarray, int]]:
    """The shares after the recipe, each computed while the one before is encoded."""

    def one(share: tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
        return preprocessing.batch(share[0], recipe), share[1]

    if not recipe:  # no thread for nothing: one image is waited for
        yield from shares
        return
    with contextlib.closing(runtime.prefetch(one, shares)) as ready:
        yield from ready


def batches_ahead(mesh: jax.sharding.Mesh) -> int:
    """Batches that an accelerator computes while the host reads and writes; a CPU has no two."""
    return 0 if mesh.devices.flat[0].platform == "cpu" else 1
