"""From the stored values of a DICOM file to those on a screen: modality LUT, window, colour.

DICOM PS3.3: C.11.1 modality LUT, C.11.2 VOI LUT and window, C.7.6.3.1.2 photometric interpretation,
C.7.9 palettes, C.7.6.16 functional groups. Nothing here reads who the patient is.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut

from medclip_jax.io.image import COLOUR, GREY, LUMA, PALETTE, Window

CM, REGION_2D = 3, 1  # PS3.3 C.8.5.5: unit code of centimetres, spatial format of a 2-D image
MAX_PALETTE = 1 << 16
HOUNSFIELD = ("", "HU", "HU_MOD", "US")  # Rescale Type of CT: none, as many scanners, or these


class GreyError(ValueError):
    """A header that says nothing sensible about its grey values; the text names no patient."""


def display_values(
    ds: Dataset, stored: Num[np.ndarray, "h w *c"], frame: int, window: Window | None = None
) -> tuple[Float[np.ndarray, "h w"], bool]:
    """One frame as a screen would show it.

    Args:
      stored: as pydicom decodes it; colour as RGB.
      frame: its number from 0, to find its own window in an enhanced file.
      window: of Hounsfield units, in place of the file's own; see `lacks_hounsfield`.

    Returns:
      (values float64, scaled): scaled means in [0, 1] with black 0, by a window, a VOI LUT or
      colour. Else values are in the modality's units, for the caller to stretch and (MONOCHROME1)
      invert.

    Raises:
      GreyError: an impossible window, look-up table or palette.
    """
    kind = ds.PhotometricInterpretation
    if kind in COLOUR:
        return _luma(stored, 2.0 ** int(ds.BitsStored) - 1), True
    if kind == PALETTE:
        _check_palette(ds)
        looked_up = apply_color_lut(stored, ds)
        return _luma(looked_up, float(np.iinfo(looked_up.dtype).max)), True
    values, padding = _modality(ds, stored, frame), _padding(ds, stored)
    unit = window.apply(values) if window else _voi(ds, values, frame)
    if unit is None:  # padding as the darkest pixel, so that it does not widen the range
        rest = values[~padding]
        values[padding] = rest.max() if kind == "MONOCHROME1" else rest.min()
        return values, False
    if kind == "MONOCHROME1" and not window:
        unit = 1 - unit
    unit[padding] = 0
    return unit, True


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


def _ultrasound_spacing(ds: Dataset) -> list[float] | None:
    pairs = {
        (abs(float(r.PhysicalDeltaY)) * 10, abs(float(r.PhysicalDeltaX)) * 10)
        for r in ds.get("SequenceOfUltrasoundRegions") or []
        if r.get("RegionSpatialFormat") == REGION_2D
        and r.get("PhysicalUnitsXDirection") == r.get("PhysicalUnitsYDirection") == CM
        and "PhysicalDeltaX" in r
        and "PhysicalDeltaY" in r
    }
    return list(pairs.pop()) if len(pairs) == 1 else None


def _luma(colour: Num[np.ndarray, "h w 3"], white: float) -> Float[np.ndarray, "h w"]:
    luminance = sum(w * colour[..., i].astype(np.float64) for i, w in enumerate(LUMA))
    return np.clip(luminance / white, 0, 1)


def _modality(ds: Dataset, stored: Num[np.ndarray, "h w"], frame: int) -> Float[np.ndarray, "h w"]:
    if ds.get("ModalityLUTSequence"):
        return _look_up(ds, ds.ModalityLUTSequence[0], stored)[0]
    slope, intercept = _rescale(_item(ds, "PixelValueTransformationSequence", frame)) or (1, 0)
    return stored.astype(np.float64) * slope + intercept


def _rescale(group: Dataset) -> tuple[float, float] | None:
    slope, intercept = group.get("RescaleSlope"), group.get("RescaleIntercept")
    return None if slope is None or intercept is None else (float(slope), float(intercept))


def _padding(ds: Dataset, stored: Num[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels outside the image (PS3.3 C.7.5.1.1.2); none where all would be."""
    value = ds.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    ends = [int(value), int(ds.get("PixelPaddingRangeLimit", value))]
    if stored.dtype.kind == "i":  # implicit VR reads a negative number as unsigned
        ends = [x - (1 << 16) if x >= 1 << 15 else x for x in ends]
    padding = (stored >= min(ends)) & (stored <= max(ends))
    return padding if not padding.all() else ~padding


def _voi(
    ds: Dataset, values: Float[np.ndarray, "h w"], frame: int
) -> Float[np.ndarray, "h w"] | None:
    """[0, 1] by the first VOI LUT, else by the first window, else None."""
    group = _item(ds, "FrameVOILUTSequence", frame)
    if group.get("VOILUTSequence"):
        looked_up, bits = _look_up(ds, group.VOILUTSequence[0], values)
        return looked_up / (2.0**bits - 1)
    center, width = _first(group.get("WindowCenter")), _first(group.get("WindowWidth"))
    if center is None or width is None:
        return None
    function = str(group.get("VOILUTFunction") or "LINEAR")
    least = 1 if function == "LINEAR" else 0
    if not np.isfinite((center, width)).all() or width < least or width == 0:
        raise GreyError(f"its {function} window has the width {width:g}")
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise GreyError("its window has an unknown VOI LUT function")
    if width == 0:
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _look_up(
    ds: Dataset, item: Dataset, values: Num[np.ndarray, "h w"]
) -> tuple[Float[np.ndarray, "h w"], int]:
    """(table entries, bits per entry); values before and after the table take its ends."""
    entries, first, bits = (int(x) for x in item.LUTDescriptor)
    entries = entries or 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        data = _words(ds, data, wide=len(data) >= 2 * entries)
    table = np.atleast_1d(np.asarray(data, np.float64))
    if first >= 1 << 15 and values.max() < first:  # implicit VR reads a negative number as unsigned
        first -= 1 << 16
    if bits == 16 and 1 < table.max() < 1 << 12:  # a table of up to 12 bits in words of 16
        bits = max(8, int(table.max()).bit_length())
    if not 1 <= bits <= 16 or not 0 < entries <= len(table):
        raise GreyError("its look-up table is shorter than it says")
    index = np.clip(np.floor(values.astype(np.float64)) - first, 0, entries - 1)
    if not np.isfinite(index).all():
        raise GreyError("it has pixels that are NaN")
    return np.minimum(table[index.astype(np.int64)], 2.0**bits - 1), bits


def _check_palette(ds: Dataset) -> None:
    """A segmented palette is refused where it would unroll to more than a palette can hold."""
    for colour in ("Red", "Green", "Blue"):
        packed = ds.get(f"Segmented{colour}PaletteColorLookupTableData")
        if packed is not None:
            wide = int(ds.RedPaletteColorLookupTableDescriptor[2]) > 8
            if sum(_segment_lengths(_words(ds, packed, wide))) > MAX_PALETTE:
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


def _first(value: Any) -> float | None:
    """First of one or more numbers; None for none."""
    values = np.ravel([] if value is None or value == "" else value)
    return float(values[0]) if len(values) else None
