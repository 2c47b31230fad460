"""The folder of a run: whose it is, the split it was started with, and whether it is finished."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medclip_jax import files
from medclip_jax.data import splits
from medclip_jax.data.records import Record, Split
from medclip_jax.errors import WorkdirError

# where, how often and by how many is not what
PLACES = ("cache", "log_every", "validations", "explained", "checkpoint_every") + (
    "distributed",
    "cluster",
)
LEFT = ("predictions.npz", "scorer.json", "scorer.safetensors")  # by a finished run, before metrics


def claim(workdir: Path, c: ConfigDict, main: bool = True) -> None:
    """Make the workdir this run's own, or refuse one that holds a run with other settings.

    Of several processes only the `main` one writes.
    """
    path = workdir / "config.json"
    settings = json.loads(c.to_json_best_effort())
    try:
        held = json.loads(path.read_text()) if path.is_file() else None
    except ValueError:
        held = None  # never whole: written in one piece since
    except OSError as error:
        raise WorkdirError(
            f"{path} cannot be read ({error.strerror}): give another workdir"
        ) from None
    if held is not None:
        for place in PLACES:
            held[place] = settings[place]
        differs = [name for name in settings if settings[name] != held.get(name)]
        if differs:
            name = differs[0]
            raise WorkdirError(
                f"{workdir} holds a run with {name} = {held.get(name)}, not {settings[name]}: "
                "give another workdir, or the settings it was started with"
            )
    if main:
        files.write_json(path, settings)


def keep_split(workdir: Path, drawn: Split, c: ConfigDict, main: bool = True) -> None:
    """Write split.json, or check that the data still match the one that is there."""
    path = workdir / "split.json"
    if path.is_file():
        splits.check_split(path, drawn)
    elif main:
        splits.write_split(drawn, path, name=c.data.name, seed=c.seed, kind=c.data.split)


def known_of(test: Sequence[Record]) -> list[list[Any]]:
    """All that a result reads of test images, for its key: a mended mask or label is another."""
    return [
        [r.id, r.sha256, int(r.label), r.patient, [_sha256(Path(mask)) for mask in r.masks]]
        for r in test
    ]


def seal(workdir: Path, key: str) -> dict[str, Any]:
    """What metrics.json says of a finished run: what it was made from, and the files it left."""
    return {"key": key, "files": {name: _sha256(workdir / name) for name in LEFT}}


def finished(workdir: Path, key: str) -> dict[str, Any] | None:
    """metrics.json of a run that was finished with this key and whose files are whole, or None."""
    try:
        held = json.loads((workdir / "metrics.json").read_bytes())
        if held["finished"] != seal(workdir, key):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not finished, spoilt, or of an older version: it is made
    logging.info("%s is finished: nothing is made again (--mode evaluate scores anew)", workdir)
    return held


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
