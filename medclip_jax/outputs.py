"""What prediction leaves for one item: JSON, overlay, map; the tables over all items.

All names come from inputs.safe_name; every file appears whole or not at all, the JSON last, so an
item with a JSON is finished. Boxes are in the image's own pixels and, where it has a spacing, mm.
"""

import csv
import io
import json
import os
import re
import stat
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8, UInt16

from medclip_jax import dicom_objects, files, marks, nifti_maps, overlay, png
from medclip_jax.inputs import Item
from medclip_jax.marks import Marks

COLUMNS = (
    *("source", "frame", "score", "p_value", "alarm", "uncertainty", "boxes"),
    *("row0", "col0", "row1", "col1", "height_mm", "width_mm", "height", "width", "result"),
)
STALE = 86400  # seconds


class Result(NamedTuple):
    """One item, scored."""

    key: str
    sha256: str
    pixels: UInt8[np.ndarray, "f h w"]
    spacing: tuple[float, float] | None  # mm (row, column)
    meta: dict[str, str]
    marks: Sequence[Marks]  # of all frames, in order
    codes: UInt16[np.ndarray, "f h w"]  # maps, as `marks` codes them
    fit: str
    model: dict[str, Any]


def write(output: Path, item: Item, result: Result, pseudonymise: bool) -> list[dict[str, Any]]:
    """Write all files of one item; returns its rows of the table, one per frame.

    Raises WorkdirError if the disk refuses them.
    """
    height, width = result.pixels.shape[1:]
    frames = [frame for part in result.marks for frame in part.frames]
    score, alarm = (
        np.concatenate([getattr(part.scores, name) for part in result.marks])
        for name in ("score", "alarm")
    )
    top = int(np.argmax(score))
    heat = _heat(result, top)
    picture = overlay.draw(result.pixels[top], heat, frames[top]["boxes"])
    left = {"overlay": (f"{item.output}.overlay.png", png.encode(picture))}
    notes: list[str] = []
    if item.kind == "nifti":
        name = f"{item.output}.map.nii.gz"
        nifti_maps.write(output / name, Path(item.paths[0]), result.codes)
        left["map"] = (name, None)
    elif len(frames) == 1:
        left["map"] = (f"{item.output}.map.png", png.encode(result.codes[0]))
    else:
        left["map"] = (f"{item.output}.map.npz", _compressed(result.marks))
    if item.kind == "dicom":
        made = dicom_objects.build(
            item.paths,
            result.key,
            result.codes >= marks.HALF,
            picture,
            top,
            pseudonymise,
        )
        notes += made.notes
        left |= {name: (f"{item.output}.{name}.dcm", raw) for name, raw in made.files.items()}
    for name, raw in left.values():
        if raw is not None:
            files.write_bytes(output / name, raw, durable=False)  # `finished` looks at sizes
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
        "score": float(score[top]),
        "top_frame": top,
        "alarms": int(alarm.sum()),
        "frames": frames,
        "files": {what: name for what, (name, _) in left.items()},
        "bytes": {what: (output / name).stat().st_size for what, (name, _) in left.items()},
        "notes": notes,
        "warning": "Research software. Not a medical device; this is not a diagnosis.",
    }
    files.write_json(output / f"{item.output}.json", page, durable=False)
    return rows(page, item)


def finished(output: Path, item: Item, key: str) -> list[dict[str, Any]] | None:
    """The rows of a finished item of the same key; None if it has to be made."""
    path = output / f"{item.output}.json"
    try:
        page = json.loads(path.read_bytes())
        if page["key"] != key:
            return None
        for what, name in page["files"].items():
            held = os.stat(output / os.path.basename(name))
            if not stat.S_ISREG(held.st_mode) or held.st_size != page["bytes"][what]:
                return None  # cut short by a power cut, or not ours
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


def _heat(result: Result, frame: int) -> Float[np.ndarray, "h w"]:
    """The map of one frame in the image's own frame."""
    for part in result.marks:
        if frame < len(part.frames):
            break
        frame -= len(part.frames)
    if part.heat is not None:
        return part.heat
    return marks.frame_map(part.scores.maps[frame], result.pixels.shape[1:], result.fit)


def _compressed(parts: Sequence[Marks]) -> bytes:
    """An npz file; as numpy's own, but deflated at the fastest level."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open(zipfile.ZipInfo("maps.npy"), "w") as member:
            np.lib.format.write_array(member, np.concatenate([p.scores.maps for p in parts]))
    return held.getvalue()
