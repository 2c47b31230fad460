"""Report sets are scored with a frozen configuration only, and every look is logged.

`sweep.py --freeze` writes frozen.json: the resolved fields of `ours`, how each variant of the table
differs at K = 16, the words of each set, the checkpoint, and a hash of it all. `sweep.py --report`
refuses whatever differs from it and adds a line to docs/looks.csv: date, commit, hash, sets.
"""

import csv
import json
import subprocess
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medclip_jax import build, config, files, stored
from medclip_jax.data.catalog import with_role
from medclip_jax.errors import UserError

FROZEN = Path(__file__).with_name("frozen.json")
LOOKS = Path(__file__).parents[1] / "docs" / "looks.csv"
HEAD = ("date", "commit", "config", "sets")
OF_A_RUN = ("k", "seed", "cache", "data.root", "data.split", "explained", "distributed")
OF_A_RUN += ("join_timeout", "tensorboard", "checkpoint_every")  # none changes a score's meaning
OF_A_SET = ("data.name", "data.modality", "data.anatomy", "data.conditions")


def is_report(c: ConfigDict) -> bool:
    """Whether a config's data set, by name or by its folder, is a report set."""
    return bool({c.data.name, Path(c.data.root).name} & {*with_role("report")})


def described(
    settings: Callable[[str, str], ConfigDict],
    sets: Sequence[str],
    base: str,
    variants: Sequence[str],
) -> dict[str, Any]:
    """What is frozen, variants as they differ from the base.

    Args:
      settings: the config of a data set and variant at K = 16.
      sets: data sets by name.
      base: the first variant of the table.
      variants: of the table, those that run.

    Raises:
      ConfigError: a config that cannot be used.
    """

    def flat(c: ConfigDict) -> dict[str, Any]:
        fields = json.loads(json.dumps(dict(config.flat(config.resolve(c)))))
        return {name: x for name, x in fields.items() if name not in OF_A_RUN}

    each = {name: flat(settings(name, base)) for name in sets}
    first = {name: x for name, x in each[sets[0]].items() if name not in OF_A_SET}
    of_variant = {}
    for variant in variants:
        fields = flat(settings(sets[0], variant))
        of_variant[variant] = {n: x for n, x in fields.items() if first.get(n, x) != x}
    return {
        "checkpoint": build.load_clip(config.resolve(settings(sets[0], base))).digest,
        "fields": first,
        "variants": of_variant,
        "sets": {n: {field: x[field] for field in OF_A_SET} for n, x in each.items()},
    }


def freeze(now: dict[str, Any], path: Path | None = None) -> str:
    """Write the frozen configuration; returns its hash."""
    digest = stored.digest(now)
    files.write_json(path or FROZEN, {"date": str(date.today()), "hash": digest, "config": now})
    return digest


def check(now: dict[str, Any], path: Path | None = None) -> str:
    """Hash of the frozen configuration, which `now` (or some of its sets and variants) equals.

    path: of the frozen configuration, if not FROZEN.

    Raises:
      UserError: it is not there, was edited by hand, or differs.
    """
    path = path or FROZEN
    if not path.is_file():
        raise UserError(f"there is no {path.name}: freeze the configuration first, by --freeze")
    before = json.loads(path.read_text())
    frozen = before["config"]
    if (digest := stored.digest(frozen)) != before["hash"]:
        raise UserError(f"{path.name} was edited: its hash is {digest}; restore the file")
    if differing := difference(frozen, now):
        raise UserError(
            f"--report takes the configuration frozen on {before['date']} ({path.name}) alone: "
            f"{differing}; restore it, or decide on development sets and --freeze anew"
        )
    return before["hash"]


def difference(frozen: dict[str, Any], now: dict[str, Any]) -> str:
    """The first field of `now` that is not as frozen, in words; "" if all are."""
    for part, fields in now.items():
        if not isinstance(fields, dict):
            if fields != frozen[part]:
                return f"{part} is {fields}, not {frozen[part]}"
            continue
        for name, x in fields.items():
            if name not in frozen[part]:
                return f"{name} is not among the frozen {part} ({', '.join(frozen[part])})"
            if x != frozen[part][name]:
                return f"{part}: {name} is {x}, not {frozen[part][name]}"
    return ""


def log(config_hash: str, sets: Sequence[str]) -> None:
    """Add the line of this look."""
    new = not LOOKS.is_file()
    with LOOKS.open("a", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        if new:
            lines.writerow(HEAD)
        lines.writerow([date.today(), commit(), config_hash, " ".join(sets)])


def commit() -> str:
    """The commit of the checkout, with + where files differ from it; "none" outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", FROZEN.parent, *words], capture_output=True, text=True)
        return done.stdout.strip()

    name = git("rev-parse", "--short=12", "HEAD")
    return name + "+" * bool(git("status", "--porcelain", "--", ":!docs/looks.csv")) or "none"
