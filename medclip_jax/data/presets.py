"""What each data set shows, written once: config files and episodes of several sets read it here.

modality, anatomy and conditions fill the prompt templates.
"""

PRESETS: dict[str, dict] = {
    "busi": {
        "modality": "breast ultrasound",
        "anatomy": "breast",
        "conditions": ("tumor", "mass", "lesion"),
    },
    "brain_mri": {
        "modality": "brain MRI",
        "anatomy": "brain",
        "conditions": ("tumor", "mass", "lesion"),
    },
    "chest_xray": {
        "modality": "chest X-ray",
        "anatomy": "lung",
        "conditions": ("pneumonia", "opacity", "consolidation"),
    },
    "chexpert": {
        "modality": "chest X-ray",
        "anatomy": "lung",
        "conditions": ("opacity", "effusion", "consolidation", "cardiomegaly"),
    },
}
PRESETS |= {
    "phantom-ultrasound": PRESETS["busi"],
    "phantom-mri": PRESETS["brain_mri"],
    "phantom-xray": {
        "modality": "chest X-ray",
        "anatomy": "lung",
        "conditions": ("nodule", "opacity", "lesion"),
    },
}

# The recommended preprocessing of each set's modality (preprocess.RECIPES), used where it is asked
# for by name: config.meta.recipe=own.
RECIPES = {
    "busi": "ultrasound",
    "brain_mri": "mri",
    "chest_xray": "xray",
    "chexpert": "xray",
    "phantom-ultrasound": "ultrasound",
    "phantom-mri": "mri",
    "phantom-xray": "xray",
}
