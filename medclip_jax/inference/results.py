"""What prediction leaves for one item: JSON, overlay, maps, DICOM objects.

All names come from inputs.safe_name; every file appears whole or not at all, the JSON last, with
the digests of the others and of itself: an item whose JSON agrees with its files is finished.
Boxes are in the image's own pixels and, where it has a spacing, mm.
Host values only, so that threads can do it while the encoder runs.
"""

import collections
import io
import os
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medclip_jax import files, stored
from medclip_jax.detectors.detector import BatchScores
from medclip_jax.errors import ConfigError
from medclip_jax.inference.inputs import Item
from medclip_jax.inference.predictor import Loaded, Part, frame_map, joined, top_map
from medclip_jax.io import dicom_write, nifti, pillow, read

COLUMNS = (
    *("source", "frame", "score", "p_value", "alarm", "uncertainty", "boxes"),
    *("row0", "col0", "row1", "col1", "height_mm", "width_mm", "height", "width", "result"),
    *("file", "frame_in_file", "sop_instance_uid"),
)
ENDINGS = (  # of an item's files, without its JSON and numbered Segmentations
    *("overlay.png", "cam.png", "map.png", "map.npz", "map.nii.gz", "mc_dropout.npz"),
    *("capture.dcm", "seg.dcm"),
)
LARGEST_PAGE = 1 << 28  # bytes of a JSON
CAM_SIDE = 256  # pixels of the square that Grad-CAM is brought to before the image's frame


class Privacy(NamedTuple):
    """What an output may say of its source."""

    salt: bytes | None = None  # of the pseudonyms; None: names and identity as DICOM wants them
    burned_in: bool = False  # with a salt: pictures also where the source says they show text


class Outcome(NamedTuple):
    """What became of an item."""

    item: Item
    rows: list[dict[str, Any]]  # of results.csv
    error: str  # why there are none
    notes: list[str]  # on outputs that are missing
    scored: bool  # now, not before


def write(
    output: Path,
    item: Item,
    loaded: Loaded,
    parts: Sequence[Part],
    fit: read.Mode,
    model: dict[str, Any],
    privacy: Privacy,
    build: dicom_write.Build,
    earlier: Mapping[str, Sequence[str]],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write all files of one item, or raise WorkdirError.

    Args:
        item: under a pseudonym, if there is a salt.
        parts: of all frames, in order.
        model: what the JSON says of the detector.
        build: as dicom_write.build, wherever it runs.
        earlier: as of `remove_results`.

    Returns:
        Rows of the table, one per frame, and notes on what is missing.
    """
    frames = [frame for part in parts for frame in part.frames]
    top = int(np.argmax((scores := joined(parts)).score))
    pixels = loaded.shown(top)
    heat = frame_map(top_map(parts, top), pixels.shape, fit)
    overlay = pillow.draw_overlay(pixels, heat, frames[top]["boxes"])
    pictures = {"overlay.png": overlay} | _cam_picture(parts, top, pixels, fit)
    contents = _maps(loaded, scores, parts)
    names: dict[str, str] = {}
    if item.kind == "nifti":
        names["map"] = f"{item.output}.map.nii.gz"
        grid = Path(item.paths[0]), loaded.codes, loaded.frames.axis
        nifti.write_nifti(output / names["map"], *grid)
    objects = dicom_write.DicomObjects({}, [], [], False)
    if item.kind == "dicom":
        shown = loaded.marked(), overlay, top
        objects = build(dicom_write.Task(item.paths, loaded.key, *shown, *privacy))
    if not objects.burned_in or privacy.salt is None or privacy.burned_in:
        contents |= {name: pillow.encode_png(picture) for name, picture in pictures.items()}
    contents |= {f"{name}.dcm": raw for name, raw in objects.files.items()}
    for name, raw in contents.items():
        names[_what(name)] = f"{item.output}.{name}"
        files.write_bytes(output / f"{item.output}.{name}", raw, durable=False)
    remove_results(output, item, earlier, {*names.values(), f"{item.output}.json"})
    _name_files(frames, item, objects)
    page = _page(item, loaded, frames, top, model) | {
        "files": names,
        "file_sha256": {what: files.sha256_of(output / name) for what, name in names.items()},
        "notes": objects.notes,
        "warning": "Research software. Not a medical device; this is not a diagnosis.",
    }
    if privacy.salt:
        page["sha256"] = None  # of the source: who has it could tell that it was here
    page = files.plain(page)  # of what is read again `finished` makes the same rows
    files.write_json(output / f"{item.output}.json", stored.sealed(page), durable=False)
    return table_rows(page, item), objects.notes


def numbered(output: Path) -> dict[str, list[str]]:
    """Names of the numbered Segmentations in a folder, by the `output` of their item."""
    names: dict[str, list[str]] = collections.defaultdict(list)
    for path in output.glob("*.seg.dcm"):
        item, _, number = path.name.removesuffix(".seg.dcm").rpartition(".")
        if number.isdecimal():
            names[item].append(path.name)
    return names


def remove_results(
    output: Path, item: Item, earlier: Mapping[str, Sequence[str]], keep: Collection[str] = ()
) -> None:
    """Remove files of an earlier result of the item, under other settings or of other bytes.

    earlier: what was `numbered` when the run began; gaps in the numbers are no matter.
    """
    own = (f"{item.output}.{ending}" for ending in ("json", *ENDINGS))
    for name in (*own, *earlier.get(item.output, ())):
        path = output / name
        if name not in keep and not path.is_dir():
            with files.disk_errors(path):
                path.unlink(missing_ok=True)


def _page(item: Item, loaded: Loaded, frames, top: int, model: dict[str, Any]) -> dict[str, Any]:
    """What the JSON says of an item and its scores."""
    return {
        "source": item.source,
        "place": item.place,
        "files_read": len(item.paths),
        "sha256": loaded.sha256,
        "key": loaded.key,
        "kind": item.kind,
        "meta": loaded.frames.meta,
        "range": loaded.frames.range,
        "axis": loaded.frames.axis,
        "height": loaded.frames.shape[1],
        "width": loaded.frames.shape[2],
        "spacing_mm": loaded.frames.spacing,
        "model": model,
        "score": frames[top]["score"],
        "top_frame": top,
        "alarms": sum(frame["alarm"] for frame in frames),
        "frames": frames,
    }


def _what(name: str) -> str:
    """ "map.png" -> "map", "seg.dcm" -> "seg", "2.seg.dcm" -> "seg_2"."""
    first, second, *_ = name.split(".")
    return f"{second}_{first}" if first.isdigit() else first


def _name_files(frames: list[dict], item: Item, objects: dicom_write.DicomObjects) -> None:
    """Say of each frame which file it is of, where in that, and its UID if there is one to say."""
    one_each = len(item.paths) == len(frames)
    for i, frame in enumerate(frames):
        file, number = objects.frames[i] if objects.frames else (i, 1) if one_each else (0, i + 1)
        frame["file"] = item.names[file] if item.names else item.source
        frame["frame_in_file"] = number
        frame["sop_instance_uid"] = (item.uids[file] if item.uids else "") or None


def _cam_picture(parts: Sequence[Part], top: int, pixels, fit: read.Mode) -> dict[str, Any]:
    """Grad-CAM over the top frame, where it was asked for."""
    if parts[0].cams is None or not parts[0].cams.size:
        return {}
    cam = np.concatenate([part.cams for part in parts])[top : top + 1]
    heat = frame_map(read.to_square(cam, CAM_SIDE)[0], pixels.shape, fit)
    return {"cam.png": pillow.draw_overlay(pixels, heat, [])}


def _maps(loaded: Loaded, scores: BatchScores, parts: Sequence[Part]) -> dict[str, bytes]:
    """Files of the maps, and of equation (10) where there are several passes of MC-dropout."""
    contents = {}
    if loaded.codes.dtype != bool and loaded.keep_maps:
        contents["map.png"] = pillow.encode_png(loaded.codes[0])
    elif loaded.keep_maps:
        contents["map.npz"] = _npz(maps=[part.scores.maps for part in parts])
    if scores.passes.shape[1] > 1:
        grid = round(scores.patch_mean.shape[1] ** 0.5)
        moments = {
            name: [getattr(scores, name).reshape(-1, grid, grid).astype(np.float32)]
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


def refuse_others(output: Path, items: Iterable[Item]) -> None:
    """Raise ConfigError if an item would replace the result of a file of the same name elsewhere.

    An item is named by its path below the folder that was given: two folders may have equal ones.
    """
    for item in items:
        try:
            place = _read_page(output, item).get("place", item.place)  # earlier versions: none
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # not there, or no result of ours
        if item.place and place != item.place:  # none: nothing is there
            raise ConfigError(
                f"{output} holds the result of another file called {item.source}, in another "
                "folder or moved since: predict into a new folder"
            )


def _read_page(output: Path, item: Item) -> dict[str, Any]:
    page = stored.parse_json(files.read_regular(output / f"{item.output}.json", LARGEST_PAGE))
    stored.check_seal(page)
    return page


def finished(output: Path, item: Item, key: str) -> list[dict[str, Any]] | None:
    """The rows of a finished item of the same key; None if it has to be scored.

    The JSON and each file that it names must be, byte for byte, what was written.
    """
    try:
        page = _read_page(output, item)
        if page["key"] != key:
            return None
        for what, name in page["files"].items():
            path = output / name
            if not name.startswith(f"{item.output}.") or os.path.basename(name) != name:
                return None  # of another item
            if path.is_symlink() or files.sha256_of(path) != page["file_sha256"][what]:
                return None  # altered, or cut short by a power cut
        return table_rows(page, item)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # not there, or no result of ours


def _npz(**arrays: list[np.ndarray]) -> bytes:
    """An npz file as numpy's own, but deflated at the fastest level; arrays in pieces of rows."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, pieces in arrays.items():
            shape = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
            header = np.lib.format.header_data_from_array_1_0(pieces[0]) | {"shape": shape}
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for piece in pieces:
                    member.write(np.ascontiguousarray(piece).data)
    return raw.getvalue()
