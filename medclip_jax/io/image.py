"""What all readers share: the image they return, limits of size, CT windows, choice of frames."""

import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from medclip_jax.errors import ConfigError, DataError

Mode = Literal["stretch", "pad"]  # how an image is brought to the encoder's square


class Image(NamedTuple):
    """One image file as it was read, without anything that names a patient."""

    pixels: Float[np.ndarray, "f h w"]  # [0, 1], luminance
    spacing: tuple[float, float] | None  # mm per pixel (row, column), None if unknown
    meta: dict[str, str]  # format and modality only, never identity
    range: str = ""  # what became 0 and 1, in words


class Frames(NamedTuple):
    """An opened image whose frames are made when they are needed, so that few are in memory."""

    shape: tuple[int, int, int]  # frames, height, width
    part: Callable[[int, int], Float[np.ndarray, "n h w"]]  # (first, end): float32 in [0, 1]
    spacing: tuple[float, float] | None  # as of Image
    meta: dict[str, str]
    range: str
    nbytes: int  # in memory for as long as this is
    axis: str = ""  # along which a volume is sliced

    def image(self, path: Path, frames: tuple[int, int] | None = None) -> Image:
        """All frames or those from first to end; DataError if the range does not fit."""
        chosen = choose(path, self.shape[0], frames)
        return Image(self.part(chosen.start, chosen.stop), self.spacing, self.meta, self.range)


def in_memory(pixels: Float[np.ndarray, "f h w"], kind: str, words: str) -> Frames:
    """Frames that are made already."""
    meta = {"format": kind}
    return Frames(pixels.shape, lambda a, b: pixels[a:b], None, meta, words, pixels.nbytes)


class Stretch(NamedTuple):
    """The values that become 0 and 1 where a file does not say how to show it."""

    low: float
    high: float
    clipped: bool = False  # single spikes lie beyond

    def words(self) -> str:
        """For people; what the range was taken from is for the caller to add."""
        text = f"{self.low:.6g} to {self.high:.6g}"
        return f"{text} (0.1st to 99.9th percentile: spikes lie beyond)" if self.clipped else text


class Window(NamedTuple):
    """A CT window, Hounsfield units."""

    centre: float
    width: float  # above 0

    def apply(self, hounsfield: Float[np.ndarray, "*n h w"]) -> Float[np.ndarray, "*n h w"]:
        """Map centre - width/2 to 0 and centre + width/2 to 1, clipped (DICOM LINEAR_EXACT)."""
        return np.clip((hounsfield - self.centre) / self.width + 0.5, 0, 1)


# of Murphy, Bell et al., "Windowing (CT)", radiopaedia.org/articles/windowing-ct; soft tissue as of
# head and neck (there centre 20 to 60, width 350 to 400), bone as of the spine
WINDOWS = {
    "brain": Window(40.0, 80.0),
    "lung": Window(-600.0, 1500.0),
    "soft_tissue": Window(40.0, 400.0),
    "bone": Window(400.0, 1800.0),
}
AXES: dict[str, tuple[int, int, int]] = {  # canonical axis of (slices, rows, columns) of a volume
    "axial": (2, 1, 0),
    "coronal": (1, 2, 0),
    "sagittal": (0, 2, 1),
}
MAX_PIXELS = 64_000_000  # of one frame; a mammogram has 14 million
MAX_SIDE = 65_535  # of JPEG and DICOM; the weights of resizing grow with it
MAX_VOXELS = 1 << 28  # of all frames of a file or series
MAX_FRAMES = 10_000  # each costs a row, a map and a run of the encoder, however small it is
MAX_BYTES = 1 << 29  # of a file, packed or unpacked
BAND, SAMPLE = 1 << 22, 1 << 20  # pixels converted together; values looked at for spikes
SPIKE = 0.001  # share of the values that may be spikes, at either end
FEW = 100  # values of which none can be called a spike
FAR = 2.0  # widths of the range of all others beyond which a value is a spike
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: red, green, blue
# photometric interpretations of DICOM, PS3.3 C.7.6.3.1.2
GREY = {"MONOCHROME1", "MONOCHROME2"}
COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
PALETTE = "PALETTE COLOR"


def parse_axis(text: str | None) -> str | None:
    """The axis that a text such as "lung,coronal" names besides a window; None for none."""
    return next((name for name in (text or "").split(",") if name in AXES), None)


def parse_window(text: str | None) -> Window | None:
    """The CT window that a text names: a key of WINDOWS or "centre/width"; None for none.

    An axis may stand beside it, see `parse_axis`. Raises ConfigError for any other text.
    """
    names = (text or "").split(",")
    if axis := parse_axis(text):
        names.remove(axis)
    text = ",".join(names)
    if not text or text in WINDOWS:
        return WINDOWS.get(text)
    centre, _, width = text.partition("/")
    try:
        window = Window(float(centre), float(width))
    except ValueError:
        window = Window(0, 0)
    if not (abs(window.centre) <= 1e6 and 1e-3 <= window.width <= 1e6):  # NaN is refused, too
        raise ConfigError(
            f"config.data.window is {text!r}: give one of {', '.join(WINDOWS)}, or centre/width "
            "in Hounsfield units such as 40/80; an axis of volumes may follow, as in lung,coronal"
        )
    return window


def no_hounsfield(path: Path, reason: str) -> DataError:
    """The error for a window on an image that does not hold Hounsfield units."""
    return DataError(
        f"{path} has no Hounsfield units ({reason}), which a CT window needs: "
        "give CT as DICOM or NIfTI, or set config.data.window to ''."
    )


def check_regular(path: Path) -> int:
    """Bytes of a file; DataError if it is missing, empty, too large, or no regular file."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(path) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({why}): fix or remove it.") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is no regular file (a pipe, device or folder): give a file.")
    if status.st_size > MAX_BYTES:
        raise DataError(f"{path} has {status.st_size:,} bytes and at most {MAX_BYTES:,} are read.")
    if status.st_size:
        return status.st_size
    raise DataError(f"{path} is empty: copy it again or remove it.")


def missing(path: Path) -> DataError:
    return DataError(f"{path} does not exist: check the path or restore the file.")


def reason(error: Exception) -> str:
    """What a library says about a damaged file, on one line without a full stop."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def check_size(path: Path, width: int, height: int, frames: int = 1) -> None:
    """Raise DataError for what, by its header alone, has no pixels or too many to decode."""
    if min(width, height, frames) < 1:
        raise DataError(f"{path} says it has {width} x {height} x {frames} pixels: remove it.")
    if max(width, height) > MAX_SIDE:
        raise DataError(too_large(path, f"{width} x {height}", f"{MAX_SIDE:,} a side"))
    if width * height > MAX_PIXELS:
        raise DataError(too_large(path, f"{width} x {height}"))
    if frames > MAX_FRAMES:
        raise DataError(
            f"{path} has {frames:,} frames and at most {MAX_FRAMES:,} are read: save it in parts "
            "or remove it if it is not yours."
        )
    if width * height * frames > MAX_VOXELS:
        raise DataError(
            f"{path} has {width} x {height} pixels in {frames} frames and at most {MAX_VOXELS:,} "
            "in all are read: save it in parts or remove it if it is not yours."
        )


def too_large(path: Path, size: str, most: str = f"{MAX_PIXELS:,}") -> str:
    return (
        f"{path} has {size} pixels and at most {most} are read: "
        "scale it down or remove it if it is not yours."
    )


def luma(bands: Iterable[Any]) -> Float[np.ndarray, "*n"]:
    """Luminance of red, green and blue, one at a time: three as floats would take much memory."""
    pairs = zip(LUMA, bands, strict=True)
    return np.asarray(sum(weight * np.asarray(band, np.float32) for weight, band in pairs))


def stretch_of(low: float, high: float, sample: Float[np.ndarray, " n"]) -> Stretch:
    """The range of values: the least to the largest, unless a few of them lie far from all others.

    Args:
      low, high: the least and the largest value.
      sample: at most SAMPLE of the values, evenly spread over all; NaN is ignored.
    """
    values = sample[np.isfinite(sample)]
    if len(values) < FEW:
        return Stretch(low, high)
    first = int(np.ceil(SPIKE * (len(values) - 1)))
    last = len(values) - 1 - first
    ordered = np.partition(values, (first, last))
    start, end = float(ordered[first]), float(ordered[last])
    width = end - start
    clip = [width > 0 and far > FAR * width for far in (start - low, high - end)]
    return Stretch(start if clip[0] else low, end if clip[1] else high, any(clip))


def range_of(
    path: Path, raw: Callable[[int], np.ndarray], count: int, size: int
) -> tuple[Stretch, float]:
    """What `count` slices of `size` values are stretched by, and the least value.

    Raises DataError for NaN and infinite values.
    """
    low, high, samples, bad = np.inf, -np.inf, [], 0
    step = count * size // SAMPLE | 1  # odd: passes all columns
    for index in range(count):
        values = raw(index).ravel()
        finite = np.isfinite(values)
        bad += values.size - int(np.count_nonzero(finite))
        if not bad:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            samples.append(values[::step].copy())
    if bad:
        raise DataError(
            f"{path} has {bad:,} voxels that are NaN, infinite or beyond float32: "
            "set them to a number first."
        )
    return stretch_of(low, high, np.concatenate(samples)), low


def stretch_to_unit(values: Float[np.ndarray, "*f h w"], stretch: Stretch) -> None:
    """(v - low) / (high - low), in place, clipped; a constant gives 0."""
    low, high = stretch.low, stretch.high
    if high - low > float(np.finfo(np.float32).max):  # the difference would be infinite
        values /= 2
        low, high = low / 2, high / 2
    values -= low
    if high > low:
        values /= high - low
    np.clip(values, 0, 1, out=values)  # rounding may pass 1 by one unit


def bands(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of an image that are worked on together, so that copies of all of it are not needed."""
    step = max(1, BAND // max(1, shape[1]))
    return (slice(i, i + step) for i in range(0, shape[0], step))


def unit_scale(
    path: Path,
    stored: Callable[[int], np.ndarray],
    count: int,
    shape: tuple[int, int],
    white: float | None,
) -> tuple[Callable[[np.ndarray, np.ndarray], None], str]:
    """How stored values become [0, 1], a function (values, into): by white, else floats within
    [0, 1] as they are, else stretched; and what became 0 and 1."""
    kind = stored(0).dtype.kind
    if white is None and kind == "f":
        frames = (stored(index) for index in range(count))
        white = 1.0 if all(x.min() >= 0 and x.max() <= 1 for x in frames) else None
    if white is not None:

        def divide(values: np.ndarray, into: np.ndarray) -> None:
            np.divide(values, np.float32(white), out=into, dtype=np.float32, casting="unsafe")
            np.minimum(into, 1, out=into)  # rounding may pass 1 by one unit

        return divide, f"0 to {white:g}"
    exact, size = np.float64, shape[0] * shape[1]
    stretch, _ = range_of(path, lambda i: stored(i).astype(exact, copy=False), count, size)

    def spread(values: np.ndarray, into: np.ndarray) -> None:
        for part in bands(shape):
            rows = values[part].astype(exact)
            stretch_to_unit(rows, stretch)
            into[part] = rows

    of = "its" if count == 1 else f"all {count} pages'"
    return spread, f"{of} values: {stretch.words()}"


def choose(path: Path, count: int, frames: tuple[int, int] | None) -> slice:
    """The frames (first, end) of `count`, None for all; DataError if the range does not fit."""
    first, end = frames or (0, count)
    if not 0 <= first < end <= count:
        raise DataError(
            f"{path} has {count} frame(s) and {first} to {end} (end not included) were requested: "
            f"give a range from 0 to {count}."
        )
    return slice(first, end)
