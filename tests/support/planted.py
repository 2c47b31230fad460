"""An invented identity in every field that a file has for text, numbers, dates and identifiers."""

import io
import re
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image, PngImagePlugin
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from tests.support.predicting import PLANTED, noise

MARK = "Zq7Plant"  # in every text and every name
NUMBER = "99775533"  # in every identifier, date, time and number
SECRETS = re.compile(
    f"{MARK}|{NUMBER}|19997755|997755|977Y|1\\.2\\.826\\.0\\.1\\.77|{'|'.join(PLANTED)}".encode(),
    re.I,
)
BYTES = MARK.encode()
VALUES = {  # by VR
    **dict.fromkeys(("LO", "SH", "ST", "LT", "UT", "UC", "AE"), MARK),
    **dict.fromkeys(("OB", "OW", "UN"), BYTES),
    **{"PN": f"{MARK}^{MARK}", "CS": MARK.upper(), "UR": f"http://{MARK}", "UI": f"1.2.{NUMBER}.4"},
    **{"DA": "19997755", "TM": "997755.33", "DT": "9977553311", "AS": "977Y"},
    **{"IS": NUMBER, "DS": NUMBER},
}
# what says how pixels are read, where they lie, and what kind of object it is
NEEDED = {
    *("SpecificCharacterSet", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames"),
    *("PlanarConfiguration", "PixelData", "FloatPixelData", "DoubleFloatPixelData", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SOPClassUID"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "ModalityLUTSequence"),
    *("SequenceOfUltrasoundRegions", "DirectoryRecordSequence", "PresentationLUTShape"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
}


def every_field(nested: bool = True) -> Dataset:
    """Each element of the standard's dictionary, overlays and private blocks, planted.

    nested: sequences too, each of one item with an element of every VR.
    """
    ds = Dataset()
    item = Dataset()
    for tag, (vr, _, _, _, name) in DicomDictionary.items():
        vr = vr.split(" or ")[0]
        skipped = tag < 0x00080000 or tag >> 16 == 0xFFFE or name in NEEDED or "Lookup" in name
        if skipped or not name:
            continue
        if vr in VALUES:
            element = DataElement(tag, vr, VALUES[vr], validation_mode=0)
            ds.add(element)
            if vr not in {own.VR for own in item}:
                item.add(element)
        elif vr == "SQ" and nested:
            ds.add_new(tag, "SQ", [item])
    for group in (0x6000, 0x6002, 0x601E):
        fields = {0x10: ("US", 8), 0x11: ("US", 8), 0x40: ("CS", "G"), 0x50: ("SS", [1, 1])}
        fields |= {0x100: ("US", 1), 0x102: ("US", 0), 0x3000: ("OW", BYTES)}
        fields |= {e: ("LO", MARK) for e in (0x22, 0x45, 0x1500)} | {0x4000: ("LT", MARK)}
        for number, (vr, value) in fields.items():
            ds.add_new(group << 16 | number, vr, value)
    for own in (ds, item):
        own.add_new(0x00290010, "LO", MARK)
        for number, vr in enumerate(("UN", "OB", "LT", "UI", "DS"), start=1):
            own.add_new(0x00291000 + number, vr, VALUES[vr])
    return ds


def plant_everywhere(path: Path, **elements) -> Path:
    """Plant every field of a DICOM file, functional groups, meta information and preamble too."""
    ds = pydicom.dcmread(path)
    frames = int(ds.get("NumberOfFrames", 1))
    for element in every_field():
        ds.add(element)
    shared = every_field(nested=False)
    shared.FrameContentSequence = [every_field(nested=False)]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = [every_field(nested=False) for _ in range(frames)]
    ds.LossyImageCompression = "01"
    meta = ds.file_meta
    meta.SourceApplicationEntityTitle = meta.ImplementationVersionName = MARK
    meta.PrivateInformationCreatorUID, meta.PrivateInformation = f"1.2.{NUMBER}", BYTES
    ds.preamble = (BYTES * 16)[:128]
    for name, value in elements.items():
        setattr(ds, name, value)
    meta.MediaStorageSOPInstanceUID, meta.MediaStorageSOPClassUID = (
        ds.SOPInstanceUID,
        ds.SOPClassUID,
    )
    ds.save_as(path)
    return path


def pictures(folder: Path) -> list[Path]:
    """PNG, JPEG, TIFF and BMP with EXIF, XMP, IPTC, ICC, comments and text of every kind."""
    image = Image.fromarray(noise(1, (40, 50, 3)))
    exif = Image.Exif()
    for tag in (0x010E, 0x010F, 0x0110, 0x0131, 0x013B, 0x8298):  # maker, model, artist, ...
        exif[tag] = MARK
    exif[0x0132] = f"{NUMBER}:01"
    exif.get_ifd(0x8769).update({0x9286: BYTES, 0xA420: MARK, 0xA430: MARK, 0xA431: MARK})
    exif.get_ifd(0x8825).update({29: MARK, 27: BYTES})  # GPS
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><a>" + BYTES + b"</a></x:xmpmeta>"
    iptc = b"\x1c\x02\x05" + struct.pack(">H", len(BYTES)) + BYTES  # title
    photoshop = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + b"\0" * (len(iptc) % 2)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Patient", MARK)
    texts.add_text("History", f"{MARK} " * 99, zip=True)
    texts.add_itxt("Naam", MARK, lang="nl", tkey=MARK)
    texts.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    texts.add(b"prVt", BYTES)
    image.save(folder / f"{MARK}.png", pnginfo=texts, exif=exif, icc_profile=profile())
    comment = BYTES + b" comment"
    image.save(folder / f"{MARK}.jpg", comment=comment, exif=exif, icc_profile=profile(), xmp=xmp)
    jpeg = (folder / f"{MARK}.jpg").read_bytes()
    blocks = b"".join(
        b"\xff" + kind + struct.pack(">H", len(body) + 2) + body
        for kind, body in ((b"\xed", b"Photoshop 3.0\0" + photoshop), (b"\xef", BYTES))
    )
    (folder / f"{MARK}.jpg").write_bytes(jpeg[:2] + blocks + jpeg[2:] + BYTES)
    tags = dict.fromkeys((269, 270, 271, 272, 285, 305, 306, 315, 316, 33432, 42112), MARK)
    image.save(folder / f"{MARK}.tif", tiffinfo=tags | {700: xmp, 33723: iptc, 34377: photoshop})
    image.save(folder / f"{MARK}.bmp")
    with (folder / f"{MARK}.bmp").open("ab") as file:
        file.write(BYTES)
    return sorted(folder.glob(f"{MARK}.*"))


def profile() -> bytes:
    """An sRGB profile with a description that names someone."""
    from PIL import ImageCms

    raw = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return raw.replace(b"s\0R\0G\0B", b"Z\0q\x007\0P")[: len(raw)]


def volume(path: Path) -> Path:
    """A NIfTI file whose text fields and extensions name someone."""
    image = nibabel.Nifti1Image(noise(1, (20, 24, 3)), np.eye(4))
    for name in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[name] = BYTES
    for code in (4, 6, 18):  # AFNI, comment, MATLAB
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, BYTES * 9))
    image.to_filename(path)
    return path


def texts_of(raw: bytes) -> list[bytes]:
    """The bytes, and what is packed in them or written with more bytes a letter."""
    parts = [raw, raw.replace(b"\0", b"")]
    if raw[:4] == b"\x89PNG":
        at = 8
        while at < len(raw):
            size, name = int.from_bytes(raw[at : at + 4]), raw[at + 4 : at + 8]
            data = raw[at + 8 : at + 8 + size]
            assert name in (b"IHDR", b"tEXt", b"IDAT", b"IEND", b"pHYs"), name
            assert name != b"tEXt" or data == b"Software\0medclip_jax"
            at += size + 12
        with Image.open(io.BytesIO(raw)) as image:
            parts.append(image.tobytes() + repr(image.info).encode())
    if raw[:2] == b"\x1f\x8b":
        parts.append(zlib.decompress(raw, 31))
    return parts
