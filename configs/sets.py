"""A small set of another modality by name, in the MVTec-AD layout (medclip_jax.data.catalog.SETS).

python -m medclip_jax.main --config configs/sets.py:oct_mx,k=16,root=DIR --workdir runs/oct

DIR holds sets/oct_mx or oct_mx. What each set's labels may be used for: catalog.EVIDENCE.
"""

from medclip_jax import config
from medclip_jax.data.catalog import SETS
from medclip_jax.errors import ConfigError


def get_config(arg: str = ""):
    name, _, rest = arg.partition(",")
    if name not in SETS:
        raise ConfigError(
            f"configs/sets.py was given the set {name!r}: give one of {', '.join(SETS)}, "
            "as in configs/sets.py:oct_mx,k=16"
        )
    return config.base(rest, name=name, **SETS[name])
