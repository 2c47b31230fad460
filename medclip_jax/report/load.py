"""What a finished run left in its workdir, read and checked for the report."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medclip_jax.errors import WorkdirError
from medclip_jax.explain.boxes import boxes_of
from medclip_jax.report import gallery, viewer
from medclip_jax.training.metrics_log import read_steps


class Files(NamedTuple):
    """What a workdir holds, read and checked."""

    config: dict[str, Any]
    steps: list[dict[str, Any]]
    split: dict[str, Any]
    metrics: dict[str, Any]
    predictions: dict[str, np.ndarray]  # id, label, score, p_value, uncertainty: all of length n
    places: list[int]  # of each panel's image in the predictions
    panels: list[gallery.Panel]
    pictures: list[dict[str, Any] | None]  # see viewer; empty if none was kept


def read(workdir: Path) -> Files:
    """The files of a workdir. Raises WorkdirError naming the first that is missing or spoilt."""
    config = _load(workdir, "config.json", "train", _json)
    steps = _load(workdir, "metrics.jsonl", "train", read_steps)
    split = _load(workdir, "split.json", "train", _split)
    keys = ("dataset", "k", "seed", "split", "method", "backbone", "image")
    metrics = _load(workdir, "metrics.json", "evaluate", lambda path: _json(path, *keys))
    predictions = _load(workdir, "predictions.npz", "evaluate", _predictions)
    index, panels = _load(
        workdir, "predictions.npz", "evaluate", lambda path: _panels(path, predictions)
    )
    pictures = _load(
        workdir, "predictions.npz", "evaluate", lambda path: _pictures(path, len(predictions["id"]))
    )
    return Files(config, steps, split, metrics, predictions, index, panels, pictures)


def _load(workdir: Path, name: str, command: str, parse: Callable[[Path], Any]) -> Any:
    path = workdir / name
    try:
        return parse(path)
    except FileNotFoundError as error:
        raise WorkdirError(
            f"{path} is missing: run `{command}` with this workdir before `report`."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise WorkdirError(
            f"{path} cannot be used ({error}): run `{command}` with this workdir again."
        ) from error


def _split(path: Path) -> dict[str, Any]:
    split = _json(path, "support", "test")
    for row in (*split["support"], *split["test"]):
        row["id"], row["sha256"]  # a KeyError names what is absent
    return split


def _json(path: Path, *keys: str) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    absent = [key for key in keys if key not in value]
    if absent:
        raise ValueError(f"{absent[0]!r} is not in it")
    return value


def _predictions(path: Path) -> dict[str, np.ndarray]:
    # the maps stay on disk: the report never needs them all
    with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in ("id", "label", "score", "p_value", "uncertainty")}
    if len({column.shape for column in columns.values()}) != 1 or columns["id"].ndim != 1:
        raise ValueError("its columns are not of one length")
    for name in ("score", "p_value", "uncertainty"):
        columns[name] = columns[name].astype(np.float64)
    if not np.isfinite(columns["score"]).all():
        raise ValueError("some scores are not finite")
    return columns


def _pictures(path: Path, n: int) -> list[dict[str, Any] | None]:
    with np.load(path, allow_pickle=False) as file:
        held = {name: file[name] for name in file.files if name.startswith(("thumb", "frame"))}
    return viewer.pictures(held, n)


def _panels(
    path: Path, predictions: Mapping[str, np.ndarray]
) -> tuple[list[int], list[gallery.Panel]]:
    with np.load(path, allow_pickle=False) as file:
        index = [int(i) for i in file["gallery_index"]]
        if any(not 0 <= i < len(predictions["id"]) for i in index):
            raise ValueError("its gallery shows an image that it does not hold")
        panels = []
        for row, i in enumerate(index):
            image = file[f"gallery_image_{row}"]
            map = file[f"gallery_map_{row}"].astype(np.float32)
            name = f"gallery_mask_{row}"
            mask = file[name] if name in file else None
            if any(a is not None and a.shape != image.shape for a in (map, mask)):
                raise ValueError(f"image, map and mask of row {row} are not of one shape")
            kind = "abnormal" if predictions["label"][i] else "healthy"
            score, p_value = predictions["score"][i], predictions["p_value"][i]
            panels.append(
                gallery.Panel(
                    f"{row + 1}\n{kind}\nscore {score:.3f}\n{_p(p_value)}",
                    image,
                    map,
                    mask,
                    tuple(boxes_of(map)),
                )
            )
    return index, panels


def _p(value: float) -> str:
    return "p undefined" if np.isnan(value) else f"p {value:.3f}"
