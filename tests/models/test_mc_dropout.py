"""MC-dropout passes of all keys at once, against one forward per key and image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip.outputs import Features
from medclip_jax.models import mc_dropout, model
from medclip_jax.prompts.prompts import Prompts


def world(form: str):
    rng = np.random.default_rng(0)
    label = np.array([0, 0, 1, 0, 1])
    prompts = Prompts(*([None] * len(Prompts._fields)))._replace(label=label)
    design = model.Design(prompts, None, 32, 4, form, False, True, 0.3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {
        "adapters": tuple({"kernel": draw(6, 8), "bias": draw(8)} for _ in range(2)),
        "scale": jnp.asarray(1.2),
        "offset": jnp.asarray(0.4),
    }
    features = Features(draw(3, 8), (draw(3, 16, 6), draw(3, 16, 6).at[0, 0].set(0)))
    return params, draw(5, 8), features, design


@pytest.mark.parametrize("form", ["softmax", "distance"])
def test_all_keys_at_once_are_the_passes_one_by_one(form):
    params, text, features, design = world(form)
    keys = jax.random.split(jax.random.key(3), 7)
    got = mc_dropout.logits(params, text, features, design, keys)
    for t, key in enumerate(keys):
        for n in range(3):
            alone = jax.tree.map(lambda x, n=n: x[n : n + 1], features)
            expected = model.forward(params, text, alone, design, key).logit[0]
            np.testing.assert_allclose(got[t, n], expected, atol=3e-6)
    assert np.ptp(got, axis=0).min() > 0.01  # keys differ


def test_neighbours_in_the_batch_change_nothing():
    params, text, features, design = world("softmax")
    keys = jax.random.split(jax.random.key(3), 4)
    whole = mc_dropout.logits(params, text, features, design, keys)
    part = mc_dropout.logits(params, text, jax.tree.map(lambda x: x[1:], features), design, keys)
    np.testing.assert_allclose(whole[:, 1:], part, atol=1e-6)
