"""The frozen CLIP: image tower to tokens of every tapped level, text tower with learnable context.

Both towers are plain functions over the parameters that `weights.read` loads; they equal
transformers' FlaxCLIPModel (tests/clip/test_vit.py). The image tower runs once per image and never
inside a gradient; the text tower runs in every training step, causal and cut after the last
end-of-text token, since what comes later cannot change the result.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.clip import hf_weights, open_clip_weights, resnet, text_adapter
from medclip_jax.clip.layers import attend, product
from medclip_jax.clip.outputs import Features
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.prompts.prompts import Prompts


class Tower(NamedTuple):
    """What is static about one tower; hashable, so jit can close over it."""

    heads: int
    eps: float
    activation: str  # "quick_gelu" or "gelu"
    patch: int = 0  # pixels per patch side (vision)
    levels: tuple[int, ...] = ()  # tapped blocks, counted from 1 (vision)
    dtype: str = "float32"
    inputs: bool = False  # also tap what the tapped blocks read, for refinement (vision)


AnyTower = Tower | resnet.Tower


class Clip(NamedTuple):
    """A loaded checkpoint. `vision` and `text` are parameter trees, the rest is static."""

    vision: dict[str, Any]
    text: dict[str, Any]
    vision_tower: AnyTower
    text_tower: Tower
    tokenizer: Any
    name: str
    digest: str
    size: int  # pixels per side of the input image
    grid: int  # patches per side
    widths: tuple[int, ...]  # of a vision token, per tapped level
    text_width: int
    joint: int  # width of the space shared by image and text
    logit_scale: float  # log of 1/temperature
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eos_id: int


def load(
    checkpoint: str, levels: tuple[int, ...] = (), dtype: str = "float32", inputs: bool = False
) -> Clip:
    """Load `compact`, a folder or a Hub id; tap `levels` (blocks from 1; () = 1/2, 3/4 and last).

    Of a ResNet, levels are stages, () the last three. `inputs`: features hold the tapped blocks'
    inputs too. Raises CheckpointError for an unusable checkpoint, ConfigError for wrong levels.
    """
    folder = hf_weights.locate(checkpoint)
    w = (
        open_clip_weights.read(folder)
        if open_clip_weights.holds(folder)
        else hf_weights.read(str(folder))
    )
    vision, text = w.config["vision_config"], w.config["text_config"]
    tower: AnyTower
    if "shape" in vision:
        tower = resnet.tapped(vision["shape"], levels, dtype, inputs)
        widths = resnet.widths(w.vision, tower)
    else:
        tower = _vit(vision, tuple(levels), checkpoint, dtype, inputs)
        widths = (vision["hidden_size"],) * len(tower.levels)
    return Clip(
        vision=jax.tree.map(jnp.asarray, w.vision),
        text=jax.tree.map(jnp.asarray, w.text),
        vision_tower=tower,
        text_tower=Tower(text["num_attention_heads"], text["layer_norm_eps"], text["hidden_act"]),
        tokenizer=_tokenizer(w.folder),
        name=checkpoint,
        digest=w.digest,
        size=vision["image_size"],
        grid=vision["image_size"] // vision["patch_size"],
        widths=widths,
        text_width=text["hidden_size"],
        joint=w.config["projection_dim"],
        logit_scale=w.logit_scale,
        mean=w.mean,
        std=w.std,
        eos_id=text["eos_token_id"],
    )


def _vit(vision: dict, levels: tuple[int, ...], checkpoint: str, dtype: str, inputs: bool) -> Tower:
    depth = vision["num_hidden_layers"]
    levels = levels or tuple(round(depth * x) for x in (0.5, 0.75, 1.0))
    if not all(1 <= l <= depth for l in levels) or list(levels) != sorted(set(levels)):
        raise ConfigError(
            f"clip.levels {levels}: need rising block numbers between 1 and {depth} ({checkpoint})"
        )
    heads, eps = vision["num_attention_heads"], vision["layer_norm_eps"]
    return Tower(heads, eps, vision["hidden_act"], vision["patch_size"], levels, dtype, inputs)


def _tokenizer(folder):
    from transformers import CLIPTokenizerFast

    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on damaged files
        said = f"{folder}: the tokenizer cannot be read ({error}); copy its files again"
        raise CheckpointError(said) from None


# --- towers -------------------------------------------------------------------------------------


def _layer_norm(x, p, eps: float):
    """In float32 whatever the tower computes in."""
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=eps)
    return (y * _row(p["scale"], y) + _row(p["bias"], y)).astype(x.dtype)


def _row(v, like):
    """A vector over the last axis, with the leading axes that strict ranks ask for."""
    return v.reshape((1,) * (like.ndim - 1) + (-1,))


def _dense(x, p):
    y = product("...a,ab->...b", x, p["kernel"])
    return y + _row(p["bias"].astype(x.dtype), y)


def _activate(x, name: str):
    return x * jax.nn.sigmoid(1.702 * x) if name == "quick_gelu" else jax.nn.gelu(x, False)


def _attention(x, p, heads: int, mask, at=None):
    """Multi-head self-attention over [n, s, d]; mask [s, s] True where a query may look."""
    n, s, d = x.shape
    q, k, v = jnp.split(_dense(x, p["qkv"]).reshape(n, s, 3 * heads, d // heads), 3, axis=2)
    if at is not None:  # the queries of one position of each row
        q = q[jnp.arange(n), at][:, None]
        mask = None if mask is None else mask[0, 0][at][:, None, None]
    return _dense(attend(q, k, v, mask).reshape(n, -1, d), p["out"])


def _block(x, p, tower: Tower, mask=None, shift=None, at=None):
    """One block; `shift` is added to the first norm's output, `at` [n] -> those positions alone."""
    y = _layer_norm(x, p["norm1"], tower.eps)
    x = x if at is None else x[jnp.arange(len(x)), at][:, None]
    x = x + _attention(y if shift is None else y + shift, p, tower.heads, mask, at)
    hidden = _activate(_dense(_layer_norm(x, p["norm2"], tower.eps), p["fc1"]), tower.activation)
    return x + _dense(hidden, p["fc2"])


# its gradient makes attention and activation again: less to keep is faster
_policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_lean_block = jax.checkpoint(_block, static_argnums=2, policy=_policy)


def normalise(grey: Float[Array, "n h w"], mean, std) -> Float[Array, "n h w 3"]:
    """Grey images in [0, 1] -> what the tower was trained on."""
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (mean, std))
    return (grey[..., None] - mean) / std


def embed(
    vision: dict[str, Any], pixels: Float[Array, "n h w 3"], tower: Tower
) -> Float[Array, "n s d"]:
    """What the first block reads: class token, then patches (row-major), with positions."""
    n, h, w, _ = pixels.shape
    s = tower.patch
    patches = pixels.reshape(n, h // s, s, w // s, s, 3).transpose(0, 1, 3, 2, 4, 5)
    dtype = jnp.dtype(tower.dtype)
    x = product("npi,id->npd", patches.reshape(n, -1, s * s * 3).astype(dtype), vision["patch"])
    first = jnp.broadcast_to(vision["class"].astype(dtype), (n, 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1) + vision["position"].astype(dtype)[None]
    return _layer_norm(x, vision["pre"], tower.eps)


def run_block(
    vision: dict[str, Any], x: Float[Array, "n s d"], number: int, tower: Tower, shift=None
) -> Float[Array, "n s d"]:
    """Block `number` (from 1) of the image tower; a `shift` is added to its first norm's output."""
    return _block(x, jax.tree.map(lambda b: b[number - 1], vision["blocks"]), tower, shift=shift)


def first_norm(
    vision: dict[str, Any], x: Float[Array, "n s d"], number: int, tower: Tower
) -> Float[Array, "n s d"]:
    """What the first norm of block `number` (from 1) hands to its attention."""
    return _layer_norm(
        x, jax.tree.map(lambda b: b[number - 1], vision["blocks"]["norm1"]), tower.eps
    )


def pool(vision: dict[str, Any], x: Float[Array, "n s d"], tower: Tower) -> Float[Array, "n j"]:
    """The pooled embedding (joint space, not normalised) of the last block's tokens."""
    first = _layer_norm(x[:, 0], vision["post"], tower.eps)
    return first @ vision["projection"].astype(x.dtype)


def patch_features(
    vision: dict[str, Any], pixels: Float[Array, "n h w 3"], tower: Tower
) -> Features:
    """Pooled embedding (joint space, not normalised) and patch tokens after each tapped block.

    Tokens are the residual stream, without the final norm and projection, as MediCLIP taps them
    (PEERS 5.9); row-major grid, class token dropped.
    """
    x = embed(vision, pixels, tower)
    levels, inputs, start = [], [], 0
    for level in tower.levels:  # one scan per stretch between taps
        if tower.inputs:
            before = jax.tree.map(lambda b, i=start, j=level - 1: b[i:j], vision["blocks"])
            x, _ = jax.lax.scan(lambda y, p: (_block(y, p, tower), None), x, before)
            inputs.append(x.astype(jnp.float32))
            start = level - 1
        stretch = jax.tree.map(lambda b, i=start, j=level: b[i:j], vision["blocks"])
        x, _ = jax.lax.scan(lambda y, p: (_block(y, p, tower), None), x, stretch)
        levels.append(x[:, 1:].astype(jnp.float32))
        start = level
    rest = jax.tree.map(lambda b: b[start:], vision["blocks"])
    x, _ = jax.lax.scan(lambda y, p: (_block(y, p, tower), None), x, rest)
    return Features(pool(vision, x, tower).astype(jnp.float32), tuple(levels), tuple(inputs))


def project(
    vision: dict[str, Any], tokens: Float[Array, "n p d"], tower: AnyTower
) -> Float[Array, "n p j"]:
    """Last block's tokens into the joint space, by the tower's own final norm and projection."""
    if isinstance(tower, resnet.Tower):
        return resnet.project(vision, tokens, tower)
    return _layer_norm(tokens, vision["post"], tower.eps) @ vision["projection"]


def encode_text(
    text: Mapping[str, Any],
    context: Float[Array, "c k d"],
    prompts: Prompts,
    tower: Tower,
    causal: bool = True,
) -> Float[Array, "c j"]:
    """Prompt embeddings in the joint space, not normalised.

    `context` [c, k, d] fills the slots of `prompts` (equation 4). `causal=False` is MediCLIP's
    unmasked tower, which also sees the padding (PEERS 4, trap 8): keep all 77 positions then.
    """
    end = int(np.max(prompts.eos)) + 1 if causal else None
    ids, slots = (jnp.asarray(x)[:, :end] for x in (prompts.ids, prompts.slots))
    return encode_ids(text, context, ids, slots, jnp.asarray(prompts.eos), tower, causal)


def encode_ids(
    text: Mapping[str, Any],
    context: Float[Array, "c k d"],
    ids: Int[Array, "c t"],
    slots: Int[Array, "c t"],
    eos: Int[Array, " c"],
    tower: Tower,
    causal: bool,
) -> Float[Array, "c j"]:
    """`encode_text` of prompts that may be chosen on the device; t may end after the last EOS.

    A language adapter follows the tower where `text` holds one, as `language`.
    """
    x = _embed(text["token"], context, ids, slots)
    positions = x.shape[1]
    x = x + text["position"][None, :positions]
    mask = jnp.tril(jnp.ones((positions, positions), bool))[None, None] if causal else None
    blocks, last = text["blocks"], text["blocks"]["fc1"]["bias"].shape[0] - 1
    for i in range(last):  # a loop: its gradient beats scan's
        x = _lean_block(x, jax.tree.map(lambda b, i=i: b[i], blocks), tower, mask)
    x = _block(x, jax.tree.map(lambda b: b[last], blocks), tower, mask, at=eos)
    made = _layer_norm(x[:, 0], text["final"], tower.eps) @ text["projection"]
    return text_adapter.adapt(text["language"], made) if "language" in text else made


def _embed(
    table: Float[Array, "v d"],
    context: Float[Array, "c k d"],
    ids: Int[Array, "c t"],
    slots: Int[Array, "c t"],
) -> Float[Array, "c t d"]:
    """Token embeddings with context vectors where a slot says so."""
    where = jax.nn.one_hot(slots, context.shape[1], dtype=context.dtype)  # no slot: zeros
    filled = jnp.einsum("ctk,ckd->ctd", where, context, precision=jax.lax.Precision.HIGHEST)
    return jnp.where((slots >= 0)[..., None], filled, table[ids])


@partial(jax.jit, static_argnames=("tower", "mean", "std"))
def encode_images(vision, grey: Float[Array, "n h w"], *, tower: AnyTower, mean, std) -> Features:
    """Grey images in [0, 1] straight to features; rows are independent (shard them freely)."""
    read: Any = resnet.encode if isinstance(tower, resnet.Tower) else patch_features
    return read(vision, normalise(grey, mean, std), tower)
