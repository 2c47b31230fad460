"""TFDS builders, free of TensorFlow: they yield names and hashes, never arrays.

Importing this module imports tensorflow_datasets (half a second): callers do so inside functions.
"""

import contextlib
import errno
import io
import logging
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from medclip_jax import files, stored
from medclip_jax.data import chexpert, layouts
from medclip_jax.data.catalog import ABOUT, About
from medclip_jax.data.layouts import Record
from medclip_jax.errors import DataError, UserError, WorkdirError
from medclip_jax.io.image import reason
from medclip_jax.io.nifti_header import files_of

DIGESTS = "sha256.json"  # of all other files of a prepared data set
BATCH = 1024  # rows read at a time
BUSI_URL = "https://scholar.cu.edu.eg/Dataset_BUSI.zip"


class Info(tfds.core.DatasetInfo):
    """What TFDS keeps of a data set, made from the data alone."""

    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS would ask a server of its makers, and leave a folder in /tmp each time."""

    def write_to_directory(self, dataset_info_dir: Any, *args: Any, **kwargs: Any) -> None:
        """Also the digests of all files; TFDS renames the folder after this, so it has them."""
        super().write_to_directory(dataset_info_dir, *args, **kwargs)
        folder = Path(dataset_info_dir)
        files.write_json(folder / DIGESTS, stored.sealed({"files": _digests(folder)}))


class PathBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builder over a listed layout; its examples hold paths below `layout.root`.

    Without a layout, the files that were fetched by hand are listed.
    """

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = {"1.2.0": "Paths, labels, patients, SHA-256; digests of its own files."}
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
            digest = files.sha256_of(*files_of(layout.root / example.id))
            yield example.id, fields | {"sha256": digest}

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
            with files.temporary_folder(unpacked) as part, files.disk_errors(unpacked):
                with zipfile.ZipFile(archive) as opened:
                    opened.extractall(part)
                os.rename(part, unpacked)
        except (zipfile.BadZipFile, EOFError) as error:
            archive.unlink()  # or the broken download would be reused for ever
            raise DataError(f"{BUSI_URL} gave a broken archive ({error}): {by_hand}.") from error
    return unpacked


def prepared(name: str, layout: layouts.Layout, cache: Path) -> bool:
    """Whether this very state of the data was prepared before, completely and undamaged."""
    return _damaged(_folder(name, layout, cache)) == ""


def records(name: str, layout: layouts.Layout, cache: Path) -> tuple[Record, ...]:
    """Prepare the data set if needed and read its records, in natural order of ids."""
    place = _place(layout, cache)
    if not prepared(name, layout, cache):
        _prepare(name, layout, place)
    with _quiet():
        source = BUILDERS[name](data_dir=str(place)).as_data_source(split="full")
        rows: list[dict[str, Any]] = []
        for i in range(0, len(source), BATCH):  # a batch bounds what is in memory undecoded
            rows += source.__getitems__(range(i, min(i + BATCH, len(source))))
    unsorted = (_record(row, layout.root) for row in rows)
    return tuple(sorted(unsorted, key=lambda record: layouts.natural(record.id)))


def _prepare(name: str, layout: layouts.Layout, place: Path) -> None:
    """Prepare below a temporary folder and rename it: what is in `place` is whole."""
    folder = _folder(name, layout, place.parent)
    if damaged := _damaged(folder):
        logging.warning("%s is damaged: the data are listed again", folder / damaged)
    make_folder(place.parent)
    files.sweep(place.parent)
    with files.temporary_folder(place) as part:
        with _quiet():
            try:
                BUILDERS[name](layout=layout, data_dir=str(part)).download_and_prepare()
            except Exception as error:  # array_record reports the disk in words of its own
                raise _of_disk(error, place, layout.root) or error from error
        with files.disk_errors(place):
            try:
                os.rename(part, place)
            except OSError:  # another process was quicker, or what was there is damaged
                if not prepared(name, layout, place.parent):
                    shutil.rmtree(place)
                    os.rename(part, place)


def _damaged(folder: Path) -> str | None:
    """The first file of a prepared data set that is not as it was written, "" where all are.

    None where there is none.
    """
    if not folder.exists():
        return None
    try:
        digests = stored.read_json(folder / DIGESTS)
        stored.check_seal(digests)
        stored.check(digests, {"files": dict, "digest": stored.HEX})
        return min(dict(digests["files"].items() ^ _digests(folder).items()), default="")
    except (OSError, ValueError, TypeError):
        return DIGESTS


def _of_disk(error: Exception, place: Path, root: Path) -> UserError | None:
    """What a library's error says of a disk, said of the cache or of the data."""
    codes = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO
    said = next((os.strerror(code) for code in codes if os.strerror(code) in str(error)), "")
    filename = str(getattr(error, "filename", None) or "")
    if isinstance(error, OSError) and filename.startswith(str(root.absolute())):
        return DataError(f"{filename} cannot be read ({error.strerror}): fix or remove it.")
    if isinstance(error, OSError) or said:
        text = said or getattr(error, "strerror", None) or str(error)
        return WorkdirError(
            f"The cache {place.parent} cannot be written ({text}): free space there or give "
            "another cache folder (config.cache)."
        )
    return None


def make_folder(place: Path) -> None:
    """Make a cache folder. Raises WorkdirError if it cannot be made or written."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise WorkdirError(
            f"{place} cannot be written ({error.strerror or reason(error)}): free space there or "
            "give another cache folder."
        ) from error


def _folder(name: str, layout: layouts.Layout, cache: Path) -> Path:
    return _place(layout, cache) / BUILDERS[name].name / str(BUILDERS[name].VERSION)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a prepared data set, by name."""
    names = sorted(p.name for p in folder.iterdir() if p.name != DIGESTS)
    return {name: files.sha256_of(folder / name) for name in names}


def _place(layout: layouts.Layout, cache: Path) -> Path:
    return cache / layouts.fingerprint(layout)


def _record(row: dict[str, Any], root: Path) -> Record:
    text = {name: row[name].decode() for name in ("id", "part", "sha256", "patient")}
    path, *masks = ((root / name.decode()).absolute() for name in (row["image"], *row["masks"]))
    return Record(label=int(row["label"]), path=path, masks=tuple(masks), **text)


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
