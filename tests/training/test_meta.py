"""Meta-learning across data sets: tasks, every learner, devices, states on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip.layers import Features
from medclip_jax.detectors import deviation
from medclip_jax.distributed import sharding
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.features.encoder import Source
from medclip_jax.training import episodes, meta
from medclip_jax.training.step import Learner

LEARNERS = ("joint", "maml", "fomaml", "anil", "meta_sgd", "maml_pp", "reptile", "imaml")
WIDTH, PATCHES = 6, 4


def features(rng, shape, centre, shift=0.0) -> Features:
    """Tokens about a centre; anomalies are shifted along the last axis of the space."""
    tokens = rng.normal(size=(*shape, PATCHES, WIDTH)) + centre
    tokens[..., 0, -1] += shift
    pooled = rng.normal(size=(*shape, 3)) + 1
    return Features(pooled.astype(np.float32), (tokens.astype(np.float16),))


def source(number: int, healthy: int = 20, abnormal: int = 6) -> Source:
    rng = np.random.default_rng(number)
    centre = 3 * rng.normal(size=WIDTH)
    kinds = np.tile([0, 1, 2, 3], (healthy, 1))
    altered = features(rng, (healthy, 4), centre, 5.0)
    real = features(rng, (abnormal,), centre, 5.0)
    return Source(features(rng, (healthy,), centre), altered, kinds, real, f"source {number}")


@pytest.fixture(scope="module")
def sources():
    return [source(i) for i in range(3)]


@pytest.fixture(scope="module")
def task_pool(sources):
    white = meta.whitening_of(sources)
    return white, meta.task_pool(sources, white, 4, 0)


def test_tasks_share_no_image_between_support_and_query(sources):
    kinds = set()
    for task in range(40):
        rng = np.random.default_rng(task)
        shots = episodes.SUPPORTS[task % 3]
        (support, variants), (query, anomalies) = episodes.sides(rng, sources, 1, shots)
        assert len(support) == len(variants) == shots
        assert len(query) == len(anomalies) == episodes.SHOTS
        assert not set(support) & set(query)
        own = {int(sources[1].kinds[i, v]) for i, v in zip(support, variants, strict=True)}
        assert episodes.IDENTITY not in own  # synthetic anomalies alter the image
        kinds.add(frozenset(own))
        for anomaly in anomalies:
            places = [
                name
                for i, s in enumerate(sources)
                for name, rows in (("healthy", s.healthy), ("real", s.abnormal), ("own", s.altered))
                if (np.asarray(rows.pooled) == anomaly.pooled).all(-1).any()
                and (name == "healthy") == (i != 1)
            ]
            assert len(places) == 1  # foreign images are of others, the rest of this source
    assert len(kinds) > 3  # kinds vary by task


def test_shares_of_anomalies(sources):
    """Half real, a quarter synthetic and a quarter foreign; without real ones, half and half."""
    nothing = sources[0]._replace(abnormal=jax.tree.map(lambda x: x[:0], sources[0].abnormal))
    for first, wanted in ((sources[0], (0.5, 0.25, 0.25)), (nothing, (0, 0.5, 0.5))):
        counts = np.zeros(3)
        for task in range(60):
            rng = np.random.default_rng(task)
            _, (_, anomalies) = episodes.sides(rng, [first, *sources[1:]], 0, 8)
            for anomaly in anomalies:
                groups = (first.abnormal, first.altered)
                own = [(g.pooled == anomaly.pooled).all(-1).any() for g in groups]
                counts[own.index(True) if any(own) else 2] += 1
        np.testing.assert_allclose(counts / counts.sum(), wanted, atol=0.06)


def test_the_task_pool_holds_what_the_head_reads(task_pool):
    white, tasks = task_pool
    assert tasks.support.seen.patch.shape == (12, 32, PATCHES, white.kernel[0].shape[1])
    sizes = set()
    for label, patch in zip(tasks.support.label, tasks.support.seen.patch, strict=True):
        shots = label.tolist().index(1)
        assert label.tolist() == ([0] * shots + [1] * shots) * (16 // shots)
        first = np.asarray(patch[: 2 * shots], np.float32)
        np.testing.assert_array_equal(patch, np.tile(first, (16 // shots, 1, 1)))
        np.testing.assert_allclose(first[:shots].sum(-1).mean(), 0, atol=0.01)  # of its supports
        sizes.add(shots)
    assert sizes == {2, 4, 8}  # 16 and as many as the query has are more than there are
    again = meta.task_pool([source(i) for i in range(3)], white, 4, 0)
    jax.tree.map(np.testing.assert_array_equal, again, tasks)


def test_as_many_steps_as_were_asked_for(task_pool):
    """Not rounded up to a whole number of checks; Adam's first step is its rate in size."""
    white, tasks = task_pool
    nothing, learner = np.zeros(12, bool), Learner("joint")
    state = meta.fit(tasks, nothing, white, learner, 1, 3, 0, sharding.mesh())
    assert state.log[:, 0].tolist() == [1]
    moved = np.abs(state.params["direction"] - deviation.init(white)["direction"])
    np.testing.assert_allclose(moved.max(), meta.LEARNING_RATE, rtol=1e-3)


@pytest.mark.parametrize("main", [True, False])
def test_processes_read_or_learn_together(tmp_path, sources, monkeypatch, main):
    """Training is collective: a process that has the file learns with one that lacks it."""
    learner, calls = Learner("joint"), []
    white = meta.whitening_of(sources)
    state = meta.State(white, meta.begin(learner, white), np.zeros((1, 4)))
    monkeypatch.setattr(meta, "train", lambda *_, **__: calls.append(1) or state)
    how = {"steps": 50, "tasks": 2, "mesh": sharding.mesh()}
    meta.learned(tmp_path, "these", sources, learner, **how)
    monkeypatch.setattr(meta.runtime, "any_process", lambda _: np.array([True]))
    monkeypatch.setattr(meta.sharding, "is_main", lambda: main)
    meta.learned(tmp_path, "these", sources, learner, **how)
    assert len(calls) == 2


def test_an_image_without_an_altered_variant_is_refused():
    episodes.check_altered(np.array([[3, 0], [2, 3]]))
    for kinds in ([[3, 0], [3, 3]], np.zeros((2, 0), int)):
        with pytest.raises(ConfigError, match="left an image without an anomaly: set more"):
            episodes.check_altered(np.array(kinds))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_runs_and_the_robust_ones_learn(task_pool, name):
    """Two hundred steps on noise with one anomalous direction.

    Sixteen rows of support mislead fixed inner rates here; joint training (before adaptation) and
    the learners of their own rates (after it) come below a fresh head all the same.
    """
    white, tasks = task_pool
    learner = Learner(name, 2, 0.1)
    state = meta.fit(tasks, np.zeros(12, bool), white, learner, 200, 3, 0, sharding.mesh())
    assert state.log[:, 0].tolist() == [50, 100, 150, 200] and np.isfinite(state.log).all()
    assert np.abs(meta.maml.plain(state.params)["direction"]).max() > 0
    column = {"joint": 2, "meta_sgd": 3, "maml_pp": 3}.get(name)
    if column:
        assert state.log[-1, column] < query_loss(white, tasks, deviation.init(white)) - 0.02


def query_loss(white, tasks, params) -> float:
    loss = meta.partial(meta.loss, levels=len(white.kernel))
    return float(jax.vmap(lambda rows: loss(params, rows)[0])(tasks.query).mean())


@pytest.mark.slow
def test_devices_and_padded_tasks(task_pool):
    """Five tasks a step on 1, 2 and 8 devices: the same parameters to 1e-6."""
    white, tasks = task_pool
    learner, ends = Learner("maml", 1, 0.1), []
    for count in (1, 2, 8):
        mesh = sharding.mesh(jax.devices()[:count])
        state = meta.fit(tasks, np.zeros(12, bool), white, learner, 50, 5, 0, mesh)
        ends.append(state.params)
    for other in ends[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ends[0], other)


def test_stopping_is_by_held_out_tasks(task_pool):
    white, tasks = task_pool
    held_out = np.arange(12) >= 8
    state = meta.fit(tasks, held_out, white, Learner("joint"), 150, 3, 0, sharding.mesh())
    best = state.log[:, 2].min()  # joint: as it is; the others after adaptation
    checked = jax.tree.map(lambda x: x[held_out], tasks)
    assert query_loss(white, checked, state.params) == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("name", ["maml", "maml_pp"])
def test_a_state_is_learned_once(tmp_path, sources, name, monkeypatch):
    learner, calls = Learner(name, 1, 0.1, 3), []

    def train(sources, learner, **how):
        calls.append(how)
        white = meta.whitening_of(sources)
        return meta.State(white, meta.begin(learner, white), np.array([[50, 0.4, 0.3, 0.2]]))

    monkeypatch.setattr(meta, "train", train)
    how = {"steps": 50, "tasks": 2, "mesh": sharding.mesh()}
    with pytest.raises(CheckpointError, match="no state of these sources: run --mode train"):
        meta.learned(tmp_path, "made", sources, learner, resume_only=True, **how)
    run = [meta.learned(tmp_path, "made", sources, learner, **how) for _ in range(2)]
    again = meta.learned(tmp_path, "made", sources, learner, resume_only=True, **how)
    jax.tree.map(np.testing.assert_array_equal, run[0], again)
    jax.tree.map(np.testing.assert_array_equal, *run)
    assert type(run[0].params) is type(run[1].params) and len(calls) == 1
    # other adaptation at the target, the same state; a damaged file is learned again
    meta.learned(tmp_path, "made", sources, learner._replace(adapt_steps=9), **how)
    assert len(calls) == 1
    (file,) = (tmp_path / "meta_learned").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    meta.learned(tmp_path, "made", sources, learner, **how)
    assert len(calls) == 2
    target = source(9, healthy=5)
    members = [np.arange(5), np.arange(4), np.arange(1, 5)]
    heads = meta.adapted(run[0], learner, target, members)
    assert heads["direction"].shape[0] == 3
    still = meta.adapted(run[0], learner._replace(adapt_steps=0), target, members)
    start = meta.maml.plain(run[0].params)["direction"]
    np.testing.assert_array_equal(still["direction"], jnp.stack([start] * 3))
    assert (np.abs(heads["direction"] - still["direction"]).max(1) > 0).all()


def test_a_source_with_too_few_images_is_named(sources):
    few = source(1, healthy=15)
    with pytest.raises(ConfigError, match=r"source 2 of config.meta.sources has 15 healthy"):
        meta.task_pool([sources[0], few], meta.whitening_of([sources[0], few]), 1, 0)
