"""Ours and transformers' Flax CLIP: one parameter tree, one result, one gradient."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import CLIPConfig
from transformers.models.clip.modeling_flax_clip import FlaxCLIPModel

from medclip_jax.clip import checkpoint
from medclip_jax.clip.text import encode_text
from medclip_jax.errors import ConfigError
from medclip_jax.prompts import tokenize
from medclip_jax.prompts.tokenize import Prompts
from tests.support.checkpoints import PARITY, tiny_checkpoint, with_tokenizer

IMPLEMENTATIONS = "fused", "transformers"
CHECKPOINTS = [pytest.param("compact", id="compact"), *PARITY]


def near(ours, theirs):
    """Within 1e-5 of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("named", CHECKPOINTS)
def test_both_implementations_agree_on_every_checkpoint(named, tmp_path):
    if isinstance(named, Path):
        folder = named.parent / f"clip{named.stem.removeprefix('parity')}"
        named = str(with_tokenizer(folder, tmp_path / "clip"))
    fused, theirs = (
        checkpoint.load(named, inputs=True, implementation=name) for name in IMPLEMENTATIONS
    )
    jax.tree.map(np.testing.assert_array_equal, fused.params, theirs.params)
    assert fused.digest == theirs.digest
    grey = np.random.default_rng(0).random((1, fused.size, fused.size)).astype(np.float32)
    features = (
        checkpoint.encode_images(
            clip.vision, grey, encoder=clip.image_encoder, mean=clip.mean, std=clip.std
        )
        for clip in (fused, theirs)
    )
    jax.tree.map(near, *features)
    prompts = tokenize.build(
        fused.tokenizer,
        fused.eos_id,
        phrases="templates",
        words=tokenize.Words(("breast",), ("mass",), ("ultrasound",)),
        context=4,
        position="middle",
        positions=fused.positions,
    )
    eos = (prompts.ids == fused.tokenizer.eos_token_id).argmax(-1)
    # the fixtures' vocabularies are smaller than the tokenizer's
    prompts = prompts._replace(ids=prompts.ids % fused.text_encoder.vocabulary, eos=eos)
    rng = np.random.default_rng(1)
    context = jnp.asarray(0.02 * rng.normal(size=(len(prompts.ids), 4, fused.text_width)))
    way = jnp.asarray(rng.normal(size=(len(prompts.ids), fused.joint)), jnp.float32)

    def text(clip, context):
        built = encode_text(clip.text, context, prompts, clip.text_encoder)
        return (built * way).sum(), built

    results = [
        jax.jit(jax.value_and_grad(partial(text, clip), has_aux=True))(context.astype(jnp.float32))
        for clip in (fused, theirs)
    ]
    ((_, ours), our_gradient), ((_, wanted), their_gradient) = results
    near(ours, wanted)
    near(our_gradient, their_gradient)


def test_flax_params_go_in_and_come_out_unchanged(tmp_path):
    folder, theirs, params = tiny_checkpoint(tmp_path / "tiny", text_blocks=2)
    clip = checkpoint.load(str(folder), layers=(1, 4))
    jax.tree.map(np.testing.assert_array_equal, clip.params, dict(params))
    # out of a plain FlaxCLIPModel's `params` into the encoder, without a file
    vision = clip.image_encoder.prepare(params)
    jax.tree.map(np.testing.assert_array_equal, vision, clip.vision)
    pixels = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    ours = clip.image_encoder.apply({"params": vision}, jnp.asarray(pixels)).pooled
    out = FlaxCLIPModel(CLIPConfig.from_pretrained(folder), _do_init=False)
    back = partial(out.get_image_features, pixels.transpose(0, 3, 1, 2))
    near(ours, jax.jit(lambda p: back(params=p))(clip.params))


def test_fresh_encoders_have_the_tree_of_transformers(tiny):
    """So what is trained from scratch with ours can be saved as a CLIP."""
    pixels = jnp.zeros((1, 32, 32, 3))
    start = partial(jax.eval_shape, tiny.image_encoder.init, jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, start(pixels)["params"])
    restored = tiny.image_encoder.restore(tiny.vision)
    assert shapes == jax.tree.map(jnp.shape, restored)
    ids = jnp.zeros((1, 5), int)
    inputs = jnp.zeros((1, 0, tiny.text_width)), ids, ids - 1, jnp.zeros(1, int)
    start = partial(jax.eval_shape, tiny.text_encoder.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, start(*inputs)["params"]) == jax.tree.map(jnp.shape, tiny.text)


def test_without_transformers_flax_the_choice_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.clip.modeling_flax_clip", None)
    with pytest.raises(ConfigError, match=r"needs transformers 4\.57.*implementation=fused"):
        checkpoint.load("compact", implementation="transformers")
    assert checkpoint.load("compact").image_encoder.implementation == "fused"


def test_transformers_text_is_causal_only(tiny, tmp_path):
    folder, *_ = tiny_checkpoint(tmp_path / "tiny")
    clip = checkpoint.load(str(folder), implementation="transformers")
    ids = np.zeros((1, 77), np.int64)
    prompts = Prompts(ids, ids - 1, np.array([3]), np.array([0]), ("",))
    with pytest.raises(ConfigError, match="causal"):
        encode_text(clip.text, jnp.zeros((1, 0, 32)), prompts, clip.text_encoder, causal=False)
