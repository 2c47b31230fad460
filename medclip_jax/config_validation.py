"""Which values and combinations of configuration fields can be used; other code trusts them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ml_collections import ConfigDict

from medclip_jax import object_store
from medclip_jax.errors import ConfigError

Rules = Iterator[tuple[Any, str]]  # whether a combination cannot be used, and the message
Limits = dict[str, tuple[float, float]]  # by name: the least and the largest value

METHODS = ("ours", "paper", "mediclip", "memory", "zero_shot", "thumbnails", "grey_level", "joint")
FIXED_METHODS = ("memory", "zero_shot", "thumbnails", "grey_level")  # nothing is trained
PIXEL_METHODS = ("thumbnails", "grey_level")  # without a CLIP
BRANCHES = ("learned", "memory", "zero_shot", "zero_shot_image", "meta")
ACROSS = ("maml_pp", "reptile", "imaml")  # only across data sets
LEARNERS = ("joint", "maml", "fomaml", "anil", "meta_sgd", *ACROSS)

CHOICES = {
    "method": METHODS,
    "learner": LEARNERS,
    **{"data.fit": ("stretch", "pad"), "data.split": ("peer", "clean")},
    "data.uncertain": ("exclude", "positive", "negative"),
    "clip.dtype": ("float32", "bfloat16", "float16", "int8"),
    "clip.implementation": ("fused", "transformers"),
    "memory_encoder": ("", "efficientnet-lite0"),
    "prompts.phrases": ("templates", "words", "ontology"),
    "prompts.position": ("end", "middle", "front"),
    "synthesis.preset": ("masses", "medclip", "mediclip", "opacities"),
    **{"model.form": ("softmax", "distance"), "score.tiles": (1, 2, 3)},
    "explanation.method": ("grad_cam", "grad_cam_pp"),
}
RANGES: Limits = {  # both ends included
    "k": (0, 1 << 20),
    "seed": (0, 1 << 31),
    "data.pool": (1, 1 << 20),
    "clip.size": (0, 4096),
    "prompts.context": (0, 64),
    "model.dropout": (0, 0.99),
    **dict.fromkeys(("synthesis.variants", "meta.shots"), (0, 10_000)),
    **{f"loss.{x}": (0, 1e6) for x in ("focal", "dice", "align", "prompt", "simclr", "distill")},
    **dict.fromkeys(("meta.tasks", "score.passes"), (1, 10_000)),
    **dict.fromkeys(("meta.inner_steps", "meta.adapt_steps"), (0, 1000)),
    "meta.inner_rate": (1e-9, 1e3),
    "learning_rate": (0, 1e3),
    "batch": (0, 4096),
    "steps": (0, 1 << 30),
    "validations": (0, 1 << 20),
    "checkpoint_every": (1, 1 << 30),
    "memory_coreset": (0.001, 1),
    "score.top": (0, 1),
    "score.affinity": (0, 1e3),
    "score.peak": (0, 0.9),
    **dict.fromkeys(("calibration.alpha", "calibration.pixel_rate"), (0.0001, 0.9999)),
    "explained": (0, 32),
    "join_timeout": (1, 86_400),
}
PATHS = (  # of any bytes; words are encoded by the tokenizer
    *("data.root", "cache", "teacher", "clip.checkpoint", "model.language"),
    *("prompts.ontology_file", "calibration.extra"),
)
LONGEST = 4000  # characters of a text
EPISODE_FIELDS = "meta.tasks meta.shots meta.inner_steps meta.inner_rate meta.adapt_steps"
LEARNED_FIELDS = "augment batch learning_rate loss. model.language_tuned prompts.context "
LEARNED_FIELDS += "prompts.init prompts.position prompts.shared validations"  # of `learned`
TRAINING_FIELDS = f"{LEARNED_FIELDS} learner teacher steps meta. synthesis."
PROMPT_FIELDS = "prompts. model.form model.learn_scale model.dropout model.language"
AUGMENT: Limits = {"flip": (0, 1), "rotate": (0, 180), "intensity": (0, 1), "elastic": (0, 0.05)}
MAP_FILTER: Limits = {
    **{"median": (1, 99), "min_area_mm2": (0, 1e6), "min_area_pixels": (0, 1e6)},
    **{"sigma": (0, 100), "ceiling": (0.0001, 1)},
}
MODALITIES = (  # free text -> the preprocessing.RECIPES of it; the first that fits
    (re.compile(r"ultraso|sonogra", re.IGNORECASE), "ultrasound"),
    (re.compile(r"\bmr\b|mri\b|magnetic resonance", re.IGNORECASE), "mri"),  # fMRI, too
    (re.compile(r"mammogra", re.IGNORECASE), "mammography"),
    (re.compile(r"\bct\b|computed tomogra", re.IGNORECASE), "ct"),  # X-ray CT, too
    (re.compile(r"x[- ]?ray|radiogra", re.IGNORECASE), "xray"),
)
OTHER_RECIPE = "zscore"  # of every other modality
DEFORMED = ("ultrasound", "mri")  # soft tissue under a probe or a coil; not bone


def recipe_of(modality: str) -> str:
    """The preprocessing of a modality, which is free text such as "breast ultrasound"."""
    return next((recipe for text, recipe in MODALITIES if text.search(modality)), OTHER_RECIPE)


def deforms(modality: str) -> bool:
    """May images of this modality be deformed elastically? Ultrasound and MRI may."""
    return recipe_of(modality) in DEFORMED


def settings(field: str, text: str, ranges: Limits) -> dict[str, float]:
    """`name=value,name=value` of a field -> values; {} for "".

    Raises:
      ConfigError: an unknown name, a value that is no number or outside its range.
    """
    values: dict[str, float] = {}
    for piece in filter(None, text.replace(" ", "").split(",")):
        name, _, number = piece.partition("=")
        if name not in ranges or name in values:
            known = ", ".join(f"{n}=…" for n in ranges)
            raise ConfigError(f"config.{field} has {piece!r}: give any of {known} once")
        try:
            values[name] = float(number)
        except ValueError:
            raise ConfigError(f"config.{field} has {piece!r}: give {name}=NUMBER") from None
        _in_range(f"{field} {name}", values[name], ranges[name])
    return values


def augment(c: Any) -> dict[str, float]:
    """The strengths of config.augment; {} where nothing is augmented."""
    return {n: x for n, x in settings("augment", c.augment, AUGMENT).items() if x}


def map_filter(c: Any) -> dict[str, float]:
    """The steps of config.score.map_filter; {} where it is off."""
    return settings("score.map_filter", c.score.map_filter, MAP_FILTER)


def cluster(text: str) -> dict[str, Any] | None:
    """HOST:PORT,PROCESS/PROCESSES -> coordinator, process, processes; None for "", {} for auto.

    Raises:
      ConfigError: anything else.
    """
    if not text:
        return None
    if text == "auto":
        return {}
    coordinator, _, place = text.partition(",")
    process, _, processes = place.partition("/")
    host, _, port = coordinator.rpartition(":")
    if host and all(re.fullmatch("[0-9]{1,7}", x) for x in (port, process, processes)):
        if int(process) < int(processes) and 0 < int(port) < 1 << 16:
            own = {"process": int(process), "processes": int(processes)}
            return {"coordinator": coordinator, **own}
    raise ConfigError(
        f"config.distributed is {text!r}: give auto, or HOST:PORT,PROCESS/PROCESSES such as "
        "localhost:9876,0/2 with processes counted from 0"
    )


def check(c: Any) -> None:
    """Raise ConfigError naming the first field whose value cannot be used."""
    check_texts(c)
    values = dict(flat(c))
    for name, choices in CHOICES.items():
        if (value := values[name]) not in choices:
            wanted = ", ".join(map(str, choices))
            raise ConfigError(f"config.{name} is {value!r}: give one of {wanted}")
    for name, limits in RANGES.items():
        _in_range(name, values[name], limits)
    augment(c)
    cluster(c.distributed)
    _refuse(_combinations(c))


def check_texts(c: Any) -> None:
    """Raise ConfigError for text that is no text, or is missing where there must be some."""
    for name, value in flat(c):
        items: Any = value if isinstance(value, tuple) else (value,)
        if not isinstance(value, tuple | str):
            continue
        kind: Any = int if name == "clip.layers" else str
        for item in items:
            if type(item) is not kind:
                wanted = "whole numbers, as (1, 2)" if kind is int else "texts, as ('a', 'b')"
                raise ConfigError(f"config.{name} has {item!r}: give {wanted}")
            if kind is int:
                continue
            if len(item) > LONGEST or "\0" in item:
                raise ConfigError(
                    f"config.{name} has {len(item)} characters, or a zero byte: give at most "
                    f"{LONGEST} and no zero byte"
                )
            if name not in PATHS and any("\ud800" <= x <= "\udfff" for x in item):
                raise ConfigError(f"config.{name} is no UTF-8 text: give it in UTF-8")
            if name in (*PATHS, "meta.data", "meta.sources") and ":/" in item:
                object_store.is_url(item.partition("=")[2] if name[:5] == "meta." else item)
            needed = ("data.modality", "data.anatomy", "data.conditions", "clip.checkpoint")
            if name in needed and not item.strip():
                raise ConfigError(f"config.{name} is empty: give a word, or leave it out")


def check_learned(c: Any) -> None:
    """Raise ConfigError if what is on lacks what it needs. c: with resolved steps."""
    _refuse(_needs(c))


def _combinations(c: Any) -> Rules:
    branches, plain = set(c.branches), {"zero_shot", "zero_shot_image"}
    none = c.k == 0 and c.method != "zero_shot"
    yield none, f"k is 0, but method {c.method} needs an image: give k=1 or more"
    yield (
        len(branches & {*BRANCHES}) < len(c.branches)  # one is unknown, or there twice
        or (branches <= {"zero_shot_image"} or plain <= branches),
        f"branches is {tuple(c.branches)}: give any of {', '.join(BRANCHES)} once; "
        "zero_shot_image speaks for the image score alone and needs another branch, not zero_shot",
    )
    other = c.method == "joint" and c.learner != "joint"
    yield other, f"learner is {c.learner}, and method=joint always trains jointly: give method=ours"
    still = c.learner == "maml_pp" and not c.meta.inner_steps
    yield still, "learner maml_pp weighs inner steps: give meta.inner_steps=1 or more"
    across, needs = "meta" in branches and c.method not in FIXED_METHODS, "see configs/meta.py"
    both = f"meta.sources goes with the branch meta, training and k=4 or more: {needs}"
    yield across != bool(c.meta.sources), both
    yield across and bool(c.meta.data), "meta.data has sets beside meta.sources: leave it empty"
    unfit = c.k < 4 or c.score.tiles > 1 or c.model.refine or c.memory_encoder
    need = "meta needs k=4 or more, no score.tiles, model.refine, memory_encoder or branch learned"
    yield across and bool(unfit or "learned" in branches), need
    yield c.learner in ACROSS and not across, f"learner {c.learner} needs meta.sources: {needs}"
    yield c.meta.shots == 1, "meta.shots is 1: give 2 or more, one clean and one altered row"
    steps, least = map_filter(c), 1 - c.calibration.pixel_rate
    median, ceiling = steps.get("median", 1), steps.get("ceiling", 1)
    yield median % 2 != 1, f"score.map_filter has median={median:g}: give an odd number"
    yield (
        ceiling <= least,
        f"score.map_filter has ceiling={ceiling:g}, so that no pixel could be abnormal: "
        f"give more than 1 - config.calibration.pixel_rate, {least:g}",
    )
    says = "score.map_filter has a ceiling, a quantile of the supports, and config.k is 0"
    yield c.k == 0 and ceiling < 1, f"{says}: give k=1 or more, or leave it out"
    if c.score.tiles > 1:
        yield c.k == 0, "score.tiles needs supports and config.k is 0: give k=1 or more, or tiles=1"
        yield c.method in PIXEL_METHODS, f"score.tiles is not for method {c.method}: give tiles=1"
        yield c.score.corners, "score.tiles goes without score.corners: give score.corners=False"


def _needs(c: Any) -> Rules:
    unread = c.prompts.ontology_file and c.prompts.phrases != "ontology"
    yield unread, "prompts.ontology_file is for prompts.phrases=ontology: give that, or no file"
    joined = [x for x in c.data.conditions if "," in x and c.prompts.phrases != "ontology"]
    yield joined, f"data.conditions has {joined}: give each by itself, as \"('tumour', 'cyst')\""
    need = "there is no adapter to tune: give config.model.language, such as fresh"
    yield c.model.language_tuned and not c.model.language, f"model.language_tuned is on and {need}"
    alone, need = c.steps and c.loss.simclr and not augment(c), "such as rotate=10, or simclr 0"
    same = f"loss.simclr is {c.loss.simclr} and nothing augments the supports: give config.augment"
    yield alone, f"{same}, {need}"
    weighs = c.loss.focal or c.loss.dice or c.loss.align or (c.teacher and c.loss.distill)
    vain = c.steps and not c.meta.sources and not weighs
    yield vain, "loss.focal, dice and align are 0, so nothing is learned: give one a weight"
    also, says = c.meta.data or c.meta.sources, "leave config.meta.data and sources empty"
    yield c.teacher and also, f"teacher teaches the target's images alone: {says}"
    absent = c.tensorboard and c.steps and find_spec("tensorboardX") is None
    install = "pip install 'medclip-jax[tensorboard]' or turn it off."
    yield absent, f"tensorboard is on and tensorboardX is not installed: {install}"


def unused_fields(c: Any, given: Sequence[str]) -> list[str]:
    """Of the `given` fields those that nothing reads, and why. c: resolved."""
    read = (c.method,) if c.method in FIXED_METHODS else c.branches
    rules = (  # whether, fields and groups, why
        (not c.teacher, "loss.distill", "there is no teacher"),
        (not c.prompts.context, "prompts.init prompts.position", "prompts.context is 0"),
        (c.learner == "joint" and not c.meta.sources, EPISODE_FIELDS, "learner is joint"),
        ("memory" not in read, "memory_encoder memory_coreset", "no branch is memory"),
        ({*read} <= {"memory", *PIXEL_METHODS}, PROMPT_FIELDS, "no branch has prompts"),
        (c.method in FIXED_METHODS, "branches", f"method {c.method} is its own branch"),
        ("chexpert" not in f"{c.data.name} {c.meta}", "data.uncertain", "no data set is CheXpert"),
        (c.meta.sources, f"{LEARNED_FIELDS} meta.shots", "the branch meta trains alone"),
        (not c.steps, TRAINING_FIELDS, "nothing trains"),
    )
    why = {
        name: reason
        for applies, names, reason in rules
        for name in (given if applies else ())
        if {name, name.partition(".")[0] + "."} & {*names.split()}
    }
    return [f"config.{name} has no effect: {reason}" for name, reason in why.items()]


def _refuse(rules: Rules) -> None:
    for applies, message in rules:
        if applies:
            raise ConfigError(f"config.{message}")


def _in_range(name: str, value: float, limits: tuple[float, float]) -> None:
    low, high = limits
    if not low <= value <= high:  # written so that NaN is refused
        least = high >= 1e5 and value < low
        wanted = f"{low:g} or more" if least else f"a value from {low:g} to {high:g}"
        raise ConfigError(f"config.{name} is {value}: give {wanted}")


def flat(fields: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a ConfigDict or mapping with its dotted name, in the order written."""
    for name, value in fields.items():
        if isinstance(value, ConfigDict | Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
