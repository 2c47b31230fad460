"""What turns tokens into one value per patch: a trained model, a memory, or plain prompts.

Every detector also scores each support as if it had never seen it; those values calibrate.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax import clip, features, kept, memory, model, score, thinned
from medclip_jax.data import readers, views
from medclip_jax.structs import Features, Record

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


def build(
    method: str,
    theta: Any,
    frozen: dict,
    design: model.Design | None,
    bank: features.Bank,
    supports: Sequence[Record],
    groups: Sequence[np.ndarray],
    coreset: float = 1.0,
    mirror: bool = False,
) -> Detector:
    """The detector of a method; `theta` [1 + folds, ...] as fit.run leaves it.

    coreset: share of the healthy patches that a memory keeps, in (0, 1]. mirror: it remembers the
    supports mirrored left and right as well.
    """
    tokens, healthy = healthy_tokens(bank, supports)
    if method == "zero_shot" or tokens is None:
        return zero_shot(theta, frozen, design, bank.clip, healthy)._replace(k=len(supports))
    if method == "memory":
        tokens = mirrored(bank, supports) if mirror else tokens
        return remember(tokens, coreset, healthy, rows=1 + mirror, asked=1)
    return learned(theta, frozen, design, tokens, groups, healthy)


def healthy_tokens(
    bank: features.Bank, supports: Sequence[Record]
) -> tuple[Features | None, Features | None]:
    """Tokens of the supports, and those that calibrate: the supports, or views of a single one."""
    if not supports:
        return None, None
    (tokens,) = features.load_images(bank, supports, len(supports))
    tokens = healthy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tokens)
    if len(supports) == 1:
        images = healthy_images(bank, supports)[None]
        (made,) = kept.encode(bank, images, partial(features.encode, bank), "views")
        healthy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made)
    return tokens, healthy


def healthy_images(
    bank: features.Bank, supports: Sequence[Record], size: int | None = None
) -> Float[np.ndarray, "m s s"]:
    """Pixels of the images that calibrate, in the tower frame; size: another side of it."""
    images = pixels(bank, supports, size or bank.clip.size)
    return views.of(images[0]) if len(supports) == 1 else images


def pixels(
    bank: features.Bank, supports: Sequence[Record], size: int
) -> Float[np.ndarray, "k s s"]:
    """Pixels of the supports in a frame of `size` per side."""
    found = {r.id: x for r, x in readers.read_all(supports, size, bank.fit)}
    return np.stack([found[r.id] for r in supports])


def mirrored(bank: features.Bank, supports: Sequence[Record]) -> Features:
    """Tokens of the supports [2 k], each followed by its mirror image, which the bank keeps too."""
    images = pixels(bank, supports, bank.clip.size)[:, None, :, ::-1]
    made = kept.encode(bank, images, partial(features.encode, bank), "mirrored")
    (tokens,) = features.load_images(bank, supports, len(supports))
    each = [jax.tree.map(lambda x, i=i: x[i : i + 1], tokens) for i in range(len(supports))]
    pairs = [x for pair in zip(each, made, strict=True) for x in pair]
    return jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x), jnp.float32), *pairs)


def learned(
    theta, frozen, design, tokens: Features, groups, healthy: Features | None = None
) -> Detector:
    """Prompts and adapters: copy 0 scores, copy 1 + f scores the supports of fold f.

    Without folds copy 0 scores `healthy` (the supports themselves if that is None).
    """
    read = jax.jit(jax.vmap(partial(model.text_features, design=design), (0, None)))
    texts = read(theta, frozen)
    pick = [jax.tree.map(lambda x, i=i: x[i], (theta, texts)) for i in range(1 + len(groups))]

    @jax.jit
    def patches(copy, batch):
        theta, text = copy
        return model.forward(theta, text, batch, design).logit

    @jax.jit
    def passes(copy, batch, keys):
        theta, text = copy
        return thinned.logits(theta, text, batch, design, keys)

    shown = tokens if len(groups) or healthy is None else healthy
    held_out = np.zeros((len(shown.pooled), design.grid**2), np.float32)
    copies = pick[1:] or pick
    held = [*groups] or [np.arange(len(held_out))]
    for copy, group in zip(copies, held, strict=True):
        held_out[group] = patches(copy, jax.tree.map(lambda x, g=group: x[g], shown))
    fold_of = {int(i): f for f, group in enumerate(held) for i in group}
    return Detector(
        partial(patches, pick[0]),
        held_out,
        partial(passes, pick[0]) if design.dropout > 0 else None,
        without=lambda i, batch: patches(copies[fold_of[i]], batch),
        k=len(tokens.pooled),
        copies=(lambda b: jnp.stack([patches(c, b) for c in copies])) if len(copies) > 1 else None,
        choose=lambda _: pick[0],
        chosen=lambda batch, copy: patches(copy, batch),
    )


def remember(
    tokens: Features,
    coreset: float = 1.0,
    healthy: Features | None = None,
    rows: int = 1,
    asked: int | None = None,
) -> Detector:
    """Nearest healthy patch of the supports; a support is compared with the others only.

    coreset: share of the patches that is kept. A single support is remembered whole, and `healthy`
    (views of it) are compared with it. rows: of the tokens, in turn, that are of one support;
    the first `asked` of them (all by default) are its held-out values.
    """
    asked = asked or rows
    pooled = tuple(score.neighbourhood(x) for x in tokens.levels)
    pooled = tuple(m.reshape(-1, rows * m.shape[1], m.shape[2]) for m in pooled)
    k = len(pooled[0])

    @jax.jit
    def search(batch, kept):
        return score.nearest(tuple(map(score.neighbourhood, batch.levels)), kept)

    def patches(batch, kept):
        return search(batch, kept)[0]

    def chosen(batch, choice):
        return score.distance_to(tuple(map(score.neighbourhood, batch.levels)), choice)

    @jax.jit
    def choose(supports, pooled):
        return tuple(memory.keep(m[supports].reshape(-1, m.shape[-1]), coreset) for m in pooled)

    def without(i, batch):
        others = np.delete(np.arange(k), i) if k > 1 else np.arange(k)
        return patches(batch, choose(others, pooled))

    everything = choose(np.arange(k), pooled)
    if k > 1 or healthy is None:
        own = [slice(i * rows, i * rows + asked) for i in range(k)]
        each = (jax.tree.map(lambda x, r=r: x[r], tokens) for r in own)
        scored = [without(i, one) for i, one in enumerate(each)]
    else:
        scored = [patches(healthy, everything)]
    held_out = np.concatenate(scored)
    found = once(lambda b: search(b, everything))
    return Detector(
        lambda b: found(b)[0],
        held_out,
        None,
        without=without,
        k=k,
        choose=lambda b: tuple(m[row] for m, row in zip(everything, found(b)[1], strict=True)),
        chosen=chosen,
    )


def once(function: Callable) -> Callable:
    """`function`, which remembers its value for the last argument: called again, it is not run.

    The map, image score, passes and copies of one batch all read the same values. Under a
    transformation (Grad-CAM's gradient) nothing is remembered.
    """
    last = object(), None  # read and replaced whole, for threads; no batch is this object

    def remembering(batch):
        nonlocal last
        known, value = last
        if known is batch:
            return value
        value = function(batch)
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(batch)):
            last = batch, value
        return value

    return remembering


def zero_shot(theta, frozen, design, tower: clip.Clip, tokens: Features | None) -> Detector:
    """CLIP's own text and image embeddings, healthy against abnormal prompts; nothing is learned.

    Patches are the last level's tokens through the tower's own norm and projection. Values are
    logits: 0 is where both classes are equally likely. `tokens` None: no support (K = 0).
    """
    empty = jnp.zeros((len(design.prompts.ids), 0, tower.text_width))
    words = design.prompts, design.text_tower, design.causal
    read = jax.jit(lambda weights: clip.encode_text(weights, empty, *words))
    text = read(frozen["text"])
    scale, zero = jnp.exp(frozen["logit_scale"]), jnp.asarray(0.0)
    label = design.prompts.label

    @jax.jit
    def patches(batch):
        joint = clip.project(tower.vision, batch.levels[-1], tower.vision_tower)
        return score.patch_logit((joint,), text, label, scale, zero, "softmax")

    @jax.jit
    def image(batch):
        pooled = batch.pooled[:, None]
        return score.patch_logit((pooled,), text, label, scale, zero, "softmax")[:, 0]

    if tokens is None:
        none = np.zeros((0, design.grid**2), np.float32)
        return Detector(patches, none, None, image, np.zeros(0, np.float32))
    held_out = np.asarray(patches(tokens)), np.asarray(image(tokens))
    k = len(tokens.pooled)
    return Detector(patches, *held_out[:1], None, image, held_out[1], lambda _, b: patches(b), k=k)
