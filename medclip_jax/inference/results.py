"""What prediction leaves for one item: JSON, overlay, maps, DICOM objects.

All names come from inputs.safe_name; every file appears whole or not at all, the JSON last, so an
item with a JSON is finished. Boxes are in the image's own pixels and, where it has a spacing, mm.
Host values only, so that threads can do it while the encoder runs.
"""

import io
import json
import os
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8, UInt16

from medclip_jax import files
from medclip_jax.detectors import calibration
from medclip_jax.detectors.detector import BatchScores
from medclip_jax.explain import boxes
from medclip_jax.inference import tables
from medclip_jax.inference.inputs import Item
from medclip_jax.io import dicom_write, nifti, pillow, read, resize
from medclip_jax.io.pillow import encode_png

HALF = 32768  # the code of 0.5, where the pixel threshold lies
CAM_SIDE = 256  # pixels of the square that Grad-CAM is brought to before the image's frame


class Part(NamedTuple):
    """Results of neighbouring frames of one item."""

    frames: list[dict[str, Any]]  # of the JSON
    scores: BatchScores  # maps as float16
    heat: Float[np.ndarray, "h w"] | None  # the map of a single frame, in its own frame
    cams: Float[np.ndarray, "n p"] | None = None  # Grad-CAM; no column where it is not wanted


class Result(NamedTuple):
    """One item, scored."""

    key: str
    sha256: str
    pixels: UInt8[np.ndarray, "f h w"]
    spacing: tuple[float, float] | None  # mm (row, column)
    meta: dict[str, str]
    parts: Sequence[Part]  # of all frames, in order
    codes: UInt16[np.ndarray, "f h w"]  # maps, as `part` codes them
    fit: read.Mode
    model: dict[str, Any]


def part(
    scores: BatchScores,
    codes: UInt16[np.ndarray, "n h w"],
    first: int,
    spacing: tuple[float, float] | None,
    fit: read.Mode,
    cams: Float[np.ndarray, "n p"] | None = None,
) -> Part:
    """Results of n frames; `codes` is filled with their maps.

    Args:
        scores: of these frames.
        codes: of these frames, to be filled with 16-bit values of their maps.
        first: number of the first frame in its item.
        spacing: mm (row, column).
        fit: how the image was brought to the encoder frame.
        cams: Grad-CAM of the patches, if it is wanted.
    """
    scores = scores._replace(maps=calibration.half_precision(scores.maps))
    frames, heat = [], None
    for i, small in enumerate(scores.maps):
        heat = frame_map(small, codes.shape[1:], fit)
        codes[i] = sixteen_bits(heat)
        frames.append(_frame(scores, i, first + i, heat, spacing))
    return Part(frames, scores, heat if len(frames) == 1 else None, cams)


def frame_map(
    small: Float[np.ndarray, "s s"], shape: tuple[int, ...], fit: read.Mode
) -> Float[np.ndarray, "h w"]:
    """A map in the image's own frame (rows, columns), [0, 1]; 0.5 is the pixel threshold."""
    height, width = shape
    return read.to_frame(small.astype(np.float32), height, width, fit)


def sixteen_bits(heat: Float[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    """[0, 1] -> 0 to 65535, so that HALF or more is exactly what is at least 0.5."""
    return np.minimum(heat * np.float32(65536), 65535).astype(np.uint16)


def _frame(scores: BatchScores, i: int, number: int, heat, spacing) -> dict[str, Any]:
    return {
        "frame": number,
        "score": float(scores.score[i]),
        "p_value": float(scores.p_value[i]),
        "alarm": bool(scores.alarm[i]),
        "uncertainty": float(scores.uncertainty[i]),
        "patch_variance_mean": float(scores.patch_variance[i].mean()),
        "patch_variance_max": float(scores.patch_variance[i].max()),
        "boxes": [_box(box, spacing) for box in boxes.boxes_of(heat)],
    }


def _box(box: boxes.Box, spacing: tuple[float, float] | None) -> dict[str, Any]:
    values = {name: getattr(box, name) for name in ("row0", "col0", "row1", "col1", "score")}
    values["area_pixels"] = box.area
    if spacing is not None:
        row, column = spacing
        values["height_mm"] = (box.row1 - box.row0) * row
        values["width_mm"] = (box.col1 - box.col0) * column
        values["area_mm2"] = box.area * row * column
    return values


def write(
    output: Path,
    item: Item,
    result: Result,
    pseudonymise: bool,
    build: dicom_write.Build = dicom_write.build,
) -> list[dict[str, Any]]:
    """Write all files of one item; returns its rows of the table, one per frame.

    build: as dicom_write.build, wherever it runs. Raises WorkdirError if the disk refuses them.
    """
    height, width = result.pixels.shape[1:]
    frames = [frame for one in result.parts for frame in one.frames]
    top = int(np.argmax([frame["score"] for frame in frames]))
    picture = pillow.draw_overlay(result.pixels[top], _heat(result, top), frames[top]["boxes"])
    pictures = {"overlay.png": picture} | _cam(result, top)
    names, notes = _write_files(output, item, result, pictures, top, pseudonymise, build)
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
        "score": frames[top]["score"],
        "top_frame": top,
        "alarms": sum(frame["alarm"] for frame in frames),
        "frames": frames,
        "files": names,
        "bytes": {what: (output / name).stat().st_size for what, name in names.items()},
        "notes": notes,
        "warning": "Research software. Not a medical device; this is not a diagnosis.",
    }
    files.write_json(output / f"{item.output}.json", page, durable=False)
    return tables.rows(page, item)


def _write_files(
    output: Path,
    item: Item,
    result: Result,
    pictures: dict[str, np.ndarray],
    top: int,
    pseudonymise: bool,
    build: dicom_write.Build,
) -> tuple[dict[str, str], list[str]]:
    """Names of an item's files but its JSON, and why something is missing.

    pictures: of frame `top`; overlay.png is one of them.
    """
    contents = {name: encode_png(picture) for name, picture in pictures.items()}
    names, notes = {}, []
    if item.kind == "nifti":
        names["map"] = f"{item.output}.map.nii.gz"
        nifti.write_nifti(output / names["map"], Path(item.paths[0]), result.codes)
    elif len(result.codes) == 1:
        contents["map.png"] = encode_png(result.codes[0])
    else:
        contents["map.npz"] = _npz(maps=[one.scores.maps for one in result.parts])
    if result.parts[0].scores.passes.shape[1] > 1:
        contents["mc_dropout.npz"] = _npz(**patch_moments([one.scores for one in result.parts]))
    if item.kind == "dicom":
        marked = result.codes >= HALF
        overlaid = pictures["overlay.png"]
        objects = build(item.paths, result.key, marked, overlaid, top, pseudonymise)
        contents |= {f"{name}.dcm": raw for name, raw in objects.files.items()}
        notes = objects.notes
    for name, raw in contents.items():
        names[name.partition(".")[0]] = f"{item.output}.{name}"
        files.write_bytes(output / f"{item.output}.{name}", raw, durable=False)
    return names, notes


def patch_moments(scores: Sequence[BatchScores]) -> dict[str, list[Float[np.ndarray, "n g g"]]]:
    """Equation (10): mean and variance over the MC-dropout passes, a value per patch."""
    grid = round(scores[0].patch_mean.shape[1] ** 0.5)
    return {
        name: [getattr(s, name).reshape(-1, grid, grid).astype(np.float32) for s in scores]
        for name in ("patch_mean", "patch_variance")
    }


def finished(output: Path, item: Item, key: str) -> list[dict[str, Any]] | None:
    """The rows of a finished item of the same key; None if it has to be scored."""
    path = output / f"{item.output}.json"
    try:
        page = json.loads(path.read_bytes())
        if page["key"] != key:
            return None
        for what, name in page["files"].items():
            status = os.stat(output / os.path.basename(name))
            if not stat.S_ISREG(status.st_mode) or status.st_size != page["bytes"][what]:
                return None  # cut short by a power cut, or not ours
        return tables.rows(page, item)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or no result of ours


def _heat(result: Result, frame: int) -> Float[np.ndarray, "h w"]:
    """The map of one frame in the image's own frame."""
    for one in result.parts:
        if frame < len(one.frames):
            break
        frame -= len(one.frames)
    if one.heat is not None:
        return one.heat
    return frame_map(one.scores.maps[frame], result.pixels.shape[1:], result.fit)


def _cam(result: Result, frame: int) -> dict[str, UInt8[np.ndarray, "a b 3"]]:
    """cam.png, one frame under its Grad-CAM; nothing where it is not wanted."""
    cams = [one.cams for one in result.parts if one.cams is not None and one.cams.size]
    if not cams:
        return {}
    square = resize.to_square(np.concatenate(cams)[frame : frame + 1], CAM_SIDE)[0]
    pixels = result.pixels[frame]
    return {
        "cam.png": pillow.draw_overlay(pixels, read.to_frame(square, *pixels.shape, result.fit), [])
    }


def _npz(**arrays: Sequence[np.ndarray]) -> bytes:
    """An npz file of joined parts; as numpy's own, but deflated at the fastest level."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, parts in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.concatenate(parts))
    return raw.getvalue()
