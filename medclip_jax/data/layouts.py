"""What lies on disk: records of images, and the folder layouts that are listed as such.

No file is opened. Shape letters, used in every annotation of the package:
  e episodes/tasks   n images   h w pixels (the encoder's input unless said otherwise)   f frames
  p patches (g x g grid, row-major)   l layers (tapped blocks)   d width
  c prompts   t text positions
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from medclip_jax.errors import DataError
from medclip_jax.files import natural
from medclip_jax.io.nifti_header import files_of

GIVE_ROOT = "give the folder by --config.data.root or $MEDCLIP_DATA"
MASK = re.compile(r"(?P<name>.+)_mask(_\d+)?", re.DOTALL)
BUSI_LABELS = {"benign": 1, "malignant": 1, "normal": 0}
BRAIN_LABELS = {"no": 0, "yes": 1}
CHEST_LABELS = {"NORMAL": 0, "PNEUMONIA": 1}
CHEST_PATIENT = re.compile(r"((NORMAL2-)?IM-\d+|person\d+)[-_]")
NOT_GOOD = ("normal", "healthy", "ok")  # would count as kinds of anomaly: only `good` is healthy
PARTS = ("train", "test", "ground_truth")  # folders of the MVTec-AD layout
MISNAMED = r"(train|test)(ing|s)?|ground[ _-]?truths?|gt|(mask|label|annotation|segmentation)s?"
USUAL = ".png .jpg .jpeg .bmp .tif .tiff .dcm .dicom .ima .nii .hdr .img .gz".split()  # images
DESKTOP_FILES = ("thumbs.db", "desktop.ini")  # left behind by file browsers, besides dot files


class Record(NamedTuple):
    """One image of a data set, named but not yet read."""

    id: str  # path below the data root, '/' separated; unique
    label: int  # 0 healthy, 1 abnormal
    part: str  # the data set's own part: "train", "test", or "" where it has none
    path: Path  # absolute
    masks: tuple[Path, ...]  # their union is the lesion mask; empty if there is none
    sha256: str  # of the image's file, or files: see files.sha256_of
    patient: str = ""  # whose image, where the data set says so; a code, never a name
    window: str = ""  # CT window that the image is read with, see io.read
    unit: int = -1  # near-duplicates and images of one patient have the same; -1: not known


class Split(NamedTuple):
    """Who is support and who is test. Supports are ordered: the first 4 of 8 are the 4 of K = 4."""

    support: tuple[Record, ...]
    test: tuple[Record, ...]


def unique(records: Iterable[Record]) -> list[Record]:
    """Records with different content: equal files are encoded once."""
    return list({r.sha256: r for r in records}.values())


class Example(NamedTuple):
    """One image as the layout names it. Paths are below the root, '/' separated."""

    id: str
    label: int  # 0 healthy, 1 abnormal
    kind: str  # the data set's own class, e.g. "malignant"
    part: str  # "train", "test", or "" where the data set has none
    masks: tuple[str, ...]
    patient: str = ""  # whose image, where the data set says so


class Layout(NamedTuple):
    """A listed data set and all that is wrong with its names."""

    root: Path
    examples: tuple[Example, ...]  # in natural order of their ids
    problems: tuple[str, ...]


def busi(root: Path) -> Layout:
    """List BUSI in its archive's layout: `<class>/<class> (n).png`, `... (n)_mask[_m].png`."""
    root = find(root, "BUSI", "busi", "Dataset_BUSI_with_GT", tuple(BUSI_LABELS))
    examples, problems = [], []
    for kind, label in BUSI_LABELS.items():
        files = _files(root / kind)
        masks = _masks(files)
        for image in (f for f in files if not MASK.fullmatch(_stem(f))):
            lesions = masks.pop(_stem(image), [])
            if label and not lesions:
                problems.append(f"{kind}/{image.name} has no mask {image.stem}_mask.png")
            examples.append(_example(root, image, label, kind, "", lesions))
        problems += _orphans(root, masks)
    return Layout(root, _sorted(examples), tuple(problems))


def brain_mri(root: Path) -> Layout:
    """List Kaggle's "Brain MRI Images for Brain Tumor Detection": `no/*`, `yes/*`; no masks."""
    root = find(root, "brain MRI", "brain_mri", "brain_tumor_dataset", tuple(BRAIN_LABELS))
    examples = [
        _example(root, image, label, kind, "", [])
        for kind, label in BRAIN_LABELS.items()
        for image in _files(root / kind)
    ]
    return Layout(root, _sorted(examples), ())


def chest_xray(root: Path) -> Layout:
    """List the open paediatric chest films: `{train,test}/{NORMAL,PNEUMONIA}/*`.

    Supports come from `train/NORMAL`; `test` is tested on, `val` not used. Names tell patients:
    `[NORMAL2-]IM-<patient>-<image>` and `person<patient>_<cause>_<image>`.
    """
    places = tuple(f"{part}/{kind}" for part in ("train", "test") for kind in CHEST_LABELS)
    root = find(root, "chest films", "chest_xray", "chest_xray", places)
    examples = [
        _example(root, image, label, kind, part, [], CHEST_PATIENT.match(image.name))
        for part in ("train", "test")
        for kind, label in CHEST_LABELS.items()
        for image in _files(root / part / kind)
    ]
    return Layout(root, _sorted(examples), ())


def folder(root: Path) -> Layout:
    """List the MVTec-AD layout, or BMAD's.

    `train/good/*`, `test/good/*`, `test/<kind>/*`, and optionally
    `ground_truth/<kind>/<name>_mask.png`. Where a kind has a folder in `ground_truth`, each of its
    images must have a mask. In BMAD's archives the images of a kind lie in `test/<kind>/img` and
    their masks, if any, under the same names in `test/<kind>/label`; `valid` is not used.
    """
    needed = root / "train" / "good"
    if not needed.is_dir():
        layout = "layout: train/good, test/good, test/<kind>"
        raise DataError(f"no folder {needed} ({layout}): {GIVE_ROOT}.")
    examples = [_example(root, image, 0, "good", "train", []) for image in _files(_own(needed))]
    problems = _unread(root, needed) + _misnamed(root)
    extras = [p.name for p in _folders(root / "train") if p.name != "good"]
    problems += [f"train/{x} is not allowed: only train/good is trained on" for x in extras]
    kinds = _folders(root / "test")
    stray = (p for part in PARTS for p in _usual(root / part, [kind.name for kind in kinds]))
    problems += [f"{_below(root, p)} is in no folder of a kind: move it to one" for p in stray]
    for kind in kinds:
        of_kind, wrong = _kind(root, kind)
        examples += of_kind
        problems += wrong
    lone = (x for x in _folders(root / "ground_truth") if not (root / "test" / x.name).is_dir())
    problems += _orphans(root, {place.name: _usual(place) for place in lone})
    return Layout(root, _sorted(examples), tuple(problems))


def healthy(root: Path) -> Layout:
    """List a folder of healthy images, in BMAD's archives those in its folder `img`."""
    examples = [_example(root, image, 0, "good", "", []) for image in _files(_own(root))]
    return Layout(root, _sorted(examples), tuple(_unread(root.parent, root)))


def find(root: Path, title: str, name: str, inner: str, needed: tuple[str, ...]) -> Path:
    """The folder that holds all of `needed`: `root` or one or two levels below it, else DataError.

    Args:
      title: what the data set is called in the message.
      name: its folder below a data root that holds several sets.
      inner: the folder that its archive unpacks to.
    """
    for place in (root, root / inner, root / name / inner, root / name):
        if all((place / entry).exists() for entry in needed):
            return place
    raise DataError(
        f"no {title} below {root} (looked there, in {inner}, {name} and {name}/{inner} for "
        f"{', '.join(needed)}): {GIVE_ROOT}."
    )


def fingerprint(layout: Layout) -> str:
    """Hash of where the files lie, their names, sizes and times: changes whenever the data do."""
    digest = hashlib.sha256(str(layout.root.resolve()).encode())
    for example in layout.examples:
        digest.update(f"\n{example.label} {example.part} {example.patient}".encode())
        names = (example.id, *example.masks)
        for name, path in ((n, path) for n in names for path in files_of(layout.root / n)):
            try:
                stat = path.stat()
            except OSError as error:
                raise DataError(
                    f"{path} cannot be reached ({error.strerror}): restore or remove it."
                ) from error
            digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _kind(root: Path, kind: Path) -> tuple[list[Example], list[str]]:
    """Test images of one kind with their masks, and what does not fit together."""
    truth = root / "ground_truth" / kind.name
    masks, form = _masks(_files(truth)), f"ground_truth/{kind.name}/{{}}_mask.png"
    problems = _unread(root, kind)
    rule = "is no mask's name: give it as <image>_mask.png, or several as <image>_mask_1.png"
    problems += [f"{_below(root, p)} {rule}" for p in _usual(truth) if not _masks([p])]
    label = 0 if kind.name.lower() == "good" else 1
    if (kind / "label").is_dir():
        truth, form = kind / "label", f"test/{kind.name}/label/{{}}.png"
        masks = {_stem(path): [path] for path in _files(truth)} if label else {}  # good: all black
    examples = []
    if kind.name.lower() in NOT_GOOD:
        problems.append(f"test/{kind.name} would count as abnormal: name it test/good")
    for image in _files(_own(kind)):
        lesions = masks.pop(_stem(image), [])
        if label and not lesions and truth.is_dir():
            problems.append(f"{_below(root, image)} has no mask {form.format(_stem(image))}")
        examples.append(_example(root, image, label, kind.name, "test", lesions))
    return examples, problems + _orphans(root, masks)


def _misnamed(root: Path) -> list[str]:
    """Folders of images named nearly as a part of the layout (on some disks Test is test)."""
    others = [p for p in _folders(root) if re.fullmatch(MISNAMED, p.name, re.IGNORECASE)]
    held = [p for p in others if any(x.suffix.lower() in USUAL for x in p.rglob("*"))]
    own = [root / part for part in PARTS if (root / part).exists()]
    odd = (_below(root, p) for p in held if not any(p.samefile(part) for part in own))
    return [f"folder {x} is unread: use train/good, test/<kind>, ground_truth/<kind>" for x in odd]


def _unread(root: Path, place: Path) -> list[str]:
    """Files of a kind that nobody would read, the first of each folder; masks among its images."""
    own = _own(place)
    outside = (_files(p)[0] for p in _with_files(place) if p not in (own, place / "label"))
    problems = [f"{_below(root, x)} is not in {_below(root, own)}: move it there" for x in outside]
    return problems + _masks_among(root, _files(own))


def _masks_among(root: Path, images: list[Path]) -> list[str]:
    stems = {_stem(image) for image in images}
    masks = (m for name, masks in _masks(images).items() if name in stems for m in masks)
    return [f"{_below(root, mask)} is a mask: take it out of the images" for mask in masks]


def _own(place: Path) -> Path:
    """The folder of a kind's images: `img`, where there is one."""
    return place / "img" if (place / "img").is_dir() else place


def _with_files(place: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Folders that hold files, at a place and below it; links to one `above` are not followed."""
    above += (place.resolve(),)
    inner = (p for p in _folders(place) if p.resolve() not in above)
    return [place] * bool(_files(place)) + [x for p in inner for x in _with_files(p, above)]


def _files(place: Path) -> list[Path]:
    """Files of a folder, in order, less what file browsers leave; of a NIfTI pair the header."""
    entries = place.iterdir() if place.is_dir() else ()
    files = (p for p in entries if not p.is_dir() and not p.name.startswith("."))
    kept = {p for p in files if p.name.lower() not in DESKTOP_FILES}
    images = (p for p in kept if (first := files_of(p)[0]) == p or first not in kept)
    return sorted(images, key=lambda p: natural(p.name))


def _usual(place: Path, names: Iterable[str] = ()) -> list[Path]:
    return [p for p in _files(place) if p.suffix.lower() in USUAL or _masks([p]) or p.name in names]


def _folders(place: Path) -> list[Path]:
    entries = place.iterdir() if place.is_dir() else ()
    return sorted(p for p in entries if p.is_dir() and not p.name.startswith("."))


def _stem(path: Path) -> str:
    """The name without its ending; numbers are none (1.2.840 is a UID)."""
    stem = path.stem[:-4] if path.name.lower().endswith(".nii.gz") else path.stem
    return path.name if path.suffix[1:].isdigit() else stem


def _masks(files: list[Path]) -> dict[str, list[Path]]:
    """Mask files by the stem of the image they belong to."""
    masks: dict[str, list[Path]] = {}
    for file in files:
        if match := MASK.fullmatch(_stem(file)):
            masks.setdefault(match["name"], []).append(file)
    return masks


def _orphans(root: Path, masks: dict[str, list[Path]]) -> list[str]:
    return [f"mask {_below(root, path)} has no image" for paths in masks.values() for path in paths]


def _example(
    root: Path, image: Path, label: int, kind: str, part: str, masks: list[Path], patient=None
) -> Example:
    names = tuple(_below(root, mask) for mask in masks)
    return Example(_below(root, image), label, kind, part, names, patient[1] if patient else "")


def _below(root: Path, path: Path) -> str:
    name = path.relative_to(root).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name!r} in {root} is not a UTF-8 file name: rename it.") from error
    return name


def _sorted(examples: list[Example]) -> tuple[Example, ...]:
    return tuple(sorted(examples, key=lambda e: natural(e.id)))
