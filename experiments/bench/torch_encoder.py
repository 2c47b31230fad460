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
    at = "vision_model.embeddings.position_embedding.embedding"
    layers = max(int(n.split(".")[3]) for n in w if ".encoder.layers." in n) + 1
    config = CLIPVisionConfig(
        hidden_size=w[at].shape[1],
        intermediate_size=4 * w[at].shape[1],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=pixels,
        patch_size=patch,
        projection_dim=w["visual_projection.kernel"].shape[1],
        hidden_act="quick_gelu",
        layer_norm_eps=float(arrays["eps"]),
    )
    made, state = CLIPVisionModelWithProjection(config).eval(), {}
    for name, value in w.items():
        stem, _, last = name.rpartition(".")
        if last == "kernel":
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        state[f"{stem}.weight" if last in ("kernel", "scale", "embedding") else name] = value
    missing, unknown = made.load_state_dict(state, strict=False)
    if set(missing) - {"vision_model.embeddings.position_ids"} or unknown:
        raise RuntimeError(f"weights do not fit: {missing}, {unknown}")
    return made


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
