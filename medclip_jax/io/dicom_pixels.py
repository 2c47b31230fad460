"""From the stored values of a DICOM file to those on a screen: modality LUT, window, colour.

DICOM PS3.3: C.11.1 modality LUT, C.11.2 VOI LUT and window, C.7.6.3.1.2 photometric interpretation,
C.7.9 palettes, C.7.6.16 functional groups. Nothing here reads who the patient is.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Num
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from medclip_jax.io import dicom_header
from medclip_jax.io.image import COLOUR, GREY, LUMA, PALETTE, Window, bands

CM, REGION_2D = 3, 1  # PS3.3 C.8.5.5: unit code of centimetres, spatial format of a 2-D image
HOUNSFIELD = ("", "HU", "HU_MOD", "US")  # Rescale Type of CT: none, as many scanners, or these


class _Voi(NamedTuple):
    """A window of a file."""

    centre: float
    width: float  # above 0
    function: str  # VOI LUT function


class GreyError(ValueError):
    """A header that says nothing sensible about its grey values; the text names no patient."""


def display_values(
    ds: Dataset,
    stored: Num[np.ndarray, "h w *c"],
    frame: int,
    window: Window | None = None,
    white: float = 255.0,
) -> tuple[Float32[np.ndarray, "h w"], bool]:
    """One frame as a screen would show it.

    Args:
      stored: as `dicom_frames` decodes it; colour as RGB.
      frame: its number from 0, to find its own window in an enhanced file.
      window: of Hounsfield units, in place of the file's own; see `lacks_hounsfield`.
      white: largest value of colour.

    Returns:
      (values float32, scaled): scaled means in [0, 1] with black 0, by a window, a VOI LUT or
      colour. Else values are in the modality's units, NaN where nothing was imaged, for the caller
      to stretch and (MONOCHROME1) invert.

    Raises:
      GreyError: an impossible look-up table or palette, an unknown VOI LUT function, NaN or
        infinite pixels.
    """
    padding, scaled = _padding(ds, stored), True
    shown = np.empty(stored.shape[:2], np.float32)
    ends = float(stored.min()), float(stored.max())
    for rows in bands(shown.shape):
        values, scaled = _display(ds, stored[rows], frame, window, white, ends)
        with np.errstate(over="ignore"):  # beyond float32: infinite
            shown[rows] = values
        if not np.isfinite(shown[rows]).all():
            raise GreyError("it has NaN or infinite pixels")
    if padding is not None:
        shown[padding] = 0 if scaled else np.nan
    return shown, scaled


def _display(ds, stored, frame, window, white, ends) -> tuple[Float[np.ndarray, "h w"], bool]:
    """`display_values` of some rows, in float64, without padding; `ends` are those of the frame."""
    kind = ds.PhotometricInterpretation
    if kind in COLOUR:
        return _luma(stored, white), True
    if kind == PALETTE:
        return _luma(*_palette(ds, stored, ends[1])), True
    values, most = _modality(ds, stored, frame, ends)
    unit = window.apply(values) if window else _voi(ds, values, frame, most)
    if unit is None:
        return values, False
    return (1 - unit if kind == "MONOCHROME1" and not window else unit), True


def range_of(ds: Dataset, frame: int, window: Window | None = None) -> str:
    """What maps the values of a frame to [0, 1], in words; "" for the range of the values."""
    if ds.PhotometricInterpretation in COLOUR | {PALETTE}:
        return "colour: 0 to white"
    if window:
        return f"window {window.centre:g}/{window.width:g} in Hounsfield units"
    voi = _voi_of(ds, frame)
    if isinstance(voi, Dataset):
        return "its VOI LUT"
    return f"its window {voi.centre:g}/{voi.width:g} ({voi.function})" if voi else ""


def lacks_hounsfield(ds: Dataset) -> str:
    """Why the values of a file after rescaling are no Hounsfield units; "" if they are."""
    if str(ds.get("Modality", "")).strip() != "CT":
        return "it is not CT"
    if ds.PhotometricInterpretation not in GREY or ds.get("ModalityLUTSequence"):
        return "its pixels are not on a linear grey scale"
    rescale = _item(ds, "PixelValueTransformationSequence", 0)
    if not _rescale(rescale):
        return "it has no rescale slope and intercept"
    known = str(rescale.get("RescaleType") or "").strip() in HOUNSFIELD
    return "" if known else "its rescale type is another"


def spacing(ds: Dataset) -> tuple[float, float] | None:
    """mm per pixel (row, column) in the patient; None if unknown.

    Pixel Spacing, of the first frame in enhanced files; else that of the detector, divided by the
    estimated magnification; else the one that all calibrated 2-D regions of an ultrasound agree on.
    """
    sizes = _item(ds, "PixelMeasuresSequence", 0).get("PixelSpacing")
    if not sizes:
        sizes = ds.get("ImagerPixelSpacing") or ds.get("NominalScannedPixelSpacing")
        zoom = float(ds.get("EstimatedRadiographicMagnificationFactor") or 1)
        sizes = [float(x) / zoom for x in sizes] if sizes and zoom > 0 else _ultrasound_spacing(ds)
    if not sizes or len(sizes) != 2:
        return None
    row, column = (float(x) for x in sizes)
    return (row, column) if 0 < row < np.inf and 0 < column < np.inf else None


def _ultrasound_spacing(ds: Dataset) -> tuple[float, float] | None:
    pairs = [
        (abs(float(r.PhysicalDeltaY)) * 10, abs(float(r.PhysicalDeltaX)) * 10)
        for r in ds.get("SequenceOfUltrasoundRegions") or []
        if r.get("RegionSpatialFormat") == REGION_2D
        and r.get("PhysicalUnitsXDirection") == r.get("PhysicalUnitsYDirection") == CM
        and "PhysicalDeltaX" in r
        and "PhysicalDeltaY" in r
    ]
    return dicom_header.common_spacing(pairs)


def _luma(colour: Num[np.ndarray, "h w 3"], white: float) -> Float[np.ndarray, "h w"]:
    luminance = sum(w * colour[..., i].astype(np.float64) for i, w in enumerate(LUMA))
    return np.clip(luminance / white, 0, 1)


@np.errstate(invalid="ignore")  # of an infinite slope, which is refused
def _modality(
    ds: Dataset, stored: Num[np.ndarray, "h w"], frame: int, ends: tuple[float, float]
) -> tuple[Float[np.ndarray, "h w"], float]:
    """(values in the modality's units, the largest that the whole frame can have)."""
    if ds.get("ModalityLUTSequence"):
        values, bits = _look_up(ds, ds.ModalityLUTSequence[0], stored, ends[1])
        return values, 2.0**bits - 1
    slope, intercept = _rescale(_item(ds, "PixelValueTransformationSequence", frame)) or (1, 0)
    return stored.astype(np.float64) * slope + intercept, max(x * slope + intercept for x in ends)


def _rescale(group: Dataset) -> tuple[float, float] | None:
    slope, intercept = group.get("RescaleSlope"), group.get("RescaleIntercept")
    if slope is None or intercept is None or float(slope) == 0:  # 0 would leave nothing to see
        return None
    return float(slope), float(intercept)


def _padding(ds: Dataset, stored: Num[np.ndarray, "h w *c"]) -> Bool[np.ndarray, "h w"] | None:
    """Pixels outside the image (PS3.3 C.7.5.1.1.2); None where none or all would be."""
    value = ds.get("PixelPaddingValue")
    if value is None or ds.PhotometricInterpretation not in GREY:
        return None
    ends = [int(value), int(ds.get("PixelPaddingRangeLimit", value))]
    if stored.dtype.kind == "i":  # implicit VR reads a negative number as unsigned
        ends = [x - (1 << 16) if x >= 1 << 15 else x for x in ends]
    elif stored.dtype.kind == "u":  # or a large one as negative
        ends = [x + (1 << 16) if x < 0 else x for x in ends]
    padding = (stored >= min(ends)) & (stored <= max(ends))
    return None if padding.all() else padding


def _voi_of(ds: Dataset, frame: int) -> "Dataset | _Voi | None":
    """The first VOI LUT, else the first window that has a width, else None."""
    group = _item(ds, "FrameVOILUTSequence", frame)
    if group.get("VOILUTSequence"):
        return group.VOILUTSequence[0]
    function = str(group.get("VOILUTFunction") or "LINEAR").strip().upper()
    for centre, width in zip(
        _numbers(group.get("WindowCenter")), _numbers(group.get("WindowWidth")), strict=False
    ):
        if np.isfinite((centre, width)).all() and width > 0:
            exact = function == "LINEAR" and width < 1  # so narrow a window means what it says
            return _Voi(centre, width, "LINEAR_EXACT" if exact else function)
    return None


def _voi(
    ds: Dataset, values: Float[np.ndarray, "h w"], frame: int, most: float
) -> Float[np.ndarray, "h w"] | None:
    """[0, 1] by the first VOI LUT, else by the first window, else None; no value is over `most`."""
    voi = _voi_of(ds, frame)
    if isinstance(voi, Dataset):
        looked_up, bits = _look_up(ds, voi, values, most)
        return looked_up / (2.0**bits - 1)
    if voi is None:
        return None
    centre, width, function = voi
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise GreyError("its window has an unknown VOI LUT function")
    if width == 0:
        return (values > centre).astype(np.float64)
    return np.clip((values - centre) / width + 0.5, 0, 1)


def _look_up(
    ds: Dataset, item: Dataset, values: Num[np.ndarray, "h w"], most: float
) -> tuple[Float[np.ndarray, "h w"], int]:
    """(table entries, bits per entry); values before and after the table take its ends, and
    `most` is the largest of the whole frame."""
    entries, first, bits = (int(x) for x in item.LUTDescriptor)
    entries = entries or 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        data = _words(ds, data, wide=len(data) >= 2 * entries)
    table = np.atleast_1d(np.asarray(data, np.float64))
    if first >= 1 << 15 and most < first:  # implicit VR reads a negative number as unsigned
        first -= 1 << 16
    if table.min() < 0:  # as does a signed one where numbers are unsigned
        table = np.where(table < 0, table + (1 << 16), table)
    used = max(8, int(table.max()).bit_length())
    if bits == 16 and table.max() > 1 or used > bits:  # words of 16 bits may hold fewer, or more
        bits = used
    if not 1 <= bits <= 16 or not 0 < entries <= len(table):
        raise GreyError("its look-up table is shorter than it says")
    index = np.clip(np.floor(values.astype(np.float64)) - first, 0, entries - 1)
    if not np.isfinite(index).all():
        raise GreyError("it has pixels that are NaN")
    return table[index.astype(np.int64)], bits


def _palette(
    ds: Dataset, stored: Num[np.ndarray, "h w"], most: float
) -> tuple[Num[np.ndarray, "h w 3"], float]:
    """(colours, white). Tables of 8-bit values stand in words as well as in bytes."""
    _check_palette(ds)
    if "RedPaletteColorLookupTableData" not in ds:  # segmented
        looked_up = apply_color_lut(stored, ds)
        return looked_up, float(np.iinfo(looked_up.dtype).max)
    colours, white = [], 255.0
    for colour in ("Red", "Green", "Blue"):
        entries, first, _ = (int(x) for x in ds[f"{colour}PaletteColorLookupTableDescriptor"].value)
        entries = entries or 1 << 16
        data = ds[f"{colour}PaletteColorLookupTableData"].value
        table = _words(ds, data, wide=len(data) >= 2 * entries)[:entries]
        if len(table) < entries:
            raise GreyError("its palette is shorter than it says")
        if first >= 1 << 15 and most < first:  # a negative number read as unsigned
            first -= 1 << 16
        white = 65535.0 if table.max() > 255 else white
        colours.append(table[np.clip(stored.astype(np.int64) - first, 0, entries - 1)])
    return np.stack(colours, axis=-1), white


def _check_palette(ds: Dataset) -> None:
    """A segmented palette is refused where it would unroll to more than a palette can hold."""
    for colour in ("Red", "Green", "Blue"):
        packed = ds.get(f"Segmented{colour}PaletteColorLookupTableData")
        if packed is not None:
            wide = int(ds.RedPaletteColorLookupTableDescriptor[2]) > 8
            if sum(_segment_lengths(_words(ds, packed, wide))) > 1 << 16:
                raise GreyError("its segmented palette is larger than a palette can be")


def _segment_lengths(words: Num[np.ndarray, " n"]) -> Iterator[int]:
    """Entries of each discrete (0) or linear (1) segment; indirect ones could unroll for ever."""
    offset = 0
    while offset + 1 < len(words):
        kind, length = int(words[offset]), int(words[offset + 1])
        if kind > 1:
            raise GreyError("its segmented palette has indirect segments, which are not read")
        yield length
        offset += 2 + (length if kind == 0 else 1)


def _words(ds: Dataset, data: bytes, wide: bool) -> Num[np.ndarray, " n"]:
    little = ds.file_meta.TransferSyntaxUID.is_little_endian
    return np.frombuffer(data, ("<u2" if little else ">u2") if wide else np.uint8)


def _item(ds: Dataset, name: str, frame: int) -> Dataset:
    """Where to look for an attribute: the frame's group, the shared one, else the file itself."""
    own = (ds.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    shared = (ds.get("SharedFunctionalGroupsSequence") or [])[:1]
    return next((group[name][0] for group in (*own, *shared) if group.get(name)), ds)


def _numbers(value: Any) -> list[float]:
    """One or more numbers of an element; [] for none."""
    return [] if value is None or value == "" else np.ravel(value).astype(float).tolist()
