"""What a run writes down: metrics.jsonl line by line, JSON files in one piece. Host values only."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medclip_jax.errors import ConfigError, WorkdirError
from medclip_jax.files import cannot_write, plain, write_bytes

RESERVED = ("step", "seconds", "nonfinite")


class Writer:
    """Appends one JSON line per logged step to `<workdir>/metrics.jsonl`, flushed at once.

    A line is `{"step": 10, <part>: value, ..., "seconds": 1.5}`; seconds run from the start of the
    run and go on after a resume. A value that is not finite is written as null and its name is
    listed under "nonfinite".

    resume_step: keep lines up to and including this step and drop later ones; None keeps all.
      Either way a half-written last line is dropped.
    tensorboard: also write event files to `<workdir>/tensorboard` (needs tensorboardX).

    Raises WorkdirError if the folder cannot be written or a kept line cannot be read, ConfigError
    if tensorboardX is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = False,
    ) -> None:
        workdir = Path(workdir)
        self.path = workdir / "metrics.jsonl"
        kept = truncate(self.path, resume_step) if self.path.exists() else []
        self._start = time.monotonic() - (kept[-1].get("seconds", 0.0) if kept else 0.0)
        self._events = _event_writer(workdir / "tensorboard", resume_step) if tensorboard else None
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def scalars(self, step: int, parts: Mapping[str, Any]) -> None:
        """Log the parts (name -> scalar on the host) of one step.

        Raises WorkdirError if the disk is full or read-only, ValueError for a reserved name.
        """
        taken = [name for name in RESERVED if name in parts]
        if taken:
            raise ValueError(f"part name {taken[0]!r} is used by the writer itself")
        values = {name: float(np.asarray(value)) for name, value in parts.items()}
        line: dict[str, Any] = {"step": int(step), **values}
        line["seconds"] = round(time.monotonic() - self._start, 3)
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        if nonfinite:
            line["nonfinite"] = nonfinite
        try:
            self._file.write(json.dumps(plain(line), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, int(step))

    def close(self) -> None:
        """Close the files; the writer cannot be used afterwards."""
        try:
            self._file.close()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Silent:
    """The writer of a process that leaves the writing to another."""

    def scalars(self, step: int, parts: Mapping[str, Any]) -> None:
        """Log nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def truncate(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Keep the lines of a metrics.jsonl up to `step` (None: all), drop a half-written last line.

    The file is replaced in one piece, or left alone if nothing is to be dropped. Returns the kept
    lines. Raises WorkdirError if the file or any line but a half-written last one is unreadable.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise WorkdirError(
            f"Cannot read {path} ({error.strerror}): give another workdir or mend its permissions."
        ) from error
    complete = raw[: raw.rfind(b"\n") + 1]
    kept, lines = [], []
    for number, line in enumerate(complete.splitlines(keepends=True), start=1):
        row = _parse(line, path, number)
        if step is None or row["step"] <= step:
            kept.append(line)
            lines.append(row)
    if b"".join(kept) != raw:
        write_bytes(path, b"".join(kept))
    return lines


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        int(row["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise WorkdirError(
            f"Line {number} of {path} is not a logged step: "
            "delete that line or start in a new workdir."
        ) from error
    return row


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, which may still be growing. Changes nothing.

    Raises WorkdirError naming the first line that is not a logged step.
    """
    raw = path.read_bytes()
    complete = raw[: raw.rfind(b"\n") + 1]
    return [_parse(line, path, i) for i, line in enumerate(complete.splitlines(), start=1)]


def _event_writer(folder: Path, resume_step: int | None) -> Any:
    try:
        import tensorboardX  # optional: only who asks for the view needs it
    except ImportError as error:
        raise ConfigError(
            "TensorBoard output was asked for but tensorboardX is not installed: "
            "pip install 'medclip-jax[tensorboard]' or turn it off."
        ) from error
    purge = None if resume_step is None else resume_step + 1
    return tensorboardX.SummaryWriter(logdir=str(folder), purge_step=purge)
