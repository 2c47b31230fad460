"""The exact meta-step in PyTorch by torch.func: grad of grad, vmap over tasks.

python torch_maml.py WORK.npz      then lines in, JSON lines out: "TASKS eager" and "TASKS compiled"
are the seconds of one step with Adam (the stored tasks over and over), "check" is loss and gradient
of the context. It reads no more positions of the prompts than ours.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import grad, grad_and_value, vmap

RATE, FOCAL_EDGE = 0.01, 1e-5


def dense(w: dict, name: str, x):
    return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]


def norm(w: dict, name: str, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}/scale"], w[f"{name}/bias"])


def text_features(w: dict, context, words: dict, heads: int):
    """Text features of all prompts, [c, j]; w: text_model of transformers' Flax tree, by path."""
    ids, slots = words["ids"], words["slots"]
    x = w["embeddings/token_embedding/embedding"][ids]
    filled = torch.take_along_dim(context, slots.clamp(min=0)[..., None], dim=1)
    x = torch.where((slots >= 0)[..., None], filled, x)
    x = x + w["embeddings/position_embedding/embedding"][: ids.shape[1]]
    c, t, d = x.shape
    mask = torch.full((t, t), float("-inf"), device=x.device).triu(1)
    for i in range(words["depth"]):
        block = f"encoder/layers/{i}"
        y = norm(w, f"{block}/layer_norm1", x)
        q, k, v = (
            dense(w, f"{block}/self_attn/{n}_proj", y).reshape(c, t, heads, -1).transpose(1, 2)
            for n in "qkv"
        )
        # SDPA's fused kernels have no second derivative
        mixed = (q @ k.mT * (d // heads) ** -0.5 + mask).softmax(-1) @ v
        x = x + dense(w, f"{block}/self_attn/out_proj", mixed.transpose(1, 2).reshape(c, t, d))
        y = dense(w, f"{block}/mlp/fc1", norm(w, f"{block}/layer_norm2", x))
        x = x + dense(w, f"{block}/mlp/fc2", y * torch.sigmoid(1.702 * y))
    x = norm(w, "final_layer_norm", x[torch.arange(c, device=x.device), words["eos"]])
    return x @ w["text_projection/kernel"]


def loss(params: dict, text: dict, words: dict, levels: tuple, mask, heads: int):
    """model.loss with focal, dice and 0.1 align, softmax form, without dropout."""
    features = text_features(text, params["context"], words, heads)
    scale, n, side = params["scale"].exp(), len(mask), mask.shape[1]
    adapted = [
        F.normalize(x @ params[f"adapters/{i}/kernel"] + params[f"adapters/{i}/bias"], dim=-1)
        for i, x in enumerate(levels)
    ]
    pair = torch.stack([features[words[which]].mean(0) for which in ("healthy", "abnormal")])
    similarity = sum(v @ F.normalize(pair, dim=-1).T for v in adapted) / len(adapted)
    logit = scale * (similarity[..., 1] - similarity[..., 0])
    grid = round(logit.shape[1] ** 0.5)
    square = logit.reshape(n, 1, grid, grid)
    pixels = F.interpolate(square, (side, side), mode="bilinear", align_corners=True)[:, 0]
    p, q = pixels.sigmoid(), mask.trunc().clamp(FOCAL_EDGE, 1 - FOCAL_EDGE)
    p_t = q * p + (1 - q) * (1 - p) + 1e-5
    focal = (-((1 - p_t) ** 2) * p_t.log()).mean()
    overlap, total = (p * mask).sum((1, 2)), p.sum((1, 2)) + mask.sum((1, 2))
    dice = (1 - (2 * overlap + 1) / (total + 1)).mean()
    share = F.avg_pool2d(mask[:, None], side // grid).reshape(n, -1)
    every = sum(v @ F.normalize(features, dim=-1).T for v in adapted) / len(adapted)
    right = (share > 0.5)[..., None] == (words["label"] == 1)
    best = every.masked_fill(~right, float("-inf")).argmax(-1)
    own = torch.take_along_dim(scale * every, best[..., None], dim=-1)[..., 0]
    per_patch = (scale * every).logsumexp(-1) - own
    counts = ((share == 0) | (share > 0.5)).float()
    align = ((per_patch * counts).sum(1) / counts.sum(1).clamp(min=1)).mean()
    return focal + dice + 0.1 * align


class Step:
    """The outer gradient of a number of tasks, and Adam."""

    def __init__(self, arrays: dict, device: str):
        tensors = {n: torch.from_numpy(x).to(device) for n, x in arrays.items()}

        def below(prefix: str) -> dict:
            return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}

        words = {n: tensors[n].long() for n in ("ids", "slots", "eos", "label")}
        words |= {"healthy": (words["label"] == 0).nonzero()[:, 0], "depth": int(arrays["depth"])}
        words["abnormal"] = (words["label"] == 1).nonzero()[:, 0]
        text, heads = below("text/"), int(arrays["heads"])
        self.device, self.params, self.sides = device, below("params/"), []
        for name in ("support", "query"):
            side = below(f"{name}/")
            mask = side.pop("mask")
            self.sides.append((tuple(side[f"level{i}"] for i in range(len(side))), mask))

        def value(params, side):
            return loss(params, text, words, *side, heads)

        def after_one_step(params, support, query):
            slopes = grad(value)(params, support)
            return value({n: x - RATE * slopes[n] for n, x in params.items()}, query)

        def objective(params, support, query):
            return vmap(after_one_step, (None, 0, 0))(params, support, query).mean()

        plain = grad_and_value(objective)
        self.gradients = {"eager": plain, "compiled": torch.compile(plain)}
        self.adam = torch.optim.Adam([x.requires_grad_() for x in self.params.values()], 1e-3)

    def gradient(self, how: str, sides: list) -> tuple[dict, torch.Tensor]:
        return self.gradients[how]({n: x.detach() for n, x in self.params.items()}, *sides)

    def seconds(self, tasks: int, how: str) -> float:
        rows = torch.arange(tasks, device=self.device) % len(self.sides[0][1])
        sides = [(tuple(x[rows] for x in levels), mask[rows]) for levels, mask in self.sides]
        self.wait()
        begin = time.perf_counter()
        slopes, _ = self.gradient(how, sides)
        for name, x in self.params.items():
            x.grad = slopes[name]
        self.adam.step()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    step = Step(dict(np.load(sys.argv[1])), "cuda" if torch.cuda.is_available() else "cpu")
    for line in sys.stdin:
        exact = line.strip() == "check"
        torch.set_float32_matmul_precision("highest" if exact else "high")  # TF32, as JAX
        if exact:
            slopes, value = step.gradient("eager", step.sides)
            context = slopes["context"].flatten().tolist()
            print(json.dumps({"loss": float(value), "gradient": context}), flush=True)
            continue
        tasks, how = line.split()
        try:
            answer = step.seconds(int(tasks), how)
        except Exception as error:  # out of memory, or what the compiler cannot do
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
