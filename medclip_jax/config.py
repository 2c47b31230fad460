"""The one full list of configuration fields, and what follows from the ones that are given.

A config file holds only what differs: see configs/. It is named on the command line with its
arguments, `--config configs/busi.py:k=16,seed=0`; any field can be overridden after it,
`--config.steps=100`. The config is locked: a misspelt field is an error.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medclip_jax import learned_parts, score_fields
from medclip_jax.errors import ConfigError
from medclip_jax.methods import BRANCHES, FIXED, LEARNERS, METHODS, PRESETS

STEPS = 100  # of joint training where neither steps nor epochs are given; docs/parts.md says why
EPOCHS = 200  # of the other learners there, as peers count
ARGUMENTS = {"k": int, "seed": int, "method": str, "root": str}

CHOICES = {
    "method": METHODS,
    "learner": LEARNERS,
    "data.fit": ("stretch", "pad"),
    "data.split": ("peer", "clean"),
    "data.uncertain": ("exclude", "positive", "negative"),
    "data.blank": ("negative", "exclude"),
    "clip.dtype": ("float32", "bfloat16"),
    "cache_dtype": ("float32", "bfloat16", "float16"),
    "prompts.phrases": ("templates", "words", "ontology"),
    "prompts.position": ("end", "middle", "front"),
    "meta.recipe": ("target", "own"),
    "synthesis.preset": ("medclip", "mediclip"),
    "synthesis.partner": ("self", "support"),
    "model.form": ("softmax", "distance"),
    "fusion.weights": ("equal", "probes"),
    **score_fields.CHOICES,
}
LEAST = {
    "k": 0,  # 0: zero-shot; 1: nothing can be held out, see calibrate
    "calibration.folds": 2,  # what calibrates is held out from training
    **dict.fromkeys(("log_every", "checkpoint_every", "score.passes", "data.pool"), 1),
    **dict.fromkeys(("synthesis.variants", "fusion.probes", "augment.copies", "meta.tasks"), 1),
    **{f"meta.{x}": 0 for x in ("images", "shots", "query", "inner_steps", "adapt_steps")},
    **learned_parts.LEAST,
    **{"cluster.processes": 0, "cluster.process": -1, "cluster.timeout": 1, "cluster.heartbeat": 1},
    **dict.fromkeys(("seed", "batch", "steps", "prompts.context", "prompts.synonyms"), 0),
    **{"epochs": 0, "validations": 0, "explained": 0},
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.b1", "optimizer.b2"), 0),
    **{f"loss.{term}": 0 for term in ("focal", "dice", "align", "prompt", "simclr")},
    **score_fields.LEAST,
}
SHARES = {  # (smallest, largest, what to give)
    "augment.flip": (0, 1, "a probability from 0 to 1"),
    "augment.flip_vertical": (0, 1, "a probability from 0 to 1"),
    "augment.rotate": (0, 180, "an angle from 0 to 180 degrees"),
    "augment.elastic": (0, 0.05, "a share of the side from 0 to 0.05"),
    "augment.intensity": (0, 1, "a strength from 0 to 1"),
    **learned_parts.SHARES,
    "model.dropout": (0, 0.99, "a rate from 0 to 0.99"),
    "score.top": (0, 1, "a share from 0 to 1"),
    "explained": (0, 32, "a number of images from 0 to 32"),
    "memory.coreset": (0.001, 1, "a share above 0, up to 1"),
    "calibration.alpha": (0.0001, 0.9999, "a rate between 0 and 1"),
    "calibration.pixel_rate": (0.0001, 0.9999, "a rate between 0 and 1"),
    **score_fields.SHARES,
}

# What CheXpert's labels that say neither yes nor no mean (data/chexpert.py).
CHEXPERT = {
    "uncertain": "exclude",  # label -1: exclude | positive | negative
    "blank": "negative",  # not mentioned: negative | exclude
}
PROMPTS = {
    "phrases": "templates",  # templates | words (as MediCLIP) | ontology (templates and synonyms)
    "context": 8,  # learnable vectors per prompt
    "init": "random",  # of the context: random | a phrase such as "a photo of a"
    "position": "end",  # of the phrase: end | middle | front
    "shared": False,  # one context for all prompts
    "causal": True,  # CLIP's mask; False is MediCLIP's unmasked text tower
    "synonyms": 3,  # words per anatomy, condition and modality from the ontology; 0 = all
    "ontology_file": "",  # joined to the ontology: your CSV, a MRCONSO.RRF, an RF2 folder
}
FUSION = {
    "branches": ("learned", "memory", "zero_shot_image"),  # of method ours, any of BRANCHES
    "weights": "equal",  # of standardised branches: equal | probes, what each sees of them
    "probes": 12,  # altered copies of each support, of kinds never trained on, that weigh them
}
CALIBRATION = {
    "alpha": 0.1,  # false-alarm rate asked for
    "folds": 4,  # supports are held out in this many parts (2 to k)
    "pixel_rate": 0.02,  # share of held-out healthy pixels above the pixel threshold
}

# Episodes, for the learners other than joint; `data`, `images` and `recipe` are for all.
META = {
    "data": (),  # data sets of the tasks, "name" or "name=folder"; () = the target alone
    "images": 32,  # healthy images of each data set beside the target; 0 = all
    "recipe": "target",  # of those: the target's | own, of each set's modality (data/presets.py)
    "tasks": 4,  # per step
    "shots": 0,  # support rows of a task; 0 = min(8, k), at least 2
    "query": 0,  # query rows of a task; 0 = as shots
    "inner_steps": 1,
    "inner_rate": 0.05,
    "learn_rate": False,  # Meta-SGD: one inner rate per tensor is learned, from inner_rate
    "adapt_steps": 1,  # inner steps on the k supports after training; 0 = none
}

# Where the processes of one run find one another.
CLUSTER = {
    "coordinator": "",  # host:port of process 0; "" where TPU, SLURM or Open MPI tells it
    "processes": 0,  # how many; 0: told by the environment
    "process": -1,  # which one this is, from 0; -1: told by the environment
    "timeout": 300,  # seconds to wait for the others to come
    "heartbeat": 100,  # seconds of silence after which a process counts as dead
}

# Of the supports, in training: augment.Strengths. All strengths 0 is off.
AUGMENT = {
    "copies": 8,  # augmented copies per support
    "flip": 0.0,  # probability of mirroring left and right
    "flip_vertical": 0.0,  # probability of turning upside down
    "rotate": 0.0,  # largest angle, degrees
    "elastic": 0.0,  # sd of the displacement, share of the side; ultrasound and MRI only
    "intensity": 0.0,  # largest change of contrast, gamma and brightness
}


def parse_arg(arg: str) -> dict:
    """`k=16,seed=0` -> typed values. Raises ConfigError for an unknown name or a bad value."""
    given = {}
    for piece in filter(None, arg.split(",")):
        name, _, value = piece.partition("=")
        if name not in ARGUMENTS:
            known = ", ".join(ARGUMENTS)
            raise ConfigError(f"config argument {name!r} is unknown: give any of {known}")
        try:
            given[name] = ARGUMENTS[name](value)
        except ValueError:
            raise ConfigError(
                f"config argument {name}={value!r} is not a whole number: give one, as {name}=16"
            ) from None
    return given


def base(arg: str = "", **data) -> ConfigDict:
    """All fields with their defaults; `data` are the fields of the data set."""
    given = parse_arg(arg or "")
    c = ConfigDict()
    c.k = given.get("k", 16)  # healthy support images; 1: none can be held out; 0: zero-shot
    c.seed = given.get("seed", 0)  # of the support draw and of all training randomness
    c.method = given.get("method", "ours")  # METHODS
    c.data = {
        "name": "",  # see data/datasets.py: busi, brain_mri, chest_xray, folder, phantom-mri, ...
        "root": given.get("root", ""),  # folder of the data; "" takes $MEDCLIP_DATA
        "modality": "medical image",  # fills the prompt templates
        "anatomy": "tissue",
        "conditions": ("disease",),
        "split": "peer",  # as published tables | clean: near-duplicates and patients kept apart
        "pool": 32,  # healthy images set aside for supports, of sets without parts in peer
        "fit": "stretch",  # into the tower's square: stretch (as peers) | pad
        "recipe": "",  # preprocessing: "" | one of preprocess.RECIPES | steps, "wavelet,clahe"
    } | (CHEXPERT | data)
    c.clip = {
        "checkpoint": "compact",  # compact (embedded) | folder | Hub id
        "levels": (),  # tapped blocks, counted from 1; () = 1/2, 3/4 and the last
        "dtype": "float32",  # of the tower: float32 | bfloat16
    }
    c.cache = (
        ""  # folder of feature_cache and prepared data; "" takes $MEDCLIP_CACHE or the user's cache
    )
    c.cache_dtype = "float32"  # of the tokens on disk: float32 | bfloat16 | float16
    c.prompts = PROMPTS
    c.synthesis = {
        "preset": "medclip",  # medclip | mediclip (the peer, known faults included)
        "variants": 50,  # anomalous variants per support; an epoch uses one
        "partner": "self",  # CutPaste copies from the image itself | from any "support"
    }
    c.augment = AUGMENT
    c.model = learned_parts.MODEL
    c.loss = learned_parts.LOSS
    c.distill = learned_parts.DISTILL
    c.optimizer = {"learning_rate": 1e-3, "b1": 0.5, "b2": 0.999}  # Adam
    c.learner = "joint"  # LEARNERS, see learn.py
    c.meta = META
    c.epochs = 0  # passes over the supports; 0: STEPS steps of joint, EPOCHS of other learners
    c.batch = 0  # images per step; 0 = min(8, k)
    c.steps = 0  # optimisation steps; 0: from epochs, see `training_steps`
    c.score = score_fields.SCORE
    c.memory = {"coreset": 1.0, "mirror": False}  # share that is kept; supports mirrored as well
    c.fusion = FUSION
    c.calibration = CALIBRATION
    c.distributed = False  # one of several processes, which all run the same command
    c.cluster = CLUSTER
    c.log_every = 10  # steps
    c.explained = 8  # abnormal test images whose explanations are checked, up to 32; 0 = none
    c.validations = 20  # times in training that held-out copies are validated; 0 = never
    c.checkpoint_every = 100  # steps
    return c.lock()


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy with presets applied and what was left to be derived filled in.

    Raises ConfigError for values that cannot be used.
    """
    c = config.copy_and_resolve_references()
    if c.k == 0 and c.method == "ours":
        c.method = "zero_shot"  # all that is left of the branches
    c.update(PRESETS.get(c.method, {}))
    check(c)
    c.batch = c.batch or max(1, min(8, c.k))
    c.meta.shots = c.meta.shots or max(2, min(8, c.k))
    c.meta.query = c.meta.query or c.meta.shots
    c.steps = c.steps or training_steps(c)
    if c.method in FIXED:
        c.steps = 0
    learned_parts.check(c)
    c.cache = str(cache_folder(c.cache))
    return c


def check(c: ConfigDict) -> None:
    """Raise ConfigError naming the first field whose value cannot be used."""
    for name, value in flat(c):
        if name in CHOICES and value not in CHOICES[name]:
            said = ", ".join(map(str, CHOICES[name]))
            raise ConfigError(f"config.{name} is {value!r}: give one of {said}")
        # written so that NaN is refused
        if name in LEAST and not value >= LEAST[name]:
            raise ConfigError(f"config.{name} is {value}: give {LEAST[name]} or more")
        if name in SHARES and not SHARES[name][0] <= value <= SHARES[name][1]:
            raise ConfigError(f"config.{name} is {value}: give {SHARES[name][2]}")
    if c.k == 0 and c.method != "zero_shot":
        raise ConfigError(f"config.k is 0, but method {c.method} needs an image: give k=1 or more")
    given = set(c.fusion.branches)
    if given - set(BRANCHES) or not given - {"zero_shot_image"} or len(given & {*BRANCHES[2:]}) > 1:
        raise ConfigError(
            f"config.fusion.branches is {tuple(c.fusion.branches)}: give any of {BRANCHES}, the "
            "last (plain prompts in the image score alone) beside another, not beside zero_shot"
        )
    score_fields.check(c)
    if c.meta.shots == 1:
        raise ConfigError("config.meta.shots is 1: give 2 or more, one clean and one altered row")
    if not c.meta.inner_rate > 0:
        raise ConfigError(f"config.meta.inner_rate is {c.meta.inner_rate}: give more than 0")


def training_steps(c: ConfigDict) -> int:
    """STEPS, or as many as `epochs` need: epochs * ceil(k / batch) gradients, see `gradients`."""
    if not c.epochs and c.learner == "joint":
        return STEPS
    return max(1, (c.epochs or EPOCHS) * -(-c.k // c.batch) // gradients(c))


def gradients(c: ConfigDict) -> int:
    """Gradients of the loss (forward and backward over one set of rows) in one optimisation step.

    Where `epochs` are given, steps are derived so that all learners take as many of them, and so
    they are compared. The Hessian-vector products of exact second order are not counted: they are
    the price of exactness.
    """
    return 1 if c.learner == "joint" else c.meta.tasks * (c.meta.inner_steps + 1)


def cache_folder(named: str) -> Path:
    """Where prepared data and tokens are kept between runs."""
    chosen = named or os.environ.get("MEDCLIP_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "medclip_jax"


def flat(fields: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its dotted name, in the order written."""
    for name, value in fields.items(preserve_field_references=False):
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
