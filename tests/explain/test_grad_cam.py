"""Grad-CAM of the score: pytorch-grad-cam's formulas, finite differences, layers on other grids."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from medclip_jax.clip import checkpoint, layers, resnet
from medclip_jax.clip.layers import Features
from medclip_jax.detectors import memory_bank
from medclip_jax.detectors.detector import Detector, Scores
from medclip_jax.explain import grad_cam
from medclip_jax.io import read
from medclip_jax.models import model, similarity
from tests.support.models import design_of, tokens
from tests.support.paths import REFERENCE
from tests.support.reference import reference_params
from tests.support.scenes import POOL, SIZE

CAM = reference_params("cam_*.npz")
RESNET = REFERENCE / "clip_resnet"
METHODS = pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp"])


# --- pytorch-grad-cam -----------------------------------------------------------------------------


def of_first_norm(clip, pixels, text):
    """Patch activations of the last block's first norm, and the gradient of the cosine to a text.

    The class-token score never depends on the last block's patch outputs, but on this norm.
    """
    vision, encoder = clip.vision, clip.image_encoder
    whole = encoder.clone(levels=(encoder.depth,), inputs=True)
    (x,) = whole.apply({"params": vision}, pixels).inputs
    p = clip.params["vision_model"]["encoder"]["layers"][str(encoder.depth - 1)]
    block = layers.Block(encoder.heads, encoder.hidden, encoder.activation, encoder.eps)
    run = partial(block.apply, {"params": p})
    activations = run(x, method=lambda block, x: block.layer_norm1(x))

    def follow(block, shift):
        y = x + block.self_attn(activations + shift)
        return y + block.mlp(block.layer_norm2(y))

    def score(shift):
        pooled = encoder.apply({"params": vision}, run(shift, method=follow), method="pool")
        return similarity.cosine(pooled, jnp.asarray(text)[None]).sum()

    gradients = jax.grad(score)(jnp.zeros_like(activations))
    return np.asarray(activations[:, 1:]), np.asarray(gradients[:, 1:])


@pytest.mark.parametrize("path", CAM)
def test_grad_cam_meets_pytorch_grad_cam(path, peer):
    ref, seed = np.load(path), path.stem.partition("_")[2]
    parity, clip = peer(path.parent / f"mediclip_parity_{seed}" / "parity224.npz")
    pixels = jnp.asarray(parity["pixel_values"].transpose(0, 2, 3, 1))
    for c, text in enumerate(ref["text_embeds"]):
        a, g = of_first_norm(clip, pixels, text)
        if c == 1:
            channels_last = [ref[n].reshape(3, 64, 196).swapaxes(1, 2) for n in
                             ("activations", "gradients_text1")]  # fmt: skip
            np.testing.assert_allclose(a, channels_last[0], atol=2e-5)
            close(g, channels_last[1], 1e-5)
        for stem, method in (("gradcam", "grad_cam"), ("gradcampp", "grad_cam_pp")):
            meets(ref, f"{stem}_text{c}", method, a, g)


@METHODS
def test_cams_of_given_gradients_meet_pytorch_grad_cam(method):
    """The formulas alone, on two images of cam_0 that every checkout holds."""
    ref = np.load(REFERENCE / "gradcam_0.npz")
    a, g = (ref[n].reshape(2, 64, 196).swapaxes(1, 2) for n in ("activations", "gradients_text1"))
    meets(ref, f"{method.replace('_', '')}_text1", method, a, g)


def meets(ref, stem, method, a, g):
    weights, raw = grad_cam.METHODS[method](a, g)
    close(weights, ref[f"{stem}_weights"], 1e-5)
    close(raw, ref[f"{stem}_raw"].reshape(raw.shape), 1e-5)
    small = grad_cam.unit(raw)
    np.testing.assert_allclose(small, ref[f"{stem}_norm14"].reshape(raw.shape), atol=1e-4)
    if f"{stem}_final" in ref:
        wanted = ref[f"{stem}_final"]
        final = grad_cam.unit(read.to_square(small, 224))[: len(wanted)]
        np.testing.assert_allclose(final, wanted, atol=1e-4)


def close(values, wanted, relative):
    assert np.abs(values - wanted).max() <= relative * np.abs(wanted).max()


# --- of detectors ---------------------------------------------------------------------------------


def detector_of(patches):
    def apply(params, features, key):
        patch = patches(features)
        return Scores(patch, patch.max(1))

    return Detector(apply, {}, None, None, 2, False, 32)


@pytest.fixture(scope="module")
def scene(tiny):
    """A learned detector on a small ViT, and tokens of two images."""
    grey = jnp.asarray(np.random.default_rng(0).random((2, 32, 32)), jnp.float32)
    design, frozen = design_of(tiny)
    params = model.init(jax.random.key(3), tiny, design, 2, False)
    text = model.text_features(params, frozen, design)
    patches = jax.jit(lambda f: model.forward(params, text, f, design).logit)
    pixels = checkpoint.normalise(grey, tiny.mean, tiny.std)
    return patches, tiny.image_encoder.apply({"params": tiny.vision}, pixels)


def test_gradients_equal_finite_differences(scene):
    patches, features = scene
    made = detector_of(patches)
    rng = np.random.default_rng(1)
    for layer in (0, -1):
        gradient = grad_cam.gradients(made, features, layer, 0.25)
        way = rng.normal(size=gradient.shape).astype(np.float32)

        def score(step, layer=layer, way=way):
            levels = list(features.levels)
            levels[layer] = levels[layer] + step * way
            values = np.sort(patches(features._replace(levels=tuple(levels))), axis=1)
            return values[:, -4:].mean(1).sum()  # a quarter of 16 patches

        slope = (score(1e-2) - score(-1e-2)) / 2e-2
        assert slope == pytest.approx(float((gradient * way).sum()), rel=2e-2, abs=1e-3)


@METHODS
def test_each_layer_has_its_own_cam(scene, method):
    patches, features = scene
    cam = partial(grad_cam.cam, features=features, method=method, top=0.25)
    each = [cam(detector_of(patches), layer=layer) for layer in (0, 1)]
    assert np.abs(each[0] - each[1]).max() > 0.1
    np.testing.assert_array_equal(each[1], cam(detector_of(patches)))  # the last is the default

    def last(f):
        return patches(f._replace(levels=(jax.lax.stop_gradient(f.levels[0]), f.levels[1])))

    assert cam(detector_of(last), layer=1).max() > 0.9
    with pytest.raises(grad_cam.NoGradientError, match="layer 0 of the 2 .* config.explanation"):
        cam(detector_of(last), layer=0)
    how = grad_cam.Explanation(layer=0)
    slopes = grad_cam.gradients(detector_of(last), features, how.layer, how.top)
    nothing = grad_cam.weigh_or_zeros(features, slopes, how)
    assert nothing.shape == (2, 16) and not nothing.any()


@METHODS
def test_cams_of_a_resnet_meet_on_the_finest_grid(method):
    """Stages 2 and 4 of CLIP's ResNet: 8 x 8 cells of 32 channels, 2 x 2 of 128; by hand."""
    params, encoder = resnet.read(load_file(RESNET / "tower.safetensors"))
    encoder = resnet.tapped(encoder, (2, 4), "float32", False)
    pixels = jnp.asarray(np.load(RESNET / "expected.npz")["pixels"])
    features = jax.jit(partial(encoder.apply, method="stages"))({"params": params}, pixels)
    levels = [np.asarray(x, np.float64) for x in features.levels]
    rng = np.random.default_rng(0)
    ways = [abs(rng.normal(size=x.shape[-1])) * np.sign(x.mean((0, 1))) for x in levels]

    def patches(f):
        fine, coarse = (
            x @ jnp.asarray(w, jnp.float32) for x, w in zip(f.levels, ways, strict=True)
        )
        up = jnp.repeat(jnp.repeat(coarse.reshape(-1, 2, 2), 4, 1), 4, 2)
        return fine + up.reshape(-1, 64)

    for layer, (a, way) in enumerate(zip(levels, ways, strict=True)):
        # every cell counts the same in the mean of all patches
        raw = grad_cam.METHODS[method](a, np.broadcast_to(way / a.shape[1], a.shape))[1]
        wanted = grad_cam.unit(read.to_square(raw, 8).reshape(2, 64))
        cam = grad_cam.cam(detector_of(patches), features, method=method, layer=layer, top=1.0)
        assert cam.shape == (2, 64) and cam.std() > 0.05
        np.testing.assert_allclose(cam, wanted, atol=2e-3)


@METHODS
def test_cams_of_a_memory_bank_are_finite(method):
    """One strange patch in tokens that are else the supports' own."""
    supports = tokens(3)
    strange = [np.array(x[:1]) for x in supports.levels]
    for level in strange:
        level[0, 5] += 3 * np.random.default_rng(7).normal(size=level.shape[-1])
    features = Features(supports.pooled[:1], tuple(map(jnp.asarray, strange)))
    memory = memory_bank.build(supports, POOL, SIZE, k=3)
    cam = grad_cam.cam(memory, features, method=method)
    assert cam.shape == (1, 16) and np.isfinite(cam).all() and 0 <= cam.min() <= cam.max() <= 1
