"""Another modality by what was meta-learned on all the others: leave one modality out.

python -m medclip_jax.main --config configs/meta.py:target=oct,k=8,root=DIR --workdir runs/oct

target: a development set of medclip_jax.data.catalog, or as much of its name as is unique. It is
learned from every other one of another modality, of which abnormal images are used with their
labels; --config.meta.sources="('busi','brain_mri=FOLDER')" chooses. DIR holds all of them.
"""

from medclip_jax import config
from medclip_jax.data.catalog import PRESETS, SETS, modality_kind, with_role
from medclip_jax.errors import ConfigError

WORDS = PRESETS | SETS


def get_config(arg: str = ""):
    first, _, rest = arg.partition(",")
    word, _, target = first.partition("=")
    known = with_role("development")
    fitting = [n for n in known if n == target] or [n for n in known if n.startswith(target)]
    if word != "target" or not target or len(fitting) != 1:
        raise ConfigError(
            f"configs/meta.py was given {first!r}: give target=NAME first, one of "
            f"{', '.join(known)}, as in configs/meta.py:target=oct_mx,k=8"
        )
    name = fitting[0]
    kind = modality_kind(WORDS[name]["modality"])
    sources = [n for n in known if modality_kind(WORDS[n]["modality"]) != kind]
    c = config.base(rest, name=name, **WORDS[name])
    c.meta.sources, c.branches, c.learner = tuple(sources), ("meta",), "maml"
    c.meta.inner_rate = 0.5
    c.synthesis.preset, c.synthesis.variants, c.clip.dtype = "medclip", 12, "float16"
    return c
