"""The `mediclip` arithmetic against the peer's own numbers: maps, losses and every gradient."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip import checkpoint, vit
from medclip_jax.clip.layers import Features
from medclip_jax.clip.text import TextEncoder
from medclip_jax.features.training_pool import Batch, Views
from medclip_jax.models import losses, model, modules, similarity, text_adapter
from medclip_jax.prompts import tokenize
from medclip_jax.prompts.tokenize import Prompts
from tests.support.checkpoints import PARITY, image_features, tiny_checkpoint

LOSS = dict(focal=1.0, dice=1.0, align=0.0, prompt=0.0)


@pytest.fixture(scope="module")
def tiny_with_inputs(tmp_path_factory):
    folder, *_ = tiny_checkpoint(tmp_path_factory.mktemp("clip") / "tiny")
    return checkpoint.load(str(folder), layers=(1, 4), inputs=True)


def rel(a, b) -> float:
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


def peer_prompts(ref, position: str = "end") -> Prompts:
    """The fixture's ids [BOS, 8 placeholders, name ..., rest] in one of the three layouts."""
    ids = np.concatenate([ref["ids_normal"], ref["ids_abnormal"]])
    length = np.concatenate([ref["name_len_normal"], ref["name_len_abnormal"]])
    rows = np.zeros_like(ids)
    slots = np.full_like(ids, -1)
    for i, (row, n) in enumerate(zip(ids, length, strict=True)):
        eos = int(row.argmax())
        name, rest = row[9 : 9 + n].tolist(), row[9 + n : eos].tolist()
        new, where = tokenize.arrange(name, 8, position)
        new = [int(row[0]), *new, *rest, int(row[eos])]
        rows[i, : len(new)], slots[i, 1 : 1 + len(where)] = new, where
    label = np.array([0] * len(ref["ids_normal"]) + [1] * len(ref["ids_abnormal"]))
    return Prompts(rows, slots, rows.argmax(-1), label, ("",) * len(rows))


def setting(path, peer, position="end", causal=False):
    """Design, params, frozen and batch that restate one fixture."""
    ref, clip = peer(path)
    design = model.Design(
        peer_prompts(ref, position),
        clip.text_encoder,
        clip.size,
        clip.grid,
        "softmax",
        causal,
        False,
        0.0,
        corners=True,
    )
    params = {
        "context": jnp.concatenate([ref["ctx_normal"], ref["ctx_abnormal"]]),
        "adapters": tuple(
            {
                "kernel": jnp.asarray(ref[f"adapter{i}_weight"][:, :, 0, 0].T),
                "bias": jnp.asarray(ref[f"adapter{i}_bias"]),
            }
            for i in range(3)
        ),
        "scale": jnp.asarray(0.0),
        "offset": jnp.asarray(0.5),
    }
    pixels = jnp.asarray(ref["pixel_values"].transpose(0, 2, 3, 1))
    features = image_features(clip.vision, pixels, encoder=clip.image_encoder)
    n = len(pixels)
    batch = Batch(
        features,
        jnp.asarray(ref["mask"], jnp.float32),
        jnp.zeros(n, jnp.int32),
        jnp.ones(n, bool),
    )
    frozen = {"text": clip.text, "logit_scale": jnp.asarray(clip.logit_scale)}
    return ref, design, params, frozen, batch


def peer_forward(design):
    """Unit class features, probability map, and per level unit tokens and similarities."""

    @jax.jit
    def run(params, frozen, features):
        text = model.text_features(params, frozen, design)
        pair = similarity.unit(
            similarity.class_features(similarity.Text(text, design.prompts.label))
        )
        out = model.forward(params, text, features, design)
        levels = [
            (similarity.unit(v), similarity.cosine(v, pair).transpose(0, 2, 1)) for v in out.levels
        ]
        return pair, jax.nn.sigmoid(similarity.to_pixels(out.logit, design.size, True)), levels

    return run


def class_pair(params, frozen, design):
    text = jax.jit(lambda t, f: model.text_features(t, f, design))(params, frozen)
    return similarity.unit(similarity.class_features(similarity.Text(text, design.prompts.label)))


@pytest.mark.parametrize("path", PARITY)
def test_mediclip_map_loss_and_gradients(path, peer):
    ref, design, params, frozen, batch = setting(path, peer)
    pair, probability, levels = peer_forward(design)(params, frozen, batch.features)
    np.testing.assert_allclose(pair.T, ref["text_features"], atol=5e-6)
    for level, (ours, both) in zip(ref["out_layers"], levels, strict=True):
        peer_unit, peer_both = ref[f"vision_features_l{level}"], ref[f"similarity_l{level}"]
        np.testing.assert_allclose(ours.reshape(peer_unit.shape), peer_unit, atol=5e-6)
        np.testing.assert_allclose(both.reshape(peer_both.shape), peer_both, atol=5e-6)
    np.testing.assert_allclose(probability, ref["anomaly_map"][:, 1], atol=2e-6)
    np.testing.assert_allclose(
        similarity.image_score(probability.reshape(len(probability), -1), 0.0),
        ref["image_score_max"],
        atol=2e-6,
    )

    loss = partial(model.loss, design=design, weights=LOSS)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, parts), grad = run(params, frozen, batch, None)
    assert rel(parts["focal"], ref["focal"]) < 1e-6
    assert rel(parts["dice"], ref["dice"]) < 1e-6
    assert rel(value, ref["loss"]) < 1e-6
    context = np.concatenate([ref["grad_ctx_normal"], ref["grad_ctx_abnormal"]])
    assert rel(grad["context"], context) < 1e-4
    for i in range(3):
        kernel = ref[f"grad_adapter{i}_weight"][:, :, 0, 0].T
        assert rel(grad["adapters"][i]["kernel"], kernel) < 1e-4
        assert rel(grad["adapters"][i]["bias"], ref[f"grad_adapter{i}_bias"]) < 1e-4

    soft = batch._replace(mask=jnp.asarray(ref["mask_soft"], jnp.float32))
    (_, parts), _ = run(params, frozen, soft, None)
    assert rel(parts["focal"], ref["focal_soft"]) < 1e-6
    assert rel(parts["dice"], ref["dice_soft"]) < 1e-6


@pytest.mark.parametrize("path", PARITY[:1])
@pytest.mark.parametrize("position", ["front", "middle"])
def test_context_positions(path, position, peer):
    ref, design, params, frozen, _ = setting(path, peer, position)
    pair = class_pair(params, frozen, design)
    np.testing.assert_allclose(pair.T, ref[f"text_features_{position}"], atol=5e-6)


@pytest.mark.parametrize("path", PARITY[:1])
def test_causal_text_differs_from_the_peer_and_is_clip(path, peer):
    ref, design, params, frozen, _ = setting(path, peer, causal=True)
    pair = class_pair(params, frozen, design)
    np.testing.assert_allclose(pair.T, ref["text_features_causal"], atol=5e-6)
    assert float(np.abs(np.asarray(pair.T) - ref["text_features"]).max()) > 0.1


# --- our own form, on made-up tokens ------------------------------------------------------------


def toy(clip, form="softmax", dropout=0.0, key=0):
    """A design on a tiny CLIP's text encoder with random tokens."""
    built = tokenize.build(
        clip.tokenizer,
        clip.eos_id,
        phrases="templates",
        words=tokenize.Words(("breast",), ("mass",), ("ultrasound",)),
        context=4,
        position="end",
    )
    design = model.Design(built, clip.text_encoder, clip.size, clip.grid, form, True, True, dropout)
    params = model.init(jax.random.key(key), clip, design, 4, shared=False)
    rng = np.random.default_rng(key)
    tokens = tuple(
        jnp.asarray(rng.normal(size=(4, clip.grid**2, clip.widths[0])), jnp.float32)
        for _ in range(2)
    )
    pooled = jnp.asarray(rng.normal(size=(4, clip.joint)), jnp.float32)
    mask = jnp.zeros((4, clip.size, clip.size)).at[2:, 6:20, 10:24].set(1.0)
    batch = Batch(Features(pooled, tokens), mask, jnp.array([0, 0, 1, 1]), jnp.array([True] * 4))
    frozen = {"text": clip.text, "logit_scale": jnp.asarray(clip.logit_scale)}
    return design, params, frozen, batch


@pytest.mark.parametrize("form", similarity.FORMS)
def test_every_part_of_theta_learns(form, tiny):
    design, params, frozen, batch = toy(tiny, form)
    weights = dict(focal=1.0, dice=1.0, align=0.1, prompt=0.1)
    loss = partial(model.loss, design=design, weights=weights)
    grad, parts = jax.jit(jax.grad(loss, has_aux=True))(params, frozen, batch, None)
    assert set(parts) == {"loss", *losses.TERMS}
    sizes = jax.tree.map(lambda g: float(jnp.abs(g).max()), grad)
    learned = {k: v for k, v in sizes.items() if k != "offset" or form == "distance"}
    assert min(jax.tree.leaves(learned)) > 0


def test_weight_zero_removes_a_term_from_the_computation(tiny):
    design, params, frozen, batch = toy(tiny)
    broken = batch._replace(
        features=batch.features._replace(pooled=batch.features.pooled * jnp.nan)
    )
    _, parts = jax.jit(partial(model.loss, design=design, weights=LOSS))(
        params, frozen, broken, None
    )
    assert set(parts) == {"loss", "focal", "dice"}
    assert np.isfinite(float(parts["loss"]))


def test_invalid_rows_do_not_count(tiny):
    design, params, frozen, batch = toy(tiny)
    weights = dict(focal=1.0, dice=1.0, align=1.0, prompt=1.0)
    loss = jax.jit(partial(model.loss, design=design, weights=weights))
    whole, _ = loss(params, frozen, jax.tree.map(lambda x: x[:3], batch), None)
    masked, _ = loss(
        params, frozen, batch._replace(valid=jnp.array([True, True, True, False])), None
    )
    np.testing.assert_allclose(masked, whole, rtol=1e-6)


def test_dropout_zero_is_the_plain_forward_and_keys_decide(tiny):
    design, params, frozen, batch = toy(tiny, dropout=0.3)
    text = model.text_features(params, frozen, design)
    plain = model.forward(params, text, batch.features, design)
    off = model.forward(
        params, text, batch.features, design._replace(dropout=0.0), jax.random.key(3)
    )
    np.testing.assert_array_equal(plain.logit, off.logit)
    one, same, other = (
        model.forward(params, text, batch.features, design, jax.random.key(k)).logit
        for k in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 1e-3


def test_distance_form_is_equation_nine(tiny):
    """With scale 1 and offset 0 the logit is 1 - max_j sim over the healthy prompts."""
    design, params, frozen, batch = toy(tiny, "distance")
    params = {**params, "scale": jnp.asarray(0.0), "offset": jnp.asarray(0.0)}
    text = model.text_features(params, frozen, design)
    out = model.forward(params, text, batch.features, design)
    healthy = np.asarray(text)[design.prompts.label == 0]
    healthy /= np.linalg.norm(healthy, axis=1, keepdims=True)
    by_hand = []
    for v in out.levels:
        v = np.asarray(v)
        v = v / np.linalg.norm(v, axis=-1, keepdims=True)
        by_hand.append(1 - (v @ healthy.T).max(-1))
    np.testing.assert_allclose(out.logit, np.mean(by_hand, 0), atol=2e-6)


def test_what_computes_the_loss_is_flax_modules(tiny_with_inputs, monkeypatch):
    """Every learned part, and the frozen encoders, are linen modules over params and frozen."""
    clip, applied = tiny_with_inputs, set()
    apply = nn.Module.apply

    def watched(self, *given, **more):
        applied.add(type(self))
        return apply(self, *given, **more)

    monkeypatch.setattr(nn.Module, "apply", watched)
    design, _, frozen, batch = toy(clip, dropout=0.1)
    kept = modules.frozen_blocks(clip.params, clip.image_encoder)
    design = design._replace(refinement=kept)
    adapter = text_adapter.init(jax.random.key(1), clip.joint)
    params = model.init(jax.random.key(0), clip, design, 4, False, True, adapter)
    names = {"context", "adapters", "scale", "offset", "language", "refine", "head"}
    assert set(params) == names
    grey = jnp.zeros((4, clip.size, clip.size))
    features = checkpoint.encode_images.__wrapped__(
        clip.vision, grey, encoder=clip.image_encoder, mean=clip.mean, std=clip.std
    )
    batch = batch._replace(features=features, views=Views(features, features, jnp.arange(4)))
    weights = dict(focal=1.0, dice=1.0, align=0.1, prompt=0.1, simclr=0.1)
    loss = partial(model.loss, design=design, weights=weights)
    gradients, _ = jax.eval_shape(jax.grad(loss, has_aux=True), params, frozen, batch, None)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    learned = {
        modules.PromptLearner,
        modules.VisualAdapter,
        similarity.AnomalyLogit,
        text_adapter.TextAdapter,
        modules.TokenRefiner,
        modules.ProjectionHead,
    }
    assert learned | {vit.ViT, TextEncoder} <= applied
