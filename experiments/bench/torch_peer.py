"""PyTorch beside ours on the same device, eager and compiled: encoder (SDPA), exact meta-step."""

import functools
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from bench import clock, encoder, sizes, workload
from medclip_jax.clip import checkpoint
from medclip_jax.clip.text import length
from medclip_jax.models import model
from medclip_jax.training import step as training_step

HERE = Path(__file__).parent
PROBE = "import torch, transformers as t; print(torch.__version__, t.__version__)"


def missing(python: str) -> str:
    """Why this Python cannot run the workers; "" if it can."""
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def encoders(python: str, size: str, batches: tuple[int, ...], end: float) -> dict:
    """Images/s by type, batch and mode; the largest difference of pooled embeddings from ours."""
    with tempfile.TemporaryDirectory() as name:
        folder = sizes.write(size, Path(name) / "clip", **encoder.SMALL_TEXT)
        clip = checkpoint.load(str(folder))
        images = sizes.images(clip, max(batches))
        worker = encoder.others(python, Path(name), clip, images)
        try:
            with jax.default_matmul_precision("highest"):
                away = encoder.compare(folder, images, clock.ask(worker, "check"))
            lines = [
                f"{how} {dtype} {batch}"
                for how in ("torch", "compiled")
                for dtype in ("float32", "bfloat16")
                for batch in batches
            ]
            rows = rates(worker, lines, end, place=2)
            return {"size": size, "difference": away, "rows": rows}
        finally:
            clock.end(worker)


def episodes(python: str, size: str, tasks: tuple[int, ...], end: float) -> dict:
    """Episodes/s by tasks and mode; loss and gradient of the context must agree with ours."""
    work = workload.build(size, 4, 4)
    with tempfile.TemporaryDirectory() as name:
        np.savez(Path(name) / "work.npz", **arrays(work))
        worker = clock.worker([python, str(HERE / "torch_maml.py"), f"{name}/work.npz"])
        try:
            result = compare(work, clock.ask(worker, "check"))
            lines = [f"{count} eager" for count in tasks]
            lines += [f"{tasks[len(tasks) // 2]} compiled"]  # each count compiles anew, for minutes
            return result | {"size": size, "rows": rates(worker, lines, end, place=0)}
        finally:
            clock.end(worker)


def rates(worker, lines: list[str], end: float, place: int) -> list[dict]:
    """Per second: the best of three calls after one; `place` of the count in a line.

    Nothing begins after `end`, and what still compiles half a minute later is given up.
    """
    rows: list[dict] = []
    timer = threading.Timer(max(0, end - time.monotonic()) + 30, worker.kill)
    timer.daemon = True
    timer.start()
    for line in lines:
        try:
            if time.monotonic() > end:
                raise RuntimeError("the time was over")
            seconds = []
            for _ in range(4):
                answer = clock.ask(worker, line)
                if isinstance(answer, dict):
                    raise RuntimeError(answer["error"])
                seconds.append(answer)
            rate = int(line.split()[place]) / min(seconds[1:])
            rows.append({"what": line, "per_second": rate})
        except (RuntimeError, OSError) as error:
            rows.append({"what": line, "error": str(error)})
        print(rows[-1], flush=True)
    timer.cancel()
    return rows


def arrays(work: workload.Work) -> dict[str, np.ndarray]:
    """What torch_maml.py reads: the same weights, prompts and tokens by path."""
    words, text = work.design.prompts, work.design.text_encoder
    stop = length(words.eos, text, work.design.causal)
    flat = {"heads": text.heads, "depth": text.depth, "eos": words.eos, "label": words.label}
    flat |= {"ids": words.ids[:, :stop], "slots": words.slots[:, :stop]}
    for prefix, tree in (("text", work.frozen["text"]), ("params", work.params)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            flat[f"{prefix}/{name.removeprefix('text_model/')}"] = leaf
    del flat["params/offset"]  # no part of the softmax form
    for name in ("support", "query"):
        side = jax.device_get(getattr(work.episodes, name))
        flat[f"{name}/mask"] = side.mask[:, 0]
        flat |= {f"{name}/level{i}": x[:, 0] for i, x in enumerate(side.features.levels)}
    return {name: np.asarray(x) for name, x in flat.items()}


def compare(work: workload.Work, theirs: dict) -> dict:
    """RuntimeError unless both compute the same: their times are worth comparing only then."""
    loss = functools.partial(model.loss, design=work.design, weights=workload.WEIGHTS)
    inner = training_step.Learner("maml", 1, workload.RATE).inner(1)
    objective = training_step.meta_objective(loss, inner)
    batch = jax.tree.map(lambda x: x[:, 0], work.episodes)
    with jax.default_matmul_precision("highest"):
        call = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (value, _), slopes = call(work.params, work.frozen, batch, jax.random.key(0))
    ours, other = np.asarray(slopes["context"]).ravel(), np.array(theirs["gradient"])
    result = {
        "losses": [float(value), theirs["loss"]],
        "difference": float(np.linalg.norm(ours - other) / np.linalg.norm(other)),
    }
    if result["difference"] > 1e-2 or abs(value - theirs["loss"]) > 1e-3 * abs(value):
        raise RuntimeError(f"the two do not compute the same: {result}")
    return result
