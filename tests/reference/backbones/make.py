"""What transformers and open_clip make of small encoders with weights from tests/support/drawn.py.

    python tests/reference/backbones/make.py tests/reference/backbones

Needs torch, transformers, timm and open_clip_torch. Writes NAME.json (config files, shapes of the
tensors) and NAME.npz (ids and slots in; pooled, tapped tokens, text and its gradient out).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as hf

sys.path.append(str(Path(__file__).parents[3]))
from tests.support.drawn import pixels, weights

register = torch.library.register_fake


def lenient(*args, **kwargs):
    """torchvision of another torch registers operators that are not there."""
    decorate = register(*args, **kwargs)

    def attempt(function):
        try:
            return decorate(function)
        except RuntimeError:
            return function

    return attempt


torch.library.register_fake = lenient
SIZE, OTHER, PATCH = 32, 48, 8
ENCODER = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
SQUARE = dict(image_size=SIZE, patch_size=PATCH)
TEXT = dict(vocab_size=64, max_position_embeddings=12, **ENCODER)
DINO = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, **SQUARE)


def fill(model) -> dict[str, list[int]]:
    """Drawn weights into the model; returns the shapes."""
    state = model.state_dict()
    shapes = {n: list(x.shape) for n, x in state.items() if x.is_floating_point()}
    drawn = {n: torch.tensor(x) for n, x in weights(shapes).items()}
    model.load_state_dict(state | drawn)
    model.double().eval()
    return shapes


def image_values(blocks, run, grid: int, prefix: int, images) -> dict[str, np.ndarray]:
    """Pooled embedding and the tokens after blocks 1 and 3."""
    tapped = []
    hooks = [
        blocks[i].register_forward_hook(
            lambda _m, _i, out: tapped.append(out[0] if isinstance(out, tuple) else out)
        )
        for i in (0, 2)
    ]
    with torch.no_grad():
        pooled = run(torch.tensor(images).permute(0, 3, 1, 2).to(next(blocks.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    tokens = {
        f"tokens_{n}": x[:, prefix:].float().numpy() for n, x in zip((1, 3), tapped, strict=True)
    }
    assert tapped[1].shape[1] == prefix + grid**2
    return {"pooled": pooled.float().numpy(), **tokens}


def text_values(table, run, length: int, pad: int, last: int) -> dict[str, np.ndarray]:
    """Features of two prompts with context, and the gradient of a weighted sum by the context."""
    rng = np.random.default_rng(5)
    ids = np.full((2, length), pad)
    ids[0, :6], ids[1, :4] = [3, 0, 0, 9, 8, last], [3, 0, 0, last]
    slots = np.full((2, length), -1)
    slots[:, 1:3] = [0, 1]
    width = table.weight.shape[1]
    drawn, kind = rng.normal(size=(2, 2, width)) * 0.2, table.weight.dtype
    context = torch.tensor(drawn, dtype=kind, requires_grad=True)

    def put(_module, _inputs, out):
        return torch.cat([out[:, :1], context, out[:, 3:]], dim=1)

    hook = table.register_forward_hook(put)
    placed = np.where(slots >= 0, 5, ids)  # the peer takes any real token there
    features = run(torch.tensor(placed))
    hook.remove()
    way = rng.normal(size=tuple(features.shape))
    (features * torch.tensor(way, dtype=kind)).sum().backward()
    return {
        "ids": ids,
        "slots": slots,
        "context": context.detach().float().numpy(),
        "way": way.astype(np.float32),
        "text": features.detach().float().numpy(),
        "gradient": context.grad.float().numpy(),
    }


PIXELS, LARGER = pixels(2, SIZE), pixels(1, OTHER)


def save(target: Path, name: str, files: dict, shapes: dict, larger: dict, **values) -> None:
    (target / f"{name}.json").write_text(json.dumps({"files": files, "shapes": shapes}))
    values |= {f"larger_{n}": x for n, x in larger.items()}
    values = {n: x if n in ("ids", "slots") else x.astype(np.float32) for n, x in values.items()}
    np.savez_compressed(target / f"{name}.npz", **values)


def image_only(target: Path) -> None:
    kinds = {
        "dinov2": (hf.Dinov2Config(mlp_ratio=2, **DINO), hf.Dinov2Model, 1),
        "dinov2_swiglu": (
            hf.Dinov2Config(mlp_ratio=2, use_swiglu_ffn=True, **DINO),
            *(hf.Dinov2Model, 1),
        ),
        "dinov2_with_registers": (
            hf.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=4, **DINO),
            *(hf.Dinov2WithRegistersModel, 5),
        ),
        "dinov3_vit": (
            hf.DINOv3ViTConfig(intermediate_size=48, num_register_tokens=4, **DINO),
            *(hf.DINOv3ViTModel, 5),
        ),
        "dinov3_vit_gated": (
            hf.DINOv3ViTConfig(
                *(),
                intermediate_size=48,
                num_register_tokens=4,
                use_gated_mlp=True,
                hidden_act="silu",
                **DINO,
            ),
            *(hf.DINOv3ViTModel, 5),
        ),
    }
    for name, (config, kind, prefix) in kinds.items():
        model = kind(config)
        shapes = fill(model)
        blocks = model.layer if name.startswith("dinov3") else model.encoder.layer

        def run(x, model=model):
            return model(x).pooler_output

        own = image_values(blocks, run, SIZE // PATCH, prefix, PIXELS)
        larger = image_values(blocks, run, OTHER // PATCH, prefix, LARGER)
        save(target, name, {"config.json": config.to_diff_dict()}, shapes, larger, **own)


def pairs(target: Path) -> None:
    """SigLIP, and CLIP at another size."""
    vision = dict(ENCODER, **SQUARE)
    siglip = hf.SiglipConfig(text_config=dict(TEXT, projection_size=32), vision_config=vision)
    text = dict(TEXT, hidden_act="gelu", eos_token_id=63, bos_token_id=3)
    clip = hf.CLIPConfig(
        text_config=text, vision_config=dict(vision, hidden_act="gelu"), projection_dim=16
    )
    for name, config, kind, prefix in (
        ("siglip", siglip, hf.SiglipModel, 0),
        ("clip", clip, hf.CLIPModel, 1),
    ):
        model = kind(config)
        shapes = fill(model)
        model.float()  # transformers' causal mask is of float32's range
        blocks = model.vision_model.encoder.layers

        def image(x, model=model):
            return model.get_image_features(x, interpolate_pos_encoding=True)

        def text(ids, model=model):
            return model.get_text_features(input_ids=ids)

        own = image_values(blocks, image, SIZE // PATCH, prefix, PIXELS)
        larger = image_values(blocks, image, OTHER // PATCH, prefix, LARGER)
        table = model.text_model.embeddings.token_embedding
        words = text_values(table, text, 12, 1 if name == "siglip" else 63, 63)
        files = {"config.json": config.to_diff_dict()}
        save(target, name, files, shapes, larger, **own, **words)


def open_clips(target: Path) -> None:
    """open_clip's own format: its ViT, and custom text of BERT on timm's ViT."""
    import timm
    from open_clip.hf_model import HFTextEncoder
    from open_clip.model import CLIP, resize_pos_embed
    from open_clip.timm_model import TimmModel

    vision = dict(layers=3, width=64, head_width=32, patch_size=PATCH, mlp_ratio=2)
    text = dict(context_length=12, vocab_size=64, width=32, heads=2, layers=3)
    for name, quick, scale in (("open_clip", False, None), ("open_clip_quick", True, 0.1)):
        vision["ls_init_value"] = scale
        sizes = [dict(vision, image_size=size) for size in (SIZE, OTHER)]
        model, large = (CLIP(16, v, dict(text), quick_gelu=quick) for v in sizes)
        shapes = fill(model)
        state = model.state_dict()
        resize_pos_embed(state, large)
        large.double().eval().load_state_dict(state)
        values = [
            image_values(m.visual.transformer.resblocks, m.encode_image, s // PATCH, 1, x)
            for m, s, x in ((model, SIZE, PIXELS), (large, OTHER, LARGER))
        ]
        words = text_values(model.token_embedding, model.encode_text, 12, 0, 63)
        config = {
            "model_cfg": dict(embed_dim=16, quick_gelu=quick, vision_cfg=sizes[0], text_cfg=text),
            "preprocess_cfg": {},
        }
        files = {"open_clip_config.json": config}
        save(target, name, files, shapes, values[1], **values[0], **words)

    def trunk(size):
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=size, patch_size=PATCH, embed_dim=128, depth=3, num_heads=2, num_classes=0
        )
        model.default_cfg = {}
        return model

    timm.create_model = lambda name, **_: trunk(int(name))
    bert = hf.BertConfig(**dict(TEXT, hidden_size=128, max_position_embeddings=20), pad_token_id=0)
    kinds = {"mlp": "cls_last_hidden_state_pooler", "linear": "mean_pooler", None: "cls_pooler"}
    for proj, pooler in kinds.items():
        joint = 16 if proj else 128
        model = torch.nn.Module()
        model.visual = TimmModel(str(SIZE), joint, SIZE, pool="", proj="linear")
        model.text = HFTextEncoder("", joint, bert, pooler, proj)
        model.logit_scale = torch.nn.Parameter(torch.zeros(()))
        shapes = fill(model)
        large = TimmModel(str(OTHER), joint, OTHER, pool="", proj="linear").double().eval()
        state = model.visual.state_dict()
        state["trunk.pos_embed"] = timm.layers.resample_abs_pos_embed(
            state["trunk.pos_embed"], [OTHER // PATCH] * 2
        )
        large.load_state_dict(state)
        values = [
            image_values(m.trunk.blocks, m, s // PATCH, 1, x)
            for m, s, x in ((model.visual, SIZE, PIXELS), (large, OTHER, LARGER))
        ]
        table = model.text.transformer.embeddings.word_embeddings
        words = text_values(table, model.text, 12, 0, 63)
        config = {
            "embed_dim": joint,
            "vision_cfg": {
                "timm_model_name": "vit_base_patch16_224",
                **dict(timm_pool="", timm_proj="linear", image_size=SIZE),
            },
            "text_cfg": {
                "hf_model_name": "bert",
                **dict(hf_proj_type=proj, hf_pooler_type=pooler, context_length=12),
            },
        }
        files = {"open_clip_config.json": {"model_cfg": config, "preprocess_cfg": {}}}
        name = f"open_clip_bert_{proj or 'pooler'}"
        save(target, name, files, shapes, values[1], **values[0], **words)


def files(target: Path) -> None:
    """The ways in which PyTorch keeps tensors, each of them small."""
    values = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8
    state = {
        "a": values.T[1:, ::2],  # a view
        "b": values[1].half(),
        "c": values[:2].bfloat16(),
        "d": torch.tensor(2.5),
        "whole": torch.arange(3),
    }
    torch.save(state, target / "state_dict.bin")
    trained = {f"module.{n}": torch.nn.Parameter(x) for n, x in state.items() if n != "whole"}
    torch.save(
        {"epoch": 3, "state_dict": trained, "optimizer": {"lr": 1.0}}, target / "trained.bin"
    )
    torch.save(state, target / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), target / "module.bin")

    class Root(torch.nn.Module):
        def forward(self, x):
            return x

    root = Root()
    root.inner = Root()
    for name in "bd":
        root.inner.register_buffer(name, state[name])
    torch.jit.script(root).save(target / "scripted.pt")


if __name__ == "__main__":
    image_only(Path(sys.argv[1]))
    pairs(Path(sys.argv[1]))
    open_clips(Path(sys.argv[1]))
    files(Path(sys.argv[1]))
