"""BUSI breast ultrasound (Al-Dhabyani et al. 2020), peer split: pool of 32, test 101 + 647.

python -m medclip_jax.main --config configs/busi.py:k=16,seed=0 --workdir runs/busi
"""

from medclip_jax import config
from medclip_jax.data.catalog import PRESETS


def get_config(arg: str = ""):
    return config.base(arg, name="busi", **PRESETS["busi"])
