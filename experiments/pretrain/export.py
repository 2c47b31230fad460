"""Hugging Face folders: writing ours, reading any CLIP of this shape, and the model card."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from . import tower

TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def clip_config(size: tower.Size) -> dict:
    """CLIPConfig's fields. The end token, also the padding, has the largest id."""
    end = size.vocabulary - 1
    common = {
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "projection_dim": size.joint,
    }
    text = common | {
        "model_type": "clip_text_model",
        "hidden_size": size.text_width,
        "intermediate_size": 4 * size.text_width,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_heads,
        "max_position_embeddings": size.context,
        "vocab_size": size.vocabulary,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = common | {
        "model_type": "clip_vision_model",
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_channels": 3,
        "image_size": size.image,
        "patch_size": tower.PATCH,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "projection_dim": size.joint,
        "text_config": text,
        "vision_config": vision,
    }


def preprocessor_config(size: tower.Size) -> dict:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size.image},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size.image, "width": size.image},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(f"{v:.8f}") for v in tower.MEAN],
        "image_std": [float(f"{v:.8f}") for v in tower.SD],
    }


def write_folder(
    folder: Path,
    clip: dict[str, np.ndarray],
    size: tower.Size,
    tokenizer: Path,
    card: str,
    half: bool = False,
) -> None:
    """Weights (float32, or float16 with `half`), configs, tokenizer, card with the hash."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = np.float16 if half else np.float32
    arrays = {name: np.array(value, kind, order="C") for name, value in clip.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    for name, value in (
        ("config", clip_config(size)),
        ("preprocessor_config", preprocessor_config(size)),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    for name in TOKENIZER:
        shutil.copyfile(tokenizer / name, folder / name)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "README.md").write_text(
        f"{card.rstrip()}\n\nsha256 of model.safetensors: `{digest}`\n"
    )


def read_folder(folder: Path) -> tuple[dict[str, np.ndarray], tower.Size]:
    """Float32 parameters and size of a CLIP folder with 16-pixel patches."""
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    if vision["patch_size"] != tower.PATCH:
        raise ValueError(
            f"{folder}: patch size {vision['patch_size']}, this script reads {tower.PATCH}"
        )
    size = tower.Size(
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        text_width=text["hidden_size"],
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        joint=config["projection_dim"],
        vocabulary=text["vocab_size"],
        image=vision["image_size"],
        context=text["max_position_embeddings"],
    )
    wanted = tower.init(size, 0).keys()
    arrays = load_file(folder / "model.safetensors")
    return {name: arrays[name].astype(np.float32) for name in wanted}, size
