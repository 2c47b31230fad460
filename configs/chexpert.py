"""CheXpert-v1.0-small (Irvin et al. 2019), frontal views: supports from train.csv, test valid.csv.

python -m medclip_jax.main --config configs/chexpert.py:k=16,seed=0,root=DIR --workdir runs/chexpert

DIR is the folder of train.csv and valid.csv, or one or two levels above it. The films have no
masks. --config.data.uncertain says what label -1 means.
"""

from medclip_jax import config
from medclip_jax.data.catalog import PRESETS


def get_config(arg: str = ""):
    return config.base(arg, name="chexpert", **PRESETS["chexpert"])
