"""Simulated breast ultrasound with known lesions: the first run, nothing to download.

python -m medclip_jax.main --config configs/phantom.py --workdir runs/phantom

Other simulated sets: --config.data.name=phantom-mri or phantom-xray.
"""

from medclip_jax import config
from medclip_jax.data.catalog import PRESETS


def get_config(arg: str = ""):
    return config.base(arg, name="phantom-ultrasound", **PRESETS["phantom-ultrasound"])
