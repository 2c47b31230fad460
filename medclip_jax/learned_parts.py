"""Fields of what is learned, and what its optional parts need beyond single fields."""

from medclip_jax.errors import ConfigError

MODEL = {
    "form": "softmax",  # score.FORMS: softmax | distance (equation 9)
    "learn_scale": True,  # temperature of the anomaly logit
    "dropout": 0.1,  # rate on adapted tokens, in training and in MC-dropout
    "refine": False,  # learned queries over the tapped blocks' tokens (equation 6)
    # adapter after the text tower: "" (off) | embedded (of the compact CLIP) | fresh | a file
    "language": "",
    "language_tuned": False,  # it learns with the prompts; else it stays as it is
}
LOSS = {  # weights; 0 = not computed
    **{"focal": 1.0, "dice": 1.0, "align": 0.1, "prompt": 0.0},
    "simclr": 0.0,  # two augmentations of a support alike (equation 12); needs config.augment
}
DISTILL = {  # equation 13, see losses.Distill
    "teacher": "",  # workdir of a trained run whose patch logits teach this one; "" = off
    "weight": 1.0,  # of the term
    "alpha": 0.5,  # share of the labels' cross-entropy; the rest is the teacher's
    "temperature": 1.0,
    "squared": False,  # times temperature^2, as Hinton et al. 2015; the paper does not
}
LEAST = {"distill.weight": 0, "distill.temperature": 0.01}
SHARES = {"distill.alpha": (0, 1, "a share from 0 to 1")}


def refines(c) -> bool:
    """Is refinement on? Configs kept by workdirs from before it do not say, and had none."""
    return bool(c.model.get("refine", False))


def check(c) -> None:
    """Raise ConfigError if a part that is on lacks what it needs. c: a config (config.resolve)."""
    if c.model.language_tuned and not c.model.language:
        raise ConfigError(
            "config.model.language_tuned is on and there is no adapter to tune: give "
            "config.model.language, such as fresh"
        )
    augmented = any(value for name, value in c.augment.items() if name != "copies")
    if c.steps and c.loss.simclr and not augmented:
        raise ConfigError(
            f"config.loss.simclr is {c.loss.simclr} and nothing augments the supports: give a "
            "strength of config.augment, such as rotate=10, or simclr 0"
        )
    if c.distill.teacher and c.meta.data:
        raise ConfigError(
            "config.distill.teacher teaches the target's images alone: leave config.meta.data empty"
        )
