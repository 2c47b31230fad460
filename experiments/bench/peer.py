"""Episodes per second of the exact meta-step against PyTorch, measured in turn."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from bench import workload
from medclip_jax.clip import layers

WORKER = Path(__file__).with_name("torch_worker.py")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tower", default="ViT-B/16", choices=workload.SIZES)
    parser.add_argument("--k", type=int, default=4, help="rows of support and query")
    parser.add_argument("--inner-steps", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument(
        "--python", default=sys.executable, help="a Python with PyTorch (extra torch-peers)"
    )


def run(args: argparse.Namespace) -> dict:
    work = workload.build(args.tower, args.tasks, args.k)
    compiled, state = workload.step(work, "maml", args.inner_steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.npz"
        np.savez(path, **arrays(work, args))
        worker = subprocess.Popen(
            [args.python, str(WORKER), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            agreement = compare(work, args, ask(worker, "check"))
            runs = {
                "jax": workload.Runner(work, compiled, state),
                "torch": lambda: ask(worker, "step")["seconds"],
            }
            seconds = workload.in_turn(runs, args.times, again=True)
        finally:
            worker.stdin.close()
            worker.wait(60)
    best = {name: min(values) for name, values in seconds.items()}
    peak = workload.matmul_peak()
    operations = workload.operations(work, "maml", args.inner_steps, compiled)
    share = operations / best["jax"] / peak
    ratio = best["torch"] / best["jax"]
    print(f"jax   {args.tasks / best['jax']:.3f} episodes/s ({best['jax']:.2f} s per step)")
    print(f"torch {args.tasks / best['torch']:.3f} episodes/s ({best['torch']:.2f} s per step)")
    print(f"ratio {ratio:.2f}; jax at {share:.0%} of the matmul peak, {peak / 1e9:.0f} GFLOP/s")
    return {
        "seconds": seconds,
        "episodes_per_second": {name: args.tasks / s for name, s in best.items()},
        "ratio": ratio,
        "share_of_matmul_peak": share,
        "matmul_gigaflops": peak / 1e9,
        "agreement": agreement,
    }


def ask(worker: subprocess.Popen, what: str) -> dict:
    """One answer of the worker. Raises RuntimeError if it has ended."""
    worker.stdin.write(f"{what}\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"the PyTorch worker ended with code {worker.wait()}; see above")
    return json.loads(line)


def compare(work: workload.Work, args: argparse.Namespace, said: dict) -> dict:
    """Loss and outer gradient of the context, ours against the worker's; both must agree."""
    loss, gradient = workload.outer(work, args.inner_steps)
    theirs = np.array(said["gradient"]).reshape(gradient.shape)
    away = float(np.abs(gradient - theirs).max() / np.abs(theirs).max())
    agreement = {"jax_loss": loss, "torch_loss": said["loss"], "gradient_difference": away}
    print(f"loss {loss:.6f} and {said['loss']:.6f}; gradients differ by {away:.1e} of the largest")
    if away > 1e-2 or abs(loss - said["loss"]) > 1e-3 * abs(loss):
        raise RuntimeError(f"the two do not compute the same: {agreement}")
    return agreement


def arrays(work: workload.Work, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """What the worker reads: the same weights, prompts and tokens under flat names."""
    words, text = work.design.prompts, jax.device_get(work.frozen["text"])
    flat = {"heads": work.design.text_encoder.heads, "inner_steps": args.inner_steps}
    flat |= {"ids": words.ids, "slots": words.slots, "eos": words.eos, "label": words.label}
    text_model, embeddings = text["text_model"], text["text_model"]["embeddings"]
    for name in ("token", "position"):
        flat[f"text.{name}"] = embeddings[f"{name}_embedding"]["embedding"]
    flat["text.projection"] = text["text_projection"]["kernel"]
    blocks = layers.stack(text_model["encoder"]["layers"])
    attention = blocks["self_attn"]
    dense = [attention[f"{x}_proj"] for x in "qkv"]
    parts = {
        "qkv": jax.tree.map(lambda *x: np.concatenate(x, -1), *dense),
        "out": attention["out_proj"],
        "norm1": blocks["layer_norm1"],
        "norm2": blocks["layer_norm2"],
        **blocks["mlp"],
        "final": text_model["final_layer_norm"],
    }
    for part, values in parts.items():
        flat |= {f"text.{part}.{name}": x for name, x in values.items()}
    params = jax.device_get(work.params)
    flat |= {f"params.{name}": params[name] for name in ("context", "scale", "offset")}
    for i, adapter in enumerate(params["adapters"]):
        flat |= {f"params.{name}{i}": x for name, x in adapter.items()}
    for name in ("support", "query"):
        side = jax.device_get(getattr(work.episodes, name))
        flat[f"{name}.mask"] = side.mask[:, 0]
        flat |= {f"{name}.level{i}": x[:, 0] for i, x in enumerate(side.features.levels)}
    return flat
