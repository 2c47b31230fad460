"""Prediction, and any function of many items, on the workers of a Ray cluster.

Actors hold the compiled predictor and take chunks of the list of items, a few at a time; the
driver writes the tables in the list's order. Files of items appear whole and finished items are
passed over, so a chunk whose worker is lost is simply given out again, in halves: what kills a
worker each time is found, and is one line of unreadable.csv.
Ray runs the code of whoever reaches it. A cluster that is started here listens on the loopback.
"""

import heapq
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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from medclip_jax import __version__, build_detector, files
from medclip_jax.errors import ConfigError, ProcessError, UserError, one_line
from medclip_jax.inference import predict, predictor
from medclip_jax.inference.inputs import Item
from medclip_jax.inference.predict import Outcome
from medclip_jax.inference.results import Privacy
from medclip_jax.io import dicom_write

PATIENCE = 90  # seconds for a worker to answer; a model may load for longer
STOPPING = 20  # seconds for workers to finish a batch when the run is stopped
IN_HAND = 2  # chunks of a worker: one is read while the other is scored
AHEAD = 8  # chunks of each worker that may be finished while an earlier one is not
BATCHES = 8  # most of a chunk
HELLO, LOADING = "hello", "loading"  # what a worker does before its first chunk
LOSSES = 3  # an item that was lost so often, alone, is unreadable; so many workers cannot start
PROBE = sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1], configure_logging=False)"
HERE = {  # of a cluster that is started here: loopback, no reports to Ray's makers
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


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

    def facts(self, paths: Sequence[str]) -> dict[str, Any]:
        return facts(paths)

    def load(self, workdir: str, cam: bool, boxes_of_passed: bool) -> tuple[str, int, str]:
        """Load the predictor; its digest, its batch size and the device."""
        loaded = build_detector.load_predictor(Path(workdir))
        loaded = loaded._replace(boxes_of_passed=boxes_of_passed)
        self.score_items = predict.in_process(loaded, cam)
        return loaded.digest, predictor.batch_size(loaded), jax.devices()[0].device_kind

    def score(self, items: Sequence[Item], output: str, privacy: Privacy) -> list[Outcome]:
        """The outcomes of a chunk; of its first items if it is told to end meanwhile."""
        heavy = any(item.kind != "image" for item in items)
        with self.volumes if heavy else nullcontext():
            return [*self.score_items(items, Path(output), privacy, self.stop)]

    def end(self) -> None:
        self.stop.set()


def facts(paths: Sequence[str]) -> dict[str, Any]:
    """What must be the same on all machines, and which of the paths are seen here."""
    versions = {"medclip_jax": __version__, "jax": jax.__version__}
    versions["Python"] = ".".join(platform.python_version_tuple()[:2])
    return {"versions": versions, "sees": [*map(os.path.exists, paths)], "node": platform.node()}


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray, connected to the cluster at HOST:PORT; without one to workers of this machine.

    Raises ConfigError if Ray is not installed or there is no such cluster.
    """
    if not address:
        os.environ.update(HERE, RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed: pip install 'medclip-jax[ray]'") from None
    if address:
        reach(address)
    try:
        ray.init(address or "local", log_to_driver=False, configure_logging=False)
        yield
    finally:
        ray.shutdown()


def reach(address: str) -> None:
    """Raise ConfigError if no cluster that fits is at HOST:PORT.

    Asked in another process: for want of an answer Ray waits for ever, and no signal ends it.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        done = subprocess.run([*PROBE, address], capture_output=True, text=True, timeout=PATIENCE)
        lines = [*filter(None, done.stderr.splitlines()), ""]
        why = next((x for x in lines if re.match(r"\w+Error: ", x)), lines[-2:][0])
        if done.returncode == 0:
            return
    except (OSError, ValueError, OverflowError) as error:
        why = one_line(error)
    except subprocess.TimeoutExpired:
        why = f"something listens there and has not answered as Ray does for {PATIENCE} s"
    raise ConfigError(
        f"no cluster can be used at --ray.address={address} ({why[:300]}): give the HOST:PORT that "
        "`ray start --head` says, with the same Ray and Python on all nodes"
    )


def places(workers: int = 0) -> tuple[dict[str, Any], int]:
    """(what a worker reserves, how many there are): one for each GPU, else for each node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    reserved: dict[str, Any] = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
    if gpus := int(sum(node.get("GPU", 0) for node in nodes)):
        return reserved | {"num_gpus": 1}, workers or gpus
    tpus = [node["TPU"] for node in nodes if node.get("TPU")]
    if tpus:  # a process has all chips of its machine
        return reserved | {"resources": {"TPU": min(tpus)}}, workers or len(tpus)
    return reserved, workers or sum(node.get("CPU", 0) >= 1 for node in nodes) or 1


def check(there: dict[str, Any], paths: Sequence[str]) -> None:
    """Raise ConfigError if a node has other versions or does not see one of the paths."""
    own = facts([])["versions"]
    for name, version in there["versions"].items():
        if version != own[name]:
            raise ConfigError(
                f"node {there['node']} of the cluster has {name} {version} and this machine "
                f"{own[name]}: install the same everywhere"
            )
    for path, seen in zip(paths, there["sees"], strict=True):
        if not seen:
            raise ConfigError(
                f"node {there['node']} of the cluster does not see {Path(path).parent}: give a "
                "folder that all nodes share under the same path"
            )


def no_worker() -> ProcessError:
    """No worker has answered."""
    import ray

    free = ray.available_resources().get("CPU", 0)
    why = "the cluster has no free CPU" if free < 1 else "no worker of the cluster answers"
    return ProcessError(f"{why} after {PATIENCE} s: end other jobs there or add nodes, then again")


def each(function: Callable, items: Iterable, workers: int = 0) -> Iterator:
    """function(item) of each, as tasks of the cluster, which are run again if a node is lost.

    At most as many at a time as there are `places`. Results are in any order.
    """
    import ray

    reserved, most = places(workers)
    try:
        check(ray.get(ray.remote(facts).options(**reserved).remote([]), timeout=PATIENCE), [])
    except ray.exceptions.GetTimeoutError:
        raise no_worker() from None
    task = ray.remote(function).options(**reserved)
    pending: list[Any] = []

    def take() -> Any:
        nonlocal pending
        (ref,), pending = ray.wait(pending)
        with causes():
            return ray.get(ref)

    for item in items:
        if len(pending) >= most:
            yield take()
        pending.append(task.remote(item))
    while pending:
        yield take()


@contextmanager
def causes() -> Iterator[None]:
    """What a user can correct is raised as it was on the worker."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def score(
    items: Sequence[Item],
    output: Path,
    privacy: Privacy,
    stop: threading.Event,
    *,
    workdir: Path,
    cam: bool = False,
    boxes_of_passed: bool = False,
    workers: int = 0,
) -> Generator[Outcome, None, None]:
    """As predict.in_process, on the workers of the cluster; a `predict.Score` with these options.

    Raises ConfigError for a node that does not fit, ProcessError if no worker can be had.
    """
    output = output.absolute()
    with files.temporary_folder(output / "nodes") as probe:
        first = next((item.paths[0] for item in items if not item.error), str(probe))
        load = str(workdir.absolute()), cam, boxes_of_passed
        pool = Pool(items, (str(output), privacy), (str(probe), first), load, workers)
        with closing(pool):
            yield from pool.outcomes(stop)
    files.sweep(output)


class Pool:
    """The driver's side of `score`."""

    def __init__(self, items, where, paths, load, workers: int) -> None:
        import ray

        self.items, self.where, self.paths, self.load = items, where, paths, load
        reserved, self.count = places(workers)
        self.remote = ray.remote(Worker).options(max_concurrency=IN_HAND + 1, **reserved)
        self.workers: dict[Any, int] = {}  # chunks in hand of each
        self.ready: list[Any] = []  # those that have loaded the predictor
        self.pending: dict[Any, tuple[Any, Chunk | str]] = {}  # by what Ray will answer
        self.again: list[Chunk] = []  # heap: their worker was lost
        self.done: dict[int, list[Outcome]] = {}  # by the number of the first
        self.turn = self.given = self.failed = 0  # items yielded, items given out, lost starts
        self.size, self.digest = 0, ""  # items of a chunk; of the detector
        self.heard = time.monotonic()  # when a worker was last known to be there
        for _ in range(self.count):
            self.start()

    def start(self) -> None:
        worker = self.remote.remote()
        self.workers[worker] = 0
        self.pending[worker.facts.remote(self.paths)] = worker, HELLO

    def outcomes(self, stop: threading.Event) -> Iterator[Outcome]:
        """All outcomes in order; once `stop` is set those that are under way, in any."""
        import ray

        while self.turn < len(self.items) and not stop.is_set():
            self.hand_out()
            for ref in ray.wait([*self.pending], timeout=1)[0]:
                self.take(ref)
            if any(job != HELLO for _, job in self.pending.values()):
                self.heard = time.monotonic()
            elif not self.ready and time.monotonic() - self.heard > PATIENCE:
                raise no_worker()
            while self.turn in self.done:
                group = self.done.pop(self.turn)
                self.turn += len(group)
                yield from group
        self.close()
        for group in self.done.values():
            yield from group

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
        import ray

        worker, job = self.pending.pop(ref)
        try:
            with causes():
                answer = ray.get(ref)
        except ray.exceptions.RayTaskError:  # a fault of ours
            raise
        except ray.exceptions.RayError as error:
            return self.lose(worker, job, error)
        if job == HELLO:
            check(answer, self.paths)
            self.pending[worker.load.remote(*self.load)] = worker, LOADING
        elif job == LOADING:
            digest, batch, device = answer
            if self.digest not in ("", digest):
                raise ConfigError(f"{self.load[0]} is not the same on all nodes: share one folder")
            chunks = len(self.items) // (4 * self.count * batch)
            self.digest, self.size = digest, batch * min(max(chunks, 1), BATCHES)
            self.ready.append(worker)
            logging.info("worker %d of %d: %s", len(self.ready), self.count, device)
        else:
            self.workers[worker] -= 1
            self.done[job.first] = answer
            self.failed = 0

    def lose(self, worker: Any, job: Chunk | str, error: Exception) -> None:
        """Give out its chunk again, in halves, and start another worker in its place."""
        import ray

        if isinstance(job, str):
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
            text = (
                f"{LOSSES} workers ended while they had it: it may need more memory than there is"
            )
            self.done[job.first] = [Outcome(job.items[0], [], text, [], False)]
        if worker in self.workers:
            logging.warning("a worker is lost: what it had is given out again")
            ray.kill(worker)
            del self.workers[worker]
            self.ready = [other for other in self.ready if other is not worker]
            self.start()

    def close(self) -> None:
        """End the workers after the batch that they have; what they finished is in `done`."""
        import ray

        for worker in self.workers:
            worker.end.remote()
        refs = {ref: job for ref, (_, job) in self.pending.items() if isinstance(job, Chunk)}
        for ref in ray.wait([*refs], num_returns=len(refs), timeout=STOPPING)[0] if refs else ():
            with suppress(ray.exceptions.RayError, UserError):
                self.done[refs[ref].first] = ray.get(ref)
        for worker in self.workers:
            ray.kill(worker)
        self.workers, self.pending = {}, {}
