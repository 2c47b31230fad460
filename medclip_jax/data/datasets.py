"""Data sets by name: where they lie, what is wrong with them, and their records."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from medclip_jax import files
from medclip_jax.config_validation import deforms, recipe_of
from medclip_jax.data import augmentation, chexpert, layouts, phantom, preprocessing
from medclip_jax.data.catalog import ABOUT, PRESETS, SETS, modality_kind
from medclip_jax.data.layouts import Record
from medclip_jax.data.near_duplicates import distinct
from medclip_jax.errors import ConfigError, DataError
from medclip_jax.io import read
from medclip_jax.io.nifti_header import files_of

LAYOUTS: dict[str, Callable[..., layouts.Layout]] = {
    "busi": layouts.busi,
    "folder": layouts.folder,
    "brain_mri": layouts.brain_mri,
    "chest_xray": layouts.chest_xray,
    "chexpert": chexpert.layout,
}
DOWNLOADABLE = ("busi",)
# Simulated sets of this package: modality and counts of train/good, test/good and test/lesion.
PHANTOMS = {f"phantom-{m}": (m, 32, 40, 40) for m in ("ultrasound", "mri", "xray")}
PHANTOM_SIZE = (224, 256)
LISTED = 10  # problems named in one message
COVERED = 0.75  # share of an image beyond which a mask looks inverted
CHUNK = 1024  # files handed to the threads at a time


def load(
    name: str,
    root: Path | None,
    cache: Path,
    k: int = 1,
    *,
    uncertain: str = "exclude",
    window: str = "",
) -> tuple[Record, ...]:
    """Records of a data set, in natural order of their ids.

    The first call for a state of the data decodes every image and mask once, hashes the images
    and stores the list in `cache`; a changed, added or removed file makes a new list.

    Args:
      name: one of LAYOUTS ("folder" is the MVTec-AD layout), of catalog.SETS (in that layout) or of
        PHANTOMS (simulated on first use).
      root: where the data lie; None takes $MEDCLIP_DATA, and failing that BUSI is downloaded.
      cache: folder for prepared lists and downloads.
      k: healthy images that will be needed; fewer is listed with the other problems.
      uncertain: what CheXpert's label -1 means, one of chexpert.UNCERTAIN.
      window: CT window that the records are read with, see io.read.

    Raises:
      ConfigError: unknown name or meaning.
      DataError: no data there, the download failed, or all problems of the data together.
      WorkdirError: `cache` cannot be written.
    """
    from medclip_jax.data import tfds_builders  # imports tensorflow_datasets, too slow for --help

    name, layout = find(name, root, cache, uncertain)
    wrong = problems(layout, k)
    if not tfds_builders.prepared(name, layout, cache):
        results = examine(layout, window)
        wrong += tuple(result for result in results if isinstance(result, str))
        strange, useless = masks_of(layout.examples, results)
        wrong += useless
        for subject, names in strange.items():
            logging.warning(
                "%s: %d x %s: %s", layout.root, len(names), subject, ", ".join(names[:LISTED])
            )
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise DataError(
            f"{layout.root}: {len(wrong)} problem(s) found, fix these first: "
            f"{'; '.join(wrong[:LISTED])}{more}."
        )
    return tuple(r._replace(window=window) for r in tfds_builders.records(name, layout, cache))


def find(
    name: str, root: Path | None, cache: Path, uncertain: str = "exclude"
) -> tuple[str, layouts.Layout]:
    """Name of its layout, and the data set as listed, no image opened; see `load`.

    The layout of a phantom and of catalog.SETS is "folder".
    """
    if name not in (known := (*LAYOUTS, *SETS, *PHANTOMS)):
        raise ConfigError(f"config.data.name is '{name}': give one of {', '.join(known)}.")
    if name in PHANTOMS:
        modality, *counts = PHANTOMS[name]
        root = phantom.write_folder(cache / name, modality, 0, PHANTOM_SIZE, *counts)
        name = "folder"
    if root is None and (variable := os.environ.get("MEDCLIP_DATA")):
        root = files.expanded(variable)
    if root is None and name in DOWNLOADABLE:
        from medclip_jax.data import tfds_builders

        root = tfds_builders.fetch_busi(cache)
    if root is None:
        by_hand = ABOUT[name].by_hand if name in ABOUT else ""
        by_hand = f" ({by_hand.rstrip('.')})" if by_hand else ""
        raise DataError(f"no folder was named for '{name}': {layouts.GIVE_ROOT}{by_hand}.")
    root = files.expanded(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: {layouts.GIVE_ROOT}.")
    if name in SETS:
        inner = root / "sets" / name, root / name
        name, root = "folder", next((x for x in inner if x.is_dir()), root)
    return name, LAYOUTS[name](root, *([uncertain] if name == "chexpert" else []))


def extra(
    folder: Path, split: layouts.Split, alpha: float, window: str, cache: Path | None = None
) -> tuple[Record, ...]:
    """Healthy images of config.calibration.extra, for a false-alarm rate of alpha.

    Near-duplicates of supports, of test images and of one another are left out, with a warning.

    Raises DataError for what cannot be read, one that is a support or tested, or too few images.
    """
    records = healthy_folder(folder, window)
    others = {r.sha256: f"the support {r.id}" for r in split.support}
    others |= {r.sha256: f"the test image {r.id}" for r in split.test}
    for path, what in ((r.path, others.get(r.sha256)) for r in records):
        if what:
            raise DataError(f"{path} of config.calibration.extra is {what}: take it out")
    kept = distinct(records, (*split.support, *split.test), cache)
    if copies := len(records) - len(kept):
        logging.warning(
            "%d of the %d images of config.calibration.extra are near-duplicates of supports, of "
            "test images or of one another and are left out",
            *(copies, len(records)),
        )
    needed = max(2, math.ceil(1 / alpha - 1 - 1e-9))
    if len(kept) < needed:
        raise DataError(
            f"config.calibration.extra, {folder}, holds {len(kept)} healthy images: a "
            f"false-alarm rate of {alpha:g} needs {needed} or more"
        )
    return tuple(kept)


def healthy_folder(folder: Path, window: str = "") -> list[Record]:
    """The images of a folder, all healthy; DataError for what is missing or cannot be used."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: give one of healthy images.")
    layout = layouts.healthy(folder)

    def record(path: Path, image: Any, covered: Any) -> Record:
        name = path.relative_to(folder).as_posix()
        digest = files.sha256_of(*files_of(path))
        return Record(name, 0, "", path.absolute(), (), digest, window=window)

    results = examine(layout, window, record)
    if wrong := [*layout.problems, *(x for x in results if isinstance(x, str))]:
        raise DataError(f"{folder}: {len(wrong)} problem(s) found: {'; '.join(wrong[:LISTED])}.")
    return layouts.unique(results)


def problems(layout: layouts.Layout, k: int = 1) -> tuple[str, ...]:
    """What is wrong with the names: masks without image, images without mask, too few healthy."""
    has_parts = any(e.part for e in layout.examples)
    healthy = sum(e.label == 0 and (e.part == "train" or not has_parts) for e in layout.examples)
    if healthy >= k:
        return layout.problems
    return (*layout.problems, f"only {healthy} healthy images where K = {k} are needed")


def masks_of(
    examples: Sequence[layouts.Example], covered: Sequence[Any]
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """What is strange about masks, with the files; and what makes them useless.

    Args:
      covered: share of each image that its masks cover; anything else where that is not known.
    """
    known = [(e, c) for e, c in zip(examples, covered, strict=True) if isinstance(c, float)]
    lesions = [(e, c) for e, c in known if e.label]
    files = {
        "empty mask of an abnormal image": [e.masks[0] for e, c in lesions if c == 0],
        "mask of nearly the whole image (inverted?)": [e.masks[0] for e, c in known if c > COVERED],
        "mask of a healthy image that is not empty": [
            e.masks[0] for e, c in known if c and not e.label
        ],
    }
    useless: tuple[str, ...] = ()
    if lesions and not any(c for _, c in lesions):
        first = lesions[0][0].masks[0]
        useless = (f"all {len(lesions)} masks of abnormal images are empty, first {first}",)
    return {subject: names for subject, names in files.items() if names}, useless


def examine(
    layout: layouts.Layout, window: str = "", look: Callable[..., Any] = lambda *args: args[2]
) -> list[Any]:
    """`look(path, image, covered)` of every image, all decoded with their masks once, on threads.

    covered is the share of the image that its masks cover, None without a mask.

    What cannot be read, has several frames or another size than its mask gives a sentence instead.
    """

    def one(example: layouts.Example) -> Any:
        path = layout.root / example.id
        try:
            frames = read.read(path, window=window).pixels
            if len(frames) != 1:
                return f"{path} holds {len(frames)} frames where one image is needed"
            masks = [layout.root / mask for mask in example.masks]
            lesion = read.read_mask(masks, frames.shape[1:], path)
        except DataError as error:
            return str(error).rstrip(".")
        return look(path, frames[0], float(lesion.mean()) if masks else None)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(layout.examples), CHUNK)  # or all the files would wait at once
        parts = (layout.examples[i : i + CHUNK] for i in starts)
        return [result for part in parts for result in pool.map(one, part)]


class Auxiliary(NamedTuple):
    """A dataset whose images are trained on beside the target's, with its own words."""

    name: str
    root: Path | None  # None: where the data lie by default
    words: dict[str, Any]  # modality, anatomy and conditions, for the prompts
    recipe: tuple[str, ...]  # preprocessing.STEPS
    strengths: augmentation.Strengths
    window: str  # of CT: the target's for a dataset without words of its own


def auxiliary(
    field: str,
    names: Sequence[str],
    words: dict[str, Any],
    *,
    recipe: str,
    strengths: augmentation.Strengths,
    window: str,
    default_root: Path | None = None,
    other_modality: bool = False,
) -> tuple[Auxiliary, ...]:
    """The datasets that config.meta.<field> names, "name" or "name=folder".

    What each shows is in data/catalog.py; one that is not there (a folder) takes the target's words
    and CT window, and a warning says so. Where the target is preprocessed, each takes the recipe of
    its own modality. Elastic deformation is off for modalities that must not be deformed, with a
    warning.

    Args:
      words: modality, anatomy and conditions of the target; recipe, strengths, window: its too.
      other_modality: each must be of another modality than the target.

    Raises:
      ConfigError: an unknown name, one that is there twice, or one of the target's modality.
    """
    named, known, chosen = PRESETS | SETS, (*LAYOUTS, *SETS, *PHANTOMS), []
    for full in names:
        name, _, root = full.partition("=")
        if name not in known:
            raise ConfigError(
                f"config.meta.{field} has {full!r}: choose any of {', '.join(known)}."
            )
        own, own_recipe, changes = dict(named.get(name, words)), recipe, strengths
        if other_modality and modality_kind(own["modality"]) == modality_kind(words["modality"]):
            raise ConfigError(
                f"config.meta.{field} has {full!r}, which shows {own['modality']!r}, and the "
                f"target {words['modality']!r}: a target's modality is never learned from, so "
                "leave it out"
            )
        if name not in named:
            logging.warning(
                "%s of config.meta.%s has no words of its own: it takes the target's, "
                "whose modality is %r",
                *(full, field, words["modality"]),
            )
        elif recipe:
            own_recipe = recipe_of(own["modality"])
        if strengths.elastic and not deforms(own["modality"]):
            logging.warning(
                "config.augment.elastic is off for %s, whose modality is %r: only ultrasound and "
                "MRI may be deformed",
                *(full, own["modality"]),
            )
            changes = strengths._replace(elastic=0.0)
        place = files.expanded(root) if root else default_root
        steps, reading = preprocessing.steps(own_recipe), "" if name in named else window
        chosen.append(Auxiliary(name, place, own, steps, changes, reading))
    if len({(other.name, other.root) for other in chosen}) < len(chosen):
        raise ConfigError(f"config.meta.{field} has a data set twice: give each once")
    return tuple(chosen)
