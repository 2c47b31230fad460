"""The towers against transformers' own and against the peer fixtures."""

import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medclip_jax.clip import checkpoint, hf_weights, vit
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.prompts.prompts import Prompts
from tests.support.checkpoints import END, PARITY, START, patch_features, tiny_checkpoint


def plain_prompts(ids: np.ndarray) -> Prompts:
    """Prompts without context slots."""
    return Prompts(
        ids=np.asarray(ids),
        slots=np.full_like(ids, -1),
        eos=np.asarray(ids.argmax(-1)),
        label=np.zeros(len(ids), np.int64),
        text=("",) * len(ids),
    )


def text_of(model: checkpoint.Clip, prompts: Prompts, context=None):
    """Text features, compiled as a whole."""
    if context is None:
        context = jnp.zeros((len(prompts.ids), 0, model.text_width))
    run = jax.jit(lambda text, c: vit.encode_text(text, c, prompts, model.text_encoder))
    return run(model.text, context)


@pytest.mark.parametrize("path", PARITY)
def test_towers_equal_the_peer_fixtures(path, peer):
    ref, model = peer(path)
    pixels = jnp.asarray(ref["pixel_values"].transpose(0, 2, 3, 1))
    features = patch_features(model.vision, pixels, encoder=model.image_encoder)
    np.testing.assert_allclose(features.pooled, ref["image_embeds"], atol=1e-5)
    for level, tokens in zip(ref["out_layers"], features.levels, strict=True):
        np.testing.assert_allclose(tokens, ref[f"tokens_l{level}"][:, 1:], atol=5e-5)
    sides = "ids_normal", "ids_abnormal"
    got = text_of(model, plain_prompts(np.concatenate([ref[s] for s in sides])))
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
            tmp_path_factory.mktemp(activation) / "tiny", activation
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
        features = patch_features(ours.vision, pixels, encoder=ours.image_encoder)
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
    context = jnp.asarray(tiny.text["token"])[jnp.array([[13, 11]])]
    filled = text_of(tiny, plain_prompts(ids)._replace(ids=hidden, slots=slots), context)
    np.testing.assert_allclose(filled, text_of(tiny, plain_prompts(ids)), atol=1e-6)


def test_bfloat16_tower_stays_near_float32(compact):
    grey = jnp.asarray(np.random.default_rng(0).random((1, 224, 224)), jnp.float32)
    exact, low = (
        checkpoint.encode_images(
            compact.vision,
            grey,
            encoder=compact.image_encoder._replace(dtype=dtype),
            mean=compact.mean,
            std=compact.std,
        )
        for dtype in ("float32", "bfloat16")
    )
    a, b = exact.levels[-1], low.levels[-1]
    cosine = (a * b).sum(-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
    assert float(cosine.min()) > 0.99
    assert b.dtype == jnp.float32
    assert checkpoint.load("compact", dtype="bfloat16").image_encoder.dtype == "bfloat16"


# --- bad checkpoints ----------------------------------------------------------------------------


def test_unknown_checkpoint_says_what_to_do():
    with pytest.raises(CheckpointError, match="no such folder; give a folder, a Hub id or 'comp"):
        checkpoint.load("../nowhere/at/all")


def test_hub_failure_is_one_sentence(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match="the Hub did not give it"):
        checkpoint.load("someone/some-clip")


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(hf_weights.EMBEDDED, tmp_path / "copy"))


def test_missing_tokenizer(copy):
    (copy / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        checkpoint.load(str(copy))


def test_missing_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoint.load(str(copy))


@pytest.mark.parametrize("keep", [0, 5, 4000, 1_000_000])
def test_truncated_weights(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(str(copy))


def test_missing_tensor_is_never_random(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["vision_model.post_layernorm.bias"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="post_layernorm.bias.*missing"):
        checkpoint.load(str(copy))


def test_damaged_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: cannot be read"):
        checkpoint.load(str(copy))
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="need 'clip'"):
        checkpoint.load(str(copy))


def test_damaged_msgpack(tmp_path):
    folder, *_ = tiny_checkpoint(tmp_path / "tiny")
    path = folder / "flax_model.msgpack"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or not Flax msgpack"):
        checkpoint.load(str(folder))


def test_impossible_levels():
    with pytest.raises(ConfigError, match="between 1 and 8"):
        checkpoint.load("compact", layers=(3, 99))


@pytest.mark.parametrize("content", ["{", '{"image_mean": 3}', '{"image_std": [1, 1]}', "[]"])
def test_damaged_preprocessing(copy, content):
    (copy / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="preprocessor_config.json: "):
        checkpoint.load(str(copy))
