"""A loaded CLIP: its encoders, their parameters and its tokenizer, whatever made the checkpoint."""

import json
import re
import time
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from medclip_jax.clip import hf_weights, open_clip_weights, resnet, text, transformers_flax, vit
from medclip_jax.clip.layers import Features, ImageEncoder
from medclip_jax.errors import CheckpointError, ConfigError


class Clip(NamedTuple):
    """A checkpoint. `vision` and `text` are parameters on the device, the rest is static."""

    vision: dict[str, Any]  # as image_encoder reads them
    text: dict[str, Any]  # text_model and text_projection of transformers' Flax tree
    image_encoder: ImageEncoder
    text_encoder: Any  # a flax.linen module; None, as is the next, of images alone
    tokenizer: Any
    name: str
    digest: str
    size: int  # pixels per side of the input image
    grid: int  # patches per side
    widths: tuple[int, ...]  # of an image token, per tapped level
    text_width: int  # 0: there is no text encoder
    positions: int  # of the text encoder: tokens of a prompt at most
    joint: int  # width of the space shared by image and text, or of the pooled embedding
    logit_scale: float  # log of 1/temperature
    mean: tuple[float, ...]  # of the pixels, per channel
    std: tuple[float, ...]
    eos_id: int
    own_digest: str  # without the memory's encoder: what language adapters name
    memory_levels: int = 0  # after the CLIP's own levels, of the memory's encoder: see lite0.py

    @property
    def first_memory_level(self) -> int:
        """Where the levels that the memory reads begin: all, or those of its own encoder."""
        return len(self.widths) if self.memory_levels else 0

    @property
    def params(self) -> dict[str, Any]:
        """The whole tree; of a ViT, what FlaxCLIPModel takes (and the memory's encoder)."""
        image = self.image_encoder.restore(self.vision)
        scale = {"logit_scale": jnp.asarray(self.logit_scale, jnp.float32)} if self.text else {}
        return {**image, **self.text, **scale}


def load(
    checkpoint: str,
    layers: tuple[int, ...] = (),
    dtype: str = "float32",
    inputs: bool = False,
    implementation: str = "fused",
    size: int = 0,
) -> Clip:
    """Load a CLIP.

    Args:
        checkpoint: `compact` (embedded), a folder or a Hub id.
        layers: tapped blocks, from 1; () is 1/2, 3/4 and the last. Of a ResNet: stages, () is 2-4.
        dtype: of the image encoder, float32, bfloat16, or int8: weights of int8, all else bfloat16.
        inputs: whether features hold the inputs of the tapped blocks too, for refinement.
        implementation: fused or transformers.
        size: pixels per side of the input image; 0 is the checkpoint's own.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: there are no such layers, the implementation does not have them, or the size
            does not go with the patches.
    """
    folder = hf_weights.locate(checkpoint)
    reader = open_clip_weights if open_clip_weights.matches(folder) else hf_weights
    weights = _at_size(reader.read(folder), size)
    taps = dict(levels=tuple(layers), dtype=dtype, inputs=inputs)
    if weights.resnet is None:
        taps["levels"] = _blocks(weights.config, tuple(layers))
    if dtype == "int8" and (weights.resnet is not None or implementation == "transformers"):
        raise ConfigError(
            "config.clip.dtype is 'int8', which works with a ViT and clip.implementation=fused "
            "only: give float32 or bfloat16"
        )
    image_encoder, text_encoder = _fused(weights, taps)
    if implementation == "transformers":
        of_clip = weights.resnet is None and "projection_dim" in weights.config
        if not of_clip or weights.config["model_type"] != "clip":
            raise ConfigError(
                "config.clip.implementation is 'transformers', which has CLIPs in transformers' "
                f"format alone, no ResNet or other encoder ({checkpoint}): give fused"
            )
        image_encoder, text_encoder = _by_transformers(weights, taps)
    return _assemble(checkpoint, weights, image_encoder, text_encoder)


def _assemble(name: str, weights: hf_weights.Weights, image_encoder, text_encoder) -> Clip:
    params, config, levels = weights.params, weights.config, image_encoder.levels
    vision = config["vision_config"]
    text_params = {part: params[part] for part in params if part.startswith("text_")}
    if weights.resnet is None:
        widths = (vision["hidden_size"],) * len(levels)
    else:
        widths = weights.resnet.widths(levels)
    tokenizer, tokens, positions, end = None, np.zeros((0, 0)), 0, -1
    if text_encoder is not None:
        tokenizer = text.load_tokenizer(weights.folder, weights.tokenizer)
        tokens, table = (
            params["text_model"]["embeddings"][f"{x}_embedding"]["embedding"]
            for x in ("token", "position")
        )
        positions = min(len(table), config["text_config"].get("positions", len(table)))
        own = weights.tokenizer == "clip"
        end = config["text_config"]["eos_token_id"] if own else tokenizer.eos_token_id
    return Clip(
        vision=jax.tree.map(jnp.asarray, image_encoder.prepare(params)),
        text=jax.tree.map(jnp.asarray, text_params),
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        name=name,
        digest=weights.digest,
        size=vision["image_size"],
        grid=vision["image_size"] // vision["patch_size"],
        widths=widths,
        text_width=tokens.shape[1],
        positions=positions,
        joint=vision["hidden_size"] if text_encoder is None else text_encoder.joint,
        logit_scale=float(params.get("logit_scale", 0)),
        mean=weights.mean,
        std=weights.std,
        eos_id=end,
        own_digest=weights.digest,
    )


def _fused(weights: hf_weights.Weights, taps: dict) -> tuple[ImageEncoder, Any]:
    """The encoders. Raises CheckpointError where shapes of the parameters do not fit them."""
    params = weights.params

    def kinds(part):
        c = weights.config[f"{part}_config"]
        return c["num_attention_heads"], c["hidden_act"], c["layer_norm_eps"]

    try:
        text_encoder: Any = None
        if weights.pooling:
            heads, _, eps = kinds("text")
            text_encoder = text.bert_of_params(params, heads, weights.pooling, eps)
        elif "text_model" in params:
            text_encoder = text.of_params(params, *kinds("text"))
        if weights.resnet is not None:
            return resnet.tapped(weights.resnet, **taps), text_encoder
        more: dict[str, Any] = {**taps, **weights.vision}
        encoder = vit.of_params(params, *kinds("vision"), **more)
        vision = weights.config["vision_config"]
        for name, own in (("patch_size", encoder.patch), ("hidden_size", encoder.width)):
            if vision[name] != own:
                raise ValueError(f"{name} of the images is {vision[name]}, not {own}")
        pixels = jax.ShapeDtypeStruct((1, *[vision["image_size"]] * 2, 3), np.float32)
        _check_shapes(encoder.clone(levels=()), params, pixels)
        if text_encoder is not None:
            one, context = jnp.zeros((1, 1), int), jnp.zeros((1, 0, text_encoder.width))
            _check_shapes(text_encoder, params, context, one, one - 1, jnp.zeros(1, int))
        return encoder, text_encoder
    except (TypeError, ValueError, IndexError, FlaxError) as error:
        said = str(error).split("\n")[0][:200]
        raise CheckpointError(
            f"{weights.folder}: shapes of the tensors do not fit its config ({said}); "
            "download it again"
        ) from None


def _check_shapes(module: nn.Module, params: dict, *inputs) -> None:
    """ValueError naming the first parameter whose shape is not the module's."""
    one: Any = module.clone(depth=1)
    fresh = jax.eval_shape(one.init, jax.random.key(0), *inputs)["params"]
    flat = flatten_dict(params, sep="/")
    for name, like in flatten_dict(fresh, sep="/").items():
        pattern = re.escape(name).replace("layers/0/", r"layers/\d+/")
        for own in (n for n in flat if re.fullmatch(pattern, n)):
            if flat[own].shape != like.shape:
                raise ValueError(f"{own} is {flat[own].shape}, not {like.shape}")


def _at_size(weights: hf_weights.Weights, size: int) -> hf_weights.Weights:
    """The same for images of `size` pixels per side; 0: its own."""
    vision = weights.config["vision_config"]
    patch, own = vision["patch_size"], vision["image_size"]
    if size in (0, own):
        return weights
    if weights.resnet is not None:
        raise ConfigError(
            f"config.clip.size is {size}, and a ResNet takes its own {own} alone: give 0"
        )
    if size % patch:
        raise ConfigError(
            f"config.clip.size is {size}, no multiple of the patches' {patch} pixels: "
            f"give {(least := size // patch or 1) * patch} or {(least + 1) * patch}"
        )
    config = {**weights.config, "vision_config": {**vision, "image_size": size}}
    model = weights.params["vision_model"]
    if (entry := model["embeddings"].get("position_embedding")) is not None:
        table = entry["embedding"]
        first = 1 if "class_embedding" in model["embeddings"] else 0
        if len(table) - first != (size // patch) ** 2:
            table = [table[:first], vit.resized(table[first:], size // patch, weights.antialias)]
            entry = {"embedding": np.concatenate(table)}
        embeddings = {**model["embeddings"], "position_embedding": entry}
        params = {**weights.params, "vision_model": {**model, "embeddings": embeddings}}
        weights = weights._replace(params=params)
    return weights._replace(config=config)


def _by_transformers(weights: hf_weights.Weights, taps: dict) -> tuple[ImageEncoder, nn.Module]:
    transformers_flax.modules()  # an error now, not at the first image
    joint = weights.config["projection_dim"]
    vision, words = (json.dumps(weights.config[f"{x}_config"]) for x in ("vision", "text"))
    image_encoder = transformers_flax.TransformersViT(vision, joint, **taps)
    return image_encoder, transformers_flax.TransformersText(words, joint)


def _blocks(config: dict, levels: tuple[int, ...]) -> tuple[int, ...]:
    """The tapped blocks of a ViT."""
    depth = config["vision_config"]["num_hidden_layers"]
    levels = levels or tuple(sorted({max(round(depth * x), 1) for x in (0.5, 0.75, 1.0)}))
    if not all(1 <= l <= depth for l in levels) or list(levels) != sorted(set(levels)):
        raise ConfigError(
            f"config.clip.layers {levels}: need rising block numbers between 1 and {depth}"
        )
    return levels


def normalise(grey: Float[Array, "n h w"], mean, std) -> Float[Array, "n h w 3"]:
    """Grey images in [0, 1] -> what the encoder was trained on."""
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (mean, std))
    return (grey[..., None] - mean) / std


@partial(jax.jit, static_argnames=("encoder", "mean", "std"))
def encode_images(
    vision, grey: Float[Array, "n h w"], *, encoder: ImageEncoder, mean, std
) -> Features:
    """Grey images in [0, 1] to features; rows are independent. Args are fields of Clip."""
    return encoder.apply({"params": vision}, normalise(grey, mean, std))


def describe(clip: Clip, images: int) -> dict[str, str]:
    """What a checkpoint is and what it costs here, one line each; the encoder runs three times.

    images: of the supports and their variants in training.
    """
    encoder: Any = clip.image_encoder
    side = clip.size
    count, size = (
        sum(getattr(x, part) for x in jax.tree.leaves((clip.vision, clip.text)))
        for part in ("size", "nbytes")
    )
    static = dict(encoder=encoder, mean=clip.mean, std=clip.std)
    grey = jnp.zeros((1, side, side))
    run = encode_images.lower(clip.vision, grey, **static).compile()
    found = jax.block_until_ready(run(clip.vision, grey))
    begin = time.perf_counter()
    jax.block_until_ready([run(clip.vision, grey) for _ in range(2)])
    seconds = (time.perf_counter() - begin) / 2
    used: Any = run.memory_analysis()
    tokens = sum(x.size for x in found.levels) * (4 if encoder.dtype == "float32" else 2)
    card = hf_weights.locate(clip.name) / "README.md"
    text = card.read_text(errors="replace")[:5000] if card.is_file() else ""
    licence = re.search(r"^license(?:_name)?: *(.+)$", text, re.MULTILINE)
    words = "no text: give method=memory"
    if clip.text_encoder is not None:
        kind, of_tokens = type(clip.text_encoder).__name__, type(clip.tokenizer).__name__
        words = f"{kind}, {clip.positions} positions; tokens by {of_tokens}, {len(clip.tokenizer)}"
    lines = {
        "checkpoint": f"{clip.name} ({clip.digest}), {count / 1e6:.1f} million parameters",
        "images": f"{getattr(encoder, 'title', type(encoder).__name__)}, {side} x {side} pixels, "
        f"{clip.grid} x {clip.grid} patches, pooled to {clip.joint}",
        "layers": f"{', '.join(map(str, encoder.levels))} of {encoder.depth} are tapped",
        "text": words,
        "memory": f"{size / 1e6:,.0f} MB of parameters, "
        f"{used.temp_size_in_bytes / 1e6:,.0f} MB per image in work",
        "seconds": f"{seconds:.2g} per image: about {seconds * images:,.0f} for {images} images of "
        f"training, {100 * seconds:,.0f} per 100 test images, one at a time",
        "cache": f"{tokens * images / 1e6:,.0f} MB of tokens for training, {tokens / 1e4:,.0f} MB "
        "per 100 test images",
        "licence": licence[1].strip() if licence else "its card says none: ask who published it",
    }
    if (hidden := getattr(encoder, "hidden", 0)) and hasattr(encoder, "width"):
        d, s = encoder.width, clip.grid**2 + encoder.prefix
        block = 2 * s * d * (4 * d + 2 * hidden) + 4 * s * s * d
        lines["seconds"] += f"; {encoder.depth * block / 1e9:,.1f} billion operations per image"
    return lines
