"""The meta-step in PyTorch, as people write it; a process that answers over pipes.

python torch_worker.py WORK.npz     then one line in, one JSON line out: "step" or "check"

All 77 positions of every prompt, one task after the other, autograd.grad(create_graph=True), and
the gradients of the tasks added up by backward. Weights, prompts and tokens come in the file.
"""

import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

RATE, FOCAL_EDGE = 0.01, 1e-5


def tower(w: dict, context, ids, slots, eos, heads: int):
    """Text features of all prompts, [c, j]."""
    x = w["token"][ids]
    filled = torch.take_along_dim(context, slots.clamp(min=0)[..., None], dim=1)
    x = torch.where((slots >= 0)[..., None], filled, x) + w["position"][: ids.shape[1]]
    c, t, d = x.shape
    mask = torch.full((t, t), float("-inf")).triu(1)
    for i in range(len(w["norm1.scale"])):
        y = F.layer_norm(x, (d,), w["norm1.scale"][i], w["norm1.bias"][i])
        qkv = y @ w["qkv.kernel"][i] + w["qkv.bias"][i]
        # the layout of weights.read: heads of q, then of k, then of v
        q, k, v = qkv.reshape(c, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT * (d // heads) ** -0.5 + mask).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(c, t, d)
        x = x + mixed @ w["out.kernel"][i] + w["out.bias"][i]
        y = F.layer_norm(x, (d,), w["norm2.scale"][i], w["norm2.bias"][i])
        y = y @ w["fc1.kernel"][i] + w["fc1.bias"][i]
        x = x + (y * torch.sigmoid(1.702 * y)) @ w["fc2.kernel"][i] + w["fc2.bias"][i]
    x = x[torch.arange(c), eos]
    return F.layer_norm(x, (d,), w["final.scale"], w["final.bias"]) @ w["projection"]


def loss(params: dict, held: dict, side: dict, heads: int):
    """model.loss with focal, dice and 0.1 align, softmax form, without dropout."""
    text = tower(held["text"], params["context"], held["ids"], held["slots"], held["eos"], heads)
    label, scale = held["label"], params["scale"].exp()
    levels = [
        F.normalize(x @ params[f"kernel{i}"] + params[f"bias{i}"], dim=-1)
        for i, x in enumerate(side["levels"])
    ]
    pair = F.normalize(torch.stack([text[label == s].mean(0) for s in (0, 1)]), dim=-1)
    similarity = sum(v @ pair.T for v in levels) / len(levels)
    logit = scale * (similarity[..., 1] - similarity[..., 0])
    mask, (n, h, _) = side["mask"], side["mask"].shape
    grid = round(logit.shape[1] ** 0.5)
    pixels = F.interpolate(
        logit.reshape(n, 1, grid, grid), (h, h), mode="bilinear", align_corners=True
    )[:, 0]
    p, q = pixels.sigmoid(), mask.trunc().clamp(FOCAL_EDGE, 1 - FOCAL_EDGE)
    p_t = q * p + (1 - q) * (1 - p) + 1e-5
    focal = (-((1 - p_t) ** 2) * p_t.log()).mean()
    overlap, total = (p * mask).sum((1, 2)), p.sum((1, 2)) + mask.sum((1, 2))
    dice = (1 - (2 * overlap + 1) / (total + 1)).mean()
    share = F.avg_pool2d(mask[:, None], h // grid).reshape(n, -1)
    every = sum(v @ F.normalize(text, dim=-1).T for v in levels) / len(levels)
    right = (share > 0.5)[..., None] == (label == 1)
    best = every.masked_fill(~right, float("-inf")).argmax(-1)
    per_patch = F.cross_entropy((scale * every).flatten(0, 1), best.flatten(), reduction="none")
    counts = ((share == 0) | (share > 0.5)).float()
    align = ((per_patch.reshape(n, -1) * counts).sum(1) / counts.sum(1).clamp(min=1)).mean()
    return focal + dice + 0.1 * align


def outer(params: dict, held: dict, tasks: list, heads: int, steps: int) -> float:
    """Mean query loss after `steps` exact inner steps; its gradient is left in params."""
    total = 0.0
    for support, query in tasks:
        fast = dict(params)
        for _ in range(steps):
            value = loss(fast, held, support, heads)
            grads = torch.autograd.grad(
                value, list(fast.values()), create_graph=True, allow_unused=True
            )  # offset has no part in the softmax form
            moved = zip(fast.items(), grads, strict=True)
            fast = {n: p if g is None else p - RATE * g for (n, p), g in moved}
        value = loss(fast, held, query, heads) / len(tasks)
        value.backward()
        total += float(value.detach())
    return total


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arrays = {k: torch.from_numpy(v) for k, v in np.load(sys.argv[1]).items()}
    heads, steps = int(arrays["heads"]), int(arrays["inner_steps"])

    def under(prefix):
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    held = {n: arrays[n].long() for n in ("ids", "slots", "eos", "label")} | {
        "text": under("text.")
    }
    params = {n: v.requires_grad_() for n, v in under("params.").items()}
    sides = [under(f"{side}.") for side in ("support", "query")]

    def task(side, i):
        levels = [side[f"level{l}"][i] for l in range(len(side) - 1)]
        return {"levels": levels, "mask": side["mask"][i]}

    count = len(sides[0]["mask"])
    tasks = [tuple(task(side, i) for side in sides) for i in range(count)]
    optimizer = torch.optim.Adam(list(params.values()), lr=1e-3)
    for line in sys.stdin:
        begin = time.perf_counter()
        optimizer.zero_grad()
        value = outer(params, held, tasks, heads, steps)
        said = {"loss": value}
        if line.strip() == "check":
            said["gradient"] = params["context"].grad.flatten().tolist()
        else:
            optimizer.step()
        said["seconds"] = time.perf_counter() - begin
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
