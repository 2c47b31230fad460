"""The CLIP that is trained: the package's own Flax encoders over transformers' parameter tree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import CLIPConfig

from medclip_jax.clip import checkpoint, hf_weights, text, vit
from medclip_jax.models.similarity import unit as unit  # length 1 along the last axis

Params = dict[str, Any]  # FlaxCLIPModel's: vision_model, visual_projection, text_model, ...


class Encoders(NamedTuple):
    """Both encoders, hashable."""

    image: vit.ViT
    text: text.TextEncoder
    size: int  # pixels per side

    @property
    def grid(self) -> int:
        return self.size // self.image.patch


def make_config(
    vocabulary: int,
    *,
    width: int = 192,
    layers: int = 8,
    heads: int = 3,
    text_width: int = 128,
    text_layers: int = 4,
    text_heads: int = 2,
    joint: int = 192,
    patch: int = 16,
    size: int = 224,
) -> CLIPConfig:
    """transformers' config of a CLIP. The end token, also the padding, has the largest id."""
    end = vocabulary - 1
    both = {"projection_dim": joint, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    of_text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": text_heads,
        "max_position_embeddings": 77,
        "vocab_size": vocabulary,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    of_image = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
    }
    return CLIPConfig(
        text_config=of_text | both,
        vision_config=of_image | both,
        projection_dim=joint,
        architectures=["CLIPModel"],
    )


def build(config: CLIPConfig, dtype: str = "float32") -> Encoders:
    """The modules of a config; with `dtype` bfloat16 the image encoder multiplies in it, and sums
    in float32."""
    v, t, joint = config.vision_config, config.text_config, config.projection_dim
    image = vit.ViT(
        width=v.hidden_size,
        heads=v.num_attention_heads,
        hidden=v.intermediate_size,
        depth=v.num_hidden_layers,
        patch=v.patch_size,
        positions=(v.image_size // v.patch_size) ** 2 + 1,
        joint=joint,
        dtype=dtype,
    )
    words = text.TextEncoder(
        width=t.hidden_size,
        heads=t.num_attention_heads,
        hidden=t.intermediate_size,
        depth=t.num_hidden_layers,
        vocabulary=t.vocab_size,
        positions=t.max_position_embeddings,
        joint=joint,
    )
    return Encoders(image, words, v.image_size)


def init(encoders: Encoders, seed: int) -> Params:
    """Random parameters, float32; what blocks add is scaled down with depth, as CLIP does."""
    one, two = jax.random.split(jax.random.key(seed))
    pixels = jnp.zeros((1, encoders.size, encoders.size, 3))
    ids = jnp.zeros((1, 2), int)
    context = jnp.zeros((1, 0, encoders.text.width))
    params = {
        **jax.jit(encoders.image.init)(one, pixels)["params"],
        **jax.jit(encoders.text.init)(two, context, ids, ids - 1, ids[:, 0])["params"],
        "logit_scale": np.float32(2.6592),
    }

    def scaled(path, x):
        names = [str(k.key) for k in path]
        if names[-1] != "kernel" or names[-2] not in ("out_proj", "fc2"):
            return np.asarray(x, np.float32)
        depth = encoders.image.depth if names[0] == "vision_model" else encoders.text.depth
        return np.asarray(x * (2 * depth) ** -0.5, np.float32)

    return jax.tree_util.tree_map_with_path(scaled, params)


def encode_image(
    params: Params,
    encoders: Encoders,
    grey: Float[Array, "n h w"],
    keep: Int[Array, "n t"] | None = None,
) -> tuple[Float[Array, "n 1+t d"], Float[Array, "n 1+t d"]]:
    """Tokens after the middle and the last block, float32, class token first, of images in [0, 1].

    `keep` names the patches that enter (random subsets make training steps cheaper).
    """

    def run(encoder, images):
        x = encoder.embed(images)
        if keep is not None:
            x = jnp.concatenate([x[:, :1], jnp.take_along_axis(x[:, 1:], keep[..., None], 1)], 1)
        blocks, half = encoder.vision_model.encoder, encoder.depth // 2
        middle = blocks.run(x, 0, half)
        return middle, blocks.run(middle, half, encoder.depth)

    images = checkpoint.normalise(grey, hf_weights.MEAN, hf_weights.STD)
    vision = encoders.image.prepare(params)
    states = encoders.image.apply({"params": vision}, images, method=run)
    return tuple(x.astype(jnp.float32) for x in states)


def project(params: Params, encoders: Encoders, tokens: Float[Array, "n t d"]):
    """Last-block tokens in the joint space; the class token gives CLIP's image embedding."""
    variables = part(params, "vision_model", "visual_projection")
    return encoders.image.apply(variables, tokens, method="project")


def encode_text(params: Params, encoders: Encoders, ids: Int[Array, "n t"]) -> Float[Array, "n j"]:
    """CLIP's text embedding: the state at the first end token (the largest id)."""
    context = jnp.zeros((len(ids), 0, encoders.text.width))
    variables = part(params, "text_model", "text_projection")
    return encoders.text.apply(variables, context, ids, jnp.full_like(ids, -1), ids.argmax(1))


def part(params: Params, *names: str) -> dict[str, Params]:
    """Variables of one encoder."""
    return {"params": {name: params[name] for name in names}}
