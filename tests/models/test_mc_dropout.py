"""MC-dropout: vmap over keys shares the work, and each pass is one thinned model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip.layers import Features
from medclip_jax.models import model, modules, similarity
from medclip_jax.prompts.tokenize import Prompts


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


def passes(params, text, features, design, keys):
    return jax.vmap(lambda key: model.forward(params, text, features, design, key).logit)(keys)


@pytest.mark.parametrize("form", ["softmax", "distance"])
def test_a_pass_is_the_logit_of_columns_left_out(form):
    params, text, features, design = world(form)
    keys = jax.random.split(jax.random.key(3), 7)
    got = passes(params, text, features, design, keys)
    levels = model.adapt_tokens(params, features, design)
    link = similarity.AnomalyLogit(form)
    for t, key in enumerate(keys):
        thinned = [
            y * modules.dropout_mask(jax.random.fold_in(key, i), 0.3, (1, 1, 8))
            for i, y in enumerate(levels)
        ]
        whole = similarity.Text(text, design.prompts.label)
        wanted = link.apply(model.link(params, design)[1], thinned, whole)
        np.testing.assert_allclose(got[t], wanted, atol=3e-6)
    assert np.ptp(got, axis=0).min() > 0.01  # keys differ


def test_neighbours_in_the_batch_change_nothing():
    params, text, features, design = world("softmax")
    keys = jax.random.split(jax.random.key(3), 4)
    whole = passes(params, text, features, design, keys)
    part = passes(params, text, jax.tree.map(lambda x: x[1:], features), design, keys)
    np.testing.assert_allclose(whole[:, 1:], part, atol=1e-6)


def test_all_keys_share_the_adapters_and_one_product():
    """The program adapts tokens once, whatever the number of keys."""
    params, text, features, design = world("softmax")

    def flops(n):
        run = jax.jit(lambda keys: passes(params, text, features, design, keys))
        return run.lower(jax.random.split(jax.random.key(0), n)).compile().cost_analysis()["flops"]

    adapting = 2 * 2 * 3 * 16 * 6 * 8  # levels, multiply-add, images, patches, widths
    assert flops(11) - flops(1) < 10 * adapting
