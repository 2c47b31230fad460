"""Prediction on the workers of a Ray cluster.

Actors hold the compiled predictor and take chunks of the list; the driver writes the tables in its
order. Finished items are passed over, so a chunk whose worker is lost is given out again, in
halves: what kills each worker is found, and is one line of unreadable.csv.
"""

import heapq
import importlib
import itertools
import logging
import os
import platform
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from medclip_jax import __version__, files
from medclip_jax.errors import ConfigError, ProcessError, UserError, one_line
from medclip_jax.inference import predictor
from medclip_jax.inference.inputs import Item
from medclip_jax.inference.results import Outcome, Privacy
from medclip_jax.io import dicom_write

PATIENCE, ROOM = 300, 30  # seconds for a worker to load its model; for a CPU to become free
STOPPING = 20  # seconds for workers to finish a batch when the run is stopped
IN_HAND = 2  # chunks of a worker: one is read while the other is scored
AHEAD = 8  # chunks of each worker that may be finished while an earlier one is not
BATCHES = 8  # most of a chunk
LOSSES = 3  # an item that was lost so often, alone, is unreadable
PROBE = sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1], configure_logging=False)"
HERE = {  # of a cluster that is started here: loopback, no reports to Ray's makers
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # not 15: it is what the machine is for
}
ray: Any = None  # the library, of the driver, once it is `connected`


class Chunk(NamedTuple):
    """Neighbours in the list, the first of which has this number."""

    first: int
    items: Sequence[Item]
    losses: int = 0  # workers that ended with it, since it is one item


class Worker:
    """An actor: the compiled predictor of one node or accelerator."""

    def __init__(self) -> None:
        logging.disable(logging.CRITICAL)  # Ray's logs name no input; outcomes say all
        dicom_write.quieten()
        self.stop, self.volumes = threading.Event(), threading.Lock()

    def load(self, driver: tuple, paths: Sequence[str], nameless: bool, load, start) -> tuple:
        """Load the predictor of the first path; its digest, its batch size and the device."""
        check(driver, paths, nameless)
        loaded = load(Path(paths[0]))
        self.score_items = start(loaded)
        return loaded.digest, predictor.batch_size(loaded), jax.devices()[0].device_kind

    def score(self, items: Sequence[Item], output: str, privacy: Privacy) -> list[Outcome]:
        """The outcomes of a chunk; of its first items alone if it must end meanwhile."""
        with self.volumes if any(x.kind != "image" for x in items) else nullcontext():
            return [*self.score_items(items, Path(output), privacy, self.stop)]

    def end(self) -> None:
        self.stop.set()


def versions() -> tuple:
    """What must be the same on all machines."""
    return ("medclip_jax", __version__), ("jax", jax.__version__)  # Python: Ray sees to it


def check(driver: tuple, paths: Sequence[str], nameless: bool = False) -> None:
    """On a node: raise ConfigError for other versions, or an unseen workdir, output or input."""
    where = f"node {platform.node()} of the cluster"
    for (name, wanted), (_, own) in zip(driver, versions(), strict=True):
        if own != wanted:
            text = "install the same everywhere"
            raise ConfigError(f"{where} has {name} {own} and this machine {wanted}: {text}")
    for path in itertools.filterfalse(os.path.exists, paths):
        name = "the inputs" if nameless and path not in paths[:2] else Path(path).parent
        text = "give a folder that all nodes share under the same path"
        raise ConfigError(f"{where} does not see {name}: {text}")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray, connected to the cluster at HOST:PORT; without one to workers of this machine.

    Raises ConfigError if Ray is not installed, cannot start or there is no such cluster.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    if not address:
        os.environ.update(HERE, RAY_AUTH_TOKEN=secrets.token_hex(32))
    global ray
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError("Ray is not installed: pip install 'medclip-jax[ray]'") from None
    how = reach(address) if address else {"include_dashboard": False}
    try:
        try:
            ray.init(address or "local", log_to_driver=False, configure_logging=False, **how)
        except (OSError, RuntimeError, ValueError) as error:
            text = "$RAY_TMPDIR, if it is set, must be short and writable"
            raise ConfigError(f"Ray cannot start ({one_line(error)[:300]}): {text}") from None
        yield
    finally:
        ray.shutdown()


def reach(address: str) -> dict[str, Any]:
    """Nothing more to tell Ray; raises ConfigError if no cluster that fits is at HOST:PORT.

    Another process asks: without an answer Ray waits for ever, and no signal ends it.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        done = subprocess.run([*PROBE, address], capture_output=True, text=True, timeout=ROOM)
        if done.returncode == 0:
            return {}
        lines = [*filter(None, done.stderr.splitlines()), ""]
        why = next((x for x in lines if re.match(r"\w+Error: ", x)), lines[0])[:300]
    except (OSError, ValueError, OverflowError) as error:
        why = one_line(error)
    except subprocess.TimeoutExpired:
        why = f"what listens there has not answered as Ray does for {ROOM} s"
    text = "give what `ray start --head` says, with the same Ray and Python on all nodes"
    raise ConfigError(f"no cluster can be used at --ray.address={address} ({why}): {text}")


def places(workers: int = 0) -> tuple[dict[str, Any], int]:
    """(what a worker reserves, how many there are): one for each GPU, else for each node.

    Raises ProcessError if no CPU is free and none becomes so.
    """
    until = time.monotonic() + ROOM
    while ray.available_resources().get("CPU", 0) < 1:
        if time.monotonic() > until:
            text = f"the cluster has had no free CPU for {ROOM} s: end other jobs or add nodes"
            raise ProcessError(f"{text}, then run the same command")
        time.sleep(1)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    reserved: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
    if gpus := int(sum(node.get("GPU", 0) for node in nodes)):
        return reserved | {"num_gpus": 1}, workers or gpus
    return reserved, workers or sum(node.get("CPU", 0) >= 1 for node in nodes)


def answer_of(ref: Any) -> Any:
    """What a worker returned, or raised if a user can correct it. Raises RayError if it is lost."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None


def score(
    items, output, privacy, stop, *, workdir: Path, load: Callable, start: Callable, workers=0
) -> Generator[Outcome, None, None]:
    """As predict.in_process, on the workers of the cluster; a `predict.Score` with these options.

    load: a workdir -> its predictor, of which `start` makes what scores in a worker's process.
    Raises ConfigError for a node that does not fit, ProcessError if no worker can be had.
    """
    with files.temporary_folder((output := output.absolute()) / "nodes") as probe:
        seen = [item.paths[0] for item in items if not item.error][:1]
        how = [str(workdir.absolute()), str(probe), *seen], bool(privacy.salt), load, start
        with closing(Pool(items, (str(output), privacy), how, workers)) as pool:
            yield from pool.outcomes(stop)
    files.sweep(output)


class Pool:
    """The driver's side of `score`."""

    def __init__(self, items, where, load, workers: int) -> None:
        self.items, self.where, self.load = items, where, load
        reserved, self.count = places(workers)
        self.remote = ray.remote(Worker).options(max_concurrency=IN_HAND + 1, **reserved)
        self.workers: dict[Any, int] = {}  # chunks in hand of each
        self.ready: list[Any] = []  # those that have loaded the predictor
        self.pending: dict[Any, tuple[Any, Chunk | None]] = {}  # by what Ray will answer
        self.again: list[Chunk] = []  # heap: their worker was lost
        self.done: dict[int, list[Outcome]] = {}  # by the number of the first
        self.turn = self.given = self.failed = 0  # items yielded, items given out, lost starts
        self.size, self.digest = 0, ""  # items of a chunk; of the detector
        self.heard = time.monotonic()  # when a worker was last known to be there
        self.start(self.count)

    def start(self, count: int) -> None:
        for worker in (self.remote.remote() for _ in range(count)):
            self.workers[worker] = 0
            self.pending[worker.load.remote(versions(), *self.load)] = worker, None

    def outcomes(self, stop: threading.Event) -> Iterator[Outcome]:
        """All outcomes in order; once `stop` is set those that are under way, in any."""
        while self.turn < len(self.items) and not stop.is_set():
            self.hand_out()
            for ref in ray.wait([*self.pending], timeout=1)[0]:
                self.take(ref)
            if self.ready:
                self.heard = time.monotonic()
            elif time.monotonic() - self.heard > PATIENCE:
                text = f"no worker of the cluster has answered for {PATIENCE} s"
                raise ProcessError(f"{text}: look after its nodes, then run the same command")
            while self.turn in self.done:
                group = self.done.pop(self.turn)
                self.turn += len(group)
                yield from group
        self.close()
        yield from itertools.chain.from_iterable(self.done.values())

    def hand_out(self) -> None:
        """Give chunks to ready workers, the earliest first, not too far ahead of the turn."""
        most = self.turn + AHEAD * self.count * self.size
        for worker in sorted(self.ready, key=lambda worker: self.workers[worker]):
            while self.workers[worker] < IN_HAND:
                if self.again:
                    chunk = heapq.heappop(self.again)
                elif self.given < min(len(self.items), most):
                    chunk = Chunk(self.given, self.items[self.given : self.given + self.size])
                    self.given += len(chunk.items)
                else:
                    return
                self.workers[worker] += 1
                self.pending[worker.score.remote(chunk.items, *self.where)] = worker, chunk

    def take(self, ref: Any) -> None:
        """What a worker has answered, or that it is lost."""
        worker, job = self.pending.pop(ref)
        try:
            answer = answer_of(ref)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError):  # a fault of ours
                raise
            return self.lose(worker, job, error)
        if job is None:
            digest, batch, device = answer
            if self.digest not in ("", digest):
                raise ConfigError(f"{self.load[0][0]} differs between nodes: share one folder")
            chunks = len(self.items) // (4 * self.count * batch)
            self.digest, self.size = digest, batch * min(max(chunks, 1), BATCHES)
            self.ready.append(worker)
            logging.info("worker %d of %d: %s", len(self.ready), self.count, device)
        else:
            if worker in self.workers:  # else it ended after this answer
                self.workers[worker] -= 1
            self.done[job.first] = answer
            self.failed = 0

    def lose(self, worker: Any, job: Chunk | None, error: Exception) -> None:
        """Give out its chunk again, in halves, and start another worker in its place."""
        if job is None:
            self.failed += 1
            if self.failed >= LOSSES + self.count:
                last = str(error).strip().splitlines()[-1].strip()
                raise ProcessError(f"no worker can start ({last}): see the logs of Ray")
        elif len(job.items) > 1:
            half = len(job.items) // 2
            heapq.heappush(self.again, Chunk(job.first, job.items[:half]))
            heapq.heappush(self.again, Chunk(job.first + half, job.items[half:]))
        elif job.losses + 1 < LOSSES:
            heapq.heappush(self.again, job._replace(losses=job.losses + 1))
        else:
            text = f"{LOSSES} workers ended with it: it may need more memory than there is"
            self.done[job.first] = [Outcome(job.items[0], [], text, [], False)]
        if worker in self.workers:
            logging.warning("a worker is lost: what it had is given out again")
            ray.kill(worker)
            del self.workers[worker]
            self.ready = [other for other in self.ready if other in self.workers]
            self.start(1)

    def close(self) -> None:
        """End the workers after the batch that they have; what they finished is in `done`."""
        for worker in self.workers:
            worker.end.remote()
        refs = {ref: job for ref, (_, job) in self.pending.items() if job}
        for ref in ray.wait([*refs], num_returns=len(refs), timeout=STOPPING)[0] if refs else ():
            with suppress(ray.exceptions.RayError, UserError):
                self.done[refs[ref].first] = ray.get(ref)
        for worker in self.workers:
            ray.kill(worker)
        self.workers, self.pending = {}, {}
