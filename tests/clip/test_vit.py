"""The encoders against transformers' own and against the peer fixtures."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip import checkpoint, stacked
from medclip_jax.clip.text import encode_text
from medclip_jax.errors import ConfigError
from medclip_jax.models import model
from medclip_jax.prompts.tokenize import Prompts
from tests.support.checkpoints import END, PARITY, START, image_features, tiny_checkpoint


def plain_prompts(ids: np.ndarray) -> Prompts:
    """Prompts without context slots."""
    return Prompts(
        ids=np.asarray(ids),
        slots=np.full_like(ids, -1),
        eos=np.asarray(ids.argmax(-1)),
        label=np.zeros(len(ids), np.int64),
        text=("",) * len(ids),
    )


def text_of(clip: checkpoint.Clip, prompts: Prompts, context=None):
    """Text features, compiled as a whole."""
    if context is None:
        context = jnp.zeros((len(prompts.ids), 0, clip.text_width))
    run = jax.jit(lambda text, c: encode_text(text, c, prompts, clip.text_encoder))
    return run(clip.text, context)


@pytest.mark.parametrize("path", PARITY)
def test_encoders_equal_the_peer_fixtures(path, peer):
    ref, clip = peer(path)
    pixels = jnp.asarray(ref["pixel_values"].transpose(0, 2, 3, 1))
    features = image_features(clip.vision, pixels, encoder=clip.image_encoder)
    np.testing.assert_allclose(features.pooled, ref["image_embeds"], atol=1e-5)
    for level, tokens in zip(ref["out_layers"], features.levels, strict=True):
        np.testing.assert_allclose(tokens, ref[f"tokens_l{level}"][:, 1:], atol=5e-5)
    sides = "ids_normal", "ids_abnormal"
    got = text_of(clip, plain_prompts(np.concatenate([ref[s] for s in sides])))
    wanted = np.concatenate([ref[f"text_embeds_{s}"] for s in sides])
    np.testing.assert_allclose(got, wanted, atol=2e-5)


IDS = np.full((2, 77), END)
IDS[0, :6] = [START, 5, 6, 7, 8, END]
IDS[1, :4] = [START, 300, 2, END]
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def tiny_outputs(tmp_path_factory):
    """Activation -> what we and what transformers make of the same checkpoint."""

    @cache
    def run(activation):
        folder, theirs, params = tiny_checkpoint(
            tmp_path_factory.mktemp(activation) / "tiny", activation, text_blocks=2
        )

        @jax.jit
        def reference(params):
            whole = theirs(IDS, PIXELS, params=params, output_hidden_states=True)
            hidden = whole.vision_model_output.hidden_states
            return (
                theirs.get_image_features(PIXELS, params=params),
                [hidden[level][:, 1:] for level in (1, 4)],
                theirs.get_text_features(IDS, params=params),
            )

        ours = checkpoint.load(str(folder), layers=(1, 4))
        pixels = jnp.asarray(PIXELS.transpose(0, 2, 3, 1))
        features = image_features(ours.vision, pixels, encoder=ours.image_encoder)
        text = text_of(ours, plain_prompts(IDS))
        return (features.pooled, list(features.levels), text), reference(params)

    return run


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_tiny_checkpoint_equals_transformers(activation, tiny_outputs):
    ours, theirs = tiny_outputs(activation)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), ours, theirs)


def test_activation_follows_the_config(tiny_outputs):
    """The two have the same weights."""
    (gelu, *_), _ = tiny_outputs("gelu")
    (quick, *_), _ = tiny_outputs("quick_gelu")
    assert float(jnp.abs(gelu - quick).max()) > 1e-3


def test_truncated_text_equals_all_positions(tiny):
    """Causal: nothing after the last end of text can change it."""
    ids = np.full((2, 77), END)
    ids[:, :5] = [START, 9, 9, 9, END]
    prompts = plain_prompts(ids)
    late = prompts._replace(eos=np.array([4, 76]))  # the second row forces all 77 positions
    short, long = text_of(tiny, prompts), text_of(tiny, late)
    np.testing.assert_allclose(short[0], long[0], atol=5e-6)
    assert float(jnp.abs(short[1] - long[1]).max()) > 1e-3


def test_context_fills_its_slots(tiny):
    """Context equal to a word's embedding is that word."""
    ids = np.full((1, 77), END)
    ids[0, :5] = [START, 11, 12, 13, END]
    hidden, slots = ids.copy(), np.full_like(ids, -1)
    hidden[0, [1, 3]] = 0
    slots[0, 1], slots[0, 3] = 1, 0
    context = jnp.asarray(model.token_table(tiny.text))[jnp.array([[13, 11]])]
    filled = text_of(tiny, plain_prompts(ids)._replace(ids=hidden, slots=slots), context)
    np.testing.assert_allclose(filled, text_of(tiny, plain_prompts(ids)), atol=1e-6)


def kernel_bytes(clip: checkpoint.Clip) -> int:
    layers = clip.vision["vision_model"]["encoder"]["layers"]
    blocks = [layers[i] for i in layers if i.isdigit()] or [layers]
    return sum(x.nbytes for b in blocks for x in jax.tree.leaves(b["mlp"]["fc1"]["kernel"]))


def test_int8_kernels_are_the_nearest_of_255_levels_per_output():
    kernel = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    kernel[:, 2] = 0
    kernel[3, 4] = -1e4
    kept = stacked.compress({"fc1": {"kernel": kernel, "bias": kernel[0]}}, "int8")["fc1"]
    scale = kept["kernel"]["scale"]
    assert kept["kernel"]["int8"].dtype == np.int8 and kept["bias"] is not None
    np.testing.assert_allclose(scale[0], np.abs(kernel).max(0) / 127, rtol=1e-6, atol=1e-30)
    back = np.asarray(stacked.decompress({"fc1": kept})["fc1"]["kernel"])
    assert (np.abs(back - kernel) <= 0.5001 * scale).all() and (back[:, 2] == 0).all()
    np.testing.assert_allclose(back[3, 4], -1e4, rtol=1e-6)


@pytest.mark.parametrize("dtype, least", [("bfloat16", 0.999), ("int8", 0.99)])
def test_smaller_weights_stay_near_float32(compact, dtype, least):
    low = checkpoint.load("compact", dtype=dtype)
    assert low.image_encoder.dtype == dtype
    share = kernel_bytes(low) / kernel_bytes(compact)
    assert share < {"bfloat16": 0.5001, "int8": 0.26}[dtype]

    def run(vision, encoder):
        how = dict(encoder=encoder, mean=compact.mean, std=compact.std)
        return checkpoint.encode_images(vision, grey, **how)

    grey = jnp.asarray(np.random.default_rng(0).random((1, 224, 224)), jnp.float32)
    exact, near = run(compact.vision, compact.image_encoder), run(low.vision, low.image_encoder)
    a, b = exact.levels[-1], near.levels[-1]
    cosine = (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
    assert float(cosine.min()) > least
    assert b.dtype == jnp.float32
    # what is restored for refinement, in float32, is what runs
    again = run(low.image_encoder.prepare(low.params), low.image_encoder)
    most = float(abs(near.pooled).max())
    np.testing.assert_allclose(again.pooled, near.pooled, atol=1e-5 * most)
    assert float(abs(exact.pooled - near.pooled).max()) > 1e-4 * most  # so that this says something


def test_int8_is_of_our_vit_alone():
    with pytest.raises(ConfigError, match="clip.dtype is 'int8'.*give float32 or bfloat16"):
        checkpoint.load("compact", dtype="int8", implementation="transformers")
