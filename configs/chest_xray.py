"""Open chest films of children (Kermany et al. 2018): supports from train/NORMAL, test 234 + 390.

python -m medclip_jax.main --config configs/chest_xray.py:k=16,seed=0,root=DIR --workdir runs/chest

DIR is the folder of train and test, or one or two levels above it. The films have no masks. On
them the memory alone is better than the fusion of branches: k=16,method=memory (docs/results.md);
better than both is --config.synthesis.preset=opacities, which was chosen on these very films.
"""

from medclip_jax import config
from medclip_jax.data.catalog import PRESETS


def get_config(arg: str = ""):
    return config.base(arg, name="chest_xray", **PRESETS["chest_xray"])
