"""Your own images in the MVTec-AD layout: train/good, test/good, test/<kind>, ground_truth/<kind>.

python -m medclip_jax.main --config configs/folder.py:k=8,root=/data/mine --workdir runs/mine \
  --config.data.modality='brain MRI' --config.data.anatomy=brain
"""

from medclip_jax import config


def get_config(arg: str = ""):
    return config.base(arg, name="folder")
