"""The bank: every image and every synthetic variant goes through the image tower once, ever.

On disk, one safetensors file per source image, named by the content of everything that shaped it:

  <cache>/bank/<recipe>/<image sha256>.safetensors              the image as it is
  <cache>/bank/<recipe>/<image sha256>-<synthesis>.safetensors  its synthetic variants

`recipe` is the digest of checkpoint, levels, frame, pixel mean, number format and preprocessing;
`synthesis` of preset, seed, number of variants, partners and augmentation. So the bank serves every
K, seed and method, and whatever changes tokens changes a name. A file appears whole (written
beside, then renamed); one that is damaged is made again. Tensors: `pooled` [v, d], `level0` …
[v, p, d], with refinement `input0` … [v, s, d], for variants also `mask` [v, bytes] (packed bits)
and `kind` [v]; augmented copies follow the variants there.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medclip_jax import clip, files, processes, sharding
from medclip_jax.data import augment, preprocess, readers, synthesis
from medclip_jax.data.variants import Synthesis, variants
from medclip_jax.errors import ConfigError
from medclip_jax.groups import batches, progress, unique
from medclip_jax.structs import Batch, Features, Record

ENCODE_BATCH = 16  # images per call of the tower and device; larger is not faster on a CPU


class Bank(NamedTuple):
    """Where tokens are kept and how they are made."""

    folder: Path
    clip: clip.Clip
    fit: readers.Mode
    dtype: str  # of the tokens on disk
    mesh: Any
    vision: Any  # the tower's parameters, on every device
    recipe: tuple[str, ...] = ()  # preprocess.STEPS that images go through before the tower


def open_bank(cache: Path, model: clip.Clip, fit: Any, dtype: str, mesh, recipe="") -> Bank:
    """A bank below `cache`. Raises ConfigError for an unknown fit, dtype or recipe."""
    if fit not in ("stretch", "pad"):
        raise ConfigError(f"data.fit {fit!r}: choose 'stretch' or 'pad'")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"bank_dtype {dtype!r}: choose 'float32', 'bfloat16' or 'float16'")
    vision = sharding.replicate(model.vision, mesh)
    return with_recipe(Bank(cache / "bank" / "-", model, fit, dtype, mesh, vision), recipe)


def with_recipe(bank: Bank, recipe: str | Sequence[str]) -> Bank:
    """The same bank for images that are preprocessed otherwise. Raises ConfigError if unknown."""
    model, tower = bank.clip, bank.clip.vision_tower
    pixels = model.size, model.mean, model.std, bank.fit
    steps = preprocess.steps(recipe)
    named: list[Any] = [(preprocess.VERSION, steps)] if steps else []
    named += ["inputs"] if tower.inputs else []
    name = digest(2, model.digest, tower.levels, tower.dtype, pixels, bank.dtype, *named)
    return bank._replace(folder=bank.folder.with_name(name), recipe=steps)


def digest(*parts: Any) -> str:
    """16 hex digits that name the given JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# --- images as they are ---------------------------------------------------------------------


def encode_images(bank: Bank, records: Sequence[Record]) -> int:
    """Fill the bank with the given images; returns how many had to be encoded."""
    missing = lacking(records, lambda r: image_path(bank, r))
    groups = list(batches(missing, batch_size(bank)))
    # this process's rows of each group, which is filled up by going round it again
    rows = [sharding.share(batch_size(bank), bank.mesh) % len(group) for group in groups]
    wanted = [g[i] for g, own in zip(groups, rows, strict=True) for i in np.unique(own)]
    images = readers.read_all(wanted, bank.clip.size, bank.fit)
    whole_groups = zip(groups, rows, strict=True)
    for group, own in progress(whole_groups, "encode images", len(groups)):
        pixels = {i: next(images)[1] for i in np.unique(own)}
        features = encode_share(bank, np.stack([pixels[i] for i in own]), len(group))
        for i, record in enumerate(group):
            write(image_path(bank, record), bank, features, slice(i, i + 1))
    processes.seen([image_path(bank, r) for r in missing])
    return len(missing)


def load_images(bank: Bank, records: Sequence[Record], size: int) -> Iterator[Features]:
    """Features of the given images in order, `size` at a time; encode_images comes first."""
    for group in batches(records, size):
        held = [load(image_path(bank, r)) for r in group]
        yield jax.tree.map(lambda *rows: np.concatenate(rows), *map(_tokens, held))


def image_path(bank: Bank, record: Record) -> Path:
    return bank.folder / f"{record.sha256}.safetensors"


# --- synthetic variants ---------------------------------------------------------------------


def encode_variants(bank: Bank, supports: Sequence[Record], recipe: Synthesis) -> int:
    """Fill the bank with variants of each support; returns how many had to be encoded."""
    todo = lacking(supports, lambda s: variant_path(bank, s, supports, recipe))
    if not todo or not recipe.variants:
        return 0
    pixels = {r.id: x for r, x in readers.read_all(supports, bank.clip.size, bank.fit)}
    partners = np.stack([pixels[s.id] for s in supports])
    for support in progress(todo, "make variants", len(todo)):
        images, masks, kinds = variants(support, pixels[support.id], partners, recipe)
        features = encode(bank, images)
        extra = {"mask": np.packbits(masks.reshape(len(masks), -1) > 0.5, axis=1), "kind": kinds}
        write(variant_path(bank, support, supports, recipe), bank, features, slice(None), extra)
    processes.seen([variant_path(bank, s, supports, recipe) for s in todo])
    return len(todo) * (recipe.variants + recipe.copies)


def variant_path(bank: Bank, record: Record, supports: Sequence[Record], recipe: Synthesis) -> Path:
    partners = [s.sha256 for s in supports] if recipe.partner == "support" else []
    plain, changes = recipe[:4], (augment.VERSION, recipe.copies, recipe.strengths)
    parts = synthesis.VERSION, plain, partners, *([changes] if recipe.copies else [])
    return bank.folder / f"{record.sha256}-{digest(*parts)}.safetensors"


class Pool(NamedTuple):
    """Supports and their variants, opened but not read: training takes rows as it needs them."""

    clean: tuple[Callable[[str], Any], ...]  # per support: name -> lazily sliced tensor
    anomalous: tuple[Callable[[str], Any], ...]
    levels: int
    size: int  # pixels per side of the masks
    variants: int
    kinds: Int[np.ndarray, "k v"]  # of each variant, index into synthesis.KINDS
    copies: int = 0  # augmented copies per support, clean
    # a teacher's patch logits per support, [1 + variants + copies, p]; () where there is none
    teacher: tuple[Float[np.ndarray, "_ p"], ...] = ()
    inputs: bool = False  # tokens hold the tapped blocks' inputs
    source: Int[np.ndarray, " k"] | None = None  # data set of each support; None: all of one


def open_pool(bank: Bank, supports: Sequence[Record], recipe: Synthesis) -> Pool:
    """Encode what is missing and open the supports for training."""
    encode_images(bank, supports)
    encode_variants(bank, supports, recipe)

    def opened(paths):
        return tuple(safe_open(path, framework="np").get_slice for path in paths)

    altered = (
        opened(variant_path(bank, s, supports, recipe) for s in supports) if recipe.variants else ()
    )
    kinds = [tensor("kind")[: recipe.variants] for tensor in altered] or np.zeros(
        (len(supports), 0), int
    )
    return Pool(
        opened(image_path(bank, s) for s in supports),
        altered,
        len(bank.clip.vision_tower.levels),
        bank.clip.size,
        recipe.variants,
        np.asarray(kinds),
        recipe.copies if recipe.variants else 0,
        inputs=bank.clip.vision_tower.inputs,
    )


def join(pools: Sequence[Pool]) -> Pool:
    """One pool of several with the same tower and number of variants; images in order."""
    sizes = [len(p.clean) for p in pools]
    return pools[0]._replace(
        clean=sum((p.clean for p in pools), ()),
        anomalous=sum((p.anomalous for p in pools), ()),
        kinds=np.concatenate([p.kinds for p in pools]),
        teacher=sum((p.teacher for p in pools), ()),
        source=np.repeat(np.arange(len(pools)), sizes) if len(pools) > 1 else None,
    )


def take(pool: Pool, support: Int[np.ndarray, " n"], variant: Int[np.ndarray, " n"]) -> Batch:
    """Rows of the pool as a batch on the host.

    variant: -1 is the image itself (Identity), -2 - c its augmented copy c, both clean.
    """

    def row(s, v, name: str) -> np.ndarray:
        if v == -1:
            return pool.clean[s](name)[0]
        return pool.anomalous[s](name)[int(v) if v >= 0 else pool.variants - int(v) - 2]

    # the copies of theta often meet the same row in one step: each is read once
    distinct, place = np.unique(np.stack([support, variant], 1), axis=0, return_inverse=True)

    def rows(name: str) -> Any:  # of the host, until a step takes it
        return np.stack([row(s, v, name) for s, v in distinct])[place.ravel()]

    v = np.asarray(variant)
    taught: Any = None
    if pool.teacher:
        at = np.where(v >= -1, v + 1, pool.variants - v - 1)
        taught = np.stack([pool.teacher[s][i] for s, i in zip(support, at, strict=True)])
    empty = np.zeros(-(-(bits := pool.size**2) // 8), np.uint8)
    packed = np.stack([row(s, v, "mask") if v >= 0 else empty for s, v in distinct])
    mask: Any = np.unpackbits(packed, axis=1, count=bits)
    mask = mask.reshape(-1, pool.size, pool.size)[place.ravel()]
    label: Any = (v >= 0).astype(np.int32)
    valid: Any = np.ones(len(support), bool)
    return Batch(
        Features(
            rows("pooled"),
            tuple(rows(f"level{i}") for i in range(pool.levels)),
            tuple(rows(f"input{i}") for i in range(pool.levels if pool.inputs else 0)),
        ),
        *(mask, label, valid),
        teacher=taught,
        source=None if pool.source is None else pool.source[support],
    )


# --- the tower and the files ----------------------------------------------------------------


def encode(bank: Bank, images: Float[np.ndarray, "n s s"]) -> Features:
    """Features of any number of images, on the host; rows spread over the devices."""
    size = batch_size(bank)
    rows, parts = sharding.share(size, bank.mesh), []
    for start in range(0, len(images), size):
        group = images[start : start + size]
        parts.append(encode_share(bank, group[rows % len(group)], len(group)))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def encode_share(bank: Bank, images: Float[np.ndarray, "m s s"], real: int) -> Features:
    """Features of the `real` images of one batch, of which this process holds its share.

    The share has its full length, so there is one shape and one compilation.
    """
    model, images = bank.clip, preprocess.batch(images, bank.recipe)
    placed = sharding.place(images, bank.mesh)
    features = clip.encode_images(
        bank.vision, placed, tower=model.vision_tower, mean=model.mean, std=model.std
    )
    return jax.tree.map(lambda x: x.astype(bank.dtype), sharding.fetch(features, real))


def batch_size(bank: Bank) -> int:
    return ENCODE_BATCH * bank.mesh.size


def lacking(records: Iterable[Record], path: Callable[[Record], Path]) -> list[Record]:
    """Records of different content without an undamaged file, the same list in every process."""
    kept = unique(records)
    missing = processes.agreed([not whole(path(r)) for r in kept])
    return [r for r, lacks in zip(kept, missing, strict=True) if lacks]


def whole(path: Path) -> bool:
    """Whether there is an undamaged bank file; a damaged one is removed."""
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


def write(path: Path, bank: Bank, features: Features, rows: slice, extra: dict | None = None):
    """One bank file, in one piece, by the main process. Raises WorkdirError if it cannot be."""
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
