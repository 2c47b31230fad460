"""A workdir as train and evaluate leave it, made up, for the tests of the report."""

import json

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from medclip_jax import stored, workdir
from medclip_jax.evaluation import predictions
from medclip_jax.explain.boxes import boxes_of
from medclip_jax.report import load

EMPTY = 15  # image whose Grad-CAM is empty; every second image has none
EVIL = "benign/<script>alert(1)</script> & $x_1$.png"


def image_with_lesion(rng, h, w, abnormal):
    """A grey speckle image, its mask and a map that marks the lesion."""
    y, x = np.mgrid[:h, :w]
    blob = np.exp(-(((y - h * 0.4) / (h * 0.12)) ** 2 + ((x - w * 0.6) / (w * 0.15)) ** 2))
    noise = rng.normal(0, 0.08, (h, w))
    image = np.clip(0.35 + 0.25 * np.sin(x / w * 3) + noise - 0.3 * blob * abnormal, 0, 1)
    map = np.clip(0.2 + 0.03 * rng.normal(size=(h, w)) + 0.6 * blob * abnormal, 0, 1)
    mask = (blob > 0.5) & bool(abnormal)
    return (image * 255).astype(np.uint8), map.astype(np.float16), mask.astype(np.uint8)


def small_copies(rng, label):
    """As predictions.pack leaves them, from images in memory."""
    files, frames, boxes, ends = [], [], [], []
    for i, y in enumerate(label):
        image, map, mask = image_with_lesion(rng, *((90, 120), (120, 80), (100, 100))[i % 3], y)
        heat = map.astype(np.float32)
        grey = predictions.grey(heat)
        frames.append(image.shape)
        boxes += boxes_of(heat)
        ends.append(len(boxes))
        lesion = predictions.small(Image.fromarray(mask * 255), "PNG") if y else b""
        image = predictions.small(Image.fromarray(image), "JPEG")
        cam = predictions.grey(heat * (i != EMPTY)) if i % 2 else b""
        files.append(predictions.Copies(image, lesion, grey, cam, grey))
    arrays = {"frame": np.array(frames), "thumb_index": np.arange(len(label))}
    arrays |= {"boxes": np.array(boxes, np.float64).reshape(-1, 6), "boxes_end": np.array(ends)}
    for name in predictions.Copies._fields:
        arrays |= predictions.joined(name, [getattr(copies, name) for copies in files])
    return arrays | {"deviation_scale": 0.0625}


def write_arrays(folder, rng, label, score):
    n = len(label)
    k = 16
    calibration = rng.normal(0.4, 0.08, k)
    p_value = (1 + (calibration[None] >= score[:, None]).sum(1)) / (k + 1)
    ids = np.array([f"test/{i:04d}.png" for i in range(n)], dtype="U80")
    ids[0] = EVIL
    np.savez(
        folder / "predictions.npz",
        id=ids,
        label=label,
        score=score.astype(np.float32),
        p_value=p_value.astype(np.float32),
        uncertainty=np.abs(0.1 - np.abs(score - 0.5) / 5) + rng.uniform(0, 0.02, n),
        maps=np.zeros((n, 4, 4), np.float16),
        **small_copies(rng, label),
    )
    return ids


def metrics_of(label, score):
    """Numbers as evaluate would write them; the report must print them, never recompute them."""
    both = len(set(label)) == 2
    image = {"auroc": roc_auc_score(label, score) if both else None, "auprc": 0.87654321}
    image |= {"accuracy": 0.8125, "precision": 0.9, "recall": 0.75, "f1": 0.81818, "mcc": None}
    image |= {"specificity": 0.875, "fpr": 0.125, "tpr": 0.75, "threshold": 0.5}
    pixel = {"auroc": 0.93217, "dice": 0.4321, "iou": 0.2756, "hausdorff": 31.25, "tp": 12345}
    pixel |= {"hausdorff95": None, "aupro": 0.70007}
    return {
        "dataset": "phantom",
        "k": 16,
        "seed": 3,
        "split": "clean",
        "method": "maml",
        "backbone": "compact",
        "image": image,
        "pixel": pixel,
        "intervals": {"image": {"recall": [0.61234, 0.85]}, "pixel": {"dice": [0.41, 0.4567]}},
        "calibration": {
            "alpha_requested": 0.05,
            "alpha_attained": 1 / 17,
            "k": 16,
            "false_alarm_rate": 0.0833,
            "message": "With K = 16 the smallest level is 0.059, not 0.050 <b>.",
        },
        "explanations": {
            "pointing": {
                "map": {"hit": 0.7125, "chance": 0.1234, "n": 36, "empty": 0},
                "grad_cam": {"hit": 0.5625, "chance": 0.1234, "n": 36, "empty": 2},
            },
            "spearman": 0.8123,
            "deletion": {
                "share": [0, 0.5, 1],
                "map": [0.9, 0.3, 0.2],
                "grad_cam": [0.9, 0.4, 0.2],
                "random": [0.9, 0.6, 0.2],
            },
            "randomised": {"all_blocks": {"map": 0.0321, "grad_cam": None}},
        },
        "timing": {"encode": 12.5, "train": 61.25, "score_test": 3.0},
        "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
    }


def make_workdir(folder, *, n=60, label=None):
    """A workdir as train and evaluate leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    label = (np.arange(n) % 5 > 1).astype(np.int32) if label is None else label
    score = np.clip(rng.normal(0.42 + 0.2 * label, 0.1), 0.01, 0.99)
    ids = write_arrays(folder, rng, label, score)
    rows = [
        {"step": s, "loss": 5 * np.exp(-s / 60) + 0.5, "focal": 1 / (1 + s), "dice": 0.9 - s / 500}
        for s in range(0, 200, 10)
    ]
    for row in rows[::5]:
        row |= {"held_out_accuracy": 0.5 + row["step"] / 500, "held_out_auroc": 0.8}
    rows[7] |= {"dice": None, "nonfinite": ["dice"]}
    lines = [json.dumps({**row, "seconds": 0.1 * row["step"]}) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    support = [
        {"id": f"train/<i>{i}</i>.png", "sha256": f"{i:064x}", "label": 0} for i in range(16)
    ]
    test = [
        {"id": str(i), "sha256": "0" * 64, "label": int(y)} for i, y in zip(ids, label, strict=True)
    ]
    split = {"dataset": "phantom", "k": 16, "seed": 3, "kind": "clean", "support": support}
    (folder / "split.json").write_text(json.dumps({**split, "test": test}))
    (folder / "metrics.json").write_text(json.dumps(metrics_of(label, score)))
    config = {"data": {"name": "phantom", "k": 16}, "clip": {"layers": [3, 6]}, "note": "<script>"}
    config["explanation"] = {"method": "grad_cam", "layer": -1}
    (folder / "config.json").write_text(json.dumps(config))
    return seal(folder)


def seal(folder):
    """metrics.json as of a finished run that left the files as they are now."""
    for name in stored.RESULTS:
        (folder / name).touch()
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text()) | {"finished": workdir.seal(folder, "0" * 16)}
    path.write_text(json.dumps(stored.sealed(metrics)))
    return folder


def edit(folder, **changes):
    path = folder / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    seal(folder)


def keep_pictures(folder, rows):
    """Leave the small copies of some images alone, as of a test set that has too many."""
    path = folder / "predictions.npz"
    with np.load(path) as saved:
        arrays = {name: saved[name] for name in saved.files}
    for name in predictions.Copies._fields:
        files = load.unpack(arrays, name)
        arrays |= predictions.joined(name, [files[i] for i in rows])
    boxes = np.split(arrays["boxes"], arrays["boxes_end"][:-1])
    arrays["boxes"] = np.concatenate([boxes[i] for i in rows])
    arrays["boxes_end"] = np.cumsum([len(boxes[i]) for i in rows])
    np.savez(path, **{**arrays, "frame": arrays["frame"][rows], "thumb_index": np.array(rows)})
    seal(folder)
