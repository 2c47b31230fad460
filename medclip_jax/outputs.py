"""What prediction leaves for one item: JSON, overlay, map; the tables over all items.

All names come from inputs.safe_name; every file appears whole or not at all, the JSON last, so an
item with a JSON is finished. Boxes are in the image's own pixels and, where it has a spacing, mm.
"""

import csv
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Float, UInt8

from medclip_jax import dicom_objects, evaluate, explain, files, nifti_maps
from medclip_jax.data import readers
from medclip_jax.inputs import Item
from medclip_jax.trained import Scores

COLUMNS = (
    *("source", "frame", "score", "p_value", "alarm", "uncertainty", "boxes"),
    *("row0", "col0", "row1", "col1", "height_mm", "width_mm", "height", "width", "result"),
)
SIDE = 1024  # pixels of an overlay's longer side at most
MOST_BOXES = 10  # of one frame
SPECK = 2000  # a box holds at least one pixel in this many of its image
BOX = (230, 159, 0)  # orange of Okabe and Ito
BELOW = float(np.nextafter(np.float32(0.5), np.float32(0)))  # maps say "at least", boxes "above"
STALE = 86400  # seconds
HEAT = 0.45  # weight of the heat in an overlay


class Result(NamedTuple):
    """One item, scored."""

    key: str
    sha256: str
    pixels: UInt8[np.ndarray, "f h w"]
    spacing: tuple[float, float] | None  # mm (row, column)
    meta: dict[str, str]
    scores: Scores  # maps as float16
    fit: str
    model: dict[str, Any]


def write(output: Path, item: Item, result: Result, pseudonymise: bool) -> list[dict[str, Any]]:
    """Write all files of one item; returns its rows of the table, one per frame.

    Raises WorkdirError if the disk refuses them.
    """
    height, width = result.pixels.shape[1:]
    frames = [_frame(result, i) for i in range(len(result.pixels))]
    top = int(np.argmax(result.scores.score))
    heat = frame_map(result, top)
    picture = overlay(result.pixels[top], heat, frames[top]["boxes"])
    left = {"overlay": (f"{item.output}.overlay.png", png(picture))}
    notes: list[str] = []
    if item.kind == "nifti":
        name = f"{item.output}.map.nii.gz"
        nifti_maps.write(
            output / name, Path(item.paths[0]), len(frames), partial(frame_map, result)
        )
        left["map"] = (name, None)
    elif len(frames) == 1:
        left["map"] = (f"{item.output}.map.png", png(sixteen_bits(heat)))
    else:
        left["map"] = (f"{item.output}.map.npz", _compressed(result.scores.maps))
    if item.kind == "dicom":
        made = dicom_objects.build(
            item.paths,
            result.key,
            lambda i: frame_map(result, i) >= 0.5,
            len(frames),
            picture,
            top,
            pseudonymise,
        )
        notes += made.notes
        left |= {name: (f"{item.output}.{name}.dcm", raw) for name, raw in made.files.items()}
    for name, raw in left.values():
        if raw is not None:
            files.write_bytes(output / name, raw)
    page = {
        "source": item.output if pseudonymise else item.source,
        "files_read": len(item.paths),
        "sha256": result.sha256,
        "key": result.key,
        "kind": item.kind,
        "meta": result.meta,
        "height": height,
        "width": width,
        "spacing_mm": result.spacing,
        "model": result.model,
        "score": float(result.scores.score[top]),
        "top_frame": top,
        "alarms": int(result.scores.alarm.sum()),
        "frames": frames,
        "files": {what: name for what, (name, _) in left.items()},
        "notes": notes,
        "warning": "Research software. Not a medical device; this is not a diagnosis.",
    }
    files.write_json(output / f"{item.output}.json", page)
    return rows(page, item)


def finished(output: Path, item: Item, key: str) -> list[dict[str, Any]] | None:
    """The rows of a finished item of the same key; None if it has to be made."""
    path = output / f"{item.output}.json"
    try:
        page = json.loads(path.read_bytes())
        if page["key"] != key:
            return None
        names = page["files"].values()
        if not all((output / os.path.basename(name)).is_file() for name in names):
            return None
        return rows(page, item)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or no result of ours: it is made


def rows(page: dict[str, Any], item: Item) -> list[dict[str, Any]]:
    """One row of the table per frame, with its first box."""
    found = []
    for frame in page["frames"]:
        first = frame["boxes"][0] if frame["boxes"] else {}
        held = {name: first.get(name) for name in COLUMNS if name in first}
        held |= {name: frame[name] for name in ("frame", "score", "p_value", "uncertainty")}
        held["score"] = frame["score"]  # not the box's
        held |= {"alarm": int(frame["alarm"]), "boxes": len(frame["boxes"])}
        held |= {"height": page["height"], "width": page["width"]}
        found.append(held | {"source": page["source"], "result": f"{item.output}.json"})
    return found


@contextmanager
def tables(path: Path) -> Iterator[Callable[[Item, list[dict], str], None]]:
    """results.csv and unreadable.csv, filled item by item; they appear when all is done."""
    bad = path.with_name(unreadable_name(path.name))
    parts = [p.with_name(f".{p.name}.{os.getpid()}.tmp") for p in (path, bad)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parts[0].open("w", newline="") as one, parts[1].open("w", newline="") as two:
            good = csv.DictWriter(one, COLUMNS)
            listed = csv.DictWriter(two, ("source", "reason"))
            good.writeheader()
            listed.writeheader()

            def tell(item: Item, found: list[dict[str, Any]], error: str) -> None:
                good.writerows(found)
                if error:
                    listed.writerow({"source": item.source, "reason": error})

            yield tell
        for part, whole in zip(parts, (path, bad), strict=True):
            os.replace(part, whole)
    except OSError as error:
        raise files.cannot_write(path, error) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def sweep(folder: Path) -> int:
    """Delete temporary files that killed processes left in an output folder; returns how many.

    Only those of `files` and `tables`, a day old: younger ones may be another process's.
    """
    old = time.time() - STALE
    found = [p for p in folder.glob(".*.tmp") if re.fullmatch(r"\..+\.\d+\.tmp", p.name)]
    left = [p for p in found if p.is_file() and not p.is_symlink() and p.stat().st_mtime < old]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def unreadable_name(table: str) -> str:
    return table.replace("results", "unreadable", 1)


def read_table(path: Path, most: int) -> list[dict[str, str]]:
    """The first rows of a table."""
    with path.open(newline="") as file:
        return [row for row, _ in zip(csv.DictReader(file), range(most), strict=False)]


def frame_map(result: Result, i: int) -> Float[np.ndarray, "h w"]:
    """The map of one frame in the image's own frame, [0, 1]; 0.5 is the pixel threshold."""
    heat = result.scores.maps[i].astype(np.float32)
    return readers.to_frame(heat, *result.pixels.shape[1:], result.fit)


def half(maps: Float[np.ndarray, "n s s"]) -> Float[np.ndarray, "n s s"]:
    """Maps as float16 with every decision kept."""
    return evaluate.half_precision(maps)


def sixteen_bits(heat: Float[np.ndarray, "h w"]) -> np.ndarray:
    """[0, 1] -> 0 to 65535, so that 32768 or more is exactly what is at least 0.5."""
    return np.minimum(heat * 65536.0, 65535).astype(np.uint16)


def overlay(
    pixels: UInt8[np.ndarray, "h w"], heat: Float[np.ndarray, "h w"], boxes: list[dict]
) -> UInt8[np.ndarray, "a b 3"]:
    """The image in grey with the map in colour and the boxes; nothing else is drawn on it."""
    height, width = pixels.shape
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey = np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BOX))
    warm = np.asarray(PIL.Image.fromarray(heat).resize(size, PIL.Image.Resampling.BILINEAR))
    colour = _palette()[np.clip(warm * 255, 0, 255).astype(np.uint8)]
    mixed = (1 - HEAT) * grey[..., None] + HEAT * colour
    picture = PIL.Image.fromarray(mixed.astype(np.uint8))
    pen = PIL.ImageDraw.Draw(picture)
    for box in boxes:
        corners = [box["col0"], box["row0"], box["col1"] - 1, box["row1"] - 1]
        pen.rectangle([round(v * scale) for v in corners], outline=BOX, width=2)
    return np.asarray(picture)


def png(pixels: np.ndarray) -> bytes:
    held = io.BytesIO()
    PIL.Image.fromarray(pixels).save(held, "PNG", compress_level=1)
    return held.getvalue()


@cache
def _palette() -> UInt8[np.ndarray, "256 3"]:
    import matplotlib

    return (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)


def _frame(result: Result, i: int) -> dict[str, Any]:
    heat, scores = frame_map(result, i), result.scores
    least = max(1, heat.size // SPECK)
    found = explain.boxes(
        heat, float(np.nextafter(np.float32(0.5), 0)), min_area=least, n=MOST_BOXES
    )
    return {
        "frame": i,
        "score": float(scores.score[i]),
        "p_value": float(scores.p_value[i]),
        "alarm": bool(scores.alarm[i]),
        "uncertainty": float(scores.uncertainty[i]),
        "boxes": [_box(box, result.spacing) for box in found],
    }


def _box(box: explain.Box, spacing: tuple[float, float] | None) -> dict[str, Any]:
    held = {name: getattr(box, name) for name in ("row0", "col0", "row1", "col1", "score")}
    held["area_pixels"] = box.area
    if spacing is not None:
        row, column = spacing
        held["height_mm"] = (box.row1 - box.row0) * row
        held["width_mm"] = (box.col1 - box.col0) * column
        held["area_mm2"] = box.area * row * column
    return held


def _compressed(maps: np.ndarray) -> bytes:
    held = io.BytesIO()
    np.savez_compressed(held, maps=maps)
    return held.getvalue()
