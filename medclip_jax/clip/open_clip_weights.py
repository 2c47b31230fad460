"""Checkpoints under open_clip's and OpenAI's tensor names -> what hf_weights.read gives.

A folder holds the weights, the tokenizer's files and, if it is open_clip's own, a config: ResNet
and ViT CLIPs, and those with a BERT for text and timm's ViT for images, as BiomedCLIP.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from medclip_jax.clip import hf_weights, names, resnet, tensor_files
from medclip_jax.errors import CheckpointError

CONFIG = hf_weights.OPEN_CLIP_CONFIG
STRIDE = 16  # pixels per patch of a ResNet: all stages are brought to the grid of the third
LARGEST = 2  # transformers' mark for "the feature is read at the largest token id"
HEAD = 64  # width of an attention head where the config does not say it
POOLERS = "cls_pooler", "cls_last_hidden_state_pooler", "mean_pooler"
UNREAD = {  # fields of vision_cfg and text_cfg -> what they may be
    "vision_cfg": {
        **dict(attentional_pool=(False,), no_ln_pre=(False,), pool_type=("tok",)),
        **dict(final_ln_after_pool=(False,), pos_embed_type=("learnable",)),
        **dict(timm_pool=("", "token"), timm_proj=("linear",), timm_proj_bias=(False,)),
        **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False,)),
        **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False,)),
    },
    "text_cfg": {
        **dict(embed_cls=(False,), no_causal_mask=(False,), pool_type=("argmax",)),
        **dict(final_ln_after_pool=(False,), proj_bias=(False,), proj_type=("linear",)),
        **dict(hf_proj_type=("linear", "mlp", ""), hf_pooler_type=(*POOLERS, "")),
        **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False,)),
        **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False,)),
    },
}


def matches(folder: Path) -> bool:
    """Is this such a folder? One that is transformers' as well is not."""
    there = any(any(folder.glob(name)) for name in hf_weights.OPEN_CLIP)
    return (there or (folder / CONFIG).is_file()) and not hf_weights.is_hugging(folder)


def read(folder: Path) -> hf_weights.Weights:
    """Read a folder that `matches`. Raises CheckpointError for one that cannot be used."""
    path = hf_weights.find(folder, hf_weights.OPEN_CLIP)
    model, mean, std = _config(folder)
    vision, text = model["vision_cfg"], model["text_cfg"]
    hf_weights.check_tokenizer(folder)
    flat = tensor_files.read(path)
    is_bert = any("text.transformer.embeddings." in name for name in flat)
    rules = names.OPEN_CLIP + (names.BERT if is_bert else ())
    try:
        tree, origin = names.to_flax(flat, rules)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; download it again") from None
    encoder: Any = None
    params: dict[str, Any] = {}
    if any(name.startswith(("visual.layer1.", "visual.attnpool.")) for name in flat):
        encoder, params = _resnet(path, flat)
    said = [x.get("layers") for x in (vision, text)]  # of a ResNet, four numbers
    depths = [  # with more blocks than tensors, one is missing
        min(max(n if type(n) is int else 1, names.depth(tree, part)), len(tree))
        for n, part in zip(said, ("vision", "text"), strict=True)
    ]
    plain = "vision_model/embeddings/prefix_tokens" in tree
    tables = (hf_weights.PREFIX, hf_weights.POSITIONS) if plain else ()
    wanted = [] if encoder else names.of_vision(depths[0], True, tables)
    pooling = str(text.get("hf_pooler_type") or POOLERS[0]) if is_bert else ""
    types = flat.get("text.transformer.embeddings.token_type_embeddings.weight", ())
    if is_bert and len(types) < 2:
        raise CheckpointError(f"{path}: its text is no BERT but a relative, which is not read")
    if is_bert:
        wanted += names.of_bert(tree, depths[1], pooling == POOLERS[0])
    else:
        wanted += names.of_text(depths[1])
    params |= names.select(tree, [*wanted, "logit_scale"], path, origin)
    params["logit_scale"] = params["logit_scale"].reshape(-1)[0]  # some files have it as [1]
    quick = "quick_gelu" if model["quick_gelu"] else "gelu"
    if encoder:
        sizes = {"image_size": encoder.size, "patch_size": STRIDE}
    else:
        sizes = _sizes(path, params, vision, "gelu" if plain else quick, 1e-6 if plain else 1e-5)
    heads = model["heads"] or max(_width(params) // HEAD, 1)
    config = {
        "vision_config": sizes,
        "text_config": {
            "num_attention_heads": heads,
            "layer_norm_eps": 1e-12 if is_bert else 1e-5,
            "hidden_act": quick,
            "eos_token_id": LARGEST,
            "positions": text.get("context_length") or 77,
        },
    }
    more = [] if encoder else [sizes, pooling, config["text_config"]["positions"]]
    return hf_weights.Weights(
        *(folder, config, params, mean, std),
        hf_weights.digest_of(json.dumps([quick, model["heads"], mean, std, *more]).encode(), path),
        resnet=encoder,
        antialias=True,
        tokenizer="bert" if is_bert else "clip",
        pooling=pooling,
    )


def _resnet(path: Path, flat: dict[str, np.ndarray]) -> tuple[resnet.ResNet, dict[str, Any]]:
    try:
        visual, encoder = resnet.read(flat)
        return encoder, {"visual": visual}
    except KeyError as error:
        raise CheckpointError(
            f"{path}: tensor {error.args[0]} is missing; this is no ViT and no whole ResNet CLIP"
        ) from None


def _width(params: dict[str, Any]) -> int:
    return params["text_model"]["embeddings"]["token_embedding"]["embedding"].shape[-1]


def _sizes(path: Path, params: dict, vision: dict, activation: str, eps: float) -> dict[str, Any]:
    """What hf_weights' config says of a ViT's images."""
    embeddings = params["vision_model"]["embeddings"]
    kernel, table = (embeddings[x] for x in ("patch_embedding", "position_embedding"))
    patch, width = kernel["kernel"].shape[0], kernel["kernel"].shape[-1]
    patches = len(table["embedding"]) - ("prefix_tokens" not in embeddings)
    head = vision.get("head_width") or HEAD
    return {
        "image_size": patch * round(patches**0.5),
        "patch_size": patch,
        "num_hidden_layers": len(params["vision_model"]["encoder"]["layers"]),
        "num_attention_heads": max(width // head, 1),
        "hidden_act": activation,
        "layer_norm_eps": eps,
        "hidden_size": width,
    }


def _config(folder: Path) -> tuple[dict[str, Any], tuple[float, ...], tuple[float, ...]]:
    """model_cfg with `quick_gelu` and `heads` (of text; 0: unknown), pixel mean and sd."""
    path = folder / CONFIG
    fields = hf_weights.read_json(path) if path.is_file() else {}
    try:
        model, pixels = fields.get("model_cfg", {}), fields.get("preprocess_cfg", {})
        model = {"vision_cfg": {}, "text_cfg": {}, **model}
        model["quick_gelu"] = bool(model.get("quick_gelu", not fields))
        for part in UNREAD:
            own = {
                name: model[part].get(name) for name in ("heads", "head_width", "context_length")
            }
            hf_weights.check_numbers(path, own, part)
        model["heads"] = model["text_cfg"].get("heads") or 0
        if "multimodal_cfg" in model:
            raise CheckpointError(
                f"{path}: this is a CoCa, whose attentional pooling is not read; use a CLIP"
            )
        for part, allowed in UNREAD.items():
            for name, values in allowed.items():
                value = model[part].get(name)
                if value is not None and value not in values:
                    raise CheckpointError(
                        f"{path}: {part} {name} is {value!r}, which is not read; "
                        f"need {' or '.join(map(repr, values))}: use another checkpoint"
                    )
        of_pixels = pixels.get("mean"), pixels.get("std")
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None
    return model, *hf_weights.normalisation(path, *of_pixels)
