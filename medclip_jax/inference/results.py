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
from medclip_jax.inference import inputs, pseudonyms
from medclip_jax.inference.inputs import Item
from medclip_jax.io import dicom_write, nifti, pillow, resize

HALF = 32768  # the code of 0.5, where the pixel threshold lies
COLUMNS = (
    *("source", "frame", "score", "p_value", "alarm", "uncertainty", "boxes"),
    *("row0", "col0", "row1", "col1", "height_mm", "width_mm", "height", "width", "result"),
    *("file", "frame_in_file", "sop_instance_uid"),
)
CAM_SIDE = 256  # pixels of the square that Grad-CAM is brought to before the image's frame


class Loaded(NamedTuple):
    """One item, read: in its own frame for display, in the encoder frame for scoring."""

    key: str  # names content, detector and settings
    sha256: str
    pixels: UInt8[np.ndarray, "f h w"]
    fitted: Float[np.ndarray, "f s s"]
    spacing: tuple[float, float] | None  # mm (row, column)
    meta: dict[str, str]
    mm2: float | None  # area of a pixel of the encoder frame
    codes: UInt16[np.ndarray, "f h w"]  # maps, filled as frames are scored


class Privacy(NamedTuple):
    """What an output may say of its source."""

    salt: bytes | None = None  # of the pseudonyms; None: names and identity as DICOM wants them
    burned_in: bool = False  # with a salt: pictures also where the source says they show text


class Part(NamedTuple):
    """Results of neighbouring frames of one item."""

    frames: list[dict[str, Any]]  # of the JSON
    scores: BatchScores  # maps as float16
    cams: Float[np.ndarray, "n p"] | None  # Grad-CAM; no column where it is not wanted


def part(
    scores: BatchScores,
    codes: UInt16[np.ndarray, "n h w"],
    first: int,
    spacing: tuple[float, float] | None,
    fit: resize.Mode,
    cams: Float[np.ndarray, "n p"] | None = None,
) -> Part:
    """Results of n frames.

    Args:
        scores: of these frames.
        codes: to be filled with 16-bit values of the frames' maps.
        first: number of the first frame in its item.
        spacing: mm (row, column).
        fit: how the image was brought to the encoder frame.
        cams: Grad-CAM of the patches, if it is wanted.
    """
    scores = scores._replace(maps=calibration.half_precision(scores.maps))
    frames = []
    for i, small in enumerate(scores.maps):
        heat = frame_map(small, codes.shape[1:], fit)
        # HALF or more is exactly what is at least 0.5
        codes[i] = np.minimum(heat * np.float32(65536), 65535).astype(np.uint16)
        frames.append(_frame(scores, i, first + i, heat, spacing))
    return Part(frames, scores, cams)


def frame_map(
    small: Float[np.ndarray, "s s"], shape: tuple[int, ...], fit: resize.Mode
) -> Float[np.ndarray, "h w"]:
    """A map in the image's own frame (rows, columns), [0, 1]; 0.5 is the pixel threshold."""
    height, width = shape
    return resize.to_frame(small.astype(np.float32), height, width, fit)


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
    loaded: Loaded,
    parts: Sequence[Part],
    fit: resize.Mode,
    model: dict[str, Any],
    privacy: Privacy,
    build: dicom_write.Build,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write all files of one item, or raise WorkdirError.

    Args:
        item: under a pseudonym, if there is a salt.
        parts: of all frames, in order.
        model: what the JSON says of the detector.
        build: as dicom_write.build, wherever it runs.

    Returns:
        Rows of the table, one per frame, and notes on what is missing.
    """
    frames = [frame for part in parts for frame in part.frames]
    scores = BatchScores(*map(np.concatenate, zip(*(part.scores for part in parts), strict=True)))
    top = int(np.argmax(scores.score))
    pixels = loaded.pixels[top]
    heat = frame_map(scores.maps[top], pixels.shape, fit)
    pictures = {"overlay.png": pillow.draw_overlay(pixels, heat, frames[top]["boxes"])}
    pictures |= _cam_picture(parts, top, pixels, fit)
    contents = _maps(loaded.codes, scores, npz=item.kind != "nifti")
    names: dict[str, str] = {}
    objects = dicom_write.DicomObjects({}, [], [], False)
    if item.kind == "nifti":
        names["map"] = f"{item.output}.map.nii.gz"
        nifti.write_nifti(output / names["map"], Path(item.paths[0]), loaded.codes)
    if item.kind == "dicom":
        marked, drawn = loaded.codes >= HALF, pictures["overlay.png"]
        task = (item.paths, loaded.key, marked, drawn, top, *privacy)
        objects = build(dicom_write.Task(*task))
        contents |= {f"{name}.dcm": raw for name, raw in objects.files.items()}
    notes = objects.notes
    if objects.burned_in and privacy.salt and not privacy.burned_in:
        pictures = {}  # they would show what the header warns of
    contents |= {name: pillow.encode_png(picture) for name, picture in pictures.items()}
    for name, raw in contents.items():
        names[_what(name)] = f"{item.output}.{name}"
        files.write_bytes(output / f"{item.output}.{name}", raw, durable=False)
    _name_files(frames, item, objects, privacy.salt)
    page = {
        "source": item.source,
        "files_read": len(item.paths),
        "sha256": None if privacy.salt else loaded.sha256,
        "key": loaded.key,
        "kind": item.kind,
        "meta": loaded.meta,
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "spacing_mm": loaded.spacing,
        "model": model,
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
    return table_rows(page, item), notes


def _what(name: str) -> str:
    """ "map.png" -> "map", "seg.dcm" -> "seg", "2.seg.dcm" -> "seg_2"."""
    first, second, *_ = name.split(".")
    return f"{second}_{first}" if first.isdigit() else first


def _name_files(
    frames: list[dict[str, Any]],
    item: Item,
    objects: dicom_write.DicomObjects,
    salt: bytes | None,
) -> None:
    """Say of each frame which file it is of, the how many-th there and, unless salted, its UID."""
    one_each = len(item.paths) == len(frames)
    for i, frame in enumerate(frames):
        unknown = (i, 1, "") if one_each else (0, i + 1, "")
        file, number, uid = objects.frames[i] if objects.frames else unknown
        name = os.path.basename(item.paths[file])
        frame["file"] = pseudonyms.pseudonym(name, salt) if salt else inputs.printable(name)
        frame["frame_in_file"] = number
        frame["sop_instance_uid"] = None if salt else uid or None


def _cam_picture(parts: Sequence[Part], top: int, pixels, fit: resize.Mode) -> dict[str, Any]:
    """Grad-CAM over the top frame, where it was asked for."""
    if parts[0].cams is None or not parts[0].cams.size:
        return {}
    cam = np.concatenate([part.cams for part in parts])[top : top + 1]
    heat = frame_map(resize.to_square(cam, CAM_SIDE)[0], pixels.shape, fit)
    return {"cam.png": pillow.draw_overlay(pixels, heat, [])}


def _maps(codes: UInt16[np.ndarray, "f h w"], scores: BatchScores, npz: bool) -> dict[str, bytes]:
    """Files of the maps, and of equation (10) where there are several passes of MC-dropout."""
    contents = {}
    if npz and len(codes) == 1:
        contents["map.png"] = pillow.encode_png(codes[0])
    elif npz:
        contents["map.npz"] = _npz(maps=scores.maps)
    if scores.passes.shape[1] > 1:
        grid = round(scores.patch_mean.shape[1] ** 0.5)
        moments = {
            name: getattr(scores, name).reshape(-1, grid, grid).astype(np.float32)
            for name in ("patch_mean", "patch_variance")
        }
        contents["mc_dropout.npz"] = _npz(**moments)
    return contents


def table_rows(page: dict[str, Any], item: Item) -> list[dict[str, Any]]:
    """One row of the table per frame of an item's JSON, with its first box."""
    rows = []
    for frame in page["frames"]:
        first = frame["boxes"][0] if frame["boxes"] else {}
        row = {name: first[name] for name in COLUMNS if name in first}
        row |= {name: frame[name] for name in ("frame", "score", "p_value", "uncertainty")}
        row |= {name: frame[name] for name in ("file", "frame_in_file", "sop_instance_uid")}
        row |= {"alarm": int(frame["alarm"]), "boxes": len(frame["boxes"])}
        row |= {"height": page["height"], "width": page["width"]}
        rows.append(row | {"source": page["source"], "result": f"{item.output}.json"})
    return rows


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
        return table_rows(page, item)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or no result of ours


def _npz(**arrays: np.ndarray) -> bytes:
    """An npz file as numpy's own, but deflated at the fastest level."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, values in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, values)
    return raw.getvalue()
