"""Where each data set comes from, under which licence, and what to cite."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from medclip_jax import config_validation

ASSETS = Path(__file__).parents[1] / "assets"


class About(NamedTuple):
    """What a TFDS builder says of its data set."""

    description: str
    homepage: str
    licence: str
    citation: str  # BibTeX
    by_hand: str = ""  # how to fetch it where no program may


ABOUT = {
    name: About(**fields | {"citation": "\n".join(fields["citation"])})
    for name, fields in json.loads((ASSETS / "datasets.json").read_text("utf-8")).items()
}
MASSES = ("tumor", "mass", "lesion")
BREAST = {"modality": "breast ultrasound", "anatomy": "breast", "conditions": MASSES}
BRAIN = {"modality": "brain MRI", "anatomy": "brain", "conditions": MASSES}
CHEST = {"modality": "chest X-ray", "anatomy": "lung"}
PRESETS: dict[str, dict] = {
    "busi": BREAST,
    "brain_mri": BRAIN,
    "chest_xray": CHEST | {"conditions": ("pneumonia", "opacity", "consolidation")},
    "chexpert": CHEST | {"conditions": ("opacity", "effusion", "consolidation", "cardiomegaly")},
    "phantom-ultrasound": BREAST,
    "phantom-mri": BRAIN,
    "phantom-xray": CHEST | {"conditions": ("nodule", "opacity", "lesion")},
}
# Small sets in the MVTec-AD layout, `<root>/sets/<name>` or `<root>/<name>`, with their words.
SETS: dict[str, dict] = {
    name: {"modality": modality, "anatomy": anatomy, "conditions": conditions}
    for name, modality, anatomy, conditions in (
        ("oct_mx", "retinal OCT", "retina", ("macular edema", "fluid")),
        ("fundus_mx", "fundus photograph", "retina", ("retinopathy", "hemorrhage", "exudates")),
        ("knee_xr", "knee X-ray", "knee", ("osteoarthritis", "joint space narrowing")),
        ("derm_ph2", "dermoscopy", "skin", ("melanoma",)),
        ("gallbladder_us", "gallbladder ultrasound", "gallbladder", ("biliary atresia",)),
        ("wce_bleed", "capsule endoscopy", "small bowel", ("bleeding",)),
        ("lung_ct", "chest CT", "lung", ("tumor", "nodule", "mass")),
        ("histo_lung", "lung histology", "lung tissue", ("carcinoma",)),
        ("mammo_mias", "mammography", "breast", MASSES),
        ("blood_rbc", "blood smear", "red blood cell", ("malformation",)),
        ("spine_xr", "spine X-ray", "spine", ("scoliosis",)),
    )
}


class Evidence(NamedTuple):
    """What a data set may be used for, so that no figure rests on images seen before.

    role: `development` (labels may be looked at; choices are made here), `report` (scored only
    with a frozen configuration) or `pre-training` (of the embedded CLIP; never scored).
    collection: what the images were taken from.
    """

    role: str
    collection: str


EVIDENCE: dict[str, Evidence] = {
    "busi": Evidence("development", "busi"),
    "brain_mri": Evidence("development", "navoneel"),
    "chest_xray": Evidence("development", "kermany"),
    "oct_mx": Evidence("development", "oct_mx"),
    "fundus_mx": Evidence("development", "fundus_mx"),
    "knee_xr": Evidence("development", "oai_kl"),
    "derm_ph2": Evidence("development", "ph2"),
    "gallbladder_us": Evidence("development", "ba_gallbladder"),
    "wce_bleed": Evidence("development", "wcebleedgen"),
    "lung_ct": Evidence("development", "iq_oth_nccd"),
    "histo_lung": Evidence("development", "histo_lung"),
    "mammo_mias": Evidence("report", "mias"),
    "blood_rbc": Evidence("report", "blood_rbc"),
    "spine_xr": Evidence("report", "spine_xr"),
    "pretrain": Evidence("pre-training", "pretrain"),
}


def modality_kind(modality: str) -> str:
    """What two data sets of the same modality have in common: its kind, else its words."""
    kind = config_validation.recipe_of(modality)
    return kind if kind != config_validation.OTHER_RECIPE else " ".join(modality.lower().split())


def with_role(*roles: str) -> tuple[str, ...]:
    """Names of the data sets of these roles, in the catalogue's order."""
    return tuple(name for name, about in EVIDENCE.items() if about.role in roles)


# Collections that are also in pre-training, with other patients: such a set is no unseen modality.
OTHER_PATIENTS = ("knee_xr", "gallbladder_us", "wce_bleed", "lung_ct")


# Modalities whose findings were named in captions of the embedded CLIP's pre-training (its card).
CAPTIONED = (
    *("brain MRI", "chest X-ray", "breast ultrasound", "knee X-ray", "gallbladder ultrasound"),
    *("chest CT", "capsule endoscopy"),
)


def cautions(c: Any) -> list[str]:
    """A line where plain prompts are fused for a modality of which CAPTIONED tells nothing.

    They know what captions said (docs/embedded_clip.md). It changes no score.
    """
    fused = "zero_shot_image" in c.branches and c.method not in config_validation.FIXED_METHODS
    words = {*c.data.modality.lower().split()}
    known = any({*name.lower().split()} <= words for name in CAPTIONED)
    if known or not fused or c.clip.checkpoint != "compact":
        return []
    return [
        f"config.data.modality is {c.data.modality!r}, and the embedded CLIP has read captions of "
        f"{', '.join(CAPTIONED)}: of others its plain prompts may know no disease; compare with "
        "--config.branches=\"('learned','memory')\""
    ]


def seen_collections(sources: Iterable[str]) -> dict[str, str]:
    """Evaluation sets whose own collection is among `sources`, the collections of pre-training.

    Sets of OTHER_PATIENTS are not named: there the overlap is declared.
    """
    sources = set(sources)
    return {
        name: EVIDENCE[name].collection
        for name in with_role("development", "report")
        if EVIDENCE[name].collection in sources and name not in OTHER_PATIENTS
    }
