"""What a user names -> the images to score: files, folders, globs, DICOM series, NIfTI volumes.

Names are untrusted. Nothing but regular files is opened, loops of links are walked once, and the
name of every output is made here from safe characters and a hash, so that it stays in its folder.
"""

import hashlib
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

from medclip_jax.errors import ConfigError, DataError
from medclip_jax.io.read import DICOM, NIFTI, PILLOW, is_dicom

HEADER = (
    *("SeriesInstanceUID", "SOPClassUID", "Rows", "Columns", "NumberOfFrames", "InstanceNumber"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PhotometricInterpretation"),
)


class Item(NamedTuple):
    """One image, volume or series."""

    source: str  # the path as the user may see it, printable
    paths: tuple[str, ...]  # one file, or the files of a DICOM series in order
    kind: str  # "image", "dicom" or "nifti"
    output: str  # safe name, unique: what all its outputs start with


def find(named: Sequence[str], pseudonymise: bool = False) -> list[Item]:
    """The images below the given paths, in the order given, folders in the order of their names.

    A path that exists is taken literally, else as a glob pattern (** goes through folders). In a
    folder only files of known kinds are taken; a file named itself is always taken, to be scored or
    listed as unreadable. pseudonymise: output names are hashes alone. Raises DataError if there is
    no image.
    """
    items: list[Item] = []
    seen: set[str] = set()
    folders: set[tuple[int, int]] = set()
    for path in _expand(named):
        root = os.path.dirname(os.path.abspath(path))
        new = [f for f in _walk(path, folders) if f not in seen]
        seen.update(new)
        for kind, paths in _group(new):
            items.append(_item(root, kind, paths, pseudonymise))
    if not items:
        raise DataError(
            f"{', '.join(named)}: no image there (PNG, JPEG, BMP, TIFF, DICOM, NIfTI): "
            "give files, folders or glob patterns"
        )
    return _unique(items)


def share(items: Sequence[Item], part: str) -> list[Item]:
    """The share of one of several processes: "2/4" is the second of four; "" is everything.

    Raises ConfigError for anything else.
    """
    if not part:
        return list(items)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part is {part!r}: give i/n with i from 1 to n, such as 2/4")
    return list(items[int(match[1]) - 1 :: int(match[2])])


def kind_of(path: str) -> str | None:
    """ "image", "dicom", "nifti", or None for a file that is none by its name and first bytes."""
    name = os.path.basename(path).lower()
    if name.endswith(".img"):  # the other half of a NIfTI pair
        return None
    for kind, endings in (("image", PILLOW), ("nifti", NIFTI), ("dicom", DICOM)):
        if name.endswith(endings):
            return kind
    suffix = os.path.splitext(name)[1]
    if not suffix or suffix[1:].isdigit():  # as scanners name them: IM0001, 1.2.840.1
        return "dicom" if is_dicom(Path(path)) else None
    return None


def safe_name(source: str) -> str:
    """The last two parts of a path in safe characters, and a hash of all of it; at most 95 long."""
    parts = [p for p in source.replace("\\", "/").split("/") if p not in ("", ".", "..")]
    shown = []
    for part in parts[-2:]:
        plain = unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode()
        shown.append(re.sub(r"[^A-Za-z0-9.-]+", "_", plain).strip("._-")[:40])
    text = "_".join(filter(None, shown)) or "image"
    return f"{text}-{_hash(source)}"


def _expand(named: Iterable[str]) -> Iterator[str]:
    for path in named:
        if not os.path.lexists(path) and has_magic(path):
            yield from sorted(glob(path, recursive=True))
        else:
            yield path


def _walk(path: str, folders: set[tuple[int, int]]) -> Iterator[str]:
    """Regular files of known kinds below a folder; a file named itself whatever it is."""
    if not os.path.isdir(path):
        yield os.path.abspath(path)
        return
    begin = os.path.abspath(path)
    for folder, below, names in os.walk(begin, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in folders:  # a link back, or a folder that was named twice
            below.clear()
            continue
        folders.add((here.st_dev, here.st_ino))
        below.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            if is_regular(file) and kind_of(file):
                yield file


def is_regular(path: str) -> bool:
    """Whether it is a file to read: no pipe or device, on which reading would hang."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _group(paths: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(kind, files): DICOM files of one series in one folder together, everything else alone."""
    series: dict[tuple, list[tuple[tuple, str]]] = {}
    order: list[tuple[str, Any]] = []
    for path in paths:
        kind = (kind_of(path) if is_regular(path) else None) or "image"
        slot = _series_of(path) if kind == "dicom" else None
        if slot is None:
            order.append((kind, (path,)))
            continue
        series_key, place = slot
        if series_key not in series:
            series[series_key] = []
            order.append((kind, series_key))
        series[series_key].append((place, path))
    for kind, what in order:
        if what in series:
            yield kind, tuple(path for _, path in sorted(series[what]))
        else:
            yield kind, what


def _series_of(path: str) -> tuple[tuple, tuple] | None:
    """(series, place in it) of a single-frame DICOM slice; None for what stands alone."""
    import pydicom

    try:
        head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER))
        if "SeriesInstanceUID" not in head or int(head.get("NumberOfFrames") or 1) > 1:
            return None
        look = [round(float(v), 4) for v in head.get("ImageOrientationPatient") or ()]
        at = [float(v) for v in head.get("ImagePositionPatient") or ()]
        depth = 0.0
        if len(look) == 6 and len(at) == 3:
            (a, b, c), (d, e, f) = look[:3], look[3:]
            normal = (b * f - c * e, c * d - a * f, a * e - b * d)
            depth = sum(n * x for n, x in zip(normal, at, strict=True))
        # as text: a broken header may hold several values where there is one
        shape = [str(head.get(n)) for n in ("Rows", "Columns", "PhotometricInterpretation")]
        uid = str(head.SeriesInstanceUID), str(head.get("SOPClassUID"))
        number = int(head.get("InstanceNumber") or 0)
        return (os.path.dirname(path), *uid, *shape, *look), (round(depth, 3), number)
    except Exception as error:  # pydicom raises anything on broken files; reading will say what
        logging.debug("%s has no usable DICOM header (%s)", path, type(error).__name__)
        return None


def _item(root: str, kind: str, paths: tuple[str, ...], pseudonymise: bool) -> Item:
    relative = os.path.relpath(paths[0], root)
    source = printable(relative if len(paths) == 1 else f"{relative} (+{len(paths) - 1})")
    return Item(source, paths, kind, _hash(source) if pseudonymise else safe_name(source))


def _unique(items: Sequence[Item]) -> list[Item]:
    """The same relative path below two named folders gets a number."""
    count: dict[str, int] = {}
    result = []
    for item in items:
        count[item.output] = count.get(item.output, 0) + 1
        again = count[item.output]
        result.append(item._replace(output=f"{item.output}-{again}") if again > 1 else item)
    return result


def printable(path: str) -> str:
    """A path as text that any terminal, CSV or JSON reader can take."""
    text = path.encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return f"./{text}" if text[:1] in ("=", "+", "-", "@") else text  # no spreadsheet formula


def _hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]
