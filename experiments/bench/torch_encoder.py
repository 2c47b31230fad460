"""CLIP's image encoder in other engines: transformers' CLIPVisionModelWithProjection as it comes.

python torch_encoder.py FOLDER     then lines in, JSON lines out: "ENGINE DTYPE BATCH" is one timed
call in seconds, or null where the engine has no such format; "check" gives the pooled embedding of
the first two images. FOLDER holds clip/ and pixels.npy. Engines: torch, compiled, onnx, openvino.
"""

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionModelWithProjection

FOLDER = Path(sys.argv[1])
CORES = len(os.sched_getaffinity(0))
CUDA = torch.cuda.is_available()  # there torch and compiled run, the others on the CPU
torch.set_num_threads(CORES)
if CUDA:
    torch.set_float32_matmul_precision("high")  # TF32, as JAX
IMAGES = torch.from_numpy(np.load(FOLDER / "pixels.npy"))


@cache
def model(dtype: str):
    load = CLIPVisionModelWithProjection.from_pretrained
    plain = load(FOLDER / "clip", attn_implementation="sdpa").eval()
    if dtype == "int8":
        linear = {torch.nn.Linear}
        return torch.ao.quantization.quantize_dynamic(plain, linear, dtype=torch.qint8)
    return plain.to(getattr(torch, dtype))


class Tapped(torch.nn.Module):
    """All hidden states, as a run taps several."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, pixels):
        out = self.own(pixels, output_hidden_states=True)
        return (out.image_embeds, *out.hidden_states)


@cache
def onnx_file(dtype: str, batch: int) -> Path:
    path = FOLDER / f"{dtype}-{batch}.onnx"
    if dtype == "int8":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(onnx_file("float32", batch), path)
    else:
        torch.onnx.export(Tapped(model(dtype)), (IMAGES[:batch],), path, dynamo=True)
    return path


@cache
def engine(name: str, dtype: str, batch: int) -> Callable | None:
    """A call on the first images; None: it has no such format."""
    images = IMAGES[:batch]
    if name in ("torch", "compiled"):
        if (name, dtype) == ("compiled", "int8"):
            return None
        group = images.to(torch.bfloat16) if dtype == "bfloat16" else images
        own = Tapped(model(dtype))
        if CUDA:
            group, own = group.cuda(), copy.deepcopy(own).cuda()
        own = torch.compile(own) if name == "compiled" else own
        return lambda: own(group)
    if name == "onnx":
        if dtype == "bfloat16":
            return None
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = CORES
        session = onnxruntime.InferenceSession(onnx_file(dtype, batch), options)
        (entry,) = session.get_inputs()
        return lambda: session.run(None, {entry.name: images.numpy()})
    import openvino

    core = openvino.Core()
    network = core.read_model(onnx_file("float32", batch))
    if dtype == "int8":
        import nncf

        kind, ranges = nncf.ModelType.TRANSFORMER, nncf.Dataset([images.numpy()])
        network = nncf.quantize(network, ranges, model_type=kind, subset_size=1)
    hint = "f32" if dtype == "float32" else "bf16"
    how = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": CORES}
    compiled = core.compile_model(network, "CPU", how)
    return lambda: compiled([images.numpy()])


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # exporters print
    for line in sys.stdin:
        with torch.inference_mode():
            if line.strip() == "check":
                pooled = model("float32")(IMAGES[:2]).image_embeds.tolist()
                print(json.dumps(pooled), file=answers, flush=True)
                continue
            name, dtype, batch = line.split()
            call, begin = engine(name, dtype, int(batch)), time.perf_counter()
            if call is not None:
                call()
                torch.cuda.synchronize() if CUDA else None
            seconds = None if call is None else time.perf_counter() - begin
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
