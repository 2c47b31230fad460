"""Training that never leaves the devices: images, captions and the teacher lie in their memory.

Every step draws its own views; the host only starts a chunk of steps and reads the loss, so an
accelerator never waits for data. `pack` writes what it needs in one file.
"""

import functools
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from PIL import Image

from . import captions, lite0, loop, objective, tokens, views
from .encoders import Encoders

WORDINGS = 48  # captions of each image that are drawn from
CHUNK = 20  # steps that the devices make by themselves
GRID = loop.GRID


class Source(NamedTuple):
    """What steps draw from; a caption is true of the classes whose bits are set in `true_of`."""

    pixels: UInt8[Array, "n 224 224"]
    chance: Float[Array, " n"]  # of being drawn
    kind: Int[Array, " n"]  # captions.class_of
    plane: Int[Array, " n"]  # 0: none
    mirror: Bool[Array, " n"]
    caption: Int[Array, "n w l"]
    true_of: Int[Array, "n w"]
    named: Int[Array, "n w"]  # the plane that a caption names; 0: none
    phrases: Int[Array, "m l"]
    meaning: Float[Array, "m 384"]
    teacher: dict[str, Array]
    mean: dict[str, Array]  # of teacher channels, as loop.channel_scales
    sd: dict[str, Array]


def pack(data: Path, rows: list[views.Row], material: loop.Material, net, path: Path) -> None:
    """One file with the images that the leak check passed, as WebP, captions and the teacher."""
    passed = {shard.index[i] for shard in material.shards for i in range(len(shard.index))}
    number = np.concatenate([shard.index for shard in material.shards])
    passed &= {int(i) for i in number[material.places]}
    rows = [rows[i] for i in sorted(passed)]
    files = [_webp(views.load_grey(data / "images" / row.image)) for row in rows]
    rng = np.random.default_rng(0)
    arrays = {
        "webp": np.frombuffer(b"".join(files), np.uint8),
        "ends": np.cumsum([len(f) for f in files]),
        "phrases": tokens.encode(material.tokenizer, material.phrases, loop.LENGTH),
        "meaning": np.round(material.meaning * 127 / np.abs(material.meaning).max()).astype(
            np.int8
        ),
    }
    arrays |= _caption_tables(rows, material, rng)
    for name, (mean, sd) in material.scales.items():
        arrays |= {f"mean.{name}": mean, f"sd.{name}": sd}
    teacher = lite0.convert(net).items()
    arrays |= {f"teacher.{k}": v.astype(np.float16) for k, v in teacher}
    np.savez_compressed(path, **arrays)


def _webp(pixels: UInt8[np.ndarray, "224 224"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "webp", quality=75)
    return file.getvalue()


def _caption_tables(rows: list[views.Row], material: loop.Material, rng) -> dict[str, np.ndarray]:
    planes = sorted({"", *(row.plane for row in rows)})
    names = np.array([row.modality for row in rows])
    counts = {name: (names == name).sum() for name in set(names)}
    chance = np.array([counts[name] ** (views.BALANCE - 1) for name in names])
    made = [[captions.make_caption(row, rng) for _ in range(WORDINGS)] for row in rows]
    texts = tokens.encode(material.tokenizer, [c.text for row in made for c in row], loop.LENGTH)
    return {
        "chance": chance / chance.sum(),
        "kind": np.array([captions.class_of(row) for row in rows]),
        "plane": np.array([planes.index(row.plane) for row in rows]),
        "mirror": np.array([captions.MODALITIES[row.modality].mirror for row in rows]),
        "caption": texts.reshape(len(rows), WORDINGS, -1).astype(np.int16),
        "true_of": np.array([[sum(1 << c for c in t.classes) for t in row] for row in made]),
        "named": np.array([[planes.index(t.plane) for t in row] for row in made]),
    }


def load(path: Path) -> Source:
    """What `pack` wrote, decoded."""
    with np.load(path) as file:
        stored = dict(file)
    meaning = stored["meaning"].astype(np.float32)  # only their direction counts
    stored["meaning"] = meaning / np.linalg.norm(meaning, axis=1, keepdims=True)
    ends = stored.pop("ends")
    bounds = zip([0, *ends[:-1]], ends, strict=True)
    webp = stored.pop("webp")

    def decode(part):
        with Image.open(io.BytesIO(webp[slice(*part)].tobytes())) as image:
            return np.asarray(image.convert("L"))

    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(decode, bounds)))
    groups: dict[str, dict[str, Any]] = {"teacher": {}, "mean": {}, "sd": {}}
    for name in [x for x in stored if "." in x]:
        group, _, rest = name.partition(".")
        groups[group][rest] = stored.pop(name).astype(np.float32)
    integer = {k: v.astype(np.int32) for k, v in stored.items() if v.dtype.kind == "i"}
    real = {k: v.astype(np.float32) for k, v in stored.items() if v.dtype.kind == "f"}
    return Source(pixels, mirror=stored["mirror"], **integer, **real, **groups)


def crop(
    pixels: UInt8[Array, "224 224"], key: Key[Array, ""]
) -> tuple[Float[Array, "224 224"], Array]:
    """views.random_view of one image, in [0, 1]: crop of 40-100%, half of them turned, tone."""
    area, ratio, x, y, turn, half, gamma, contrast, light = jax.random.uniform(key, (9,))
    area, ratio = 0.4 + 0.6 * area, jnp.exp(0.4 * ratio - 0.2)
    wide = jnp.minimum(1, jnp.sqrt(jnp.stack([area / ratio, area * ratio])))  # rows, columns
    centre = (1 - wide) * (jnp.stack([y, x]) - 0.5)
    angle = jnp.where(half < 0.5, jnp.deg2rad((2 * turn - 1) * views.TURN), 0.0)
    step = (jnp.arange(views.SIZE) + 0.5) / views.SIZE - 0.5
    row, column = jnp.meshgrid(*(centre[i] + wide[i] * step for i in range(2)), indexing="ij")
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    places = jnp.stack([cosine * row - sine * column, sine * row + cosine * column])
    places = (places + 0.5) * views.SIZE - 0.5
    seen = jax.scipy.ndimage.map_coordinates(pixels.astype(jnp.float32) / 255, places, order=1)
    seen = jnp.power(jnp.maximum(seen, 1e-6), jnp.exp(0.4 * gamma - 0.2))
    seen = (seen - 0.5) * (0.85 + 0.3 * contrast) + 0.5 + (0.1 * light - 0.05)
    return jnp.clip(seen, 0, 1)


def make_batch(source: Source, key: Key[Array, ""], size: int, kept: int, dtype) -> objective.Batch:
    """loop.make_batch with fresh views, on the devices."""
    keys = jax.random.split(key, 7)
    n = jax.random.choice(keys[0], len(source.chance), (size,), p=source.chance)
    views_of, order = jax.random.split(keys[1], size), jax.random.uniform(keys[2], (size, GRID**2))
    flip = jax.random.bernoulli(keys[3], 0.5, (size,))
    keep = jnp.argsort(order, 1)[:, :kept].astype(jnp.int32)
    flip &= source.mirror[n]
    grey = jax.vmap(crop)(source.pixels[n], views_of)
    grey = jnp.where(flip[:, None, None], grey[..., ::-1], grey)
    fine, coarse, pooled = lite0.features(source.teacher, grey.astype(dtype))

    def scaled(name, x):
        mean, sd = (v[name].reshape((1,) * (x.ndim - 1) + (-1,)) for v in (source.mean, source.sd))
        return (x.astype(jnp.float32) - mean) / sd

    def patches(name, x):
        flat = x.reshape(size, GRID**2, -1)
        return scaled(name, jnp.take_along_axis(flat, keep[..., None], 1))

    which = jax.random.randint(keys[4], (size,), 0, WORDINGS)
    true_of, named = source.true_of[n, which], source.named[n, which]
    match = (true_of[None] >> source.kind[n][:, None]) & 1
    match &= (named[None] == 0) | (named[None] == source.plane[n][:, None])
    other = jax.random.randint(keys[5], (size,), 0, len(source.phrases))
    return objective.Batch(
        pixels=jnp.round(grey * 255).astype(jnp.uint8),
        keep=keep,
        fine=patches("fine", fine),
        coarse=patches("coarse", coarse),
        pooled=scaled("pooled", pooled),
        captions=source.caption[n, which],
        match=match.astype(jnp.float32),
        phrases=source.phrases[other],
        meaning=source.meaning[other],
    )


@functools.cache
def compiled_chunk(encoders: Encoders, plan: loop.Plan, kept: int, mesh):
    """CHUNK steps in one program: (state, first step, source) -> (state, parts of the last)."""
    fixed = {"encoders": encoders, "weights": plan.weights}
    fixed |= {"optimiser": objective.make_optimiser()}
    split = NamedSharding(mesh, PartitionSpec("n"))

    def chunk(state, number, rate, fall, source):
        def one(state, i):
            key = jax.random.fold_in(jax.random.key(plan.seed + 1), number + i)
            batch = make_batch(source, key, plan.batch, kept, encoders.image.dtype)
            batch = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, split), batch)
            now = (rate - i * fall) * jnp.minimum(1.0, (number + i + 1) / loop.WARM_UP)
            *changed, parts = objective.step(*state, now, batch, **fixed)
            return loop.State(*changed), parts

        state, parts = jax.lax.scan(one, state, jnp.arange(CHUNK))
        return state, jax.tree.map(lambda x: x[-1], parts)

    return jax.jit(chunk, donate_argnums=0)


def run(
    source: Source, encoders: Encoders, plan: loop.Plan, state: loop.State, path: Path, minutes
) -> None:
    """Trains for `minutes` at a constant rate, then `plan.decay` steps, falling to 0, with all
    patches. Resumes from the checkpoint at `path`; the decayed one and log.jsonl lie beside it."""
    state, done = loop.restore(path, state)
    mesh = jax.make_mesh((jax.device_count(),), ("n",), axis_types=(AxisType.Auto,))
    state, source = jax.device_put((state, source), NamedSharding(mesh, PartitionSpec()))
    begun, number, peak = time.monotonic(), done.steps, matmul_peak(encoders.image.dtype)

    def advance(kept: int, rate: float, fall: float) -> None:
        nonlocal state, number
        at = time.monotonic()
        step = compiled_chunk(encoders, plan, kept, mesh)
        scalars = (np.int32(number), np.float32(rate), np.float32(fall))
        state, parts = step(state, *scalars, source)
        parts = {name: float(value) for name, value in parts.items()}  # waits for the devices
        loop.check(parts, number)
        number += CHUNK
        speed = CHUNK * plan.batch / (time.monotonic() - at)
        line = {"step": number, "rate": rate, "images_per_second": round(speed, 1)}
        share = speed * operations(encoders, kept) / peak / jax.device_count()
        line |= {"share_of_peak": round(share, 4), "patches": kept}
        print(text := json.dumps(line | {k: round(v, 5) for k, v in parts.items()}), flush=True)
        with open(path.with_name("log.jsonl"), "a") as file:
            file.write(f"{text}\n")

    def save(to: Path) -> float:
        seconds = done.seconds + time.monotonic() - begun
        loop.save(to, state, loop.Done(number, seconds))
        return time.monotonic()

    saved = begun
    while number == done.steps or time.monotonic() - begun < minutes * 60:
        advance(plan.patches, plan.rate, 0.0)
        if time.monotonic() - saved > plan.save_minutes * 60:
            saved = save(path)
    save(path)
    for first in range(0, plan.decay, CHUNK):
        fall = plan.rate / plan.decay
        advance(GRID**2, plan.rate - first * fall, fall)
    save(path.with_name("decayed.safetensors"))


def operations(encoders: Encoders, patches: int) -> float:
    """Multiplications and additions per image in the products of the image encoder, forward and
    backward; teacher, texts and augmentation are not counted."""
    width, tokens_, blocks = encoders.image.width, patches + 1, encoders.image.depth
    block = tokens_ * (8 * width**2 + 4 * width * encoders.image.hidden) + 4 * tokens_**2 * width
    return 3 * (blocks * block + 2 * GRID**2 * 3 * encoders.image.patch**2 * width)


def matmul_peak(dtype, size: int | None = None) -> float:
    """Operations per second that one device reaches in a large product of square matrices."""
    size = size or (512 if jax.default_backend() == "cpu" else 8192)
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda x: x @ x)
    times = []
    for _ in range(5):
        at = time.monotonic()
        jax.block_until_ready([product(x) for _ in range(5)])
        times.append((time.monotonic() - at) / 5)
    return 2 * size**3 / min(times)
