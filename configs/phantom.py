"""Simulated breast ultrasound with known lesions: the first run, nothing to download.

python -m medclip_jax.main --config configs/phantom.py --workdir runs/phantom

Other simulated sets: --config.data.name=phantom-mri or phantom-xray. Their lesions are small (1 to
3% of an image), so contours are tighter than by default, which was chosen with masks in sight.
"""

from medclip_jax import config
from medclip_jax.data.catalog import PRESETS


def get_config(arg: str = ""):
    c = config.base(arg, name="phantom-ultrasound", **PRESETS["phantom-ultrasound"])
    peak = c.score.get_ref("peak")  # of whatever method is chosen: mediclip and paper have none
    with c.score.unlocked():
        del c.score.peak
        c.score.peak = 2 * peak
    c.calibration.pixel_rate = 0.002
    return c
