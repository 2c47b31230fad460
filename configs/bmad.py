"""BMAD's six data sets (Bao et al., CVPR 2024 workshops) as its archives unpack.

python -m medclip_jax.main --config configs/bmad.py:brain,k=16,root=DIR --workdir runs/bmad_brain

One of brain, liver, resc, oct2017, chest and histopathology. DIR is the set's own folder, with
train/good and test/{good,Ungood}, or one that holds folders such as Brain_AD.
"""

from medclip_jax import config, files
from medclip_jax.errors import ConfigError

SETS = {  # name: what the folder's name holds, modality, anatomy, conditions
    "brain": ("brain", "brain MRI", "brain", ("tumor", "lesion")),
    "liver": ("liver", "liver CT", "liver", ("tumor", "lesion")),
    "resc": ("resc", "retinal OCT", "retina", ("macular edema", "detachment")),
    "oct2017": ("oct2017", "retinal OCT", "retina", ("neovascularisation", "edema", "drusen")),
    "chest": ("chest", "chest X-ray", "lung", ("pneumonia", "opacity")),
    "histopathology": ("histo", "histopathology", "lymph node", ("metastasis", "tumor")),
}


def get_config(arg: str = ""):
    name, _, rest = arg.partition(",")
    if name not in SETS:
        raise ConfigError(
            f"configs/bmad.py was given the set {name!r}: give one of {', '.join(SETS)}, "
            "as in configs/bmad.py:brain,k=16,root=DIR"
        )
    part, modality, anatomy, conditions = SETS[name]
    words = {"modality": modality, "anatomy": anatomy, "conditions": conditions}
    c = config.base(rest, name="folder", **words)
    root = files.expanded(c.data.root)
    if c.data.root and not (root / "train").is_dir() and root.is_dir():
        fitting = sorted(p for p in root.iterdir() if part in p.name.lower() and p.is_dir())
        if len(fitting) == 1:
            c.data.root = str(fitting[0])
    return c
