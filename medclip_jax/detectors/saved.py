"""The trained detector on disk: what prediction needs when the supports' files are gone.

scorer.safetensors holds its parameters, scorer.json settings, thresholds and digests; neither a
pixel or a file name. They are believed when digest, types and ranges are right (stored.DETECTOR).
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from medclip_jax import __version__, config, files, stored
from medclip_jax.detectors import anomaly_maps
from medclip_jax.detectors.calibration import Calibration, PixelThreshold, Threshold
from medclip_jax.detectors.detector import Detector
from medclip_jax.errors import ConfigError, WorkdirError, one_line

FORMAT = 6
MOST_BYTES = 8 << 30  # of the parameters: the memory of thousands of supports
MOST_SETTINGS = 16 << 20  # bytes
MOST_PARTS = 20  # of a tensor's name; ours have six
TENSORS, SETTINGS = "scorer.safetensors", "scorer.json"


class Stored(NamedTuple):
    """A detector as it lies in a workdir."""

    params: Any
    calibration: Calibration
    config: ConfigDict  # resolved
    checkpoint: str  # digest of the CLIP that it belongs to
    language: str  # digest of the language adapter, "" for none
    supports: list[str]  # SHA-256 of each
    digest: str  # 16 hex digits that name this detector


def write(
    workdir: Path,
    detector: Detector,
    calibration: Calibration,
    *,
    settings: dict[str, Any],
    checkpoint: str,
    language: str,
    supports: Sequence[str],
) -> None:
    """Write a detector into its workdir; each file appears whole, the settings last.

    Args:
        settings: resolved, in JSON's types; where things lay is left out.
        checkpoint: digest of the CLIP.
        language: digest of the language adapter, "" for none.
        supports: SHA-256 of the supports.

    Raises WorkdirError if they cannot be written.
    """
    tensors = flatten(detector.params)
    raw = save({name: np.array(value, order="C") for name, value in tensors.items()})
    files.write_bytes(workdir / TENSORS, raw)
    places = {"teacher": "", "cache": "", "data": settings["data"] | {"root": ""}}
    places["calibration"] = settings["calibration"] | {"extra": ""}
    sets = {x: [n.partition("=")[0] for n in settings["meta"][x]] for x in ("data", "sources")}
    places["meta"] = settings["meta"] | sets  # NAME of NAME=FOLDER
    head = {
        "format": FORMAT,
        "medclip-jax": __version__,
        "checkpoint": checkpoint,
        "language": language,
        "supports": list(supports),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "calibration": _plain(calibration),
        "config": settings | places,
    }
    files.write_json(workdir / SETTINGS, stored.sealed(files.plain(head)))


def read(workdir: str | Path) -> Stored:
    """The detector of a workdir. Raises WorkdirError if it is missing or damaged."""
    workdir = files.expanded(workdir)
    path = workdir / SETTINGS
    again = "run --mode evaluate with this workdir"
    try:
        head = stored.read_json(path, MOST_SETTINGS)
        old = head.get("format")
        if isinstance(old, int) and old != FORMAT:
            raise WorkdirError(
                f"{path} has format {stored.short(old)} and this version reads {FORMAT}: {again}"
            )
        stored.check_seal(head)
        stored.check(head, stored.DETECTOR)
        stored.check_file(workdir / TENSORS, MOST_BYTES)
        if files.sha256_of(workdir / TENSORS) != head["sha256"]:
            raise ValueError(f"{TENSORS} is not the file that it was written with")
        calibration = _calibration(head["calibration"])
        return Stored(
            unflatten(load_file(workdir / TENSORS)),
            calibration,
            config.restored(head["config"]),
            *(head["checkpoint"], head["language"], head["supports"], head["digest"]),
        )
    except FileNotFoundError as error:
        raise WorkdirError(
            f"{workdir} holds no trained detector ({Path(error.filename).name}: {error.strerror}): "
            "run --mode train with this workdir, or --mode evaluate if it was trained before"
        ) from None
    except (OSError, ValueError, SafetensorError, ConfigError) as error:
        raise WorkdirError(
            f"{path} or {TENSORS} in that folder is damaged ({one_line(error)}): {again}"
        ) from None


def digest_of_teacher(c: ConfigDict) -> str:
    """Names what config.teacher has learned; "" where none teaches. Raises as `read`."""
    if not (c.teacher and c.steps):
        return ""
    read(c.teacher)
    return files.sha256_of(files.expanded(c.teacher) / TENSORS)


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of dicts and tuples under names such as learned/model/adapters/[0]/kernel."""
    return {
        "/".join(str(getattr(part, "key", part)) for part in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(tensors: dict[str, np.ndarray]) -> Any:
    """The inverse of `flatten`; every sequence comes back as a tuple.

    Raises ValueError for names that `flatten` does not give.
    """
    tree: dict = {}
    for name, value in tensors.items():
        *parents, last = name.split("/")
        if len(parents) >= MOST_PARTS:
            raise ValueError(f"tensor {stored.short(name)} has more than {MOST_PARTS} parts")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"tensor {stored.short(name)} lies in another, or another in it")
        node[last] = value
    return _sequences(tree)


def _sequences(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    node = {name: _sequences(part) for name, part in node.items()}
    if node and all(name.startswith("[") for name in node):
        if missing := [i for i in range(len(node)) if f"[{i}]" not in node]:
            raise ValueError(f"a sequence of {len(node)} tensors has no number {missing[0]}")
        return tuple(node[f"[{i}]"] for i in range(len(node)))
    return node


def _plain(calibration: Calibration) -> dict[str, Any]:
    """In JSON's types; a step of the filter that is off may be infinite, which JSON cannot hold."""
    steps = {n: x for n, x in calibration.filter._asdict().items() if math.isfinite(x)}
    values = {"image": calibration.image._asdict(), "pixel": calibration.pixel._asdict()}
    return calibration._asdict() | values | {"filter": steps}


def _calibration(values: dict[str, Any]) -> Calibration:
    """Raises ValueError where the threshold is not within the scores that it is chosen from."""
    healthy, k, value = values["healthy"], values["k"], values["image"]["value"]
    if k > 1 and len(healthy) != k or k == 1 and not healthy:
        raise ValueError(f"calibration.healthy has {len(healthy)} scores of k = {k} images")
    if not min(healthy or [0.0]) <= value <= max(healthy or [0.0]):
        raise ValueError(f"calibration.image.value {value} is not within calibration.healthy")
    unknown = {"alpha_attained", "rate_attained"}  # null there is NaN
    parts: Any = (
        {n: math.nan if x is None and n in unknown else x for n, x in values[part].items()}
        for part in ("image", "pixel")
    )
    image, pixel = parts
    return Calibration(
        np.asarray(healthy, np.float64),
        Threshold(**image),
        values["scale"],
        PixelThreshold(**pixel),
        values["pixel_scale"],
        k,
        anomaly_maps.MapFilter(**values["filter"]),
        values["peak"],
    )
