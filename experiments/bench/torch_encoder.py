"""CLIP's image encoder in PyTorch: transformers' CLIPVisionModelWithProjection as it comes.

python torch_encoder.py FOLDER     then lines in, JSON lines out: "DTYPE BATCH" is one timed call,
"check" gives the pooled embedding of the first two images. FOLDER holds clip/ and pixels.npy.
"""

import json
import os
import sys
import time

import numpy as np
import torch
from transformers import CLIPVisionModelWithProjection


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    images = torch.from_numpy(np.load(f"{sys.argv[1]}/pixels.npy"))
    load = CLIPVisionModelWithProjection.from_pretrained
    models = {"float32": load(f"{sys.argv[1]}/clip").eval()}
    for line in sys.stdin:
        if line.strip() == "check":
            with torch.inference_mode():
                pooled = models["float32"](images[:2]).image_embeds
            print(json.dumps(pooled.tolist()), flush=True)
            continue
        dtype, batch = line.split()
        kind = getattr(torch, dtype)
        if dtype not in models:
            models[dtype] = load(f"{sys.argv[1]}/clip").eval().to(kind)
        group = images[: int(batch)].to(kind)
        begin = time.perf_counter()
        with torch.inference_mode():  # all hidden states, as a run taps several
            models[dtype](group, output_hidden_states=True)
        print(json.dumps(time.perf_counter() - begin), flush=True)


if __name__ == "__main__":
    main()
