"""Memory and time of large image encoders of random weights, each in a process of its own."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import clock, sizes
from medclip_jax.errors import UserError

DTYPES = ["float32", "bfloat16", "int8"]
# what `--python` makes with transformers: class of the config and its fields
SIGLIP = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27)
SIGLIP |= dict(num_attention_heads=16)
GIANT = dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24)
KINDS = {
    "SigLIP-so400m/14@448": (
        "siglip",
        {"vision_config": SIGLIP | dict(image_size=448, patch_size=14), "text_config": SIGLIP},
    ),
    "DINOv2-g/14@224": ("dinov2", GIANT | dict(image_size=224, patch_size=14, use_swiglu_ffn=True)),
}
MAKE = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel
kind, fields, folder = sys.argv[1:]
config = AutoConfig.for_model(kind, **json.loads(fields))
with torch.device("meta"):
    shapes = {n: x.shape for n, x in AutoModel.from_config(config).state_dict().items()}
save_file({n: torch.randn(s) * 0.02 for n, s in shapes.items() if "_ids" not in n},
          folder + "/model.safetensors")
config.save_pretrained(folder)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    names = ["ViT-L/14@336", *KINDS]
    parser.add_argument("--size", nargs="+", default=names, choices=names)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--python", required=True, help="a Python with PyTorch and transformers")


def run(args: argparse.Namespace) -> dict:
    rows = []
    for size in args.size:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if size in KINDS:
                kind, fields = KINDS[size]
                make = [args.python, "-c", MAKE, kind, json.dumps(fields), name]
                if subprocess.run(make).returncode:
                    raise UserError(f"--python {args.python}: it needs PyTorch and transformers")
                tokenizer(folder)
            else:
                sizes.write("ViT-L/14", folder, size=336)
            for dtype in args.dtype:
                given = [name, dtype, args.images, args.batch]
                row = {"size": size, "dtype": dtype} | clock.alone("bench.large", *given)
                rows.append(row)
                print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    return {"rows": rows}


def tokenizer(folder: Path) -> None:
    """One of SigLIP's kind, of few pieces."""
    from tokenizers import Tokenizer, models

    pieces = [("<pad>", 0.0), ("</s>", -1.0), ("<unk>", -2.0), ("a", -3.0)]
    Tokenizer(models.Unigram(pieces, unk_id=2)).save(str(folder / "tokenizer.json"))


def worker(folder: str, dtype: str, count: int, batch: int) -> dict:
    """Loads the CLIP and encodes `count` images; peaks are of this process."""
    import jax

    from medclip_jax.clip import checkpoint

    begin = time.perf_counter()
    clip = checkpoint.load(folder, dtype=dtype)
    vision = sum(x.nbytes for x in jax.tree.leaves(clip.vision))
    loaded, peak = time.perf_counter() - begin, clock.peak_megabytes()
    images, begin = sizes.images(clip, count), time.perf_counter()
    how = dict(encoder=clip.image_encoder, mean=clip.mean, std=clip.std)
    for start in range(0, count, batch):
        rows = images[start : start + batch]
        jax.block_until_ready(checkpoint.encode_images(clip.vision, rows, **how))
    return {
        "vision_mb": round(vision / 1e6),
        "seconds_to_load": round(loaded, 1),
        "peak_mb_of_loading": peak,
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_mb": clock.peak_megabytes(),
    }


if __name__ == "__main__":
    folder, dtype, count, batch = sys.argv[1:]
    print(json.dumps(worker(folder, dtype, int(count), int(batch))))
