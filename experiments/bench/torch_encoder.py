"""CLIP's vision tower in PyTorch: transformers' CLIPVisionModelWithProjection as it comes.

python torch_encoder.py WORK.npz     then lines in, JSON lines out: "DTYPE BATCH" is one timed call,
"check" gives the pooled embedding of the first two images. Weights and images come in the file.
"""

import json
import os
import sys
import time

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


def model(arrays: dict) -> CLIPVisionModelWithProjection:
    """The tower with the weights of the file under transformers' names."""
    heads, patch, pixels = (int(arrays[n]) for n in ("heads", "patch", "pixels"))
    w = {n.removeprefix("w."): torch.from_numpy(a) for n, a in arrays.items() if n[:2] == "w."}
    layers, d = w["blocks.norm1.scale"].shape
    config = CLIPVisionConfig(
        hidden_size=d,
        intermediate_size=4 * d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=pixels,
        patch_size=patch,
        projection_dim=w["projection"].shape[1],
        hidden_act="quick_gelu",
        layer_norm_eps=float(arrays["eps"]),
    )
    made = CLIPVisionModelWithProjection(config).eval()
    at, state = "vision_model", {}
    kernel = w["patch"].reshape(patch, patch, 3, d).permute(3, 2, 0, 1)
    state[f"{at}.embeddings.patch_embedding.weight"] = kernel
    state[f"{at}.embeddings.class_embedding"] = w["class"]
    state[f"{at}.embeddings.position_embedding.weight"] = w["position"]
    for theirs, ours in (("pre_layrnorm", "pre"), ("post_layernorm", "post")):
        state |= {f"{at}.{theirs}.weight": w[f"{ours}.scale"]}
        state |= {f"{at}.{theirs}.bias": w[f"{ours}.bias"]}
    for i in range(layers):
        state |= block(
            {n: a[i] for n, a in w.items() if n.startswith("blocks.")}, f"{at}.encoder.layers.{i}"
        )
    state["visual_projection.weight"] = w["projection"].T
    missing, unknown = made.load_state_dict(state, strict=False)
    if set(missing) - {f"{at}.embeddings.position_ids"} or unknown:
        raise RuntimeError(f"weights do not fit: {missing}, {unknown}")
    return made


def block(w: dict, at: str) -> dict:
    """One block's tensors by transformers' names."""
    state = {}
    for theirs, ours in (("layer_norm1", "norm1"), ("layer_norm2", "norm2")):
        state[f"{at}.{theirs}.weight"] = w[f"blocks.{ours}.scale"]
        state[f"{at}.{theirs}.bias"] = w[f"blocks.{ours}.bias"]
    kernels = w["blocks.qkv.kernel"].chunk(3, 1), w["blocks.qkv.bias"].chunk(3)
    for name, kernel, bias in zip("qkv", *kernels, strict=True):
        state[f"{at}.self_attn.{name}_proj.weight"] = kernel.T
        state[f"{at}.self_attn.{name}_proj.bias"] = bias
    for theirs, ours in (("self_attn.out_proj", "out"), ("mlp.fc1", "fc1"), ("mlp.fc2", "fc2")):
        state[f"{at}.{theirs}.weight"] = w[f"blocks.{ours}.kernel"].T
        state[f"{at}.{theirs}.bias"] = w[f"blocks.{ours}.bias"]
    return state


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arrays = dict(np.load(sys.argv[1]))
    images = torch.from_numpy(arrays["pixels_nhwc"]).permute(0, 3, 1, 2).contiguous()
    towers = {"float32": model(arrays)}
    for line in sys.stdin:
        if line.strip() == "check":
            with torch.inference_mode():
                pooled = towers["float32"](images[:2]).image_embeds
            print(json.dumps(pooled.tolist()), flush=True)
            continue
        dtype, batch = line.split()
        if dtype not in towers:
            towers[dtype] = model(arrays).to(getattr(torch, dtype))
        given = images[: int(batch)].to(getattr(torch, dtype))
        begin = time.perf_counter()
        with torch.inference_mode():  # all hidden states, as a run taps several
            towers[dtype](given, output_hidden_states=True)
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    main()
