"""What the files of a run or of a prediction say, without what may differ: times, deflation."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def of_run(workdir: Path) -> dict[str, object]:
    """Predictions and the saved detector as they are, metrics.json and the log without times."""
    metrics = json.loads((workdir / "metrics.json").read_text())
    for name in ("timing", "finished", "digest"):  # the last is of the others, too
        metrics.pop(name)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    with np.load(workdir / "predictions.npz", allow_pickle=False) as file:
        arrays = {name: (file[name].dtype.str, file[name].tobytes()) for name in file.files}
    scorer = (workdir / "scorer.safetensors").read_bytes()
    return {"metrics.json": metrics, "log": rows, "predictions": arrays, "scorer": scorer}


def of_prediction(folder: Path) -> dict[str, bytes]:
    """By file name; a killed writer's hidden temporary file does not count."""
    return {p.name: of_file(p) for p in folder.iterdir() if not p.name.startswith(".")}


def of_file(path: Path) -> bytes:
    """The same pixels may deflate to another number of bytes."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path)).tobytes()
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        values.pop("file_sha256"), values.pop("digest")
        return json.dumps(values).encode()
    return path.read_bytes()
