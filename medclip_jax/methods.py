"""What `config.method` may be, and the fields that a method fixes."""

from typing import Any

from medclip_jax import score_fields

METHODS = ("ours", "paper", "mediclip", "memory", "zero_shot", "thumbnails", "grey_level", "joint")
FIXED = ("memory", "zero_shot", "thumbnails", "grey_level")  # nothing learns
BRANCHES = ("learned", "memory", "zero_shot", "zero_shot_image")
LEARNERS = ("joint", "maml", "fomaml", "anil")

# MediCLIP as released (PEERS 5): its prompts, synthesis, losses and scoring on our tokens.
MEDICLIP: dict[str, Any] = {
    "prompts": {
        "phrases": "words",
        "context": 8,
        "position": "end",
        "shared": False,
        "causal": False,
        "init": "random",
    },
    "synthesis": {"preset": "mediclip", "partner": "support"},
    "model": {"form": "softmax", "learn_scale": False, "dropout": 0.0, "refine": False}
    | {"language": "", "language_tuned": False},
    "loss": {"focal": 1.0, "dice": 1.0, "align": 0.0, "prompt": 0.0, "simclr": 0.0},
    "score": {"top": 0.0, "tiles": 1},
    "distill": {"teacher": ""},
    "augment": dict.fromkeys(("flip", "flip_vertical", "rotate", "elastic", "intensity"), 0.0),
    "fusion": {"branches": ("learned",)},
    "optimizer": {"learning_rate": 1e-3, "b1": 0.5, "b2": 0.999},
    "learner": "joint",
    "epochs": 200,
}
# The paper to the letter where it is definite: MAML (11) over template prompts (3, 4) whose patches
# are refined (6), scored by distance to what is healthy (9) and by nothing else.
PAPER: dict[str, Any] = {
    "prompts": {"phrases": "templates", "context": 8, "shared": False, "causal": True},
    "synthesis": {"preset": "medclip", "partner": "self"},
    "model": {"form": "distance", "learn_scale": True, "dropout": 0.1, "refine": True},
    "loss": {"focal": 1.0, "dice": 1.0, "align": 0.1, "prompt": 0.1, "simclr": 0.1},
    "augment": {"flip": 0.5, "rotate": 10.0, "intensity": 0.2},
    "fusion": {"branches": ("learned",)},
    "learner": "maml",
    "epochs": 200,
}
PRESETS: dict[str, dict[str, Any]] = {
    "mediclip": MEDICLIP | {"score": MEDICLIP["score"] | {"suppress": score_fields.SUPPRESS}},
    "paper": PAPER,
    "joint": {"learner": "joint"},  # ours without episodes, whatever the learner of ours
}
