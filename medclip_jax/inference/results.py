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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8, UInt16

from medclip_jax import files
from medclip_jax.explain import grad_cam
from medclip_jax.inference import image_results
from medclip_jax.inference.image_results import Marks
from medclip_jax.inference.inputs import Item
from medclip_jax.io import dicom_write, nifti_write, overlay, read
from medclip_jax.io.pillow import encode_png

COLUMNS = (
    *("source", "frame", "score", "p_value", "alarm", "uncertainty", "boxes"),
    *("row0", "col0", "row1", "col1", "height_mm", "width_mm", "height", "width", "result"),
)
STALE = 86400  # seconds
CAM_SIDE = 256  # pixels of the square that Grad-CAM is brought to before the image's frame


class Result(NamedTuple):
    """One item, scored."""

    key: str
    sha256: str
    pixels: UInt8[np.ndarray, "f h w"]
    spacing: tuple[float, float] | None  # mm (row, column)
    meta: dict[str, str]
    marks: Sequence[Marks]  # of all frames, in order
    codes: UInt16[np.ndarray, "f h w"]  # maps, as `marks` codes them
    fit: read.Mode
    model: dict[str, Any]


def write(
    output: Path,
    item: Item,
    result: Result,
    pseudonymise: bool,
    build: dicom_write.Build = dicom_write.build,
) -> list[dict[str, Any]]:
    """Write all files of one item; returns its rows of the table, one per frame.

    build: as dicom_write.build, wherever it runs.
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
    cam = _cam(result, top)
    left, notes = _write_files(output, item, result, picture, cam, top, pseudonymise, build)
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
        "files": left,
        "bytes": {what: (output / name).stat().st_size for what, name in left.items()},
        "notes": notes,
        "warning": "Research software. Not a medical device; this is not a diagnosis.",
    }
    files.write_json(output / f"{item.output}.json", page, durable=False)
    return rows(page, item)


def _write_files(
    output: Path,
    item: Item,
    result: Result,
    picture: np.ndarray,
    cam: np.ndarray | None,
    top: int,
    pseudonymise: bool,
    build: dicom_write.Build,
) -> tuple[dict[str, str], list[str]]:
    """Names of what was written for an item beside its JSON, and why something is missing.

    picture: the overlay of frame `top`; cam: its Grad-CAM, None where it is not wanted.
    """
    made: dict[str, bytes] = {"overlay.png": encode_png(picture)}
    made |= {} if cam is None else {"cam.png": encode_png(cam)}
    left, notes = {}, []
    if item.kind == "nifti":
        left["map"] = f"{item.output}.map.nii.gz"
        nifti_write.write(output / left["map"], Path(item.paths[0]), result.codes)
    elif len(result.codes) == 1:
        made["map.png"] = encode_png(result.codes[0])
    else:
        made["map.npz"] = _compressed(result.marks)
    if item.kind == "dicom":
        marked = result.codes >= image_results.HALF
        objects = build(item.paths, result.key, marked, picture, top, pseudonymise)
        made |= {f"{name}.dcm": raw for name, raw in objects.files.items()}
        notes = objects.notes
    for name, raw in made.items():
        left[name.partition(".")[0]] = f"{item.output}.{name}"
        files.write_bytes(output / f"{item.output}.{name}", raw, durable=False)
    return left, notes


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
            with suppress(OSError):  # also where there is no such folder
                part.unlink()


def sweep(folder: Path) -> int:
    """Delete temporary files that killed processes left in an output folder; returns how many.

    Only those of `files` and `tables` that are a day old and name no process of this machine: the
    others may be written at this moment, also where a clock jumped.
    """
    old, left = time.time() - STALE, 0
    for path in folder.glob(".*.tmp"):
        named = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if named is None or path.is_symlink() or not path.is_file():
            continue
        with suppress(FileNotFoundError):  # its process, or another sweep, was faster
            if path.stat().st_mtime < old and not Path("/proc", named[1]).exists():
                path.unlink()
                left += 1
    return left


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
    return image_results.frame_map(part.scores.maps[frame], result.pixels.shape[1:], result.fit)


def _cam(result: Result, frame: int) -> UInt8[np.ndarray, "a b 3"] | None:
    """One frame under its Grad-CAM."""
    cams = [part.cams for part in result.marks if part.cams is not None and part.cams.size]
    if not cams:
        return None
    square = grad_cam.to_square(np.concatenate(cams)[frame : frame + 1], CAM_SIDE)[0]
    pixels = result.pixels[frame]
    return overlay.draw(pixels, read.to_frame(square, *pixels.shape, result.fit), [])


def _compressed(parts: Sequence[Marks]) -> bytes:
    """An npz file; as numpy's own, but deflated at the fastest level."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open(zipfile.ZipInfo("maps.npy"), "w") as member:
            np.lib.format.write_array(member, np.concatenate([p.scores.maps for p in parts]))
    return held.getvalue()
