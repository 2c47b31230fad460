"""Taking turns, the machine's peak, and a worker process that answers over pipes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medclip_jax.errors import UserError


def in_turn(
    runs: dict[str, Callable[[], float]], times: int, again: bool = False
) -> dict[str, list[float]]:
    """Seconds of each, one after the other, `times` rounds after one that is not counted.

    `again`: in its turn each runs twice and the second counts, as in training, where step follows
    step. A system that takes idle memory back (a virtual machine's host does) makes the first after
    a pause pay for getting it again.
    """
    for run in runs.values():
        run()
    rounds = []
    for _ in range(times):
        rounds.append({})
        for name, run in runs.items():
            if again:
                run()
            rounds[-1][name] = run()
    return {name: [r[name] for r in rounds] for name in runs}


def seconds_of(call: Callable) -> float:
    """Seconds of one call, until its result is there."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def matmul_peak(times: int = 5, n: int = 2048, dtype: str = "float32") -> float:
    """Floating point operations per second of a large matrix product, the best of a few."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)), dtype)
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    return 2 * n**3 / min(seconds_of(lambda: product(a)) for _ in range(times))


def alone(module: str, *given: Any) -> dict:
    """The JSON that a module of bench, run with these words, prints last; UserError if it fails."""
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    command = [sys.executable, "-m", module, *map(str, given)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{module} ended with code {done.returncode}: see above")
    return json.loads(done.stdout.splitlines()[-1])


def peak_megabytes(process: int | str = "self") -> int:
    """Of a program's memory, 0 once it ended: what getrusage says may be its parent's."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    kib = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
    return round(kib * 1024 / 1e6)


def worker(command: Sequence[str]) -> subprocess.Popen:
    """A process for `ask`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def ask(process: subprocess.Popen, line: str):
    """One answer of a worker. Raises RuntimeError if it has ended."""
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"the worker ended with code {process.wait()}; see above")
    return json.loads(answer)


def end(process: subprocess.Popen | None) -> None:
    if process:
        with contextlib.suppress(OSError):  # it has ended
            process.stdin.close()
        process.wait(60)
        process.stdout.close()
