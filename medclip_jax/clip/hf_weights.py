"""CLIP checkpoints on disk or on the Hub -> config and parameters, without torch.

Parameters come out as the tree of transformers' FlaxCLIPModel, whichever file they are read from.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from medclip_jax import files, stored
from medclip_jax.errors import CheckpointError

EMBEDDED = Path(__file__).parents[1] / "assets" / "compact_clip"
OPENCLIP = "open_clip_model.safetensors", "open_clip_config.json"  # see open_clip_weights
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
    """A checkpoint as read."""

    folder: Path
    config: dict[str, Any]  # config.json
    params: dict[str, Any]  # of FlaxCLIPModel, NumPy; of a ResNet, `visual` is its image part
    mean: tuple[float, ...]  # of the input pixels, per channel, [0, 1]
    std: tuple[float, ...]
    digest: str  # sha256 of config and weights, first 16 hex digits
    resnet: Any = None  # the image encoder, where it is a ResNet


def read(folder: Path) -> Weights:
    """Read a Hugging Face folder. Raises CheckpointError for one that cannot be used."""
    config = _config(folder)
    check_tokenizer(folder)
    path = next((folder / n for n in WEIGHTS if (folder / n).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder}: no weights; need {' or '.join(WEIGHTS)} "
            "(a pytorch_model.bin must be converted to safetensors first)"
        )
    flat = _of_torch(safetensors(path)) if path.suffix == ".safetensors" else _msgpack(path)
    depths = {x: config[f"{x}_config"]["num_hidden_layers"] for x in ("vision", "text")}
    missing = [name for name in _names(depths) if name not in flat]
    if missing:
        name = re.sub(r"/(kernel|scale|embedding)$", "/weight", missing[0]).replace("/", ".")
        raise CheckpointError(
            f"{path}: tensor {name} is missing; this is not a whole CLIP checkpoint"
        )
    preprocessing = folder / "preprocessor_config.json"
    fields = read_json(preprocessing) if preprocessing.is_file() else {}
    pixels = normalisation(preprocessing, fields.get("image_mean"), fields.get("image_std"))
    params = unflatten_dict({name: flat[name] for name in _names(depths)}, sep="/")
    digest = digest_of((folder / "config.json").read_bytes(), path)
    return Weights(folder, config, params, *pixels, digest)


def locate(checkpoint: str) -> Path:
    """The folder of `compact` (embedded), of a folder's name, or of a Hub id, which is fetched."""
    folder = EMBEDDED if checkpoint == "compact" else files.expanded(checkpoint)
    return folder if folder.is_dir() else _download(checkpoint)


def is_hugging(folder: Path) -> bool:
    """Is there a config of transformers' CLIP?"""
    try:
        return read_json(folder / "config.json").get("model_type") == "clip"
    except CheckpointError:
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
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

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
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"clip.checkpoint {name!r}: no such folder, and the Hub did not give it "
            f"({type(error).__name__}); download it elsewhere and give its folder, or use 'compact'"
        ) from None
    raise CheckpointError(f"clip.checkpoint {name!r}: the Hub has no weights of a CLIP in it")


def _config(folder: Path) -> dict[str, Any]:
    """config.json with the defaults of transformers' CLIPConfig filled in."""
    from transformers import CLIPConfig

    path = folder / "config.json"
    raw = read_json(path)
    if (kind := raw.get("model_type")) != "clip":
        raise CheckpointError(f"{path}: model_type is {kind!r}, need 'clip'; give a CLIP folder")
    config = CLIPConfig.from_dict(raw).to_dict()
    for part in ("vision_config", "text_config"):
        if config[part]["hidden_act"] not in ACTIVATIONS:
            raise CheckpointError(
                f"{path}: {part} hidden_act {config[part]['hidden_act']!r} is not one of "
                f"{', '.join(ACTIVATIONS)}; use another checkpoint"
            )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises CheckpointError."""
    try:
        return stored.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None


def normalisation(path: Path, mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and sd as `path` gives them, OpenAI's for None. Raises CheckpointError."""
    try:
        mean, std = (tuple(map(float, x)) for x in (mean or MEAN, std or STD))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise CheckpointError(f"{path}: mean and std of the pixels must be three numbers each")
    return mean, std


def digest_of(config: bytes, weights: Path) -> str:
    """16 hex digits that name a checkpoint by its content."""
    digest = hashlib.sha256(config)
    with weights.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a file, as float32. Raises CheckpointError if it is damaged."""
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
    """A Flax checkpoint."""
    from flax.serialization import msgpack_restore

    try:
        flat = flatten_dict(msgpack_restore(path.read_bytes()), sep="/")
    except Exception as error:  # msgpack raises many unrelated types on damaged bytes
        raise CheckpointError(
            f"{path}: damaged or not Flax msgpack ({type(error).__name__}); download it again"
        ) from None
    return {name: np.asarray(value, np.float32) for name, value in flat.items()}


def _of_torch(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PyTorch's names and layouts -> Flax's."""
    renamed = {}
    for name, value in flat.items():
        stem, _, last = name.replace(".", "/").rpartition("/")
        if last == "weight" and value.ndim == 1:
            last = "scale"
        elif last == "weight" and stem.endswith(("token_embedding", "position_embedding")):
            last = "embedding"
        elif last == "weight":
            last, value = "kernel", value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        renamed[f"{stem}/{last}" if stem else last] = value
    return renamed


def _names(depths: Mapping[str, int]) -> list[str]:
    """Every parameter of FlaxCLIPModel; depths: blocks of `vision` and `text`."""
    both = "scale", "bias"
    norms = {
        "text_model": ("final_layer_norm",),
        "vision_model": ("pre_layrnorm", "post_layernorm"),
    }
    names = [f"{model}/{norm}/{x}" for model, own in norms.items() for norm in own for x in both]
    for part, depth in depths.items():
        names.append(f"{part}_model/embeddings/position_embedding/embedding")
        for block in (f"{part}_model/encoder/layers/{i}" for i in range(depth)):
            names += [f"{block}/layer_norm{i}/{x}" for i in (1, 2) for x in both]
            dense = [f"self_attn/{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp/fc1", "mlp/fc2"]
            names += [f"{block}/{layer}/{x}" for layer in dense for x in ("kernel", "bias")]
    return [
        *names,
        "text_model/embeddings/token_embedding/embedding",
        "vision_model/embeddings/class_embedding",
        "vision_model/embeddings/patch_embedding/kernel",
        "visual_projection/kernel",
        "text_projection/kernel",
        "logit_scale",
    ]
