"""The fields below config.score: their defaults, their limits, and which of them go together."""

from typing import Any

from medclip_jax.errors import ConfigError

# Outlier suppression of the maps, in this order; see suppress.py. These defaults are off.
SUPPRESS = {
    "median": 0,  # side of the median window, pixels of the tower frame, odd; 0 = off
    "smallest_mm2": 0.0,  # bright specks of a smaller area go, where the spacing is known; 0 = off
    "smallest_pixels": 0,  # the same where it is not known, pixels of the tower frame; 0 = off
    "sigma": 0.0,  # of the Gaussian that smooths, pixels of the tower frame; 0 = off
    "floor": 0.0,  # quantile of the held-out supports' pixels that values are raised to; 0 = off
    "ceiling": 1.0,  # the one that values are lowered to; 1 = off
}
SCORE = {
    "top": 0.05,  # image score: mean of this share of the patches; 0 = the map's maximum
    "passes": 20,  # MC-dropout passes for the uncertainty
    "tiles": 1,  # per side, overlapping, scored beside the whole image (scales.py): 1 (off), 2, 3
    "suppress": SUPPRESS,
}
CHOICES = {"score.tiles": (1, 2, 3)}
LEAST = dict.fromkeys(
    [f"score.suppress.{name}" for name in ("median", "smallest_mm2", "smallest_pixels", "sigma")], 0
)
SHARES = {
    "score.suppress.floor": (0, 0.9999, "a quantile from 0 to 0.9999"),
    "score.suppress.ceiling": (0.0001, 1, "a quantile from 0.0001 to 1"),
}


def check(c: Any) -> None:
    """Raise ConfigError for fields that do not go together. `c`: the whole config."""
    s = c.score.suppress
    if s.median and s.median % 2 == 0:
        raise ConfigError(f"config.score.suppress.median is {s.median}: give an odd number, or 0")
    if s.floor >= s.ceiling:
        raise ConfigError(
            f"config.score.suppress.floor is {s.floor} and ceiling {s.ceiling}: give a lower floor"
        )
    if s.ceiling <= 1 - c.calibration.pixel_rate:
        raise ConfigError(
            f"config.score.suppress.ceiling is {s.ceiling}, so that no pixel could be abnormal: "
            f"give more than 1 - config.calibration.pixel_rate, {1 - c.calibration.pixel_rate:g}"
        )
    if c.k == 0 and (s.floor > 0 or s.ceiling < 1):
        raise ConfigError(
            "config.score.suppress.floor and ceiling are quantiles of supports and config.k is 0: "
            "give k=1 or more, or leave them"
        )
    if c.score.tiles > 1 and c.k == 0:
        raise ConfigError(
            "config.score.tiles needs supports to standardise on and config.k is 0: "
            "give k=1 or more, or tiles=1"
        )
    if c.score.tiles > 1 and c.model.get("refine", False):
        raise ConfigError("config.score.tiles and model.refine do not go together: give tiles=1")
    if c.score.tiles > 1 and c.method in ("thumbnails", "grey_level"):
        raise ConfigError(f"config.score.tiles is not for method {c.method}: give tiles=1")


def suppresses(c: Any) -> bool:
    """Whether any step of the suppression is on."""
    group = c.score.get("suppress")
    return group is not None and dict(group) != SUPPRESS


def tiles(c: Any) -> int:
    """Tiles per side; 1 where a stored config is older than tiles."""
    return int(c.score.get("tiles", 1))
