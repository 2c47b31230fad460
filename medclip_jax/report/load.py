"""What a finished run left in its workdir, read and checked for the report."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medclip_jax import config, files, stored
from medclip_jax.errors import WorkdirError, one_line, printable
from medclip_jax.explain.boxes import Box

MOST_BYTES, MOST_ARRAY = 1 << 36, 1 << 28  # of predictions.npz and of an array that is read of it
COLUMNS = ("id", "label", "score", "p_value", "uncertainty")
FILES = {  # of a Picture -> of predictions.npz
    "image": "thumb",
    "map": "thumb_map",
    "mask": "thumb_mask",
    "cam": "thumb_cam",
    "deviation": "thumb_deviation",
}


class Picture(NamedTuple):
    """Small copies of a test image, PNG or JPEG; b"" where there is none."""

    image: bytes
    map: bytes  # grey level / 256 is the unit score
    mask: bytes
    cam: bytes
    deviation: bytes  # grey level 255 is the largest of the test set
    frame: tuple[int, int]  # rows and columns of the original
    boxes: list[Box]  # in the original


class Files(NamedTuple):
    """Contents of a workdir."""

    config: dict[str, Any]
    steps: list[dict[str, Any]]
    split: dict[str, Any]
    metrics: dict[str, Any]
    predictions: dict[str, np.ndarray]  # COLUMNS, all of length n
    pictures: list[Picture | None]  # one per image; empty if the run left none
    deviation_scale: float | None  # of Picture.deviation: what its grey level 255 stands for


def read(workdir: Path) -> Files:
    """The files of a workdir.

    Raises:
        WorkdirError: names the first that is missing or corrupt.
    """
    config = _load(workdir, "config.json", "train", _json)
    steps = _load(workdir, "metrics.jsonl", "train", files.read_steps)
    split = _load(workdir, "split.json", "train", _split)
    keys = ("dataset", "k", "seed", "split", "method", "backbone", "image")
    metrics = _load(workdir, "metrics.json", "evaluate", lambda path: _json(path, *keys))
    _check(workdir, metrics)
    predictions = _load(workdir, "predictions.npz", "evaluate", _predictions)
    return Files(config, steps, split, metrics, *predictions)


def _check(workdir: Path, metrics: dict[str, Any]) -> None:
    """Raise WorkdirError unless all files are those of the run that metrics.json is of."""
    path = workdir / "metrics.json"
    try:
        stored.check_seal(metrics)
        settings = config.comparable(stored.read_json(workdir / "config.json"))
        stored.check(metrics["finished"], stored.FINISHED, "finished.")
        path = workdir / "config.json"
        if stored.digest(settings) != metrics["finished"]["config"]:
            raise ValueError("it is not that of the finished run")
        for name in ("split.json", "metrics.jsonl", "predictions.npz"):
            path = workdir / name
            if path.exists() and files.sha256_of(path) != metrics["finished"]["files"][name]:
                raise ValueError("it was changed since the run was finished")
    except (OSError, ValueError, KeyError) as error:
        raise WorkdirError(
            f"{path} cannot be used ({one_line(error)}): restore it, or run --mode evaluate with "
            "this workdir again"
        ) from None


def _load(workdir: Path, name: str, mode: str, parse: Callable[[Path], Any]) -> Any:
    path = workdir / name
    if not path.exists():
        raise WorkdirError(
            f"{path} is missing: run --mode {mode} with this workdir before --mode report"
        )
    try:
        return parse(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise WorkdirError(
            f"{path} cannot be used ({one_line(error)}): run --mode {mode} with this workdir again"
        ) from error


def _split(path: Path) -> dict[str, Any]:
    split = _json(path, "support", "test")
    for row in (*split["support"], *split["test"]):
        row["id"], row["sha256"] = printable(str(row["id"])), str(row["sha256"])
    return split


def _json(path: Path, *keys: str) -> dict[str, Any]:
    value = stored.read_json(path)
    absent = [key for key in keys if key not in value]
    if absent:
        raise ValueError(f"{absent[0]!r} is not in it")
    return value


def _predictions(path: Path) -> tuple[dict, list[Picture | None], float | None]:
    # the maps stay on disk: the report never needs them all
    small = ("thumb", "frame", "boxes", "deviation_scale")
    stored.check_file(path, MOST_BYTES)
    with path.open("rb", buffering=0) as file:
        arrays = stored.read_npz(
            file, MOST_ARRAY, lambda name: name in (*COLUMNS, "unit") or name.startswith(small)
        )
    columns = {
        name: arrays[name] for name in (*COLUMNS, "unit") if name != "unit" or name in arrays
    }
    columns["id"] = np.array([printable(str(name)) for name in columns["id"].ravel()])
    if len({column.shape for column in columns.values()}) != 1 or columns["id"].ndim != 1:
        raise ValueError("its columns are not of one length")
    for name in ("score", "p_value", "uncertainty"):
        columns[name] = columns[name].astype(np.float64)
    if not np.isfinite(columns["score"]).all():
        raise ValueError("some scores are not finite")
    scale = arrays.get("deviation_scale")
    rows = pictures(arrays, len(columns["id"]))
    return columns, rows, None if scale is None else float(scale)


def pictures(arrays: Mapping[str, np.ndarray], n: int) -> list[Picture | None]:
    """Of each of n images; None for those without small copies, no entry if there are none at all.

    Raises:
        ValueError: the arrays do not fit together.
    """
    if "frame" not in arrays:
        return []
    frames, index, boxes = arrays["frame"], arrays["thumb_index"], arrays["boxes"]
    files = {name: unpack(arrays, stored) for name, stored in FILES.items()}
    ends = arrays["boxes_end"]
    lengths = {len(frames), len(ends), *map(len, files.values())}
    if lengths != {len(index)} or not set(index.tolist()) <= set(range(n)):
        raise ValueError("its small copies are not one per image")
    rows: list[Picture | None] = [None] * n
    for place, i in enumerate(index):
        own = boxes[ends[place - 1] if place else 0 : ends[place]].tolist()
        copies = {name: files[name][place] for name in FILES}
        height, width = frames[place].tolist()
        each = [
            Box(int(top), int(left), int(bottom), int(right), score, int(area))
            for top, left, bottom, right, score, area in own
        ]
        rows[i] = Picture(**copies, frame=(height, width), boxes=each)
    return rows


def unpack(arrays: Mapping[str, np.ndarray], name: str) -> list[bytes]:
    """The files that were joined under `name`, b"" where there is none."""
    data, ends = arrays[name].tobytes(), arrays[f"{name}_end"].tolist()
    starts = [0, *ends[:-1]] if ends else []
    if any(a > b for a, b in zip(starts, ends, strict=True)) or ends[-1:] not in ([], [len(data)]):
        raise ValueError(f"the files of {name!r} are not where {name}_end says")
    return [data[a:b] for a, b in zip(starts, ends, strict=True)]
