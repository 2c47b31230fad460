"""Where each data set comes from, under which licence, and what to cite."""

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
# The preprocessing.RECIPES of each set's modality, for sets named in config.meta.data.
RECIPES = dict.fromkeys(("busi", "phantom-ultrasound"), "ultrasound")
RECIPES |= dict.fromkeys(("brain_mri", "phantom-mri"), "mri")
RECIPES |= dict.fromkeys(("chest_xray", "chexpert", "phantom-xray"), "xray")
