"""The towers against transformers' own and against the peer fixtures."""

import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import CLIPConfig
from transformers.models.clip.modeling_flax_clip import FlaxCLIPModel

from medclip_jax import clip, weights
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.structs import Prompts

from .conftest import reference_files

PARITY = reference_files("mediclip_parity_*/parity*.npz")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def with_tokenizer(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint folder that has (the embedded) tokenizer files too."""
    shutil.copytree(folder, target)
    for name in TOKENIZER:
        shutil.copyfile(weights.EMBEDDED / name, target / name)
    return target


def tiny_checkpoint(target: Path, activation: str = "gelu") -> tuple[Path, FlaxCLIPModel]:
    """A random CLIP of transformers' own making, saved as Flax msgpack, with a tokenizer."""
    tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, hidden_act=activation)
    config = CLIPConfig(
        projection_dim=16,
        vision_config=dict(num_hidden_layers=4, image_size=32, patch_size=8, **tower),
        text_config=dict(
            num_hidden_layers=2, vocab_size=921, bos_token_id=919, eos_token_id=920, **tower
        ),
    )
    model = FlaxCLIPModel(config, seed=1, input_shape=((1, 77), (1, 32, 32, 3)))
    # transformers starts biases at 0; random ones would show a bias in the wrong place
    noisy = jax.tree.map(
        lambda x: x + 0.05 * np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype),
        model.params,
    )
    model.params = noisy
    model.save_pretrained(target)
    for name in TOKENIZER:
        shutil.copyfile(weights.EMBEDDED / name, target / name)
    return target, model


@cache
def parity(path: Path):
    return dict(np.load(path))


def plain_prompts(ids: np.ndarray) -> Prompts:
    """Prompts without context slots."""
    return Prompts(
        ids=np.asarray(ids),
        slots=np.full_like(ids, -1),
        eos=np.asarray(ids.argmax(-1)),
        label=np.zeros(len(ids), np.int64),
        text=("",) * len(ids),
    )


@pytest.mark.parametrize("path", PARITY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_towers_equal_the_peer_fixtures(path, tmp_path):
    ref = parity(path)
    folder = path.parent / f"clip{path.stem.removeprefix('parity')}"
    model = clip.load(
        str(with_tokenizer(folder, tmp_path / "c")), levels=tuple(ref["out_layers"].tolist())
    )
    pixels = jnp.asarray(ref["pixel_values"].transpose(0, 2, 3, 1))
    features = clip.patch_features(model.vision, pixels, model.vision_tower)
    np.testing.assert_allclose(features.pooled, ref["image_embeds"], atol=1e-5)
    for level, tokens in zip(ref["out_layers"], features.levels, strict=True):
        np.testing.assert_allclose(tokens, ref[f"tokens_l{level}"][:, 1:], atol=5e-5)
    for side in ("normal", "abnormal"):
        ids = ref[f"ids_{side}"]
        empty = jnp.zeros((len(ids), 0, model.text_width))
        got = clip.encode_text(model.text, empty, plain_prompts(ids), model.text_tower)
        np.testing.assert_allclose(got, ref[f"text_embeds_ids_{side}"], atol=2e-5)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_tiny_checkpoint_equals_transformers(activation, tmp_path):
    folder, flax_model = tiny_checkpoint(tmp_path / "tiny", activation)
    ours = clip.load(str(folder), levels=(1, 4))
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 3, 32, 32)).astype(np.float32)
    features = clip.patch_features(
        ours.vision, jnp.asarray(pixels.transpose(0, 2, 3, 1)), ours.vision_tower
    )
    np.testing.assert_allclose(
        features.pooled, flax_model.get_image_features(pixels), atol=1e-5, rtol=1e-5
    )
    hidden = flax_model(
        input_ids=np.full((3, 77), 920), pixel_values=pixels, output_hidden_states=True
    ).vision_model_output.hidden_states
    for level, tokens in zip((1, 4), features.levels, strict=True):
        np.testing.assert_allclose(tokens, hidden[level][:, 1:], atol=1e-5, rtol=1e-5)

    ids = np.full((2, 77), 920)
    ids[0, :6] = [919, 5, 6, 7, 8, 920]
    ids[1, :4] = [919, 300, 2, 920]
    prompts = plain_prompts(ids)
    empty = jnp.zeros((2, 0, 32))
    got = clip.encode_text(ours.text, empty, prompts, ours.text_tower)
    np.testing.assert_allclose(got, flax_model.get_text_features(ids), atol=1e-5, rtol=1e-5)


def test_activation_follows_the_config(tmp_path):
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 3)), jnp.float32)
    out = {}
    for name in ("gelu", "quick_gelu"):
        model = clip.load(str(tiny_checkpoint(tmp_path / name, name)[0]))
        out[name] = clip.patch_features(model.vision, pixels, model.vision_tower).pooled
    assert float(jnp.abs(out["gelu"] - out["quick_gelu"]).max()) > 1e-4


def test_truncated_text_equals_all_positions():
    """Causal: nothing after the last end of text can change it."""
    model = clip.load("compact")
    ids = np.full((2, 77), 920)
    ids[:, :5] = [919, 9, 9, 9, 920]
    prompts = plain_prompts(ids)
    late = prompts._replace(eos=np.array([4, 76]))  # the second row forces all 77 positions
    empty = jnp.zeros((2, 0, model.text_width))
    short = clip.encode_text(model.text, empty, prompts, model.text_tower)
    long = clip.encode_text(model.text, empty, late, model.text_tower)
    np.testing.assert_allclose(short[0], long[0], atol=5e-6)
    assert float(jnp.abs(short[1] - long[1]).max()) > 1e-3


def test_context_fills_its_slots():
    """Context equal to a word's embedding is that word."""
    model = clip.load("compact")
    ids = np.full((1, 77), 920)
    ids[0, :5] = [919, 11, 12, 13, 920]
    plain = clip.encode_text(
        model.text, jnp.zeros((1, 0, model.text_width)), plain_prompts(ids), model.text_tower
    )
    hidden = ids.copy()
    hidden[0, [1, 3]] = 0
    slots = np.full_like(ids, -1)
    slots[0, 1], slots[0, 3] = 1, 0
    context = jnp.asarray(model.text["token"])[jnp.array([[13, 11]])]
    filled = clip.encode_text(
        model.text, context, plain_prompts(ids)._replace(ids=hidden, slots=slots), model.text_tower
    )
    np.testing.assert_allclose(filled, plain, atol=1e-6)


def test_bfloat16_tower_stays_near_float32():
    exact, low = clip.load("compact"), clip.load("compact", dtype="bfloat16")
    grey = jnp.asarray(np.random.default_rng(0).random((2, 224, 224)), jnp.float32)
    a = clip.encode_images(
        exact.vision, grey, tower=exact.vision_tower, mean=exact.mean, std=exact.std
    )
    b = clip.encode_images(low.vision, grey, tower=low.vision_tower, mean=low.mean, std=low.std)
    cosine = (a.levels[-1] * b.levels[-1]).sum(-1) / (
        jnp.linalg.norm(a.levels[-1], axis=-1) * jnp.linalg.norm(b.levels[-1], axis=-1)
    )
    assert float(cosine.min()) > 0.99
    assert b.levels[-1].dtype == jnp.float32


# --- bad checkpoints ----------------------------------------------------------------------------


def test_unknown_checkpoint_says_what_to_do():
    with pytest.raises(CheckpointError, match="no such folder; give a folder, a Hub id or 'comp"):
        clip.load("../nowhere/at/all")


def test_hub_failure_is_one_sentence(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match="the Hub did not give it"):
        clip.load("someone/some-clip")


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(weights.EMBEDDED, tmp_path / "copy"))


def test_missing_tokenizer(copy):
    (copy / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        clip.load(str(copy))


def test_missing_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        clip.load(str(copy))


@pytest.mark.parametrize("keep", [0, 5, 4000, 1_000_000])
def test_truncated_weights(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        clip.load(str(copy))


def test_missing_tensor_is_never_random(copy):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["vision_model.post_layernorm.bias"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="post_layernorm.bias.*missing"):
        clip.load(str(copy))


def test_damaged_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: cannot be read"):
        clip.load(str(copy))
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="need 'clip'"):
        clip.load(str(copy))


def test_damaged_msgpack(tmp_path):
    folder, _ = tiny_checkpoint(tmp_path / "tiny")
    path = folder / "flax_model.msgpack"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or not Flax msgpack"):
        clip.load(str(folder))


def test_impossible_levels():
    with pytest.raises(ConfigError, match="between 1 and 8"):
        clip.load("compact", levels=(3, 99))
