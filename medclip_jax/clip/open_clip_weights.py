"""ResNet CLIPs under OpenAI's and open_clip's tensor names -> what hf_weights.read gives of a ViT.

A folder holds `open_clip_model.safetensors`, the tokenizer's files and, if it is open_clip's own,
`open_clip_config.json`. OpenAI's own RN50.pt goes through experiments/convert_torchscript.py first.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from medclip_jax.clip import hf_weights, resnet
from medclip_jax.errors import CheckpointError

WEIGHTS, CONFIG = hf_weights.OPENCLIP
STRIDE = 16  # pixels per patch: all stages are brought to the grid of the third
LARGEST = 2  # transformers' mark for "the feature is read at the largest token id"
HEAD = 64  # width of a head of the text encoder, in all of OpenAI's


def matches(folder: Path) -> bool:
    """Is this such a folder? One that is transformers' CLIP as well is not."""
    return (folder / WEIGHTS).is_file() and not hf_weights.is_hugging(folder)


def read(folder: Path) -> hf_weights.Weights:
    """Read a folder that `matches`. Raises CheckpointError for one that cannot be used."""
    path = folder / WEIGHTS
    activation, heads, mean, std = _config(folder)
    flat = hf_weights.safetensors(path)
    hf_weights.check_tokenizer(folder)
    try:
        visual, encoder = resnet.read(flat)
        params = {"visual": visual, **_text(flat)}
        params["logit_scale"] = flat["logit_scale"].reshape(())  # some files have it as [1]
    except KeyError as error:
        raise CheckpointError(
            f"{path}: tensor {error.args[0]} is missing; this is not a whole ResNet CLIP "
            "(give a ViT as a Hugging Face folder)"
        ) from None
    width = flat["token_embedding.weight"].shape[1]
    config = {
        "vision_config": {"image_size": encoder.size, "patch_size": STRIDE},
        "text_config": {
            "num_attention_heads": heads or max(width // HEAD, 1),
            "layer_norm_eps": 1e-5,
            "hidden_act": activation,
            "eos_token_id": LARGEST,
        },
    }
    digest = hf_weights.digest_of(json.dumps([activation, heads, mean, std]).encode(), path)
    return hf_weights.Weights(folder, config, params, mean, std, digest, encoder)


def _config(folder: Path) -> tuple[str, int, tuple[float, ...], tuple[float, ...]]:
    """Activation and heads (0: unknown) of the text encoder, pixel mean and sd."""
    path = folder / CONFIG
    fields = hf_weights.read_json(path) if path.is_file() else {}
    try:
        model, pixels = fields.get("model_cfg", {}), fields.get("preprocess_cfg", {})
        quick = bool(model.get("quick_gelu", not fields))
        heads = int(model.get("text_cfg", {}).get("heads", 0))
        of_pixels = pixels.get("mean"), pixels.get("std")
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None
    activation = "quick_gelu" if quick else "gelu"
    return activation, heads, *hf_weights.normalisation(path, *of_pixels)


def _text(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """text_model and text_projection of transformers' Flax tree."""

    def dense(weight: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
        return {"kernel": weight.T, "bias": bias}

    def norm(at: str) -> dict[str, np.ndarray]:
        return {"scale": flat[f"{at}.weight"], "bias": flat[f"{at}.bias"]}

    def block(at: str) -> dict[str, Any]:
        weights, biases = (np.split(flat[f"{at}.attn.in_proj_{x}"], 3) for x in ("weight", "bias"))
        attention = {f"{x}_proj": dense(weights[i], biases[i]) for i, x in enumerate("qkv")}
        out, fc1, fc2 = (
            dense(flat[f"{at}.{x}.weight"], flat[f"{at}.{x}.bias"])
            for x in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        )
        return {
            "layer_norm1": norm(f"{at}.ln_1"),
            "self_attn": {**attention, "out_proj": out},
            "layer_norm2": norm(f"{at}.ln_2"),
            "mlp": {"fc1": fc1, "fc2": fc2},
        }

    blocks = [block("transformer.resblocks.0")]
    while f"{(at := f'transformer.resblocks.{len(blocks)}')}.ln_1.weight" in flat:
        blocks.append(block(at))
    model = {
        "embeddings": {
            "token_embedding": {"embedding": flat["token_embedding.weight"]},
            "position_embedding": {"embedding": flat["positional_embedding"]},
        },
        "encoder": {"layers": {str(i): p for i, p in enumerate(blocks)}},
        "final_layer_norm": norm("ln_final"),
    }
    return {"text_model": model, "text_projection": {"kernel": flat["text_projection"]}}
