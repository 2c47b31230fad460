"""What pre-training asks for: parts of the loss, the optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrain import encoders, loop, objective


def test_similarity_sees_cosines_only():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 14, 6)))
    turn = jnp.asarray(np.linalg.qr(rng.normal(size=(6, 6)))[0])
    assert objective.similarity(x, 3 * x @ turn) < 1e-10
    assert objective.similarity(x, jnp.flip(x, 1)) > 1e-3


def test_sigmoid_loss_closed_forms():
    """Every pair is a question of its own: duplicate captions are all positives."""
    eye, none, zero = jnp.eye(4), jnp.zeros((4, 4)), jnp.zeros(())
    even = objective.sigmoid_loss(eye, eye, eye, zero, zero)
    assert even == pytest.approx(4 * np.log(2))
    same = jnp.ones((4, 4))
    doubled = objective.sigmoid_loss(same, same, same, jnp.array(2.0), jnp.array(1.0))
    assert doubled == pytest.approx(4 * np.log(1 + np.exp(-3.0)), rel=1e-5)
    negative = objective.sigmoid_loss(eye, eye, none, jnp.array(2.0), zero)
    assert negative == pytest.approx(np.log(1 + np.exp(2.0)) + 3 * np.log(2), rel=1e-5)


def test_parts_of_weight_0_are_left_out_and_the_others_are_the_same(material, model):
    params = loop.start(encoders.init(model, 0), model, 0).params
    images = objective.Weights(caption=0, patch_caption=0, phrase=0)
    batch = loop.make_batch(material, loop.Plan(1, batch=8, weights=images), 0, 9)
    run = jax.jit(objective.loss, static_argnums=(1, 2))
    total, parts = run(params, model, images, batch)
    whole = run(params, model, objective.Weights(), batch)[1]
    assert set(parts) == {"fine", "coarse", "pooled", "similarity"}
    assert len(whole) == 7
    for name, value in parts.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5)
    expected = sum(getattr(images, n) * x for n, x in parts.items())
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_captions_teach_the_image_encoder_as_much_as_they_may(material, model):
    params = loop.start(encoders.init(model, 0), model, 0).params
    texts = objective.Weights(0, 0, 0, 0, 1, 1, 1, into_image=1.0)
    batch = loop.make_batch(material, loop.Plan(1, batch=8, weights=texts), 0, 9)
    run = jax.jit(jax.grad(objective.loss, has_aux=True), static_argnums=(1, 2))
    whole = run(params, model, texts, batch)[0]["clip"]
    blocks = jax.tree.leaves(whole["vision_model"]["encoder"])
    assert max(float(jnp.abs(x).max()) for x in blocks) > 1e-5
    for share in (0.0, 0.5):
        part = run(params, model, texts._replace(into_image=share), batch)[0]["clip"]
        for name in ("text_model", "visual_projection", "text_projection"):
            for a, b in zip(*map(jax.tree.leaves, (part[name], whole[name])), strict=True):
                np.testing.assert_allclose(a, b, 1e-4, 1e-6)  # float32 sums in another order
        for a, b in zip(jax.tree.leaves(part["vision_model"]["encoder"]), blocks, strict=True):
            np.testing.assert_allclose(a, share * b, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_each_on_its_own():
    given = {"clip": {"a": {"x": np.array([3.0, 0.0]), "y": np.array(4.0)}}, "heads": {"b": 0.5}}
    got = objective.clip_each(given)
    np.testing.assert_allclose(got["clip"]["a"]["x"], [0.6, 0], rtol=1e-6)
    assert got["clip"]["a"]["y"] == pytest.approx(0.8) and got["heads"]["b"] == 0.5


def test_the_optimiser_turns_matrices_of_blocks_and_nothing_else_into_near_rotations():
    rng = np.random.default_rng(0)
    block = {"kernel": rng.normal(size=(24, 16)), "bias": rng.normal(size=16)}
    grown = {"clip": {"vision_model": {"layers": {"0": block}}, "visual_projection": block}}
    grown |= {"heads": {"fine.weight": rng.normal(size=(24, 16))}}
    gradient = jax.tree.map(jnp.float32, grown)
    still = jax.tree.map(jnp.zeros_like, gradient)  # no decay of weights
    optimiser = objective.make_optimiser()
    updates, _ = optimiser.update(gradient, optimiser.init(still), still)
    turned = updates["clip"]["vision_model"]["layers"]["0"].pop("kernel")
    spectrum = np.linalg.svd(np.asarray(turned), compute_uv=False) / objective.ORTHOGONAL
    assert 0.5 < spectrum.min() and spectrum.max() < 1.3
    for x in jax.tree.leaves(updates):  # the first step of Adam is a sign
        np.testing.assert_allclose(np.abs(x), 1, rtol=1e-3)


def test_all_patches_in_any_order_give_the_full_encoder(model):
    params = encoders.init(model, 0)
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.uniform(size=(2, 224, 224)), jnp.float32)
    order = np.stack([rng.permutation(196) for _ in range(2)])
    encode = jax.jit(lambda keep: encoders.encode_image(params, model, pixels, keep)[1])
    full, mixed = encode(np.tile(np.arange(196), (2, 1))), encode(order)
    np.testing.assert_allclose(mixed[:, 0], full[:, 0], atol=1e-4)
    np.testing.assert_allclose(mixed[0, 1:], full[0, 1:][order[0]], atol=1e-4)


@pytest.mark.slow
def test_texts_alone_leave_the_image_encoder_as_it_is(material, model):
    none = dict.fromkeys(("fine", "coarse", "pooled", "similarity"), 0.0)
    weights = objective.Weights(**none)
    batch = loop.make_batch(material, loop.Plan(steps=1, batch=8, weights=weights), 0, 12)
    state = loop.start(encoders.init(model, 0), model, 0)
    step = loop.compiled_step(model, weights)
    before = jax.tree.map(np.array, state)  # the step's own are donated
    params, *_ = step(*state, np.float32(1e-3), batch)
    for part, same in (("vision_model", True), ("text_model", False), ("visual_projection", False)):
        old, new = before.params["clip"][part], params["clip"][part]
        if part == "vision_model":  # its last norm belongs to the projection
            new, old = ({k: v for k, v in x.items() if k != "post_layernorm"} for x in (new, old))
        pair = map(jax.tree.leaves, (old, new))
        moved = [float(abs(a - b).max()) for a, b in zip(*pair, strict=True)]
        assert (max(moved) == 0) == same, part
