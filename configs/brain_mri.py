"""Kaggle's brain MRI slices (Chakrabarty 2019), peer split: pool of 32, test 66 + 155; no masks.

python -m medclip_jax.main --config configs/brain_mri.py:k=16,seed=0,root=DIR --workdir runs/brain

DIR is the folder of yes and no, or one or two levels above it.
"""

from medclip_jax import config
from medclip_jax.data.catalog import PRESETS


def get_config(arg: str = ""):
    return config.base(arg, name="brain_mri", **PRESETS["brain_mri"])
