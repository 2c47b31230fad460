"""Exact MAML against first order, ANIL and joint training, and remedies that might help MAML.

Only the learned branch scores: a memory of the supports would dilute what learners differ in. All
variants take the same number of gradients (forward and backward over one set of rows), so that
what an episode costs is not hidden; `gradients` in runs.csv shows it. `maml-one-set` and
`maml-three-sets` meta-train on simulated data sets in place of the target.
"""

GRADIENTS = 400


def variant(learner: str, tasks: int = 4, inner_steps: int = 1, **fields) -> dict:
    """Fields of a learner with as many optimisation steps as GRADIENTS allow."""
    per_step = 1 if learner == "joint" else tasks * (inner_steps + 1)
    fields |= {"learner": learner, "branches": ("learned",), "steps": GRADIENTS // per_step}
    return fields | {"meta.tasks": tasks, "meta.inner_steps": inner_steps}


SETS = ("phantom-ultrasound", "phantom-mri", "phantom-xray")
VARIANTS = {
    "joint": variant("joint"),
    "maml": variant("maml"),
    "fomaml": variant("fomaml"),
    "anil": variant("anil"),
    # remedies
    "meta-sgd": variant("meta_sgd"),
    "maml-rate-0.01": variant("maml", **{"meta.inner_rate": 0.01}),
    "maml-rate-0.2": variant("maml", **{"meta.inner_rate": 0.2}),
    "maml-adapt-0": variant("maml", **{"meta.adapt_steps": 0}),
    "maml-adapt-5": variant("maml", **{"meta.adapt_steps": 5}),
    "maml-inner-3": variant("maml", inner_steps=3, **{"meta.adapt_steps": 3}),
    "maml-outer-rate-4": variant("maml", learning_rate=4e-3),
    "joint-rate-4": variant("joint", learning_rate=4e-3),
    "maml-tasks-1": variant("maml", tasks=1),
    "maml-tasks-8": variant("maml", tasks=8),
    "maml-one-set": variant("maml", **{"meta.data": SETS[:1]}),
    "maml-three-sets": variant("maml", **{"meta.data": SETS}),
}
