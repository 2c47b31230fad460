"""Checkpoints in transformers' format, on disk or the Hub -> config and parameters, without torch.

Parameters come out as the tree of transformers' FlaxCLIPModel (names.py), whichever they are.
"""

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from medclip_jax import files, stored
from medclip_jax.clip import names, tensor_files
from medclip_jax.clip.layers import ACTIVATIONS, GATED
from medclip_jax.errors import CheckpointError
from medclip_jax.stored import Number

EMBEDDED = Path(__file__).parents[1] / "assets" / "compact_clip"
OPEN_CLIP_CONFIG = "open_clip_config.json"  # see open_clip_weights
OPEN_CLIP = "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "*.pt"
WEIGHTS = (  # first found is read
    *("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
TOKENIZERS = "tokenizer.json", "vocab.json", "vocab.txt"
SMALL_FILES = (
    *("config.json", OPEN_CLIP_CONFIG, "preprocessor_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", *TOKENIZERS, "merges.txt"),
    "README.md",  # says the licence
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
HALVES = (0.5,) * 3, (0.5,) * 3
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREFIX, POSITIONS = "prefix_tokens", "position_embedding/embedding"
TABLES: dict[str, tuple[str, ...]] = {
    "siglip": (POSITIONS,),
    "dinov3_vit": (PREFIX,),
}  # what stands before or on the patches
TABLES |= dict.fromkeys(("dinov2", "dinov2_with_registers"), (PREFIX, POSITIONS))
CONFIGS = {  # model_type -> its class in transformers, pixel mean and sd where no file says them
    "clip": ("CLIPConfig", (MEAN, STD)),
    "siglip": ("SiglipConfig", HALVES),
    "dinov2": ("Dinov2Config", IMAGENET),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", IMAGENET),
    "dinov3_vit": ("DINOv3ViTConfig", IMAGENET),
}
SIZE = Number(1, 1 << 16, whole=True)
NUMBERS = {  # of a config, open_clip's too
    **dict.fromkeys(("num_attention_heads", "hidden_size", "patch_size"), SIZE),
    **dict.fromkeys(("heads", "head_width", "context_length"), SIZE._replace(low=0, absent=True)),
    "num_hidden_layers": Number(1, 256, whole=True),
    "image_size": Number(1, 4096, whole=True),  # as config.clip.size
    "layer_norm_eps": Number(0, 1),
    "rope_theta": Number(1e-3, 1e12),
    "eos_token_id": Number(0, 1 << 24, whole=True, absent=True),
}


class Weights(NamedTuple):
    """A checkpoint as read."""

    folder: Path
    config: dict[str, Any]  # of CLIP; of others the same fields
    params: dict[str, Any]  # names.py, NumPy; of a ResNet, `visual` is its image part
    mean: tuple[float, ...]  # of the input pixels, per channel, [0, 1]
    std: tuple[float, ...]
    digest: str  # sha256 of config and weights, first 16 hex digits
    resnet: Any = None  # the image encoder, where it is a ResNet
    vision: dict[str, Any] = {}  # fields of vit.ViT that the tensors do not tell
    antialias: bool = False  # when positions are resized, as the reference library does
    tokenizer: str = "clip"  # | siglip | gemma | bert; "" for an encoder of images alone
    pooling: str = ""  # of BERT's text; "" for other texts


def read(folder: Path) -> Weights:
    """Read a Hugging Face folder. Raises CheckpointError for one that cannot be used."""
    path = folder / "config.json"
    config = _config(path)
    kind = config["model_type"]
    dino = kind.startswith("dino")
    if not dino:
        check_tokenizer(folder)
    weights = find(folder, WEIGHTS)
    rules = names.DINO if dino else names.SIGLIP if kind == "siglip" else ()
    flat, origin = tensors(weights, rules)
    depths = {x: config[f"{x}_config"]["num_hidden_layers"] for x in ("vision", "text") if not dino}
    if dino:
        depths["vision"] = config["num_hidden_layers"]
        config = {"vision_config": config}
    wanted = names.of_vision(depths["vision"], kind == "clip", TABLES.get(kind, ()))
    if kind == "siglip":
        wanted += [*names.HEAD, "logit_bias"]
    if not dino:
        biased = ("kernel",) if kind == "clip" else ("kernel", "bias")
        wanted += [*names.of_text(depths["text"], biased), "logit_scale"]
    params = names.select(flat, wanted, weights, origin, kind.upper())
    scales = {n: params[n].reshape(-1)[:1].reshape(()) for n in params if n.startswith("logit_")}
    params |= scales  # SigLIP has them as [1]
    preprocessing = folder / "preprocessor_config.json"
    fields = read_json(preprocessing) if preprocessing.is_file() else {}
    pixels = (
        fields.get(x) or CONFIGS[kind][1][i] for i, x in enumerate(("image_mean", "image_std"))
    )
    extra = {"rope": float(config["vision_config"]["rope_theta"])} if kind == "dinov3_vit" else {}
    return Weights(
        *(folder, config, params, *normalisation(preprocessing, *pixels)),
        digest_of((folder / "config.json").read_bytes(), weights),
        vision=extra,
        antialias=kind == "dinov2_with_registers",
        tokenizer="" if dino else "clip" if kind == "clip" else _sentences(folder),
    )


def find(folder: Path, files: tuple[str, ...]) -> Path:
    """The first of these files that is there. Raises CheckpointError."""
    for path in (path for name in files for path in sorted(folder.glob(name))):
        if path.is_file():
            return path
    raise CheckpointError(f"{folder}: no weights; need {' or '.join(files)}")


def tensors(path: Path, rules: names.Rules) -> tuple[names.Flat, dict[str, str]]:
    """names.to_flax of a file. Raises CheckpointError with the file's name."""
    flat = tensor_files.read(path)
    try:
        return names.to_flax(flat, rules)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; download it again") from None


def _sentences(folder: Path) -> str:
    """Which tokenizer a SigLIP has: its own, or Gemma's (SigLIP 2)."""
    path = folder / "tokenizer_config.json"
    named = str(read_json(path).get("tokenizer_class")) if path.is_file() else ""
    return "gemma" if "Gemma" in named else "siglip"


def locate(checkpoint: str) -> Path:
    """The folder of `compact` (embedded), of a folder's name, or of a Hub id, which is fetched."""
    folder = EMBEDDED if checkpoint == "compact" else files.expanded(checkpoint)
    return folder if folder.is_dir() else _download(checkpoint)


def is_hugging(folder: Path) -> bool:
    """Is there a config of transformers that can be read?"""
    try:
        return read_json(folder / "config.json").get("model_type") in CONFIGS
    except CheckpointError:
        return False


def check_tokenizer(folder: Path) -> None:
    """Raise CheckpointError if the folder has no tokenizer."""
    if any((folder / name).is_file() for name in TOKENIZERS):
        return
    if (folder / "spiece.model").is_file():
        raise CheckpointError(
            f"{folder}: its tokenizer is spiece.model alone, which is not read; write "
            "tokenizer.json with transformers: "
            "T5TokenizerFast.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise CheckpointError(
        f"{folder}: no tokenizer (tokenizer.json, vocab.txt, or vocab.json with merges.txt); "
        "copy the files of the CLIP it was trained with into this folder"
    )


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", name):
        raise CheckpointError(
            f"clip.checkpoint {name!r}: no such folder; give a folder, a Hub id or 'compact'"
        )
    pin: dict[str, Any] = {"revision": revision or None}

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, file, **pin))
        except LocalEntryNotFoundError:  # no network: what was fetched before must do
            path = try_to_load_from_cache(repository, file, **pin)
            if isinstance(path, str):
                return Path(path)
            if file == SMALL_FILES[0] and path is None:
                raise
            return None
        except EntryNotFoundError:
            return None

    try:
        # a CLIP has either tokenizer.json or vocab.json, and one of two configs; readers check
        small = [path for file in SMALL_FILES if (path := fetch(file))]
        hugging = any(is_hugging(path.parent) for path in small[:1])
        for file in WEIGHTS if hugging else OPEN_CLIP[:2]:
            if path := fetch(file):
                for part in tensor_files.named(path):
                    fetch(part)
                return path.parent
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"clip.checkpoint {name!r}: no such folder, and the Hub did not give it "
            f"({type(error).__name__}); download it elsewhere and give its folder, or use 'compact'"
        ) from None
    raise CheckpointError(f"clip.checkpoint {name!r}: the Hub has no weights of a CLIP in it")


def _config(path: Path) -> dict[str, Any]:
    """config.json with the defaults of transformers' own config filled in."""
    import transformers

    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise CheckpointError(
            f"{path}: model_type is {kind!r}, need one of {', '.join(CONFIGS)}; "
            "give another folder (docs/backbones.md lists what can be read)"
        )
    parts = {n: x for n, x in raw.items() if "_config" in n and isinstance(x, dict)}
    for part, fields in {"": raw, **parts}.items():
        check_numbers(path, fields, part)
        for name in ("num_labels", "id2label", "label2id"):  # of millions, names would be made
            fields.pop(name, None)
    try:
        config = getattr(transformers, CONFIGS[kind][0]).from_dict(raw).to_dict()
        parts = {part: config[part] for part in ("vision_config", "text_config") if part in config}
        for part, fields in (parts or {"": config}).items():
            _check_fields(path, fields, part)
        return config
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None


def _check_fields(path: Path, fields: dict[str, Any], part: str) -> None:
    """Bring what the kinds name differently to CLIP's names; CheckpointError for what is not."""
    gated = fields.get("use_gated_mlp") or fields.get("use_swiglu_ffn")
    activation = "silu" if fields.get("use_swiglu_ffn") else fields["hidden_act"]
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: {part or 'its'} hidden_act {activation!r} is not one of "
            f"{', '.join(ACTIVATIONS)}; use another checkpoint"
        )
    fields["hidden_act"] = (GATED if gated else "") + activation


def check_numbers(path: Path, fields: dict[str, Any], part: str) -> None:
    """Raise CheckpointError for the first of these fields that is not as NUMBERS says."""
    try:
        for name in [name for name in NUMBERS if name in fields]:
            stored.check(fields[name], NUMBERS[name], f"{part} {name}".strip())
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; copy it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises CheckpointError."""
    try:
        return stored.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None


def normalisation(path: Path, mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and sd as `path` gives them, OpenAI's for None. Raises CheckpointError."""
    try:
        mean, std = list(mean or MEAN), list(std or STD)
        stored.check(mean, [Number(-1e4, 1e4)], "mean")
        stored.check(std, [Number(1e-6, 1e4)], "sd")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None
    if len(mean) != 3 or len(std) != 3:
        raise CheckpointError(f"{path}: mean and std of the pixels must be three numbers each")
    return tuple(map(float, mean)), tuple(map(float, std))


def digest_of(config: bytes, weights: Path) -> str:
    """16 hex digits that name a checkpoint by its content."""
    digest = hashlib.sha256(config)
    for part in tensor_files.parts(weights):
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
