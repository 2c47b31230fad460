"""What training logs: metrics.jsonl line by line, and TensorBoard event files. Host values only."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medclip_jax import stored
from medclip_jax.errors import WorkdirError, one_line
from medclip_jax.files import disk_errors, plain, write_bytes

MOST_BYTES = 1 << 30  # of a log that is read


class MetricsLog:
    """Appends one JSON line per logged step to `<workdir>/metrics.jsonl`, flushed at once.

    A line is `{"step": 10, <part>: value, ..., "seconds": 1.5}`; seconds run from the start of the
    run and continue after a resume. A value that is not finite is written as null and its name is
    listed under "nonfinite".
    """

    def __init__(self, workdir: Path, resume_step: int = 0, tensorboard: bool = False) -> None:
        """Open the log of a workdir, which is made if it is not there.

        Lines after `resume_step` are dropped, and a half-written last line. With `tensorboard`
        event files go to `<workdir>/tensorboard`. Raises WorkdirError if the folder cannot be
        written or an old line cannot be read.
        """
        self._path = workdir / "metrics.jsonl"
        old = read_steps(self._path) if self._path.exists() else []
        old = [line for line in old if line["step"] <= resume_step]
        self._start = time.monotonic() - (old[-1]["seconds"] if old else 0.0)
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            folder = str(workdir / "tensorboard")
            self._events = SummaryWriter(logdir=folder, purge_step=resume_step + 1)
        write_bytes(self._path, "".join(json.dumps(line) + "\n" for line in old).encode())
        with disk_errors(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, parts: Mapping[str, Any]) -> None:
        """Log the parts of one step. Raises WorkdirError if the disk is full or read-only."""
        values = {name: float(value) for name, value in parts.items()}
        seconds = round(time.monotonic() - self._start, 3)
        line: dict[str, Any] = {"step": step, **values, "seconds": seconds}
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        if nonfinite:
            line["nonfinite"] = nonfinite
        with disk_errors(self._path):
            self._file.write(json.dumps(plain(line), allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()
        with disk_errors(self._path):
            self._file.close()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, which may still be growing.

    Raises WorkdirError if it cannot be read, naming the first line that is not a logged step.
    """
    try:
        raw = stored.read_bytes(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"Cannot read {path} ({one_line(error)}): fix its permissions or set another workdir."
        ) from error
    lines = []
    for number, text in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            line = json.loads(text)
            int(line["step"]), float(line["seconds"])
        except (ValueError, TypeError, KeyError) as error:
            raise WorkdirError(
                f"Line {number} of {path} is not a logged step: "
                "delete that line or start in a new workdir."
            ) from error
        lines.append(line)
    return lines
