"""Refinement: exactly the identity at first, an attention by hand, learned in a whole run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import build, build_detector, config
from medclip_jax.clip import checkpoint, layers
from medclip_jax.data import augmentation
from medclip_jax.detectors import prompt_detector, saved
from medclip_jax.distributed import sharding
from medclip_jax.features import cache, encoder, training_pool
from medclip_jax.features.training_pool import Batch
from medclip_jax.inference import predictor
from medclip_jax.models import model, modules
from medclip_jax.training import loop
from tests.support.checkpoints import image_features, tiny_checkpoint
from tests.support.runs import log

LEVELS = [(1,), (2, 3), (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("refine") / "clip")[0]


def built(folder, levels, on=True):
    clip = checkpoint.load(str(folder), levels, inputs=on)
    c = config.base("k=4", name="folder", anatomy="breast", conditions=("mass",))
    c.update_from_flattened_dict({"prompts.context": 2, "model.refine": on, "model.dropout": 0.0})
    design, frozen = build.model_parts(config.resolve(c), clip)
    params = model.init(jax.random.key(0), clip, design, 2, False)
    return clip, design, frozen, params


@pytest.mark.parametrize("levels", LEVELS)
def test_a_fresh_refinement_is_exactly_the_identity(folder, levels):
    pixels = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    clip, design, frozen, params = built(folder, levels)
    plain, bare, _, start = built(folder, levels, on=False)
    tokens = image_features(clip.vision, pixels, clip.image_encoder)
    without = image_features(plain.vision, pixels, plain.image_encoder)
    assert without.inputs == () and bare.refinement is None
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        tokens._replace(inputs=()),
        without,
    )
    assert set(params) - set(start) == {"refine"} and len(params["refine"]) == len(levels)
    jax.tree.map(np.testing.assert_array_equal, start, {n: params[n] for n in start})

    @jax.jit
    def both(params, tokens):
        text = model.text_features(params, frozen, design)
        off = model.forward(start, text, tokens._replace(inputs=()), bare).logit
        return model.forward(params, text, tokens, design).logit, off

    on, off = both(params, tokens)
    np.testing.assert_allclose(on, off, rtol=0, atol=1e-6)  # two programs: one rounding apart
    opened = [{**q, "gate": jnp.asarray(0.5)} for q in params["refine"]]
    moved, _ = both({**params, "refine": tuple(opened)}, tokens)
    assert np.abs(moved - off).max() > 1e-4


def test_the_query_starts_as_the_value_and_the_rest_is_the_block(folder):
    """With CLIP's own query in its place the result is the block's attention, level by level."""
    clip, design, _, params = built(folder, (2, 4))
    pixels = jax.random.normal(jax.random.key(2), (2, 32, 32, 3))
    tokens = image_features(clip.vision, pixels, clip.image_encoder)
    blocks = clip.params["vision_model"]["encoder"]["layers"]
    one = layers.Block(2, 64, "gelu", clip.image_encoder.eps)
    for i, number in enumerate((2, 4)):
        block, own, x = design.refinement.blocks[i], params["refine"][i], tokens.inputs[i]
        np.testing.assert_array_equal(own["kernel"], block["self_attn"]["v_proj"]["kernel"])
        query = {**block["self_attn"]["q_proj"], "gate": jnp.asarray(1.0)}
        refiner = modules.TokenRefiner(2, clip.image_encoder.eps)
        zeros = jnp.zeros_like(tokens.levels[i])
        got = refiner.apply({"params": query}, block, zeros, x)
        variables = {"params": blocks[str(number - 1)]}
        want = one.apply(variables, x, method=lambda b, x: b.self_attn(b.layer_norm1(x)))
        np.testing.assert_allclose(got, want[:, 1:], atol=1e-5)
        # and the block's input is what its output comes from
        after = one.apply(variables, x)
        np.testing.assert_allclose(after[:, 1:], tokens.levels[i], atol=1e-5)


def test_the_gate_learns_first_and_then_the_query(folder):
    clip, design, frozen, params = built(folder, (1, 4))
    pixels = jax.random.normal(jax.random.key(3), (2, 32, 32, 3))
    tokens = image_features(clip.vision, pixels, clip.image_encoder)
    mask = jnp.zeros((2, 32, 32)).at[1, :16].set(1.0)
    batch = Batch(tokens, mask, jnp.array([0, 1]), jnp.ones(2, bool))
    weights = config.base().loss.to_dict()

    @jax.jit
    def grads(params):
        def value(t):
            return model.loss(t, frozen, batch, None, design=design, weights=weights)[0]

        return jax.grad(value)(params)["refine"]

    for grad in grads(params):
        assert float(grad["gate"]) != 0 and not np.asarray(grad["kernel"]).any()
    opened = tuple({**q, "gate": jnp.asarray(0.3)} for q in params["refine"])
    for grad in grads({**params, "refine": opened}):
        assert np.asarray(grad["kernel"]).any()


def test_the_bank_keeps_inputs_under_a_name_of_their_own(folder, tmp_path, pictures):  # noqa: F811
    mesh = sharding.mesh(jax.devices()[:1])
    feature_caches = [
        cache.open(
            tmp_path, checkpoint.load(str(folder), (1, 4), inputs=on), "stretch", "float32", mesh
        )
        for on in (False, True)
    ]
    assert feature_caches[0].folder != feature_caches[1].folder
    for feature_cache in feature_caches:
        encoder.encode_images(feature_cache, pictures[:2])
    plain, full = (next(cache.load_images(b, pictures[:2], 2)) for b in feature_caches)
    assert plain.inputs == () and [x.shape for x in full.inputs] == [(2, 17, 32)] * 2
    recipe = augmentation.Synthesis("medclip", 2, 0, "self")
    pool = encoder.open_pool(feature_caches[1], pictures[:2], recipe)
    taken = training_pool.take(pool, np.array([1, 0]), np.array([-1, 1])).features
    np.testing.assert_array_equal(taken.inputs[1][0], full.inputs[1][1])
    assert len(taken.inputs) == 2


def test_a_whole_run_learns_it_and_its_scorer_reads_alike(world, tmp_path):
    run = tmp_path / "run"
    world.train(run, model__refine=True, steps=20)
    held = saved.read(run)
    assert all(q["gate"] != 0 for q in prompt_detector.learned(held.params)[0]["refine"])
    ready = build_detector.load_predictor(run)
    got = predictor.score(ready, np.random.default_rng(0).random((2, 32, 32), np.float32))
    assert np.isfinite(got.score).all() and got.maps.shape == (2, 32, 32)


@pytest.mark.parametrize("limit", [{"CHUNK": 3}, {"ATTENTION": 2 * 2 * 17**2}])
def test_many_images_are_refined_in_parts_with_the_same_gradient(folder, monkeypatch, limit):
    clip, design, _, params = built(folder, (2, 4))
    rng = np.random.default_rng(0)
    levels = tuple(jnp.asarray(rng.normal(size=(13, 16, 32)), jnp.float32) for _ in range(2))
    inputs = tuple(jnp.asarray(rng.normal(size=(13, 17, 32)), jnp.float32) for _ in range(2))
    opened = tuple({**q, "gate": jnp.asarray(0.3)} for q in params["refine"])

    def value(q):
        both = modules.refine(q, design.refinement, levels, inputs)
        return sum((x**2).sum() for x in both), both

    def compiled():
        return jax.jit(jax.value_and_grad(value, has_aux=True)).lower(opened).compile()

    at_once = compiled()
    for name, most in limit.items():
        monkeypatch.setattr(modules, name, most)
    in_parts = compiled()
    ((_, whole), wanted), ((_, parts), got) = at_once(opened), in_parts(opened)
    peaks = [x.memory_analysis().temp_size_in_bytes for x in (at_once, in_parts)]
    assert peaks[1] < 0.8 * peaks[0]
    for a, b in zip(jax.tree.leaves((whole, wanted)), jax.tree.leaves((parts, got)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)


def test_the_gate_learns_faster_and_the_log_says_how_far(world, tmp_path):
    world.train(tmp_path, model__refine=True, steps=2)
    (row,) = log(tmp_path)
    params = prompt_detector.learned(saved.read(tmp_path).params)[0]
    gates = [abs(float(q["gate"])) for q in params["refine"]]
    assert row["gate"] == pytest.approx(np.mean(gates), rel=1e-5)
    # Adam's first step is the learning rate, which is 1e-3 for all else
    assert loop.GATE_RATE * 1e-3 <= max(gates) <= 2.1 * loop.GATE_RATE * 1e-3


def test_tokens_may_be_kept_in_16_bit(folder, tmp_path, pictures):  # noqa: F811
    clip, mesh = checkpoint.load(str(folder), (1, 4), inputs=True), sharding.mesh(jax.devices()[:1])
    full, half = (
        cache.open(tmp_path, clip, "stretch", dtype, mesh) for dtype in ("float32", "float16")
    )
    assert full.folder != half.folder
    sizes = []
    for each in (full, half):
        encoder.encode_images(each, pictures[:2])
        sizes.append(cache.image_path(each, pictures[0]).stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    exact, rounded = (next(cache.load_images(x, pictures[:2], 2)) for x in (full, half))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    encode = checkpoint.encode_images
    with pytest.MonkeyPatch.context() as patch:  # what float16 cannot hold is its largest
        patch.setattr(
            checkpoint,
            "encode_images",
            lambda *a, **k: jax.tree.map(lambda x: 1e6 * x, encode(*a, **k)),
        )
        huge = encoder.encode(half, np.random.default_rng(0).random((1, 32, 32), np.float32))
    assert np.isfinite(huge.levels[0]).all() and np.abs(huge.levels[0]).max() == 65504
