"""TFDS builders, free of TensorFlow: they yield names and hashes, never arrays.

Importing this module imports tensorflow_datasets (half a second): callers do so inside functions.
"""

import contextlib
import hashlib
import io
import logging
import os
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from medclip_jax.data import chexpert, layouts
from medclip_jax.data.catalog import ABOUT, About
from medclip_jax.data.records import Record
from medclip_jax.errors import DataError, WorkdirError
from medclip_jax.io.image import reason

BATCH = 1024  # rows read at a time
STALE = 86400  # seconds
BUSI_URL = "https://scholar.cu.edu.eg/Dataset_BUSI.zip"


class Info(tfds.core.DatasetInfo):
    """What TFDS keeps of a data set, made from the data alone."""

    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS would ask a server of its makers, and leave a folder in /tmp each time."""


class PathBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builder over a listed layout; its examples hold paths below `layout.root`.

    Without a layout, the files that were fetched by hand are listed.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.1.0": "Paths, labels, patients and SHA-256 of the image files."}
    ABOUT: About
    list_files: ClassVar[Callable[[Path], layouts.Layout]]

    def __init__(self, *, layout: layouts.Layout | None = None, **kwargs: Any):
        self.layout = layout
        super().__init__(file_format="array_record", **kwargs)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        layout = self.layout or type(self).list_files(self.fetch(dl_manager))
        return {"full": self._generate_examples(layout)}

    def fetch(self, dl_manager: tfds.download.DownloadManager) -> Path:
        return Path(dl_manager.manual_dir)

    def _generate_examples(self, layout: layouts.Layout) -> Iterator[tuple[str, dict[str, Any]]]:
        for example in layout.examples:
            fields = example._asdict() | {"masks": list(example.masks), "image": example.id}
            yield example.id, fields | {"sha256": _sha256(layout.root / example.id)}

    def _info(self) -> tfds.core.DatasetInfo:
        text, about = tfds.features.Text, self.ABOUT
        features = {
            "id": text(doc="Path of the image below the root; unique."),
            "label": tfds.features.ClassLabel(names=["healthy", "abnormal"]),
            "kind": text(doc="The data set's own class."),
            "part": text(doc="train, test, or empty where the data set has no parts."),
            "image": text(doc="Path of the image below the root."),
            "masks": tfds.features.Sequence(text(doc="Path below the root.")),
            "patient": text(doc="Whose image; empty where the data set does not say."),
            "sha256": text(doc="Of the image file's bytes, hexadecimal."),
        }
        return Info(
            builder=self,
            description=f"{about.description} Licence: {about.licence}.",
            homepage=about.homepage,
            citation=about.citation,
            license=about.licence,
            features=tfds.features.FeaturesDict(features),
        )


class Busi(PathBuilder):
    """Breast Ultrasound Images: 437 benign, 210 malignant, 133 normal."""

    ABOUT, list_files = ABOUT["busi"], layouts.busi

    def fetch(self, dl_manager: tfds.download.DownloadManager) -> Path:
        return fetch(dl_manager)


class BrainMri(PathBuilder):
    """Brain MRI slices: 98 without and 155 with a tumour."""

    ABOUT, list_files = ABOUT["brain_mri"], layouts.brain_mri
    MANUAL_DOWNLOAD_INSTRUCTIONS = ABOUT.by_hand


class ChestXray(PathBuilder):
    """Chest films of children: healthy or pneumonia."""

    ABOUT, list_files = ABOUT["chest_xray"], layouts.chest_xray
    MANUAL_DOWNLOAD_INSTRUCTIONS = ABOUT.by_hand


class Chexpert(PathBuilder):
    """Frontal chest films with labels taken from reports."""

    ABOUT, list_files = ABOUT["chexpert"], chexpert.layout
    MANUAL_DOWNLOAD_INSTRUCTIONS = ABOUT.by_hand


class FolderAD(PathBuilder):
    """A user's own images in the MVTec-AD layout; nothing to download."""

    ABOUT, list_files = ABOUT["folder"], layouts.folder
    MANUAL_DOWNLOAD_INSTRUCTIONS = layouts.GIVE_ROOT


BUILDERS: dict[str, type[PathBuilder]] = {
    "busi": Busi,
    "brain_mri": BrainMri,
    "chest_xray": ChestXray,
    "chexpert": Chexpert,
    "folder": FolderAD,
}


def fetch_busi(cache: Path) -> Path:
    """Download BUSI from its official address once; returns the unpacked folder."""
    make_folder(cache)
    logging.info("looking for BUSI in %s, else downloading it from %s", cache, BUSI_URL)
    with _quiet():
        return fetch(tfds.download.DownloadManager(download_dir=str(cache / "downloads")))


def fetch(dl_manager: tfds.download.DownloadManager) -> Path:
    """Download and unpack BUSI's zip archive once, else DataError.

    TFDS's own unpacking needs TensorFlow, so only the download is TFDS's.
    """
    by_hand = f"fetch it by hand, unpack it, and {layouts.GIVE_ROOT}"
    try:
        archive = Path(dl_manager.download(BUSI_URL))
    except Exception as error:  # requests, urllib3, ssl and TFDS each have their own
        raise DataError(
            f"{BUSI_URL} could not be downloaded ({reason(error)}): {by_hand}."
        ) from error
    unpacked = archive.with_suffix("")
    if not unpacked.is_dir():
        try:
            # beside the target, then renamed, so that half an archive is never used
            with tempfile.TemporaryDirectory(dir=archive.parent, prefix="unpacking.") as beside:
                with zipfile.ZipFile(archive) as opened:
                    opened.extractall(Path(beside, unpacked.name))
                os.replace(Path(beside, unpacked.name), unpacked)
        except (zipfile.BadZipFile, EOFError) as error:
            archive.unlink()  # or the broken download would be reused for ever
            raise DataError(f"{BUSI_URL} gave a broken archive ({error}): {by_hand}.") from error
    return unpacked


def prepared(name: str, layout: layouts.Layout, cache: Path) -> bool:
    """Whether this very state of the data was prepared before, completely."""
    place = _place(layout, cache) / BUILDERS[name].name / str(BUILDERS[name].VERSION)
    # TFDS writes into a folder of another name and renames it when it is complete
    return (place / "dataset_info.json").is_file()


def records(name: str, layout: layouts.Layout, cache: Path) -> tuple[Record, ...]:
    """Prepare the data set if needed and read its records, in natural order of ids."""
    place = _place(layout, cache)
    if not prepared(name, layout, cache):
        make_folder(place)
        for path in place.glob("*/incomplete.*"):  # left by preparations that were killed
            with contextlib.suppress(OSError):  # another process was faster
                if path.is_dir() and path.stat().st_mtime < time.time() - STALE:
                    shutil.rmtree(path, ignore_errors=True)
        with _quiet():
            try:
                BUILDERS[name](layout=layout, data_dir=str(place)).download_and_prepare()
            except Exception:
                if not prepared(name, layout, cache):  # else another process was quicker
                    raise
    with _quiet():
        source = BUILDERS[name](data_dir=str(place)).as_data_source(split="full")
        rows: list[dict[str, Any]] = []
        for i in range(0, len(source), BATCH):  # a batch bounds what is in memory undecoded
            rows += source.__getitems__(range(i, min(i + BATCH, len(source))))
    unsorted = (_record(row, layout.root) for row in rows)
    return tuple(sorted(unsorted, key=lambda record: layouts.natural(record.id)))


def make_folder(place: Path) -> None:
    """Make a cache folder. Raises WorkdirError if it cannot be made or written."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise WorkdirError(
            f"{place} cannot be written ({error.strerror}): give another cache folder."
        ) from error


def _place(layout: layouts.Layout, cache: Path) -> Path:
    return cache / layouts.fingerprint(layout)


def _record(row: dict[str, Any], root: Path) -> Record:
    text = {name: row[name].decode() for name in ("id", "part", "sha256", "patient")}
    path, *masks = ((root / name.decode()).absolute() for name in (row["image"], *row["masks"]))
    return Record(label=int(row["label"]), path=path, masks=tuple(masks), **text)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS's progress bars, prints and import warnings off the user's terminal."""
    tfds.disable_progress_bar()
    chatter = logging.getLogger("absl")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.setLevel(level)
