"""Validation while training: whom it scores, when, and the two numbers it logs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medclip_jax.distributed import sharding
from medclip_jax.features import training_pool
from medclip_jax.models import model
from medclip_jax.training import validation
from tests.support.models import design_of


@pytest.fixture
def pool(tiny):
    """Four supports and three variants of each; a token tells whose it is and which."""
    rng = np.random.default_rng(0)
    width = tiny.widths[0]

    def tensors(support, altered):
        def get(name):
            n = 3 if altered else 1
            if name == "mask":
                return np.full((n, 128), 255, np.uint8)
            shape = (n, 16, width) if name.startswith("level") else (n, width)
            marked = rng.random(shape, np.float32) / 100
            return (
                marked
                + support
                + 10.0 * altered * (1 + np.arange(n)).reshape(-1, *[1] * (len(shape) - 1))
            )

        return get

    clean, altered = (tuple(tensors(s, a) for s in range(4)) for a in (False, True))
    return training_pool.TrainingPool(clean, altered, 2, 32, 3, np.zeros((4, 3), int))


def test_rows_are_the_fold_its_variants_and_the_others(pool):
    tokens, role = validation.rows(pool, [np.array([0, 2]), np.array([1])])
    np.testing.assert_array_equal(role[0], [1, 2, 2, 2, 1, 2, 2, 2, 3, 3])
    np.testing.assert_array_equal(role[1], [1, 2, 2, 2, 0, 0, 0, 0, 3, 3])
    marks = np.floor(np.asarray(tokens.pooled)[..., 0] + 1e-3)
    np.testing.assert_array_equal(marks[0], [0, 10, 20, 30, 2, 12, 22, 32, 1, 1])
    np.testing.assert_array_equal(marks[1], [1, 11, 21, 31, 1, 11, 21, 31, 0, 2])
    np.testing.assert_array_equal(np.floor(tokens.levels[1][..., 3, 1] + 1e-3), marks)


def test_numbers_equal_scikit_learn_fold_by_fold():
    rng = np.random.default_rng(1)
    scores = np.round(rng.normal(0.2, 1, (3, 30)), 1).astype(np.float32)  # with ties
    role = rng.integers(1, 4, (3, 30))
    role[2, 15:] = 0
    got = validation.held_out_metrics(jnp.asarray(scores), jnp.asarray(role))
    truth, called, each, pairs = [], [], [], []
    for s, r in zip(scores, role, strict=True):
        scored = (r == 1) | (r == 2)
        truth += (r[scored] == 2).tolist()
        called += (s[scored] > s[r == 3].max()).tolist()
        each.append(roc_auc_score(r[scored] == 2, s[scored]))
        pairs.append((r == 1).sum() * (r == 2).sum())
    assert float(got["held_out_accuracy"]) == pytest.approx(balanced_accuracy_score(truth, called))
    assert float(got["held_out_auroc"]) == pytest.approx(np.average(each, weights=pairs))
    flat = validation.held_out_metrics(jnp.zeros((3, 30)), jnp.asarray(role))
    assert {n: float(x) for n, x in flat.items()} == {
        "held_out_accuracy": 0.5,
        "held_out_auroc": 0.5,
    }


def test_each_fold_is_scored_by_params_that_never_saw_it(tiny, pool):
    design, frozen = design_of(tiny)
    folds, mesh = training_pool.folds(4, 2), sharding.mesh(jax.devices()[:1])
    fresh = model.init(jax.random.key(0), tiny, design, 2, False)
    params = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -1.5 * x]), fresh)
    validate = validation.validator(pool, folds, validation.scorer(design, 0.25), mesh)
    features, role = validation.rows(pool, folds)
    scores = []
    for f in range(2):
        own = jax.tree.map(lambda x, f=f: x[1 + f], params)
        batch = jax.tree.map(lambda x, f=f: jnp.asarray(x[f]), features)
        text = model.text_features(own, frozen, design)
        logit = np.sort(model.forward(own, text, batch, design).logit, axis=1)
        scores.append(logit[:, -4:].mean(1))
    wanted = validation.held_out_metrics(jnp.stack(scores), jnp.asarray(role))
    other = jax.tree.map(lambda x: x.at[0].set(7.0), params)  # the main params have no say
    for found in (validate(params, frozen), validate(other, frozen)):
        assert set(found) == {"held_out_accuracy", "held_out_auroc"}
        for name, value in wanted.items():
            assert float(found[name]) == pytest.approx(float(value)), name


@pytest.mark.parametrize(
    "steps, times, log_every, count", [(400, 20, 10, 20), (200, 20, 10, 20), (7, 20, 2, 4)]
)
def test_when(steps, times, log_every, count):
    due = [i for i in range(1, steps + 1) if validation.due(i, steps, times, log_every)]
    assert len(due) == count and due[-1] == steps
    assert all(i % log_every == 0 for i in due[:-1])
    assert not any(validation.due(i, steps, 0, log_every) for i in range(1, steps + 1))
