"""A trained scorer as one file, and running it with jax and numpy alone.

The file is a zip: `manifest.json` (format, recipe, thresholds, SHA-256 of the rest), the compiled
scorer as StableHLO for cpu, cuda and tpu with any batch size, its weights, and a card. No pickle.
This module imports jax and numpy only; what writing needs is imported where it writes.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from medclip_jax import __version__, files
from medclip_jax.errors import CheckpointError, ConfigError

KIND, FORMAT = "medclip_jax scorer", 2
PLATFORMS = ("cpu", "cuda", "tpu")
MEMBERS = ("scorer.stablehlo", "weights.npz", "README.md")
MOST_BYTES = 8 << 30  # of all members, unpacked: a foreign file may promise anything
BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))


class Scores(NamedTuple):
    """As trained.Scores: score, p-value, decision, uncertainty [n], maps [n, s, s]."""

    score: np.ndarray
    p_value: np.ndarray
    alarm: np.ndarray
    uncertainty: np.ndarray
    maps: np.ndarray


class Exported:
    """A loaded file; call it with images. `manifest` holds recipe and thresholds."""

    def __init__(self, manifest: dict[str, Any], call, weights: list):
        self.manifest = manifest
        self._call = jax.jit(call)
        self._weights = weights

    def __call__(self, images) -> Scores:
        """Score images [n, h, w], or a list of [h, w], finite values in [0, 1], of any size."""
        size, mode = self.manifest["recipe"]["size"], self.manifest["recipe"]["fit"]
        frames = np.stack([fit(np.asarray(image, np.float32), size, mode) for image in images])
        raw, maps, passes = jax.device_get(self._call(self._weights, frames))
        found = self.manifest["calibration"]
        threshold, scale = found["threshold"], found["scale"]
        raw, healthy = raw.astype(np.float64), np.sort(found["healthy"])
        below = np.searchsorted(healthy, raw, side="left")
        p_value = (1 + len(healthy) - below) / (len(healthy) + 1)
        return Scores(
            unit(raw, threshold, scale),
            p_value if found["k"] > 1 else np.full(len(raw), np.nan),
            raw > threshold,
            unit(passes, threshold, scale).std(1),
            unit(maps, found["pixel_threshold"], found["pixel_scale"]),
        )


def load(path: str | Path) -> Exported:
    """Open an exported scorer. Raises CheckpointError for a foreign, damaged or newer file."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as held:
            if sum(i.file_size for i in held.infolist()) > MOST_BYTES:
                raise ValueError("it promises too many bytes")
            manifest = json.loads(held.read("manifest.json"))
            if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
                raise ValueError("it is not of this program")
            if manifest["format"] != FORMAT:
                raise CheckpointError(
                    f"{path} has format {manifest['format']} and this version reads {FORMAT}: "
                    "export it again or install the version that wrote it "
                    f"({manifest.get('medclip-jax')})"
                )
            parts = {name: held.read(name) for name in MEMBERS}
        for name, raw in parts.items():
            if hashlib.sha256(raw).hexdigest() != manifest["sha256"][name]:
                raise ValueError(f"{name} in it is not what was written")
        called = jax.export.deserialize(bytearray(parts[MEMBERS[0]])).call
        with np.load(io.BytesIO(parts[MEMBERS[1]]), allow_pickle=False) as arrays:
            weights = [arrays[f"w{i}"] for i in range(len(arrays.files))]
        return Exported(manifest, called, [jax.device_put(w) for w in weights])
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is not a whole exported scorer ({reason}): export it again"
        ) from None


def save(model: Any, path: str | Path) -> int:
    """Export a predictor into one file; returns its bytes.

    model: inference.predictor.Predictor. Raises ConfigError for one that needs more than JAX,
    WorkdirError if the file cannot be written.
    """
    from medclip_jax.detectors import map_filter

    if model.encoder.recipe:
        raise ConfigError(
            f"the run was trained with data.recipe {', '.join(model.encoder.recipe)}, which an "
            "exported file cannot carry: use --mode predict, or train without a recipe"
        )
    if model.calibration.filter != map_filter.Steps():
        raise ConfigError(
            "the run filters its maps (config.score.map_filter), which an exported file cannot: "
            "use --mode predict, or train without it"
        )
    run = _function(model)
    size = model.size
    batch = jax.export.symbolic_shape("n")[0]
    images = jax.ShapeDtypeStruct((batch, size, size), np.float32)
    closed = jax.make_jaxpr(run)(images)  # its constants become arguments, kept beside the code
    weights = [np.asarray(w) for w in closed.consts]

    def lifted(weights, images):
        return jax.core.eval_jaxpr(closed.jaxpr, weights, images)

    shapes = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights]
    code = jax.export.export(jax.jit(lifted), platforms=PLATFORMS)(shapes, images).serialize()
    packed = io.BytesIO()
    named: dict[str, Any] = {f"w{i}": w for i, w in enumerate(weights)}
    np.savez(packed, **named)
    parts = dict(zip(MEMBERS, (bytes(code), packed.getvalue(), _card(model).encode()), strict=True))
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "medclip-jax": __version__,
        "jax": jax.__version__,
        "recipe": {
            "size": size,
            "fit": model.fit,
            "range": [0, 1],
            "grey": True,
            "window": model.window,
        },
        "calibration": {
            "healthy": model.calibration.healthy,
            "threshold": model.calibration.image.value,
            "scale": model.calibration.scale,
            "pixel_threshold": model.calibration.pixel.value,
            "pixel_scale": model.calibration.pixel_scale,
            "k": model.calibration.k,
        },
        "alpha": model.calibration.image._asdict(),
        "scorer": model.digest,
        "checkpoint": model.about["checkpoint"],
        "sha256": {name: hashlib.sha256(raw).hexdigest() for name, raw in parts.items()},
    }
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("manifest.json", json.dumps(files.plain(manifest), indent=2))
        for name, raw in parts.items():
            archive.writestr(name, raw)
    files.write_bytes(path, held.getvalue())
    return len(held.getvalue())


def fit(pixels: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Into the tower frame as data.frame.fit does, without Pillow: antialiased bilinear.

    Raises ValueError for what is not a finite [h, w].
    """
    if pixels.ndim != 2 or not pixels.size or not np.isfinite(pixels).all():
        raise ValueError(f"an image of shape {pixels.shape}: give finite values [h, w] in [0, 1]")
    height, width = pixels.shape
    rows = columns = size
    if mode == "pad":
        scale = size / max(height, width)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    frame = np.zeros((size, size), np.float32)
    top, left = (size - rows) // 2, (size - columns) // 2
    inside = _weights(height, rows) @ (pixels @ _weights(width, columns).T)
    frame[top : top + rows, left : left + columns] = inside
    return frame


def unit(values: np.ndarray, threshold: float, width: float) -> np.ndarray:
    """calibrate.to_unit, which imports more than this module may."""
    values = np.asarray(values, np.float64)
    z = np.abs(values - threshold) / width
    return np.where(values > threshold, 1 - 0.5 / (1 + z), BELOW_HALF / (1 + z))


def _weights(old: int, new: int) -> np.ndarray:
    """[new, old] triangle filter as wide as a new pixel, rows summing to 1 (Pillow's BILINEAR)."""
    scale = old / new
    support = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    near = np.abs(np.arange(old) + 0.5 - centre[:, None]) / support
    weights = np.maximum(0, 1 - near)
    first = np.maximum((centre - support + 0.5).astype(int), 0)[:, None]
    last = np.minimum((centre + support + 0.5).astype(int), old)[:, None]
    at = np.arange(old)[None]
    weights *= (at >= first) & (at < last)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _function(model):
    """Images [n, s, s] -> raw scores [n], raw maps [n, s, s], raw scores of the passes [n, t]."""
    import jax.numpy as jnp

    from medclip_jax.clip import checkpoint
    from medclip_jax.detectors.detector import read_batch

    clip, dtype = model.encoder.clip, model.encoder.dtype
    seeds = jax.random.key_data(model.keys)  # keys themselves cannot be kept as arrays

    def run(images):
        how = dict(encoder=clip.image_encoder, mean=clip.mean, std=clip.std)
        tokens = checkpoint.encode_images(clip.vision, images, **how)
        stored = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), tokens)
        raw = read_batch(model.detector, stored, jax.random.wrap_key_data(seeds))
        return raw.image, raw.maps, raw.passes.image

    return run


def _card(model) -> str:
    about = model.about
    return "\n".join(
        (
            "# Exported medclip_jax detector",
            "",
            f"Method {about['method']} on {about['dataset']} ({about['modality']}), "
            f"K = {about['k']} healthy images, seed {about['seed']}.",
            f"CLIP {about['backbone']}.",
            "Grey images in [0, 1]; scores from 0.5 on are alarms.",
            f"{model.calibration.image.message}.",
            "",
            "Research software. Not a medical device; nothing it prints is a diagnosis.",
            "",
        )
    )
