"""Published numbers, as context beside ours: never targets, never mixed with measured ones.

Image and pixel AUROC at K = 4, 8, 16, 32. Other splits, backbones and stopping rules than ours:
the paper's CheXpert row stands 15 points above everything else known, and peers' rows marked (N)
are a third party's transcription.
"""

K = (4, 8, 16, 32)
IMAGE_AUROC = {
    "busi": {
        "the paper, Table 1": (0.8636, 0.8701, 0.8778, 0.8862),
        "PatchCore (N)": (0.817, 0.826, 0.876, 0.889),
        "FusionMedCLIP (thesis)": (0.888, 0.896, 0.915, 0.921),
    },
    "brain_mri": {
        "the paper, Table 4": (0.9121, 0.9245, 0.9368, 0.9184),
        "PatchCore (N)": (0.708, 0.759, 0.795, 0.817),
        "FusionMedCLIP (thesis)": (0.935, 0.940, 0.948, 0.954),
    },
    "chexpert": {
        "the paper, Table 3": (0.8842, 0.9025, 0.9120, 0.8947),
        "MediCLIP (a user quoting it)": (None, None, 0.725, None),
        "FusionMedCLIP (thesis)": (0.711, 0.718, 0.736, 0.743),
    },
}
PIXEL_AUROC = {
    "busi": {
        "the paper, Table 2": (0.8574, 0.8621, 0.8675, 0.8721),
        "PatchCore (N)": (0.785, 0.781, 0.802, 0.803),
    },
}
