"""Where each data set comes from, under which licence, and what to cite."""

from collections.abc import Iterable
from typing import NamedTuple


class About(NamedTuple):
    """What a TFDS builder says of its data set."""

    description: str
    homepage: str
    licence: str
    citation: str  # BibTeX
    by_hand: str = ""  # how to fetch it where no program may


ABOUT = {
    "busi": About(
        "Breast Ultrasound Images Dataset (BUSI): 780 images of 600 women, aged 25 to 75, with "
        "lesion masks. Normal is healthy; benign and malignant are abnormal.",
        "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset",
        "CC BY 4.0",
        """@article{aldhabyani2020busi,
  author  = {Al-Dhabyani, Walid and Gomaa, Mohammed and Khaled, Hussien and Fahmy, Aly},
  title   = {Dataset of breast ultrasound images},
  journal = {Data in Brief},
  volume  = {28},
  pages   = {104863},
  year    = {2020},
  doi     = {10.1016/j.dib.2019.104863}
}""",
    ),
    "brain_mri": About(
        "Brain MRI Images for Brain Tumor Detection: 253 slices of mixed size and mode, with 22 "
        "groups that are byte for byte the same. no is healthy; yes is abnormal; no masks.",
        "https://www.kaggle.com/datasets/navoneel/brain-mri-images-for-brain-tumor-detection",
        "not stated by the publisher",
        """@misc{chakrabarty2019brain,
  author       = {Chakrabarty, Navoneel},
  title        = {Brain {MRI} Images for Brain Tumor Detection},
  howpublished = {Kaggle},
  year         = {2019}
}""",
        "Kaggle asks for an account: fetch the archive from "
        "https://www.kaggle.com/datasets/navoneel/brain-mri-images-for-brain-tumor-detection "
        "and unpack it, so that the folders yes and no stand in brain_mri.",
    ),
    "chest_xray": About(
        "Labeled Chest X-Ray Images: films of children aged one to five. NORMAL is healthy; "
        "PNEUMONIA is abnormal; no masks. The archive's own test part (234 + 390) is the test set.",
        "https://data.mendeley.com/datasets/rscbjbr9sj/2",
        "CC BY 4.0",
        """@article{kermany2018identifying,
  author  = {Kermany, Daniel S. and Goldbaum, Michael and Cai, Wenjia and others},
  title   = {Identifying Medical Diagnoses and Treatable Diseases by Image-Based Deep Learning},
  journal = {Cell},
  volume  = {172},
  pages   = {1122--1131},
  year    = {2018},
  doi     = {10.1016/j.cell.2018.02.010}
}""",
        "Fetch ChestXRay2017.zip from https://data.mendeley.com/datasets/rscbjbr9sj/2 and unpack "
        "it, so that the folders train and test stand in chest_xray.",
    ),
    "chexpert": About(
        "CheXpert-v1.0-small: chest films of adults, labelled from their reports for 14 "
        "observations. Frontal views only; No Finding is healthy, any finding is abnormal. "
        "Supports come from train.csv, the test set is valid.csv; no patient is in both.",
        "https://stanfordmlgroup.github.io/competitions/chexpert/",
        "Stanford University Dataset Research Use Agreement: research only, no redistribution",
        """@inproceedings{irvin2019chexpert,
  author    = {Irvin, Jeremy and Rajpurkar, Pranav and Ko, Michael and Yu, Yifan and others},
  title     = {{CheXpert}: A Large Chest Radiograph Dataset with Uncertainty Labels and Expert
               Comparison},
  booktitle = {AAAI Conference on Artificial Intelligence},
  volume    = {33},
  pages     = {590--597},
  year      = {2019},
  doi       = {10.1609/aaai.v33i01.3301590}
}""",
        "Register at https://stanfordmlgroup.github.io/competitions/chexpert/, fetch "
        "CheXpert-v1.0-small.zip and unpack it, so that train.csv and valid.csv stand in "
        "CheXpert-v1.0-small.",
    ),
    "folder": About(
        "Images in folders, MVTec-AD convention: train/good, test/good, test/<kind>, "
        "ground_truth/<kind>/<name>_mask.png.",
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
        "that of the user's images",
        """@article{bergmann2021mvtec,
  author  = {Bergmann, Paul and Batzner, Kilian and Fauser, Michael and Sattlegger, David
             and Steger, Carsten},
  title   = {The {MVTec} Anomaly Detection Dataset},
  journal = {International Journal of Computer Vision},
  volume  = {129},
  pages   = {1038--1059},
  year    = {2021}
}""",
    ),
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
# The preprocessing.RECIPES of each set's modality, for sets named in config.meta.data.
RECIPES = dict.fromkeys(("busi", "phantom-ultrasound"), "ultrasound")
RECIPES |= dict.fromkeys(("brain_mri", "phantom-mri"), "mri")
RECIPES |= dict.fromkeys(("chest_xray", "chexpert", "phantom-xray"), "xray")


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


def with_role(*roles: str) -> tuple[str, ...]:
    """Names of the data sets of these roles, in the catalogue's order."""
    return tuple(name for name, about in EVIDENCE.items() if about.role in roles)


# Collections that are also in pre-training, with other patients: such a set is no unseen modality.
OTHER_PATIENTS = ("knee_xr", "gallbladder_us", "wce_bleed", "lung_ct")


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
