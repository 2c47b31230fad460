"""CLIP checkpoints on disk or on the Hub -> (config, parameters, tokenizer files), without torch.

Parameters come out as two plain trees, `vision` and `text`, with the blocks of each tower stacked
on a leading axis (q, k and v in one kernel), so that a tower is one `lax.scan` or one short loop.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medclip_jax.errors import CheckpointError

EMBEDDED = Path(__file__).parents[1] / "assets" / "compact_clip"
OPENCLIP = "open_clip_model.safetensors", "open_clip_config.json"  # see openclip.py
WEIGHTS = ("model.safetensors", "flax_model.msgpack")  # first found is read
SMALL_FILES = (
    "config.json",
    OPENCLIP[1],
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
ACTIVATIONS = ("quick_gelu", "gelu")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


class Weights(NamedTuple):
    folder: Path
    config: dict[str, Any]  # config.json
    vision: dict[str, Any]
    text: dict[str, Any]
    logit_scale: float
    mean: tuple[float, ...]  # of the input pixels, per channel, [0, 1]
    std: tuple[float, ...]
    digest: str  # sha256 of config and weights, first 16 hex digits


def read(checkpoint: str) -> Weights:
    """Read `compact` (embedded), a Hugging Face folder, or a Hub id.

    Raises CheckpointError if the folder, its weights, its config or its tokenizer cannot be used.
    """
    folder = locate(checkpoint)
    config = _config(folder)
    check_tokenizer(folder)
    path = next((folder / n for n in WEIGHTS if (folder / n).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder}: no weights; need {' or '.join(WEIGHTS)} "
            "(a pytorch_model.bin must be converted to safetensors first)"
        )
    flat = safetensors(path) if path.suffix == ".safetensors" else _msgpack(path)
    vision_layers = config["vision_config"]["num_hidden_layers"]
    text_layers = config["text_config"]["num_hidden_layers"]
    try:
        vision, text = _vision(flat, vision_layers), _text(flat, text_layers)
        scale = float(flat["logit_scale"])
    except KeyError as error:
        raise CheckpointError(
            f"{path}: tensor {error} is missing; this is not a whole CLIP checkpoint"
        ) from None
    mean, std = _normalisation(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return Weights(folder, config, vision, text, scale, mean, std, digest.hexdigest()[:16])


def locate(checkpoint: str) -> Path:
    """The folder of `compact` (embedded), of a folder's name, or of a Hub id, which is fetched."""
    folder = EMBEDDED if checkpoint == "compact" else Path(checkpoint).expanduser()
    return folder if folder.is_dir() else _download(checkpoint)


def is_hugging(folder: Path) -> bool:
    """Is there a config of transformers' CLIP?"""
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") == "clip"
    except (OSError, ValueError, AttributeError):
        return False


def check_tokenizer(folder: Path) -> None:
    """Raise CheckpointError if the folder has no tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(
            f"{folder}: no tokenizer (tokenizer.json, or vocab.json with merges.txt); "
            "copy the files of the CLIP it was trained with into this folder"
        )


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise CheckpointError(
            f"clip.checkpoint {name!r}: no such folder; give a folder, a Hub id or 'compact'"
        )

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:  # no network
            raise
        except EntryNotFoundError:
            return None

    try:
        # a CLIP has either tokenizer.json or vocab.json, and one of two configs; readers check
        small = [path for file in SMALL_FILES if (path := fetch(file))]
        hugging = any(is_hugging(path.parent) for path in small[:1])
        for file in WEIGHTS if hugging else OPENCLIP[:1]:
            if path := fetch(file):
                return path.parent
    except (OSError, ValueError, HFValidationError) as error:
        raise CheckpointError(
            f"clip.checkpoint {name!r}: no such folder, and the Hub did not give it "
            f"({type(error).__name__}); download it elsewhere and give its folder, or use 'compact'"
        ) from None
    raise CheckpointError(f"clip.checkpoint {name!r}: the Hub has no weights of a CLIP in it")


def _config(folder: Path) -> dict[str, Any]:
    """config.json with the defaults of transformers' CLIPConfig filled in."""
    from transformers import CLIPConfig

    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); give a CLIP folder") from None
    if raw.get("model_type") != "clip":
        kind = raw.get("model_type")
        raise CheckpointError(f"{path}: model_type is {kind!r}, need 'clip'; give a CLIP folder")
    config = CLIPConfig.from_dict(raw).to_dict()
    for tower in ("vision_config", "text_config"):
        if config[tower]["hidden_act"] not in ACTIVATIONS:
            raise CheckpointError(
                f"{path}: {tower} hidden_act {config[tower]['hidden_act']!r} is not one of "
                f"{', '.join(ACTIVATIONS)}; use another checkpoint"
            )
    return config


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and sd of the checkpoint, OpenAI's where it does not say."""
    path = folder / "preprocessor_config.json"
    try:
        said = json.loads(path.read_text()) if path.is_file() else {}
        mean = tuple(map(float, said.get("image_mean", MEAN)))
        std = tuple(map(float, said.get("image_std", STD)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise CheckpointError(f"{path}: image_mean and image_std must be three numbers each")
    return mean, std


def safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or not safetensors ({error}); download it again"
        ) from None
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def _msgpack(path: Path) -> dict[str, np.ndarray]:
    """A Flax checkpoint under the names and layouts of the PyTorch one."""
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    try:
        tree = flatten_dict(msgpack_restore(path.read_bytes()), sep=".")
    except Exception as error:  # msgpack raises many unrelated types on damaged bytes
        raise CheckpointError(
            f"{path}: damaged or not Flax msgpack ({type(error).__name__}); download it again"
        ) from None
    flat = {}
    for name, value in tree.items():
        value = np.asarray(value, np.float32)
        if name.endswith(".kernel"):
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        flat[re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)] = value
    return flat


def _norm(flat: dict, name: str) -> dict[str, np.ndarray]:
    return {"scale": flat[f"{name}.weight"], "bias": flat[f"{name}.bias"]}


def _dense(flat: dict, *names: str) -> dict[str, np.ndarray]:
    """Linear layers side by side as one kernel [in, out] and bias [out]."""
    kernel = np.concatenate([flat[f"{n}.weight"].T for n in names], axis=1)
    return {"kernel": kernel, "bias": np.concatenate([flat[f"{n}.bias"] for n in names])}


def _blocks(flat: dict, tower: str, layers: int) -> dict[str, Any]:
    import jax

    def block(i: int) -> dict[str, Any]:
        at = f"{tower}.encoder.layers.{i}"
        return {
            "norm1": _norm(flat, f"{at}.layer_norm1"),
            "qkv": _dense(flat, *(f"{at}.self_attn.{x}_proj" for x in "qkv")),
            "out": _dense(flat, f"{at}.self_attn.out_proj"),
            "norm2": _norm(flat, f"{at}.layer_norm2"),
            "fc1": _dense(flat, f"{at}.mlp.fc1"),
            "fc2": _dense(flat, f"{at}.mlp.fc2"),
        }

    return jax.tree.map(lambda *x: np.stack(x), *[block(i) for i in range(layers)])


def _vision(flat: dict, layers: int) -> dict[str, Any]:
    at = "vision_model"
    patch = flat[f"{at}.embeddings.patch_embedding.weight"]  # [d, 3, s, s]
    return {
        "patch": patch.transpose(2, 3, 1, 0).reshape(-1, patch.shape[0]),
        "class": flat[f"{at}.embeddings.class_embedding"],
        "position": flat[f"{at}.embeddings.position_embedding.weight"],
        "pre": _norm(flat, f"{at}.pre_layrnorm"),
        "blocks": _blocks(flat, at, layers),
        "post": _norm(flat, f"{at}.post_layernorm"),
        "projection": flat["visual_projection.weight"].T,
    }


def _text(flat: dict, layers: int) -> dict[str, Any]:
    at = "text_model"
    return {
        "token": flat[f"{at}.embeddings.token_embedding.weight"],
        "position": flat[f"{at}.embeddings.position_embedding.weight"],
        "blocks": _blocks(flat, at, layers),
        "final": _norm(flat, f"{at}.final_layer_norm"),
        "projection": flat["text_projection.weight"].T,
    }
