"""A trained CLIP as a Hugging Face folder, which the package and transformers read."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPImageProcessor

from medclip_jax.clip import hf_weights

from .encoders import Params

TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
TORCH = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def write_folder(
    folder: Path,
    params: Params,
    config: CLIPConfig,
    tokenizer: Path,
    card: str = "",
    half: bool = False,
) -> None:
    """Weights (float32, or float16 with `half`), configs, tokenizer, card with the hash."""
    config.save_pretrained(folder)
    tensors = torch_tensors(params, np.float16 if half else np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    side = config.vision_config.image_size
    CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(hf_weights.MEAN),
        image_std=list(hf_weights.STD),
    ).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(tokenizer / name, folder / name)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    text = f"{card.rstrip()}\n\nsha256 of model.safetensors: `{digest}`\n"
    (folder / "README.md").write_text(text)


def torch_tensors(params: Params, dtype) -> dict[str, np.ndarray]:
    """The Flax tree under the names and in the layouts of transformers' PyTorch model."""
    tensors = {}
    for name, value in flatten_dict(params, sep=".").items():
        *parents, leaf = name.split(".")
        value = np.asarray(value, dtype)
        if leaf == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        # not ascontiguousarray, which gives a scalar an axis
        tensors[".".join([*parents, TORCH.get(leaf, leaf)])] = np.array(value, order="C")
    return tensors
