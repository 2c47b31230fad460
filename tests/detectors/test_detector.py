"""Detectors: what holds a support out, what zero-shot is, and what dropout draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.models.clip.modeling_flax_clip import FlaxCLIPModel

from medclip_jax.clip import hf_weights, vit
from medclip_jax.detectors import memory_bank, prompt_detector, zero_shot
from medclip_jax.models import model
from tests.support.models import design_of, rows, tokens

# --- memory -------------------------------------------------------------------------------------


def test_memory_holds_each_support_out():
    """A support's values are those of a memory that never saw it."""
    held = tokens(4)
    whole = memory_bank.remember(held)
    for i in range(4):
        others = memory_bank.remember(rows(held, [j for j in range(4) if j != i]))
        np.testing.assert_allclose(
            whole.held_out[i : i + 1], others.patches(rows(held, [i])), atol=1e-6
        )
    assert whole.held_out.min() > 0.1
    assert whole.passes is None and whole.image is None


def test_memory_scores_by_the_definition():
    held, new = tokens(2), tokens(3, seed=1)
    wanted = 0
    for v, m in zip(new.levels, held.levels, strict=True):
        v, m = memory_bank.neighbourhood(v), memory_bank.neighbourhood(m).reshape(-1, 32)
        v = v / np.linalg.norm(v, axis=-1, keepdims=True)
        m = m / np.linalg.norm(m, axis=-1, keepdims=True)
        wanted += (1 - np.einsum("npd,md->npm", v, m)).min(-1) / 2
    np.testing.assert_allclose(memory_bank.remember(held).patches(new), wanted, atol=1e-6)


def test_memory_knows_its_supports():
    held = tokens(3)
    np.testing.assert_allclose(memory_bank.remember(held).patches(held), 0, atol=1e-6)


# --- learned ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded(tiny):
    """Three copies of params that differ, for two folds of five supports."""
    design, frozen = design_of(tiny, dropout=0.3)
    starts = [model.init(jax.random.key(i), tiny, design, 2, False) for i in range(3)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    groups = [np.array([0, 3]), np.array([1, 2, 4])]
    held = tokens(5)
    made = prompt_detector.learned(params, frozen, design, held, groups)
    return made, starts, design, frozen, held, groups


def test_each_copy_scores_what_it_did_not_see(folded):
    made, starts, design, frozen, held, groups = folded

    @jax.jit
    def values(params, features):
        text = model.text_features(params, frozen, design)
        return model.forward(params, text, features, design).logit

    each = [values(params, held) for params in starts]
    for copy, group in enumerate(groups, 1):
        np.testing.assert_allclose(made.held_out[group], each[copy][group], atol=1e-5)
        assert np.abs(made.held_out[group] - each[0][group]).max() > 1e-3
    np.testing.assert_allclose(made.patches(held), each[0], atol=1e-5)


def test_passes_depend_on_keys_alone(folded):
    made, *_, held, _ = folded
    keys = jax.random.split(jax.random.key(0), 6)
    drawn = made.passes(held, keys)
    assert drawn.shape == (6, 5, 16)
    np.testing.assert_array_equal(drawn, made.passes(held, keys))
    np.testing.assert_allclose(drawn[::-1], made.passes(held, keys[::-1]), atol=1e-6)
    assert np.asarray(drawn).std(0).min() > 0
    # nor on the other images of the batch, nor on its order
    np.testing.assert_allclose(
        drawn[:, ::-1], made.passes(rows(held, range(4, -1, -1)), keys), atol=1e-5
    )


def test_more_passes_agree_better(folded):
    """The spread of the estimate over repeats falls as 1 / sqrt(T)."""
    made, *_, held, _ = folded
    drawn = np.asarray(made.passes(held, jax.random.split(jax.random.key(1), 512)))
    means = {t: drawn.reshape(512 // t, t, 5, 16).mean(1).std(0).mean() for t in (4, 64)}
    assert 2.5 < means[4] / means[64] < 6.5  # 4 in expectation


def test_no_dropout_has_no_passes(tiny):
    design, frozen = design_of(tiny, dropout=0.0)
    params = jax.tree.map(lambda x: x[None], model.init(jax.random.key(0), tiny, design, 2, False))
    made = prompt_detector.learned(params, frozen, design, tokens(2), [])
    assert made.passes is None
    np.testing.assert_array_equal(made.held_out, made.patches(tokens(2)))  # no folds: copy 0


# --- zero shot ----------------------------------------------------------------------------------


class Theirs(FlaxCLIPModel):
    """Without the random start, which takes long and which the checkpoint replaces."""

    def init_weights(self, rng, input_shape, params=None):
        whole = super().init_weights
        shapes = jax.eval_shape(lambda key: whole(key, input_shape), rng)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def test_zero_shot_is_clip_on_the_embedded_checkpoint(compact):
    """Image scores and last-level patches against transformers' own model and parameters."""
    design, frozen = design_of(compact, context=0)
    rng = np.random.default_rng(0)
    grey = jnp.asarray(rng.random((1, 224, 224)), jnp.float32)
    got = vit.encode_images(
        compact.vision, grey, tower=compact.vision_tower, mean=compact.mean, std=compact.std
    )
    made = zero_shot.zero_shot(None, frozen, design, compact, got)

    theirs = Theirs.from_pretrained(hf_weights.EMBEDDED)
    params = theirs.params
    pixels = np.asarray(vit.normalise(grey, compact.mean, compact.std)).transpose(0, 3, 1, 2)

    @jax.jit
    def reference(params):
        ids = design.prompts.ids
        text = theirs.get_text_features(ids, params=params)
        image = theirs.get_image_features(pixels, params=params)
        last = theirs(ids, pixels, params=params, output_hidden_states=True)
        tokens = last.vision_model_output.hidden_states[-1][:, 1:]
        return text, image, tokens

    text, image, last = reference(params)
    norm = params["vision_model"]["post_layernorm"]
    centred = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
    joint = (centred * norm["scale"][None, None] + norm["bias"][None, None]) @ params[
        "visual_projection"
    ]["kernel"]
    pair = np.stack([text[:2].mean(0), text[2]])

    def logit(v):
        v = v / np.linalg.norm(v, axis=-1, keepdims=True)
        both = v @ (pair / np.linalg.norm(pair, axis=-1, keepdims=True)).T
        return np.exp(params["logit_scale"]) * (both[..., 1] - both[..., 0])

    np.testing.assert_allclose(made.image(got), logit(image), atol=2e-3)
    np.testing.assert_allclose(made.patches(got), logit(joint), atol=5e-3)
    np.testing.assert_array_equal(made.held_out, made.patches(got))
    np.testing.assert_array_equal(made.held_out_image, made.image(got))
    assert made.passes is None
