"""The command that makes a run again, from what its workdir says of its settings."""

import shlex
from collections.abc import Mapping
from typing import Any

from medclip_jax import config
from medclip_jax.data.catalog import PRESETS
from medclip_jax.errors import ConfigError

FILES = ("busi", "brain_mri", "chest_xray", "chexpert")  # packaged configs named as their data set
PHANTOM = "phantom-ultrasound"  # of the config phantom
ELSEWHERE = ("cache", "distributed", "cluster.")  # where and on what it ran: numbers stay the same
NAMED = ("k", "seed", "method")  # given as arguments of the config file
DERIVED = ("batch", "steps", "meta.shots", "meta.query")  # by config.resolve, unless they are given


def again(held: Mapping[str, Any]) -> str:
    """A packaged config and every field in which the run differs from it; DIR is a folder.

    held: config.json of a workdir, as train resolved it. Fields that this version does not know
    are left out. "" if this version cannot read the settings.
    """
    try:
        name = str(held["data"]["name"])
        file = name if name in FILES else "phantom" if name.startswith("phantom-") else "folder"
        shown = PHANTOM if file == "phantom" else file
        arguments = ",".join(f"{field}={held[field]}" for field in NAMED)
        given = config.base(arguments, name=shown, **PRESETS.get(shown, {})).unlock()
        known = _differences(held, config.resolve(given))
        first = {field: value for field, value in known.items() if field not in DERIVED}
        given.update_from_flattened_dict(first)
        rest = _differences(held, config.resolve(given))
    except (ConfigError, KeyError, TypeError, ValueError):
        return ""
    words = [f"--config.{field}={value}" for field, value in (first | rest).items()]
    words = [f"{file}:{arguments}", "--workdir", "DIR", *words]
    return " ".join(["python -m medclip_jax.main --config", *map(_quoted, words)])


def _quoted(word: str) -> str:
    """As a shell reads it; in double quotes where single ones are inside, as tuples have them."""
    plain = "'" in word and not set('"$`\\!') & set(word)
    return f'"{word}"' if plain else shlex.quote(word)


def _differences(held: Mapping[str, Any], plain: config.ConfigDict) -> dict[str, Any]:
    """The run's value of every field that is not as in `plain`; lists as tuples, as flags are."""
    found = {}
    for field, known in config.flat(plain):
        value: Any = held
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        value = tuple(value) if isinstance(value, list) else value
        if value is not None and value != known and not field.startswith(ELSEWHERE):
            found[field] = value
    return found
