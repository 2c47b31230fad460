"""The trained scorer on disk: what prediction needs when the supports' files are gone.

  scorer.safetensors   params of the scoring copy; for `memory` the supports' tokens
  scorer.json          format, settings, thresholds, digests (also of the file above)

Both are written at the end of training and of evaluation, and hold no pixel and no file name.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from medclip_jax import __version__, files
from medclip_jax.clip import text_adapter
from medclip_jax.clip.outputs import Features
from medclip_jax.detectors import calibration, ensemble, map_filter
from medclip_jax.detectors.limits import Limits
from medclip_jax.errors import WorkdirError
from medclip_jax.features import cache

FORMAT = 2
TENSORS, SETTINGS = "scorer.safetensors", "scorer.json"


class Stored(NamedTuple):
    """A scorer as it lies in a workdir."""

    params: Any  # the scoring copy, without its leading axis
    tokens: Features | None  # of the supports, where the method compares with them
    limits: Limits
    config: dict[str, Any]  # resolved
    checkpoint: str  # digest of the CLIP that it belongs to
    digest: str  # 16 hex digits that name this scorer
    mix: ensemble.Mix | None
    k: int  # supports
    steps: map_filter.Steps | None = None  # outlier suppression of the maps, None: off
    language: str = ""  # language.digest of the adapter, "" for none


def write(
    workdir: Path,
    c,
    feature_cache: cache.FeatureCache,
    params: Any,
    supports,
    limits: Limits,
    mix,
    quiet=None,
) -> None:
    """Keep a scorer in its workdir; each file appears whole, the settings last.

    params: [1 + folds, ...] as fit.run leaves it; copy 0 is kept. mix: fusion.Mix or None.
    quiet: suppress.Learned or None.
    Raises WorkdirError if they cannot be written.
    """
    tensors = flatten(jax.tree.map(lambda x: np.asarray(x)[0], params), "params")
    if supports and remembers(c):
        (tokens,) = cache.load_images(feature_cache, supports, len(supports))
        tensors |= flatten(tokens._replace(inputs=())._asdict(), "tokens")
    settings = json.loads(c.to_json_best_effort())
    settings["teacher"] = ""
    settings["cache"] = settings["data"]["root"] = ""  # where things lay is not needed
    raw = save({name: np.array(value, order="C") for name, value in tensors.items()})
    files.write_bytes(workdir / TENSORS, raw)
    head = {
        "format": FORMAT,
        "medclip-jax": __version__,
        "checkpoint": feature_cache.clip.digest,
        "language": text_adapter.digest(c.model.language),
        "supports": [r.sha256 for r in supports],
        "sha256": hashlib.sha256(raw).hexdigest(),
        "limits": {
            "healthy": limits.healthy,
            "image": limits.image._asdict(),
            "image_width": limits.image_width,
            "pixel": limits.pixel._asdict(),
            "pixel_width": limits.pixel_width,
        },
        "k": len(supports),
        "mix": None if mix is None else mix._asdict(),
        "suppress": None if quiet is None else _finite(quiet.steps),
        "config": settings,
    }
    files.write_json(workdir / SETTINGS, head)


def read(workdir: Path) -> Stored:
    """The scorer of a workdir. Raises WorkdirError if it is missing, damaged or of another version.

    A file that was changed or is of another run is refused by its hash.
    """
    path = workdir / SETTINGS
    try:
        text, raw = path.read_bytes(), (workdir / TENSORS).read_bytes()
    except OSError as error:
        raise WorkdirError(
            f"{workdir} holds no trained scorer ({Path(error.filename).name}: {error.strerror}): "
            "run --mode train with this workdir, or --mode evaluate if it was trained before"
        ) from None
    try:
        head = json.loads(text)
        if head["format"] != FORMAT:
            raise WorkdirError(
                f"{path} has format {head['format']} and this version reads {FORMAT}: "
                "run --mode evaluate with this workdir"
            )
        if hashlib.sha256(raw).hexdigest() != head["sha256"]:
            raise ValueError(f"{TENSORS} is not the file it was written with")
        tree = unflatten(load(raw))
        limits = _limits(head["limits"])
        held = tree.get("tokens")
        tokens = Features(held["pooled"], tuple(held["levels"])) if held else None
        digest = hashlib.sha256(text).hexdigest()[:16]
        named = head["config"], head["checkpoint"], digest, _mix(head["mix"]), head["k"]
        steps = head.get("suppress")  # files of before have none
        steps = None if steps is None else map_filter.Steps(**steps)
        return Stored(tree["params"], tokens, limits, *named, steps, head.get("language", ""))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkdirError(
            f"{path} or {TENSORS} beside it is damaged ({error}): "
            "run --mode evaluate with this workdir"
        ) from None


def remembers(c) -> bool:
    """Whether scoring compares with the supports' own tokens."""
    return c.method == "memory" or (c.method in ensemble.METHODS and "memory" in c.branches)


def _finite(steps: map_filter.Steps) -> dict[str, float]:
    """The steps without clipping that is off, which JSON cannot hold."""
    return {name: x for name, x in steps._asdict().items() if np.isfinite(x)}


def _mix(held: dict[str, Any] | None) -> ensemble.Mix | None:
    if held is None:
        return None
    arrays = {name: np.asarray(x) for name, x in held.items() if name != "names"}
    return ensemble.Mix(tuple(held["names"]), **arrays)


def flatten(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """Leaves of dicts and tuples under names such as params/adapters/[0]/kernel."""
    if isinstance(tree, dict):
        parts = list(tree.items())
    elif isinstance(tree, list | tuple):
        parts = [(f"[{i}]", x) for i, x in enumerate(tree)]
    else:
        return {prefix: np.asarray(tree)}
    return {n: x for name, part in parts for n, x in flatten(part, f"{prefix}/{name}").items()}


def unflatten(tensors: dict[str, np.ndarray]) -> Any:
    """The inverse of `flatten`; every sequence comes back as a tuple."""
    tree: dict = {}
    for name, value in tensors.items():
        *way, last = name.split("/")
        place = tree
        for step in way:
            place = place.setdefault(step, {})
        place[last] = value

    def sequences(node):
        if not isinstance(node, dict):
            return node
        node = {name: sequences(part) for name, part in node.items()}
        if node and all(name.startswith("[") for name in node):
            return tuple(node[f"[{i}]"] for i in range(len(node)))
        return node

    return sequences(tree)


def _limits(held: dict[str, Any]) -> Limits:
    return Limits(
        np.asarray(held["healthy"], np.float64),
        calibration.Threshold(**held["image"]),
        held["image_width"],
        calibration.PixelThreshold(**held["pixel"]),
        held["pixel_width"],
    )
