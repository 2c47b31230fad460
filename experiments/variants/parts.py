"""One change of one part of the default at a time: losses, model, training and scoring."""

VIEWS = {"augment": "flip=0.5,rotate=10,intensity=0.2"}

VARIANTS = {
    "default": {},
    "no-dice-loss": {"loss.dice": 0.0},
    "no-alignment-loss": {"loss.align": 0.0},
    "prompt-loss": {"loss.prompt": 0.1},
    "fixed-scale": {"model.learn_scale": False},
    "no-dropout": {"model.dropout": 0.0},
    "distance-form": {"model.form": "distance"},
    "token-refinement": {"model.refine": True},
    **{f"{p}-synthesis": {"synthesis.preset": p} for p in ("medclip", "mediclip", "opacities")},
    "augmentation": VIEWS,
    "augmentation-simclr": VIEWS | {"loss.simclr": 0.1},
    "maml": {"learner": "maml"},
    "two-tiles-per-side": {"score.tiles": 2},
    "map-filter": {"score.map_filter": "median=5,min_area_pixels=64,min_area_mm2=10,sigma=4"},
    "maximum-of-patches": {"score.top": 0.0},
}
