"""What a user names -> the images to score: files, folders, globs, DICOM series, NIfTI volumes.

Names are untrusted: the name of every output is made here from safe characters and a hash, so that
it stays in its folder. What cannot be listed, opened or scored is an item too, with its reason.
"""

import hashlib
import logging
import os
import re
import stat
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medclip_jax import errors, files
from medclip_jax.errors import ConfigError, DataError
from medclip_jax.inference import series, walk
from medclip_jax.io.nifti import MARK as NIFTI_MARK
from medclip_jax.io.nifti_header import files_of
from medclip_jax.io.pillow import MARK as PNG_MARK
from medclip_jax.io.read import DICOM, NIFTI, PILLOW, is_dicom

NOT_READ = (  # formats of images that people have, too
    *(".gif", ".webp", ".jp2", ".heic", ".svs", ".npy", ".mha", ".mhd", ".nrrd", ".mgz", ".mgh"),
)
HASH = 12  # letters at the end of the name of an output
COPY = "a copy of another file of its series"
OURS = "a result of this program, not an image"


class Item(NamedTuple):
    """One image, volume or series; or, with an `error`, what is none."""

    source: str  # the path as the user may see it, printable; or its pseudonym
    paths: tuple[str, ...]  # one file, or the files of a DICOM series in order
    kind: str  # "image", "dicom" or "nifti"; "" with an error
    output: str  # safe name, unique: what all its outputs start with
    names: tuple[str, ...] = ()  # of `paths`, as `source`; the files of a series have one frame
    uids: tuple[str, ...] = ()  # SOPInstanceUID of `paths`, "" where there is none
    error: str = ""  # why it is not read: a phrase without names
    place: str = ""  # hash of where it lies, or its pseudonym


def find(
    named: Sequence[str | os.PathLike[str]], follow_links: bool = False, nameless: bool = False
) -> list[Item]:
    """The images below the given paths, in the order given, folders in the order of their names.

    A path that exists is taken literally, else as a glob pattern (** goes through folders). In a
    folder only files of known kinds are taken, no hidden ones and no results of this program; a
    file named itself is always taken, to be scored or listed as unreadable.

    Args:
      named: files, folders, patterns.
      follow_links: also those that lead out of the folder that was named.
      nameless: warnings and errors name none of them.

    Raises DataError if there is no image, ConfigError for what is no path.
    """
    if not named:
        raise DataError("nothing to score: give files, folders or glob patterns")
    texts = [*map(files.text_of, named)]
    texts = [str(files.expanded(n)) if ":/" in n or n.startswith("~/") else n for n in texts]
    items: list[Item] = []
    seen: set[str] = set()
    visited: set[tuple[int, int]] = set()
    empty = 0
    for name in texts:
        before = len(visited)
        root, entries = walk.entries(name, visited, follow_links)
        if not entries and os.path.isdir(name) and len(visited) == before:
            continue  # named twice
        entries = list({entry.path: entry for entry in map(_by_header, entries)}.values())
        new = [entry for entry in entries if entry.path not in seen]
        groups = list(_group(new))
        seen.update(path for _, paths, *_ in groups for path in paths)
        items += [_item(root, *group) for group in groups]
        if not groups and len(new) == len(entries):
            empty += 1
            reason = "no image in this folder" if os.path.isdir(name) else "matches nothing"
            logging.warning("%s: %s", "a path" if nameless else printable(name), reason)
            items.append(Item(printable(name), (name,), "", safe_name(name), error=reason))
    if len(items) == empty:
        where = "the inputs" if nameless else ", ".join(texts)
        raise DataError(
            f"{where}: no image there (PNG, JPEG, BMP, TIFF, DICOM, NIfTI): "
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
    """ "image", "dicom", "nifti", or None for a file that is none by its name and first bytes.

    Raises OSError if those cannot be read.
    """
    name = os.path.basename(path).lower()
    if name.endswith(".img"):  # half of a NIfTI pair, whose header is missing: see `_by_header`
        return None
    for kind, endings in (("image", PILLOW), ("nifti", NIFTI), ("dicom", DICOM)):
        if name.endswith(endings):
            return kind
    suffix = os.path.splitext(name)[1]
    if not suffix or suffix[1:].isdigit():  # as scanners name them: IM0001, 1.2.840.1
        _first_bytes(path, 1)
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


def is_regular(path: str) -> bool:
    """Whether it is a file to read: no pipe or device, on which reading would hang."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _group(entries: Sequence[walk.Entry]) -> Iterator[tuple]:
    """(kind, files, UIDs, error): files of one DICOM series together, everything else alone."""
    slices: list[series.Slice] = []
    others: dict[str, tuple] = {}
    for entry in entries:
        path, error = entry.path, entry.error
        kind, head = "", None
        if not error:
            kind, error = _kind(entry)
        if kind == "dicom":
            head = series.header(path)
        if kind:
            error = OURS if _is_ours(path, kind, head) else series.refusal(head)
        if error == OURS and not entry.literal:
            continue
        if error:
            others[path] = ("", (path,), (), error)
        elif kind == "dicom":
            slices.append(series.slice_of(path, head))
        elif kind:
            others[path] = (kind, (path,), ("",), "")
    stacks, copies = series.group(slices)
    first = {min(one.path for one in stack): stack for stack in stacks}
    for entry in entries:
        if entry.path in others:
            yield others[entry.path]
        elif entry.path in copies:
            yield "", (entry.path,), (), COPY
        elif stack := first.get(entry.path):
            yield "dicom", tuple(x.path for x in stack), tuple(x.uid for x in stack), ""


def _by_header(entry: walk.Entry) -> walk.Entry:
    """The entry; for the voxels of a NIfTI pair that of its header, if there is one."""
    header = str(files_of(Path(entry.path))[0])
    there = header != entry.path and not entry.error and os.path.lexists(header)
    return entry._replace(path=header) if there else entry


def _kind(entry: walk.Entry) -> tuple[str, str]:
    """(kind, why it is not read); two empty texts for a file to be passed over."""
    name = entry.path.lower()
    try:
        kind = kind_of(entry.path)
        if kind or entry.named:
            return kind or ("dicom" if is_dicom(Path(entry.path)) else "image"), ""
        if name.endswith(NOT_READ):
            return "", "a format that is not read: save it as PNG, TIFF, DICOM or NIfTI"
        if name.endswith(".img"):
            return "", "half of a NIfTI pair whose header (.hdr) is missing"
        return "", ""
    except OSError as error:
        return "", f"cannot be opened ({error.strerror})"


def _is_ours(path: str, kind: str, head) -> bool:
    """Whether this program wrote it: an overlay, a map, a figure, a DICOM object."""
    try:
        if kind == "image":
            return PNG_MARK in _first_bytes(path, 128)
        if kind == "nifti" and path.lower().endswith(".gz"):
            start = zlib.decompressobj(31).decompress(_first_bytes(path, 512), 348)
            return any(start[i : i + 80].rstrip(b"\0") == NIFTI_MARK for i in (148, 240))
        return kind == "dicom" and series.is_ours(head)
    except (OSError, zlib.error):  # reading will say what is wrong
        return False


def _first_bytes(path: str, count: int) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        return file.read(count) or b""


def _item(
    root: str, kind: str, paths: tuple[str, ...], uids: tuple[str, ...] = (), error: str = ""
) -> Item:
    """An item whose sources are told from the folder `root`."""
    names = tuple(printable(os.path.relpath(path, root)) for path in paths)
    source = names[0] if len(names) == 1 else f"{names[0]} (+{len(names) - 1})"
    uids = tuple(map(printable, uids))  # any text of a header
    place = _hash(os.path.abspath(paths[0]))
    return Item(source, paths, kind, safe_name(source), names, uids, error, place)


def _unique(items: Sequence[Item]) -> list[Item]:
    """The same relative path below two named folders gets a number."""
    count: dict[str, int] = {}
    result = []
    for item in items:
        count[item.output] = again = count.get(item.output, 0) + 1
        if again > 1:
            output, source = f"{item.output}-{again}", f"{item.source} ({again})"
            item = item._replace(output=output, source=source)
        result.append(item)
    return result


def printable(path: str) -> str:
    """A path, or a UID of a header, as text that any terminal, CSV or JSON reader can take."""
    text = errors.printable(path)
    return f"./{text}" if text[:1] in ("=", "+", "-", "@") else text  # no spreadsheet formula


def replaced(message: str, instead: Mapping[str, str]) -> str:
    """A message with other texts for whole paths and words of it, in one pass, longest first."""
    parts = map(re.escape, sorted(instead, key=len, reverse=True))
    return re.sub(rf"(?<!\w)({'|'.join(parts)})(?!\w)", lambda x: instead[x[0]], message)


def _hash(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:HASH]
