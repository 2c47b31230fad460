"""A loaded CLIP: its encoders, their parameters and its tokenizer, whatever made the checkpoint."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medclip_jax.clip import hf_weights, open_clip_weights, resnet, text, transformers_flax, vit
from medclip_jax.clip.layers import Features, ImageEncoder
from medclip_jax.errors import CheckpointError, ConfigError


class Clip(NamedTuple):
    """A checkpoint. `vision` and `text` are parameters on the device, the rest is static."""

    vision: dict[str, Any]  # as image_encoder reads them
    text: dict[str, Any]  # text_model and text_projection of transformers' Flax tree
    image_encoder: ImageEncoder
    text_encoder: nn.Module
    tokenizer: Any
    name: str
    digest: str
    size: int  # pixels per side of the input image
    grid: int  # patches per side
    widths: tuple[int, ...]  # of an image token, per tapped level
    text_width: int
    positions: int  # of the text encoder: tokens of a prompt at most
    joint: int  # width of the space shared by image and text
    logit_scale: float  # log of 1/temperature
    mean: tuple[float, ...]  # of the pixels, per channel
    std: tuple[float, ...]
    eos_id: int

    @property
    def params(self) -> dict[str, Any]:
        """The whole tree; of a ViT, what FlaxCLIPModel takes as `params`."""
        image = self.image_encoder.restore(self.vision)
        return {**image, **self.text, "logit_scale": jnp.asarray(self.logit_scale, jnp.float32)}


def load(
    checkpoint: str,
    layers: tuple[int, ...] = (),
    dtype: str = "float32",
    inputs: bool = False,
    implementation: str = "fused",
) -> Clip:
    """Load a CLIP.

    Args:
        checkpoint: `compact` (embedded), a folder or a Hub id.
        layers: tapped blocks, from 1; () is 1/2, 3/4 and the last. Of a ResNet: stages, () is 2-4.
        dtype: of the image encoder, float32 or bfloat16.
        inputs: whether features hold the inputs of the tapped blocks too, for refinement.
        implementation: fused or transformers.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: there are no such layers, or the implementation does not have them.
    """
    folder = hf_weights.locate(checkpoint)
    of_open_clip = open_clip_weights.matches(folder)
    weights = open_clip_weights.read(folder) if of_open_clip else hf_weights.read(folder)
    taps = dict(levels=tuple(layers), dtype=dtype, inputs=inputs)
    if weights.resnet is None:
        taps["levels"] = _blocks(weights.config, tuple(layers))
    elif implementation == "transformers":
        raise ConfigError(
            f"config.clip.implementation is 'transformers', which has no ResNet ({checkpoint}): "
            "give fused"
        )
    encoders = _by_transformers if implementation == "transformers" else _fused
    return _assemble(checkpoint, weights, *encoders(weights, taps))


def _assemble(name: str, weights: hf_weights.Weights, image_encoder, text_encoder) -> Clip:
    params, config = weights.params, weights.config
    vision, levels = config["vision_config"], image_encoder.levels
    embeddings = params["text_model"]["embeddings"]
    text_params = {part: params[part] for part in ("text_model", "text_projection")}
    if weights.resnet is None:
        widths = (vision["hidden_size"],) * len(levels)
    else:
        widths = weights.resnet.widths(levels)
    return Clip(
        vision=jax.tree.map(jnp.asarray, image_encoder.prepare(params)),
        text=jax.tree.map(jnp.asarray, text_params),
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        tokenizer=_tokenizer(weights.folder),
        name=name,
        digest=weights.digest,
        size=vision["image_size"],
        grid=vision["image_size"] // vision["patch_size"],
        widths=widths,
        text_width=embeddings["token_embedding"]["embedding"].shape[1],
        positions=len(embeddings["position_embedding"]["embedding"]),
        joint=params["text_projection"]["kernel"].shape[1],
        logit_scale=float(params["logit_scale"]),
        mean=weights.mean,
        std=weights.std,
        eos_id=config["text_config"]["eos_token_id"],
    )


def _fused(weights: hf_weights.Weights, taps: dict) -> tuple[ImageEncoder, nn.Module]:
    def kinds(part):
        c = weights.config[f"{part}_config"]
        return c["num_attention_heads"], c["hidden_act"], c["layer_norm_eps"]

    text_encoder = text.of_params(weights.params, *kinds("text"))
    if weights.resnet is not None:
        return resnet.tapped(weights.resnet, **taps), text_encoder
    return vit.of_params(weights.params, *kinds("vision"), **taps), text_encoder


def _by_transformers(weights: hf_weights.Weights, taps: dict) -> tuple[ImageEncoder, nn.Module]:
    transformers_flax.modules()  # an error now, not at the first image
    joint = weights.config["projection_dim"]
    vision, words = (json.dumps(weights.config[f"{x}_config"]) for x in ("vision", "text"))
    image_encoder = transformers_flax.TransformersViT(vision, joint, **taps)
    return image_encoder, transformers_flax.TransformersText(words, joint)


def _blocks(config: dict, levels: tuple[int, ...]) -> tuple[int, ...]:
    """The tapped blocks of a ViT."""
    depth = config["vision_config"]["num_hidden_layers"]
    levels = levels or tuple(round(depth * x) for x in (0.5, 0.75, 1.0))
    if not all(1 <= l <= depth for l in levels) or list(levels) != sorted(set(levels)):
        raise ConfigError(
            f"config.clip.layers {levels}: need rising block numbers between 1 and {depth}"
        )
    return levels


def _tokenizer(folder: Path):
    from transformers import CLIPTokenizerFast

    try:
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on damaged files
        message = f"{folder}: the tokenizer cannot be read ({error}); copy its files again"
        raise CheckpointError(message) from None


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
