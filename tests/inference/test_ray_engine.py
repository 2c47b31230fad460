"""Prediction on Ray: order, losses and limits on a made-up cluster; the rest on a real one."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from medclip_jax import main
from medclip_jax.errors import ConfigError, ProcessError
from medclip_jax.inference import ray_engine
from medclip_jax.inference.inputs import Item
from medclip_jax.inference.results import Outcome, Privacy
from tests.support import content
from tests.support.paths import ROOT
from tests.support.predicting import png, run, table

with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed")


class Lost(Exception):
    """A worker is lost."""


class Fault(Lost):
    """A worker raised an error."""


class Ref:
    def __init__(self, answer):
        self.answer = answer


class Worker:
    def __init__(self, cluster):
        def score(items, *_):
            cluster.given += [item.source for item in items]
            return Ref(lambda: cluster.score(items))

        self.load = SimpleNamespace(remote=lambda *_: Ref(cluster.load))
        self.score = SimpleNamespace(remote=score)
        self.end = SimpleNamespace(remote=lambda: None)


class Cluster:
    """As much of Ray as the driver uses; what was asked for last is answered first."""

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=Fault)

    def __init__(self, poison="", free=2, starts=True):
        self.poison, self.free, self.starts, self.given, self.most = poison, free, starts, [], 0

    def available_resources(self):
        return {"CPU": self.free}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 1.0}}] * 2

    def remote(self, _):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: Worker(self)))

    def wait(self, refs, num_returns=1, timeout=0):
        self.most = max(self.most, len(refs))
        return refs[-num_returns:], refs[:-num_returns]

    def get(self, ref):
        return ref.answer()

    def kill(self, worker):
        pass

    def load(self):
        if not self.starts:
            raise Lost("dead:\nModuleNotFoundError: No module named 'medclip_jax'")
        return "digest", 4, "cpu"

    def score(self, items):
        if self.poison in [item.source for item in items]:
            raise Lost("gone")
        return [Outcome(item, [{"alarm": 0}], "", [], True) for item in items]


@pytest.fixture
def outcomes(monkeypatch, tmp_path):
    def score(cluster, count=1000, stop=None):
        monkeypatch.setattr(ray_engine, "ray", cluster)
        monkeypatch.setattr(ray_engine, "ROOM", 0)
        items = [Item(f"{i}", (f"/in/{i}",), "image", f"{i}") for i in range(count)]
        how = {"workdir": tmp_path, "load": print, "start": print}
        where = tmp_path / "out", Privacy(), stop or threading.Event()
        yield from ray_engine.score(items, *where, **how)
        assert not list((tmp_path / "out").iterdir())

    return score


@pytest.mark.parametrize("count", [0, 1, 9, 1000])
def test_outcomes_come_once_and_in_order_whoever_is_faster(outcomes, count):
    cluster = Cluster()
    assert [x.item.source for x in outcomes(cluster, count)] == [str(i) for i in range(count)]
    assert len(cluster.given) == count and cluster.most <= 2 * ray_engine.IN_HAND


def test_what_is_given_out_stays_near_what_is_written(outcomes):
    cluster = Cluster()
    stream = outcomes(cluster, 10_000)
    for number, _ in enumerate(stream):
        ahead = (ray_engine.AHEAD * 2 + 1) * ray_engine.BATCHES * 4
        assert len(cluster.given) - number <= ahead


def test_an_item_that_ends_its_workers_is_one_line_and_the_others_are_scored(outcomes):
    cluster = Cluster(poison="537")
    got = [*outcomes(cluster)]
    assert [x.item.source for x in got] == [str(i) for i in range(1000)]
    assert [x.item.source for x in got if x.error] == ["537"]
    assert got[537].error == "3 workers ended with it: it may need more memory than there is"
    assert cluster.given.count("537") <= 6 + ray_engine.LOSSES  # 32 items in halves, then alone


def test_a_stop_gives_what_is_under_way_and_no_more(outcomes):
    cluster, stop = Cluster(), threading.Event()
    got = []
    for outcome in outcomes(cluster, stop=stop):
        stop.set()
        got.append(outcome.item.source)
    assert sorted(got) == sorted(cluster.given) and len(got) < 1000


def test_a_cluster_without_a_free_cpu_or_without_our_package(outcomes):
    with pytest.raises(ProcessError, match="no free CPU"):
        next(outcomes(Cluster(free=0.5)))
    with pytest.raises(ProcessError, match=r"no worker can start \(ModuleNotFoundError: No module"):
        next(outcomes(Cluster(starts=False)))


def test_other_versions_and_folders_are_refused_by_name(tmp_path):
    own = ray_engine.versions()
    ray_engine.check(own, [str(tmp_path)])
    other = (own[0], ("jax", "0.6.9"))
    for versions, paths, text in (
        (other, [], r"has jax .* and this machine 0\.6\.9: install the same everywhere"),
        (own, [str(tmp_path), "/absent/a.png"], "does not see /absent: give a folder that all"),
    ):
        with pytest.raises(ray_engine.ConfigError, match=text):
            ray_engine.check(versions, paths)


def test_under_pseudonyms_no_node_names_an_input(tmp_path, monkeypatch):
    """The workdir and the output, which it must see as well, keep their names."""
    given = []

    class Pool:
        def __init__(self, items, where, load, workers):
            given.append(load)

        outcomes, close = (lambda *_: iter(())), (lambda _: None)

    monkeypatch.setattr(ray_engine, "Pool", Pool)
    items = [Item("a", ("/absent/Miller_John/a.png",), "image", "a")]
    for salt in (None, b"salt"):
        where = tmp_path / "out", Privacy(salt), threading.Event()
        [*ray_engine.score(items, *where, workdir=tmp_path, load=print, start=print)]
    shown = "/absent/Miller_John", "the inputs"
    for (paths, nameless, *_), name in zip(given, shown, strict=True):
        paths[1] = str(tmp_path)
        with pytest.raises(ConfigError, match=f"does not see {name}: give a folder that all"):
            ray_engine.check(ray_engine.versions(), paths, nameless)
    with pytest.raises(ConfigError, match="does not see /absent: give"):
        ray_engine.check(ray_engine.versions(), ["/absent/run", *paths[1:]], True)


def test_without_the_extra_it_is_one_sentence(tmp_path, capfd, monkeypatch):
    png(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert run(tmp_path, tmp_path / "out", tmp_path / "a.png", more=["--engine=ray"]) == 2
    text = "error: Ray is not installed: pip install 'medclip-jax[ray]'"
    assert capfd.readouterr().err.splitlines()[-1] == text


@pytest.mark.parametrize(
    "wrong",
    [
        ["--mode=predict", "--ray.address=head:6379"],
        ["--mode=predict", "--ray.workers=2"],
        ["--mode=export", "--engine=ray"],
        ["--mode=train", "--config=configs/phantom.py", "--engine=ray"],
    ],
)
def test_a_flag_of_ray_that_would_do_nothing_is_refused(tmp_path, wrong):
    named = [f"--workdir={tmp_path}/run"]
    if wrong[0] != "--mode=train":
        named.append(f"--output={tmp_path}/out")
    with pytest.raises(ConfigError, match="--(engine|ray.*) goes with --mode predict"):
        main.parse(["main", *named, *wrong])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:x", "no.such.host:6379"])
def test_a_wrong_address_is_one_sentence(address):
    with pytest.raises(ray_engine.ConfigError, match=f"--ray.address={address} .*ray start --head"):
        ray_engine.reach(address)


def predicted(whole, output, *named, more=(), wait=True):
    """The command in a process of its own, as it ended."""
    flags = [f"--workdir={whole}", f"--output={output}", *(f"--input={n}" for n in named), *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "medclip_jax.main", "--mode=predict", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    _, stderr = process.communicate(timeout=400)
    return process.returncode, stderr


def workers() -> list[int]:
    """Processes that run an actor of ours."""
    found = subprocess.run(["pgrep", "-f", "^ray::Worker"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.fixture
def short():
    """A folder of a short name: Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def folder(tmp_path):
    for i in range(200):
        png(tmp_path / "in" / f"SECRET{i}.png", i)
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    return tmp_path / "in"


@with_ray
@pytest.mark.slow
def test_a_killed_worker_and_a_stopped_driver_lose_nothing(whole, tmp_path, folder):
    cut, undisturbed = tmp_path / "cut", tmp_path / "undisturbed"
    more = ["--engine=ray", "--ray.workers=2"]
    code, stderr = predicted(whole, undisturbed, folder)
    assert code == 0, stderr
    process = predicted(whole, cut, folder, more=more, wait=False)
    while not len(list(cut.glob("*.json"))) > 10:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 143, stderr
    assert "stopped by SIGTERM after " in stderr.splitlines()[-1]
    assert not list(cut.glob(".*")) and not (cut / "results.csv").exists()
    before = {p.name: p.stat().st_mtime_ns for p in cut.glob("*.json")}
    process = predicted(whole, cut, folder, more=more, wait=False)
    while not len(list(cut.glob("*.json"))) > len(before):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(workers()[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "a worker is lost" in stderr, stderr
    assert f"{200 - len(before)} scored" in stderr or "finished before" in stderr
    assert all((cut / name).stat().st_mtime_ns == when for name, when in before.items())
    assert content.of_prediction(cut) == content.of_prediction(undisturbed)
    assert [row["source"] for row in table(cut, "unreadable.csv")] == ["in/bad.png"]


NODES = """
import os, subprocess, sys, threading, time
from pathlib import Path
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
output, command = Path(sys.argv[1]), sys.argv[2:]
process = subprocess.Popen([*command, f"--ray.address={cluster.address}"])
while process.poll() is None and len(list(output.glob("*.json"))) < 10:
    time.sleep(0.05)
cluster.remove_node(second, allow_graceful=False)
code = process.wait()
cluster.shutdown()
sys.exit(code)
"""


@with_ray
@pytest.mark.slow
def test_a_killed_node_loses_nothing_and_no_log_names_an_input(whole, tmp_path, folder, short):
    output, logs = tmp_path / "out", short
    command = [sys.executable, "-m", "medclip_jax.main", "--mode=predict", "--engine=ray"]
    command += [f"--workdir={whole}", f"--output={output}", f"--input={folder}", "--pseudonymise"]
    done = subprocess.run(
        [sys.executable, "-c", NODES, str(output), *command],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "RAY_TMPDIR": str(logs)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0 and "a worker is lost" in done.stderr, done.stderr[-3000:]
    assert len(table(output)) == 200 and len(table(output, "unreadable.csv")) == 1
    assert len({row["source"] for row in table(output)}) == 200
    assert "SECRET" not in done.stderr + json.dumps(table(output))
    named = [p for p in logs.rglob("*") if p.is_file() and b"SECRET" in p.read_bytes()]
    assert not named
