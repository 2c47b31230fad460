"""EfficientNet-Lite0 as the memory's encoder: PyTorch's tokens, and who reads which."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import build, build_detector, config
from medclip_jax.clip import checkpoint, lite0
from medclip_jax.data.augmentation import Synthesis
from medclip_jax.distributed import sharding
from medclip_jax.errors import ConfigError
from medclip_jax.features import cache, encoder
from medclip_jax.models import model
from tests.support.drawn import waves
from tests.support.paths import REFERENCE

FOLDER = REFERENCE / "lite0"
OWN = 3  # levels of the embedded CLIP


@pytest.fixture(scope="module")
def compact() -> checkpoint.Clip:
    return checkpoint.load("compact")


def encoded(clip, grey):
    how = dict(encoder=clip.image_encoder, mean=clip.mean, std=clip.std)
    return checkpoint.encode_images(clip.vision, jnp.asarray(grey), **how)


def test_tokens_are_pytorchs_and_the_clips_stay_as_they_were(compact):
    both, own = (
        encoded(lite0.with_memory_encoder(compact), waves()[None]),
        encoded(compact, waves()[None]),
    )
    with np.load(FOLDER / "tokens.npz") as reference:
        for got, want in zip(both.levels[OWN:], reference.values(), strict=True):
            # the weights that ship are of 16 bit
            np.testing.assert_allclose(got[0], want, atol=5e-3 * np.abs(want).max())
            assert np.corrcoef(np.ravel(got), want.ravel())[0, 1] > 0.99999
    for got, want in zip((both.pooled, *both.levels), (own.pooled, *own.levels), strict=False):
        np.testing.assert_allclose(got, want, atol=1e-5)  # another program, the same arithmetic


@pytest.mark.parametrize("side, kernel, stride", [(8, 3, 1), (9, 3, 2), (8, 5, 2), (7, 5, 1)])
def test_filtering_is_a_grouped_convolution(side, kernel, stride):
    rng = np.random.default_rng(side)
    x = rng.normal(size=(2, side, side + 1, 6)).astype(np.float32)
    weights = rng.normal(size=(kernel, kernel, 6)).astype(np.float32)
    got = lite0.filtered(jnp.asarray(x), jnp.asarray(weights), stride)
    dimensions = ("NHWC", "HWIO", "NHWC")
    how = dict(padding="SAME", dimension_numbers=dimensions, feature_group_count=6)
    want = jax.lax.conv_general_dilated(x, weights[:, :, None], (stride,) * 2, **how)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_clip_of_another_grid_gets_as_many_tokens(tiny):
    pair = lite0.with_memory_encoder(tiny)
    grey = np.random.default_rng(0).random((2, tiny.size, tiny.size), np.float32)
    found = encoded(pair, grey)
    assert [x.shape for x in found.levels[len(tiny.widths) :]] == [
        (2, tiny.grid**2, 40),
        (2, tiny.grid**2, 112),
    ]
    assert pair.first_memory_level == len(tiny.widths) and tiny.first_memory_level == 0
    assert pair.digest != tiny.digest and pair.own_digest == tiny.digest
    back = lite0.without_memory_encoder(pair)
    assert back.image_encoder == tiny.image_encoder and back.digest == tiny.digest
    restored = pair.image_encoder.restore(pair.vision)
    again = pair.image_encoder.prepare(restored)
    jax.tree.map(np.testing.assert_array_equal, again, pair.vision)
    assert hash(pair.image_encoder) == hash(
        lite0.with_memory_encoder(tiny).image_encoder
    )  # one compilation


def test_it_is_exported_for_any_number_of_images(tiny):
    pair = lite0.with_memory_encoder(tiny)
    shape = (jax.export.symbolic_shape("n")[0], tiny.size, tiny.size)
    code = jax.export.export(jax.jit(partial(encoded, pair)))(jax.ShapeDtypeStruct(shape, "f4"))
    grey = np.random.default_rng(0).random((3, tiny.size, tiny.size), np.float32)
    for got, want in zip(code.call(grey).levels, encoded(pair, grey).levels, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_variants_are_encoded_without_it(tmp_path, tiny, pictures):
    mesh = sharding.mesh()
    pair = cache.open(tmp_path, lite0.with_memory_encoder(tiny), "stretch", "float32", mesh)
    alone = cache.open(tmp_path, tiny, "stretch", "float32", mesh)
    recipe = Synthesis("medclip", 2, 0, "self")
    assert encoder.encode_variants(pair, pictures[:1], recipe) == 2
    assert encoder.encode_variants(alone, pictures[:1], recipe) == 0  # the same file
    encoder.encode_images(pair, pictures[:1])
    levels = [len(cache.load(p).levels) for p in sorted(tmp_path.rglob("*.safetensors"))]
    assert sorted(levels) == [len(tiny.widths), len(tiny.widths) + 2]
    assert cache.without_memory_encoder(pair).folder == alone.folder != pair.folder


@pytest.mark.parametrize(
    "fields, chosen",
    [
        ({}, lite0.NAME),
        ({"method": "memory"}, lite0.NAME),
        ({"method": "mediclip"}, ""),
        ({"method": "paper"}, ""),
        ({"method": "zero_shot"}, ""),
        ({"branches": ("learned",)}, ""),
        ({"clip.checkpoint": "elsewhere"}, ""),
        ({"clip.checkpoint": "elsewhere", "memory_encoder": lite0.NAME}, lite0.NAME),
        ({"memory_encoder": ""}, ""),
    ],
)
def test_it_goes_with_the_memory_and_the_embedded_clip(fields, chosen):
    c = config.base("k=4", name="folder")
    c.update_from_flattened_dict(fields)
    assert config.resolve(c).memory_encoder == chosen


def test_a_memory_is_explained_at_a_layer_of_its_own_encoder(compact):
    clip = lite0.with_memory_encoder(compact)
    for method, layers in (("memory", {-2: 3, -1: 4, 0: 3, 1: 4}), ("ours", {-1: 2, 0: 0, 2: 2})):
        c = config.base(f"k=4,method={method}", name="folder")
        for given, layer in layers.items():
            c.explanation.layer = given
            assert build.explanation(c, clip).layer == layer
    c.method, c.explanation.layer = "memory", 2
    with pytest.raises(ConfigError, match="give 0 to 1, one of the 2 layers of the memory's enc"):
        build.explanation(c, clip)


def test_every_branch_reads_its_own_encoder():
    c = config.base("k=4", name="folder")
    c.steps = 1
    c = config.resolve(c)
    clip = build.load_clip(c)
    design, frozen = build.model_parts(c, clip)
    params = build.fresh_params(c, clip, design)
    both = encoded(clip, np.concatenate([waves()[None], waves()[None, ::-1]]))

    def changed(levels: slice):
        moved = [x[::-1] if i in range(10)[levels] else x for i, x in enumerate(both.levels)]
        return both._replace(levels=tuple(moved))

    words = jnp.eye(len(design.prompts.label), clip.joint)
    text = {"text": words, "scale": jnp.float32(1)}
    healthy = tuple(x[0] for x in both.levels[OWN:])
    learned = {"model": params, "text": model.text_features(params, frozen, design)}
    own = {"memory": {"memory": healthy}, "learned": learned, "zero_shot": text}
    for name, parts in own.items():
        apply = build_detector.branch_function(name, clip, design, lambda x: x.mean(1), 0.0)
        before = np.asarray(apply(parts, both, None).patch)
        memory = np.asarray(apply(parts, changed(slice(OWN, None)), None).patch)
        clips = np.asarray(apply(parts, changed(slice(0, OWN)), None).patch)
        reads, other = (memory, clips) if name == "memory" else (clips, memory)
        assert not np.allclose(reads, before) and np.array_equal(other, before), name
