"""What does each part contribute? One switch at a time, from the full model and from the bare one.

`full` has every part on and `without-PART` takes one away; `bare` has every part off and
`with-PART` adds one. Differences are to `full`; for differences to `bare` run the second half with
--only bare,with-fusion,...: the first variant that runs is the base.
"""

SWITCHES = {  # part -> (fields when on, fields when off)
    "fusion": (
        {"branches": ("learned", "memory", "zero_shot_image")},
        {"branches": ("learned",)},
    ),
    "templates": ({"prompts.phrases": "templates"}, {"prompts.phrases": "words"}),
    "synthesis": ({"synthesis.preset": "medclip"}, {"synthesis.preset": "mediclip"}),
    "dice-loss": ({"loss.dice": 1.0}, {"loss.dice": 0.0}),
    "alignment-loss": ({"loss.align": 0.1}, {"loss.align": 0.0}),
    "prompt-loss": ({"loss.prompt": 0.1}, {"loss.prompt": 0.0}),
    "learned-scale": ({"model.learn_scale": True}, {"model.learn_scale": False}),
    "dropout": ({"model.dropout": 0.1}, {"model.dropout": 0.0}),
    "augmentation": (
        {"augment": "flip=0.5,rotate=10,intensity=0.2"},
        {"augment": ""},
    ),
    "preprocessing": ({"data.recipe": "clahe"}, {"data.recipe": ""}),
    "maml": ({"learner": "maml"}, {"learner": "joint"}),
    "tiles": ({"score.tiles": 2}, {"score.tiles": 1}),
    "map-filter": (
        {"score.map_filter": "median=5,min_area_pixels=64,min_area_mm2=10,sigma=4"},
        {"score.map_filter": ""},
    ),
    "top-patches": ({"score.top": 0.05}, {"score.top": 0.0}),
}


def fields(side: int) -> dict:
    """All parts on (0) or off (1)."""
    return {name: value for switch in SWITCHES.values() for name, value in switch[side].items()}


VARIANTS = {"full": fields(0)}
VARIANTS |= {f"without-{part}": fields(0) | off for part, (_, off) in SWITCHES.items()}
VARIANTS |= {"bare": fields(1)}
VARIANTS |= {f"with-{part}": fields(1) | on for part, (on, _) in SWITCHES.items()}
