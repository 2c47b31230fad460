"""The closest peer, as released and step by step nearer to ours: what is method and what tuning.

`mediclip` is the peer as released: 200 epochs, the largest pixel as the image's score. `-top5` has
the mean of the largest 5% in its place, as ours, `-100-steps` stops when ours does. What remains
from `mediclip-top5-100-steps` to `learned-branch` is of our branch that learns, what remains from
there to `ours` of the branches that learn nothing: memory and plain prompts.
"""

from ml_collections import ConfigDict

from medclip_jax.config import EPOCHS, PRESETS, STEPS, flat

TOP5 = dict(flat(ConfigDict(PRESETS["mediclip"]))) | {"method": "ours", "score.top": 0.05}
WHOLE = {"steps": lambda k: EPOCHS * -(-k // 8), "synthesis.variants": EPOCHS}  # as `mediclip`

VARIANTS = {
    "ours": {"method": "ours"},
    "no-plain-prompts": {"branches": ("learned", "memory")},
    "learned-branch": {"branches": ("learned",)},
    "mediclip": {"method": "mediclip"},
    "mediclip-top5": TOP5 | WHOLE,
    "mediclip-100-steps": {"method": "mediclip", "steps": STEPS},
    "mediclip-top5-100-steps": TOP5 | {"steps": STEPS, "synthesis.variants": EPOCHS},
    "memory": {"method": "memory"},
    "zero_shot": {"method": "zero_shot"},
}
