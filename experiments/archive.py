"""Finished runs of a sweep in one small file: tables on any machine, and sweeps that go on there.

Of every run: settings, versions, the numbers that tables show, hashes of its supports, and id,
label, score (float32) and unit of every test image. Not its maps: pixel metrics have no intervals.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tables

from medclip_jax import files, stored
from medclip_jax.errors import UserError

ARRAYS = {"id": "S", "support": "S16", "label": "i1", "score": "f4", "unit": "i4"}  # and formats
SHARED = ("settings", "backbone", "versions")  # by many runs
MOST = 1 << 26  # bytes of an array


def write(path: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write runs by name, as `sweep.read` returns them; what runs share is written once."""
    listed, shared, arrays = {}, {}, {}
    for name, run in runs.items():
        same = {x: run[x] for x in SHARED}
        own = {x: encoded(run[x], kind) for x, kind in ARRAYS.items() if x in run}
        places = {x: stored.digest([x, y.dtype.str, y.tobytes().hex()]) for x, y in own.items()}
        arrays |= {places[x]: y for x, y in own.items()}
        shared[place := stored.digest(same)] = same
        values = {metric: tables.value(run, metric) for metric in tables.METRICS}
        numbers = {metric: x for metric, x in values.items() if np.isfinite(x)}
        listed[name] = {"seed": run["seed"], "shared": place, "arrays": places, "numbers": numbers}
    text = json.dumps({"runs": listed, "shared": shared}, sort_keys=True, allow_nan=False)
    file = io.BytesIO()
    np.savez(file, list=np.frombuffer(text.encode(), np.uint8), **arrays)
    files.write_bytes(path, file.getvalue())


def encoded(values: Any, kind: str) -> np.ndarray:
    """An array in its format in the file."""
    return np.char.encode(values, "utf-8") if kind == "S" else np.asarray(values).astype(kind)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The runs of such a file by name, as `sweep.read` returns them.

    Raises:
      UserError: it is no such file.
    """
    try:
        with path.open("rb", buffering=0) as file:
            arrays = stored.read_npz(file, MOST)
        whole = stored.parse_json(arrays.pop("list").tobytes())
        return {name: decoded(run, whole["shared"], arrays) for name, run in whole["runs"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        raise UserError(
            f"--archive {path}: this is no file of runs (runs.npz of a sweep's --out): {e}"
        ) from None


def decoded(run: Mapping, shared: Mapping, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One run of the file."""
    result = {"seed": run["seed"], "pixel_counts": lambda: None} | shared[run["shared"]]
    result |= {x: arrays[place] for x, place in run["arrays"].items()}
    for x in [x for x in ("id", "support") if x in result]:
        result[x] = np.char.decode(result[x], "utf-8")
    if "support" in result:
        result["support"] = result["support"].tolist()
    for metric, number in run["numbers"].items():
        *groups, last = tables.METRICS[metric]
        place = result
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = float(number)
    return result
