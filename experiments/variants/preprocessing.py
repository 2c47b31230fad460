"""The effect of each preprocessing step, each recipe and each augmentation, one at a time.

Modalities whose anatomy elastic deformation would make implausible refuse it: leave it out there
with --only. For another method add --set method=memory.
"""

from medclip_jax.data import preprocessing

AUGMENTATIONS = {"flip": 0.5, "rotate": 10, "elastic": 0.01, "intensity": 0.1}

VARIANTS = {
    "none": {},
    **{step: {"data.recipe": step} for step in preprocessing.STEPS},
    **{f"recipe-{name}": {"data.recipe": name} for name in preprocessing.RECIPES},
    **{name: {"augment": f"{name}={strength}"} for name, strength in AUGMENTATIONS.items()},
}
