"""Tensor names and layouts of published checkpoints -> transformers' Flax tree of CLIP.

What other encoders have and CLIP has not gets names of its own: `prefix_tokens` (class token and
registers, with their positions), `head` (SigLIP's pooling), `embedding_norm` and `pooler` (BERT's).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from medclip_jax.errors import CheckpointError

Flat = dict[str, np.ndarray]
Rules = tuple[tuple[str, str], ...]  # regular expressions and what stands in their place

LAYERS = r"vision_model.encoder.layers."
SIGLIP: Rules = ((r"^text_model\.head\.", "text_projection."),)
DINO: Rules = (
    (r"^(dinov\w+|model)\.", ""),
    (r"^embeddings\.cls_token", "vision_model.embeddings.class_token"),
    (r"^embeddings\.position_embeddings", "vision_model.embeddings.positions"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "vision_model.embeddings.patch_embedding."),
    (r"^embeddings\.", "vision_model.embeddings."),
    (r"^(encoder\.|model\.)?layer\.", LAYERS),
    (r"^(layer)?norm\.", "vision_model.post_layernorm."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attention\.attention\.(.)(?:uery|ey|alue)\.", r".self_attn.\1_proj."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".self_attn.out_proj."),
    (r"\.attention\.", ".self_attn."),
    (r"\.layer_scale([12])\.lambda1$", r".scale\1"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
)
OPEN_CLIP: Rules = (
    (r"^text\.(?!transformer\.embeddings|transformer\.encoder|transformer\.pooler|proj)", ""),
    (r"^visual\.(trunk\.)?(transformer\.resblocks|blocks)\.", LAYERS),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.(trunk\.)?(conv1|patch_embed\.proj)\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.trunk\.cls_token", "vision_model.embeddings.class_token"),
    (r"^visual\.trunk\.reg_token", "vision_model.embeddings.register_tokens"),
    (r"^visual\.trunk\.pos_embed", "vision_model.embeddings.positions"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.(ln_post|trunk\.norm)\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.kernel"),
    (r"^visual\.head\.proj\.", "visual_projection."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.kernel"),
    (r"\.(?:ln_|norm)([12])\.", r".layer_norm\1."),
    (r"\.attn\.(out_)?proj\.", ".self_attn.out_proj."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.ls_?([12])\.gamma$", r".scale\1"),
)
BERT: Rules = (
    (r"^text\.transformer\.embeddings\.word_", "text_model.embeddings.token_"),
    (r"^text\.transformer\.embeddings\.position_embeddings", "text_model.position_table"),
    (r"^text\.transformer\.embeddings\.token_type_embeddings", "text_model.type_table"),
    (r"^text\.transformer\.embeddings\.LayerNorm", "text_model.embedding_norm"),
    (r"token_embeddings\.", "token_embedding."),
    (r"^text\.transformer\.encoder\.layer\.", "text_model.encoder.layers."),
    (r"\.attention\.self\.(.)(?:uery|ey|alue)\.", r".self_attn.\1_proj."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.attention\.output\.LayerNorm\.", ".layer_norm1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.output\.LayerNorm\.", ".layer_norm2."),
    (r"^text\.transformer\.pooler\.dense\.", "text_model.pooler."),
    (r"^text\.proj\.(0\.)?weight", "text_projection_0.weight"),
    (r"^text\.proj\.2\.", "text_projection_1."),
)
BLOCK = "layer_norm1 layer_norm2 self_attn/q_proj self_attn/k_proj self_attn/v_proj".split()
BLOCK += "self_attn/out_proj mlp/fc1 mlp/fc2".split()


def to_flax(flat: Mapping[str, np.ndarray], rules: Rules = ()) -> tuple[Flat, dict[str, str]]:
    """Tensors under Flax's names and layouts, and the name that each had in the file."""
    renamed: Flat = {}
    origin: dict[str, str] = {}
    for name, value in flat.items():
        short = name.removeprefix("module.")
        for pattern, new in rules:
            short = re.sub(pattern, new, short)
        parts = [short]
        if found := re.search(r"(in_proj_|qkv\.)(weight|bias)$", short):
            parts = [f"{short[: found.start()]}{x}_proj.{found[2]}" for x in "qkv"]
        rows = [value] if len(parts) == 1 else np.array_split(value, 3)  # shapes are checked later
        renamed |= dict(zip(parts, rows, strict=True))
        origin |= dict.fromkeys(parts, name)
    try:
        _simplify(renamed, rules is DINO)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"shapes of its tensors do not go together ({error})") from None
    return _of_torch(renamed), {_flax_name(n): name for n, name in origin.items()}


def _simplify(flat: Flat, dino: bool) -> None:
    """Fold what the blocks have not: LayerScale, a gate beside fc1, absent biases, tokens."""
    halves: Any
    tokens: Any
    for name in list(flat):
        stem, _, last = name.rpartition(".")
        if last in ("scale1", "scale2"):
            scale, layer = flat.pop(name), ".self_attn.out_proj" if last == "scale1" else ".mlp.fc2"
            for part in (f"{stem}{layer}.{x}" for x in ("weight", "bias")):
                if (value := flat.get(part)) is not None:
                    flat[part] = scale.reshape(-1, *[1] * (value.ndim - 1)) * value
        elif stem.endswith("mlp.up_proj"):
            halves = flat.pop(f"{stem[:-7]}gate_proj.{last}", None), flat.pop(name)
            flat[f"{stem[:-7]}fc1.{last}"] = np.concatenate([x for x in halves if x is not None])
    if dino:
        for name in [n for n in flat if re.search(r"\.(self_attn\.\w+|mlp\.fc[12])\.weight$", n)]:
            flat.setdefault(f"{name[:-6]}bias", np.zeros(len(flat[name]), np.float32))
    if "vision_model.head.probe" in flat:
        flat["vision_model.head.probe"] = flat["vision_model.head.probe"].reshape(-1)
    at = "vision_model.embeddings."
    if f"{at}class_token" in flat:
        tokens = [flat.pop(f"{at}{x}", None) for x in ("class_token", "register_tokens")]
        tokens = [x.reshape(-1, x.shape[-1]) for x in tokens if x is not None]
        if (positions := flat.pop(f"{at}positions", None)) is not None:
            positions = positions.reshape(-1, positions.shape[-1])
            tokens[0] = tokens[0] + positions[:1]
            flat[f"{at}position_embedding.weight"] = positions[1:]
        flat[f"{at}prefix_tokens"] = np.concatenate(tokens)
    if (table := flat.pop("text_model.position_table.weight", None)) is not None:
        of_type = flat.pop("text_model.type_table.weight")[:1]
        flat["text_model.embeddings.position_embedding.weight"] = table + of_type


def _of_torch(flat: Mapping[str, np.ndarray]) -> Flat:
    """PyTorch's names and layouts -> Flax's."""
    result = {}
    for name, value in flat.items():
        flax = _flax_name(name)
        if name.endswith(".weight") and flax.endswith("/kernel"):
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        result[flax] = value
    return result


def _flax_name(name: str) -> str:
    stem, _, last = name.replace(".", "/").rpartition("/")
    if last == "weight":
        table = stem.endswith(("token_embedding", "position_embedding"))
        norm = re.search(r"norm\d?$", stem)
        last = "embedding" if table else "scale" if norm else "kernel"
    return f"{stem}/{last}" if stem else last


def select(
    flat: Flat, names: list[str], path: Path, origin: Mapping[str, str] | None = None, kind="CLIP"
) -> dict[str, Any]:
    """The tree of these names. Raises CheckpointError naming the first that is missing."""
    missing = next((name for name in names if name not in flat), None)
    if missing is None:
        return unflatten_dict({name: flat[name] for name in names}, sep="/")
    stem, _, last = missing.rpartition("/")
    torch = "weight" if last in ("kernel", "scale", "embedding") else last
    siblings = [n for n in origin or {} if n.startswith(f"{stem}/")]
    if origin and siblings:
        name = re.sub(r"(weight|bias)$", torch, origin[siblings[0]])
    else:
        name = re.sub(r"/(kernel|scale|embedding)$", "/weight", missing).replace("/", ".")
    raise CheckpointError(
        f"{path}: tensor {name} is missing; this is not a whole {kind} checkpoint"
    )


def of_blocks(part: str, depth: int) -> list[str]:
    """Parameters of the blocks of `vision` or `text`."""
    return [
        f"{part}_model/encoder/layers/{i}/{layer}/{x}"
        for i in range(depth)
        for layer in BLOCK
        for x in (("scale" if "norm" in layer else "kernel"), "bias")
    ]


def of_vision(depth: int, projection: bool = True, tables: tuple[str, ...] = ()) -> list[str]:
    """Parameters of an image encoder; `tables` are the embeddings of one that is not CLIP's."""
    at, norms = "vision_model/embeddings", ["post_layernorm"]
    own = ["patch_embedding/bias", *tables]
    if not tables:
        norms.append("pre_layrnorm")
        own = ["class_embedding", "position_embedding/embedding"]
    return [
        *(f"vision_model/{norm}/{x}" for norm in norms for x in ("scale", "bias")),
        *of_blocks("vision", depth),
        *(f"{at}/{x}" for x in ("patch_embedding/kernel", *own)),
        *(["visual_projection/kernel"] if projection else []),
    ]


def of_text(depth: int, projection: tuple[str, ...] = ("kernel",)) -> list[str]:
    """Parameters of a text encoder of CLIP's or SigLIP's kind."""
    return [
        *(f"text_model/final_layer_norm/{x}" for x in ("scale", "bias")),
        *of_blocks("text", depth),
        *(f"text_model/embeddings/{x}_embedding/embedding" for x in ("token", "position")),
        *(f"text_projection/{x}" for x in projection),
    ]


def of_bert(flat: Flat, depth: int, pooler: bool) -> list[str]:
    """Parameters of open_clip's text encoder of BERT's kind."""
    projections = [f"text_projection_{i}/kernel" for i in (0, 1)]
    return [
        *(f"text_model/embedding_norm/{x}" for x in ("scale", "bias")),
        *of_blocks("text", depth),
        *(f"text_model/embeddings/{x}_embedding/embedding" for x in ("token", "position")),
        *(f"text_model/pooler/{x}" for x in ("kernel", "bias") if pooler),
        *(x for x in projections if x in flat),
    ]


HEAD = [
    f"vision_model/head/{x}"
    for x in (
        "probe",
        *(f"attention/{q}_proj/{x}" for q in ("q", "k", "v", "out") for x in ("kernel", "bias")),
        *(f"mlp/fc{i}/{x}" for i in (1, 2) for x in ("kernel", "bias")),
        *("layernorm/scale", "layernorm/bias"),
    )
]


def depth(flat: Flat, part: str) -> int:
    """Blocks of `vision` or `text` among the tensors."""
    found = [re.match(rf"{part}_model/encoder/layers/(\d{{1,6}})/", n) for n in flat]
    return max((int(x[1]) + 1 for x in found if x), default=0)
