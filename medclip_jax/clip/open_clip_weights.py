"""ResNet CLIPs under OpenAI's and open_clip's tensor names -> what weights.read gives of a ViT.

A folder holds `open_clip_model.safetensors`, the tokenizer's files and, if it is open_clip's own,
`open_clip_config.json`. Sizes follow from the tensors; the config says which activation the text
tower has and how pixels are normalised. Without one they are OpenAI's. OpenAI's own RN50.pt and
the like are TorchScript archives, which experiments/convert_torchscript.py turns into such a
folder.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from medclip_jax.clip import hf_weights, resnet
from medclip_jax.errors import CheckpointError

WEIGHTS, CONFIG = hf_weights.OPENCLIP
STRIDE = 16  # pixels per patch: all stages are brought to the grid of the third
LARGEST = 2  # transformers' mark for "the feature is read at the largest token id"
HEAD = 64  # width of a head of the text tower, in all of OpenAI's


def holds(folder: Path) -> bool:
    """Is this such a folder? One that is transformers' CLIP as well is not."""
    return (folder / WEIGHTS).is_file() and not hf_weights.is_hugging(folder)


def read(folder: Path) -> hf_weights.Weights:
    """The towers of a folder for which `holds`.

    Raises CheckpointError if they are not a whole ResNet CLIP, or the config cannot be read.
    """
    path = folder / WEIGHTS
    activation, heads, mean, std = _config(folder)
    flat = hf_weights.safetensors(path)
    hf_weights.check_tokenizer(folder)
    try:
        vision, shape = resnet.read(flat)
        text = _text(flat)
        scale = float(flat["logit_scale"].reshape(()))  # some files have it as [1]
    except KeyError as error:
        raise CheckpointError(
            f"{path}: tensor {error.args[0]} is missing; this is not a whole ResNet CLIP "
            "(give a ViT as a Hugging Face folder)"
        ) from None
    width = text["token"].shape[1]
    config = {
        "vision_config": {"image_size": shape.size, "patch_size": STRIDE, "shape": shape},
        "text_config": {
            "hidden_size": width,
            "num_attention_heads": heads or max(width // HEAD, 1),
            "layer_norm_eps": 1e-5,
            "hidden_act": activation,
            "eos_token_id": LARGEST,
        },
        "projection_dim": text["projection"].shape[1],
    }
    digest = hashlib.sha256(json.dumps([activation, heads, mean, std]).encode())
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return hf_weights.Weights(
        folder, config, vision, text, scale, mean, std, digest.hexdigest()[:16]
    )


def _config(folder: Path) -> tuple[str, int, tuple[float, ...], tuple[float, ...]]:
    """Activation and heads (0: not said) of the text tower, pixel mean and sd."""
    path, said = folder / CONFIG, {}
    try:
        if path.is_file():
            said = json.loads(path.read_text())
        model, pixels = said.get("model_cfg", {}), said.get("preprocess_cfg", {})
        quick = bool(model.get("quick_gelu", not said))
        heads = int(model.get("text_cfg", {}).get("heads", 0))
        mean = tuple(map(float, pixels.get("mean", hf_weights.MEAN)))
        std = tuple(map(float, pixels.get("std", hf_weights.STD)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise CheckpointError(f"{path}: mean and std must be three numbers each")
    return "quick_gelu" if quick else "gelu", heads, mean, std


def _text(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    import jax

    def pair(weight: str, bias: str) -> dict[str, np.ndarray]:
        return {"kernel": flat[weight].T, "bias": flat[bias]}

    def norm(at: str) -> dict[str, np.ndarray]:
        return {"scale": flat[f"{at}.weight"], "bias": flat[f"{at}.bias"]}

    def block(i: int) -> dict[str, Any]:
        at = f"transformer.resblocks.{i}"
        dense = {"out": "attn.out_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
        return {
            "norm1": norm(f"{at}.ln_1"),
            "qkv": pair(f"{at}.attn.in_proj_weight", f"{at}.attn.in_proj_bias"),
            "norm2": norm(f"{at}.ln_2"),
            **{name: pair(f"{at}.{x}.weight", f"{at}.{x}.bias") for name, x in dense.items()},
        }

    blocks = [block(0)]
    while f"transformer.resblocks.{len(blocks)}.ln_1.weight" in flat:
        blocks.append(block(len(blocks)))
    return {
        "token": flat["token_embedding.weight"],
        "position": flat["positional_embedding"],
        "blocks": jax.tree.map(lambda *rows: np.stack(rows), *blocks),
        "final": norm("ln_final"),
        "projection": flat["text_projection"],
    }
