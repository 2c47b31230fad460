"""A trained detector with its encoder as one file, and running it with jax and numpy alone.

The file is a zip: `manifest.json` (format, recipe, thresholds, SHA-256 of the rest), the compiled
program as StableHLO for cpu, cuda and tpu with any batch size, its weights, and a card. No pickle.
This module imports jax and numpy only; what writing needs is imported where it writes.
"""

import hashlib
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax.export
import numpy as np

from medclip_jax import __version__, files, stored
from medclip_jax.errors import CheckpointError, ConfigError, DataError, WorkdirError, one_line

KIND, FORMAT = "medclip_jax detector", 3
PLATFORMS = ("cpu", "cuda", "tpu")
MEMBERS = ("detector.stablehlo", "weights.npz", "README.md")
# a foreign file may promise anything: bytes of manifest and card, program and weights that are read
MOST_TEXT, MOST_PROGRAM, MOST_WEIGHTS = 1 << 20, 1 << 26, 1 << 33
HEADER = 4096  # bytes at most of an array's head and entry, and of the file's list of members
BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))


class Scores(NamedTuple):
    """As the fields of detector.BatchScores: [n] each, maps [n, s, s]."""

    score: np.ndarray
    p_value: np.ndarray
    alarm: np.ndarray
    uncertainty: np.ndarray
    maps: np.ndarray


class Exported:
    """A loaded file; call it with images. `manifest` holds recipe and thresholds."""

    def __init__(self, manifest: dict[str, Any], call, weights: list):
        self.manifest, self._call, self._weights = manifest, jax.jit(call), weights

    def __call__(self, images) -> Scores:
        """Scores of [n, h, w], or a list of [h, w], values in [0, 1]; DataError for all else."""
        if not np.iterable(images) or not len(images := [*images]):
            raise DataError("no image to score: give [n, h, w], or a list of [h, w]")
        size, mode = self.manifest["recipe"]["size"], self.manifest["recipe"]["fit"]
        frames = np.stack([fit(image, size, mode) for image in images])
        raw, maps, passes = jax.device_get(self._call(self._weights, frames))
        calibration = self.manifest["calibration"]
        threshold, scale = calibration["threshold"], calibration["scale"]
        raw, healthy = raw.astype(np.float64), np.sort(calibration["healthy"])
        how = calibration["k"], self.manifest["alpha"]["bound"] is not None
        return Scores(
            unit(raw, threshold, scale),
            p_values(raw, healthy, *how),
            raw > threshold,
            unit(passes, threshold, scale).std(1),
            unit(maps, calibration["pixel_threshold"], calibration["pixel_scale"]),
        )


def load(path: str | Path) -> Exported:
    """Open an exported file. Raises CheckpointError for a foreign, damaged or newer file."""
    path = files.expanded(path)
    try:
        manifest, code, weights = _members(path)
        return Exported(manifest, code.call, [jax.device_put(w) for w in weights])
    except CheckpointError:
        raise
    except Exception as error:  # flatbuffers, MLIR and zipfile raise many types on damaged bytes
        raise CheckpointError(
            f"{path} is not a whole exported detector ({one_line(error)[:200]}): export it again"
        ) from None


def _members(path: Path) -> tuple[dict[str, Any], Any, list[np.ndarray]]:
    """Manifest, program and weights: each is read once all before it say that it may be."""
    stored.check_file(path, MOST_WEIGHTS)
    with path.open("rb", buffering=0) as file, stored.open_zip(file) as archive:
        manifest = stored.parse_json(_member(archive, "manifest.json", MOST_TEXT))
        if manifest.get("kind") != KIND:
            raise ValueError("it is not of this program")
        old = manifest.get("format")
        if isinstance(old, int) and old != FORMAT:
            raise CheckpointError(
                f"{path} has format {stored.short(old)} and this version reads {FORMAT}: "
                "export it again or install the version that wrote it"
            )
        if sorted(archive.namelist()) != sorted(("manifest.json", *MEMBERS)):
            raise ValueError("its members are not those of an exported detector")
        stored.check_seal(manifest)
        stored.check(manifest, stored.EXPORTED)
        for name in MEMBERS:  # piece by piece
            with archive.open(name) as member:
                digest = hashlib.file_digest(cast(Any, member), "sha256").hexdigest()
            if digest != manifest["sha256"][name]:
                raise ValueError(f"{name} in it is not what was written")
        code = jax.export.deserialize(bytearray(_member(archive, MEMBERS[0], MOST_PROGRAM)))
        wanted = _arguments(code, manifest["recipe"]["size"])
        code.mlir_module()  # or a damaged program would be an error of the first image
        most = sum(math.prod(x.shape) * x.dtype.itemsize + HEADER for x in wanted) + HEADER
        if most > MOST_WEIGHTS:
            raise ValueError("its program wants more weights than are read")
        return manifest, code, _arrays(_member(archive, MEMBERS[1], most), wanted)


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A member of at most so many bytes."""
    with archive.open(name) as member:
        raw = member.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{name} in it has more than {most} bytes")
    return raw


def _arguments(code: Any, size: int) -> list[Any]:
    """Shapes and types of the weights that a program wants, images [n, size, size] after them."""
    error = ValueError("its program does not take and give what an exported detector does")
    if not code.in_avals or len(code.out_avals) != 3:
        raise error
    *weights, images = code.in_avals
    raw, maps, passes = code.out_avals
    n = images.shape[:1]
    fits = images.shape[1:] == (size, size) and images.dtype == np.float32
    fits = fits and raw.shape == n and maps.shape == (*n, size, size) and len(passes.shape) == 2
    if not (fits and all(isinstance(side, int) for x in weights for side in x.shape)):
        raise error
    return weights


def _arrays(raw: bytes, wanted: list[Any]) -> list[np.ndarray]:
    """w0, w1, ... of an npz file, all finite."""
    arrays = stored.read_npz(io.BytesIO(raw), len(raw))
    if list(arrays) != [f"w{i}" for i in range(len(wanted))]:
        raise ValueError("its weights are not those that its program wants")
    for array, want in zip(arrays.values(), wanted, strict=True):
        if (array.shape, array.dtype) != (want.shape, want.dtype):
            raise ValueError("its program does not fit its weights and its recipe")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise ValueError("a weight of it is not a finite number")
    return list(arrays.values())


def save(predictor: Any, path: str | Path) -> int:
    """Export an inference.predictor.Predictor into one file; returns its bytes.

    Raises ConfigError for one that needs more than JAX, WorkdirError if the file cannot be written.
    """
    from medclip_jax.detectors.anomaly_maps import MapFilter

    path = Path(path)
    if path.exists() and not path.is_file():  # before the work; a device would be replaced
        raise WorkdirError(f"{path} is a folder or no regular file: give the name of a file")
    calibration = predictor.calibration
    used = {  # what the program has no place for
        "data.recipe": bool(predictor.encoder.recipe),
        "score.map_filter": calibration.filter != MapFilter(),
        "score.tiles": predictor.tiles > 1,
    }
    if fields := [f"config.{name}" for name, on in used.items() if on]:
        raise ConfigError(
            f"the run was trained with {', '.join(fields)}, which an exported file cannot carry: "
            "use --mode predict, or train without"
        )
    (code, weights), packed = _program(predictor), io.BytesIO()
    files.write_npz(packed, {f"w{i}": w for i, w in enumerate(weights)})
    parts = dict(zip(MEMBERS, (code, packed.getvalue(), _card(predictor).encode()), strict=True))
    recipe = {"size": predictor.size, "fit": predictor.fit, "window": predictor.window}
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "medclip-jax": __version__,
        "jax": jax.__version__,
        "recipe": recipe | {"range": [0, 1], "grey": True},
        "calibration": {
            "healthy": calibration.healthy,
            "threshold": calibration.image.value,
            "scale": calibration.scale,
            "pixel_threshold": calibration.pixel.value,
            "pixel_scale": calibration.pixel_scale,
            "k": calibration.k,
        },
        "alpha": calibration.image._asdict(),
        "detector": predictor.digest,
        "checkpoint": predictor.about["checkpoint"],
        "sha256": {name: hashlib.sha256(raw).hexdigest() for name, raw in parts.items()},
    }
    text = json.dumps(stored.sealed(files.plain(manifest)), indent=2)
    whole, parts = io.BytesIO(), {"manifest.json": text.encode(), **parts}
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, raw in parts.items():  # without the time of day
            archive.writestr(zipfile.ZipInfo(name), raw, zipfile.ZIP_DEFLATED, 1)
    files.write_bytes(path, whole.getvalue())
    return len(whole.getvalue())


def fit(pixels: Any, size: int, mode: str) -> np.ndarray:
    """Into the encoder frame as io.read.fit does, without Pillow: antialiased bilinear.

    Raises DataError for what is no [h, w] of values in [0, 1], but for rounding.
    """
    try:
        pixels = np.asarray(pixels, np.float32)
    except (TypeError, ValueError):  # text, or rows of several lengths
        raise DataError("an image that is no array: give finite values [h, w] in [0, 1]") from None
    if pixels.ndim != 2 or not pixels.size or not -1e-3 < pixels.min() <= pixels.max() < 1.001:
        raise DataError(f"an image of shape {pixels.shape}: give finite values [h, w] in [0, 1]")
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
    """calibration.to_unit, which imports more than this module may."""
    values = np.asarray(values, np.float64)
    z = np.abs(values - threshold) / width
    return np.where(values > threshold, 1 - 0.5 / (1 + z), BELOW_HALF / (1 + z))


def p_values(scores: np.ndarray, healthy: np.ndarray, k: int, steps: bool) -> np.ndarray:
    """calibration.p_values of ordered healthy scores; NaN for fewer than two images."""
    if k < 2:
        return np.full(len(scores), np.nan)
    below = np.searchsorted(healthy, scores, side="left")
    low, high = healthy[(upper := np.clip(below, 1, k - 1)) - 1], healthy[upper]
    share = (scores - low) / np.maximum(high - low, 1e-300) * (1 - 1e-9)
    return (1 + k - below - np.where((below % k == 0) | steps, 0, share)) / (k + 1)


def _weights(old: int, new: int) -> np.ndarray:
    """[new, old] triangle filter as wide as a new pixel, rows summing to 1 (Pillow's BILINEAR)."""
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(old) + 0.5 - centre[:, None]) / max(scale, 1.0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _program(predictor: Any) -> tuple[bytes, list[np.ndarray]]:
    """Images [n, s, s] -> raw scores [n], raw maps [n, s, s], raw scores of the passes [n, t].

    Its constants become arguments: the second result; bfloat16 as float32, as .npz has none.
    """
    from medclip_jax.clip import checkpoint
    from medclip_jax.clip.layers import narrowed
    from medclip_jax.detectors import calibration, detector

    clip, dtype = predictor.encoder.clip, predictor.encoder.dtype
    peak = predictor.calibration.peak
    seeds = jax.random.key_data(predictor.keys)  # keys themselves cannot be stored as arrays

    def run(images):
        how = dict(encoder=clip.image_encoder, mean=clip.mean, std=clip.std)
        tokens = checkpoint.encode_images(clip.vision, images, **how)
        stored = jax.tree.map(lambda x: x.astype(np.float32), narrowed(tokens, dtype))
        raw = detector.read_batch(predictor.detector, stored, jax.random.wrap_key_data(seeds))
        return raw.image, calibration.lowered(raw.maps, peak), raw.passes.image

    shape = (jax.export.symbolic_shape("n")[0], predictor.size, predictor.size)
    closed = jax.make_jaxpr(run)(images := jax.ShapeDtypeStruct(shape, np.float32))
    weights = [np.asarray(w, "f4" if w.dtype == "bfloat16" else None) for w in closed.consts]

    def lifted(weights, images):
        own = [w.astype(x.dtype) for w, x in zip(weights, closed.consts, strict=True)]
        return jax.core.eval_jaxpr(closed.jaxpr, own, images)

    shapes = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights]
    settings: Any = jax.config  # its fields appear when jax is imported: unknown to a type checker
    limit = settings.jax_traceback_in_locations_limit
    try:  # or the program would name the folders of this machine's sources
        jax.config.update("jax_traceback_in_locations_limit", 0)
        code = jax.export.export(jax.jit(lifted), platforms=PLATFORMS)(shapes, images).serialize()
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    return bytes(code), weights


def _card(predictor: Any) -> str:
    about = predictor.about
    return f"""# Exported medclip_jax detector

Method {about["method"]} on {about["dataset"]} ({about["modality"]}),
K = {about["k"]} healthy images, seed {about["seed"]}.
CLIP {about["backbone"]}.
Grey images in [0, 1]; scores from 0.5 on are alarms.
{predictor.calibration.image.message}.

Research software. Not a medical device; nothing it prints is a diagnosis.
"""
