"""Finds training images that issue an evaluation image anew: cropped, mirrored, turned, retouched.

Two stages. The first compares coarse thumbnails of the body, ranks in place of grey values, of
every training image mirrored and turned with every evaluation image, and keeps the nearest as
candidates. The second aligns a candidate finely and correlates its edges: only the same exposure
has the same edges; other patients of the same view have the same anatomy but not those.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Complex, Float, Int
from PIL import Image
from scipy import fft, ndimage

from medclip_jax import files
from medclip_jax.data import near_duplicates

SIDE = 24  # of a thumbnail
DETAIL = 96  # of the pictures whose edges are compared
ANGLES = tuple(range(-16, 17, 4))  # degrees
FRAMES = ((True, 1.0), (False, 1.0), (False, 0.87))  # whole picture, body's box, middle of it
FINE = [(turn, zoom) for turn in (-3, -1.5, 0, 1.5, 3) for zoom in (0.94, 0.97, 1, 1.03, 1.06)]
CANDIDATES = 5  # nearest evaluation images of each training image that the second stage sees
POSES = [(m, t, *f) for m in (False, True) for t in ANGLES for f in FRAMES]
COARSE = 0.6  # correlation of thumbnails from which edges are compared ...
PROMISING = 0.25  # ... and of edges as they lie, from which they are aligned finely
LIMIT = 0.65  # correlation of aligned edges over which two images may count as one exposure ...
COPY = 0.95  # ... and do: copies within an evaluation set say nothing of different patients
SUFFIXES = {".png", ".jpg", ".jpeg"}


class LeakCount(NamedTuple):
    """How one evaluation set compares with the training images."""

    name: str
    evaluation_images: int
    candidates: int  # pairs whose edges were compared
    limit: float  # correlation of edges over which an image is a copy, see `limit_of`
    leaks: int  # training images that issue one of its images anew: not used
    highest: float  # highest correlation of edges among those used


class Pose(NamedTuple):
    """How a picture is made comparable: mirrored, turned by degrees, cut to a share of its frame.

    The frame is the body's box, or the `whole` picture.
    """

    mirror: bool = False
    turn: float = 0.0
    whole: bool = False
    zoom: float = 1.0


def read(path: Path) -> Image.Image:
    """Grey, at most 192 pixels a side."""
    with Image.open(path) as image:
        image = image.convert("RGB").convert("L")
    image.thumbnail((192, 192), Image.Resampling.BOX)
    return image


def body(grey: Float[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of what differs from an even border; else the whole picture.

    A row or column counts as empty if at most 2% of it differs by a tenth of the range, noise
    smoothed away.
    """
    grey = ndimage.gaussian_filter(grey, 2)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ground = np.median(border)
    other = np.abs(grey - ground) > 0.1 * max(float(np.ptp(grey)), 1.0)
    rows, columns = (np.flatnonzero(other.mean(axis) > 0.02) for axis in (1, 0))
    if min(len(rows), len(columns)) < 8:
        return 0, 0, grey.shape[1], grey.shape[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def posed(image: Image.Image, pose: Pose, side: int) -> Float[np.ndarray, "s s"]:
    """The picture in a pose, as a square."""
    if pose.mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    grey = np.asarray(image, np.float32)
    if pose.turn:
        border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        ground = int(np.median(border))
        image = image.rotate(pose.turn, Image.Resampling.BILINEAR, fillcolor=ground)
        grey = np.asarray(image, np.float32)
    left, top, right, bottom = (0, 0, *image.size) if pose.whole else body(grey)
    x, y = (right - left) * (1 - pose.zoom) / 2, (bottom - top) * (1 - pose.zoom) / 2
    box = (left + x, top + y, right - x, bottom - y)
    if pose.zoom > 1:  # beyond the body: what is there, or the edge repeated
        pad = int(np.ceil(max(-x, -y)))
        image = Image.fromarray(np.pad(grey, pad, "edge").astype(np.uint8))
        box = tuple(v + pad for v in box)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, box=box), np.float32)


def thumbnail(image: Image.Image, pose: Pose) -> Float[np.ndarray, " 576"]:
    """Ranks of a coarse picture, mean 0 and length 1: no gamma or contrast changes it."""
    flat = posed(image, pose, SIDE).ravel()
    if np.ptp(flat) < 2:
        return np.zeros(flat.size, np.float32)
    values, places = np.unique(flat, return_inverse=True)
    ends = np.cumsum(np.bincount(places))
    middle = ends - (np.bincount(places) - 1) / 2
    return near_duplicates.normalised(middle[places].reshape(SIDE, SIDE))


def edges(picture: Float[np.ndarray, "s s"]) -> Float[np.ndarray, "s s"]:
    """Detail of 2 to 8 pixels at even strength, mean 0, faded towards the border."""
    band = ndimage.gaussian_filter(picture, 1) - ndimage.gaussian_filter(picture, 4)
    strength = np.sqrt(ndimage.gaussian_filter(band**2, 8))
    band = band / (strength + 0.02 * float(np.ptp(picture)) + 1e-3)
    window = np.hanning(len(picture) + 2)[1:-1]
    band = (band - band.mean()) * np.sqrt(window[:, None] * window[None])
    return band / max(float(np.linalg.norm(band)), 1e-6)


def spectrum(image: Image.Image, pose: Pose) -> Complex[np.ndarray, "s f"]:
    """Of the edges of a picture in a pose."""
    return fft.rfft2(edges(posed(image, pose, DETAIL)))


def highest_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Over all shifts of one picture against the other, given their spectra."""
    return float(fft.irfft2(one * np.conj(other), (DETAIL, DETAIL)).max())


def same_exposure(one: Image.Image, pose: Pose, other: np.ndarray) -> float:
    """Correlation of edges with those of spectrum `other`, `one` turned and zoomed finely about a
    pose; as it lies, if that is not PROMISING."""
    score = highest_correlation(spectrum(one, pose), other)
    if score <= PROMISING:
        return score
    near = [pose._replace(turn=pose.turn + t, zoom=pose.zoom * z) for t, z in FINE]
    return max(highest_correlation(spectrum(one, p), other) for p in near)


def image_files(folder: Path) -> list[Path]:
    """Images under `folder`, masks left out, in a fixed order."""
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES and "_mask" not in p.stem and "ground_truth" not in p.parts
    )


def all_poses(images: Sequence[Image.Image]) -> Float[np.ndarray, "n q 576"]:
    """Thumbnails of each image in POSES."""
    return np.stack([[thumbnail(image, Pose(*pose)) for pose in POSES] for image in images])


def nearest(
    ours: Float[np.ndarray, "n q 576"], theirs: Float[np.ndarray, "f e 576"]
) -> tuple[Int[np.ndarray, "n c"], Float[np.ndarray, "n c"], Int[np.ndarray, "n c 2"]]:
    """The CANDIDATES evaluation images nearest to each training image.

    Args:
      ours: thumbnails of training images in POSES.
      theirs: of evaluation images in FRAMES.

    Returns:
      Which they are, their correlation, and numbers of the pose and the frame at which it is so.
    """
    count = min(CANDIDATES, theirs.shape[1])
    index, near, how = [], [], []
    for rows in ours:
        scores = np.einsum("qp,fep->qfe", rows, theirs, optimize=True)
        flat = scores.reshape(-1, scores.shape[-1])
        best = np.argsort(-flat.max(0))[:count]
        index.append(best)
        near.append(flat.max(0)[best])
        how.append(np.stack(np.divmod(flat[:, best].argmax(0), len(FRAMES)), -1))
    return np.stack(index), np.stack(near), np.stack(how)


def leak_check(
    train: list[Path], evaluation: dict[str, Path], cache: Path, say: Callable[[str], None] = print
) -> tuple[Bool[np.ndarray, " n"], list[LeakCount]]:
    """Which training images may stay, and the counts for the model card.

    Sets share the processor's cores. `cache` keeps the answer of each, with its closest pairs, so
    that a stopped check resumes; it belongs to these training images.
    """
    cache.mkdir(parents=True, exist_ok=True)
    poses = cache / "poses.npy"
    if not poses.is_file():
        part = cache / "poses.part.npy"
        np.save(part, all_poses([read(path) for path in train]))
        part.replace(poses)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        answers = [
            pool.submit(_check_set, train, poses, folder, cache / f"{name}.json")
            for name, folder in evaluation.items()
        ]
        keep, counts = np.ones(len(train), bool), []
        for name, answer in zip(evaluation, answers, strict=True):
            best, about = answer.result()
            counts.append(LeakCount(name, **about))
            keep &= np.asarray(best) <= counts[-1].limit
            say(f"leak check {name}: {counts[-1]}")
    return keep, counts


def _check_set(train: list[Path], poses: Path, folder: Path, answer: Path):
    """Highest correlation of each training image with one set, and the fields of its LeakCount."""
    if answer.is_file():
        stored = json.loads(answer.read_text())
        return stored["best"], stored["count"]
    paths = image_files(folder)
    others = [read(path) for path in paths]
    ours = np.load(poses, mmap_mode="r")
    best, which, compared = best_matches(lambda n: read(train[n]), ours, others)
    limit = limit_of(others)
    count = {
        "evaluation_images": len(others),
        "candidates": compared,
        "limit": limit,
        "leaks": int((best > limit).sum()),
        "highest": float(best[best <= limit].max(initial=-1.0)),
    }
    pairs = [
        [train[n].name, str(paths[which[n]].relative_to(folder)), best[n]]
        for n in np.argsort(-best)[:100]
    ]
    files.write_json(answer, {"count": count, "best": best.tolist(), "best_matches": pairs})
    return best.tolist(), count


def limit_of(images: Sequence[Image.Image]) -> float:
    """The correlation of edges over which an image is a copy of one of an evaluation set.

    LIMIT, or as much as all but 1% of the set's images reach with another one of it: different
    patients in one position (knees, centred on the joint) resemble each other that much.
    """
    best, *_ = best_matches(lambda n: images[n], all_poses(images), images, themselves=True)
    return max(LIMIT, float(np.quantile(best[best < COPY], 0.99))) if (best < COPY).any() else LIMIT


def best_matches(
    image: Callable[[int], Image.Image],
    ours: Float[np.ndarray, "n q 576"],
    others: Sequence[Image.Image],
    themselves: bool = False,
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"], int]:
    """Highest correlation of edges of each image with one of `others`, which, pairs compared.

    Args:
      image: gives the image that a row of `ours` is of.
      ours: thumbnails in POSES.
      themselves: the images are `others`; none is compared with itself.
    """
    frames = [Pose(False, 0, *frame) for frame in FRAMES]
    theirs = np.stack([[thumbnail(other, pose) for other in others] for pose in frames])
    index, near, how = nearest(ours, theirs)
    if themselves:
        near = np.where(index == np.arange(len(near))[:, None], -1.0, near)
    spectra: dict[tuple[int, int], np.ndarray] = {}
    exact = np.full(near.shape, -1.0)
    for n in np.flatnonzero((near > COARSE).any(1)):
        one = image(int(n))
        for c in np.flatnonzero(near[n] > COARSE):
            pose, frame = how[n, c]
            place = int(index[n, c]), int(frame)
            if place not in spectra:
                spectra[place] = spectrum(others[place[0]], frames[frame])
            exact[n, c] = same_exposure(one, Pose(*POSES[pose]), spectra[place])
    which = np.take_along_axis(index, exact.argmax(1)[:, None], 1)[:, 0]
    return exact.max(1), which, int((near > COARSE).sum())
