"""Simulated medical images with exactly known lesions: ultrasound, brain MRI, chest X-ray.

For the first run, the tests and the ablations: a result on them says nothing about patients. Each
image has its own generator, seeded by (seed, modality, index): its healthy render differs from the
diseased one by the lesion (and its shadow or halo) alone.
"""

import json
import os
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from medclip_jax import files
from medclip_jax.data.phantom_anatomy import MODALITIES
from medclip_jax.errors import ConfigError, WorkdirError

MARKER = "phantom.json"  # written last, inside the folder: what is in it
VERSION = 1  # raise when the images of a seed change


def generate(
    modality: str,
    n: int,
    size: int | tuple[int, int],
    seed: int,
    lesion: Bool[np.ndarray, " n"] | float = 0.5,
) -> tuple[Float[np.ndarray, "n h w"], Bool[np.ndarray, "n h w"]]:
    """Images in [0, 1] and lesion masks, empty for healthy images.

    Args:
      n: images; image i depends on (modality, seed, i, size) only.
      size: side or (height, width), pixels, at least 32.
      lesion: which images are diseased, or which share of them (then sampled from the seed).
    """
    if modality not in MODALITIES:
        raise ConfigError(f"phantom modality is {modality!r}: use one of {', '.join(MODALITIES)}.")
    shape = (size, size) if isinstance(size, int) else size
    if min(shape) < 32:
        raise ConfigError(f"phantom size {shape} is too small: use at least 32 pixels a side.")
    if not isinstance(lesion, np.ndarray):
        order = np.random.default_rng([seed, 0xD1CE]).permutation(n)
        lesion = order < round(lesion * n)
    images, masks = np.zeros((n, *shape), np.float32), np.zeros((n, *shape), bool)
    for i, diseased in enumerate(lesion):
        rng = np.random.default_rng([seed, list(MODALITIES).index(modality), i])
        rendered = MODALITIES[modality](rng, shape)
        images[i] = rendered.diseased if diseased else rendered.healthy
        masks[i] = rendered.mask & diseased
    return images, masks


def write_folder(
    root: Path,
    modality: str,
    seed: int,
    size: int | tuple[int, int],
    n_train: int,
    n_test_good: int,
    n_test_lesion: int,
) -> Path:
    """A data set in the MVTec-AD layout, 8-bit PNG; returns `root`.

    train/good, test/good, test/lesion, ground_truth/lesion/<name>_mask.png. Written to a sibling
    folder and renamed when complete, so `root` is complete if it exists. Nothing is done if it
    already holds the same data set.

    Raises:
      WorkdirError: `root` holds anything else, or the disk refuses it.
    """
    root = Path(root)
    counts = {"train/good": n_train, "test/good": n_test_good, "test/lesion": n_test_lesion}
    settings = {"modality": modality, "seed": seed, "size": size, **counts, "version": VERSION}
    content = json.dumps(settings, sort_keys=True)
    if is_written(root, content):
        return root
    files.sweep(root.parent)
    with files.temporary_folder(root) as part, files.disk_errors(root):
        write_images(part, modality, seed, size, counts)
        (part / MARKER).write_text(content)
        try:
            os.rename(part, root)  # an empty folder is replaced
        except OSError:
            if not is_written(root, content):  # another process may have finished first
                raise
    return root


def is_written(root: Path, content: str) -> bool:
    """Whether `root` holds this very data set; WorkdirError if it holds something else."""
    marker = root / MARKER
    if marker.is_file() and marker.read_text() == content:
        return True
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise WorkdirError(f"{root} holds other data: name another folder or remove it.")
    return False


def write_images(root: Path, modality: str, seed: int, size, counts: dict[str, int]) -> None:
    """All images of the data set, numbered through; masks beside the diseased ones."""
    parts = [part for part, count in counts.items() for _ in range(count)]
    diseased = np.array([part.endswith("lesion") for part in parts], bool)
    images, masks = generate(modality, len(parts), size, seed, diseased)
    for folder in (*counts, "ground_truth/lesion"):
        (root / folder).mkdir(parents=True)
    for i, part in enumerate(parts):
        pixels = np.round(images[i] * 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / part / f"{i:04d}.png")
        if diseased[i]:
            mask = Image.fromarray(masks[i].astype(np.uint8) * 255)
            mask.save(root / "ground_truth/lesion" / f"{i:04d}_mask.png")
