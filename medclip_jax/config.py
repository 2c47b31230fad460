"""Every configuration field with its default, and the values that follow from the ones given.

A config file (configs/) holds only what differs. `--config configs/busi.py:k=16,seed=0` names it
with its arguments, `--config.steps=100` sets a field. A misspelt field is an error. `method` gives
many fields another default (PRESETS); a field that is set wins, in whichever order.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from medclip_jax import config_validation, object_store
from medclip_jax.config_validation import FIXED_METHODS, deforms, flat, recipe_of
from medclip_jax.errors import ConfigError

# settings that may change between two commands of one run, beside the data's place
PLACES = "cache validations explained explanation checkpoint_every tensorboard".split()
PLACES += ["distributed", "join_timeout"]
STEPS, OUTER_STEPS = 100, 300  # of joint training, and of meta-learning across data sets; the
EPOCHS = 200  # other episodic learners and published methods keep the length they were measured at
VARIANTS = 50  # anomalous variants per support; MediCLIP makes one for every epoch
ARGUMENTS = {"k": int, "seed": int, "method": str, "root": str}

# By `method`: MediCLIP as released (Zhang et al., 2024); the paper (docs/paper.md); `ours` jointly
PRESETS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "assets" / "methods.json").read_text("utf-8"),
    object_hook=lambda x: {n: tuple(v) if isinstance(v, list) else v for n, v in x.items()},
)
AUTO = "auto"  # a value that follows from others, see `_automatic`


class Lookup(NamedTuple):  # of FieldReference: its op
    fn: Callable
    args: list


def parse_arg(arg: str) -> dict:
    """`k=16,seed=0` -> typed values. Raises ConfigError for an unknown name or a bad value."""
    values = {}
    for piece in filter(None, arg.split(",")):
        name, _, value = piece.partition("=")
        if name not in ARGUMENTS:
            raise ConfigError(f"config argument {name!r}: give any of {', '.join(ARGUMENTS)}")
        try:
            values[name] = ARGUMENTS[name](value)
        except ValueError:
            need = f"is not a whole number: give one, as {name}=16"
            raise ConfigError(f"config argument {name}={value!r} {need}") from None
    return values


def base(arg: str = "", **data) -> ConfigDict:
    """All fields with their defaults; `data` are the fields of the data set."""
    values = parse_arg(arg or "")
    c = ConfigDict()
    c.k = values.get("k", 16)  # healthy support images; 1: no fold can be held out; 0: zero-shot
    c.seed = values.get("seed", 0)  # of the support sample and of all training randomness
    c.method = values.get("method", "ours")  # one of config_validation.METHODS
    c.data = _data(values.get("root", ""), data)
    c.cache = ""  # folder of features and prepared data; "": $MEDCLIP_CACHE or the user's cache
    _model(c)
    _training(c)
    _scoring(c)
    c.distributed = ""  # "" | auto (Cloud TPU, SLURM, Open MPI) | HOST:PORT,PROCESS/PROCESSES
    c.join_timeout = 15  # seconds to wait for the other processes; more where machines start slowly
    _follow_method(c, data)
    return c.lock()


def _follow_method(c: ConfigDict, data: Mapping) -> None:
    """Fields of presets, but those in `data`, follow `method` until they are set."""
    presets = {name: dict(flat(fields)) for name, fields in PRESETS.items()}
    method = c.get_ref("method")

    def lookup(field: str) -> Callable:
        return lambda default, name: presets.get(name, {}).get(field, default)

    for field in sorted(set().union(*presets.values())):
        group, _, name = field.rpartition(".")
        if group != "data" or name not in data:
            holder = c[group] if group else c
            holder[name] = FieldReference(holder[name], op=Lookup(lookup(field), [method]))


def departures(c: ConfigDict) -> list[str]:
    """The fields of an unresolved config that differ from the preset of its method, as text."""
    own = dict(flat(PRESETS.get(c.method, {})))
    return [f"{n} = {x!r} (preset: {own[n]!r})" for n, x in flat(c) if own.get(n, x) != x]


def unused_fields(given: ConfigDict, c: ConfigDict) -> list[str]:
    """The fields of an unresolved config that are set and not read, and why; c: resolved."""
    usual = dict(flat(base(f"method={given.method}")))
    return config_validation.unused_fields(c, [n for n, x in flat(given) if x != usual[n]])


def _data(root: str, data: dict) -> dict:
    return {
        "name": "",  # busi, brain_mri, chest_xray, chexpert, folder, phantom-mri, ...
        "root": root,  # folder of the data; "" takes $MEDCLIP_DATA
        "modality": "medical image",  # fills the prompt templates, as the next two
        "anatomy": "tissue",
        "conditions": ("disease",),
        "split": "peer",  # as published tables | clean: near-duplicates and patients kept apart
        "pool": 32,  # healthy images reserved for supports, of sets without parts in `peer`
        "uncertain": "exclude",  # CheXpert's label -1: exclude | positive | negative
        "fit": "stretch",  # into the encoder's square: stretch (as peers) | pad
        # of CT, before scaling: brain | lung | soft_tissue | bone | CENTRE/WIDTH; and the axis that
        # NIfTI volumes are sliced along, "" = as acquired: "lung,coronal", "sagittal"
        "window": "",
        # preprocessing: "" | ultrasound, mri, ... | steps, "wavelet,clahe" | auto: by the modality
        "recipe": "",
    } | data


def _model(c: ConfigDict) -> None:
    c.clip = {
        "checkpoint": "compact",  # compact (embedded) | folder | Hub id, pinned as id@revision
        "size": 0,  # pixels per side of the input, a multiple of the patch; 0: the checkpoint's
        "implementation": "fused",  # fused | transformers (FlaxCLIPModel's own modules)
        "layers": (),  # tapped blocks, counted from 1; () = 1/2, 3/4 and the last
        # of encoder and cached tokens: float32 | bfloat16 | float16 (tokens alone) | int8 (weights
        # alone; computes and caches in bfloat16)
        "dtype": "float32",
    }
    c.prompts = {
        "phrases": "templates",  # templates | words (as MediCLIP) | ontology (with synonyms)
        "context": 8,  # learnable vectors per prompt
        "init": "random",  # of the context: random | a phrase such as "a photo of a"
        "position": "end",  # of the phrase: end | middle | front
        "shared": False,  # one context for all prompts
        "causal": True,  # CLIP's mask; False is MediCLIP's unmasked text encoder
        "ontology_file": "",  # joined to the ontology: your CSV, a MRCONSO.RRF, an RF2 folder
    }
    c.model = {
        "form": "softmax",  # softmax | distance (equation 9)
        "learn_scale": True,  # temperature of the anomaly logit
        "dropout": 0.1,  # rate on adapted tokens, in training and in MC-dropout
        "refine": False,  # learned queries over the tapped blocks' tokens (equation 6)
        # adapter after the text encoder: "" | embedded | fresh | a file | auto: embedded where the
        # checkpoint is, else fresh
        "language": "",
        "language_tuned": False,  # it learns with the prompts; else it stays frozen
    }


def _training(c: ConfigDict) -> None:
    c.synthesis = {
        "preset": "masses",  # masses | medclip (the paper's) | mediclip (the peer's) | opacities
        "variants": 0,  # anomalous ones per support; an epoch uses one; 0: 50, of mediclip 200
    }
    # of the supports in training, "" = off: flip (probability), rotate (largest angle, degrees),
    # intensity (strength), elastic (sd, share of the side; ultrasound and MRI only):
    # "flip=0.5,rotate=10,intensity=0.2,elastic=0.01"; auto is this, elastic where it may be
    c.augment = ""
    c.loss = {  # weights; 0 = not computed
        **{"focal": 1.0, "dice": 1.0, "align": 0.1, "prompt": 0.0},
        "simclr": 0.0,  # agreement of two augmentations (equation 12); needs config.augment
        "distill": 1.0,  # of the teacher's patch logits (equation 13), where there is a teacher
    }
    c.teacher = ""  # workdir of a trained run that teaches this one; "" = off
    c.learner = "joint"  # maml (exact) | fomaml | anil | meta_sgd; with sources more, LEARNERS
    c.meta = {  # episodes, for the learners other than joint; `data` is for all
        "data": (),  # data sets of the tasks, "name" or "name=folder"; () = the target alone
        "sources": (),  # as `data`, of other modalities, labels too; for branches=("meta",)
        "tasks": 4,  # per step
        "shots": 0,  # support rows of a task, and query rows; 0 = min(8, k), at least 2
        "inner_steps": 1,
        "inner_rate": 0.05,  # where Meta-SGD starts from
        "adapt_steps": 1,  # inner steps on the k supports after training; 0 = none
    }
    c.learning_rate = 1e-3  # of Adam
    c.batch = 0  # images per step; 0 = min(8, k)
    c.steps = 0  # optimisation steps; 0: see `training_steps`
    c.validations = 20  # times in training that the fold models are validated; 0 = never
    c.checkpoint_every = 100  # steps
    c.tensorboard = False  # event files in the workdir; needs the extra `tensorboard`


def _scoring(c: ConfigDict) -> None:
    c.branches = ("learned", "memory", "zero_shot_image")  # of method ours, fused with equal weight
    c.memory_coreset = 1.0  # share of the supports' patches that the memory keeps
    c.memory_encoder = AUTO  # efficientnet-lite0, with the embedded CLIP | "": the CLIP's own
    c.score = {
        "top": 0.05,  # image score: mean of this share of the patches; 0 = the largest pixel
        "passes": 20,  # MC-dropout passes for the uncertainty
        "tiles": 1,  # per side, overlapping, scored with the whole image: 1 (off), 2, 3
        # outlier suppression, "" = off: "median=3,min_area_mm2=20,min_area_pixels=64 (where the
        # spacing is unknown),sigma=1.5 (pixels),ceiling=0.99 (quantile of the supports' maps)"
        "map_filter": "",
        "affinity": 0.4,  # how unlike patches may be that share their map's values; 0 = off
        "peak": 0.25,  # maps are lowered by this share of their largest value over their median
        "corners": False,  # maps reach from corner to corner, as MediCLIP's: half a patch too far
    }
    c.calibration = {
        "alpha": 0.1,  # false-alarm rate asked for
        "extra": "",  # folder of more healthy images, which calibrate in place of the supports
        "pixel_rate": 0.02,  # share of a healthy image's pixels above the pixel threshold
    }
    c.explained = 8  # abnormal test images whose explanations are checked, up to 32; 0 = none
    c.explanation = {
        "method": "grad_cam",  # grad_cam | grad_cam_pp
        "layer": -1,  # which of the tapped layers, from 0; -1 = the last
        "randomised": False,  # also compare with an encoder of random weights (slow)
    }


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy with derived values filled in; ConfigError for what cannot be used."""
    c = config.copy_and_resolve_references()
    fields_of(c)
    if c.k == 0 and c.method == "ours":
        c.method = "zero_shot"  # the only branch that needs no support
    _automatic(c)
    config_validation.check(c)
    c.batch = c.batch or max(1, min(8, c.k))
    c.meta.shots = c.meta.shots or max(2, min(8, c.k))
    fresh = EPOCHS if c.method == "mediclip" else VARIANTS
    c.synthesis.variants = c.synthesis.variants or fresh
    untrained = not {"learned", "meta"} & set(c.branches)
    c.steps = 0 if untrained or c.method in FIXED_METHODS else c.steps or training_steps(c)
    config_validation.check_learned(c)
    c.cache = str(cache_folder(c.cache))
    return c


def _automatic(c: ConfigDict) -> None:
    """Fill in what AUTO stands for."""
    if c.data.recipe == AUTO:
        c.data.recipe = recipe_of(c.data.modality)
    if c.augment == AUTO:
        c.augment = "flip=0.5,rotate=10,intensity=0.2"
        c.augment += ",elastic=0.01" if deforms(c.data.modality) else ""
    if c.model.language == AUTO:
        c.model.language = "embedded" if c.clip.checkpoint == "compact" else "fresh"
    if c.memory_encoder == AUTO:
        read = (c.method,) if c.method in FIXED_METHODS else c.branches
        fits = "memory" in read and "meta" not in read and c.clip.checkpoint == "compact"
        c.memory_encoder = "efficientnet-lite0" if fits else ""


def fields_of(values: ConfigDict | Mapping, whose: str = "") -> dict[str, Any]:
    """Every field by its dotted name; ConfigError for one that is not as it may be."""
    types, fields = {name: type(x) for name, x in flat(base())}, dict(flat(values))
    if unpaired := sorted(types.keys() ^ fields.keys()):
        raise ConfigError(f"{whose}config.{unpaired[0]} is missing or unknown (--help lists all)")
    for name, value in fields.items():
        kind, large = types[name], whose and isinstance(value, int) and abs(value) > 1 << 53
        kinds: Any = {tuple: (list, tuple), float: (int, float)}.get(kind, kind)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool) or large:
            raise ConfigError(f"{whose}config.{name} is {value!r} where a {kind.__name__} belongs")
        fields[name] = kind(value)
    return fields


def restored(values: Mapping[str, Any]) -> ConfigDict:
    """The resolved settings of a workdir; ConfigError for a field that is not as it may be."""
    c = base()
    c.update_from_flattened_dict(fields_of(values, "the stored "))
    config_validation.check(c)
    return c


def comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """What stays the same in all commands of a run: no PLACES, and not where images lie."""
    rest = {name: value for name, value in values.items() if name not in PLACES}
    for group, field in (("data", "root"), ("calibration", "extra")):
        if isinstance(rest.get(group), Mapping):
            rest[group] = {**rest[group], field: ""}
    return rest


def training_steps(c: ConfigDict) -> int:
    """STEPS for joint training; else as many steps as EPOCHS passes over the supports take.

    An epoch is ceil(k / batch) gradients, see `gradients`. MediCLIP keeps its epochs.
    """
    if c.meta.sources:
        return OUTER_STEPS
    if c.learner == "joint" and c.method != "mediclip":
        return STEPS
    return max(1, EPOCHS * -(-c.k // c.batch) // gradients(c))


def gradients(c: ConfigDict) -> int:
    """Gradients of the loss in one step, without Hessian-vector products: learners take as many."""
    return 1 if c.learner == "joint" else c.meta.tasks * (c.meta.inner_steps + 1)


def cache_folder(name: str) -> Path:
    """Where prepared data and tokens are kept between runs; of a URL here, nothing is fetched."""
    folder = name or object_store.user_cache()
    with suppress(UnicodeEncodeError):  # libraries that keep files there take UTF-8 alone
        str(folder).encode()
        return object_store.place(str(folder))
    raise ConfigError("the cache folder's name is no UTF-8: give another (config.cache)")
