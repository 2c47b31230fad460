"""What a run reads back is checked before it is believed: size, checksum, digest, type and range.

Functions raise ValueError (OSError from the disk) with a reason; who calls them says of which file.
"""

import hashlib
import io
import json
import math
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

MOST_JSON = 256 << 20  # bytes: split.json of a million images
MOST_VALUES = 8_000_000  # in a JSON; each takes far more memory than its bytes
MOST_LIST, MOST_FILE = 1 << 16, 1 << 33  # bytes of a zip file's list of members, of a cached file
PLACEHOLDER = b'"crc32":"00000000"'  # in the header of a safetensors file, before it is known
CRC = re.compile(rb'"crc32":"([0-9a-f]{8})"')


class Number(NamedTuple):
    """A finite number in a range, both ends included."""

    low: float
    high: float
    whole: bool = False
    absent: bool = False  # null is allowed


HEX = re.compile("[0-9a-f]{16}|[0-9a-f]{64}")
RAW = Number(-1e6, 1e6)  # raw scores: logits, distances, standardised sums
WIDTH = Number(1e-12, 1e6)
SHARE = Number(0, 1)
UNKNOWN_SHARE = Number(0, 1, absent=True)
COUNT = Number(0, 1 << 20, whole=True)
FILTER = {  # anomaly_maps.MapFilter; `ceiling` is left out where there is none
    "median": Number(0, 99),
    "min_area_mm2": Number(0, 1e6),
    "min_area_pixels": Number(0, 1e6),
    "sigma": Number(0, 100),
    "ceiling?": RAW,
}
IMAGE = {
    "value": RAW,
    "alpha_requested": SHARE,
    "alpha_attained": UNKNOWN_SHARE,
    "attainable": bool,
    "message": str,
    "bound": UNKNOWN_SHARE,
}
DETECTOR = {  # scorer.json
    "format": COUNT,
    "medclip-jax": str,
    "checkpoint": HEX,
    "language": str,
    "supports": [HEX],
    "sha256": HEX,
    "calibration": {
        "healthy": [RAW],
        "image": IMAGE,
        "scale": WIDTH,
        "pixel": {
            "value": RAW,
            "rate_requested": SHARE,
            "rate_attained": UNKNOWN_SHARE,
            "pixels": Number(0, 1 << 40, whole=True),
            "message": str,
            "bound": UNKNOWN_SHARE,
        },
        "pixel_scale": WIDTH,
        **{"k": COUNT, "peak": Number(0, 0.9)},
        "filter": FILTER,
    },
    "config": dict,  # config.restored
    "digest": HEX,
}
RESULTS = (  # files of a run, written before metrics.json
    *("split.json", "metrics.jsonl", "predictions.npz", "scorer.json", "scorer.safetensors"),
)
FINISHED = {  # in metrics.json
    "key": HEX,
    "config": HEX,
    "files": {f"{name}?": HEX for name in RESULTS},
}
EXPORTED = {  # manifest.json of an exported file
    "kind": str,
    "format": COUNT,
    "medclip-jax": str,
    "jax": str,
    "recipe": {
        "size": Number(8, 4096, whole=True),
        "fit": re.compile("stretch|pad"),
        "window": str,
        "range": [Number(0, 1)],
        "grey": bool,
    },
    "calibration": {
        "healthy": [RAW],
        "threshold": RAW,
        "scale": WIDTH,
        "pixel_threshold": RAW,
        "pixel_scale": WIDTH,
        "k": COUNT,
    },
    "alpha": IMAGE,
    "detector": HEX,
    "checkpoint": HEX,
    "sha256": {"detector.stablehlo": HEX, "weights.npz": HEX, "README.md": HEX},
    "digest": HEX,
}


def check_file(path: Path, most: int) -> None:
    """Raise ValueError for what is no regular file of at most `most` bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > most:
        raise ValueError(f"it has {status.st_size} bytes where at most {most} are read")


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """The bytes of a file that `check_file` accepts."""
    check_file(path, most)
    with path.open("rb") as file:
        return file.read(most)


def read_json(path: Path, most: int = MOST_JSON) -> dict[str, Any]:
    """A JSON object of finite numbers."""
    return parse_json(read_bytes(path, most))


def parse_json(raw: bytes) -> dict[str, Any]:
    """The same from bytes."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no number of JSON")

    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    try:
        value = json.loads(raw, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


@contextmanager
def open_zip(file: io.RawIOBase | io.BytesIO) -> Iterator[zipfile.ZipFile]:
    """A zip file, whose list of members is read in one piece and so has to be short."""

    class Bounded(io.BufferedReader):
        most = MOST_LIST

        def read(self, size: int | None = -1) -> bytes:
            if not self.most:
                return super().read(size)
            data = super().read(self.most if size is None or size < 0 else min(size, self.most))
            if len(data) == self.most:
                raise ValueError("its list of members is far too long")
            return data

    with Bounded(cast(io.RawIOBase, file)) as bounded, zipfile.ZipFile(bounded) as archive:
        bounded.most = 0
        yield archive


def read_npz(
    file: io.RawIOBase | io.BytesIO, most: int, wanted: Callable[[str], bool] = bool
) -> dict[str, np.ndarray]:
    """Arrays of an npz file whose members are not packed, of at most so many bytes each.

    What the head of an array promises is compared with its bytes first.
    """
    arrays = {}
    with open_zip(file) as archive:
        for info in archive.infolist():
            if not wanted(name := info.filename.removesuffix(".npy")):
                continue
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
                raise ValueError(f"its {short(name)} is packed or has more than {most:,} bytes")
            arrays[name] = _array(archive.read(info))
    return arrays


def _array(raw: bytes) -> np.ndarray:
    head = io.BytesIO(raw)
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("an array in it is of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
    rest = raw[head.tell() :]
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(rest):
        raise ValueError("an array in it has not the size that it promises")
    return np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")


def digest(values: Any) -> str:
    """16 hex digits that name a value of JSON's types."""
    text = json.dumps(values, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with `digest`, of all the rest; values in JSON's types."""
    rest = {name: value for name, value in values.items() if name != "digest"}
    return rest | {"digest": digest(rest)}


def check_seal(values: Mapping[str, Any]) -> None:
    """Raise ValueError where something was changed since `sealed`."""
    if "digest" not in values:
        raise ValueError("it has no digest, as of an older version")
    if sealed(values)["digest"] != values["digest"]:
        raise ValueError("it was changed since it was written: its digest differs")


def check(value: Any, schema: Any, where: str = "") -> None:
    """Raise ValueError for the first value that is not as the schema says.

    A schema is a type, a pattern, a Number, [schema of each item] or {name: schema}; a name with a
    question mark may be absent, others may not.
    """
    if isinstance(schema, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'it'} is not an object")
        names = {name.removesuffix("?"): name for name in schema}
        for name in value:
            if name not in names:
                raise ValueError(f"{where}{name!r} does not belong there")
        for name, key in names.items():
            if name in value:
                check(
                    value[name], schema[key], f"{where}{name}" + "." * isinstance(schema[key], dict)
                )
            elif not key.endswith("?"):
                raise ValueError(f"{where}{name} is missing")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        for i, item in enumerate(value):
            check(item, schema[0], f"{where}[{i}]")
    elif isinstance(schema, Number):
        _check_number(value, schema, where)
    elif isinstance(schema, re.Pattern):
        if not isinstance(value, str) or not schema.fullmatch(value):
            raise ValueError(f"{where} is {short(value)}")
    elif type(value) is not schema:
        raise ValueError(f"{where} is {short(value)} where a {schema.__name__} belongs")


def _check_number(value: Any, schema: Number, where: str) -> None:
    if value is None and schema.absent:
        return
    kinds = int if schema.whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "whole number" if schema.whole else "number"
        raise ValueError(f"{where} is {short(value)} where a {kind} belongs")
    if not schema.low <= value <= schema.high or not math.isfinite(value):
        raise ValueError(f"{where} is {short(value)}, outside {schema.low:g} to {schema.high:g}")


def short(value: Any) -> str:
    """A value for a message."""
    text = ascii(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 40 else f"{text[:37]}..."


def with_crc(raw: bytes) -> bytes:
    """A safetensors file whose metadata hold PLACEHOLDER, with the checksum of all its bytes."""
    return raw.replace(PLACEHOLDER, b'"crc32":"%08x"' % zlib.crc32(raw), 1)


def has_crc(path: Path, text: bytes = b"") -> bool:
    """Whether every byte of such a file, no link, is as `with_crc` left it, `text` in its head."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_FILE:
            return False
        length = file.read(8)
        head = length + file.read(min(MOST_LIST, int.from_bytes(length, "little")))
        if (found := CRC.search(head)) and text in head:
            first = head[: found.start()], PLACEHOLDER, head[found.end() :]
            total = 0
            for part in chain(first, iter(lambda: file.read(1 << 20), b"")):
                total = zlib.crc32(part, total)
            return total == int(found[1], 16)
    return False
