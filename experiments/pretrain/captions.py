"""Captions in many wordings, what each one describes, and the phrases of the text teacher."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .views import Row


class Modality(NamedTuple):
    """Words of one kind of image."""

    scans: tuple[str, ...]  # of the image
    organ: str
    findings: dict[str, tuple[str, ...]]  # finding of captions.csv -> its wordings
    any_finding: tuple[str, ...] = ()  # wordings that are true of all its findings
    mirror: bool = True  # left and right may change places: no heart or liver to tell them by


MODALITIES = {
    "brain mri": Modality(
        ("brain mri", "brain mri scan", "head mri", "mri of the brain", "mr image of the brain"),
        "brain",
        {
            "glioma": ("glioma", "a glioma", "glial tumor"),
            "meningioma": ("meningioma", "a meningioma"),
            "pituitary tumor": ("pituitary tumor", "pituitary adenoma", "a pituitary mass"),
        },
        ("a brain tumor", "a tumor", "a tumour", "an intracranial mass", "a lesion", "cancer"),
    ),
    "chest x-ray": Modality(
        ("chest x-ray", "chest radiograph", "chest film", "x-ray of the chest", "lung x-ray"),
        "lungs",
        {"pneumonia": ("pneumonia", "lung opacity", "consolidation", "an infiltrate")},
        ("lung infection", "airspace disease"),
        mirror=False,
    ),
    "breast ultrasound": Modality(
        ("breast ultrasound", "breast sonogram", "ultrasound of the breast"),
        "breast",
        {
            "benign breast mass": ("a benign breast mass", "a benign lesion", "a cyst"),
            "malignant breast mass": ("a malignant breast mass", "breast cancer", "carcinoma"),
        },
        ("a breast mass", "a mass", "a lesion", "a tumor", "a nodule"),
    ),
    "knee x-ray": Modality(
        ("knee x-ray", "knee radiograph", "x-ray of the knee", "radiograph of the knee joint"),
        "knee",
        {
            "mild osteoarthritis": ("mild osteoarthritis", "mild degenerative change"),
            "moderate osteoarthritis": ("moderate osteoarthritis",),
            "severe osteoarthritis": ("severe osteoarthritis", "advanced osteoarthritis"),
        },
        ("osteoarthritis", "joint space narrowing", "osteophytes", "arthrosis"),
    ),
    "gallbladder ultrasound": Modality(
        ("gallbladder ultrasound", "ultrasound of the gallbladder", "abdominal ultrasound"),
        "gallbladder",
        {"biliary atresia": ("biliary atresia", "a small gallbladder")},
    ),
    "chest ct": Modality(
        ("chest ct", "ct of the chest", "lung ct", "computed tomography of the lungs"),
        "lungs",
        {"lung cancer": ("lung cancer", "a lung tumor", "a pulmonary mass")},
        mirror=False,
    ),
    "capsule endoscopy": Modality(
        ("capsule endoscopy", "capsule endoscopy image", "wireless endoscopy of the bowel"),
        "small bowel",
        {"bleeding": ("bleeding", "blood", "a hemorrhage")},
    ),
}
# Every (modality, finding) of the training images; "" is a healthy one.
CLASSES = tuple((name, f) for name, m in MODALITIES.items() for f in ("", *m.findings))

WITH = (
    "{scan} with {f}", "{scan} showing {f}", "signs of {f} in the {organ}", "{f} in the {organ}",
    "abnormal {scan} with {f}", "{scan}, finding: {f}", "evidence of {f} on {scan}", "{organ}: {f}",
)  # fmt: skip
WITHOUT = (
    "{scan} without {f}", "no signs of {f} in the {organ}", "no evidence of {f} on {scan}",
    "no {f} in the {organ}", "{scan}, negative for {f}",
)  # fmt: skip
NORMAL = (
    "a normal {scan}", "normal {organ} appearance", "{scan} of a healthy {organ}",
    "healthy {organ}", "a {scan} of a healthy patient", "{scan} with no abnormality",
    "unremarkable {scan}", "{scan} without abnormal findings",
    "normal {organ}, no signs of disease", "{scan}, no finding",
)  # fmt: skip
ABNORMAL = (
    "an abnormal {scan}", "abnormal {organ} appearance", "{scan} of a diseased {organ}",
    "diseased {organ}", "a {scan} of a sick patient", "{scan} with an abnormality",
    "pathological {scan}", "{scan} with abnormal findings", "{organ} with signs of disease",
)  # fmt: skip
ANY_NORMAL = ("a healthy scan", "normal image", "no signs of disease", "healthy tissue")
ANY_ABNORMAL = ("an abnormal scan", "diseased tissue", "signs of disease", "an abnormality")
PLAIN = ("a {scan}", "{scan}", "medical image: {scan}", "image of the {organ}, {scan}")


class Caption(NamedTuple):
    """A text, the classes it is true of, and the plane it names ("" for none)."""

    text: str
    classes: tuple[int, ...]
    plane: str


def class_of(row: Row) -> int:
    return CLASSES.index((row.modality, row.finding))


def classes_of(modality: str, healthy: bool | None) -> tuple[int, ...]:
    """Classes of a modality ("" for all); healthy ones, diseased ones, or both."""
    return tuple(
        number
        for number, (name, finding) in enumerate(CLASSES)
        if modality in ("", name) and healthy in (None, finding == "")
    )


def wordings(modality: str) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Words for the findings of a modality, and the classes that they are true of."""
    m = MODALITIES[modality]
    each = [(words, (CLASSES.index((modality, f)),)) for f, words in m.findings.items()]
    return each + ([(m.any_finding, classes_of(modality, False))] if m.any_finding else [])


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _state_caption(row: Row, scan: str, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
    """Wording of normal or abnormal, or of a finding present or absent."""
    healthy, organ = row.state == "normal", MODALITIES[row.modality].organ
    chance = rng.random()
    if chance < 0.1:
        return _pick(rng, ANY_NORMAL if healthy else ANY_ABNORMAL), classes_of("", healthy)
    if chance < 0.45:
        template = _pick(rng, NORMAL if healthy else ABNORMAL)
        return template.format(scan=scan, organ=organ), classes_of(row.modality, healthy)
    true = [f for f in wordings(row.modality) if healthy or class_of(row) in f[1]]
    words, classes = _pick(rng, true)
    word = _pick(rng, words)
    if healthy:  # other findings leave "no glioma" true of a meningioma as well
        absent = tuple(c for c in classes_of(row.modality, None) if c not in classes)
        bare = word.removeprefix("an ").removeprefix("a ")
        return _pick(rng, WITHOUT).format(scan=scan, organ=organ, f=bare), absent
    return _pick(rng, WITH).format(scan=scan, organ=organ, f=word), classes


def make_caption(row: Row, rng: np.random.Generator, findings: bool = True) -> Caption:
    """One wording for an image.

    Without `findings`, and of rows whose state could be told from the source of the image
    (`state_from`), no word tells disease from health.
    """
    scan = _pick(rng, MODALITIES[row.modality].scans)
    plane = row.plane if row.plane and rng.random() < 0.35 else ""
    scan = f"{plane} {scan}".strip()
    if findings and row.state_from == "label" and rng.random() < 0.85:
        text, classes = _state_caption(row, scan, rng)
        return Caption(text, classes, plane if plane and plane in text else "")
    text = _pick(rng, PLAIN).format(scan=scan, organ=MODALITIES[row.modality].organ)
    return Caption(text, classes_of(row.modality, None), plane)


def matches(captions: list[Caption], rows: list[Row]) -> np.ndarray:
    """[images, captions] 1 where the caption is true of the image."""
    return np.array(
        [[class_of(r) in c.classes and c.plane in ("", r.plane) for c in captions] for r in rows],
        np.float32,
    )


ANATOMY = (
    "brain", "breast", "chest", "lungs", "heart", "liver", "kidney", "spleen", "pancreas",
    "prostate", "thyroid", "bone", "spine", "knee", "hip", "shoulder", "skin", "retina", "colon",
    "stomach", "bladder", "uterus", "ovary", "artery", "lymph node", "skull", "pituitary gland",
    "ventricle", "gallbladder", "small bowel",
)  # fmt: skip
IMAGING = (
    "mri", "x-ray", "ultrasound", "ct", "mammography", "radiograph", "flair mri", "t1-weighted mri",
    "t2-weighted mri", "endoscopy", "histology", "fundus photograph", "dermoscopy",
    "optical coherence tomography",
)  # fmt: skip
FRAMES = (
    "no signs of {}", "no evidence of {}", "signs of {}", "{}", "a scan with {}",
    "a patient with {}", "image showing {}", "without {}", "suspicious for {}",
    "consistent with {}",
)  # fmt: skip


def phrase_corpus(terminology: Path, seed: int, findings: bool = True) -> list[str]:
    """Medical phrases without images: anatomy, modalities, diseases, radiologists' mentions.

    With `findings` off, only anatomy and modalities remain.
    """
    rng = np.random.default_rng([seed, 11])
    places = [f"{m} of the {a}" for m in IMAGING for a in ANATOMY] + list(ANATOMY + IMAGING)
    if not findings:
        return places
    states = [f"{s} {p}" for p in places for s in ("normal", "abnormal", "healthy", "diseased")]
    with open(terminology / "disease_ontology" / "HumanDO.tsv", newline="") as file:
        diseases = sorted({row["label"].lower() for row in csv.DictReader(file, delimiter="\t")})
    mentions = [
        line.strip().lower()
        for path in sorted((terminology / "chexpert_labeler" / "phrases").rglob("*.txt"))
        for line in path.read_text().splitlines()
        if line.strip()
    ]
    words = [w for name in MODALITIES for names, _ in wordings(name) for w in names]
    named = [w for w in diseases if len(w) < 60] + mentions * 3 + words * 6
    framed = [_pick(rng, FRAMES).format(w) for w in named]
    return sorted(set(places + states + named + framed))
