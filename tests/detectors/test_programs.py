"""What is compiled for a scoring function is compiled once, and goes with it."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip.layers import Features
from medclip_jax.detectors import detector
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.explain import grad_cam


def build(weights: np.ndarray, traced: list) -> Detector:
    """A detector whose scoring function holds `weights`, as that of a run holds a CLIP."""
    held = jnp.asarray(weights)

    def apply(params, features, key):
        traced.append(key)
        patch = features.levels[0] @ (params["direction"] * held)
        return Scores(patch, patch.max(-1))

    params = {"direction": np.ones(weights.shape[-1], np.float32)}
    return Detector(apply, params, None, None, 4, False, 8)


@pytest.fixture
def features():
    tokens = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    return Features(jnp.zeros((3, 2)), (jnp.asarray(tokens),))


CALLS = {
    "score": lambda built, features: detector.score(built, features).patch,
    "read_batch": lambda built, features: detector.read_batch(built, features, jnp.zeros(0)).maps,
    "gradients": lambda built, features: grad_cam.gradients(built, features, 0, 0.05),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_of_a_detector_stays_when_it_is_gone(call, features):
    traced: list = []
    built = build(np.arange(5, dtype=np.float32), traced)
    first = call(built, features)
    assert len(traced) == 1
    again = call(built._replace(params={"direction": np.full(5, 2.0, np.float32)}), features)
    assert len(traced) == 1  # params are no part of the program
    np.testing.assert_allclose(again, 2 * first, rtol=1e-6)
    gone = weakref.ref(built.apply)
    del built
    gc.collect()
    assert gone() is None


def test_other_settings_are_another_program(features):
    built = build(np.ones(5, np.float32), traced := [])
    one, four = (grad_cam.gradients(built, features, 0, top) for top in (0.25, 1.0))
    assert len(traced) == 2
    np.testing.assert_allclose(four, np.full((3, 4, 5), 0.25), rtol=1e-6)  # mean of four patches
    assert sorted(np.unique(one).tolist()) == [0.0, 1.0]  # of the largest patch alone
