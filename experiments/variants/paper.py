"""The paper's own recipe, what each part of it is worth inside it, and each part alone.

`paper` is the recipe; `without-PART` takes one part off, `bare` takes off all of them and
`only-PART` adds one to bare prompts. For differences to `bare` run the second half with
--only bare,only-recipe,...: the first variant that runs is the base. Resumable, as every sweep:

python experiments/sweep.py --variants paper --k 16 --draws 5 --split peer clean \
  --config configs/busi.py configs/brain_mri.py configs/chest_xray.py \
  --runs runs/paper-parts --out results/paper-parts --set data.root=/data
"""

PARTS = {  # part -> the fields that take it off; what is not named stays as in the recipe
    "recipe": {"data.recipe": ""},
    "augmentation": {"augment": "", "loss.simclr": 0.0},  # SimCLR compares augmented copies
    "ontology": {"prompts.phrases": "templates"},
    "refinement": {"model.refine": False},
    "language-adapter": {"model.language": "", "model.language_tuned": False},
    "scales": {"score.tiles": 1},
    "dropout": {"model.dropout": 0.0},
    "filter": {"score.map_filter": ""},
    "simclr": {"loss.simclr": 0.0},
    "alignment-loss": {"loss.align": 0.0},
    "prompt-loss": {"loss.prompt": 0.0},
    "distance": {"model.form": "softmax"},
    "maml": {"learner": "joint", "steps": 100},
}
BARE = {name: value for off in PARTS.values() for name, value in off.items()}
NEEDS = {"simclr": "augmentation"}  # part -> another that it cannot be without


def only(part: str) -> dict:
    """Bare prompts with one part, and with what it needs."""
    own = PARTS[part] if part == "simclr" else PARTS[part].keys() - {"loss.simclr"}
    added = {*own, *(PARTS[NEEDS[part]] if part in NEEDS else ())}
    return {name: value for name, value in BARE.items() if name not in added}


VARIANTS = {"paper": {"method": "paper"}}
VARIANTS |= {f"without-{part}": {"method": "paper"} | off for part, off in PARTS.items()}
VARIANTS |= {"bare": {"method": "paper"} | BARE}
VARIANTS |= {f"only-{part}": {"method": "paper"} | only(part) for part in PARTS}
