"""Gradients of the score: the peers' Grad-CAM, finite differences, the class-token trap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from medclip_jax.clip import resnet, vit
from medclip_jax.clip.outputs import Features
from medclip_jax.detectors import memory_bank
from medclip_jax.explain import boxes, grad_cam
from medclip_jax.models import anomaly_map, model, similarity
from tests.support.models import design_of, tokens
from tests.support.paths import REFERENCE
from tests.support.reference import reference_params

CAM = reference_params("cam_*.npz")
RESNET = REFERENCE / "clip_resnet"


# --- pytorch-grad-cam -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", CAM)
def test_grad_cam_meets_pytorch_grad_cam(path, peer):
    ref = np.load(path)
    parity, tower = peer(path.parent / f"mediclip_parity_{path.stem[-1]}" / "parity224.npz")
    pixels = jnp.asarray(parity["pixel_values"].transpose(0, 2, 3, 1))

    def cosine(text, features):
        return similarity.cosine(features.pooled, jnp.asarray(text)[None])[:, 0]

    ours = partial(grad_cam.through, tower.vision, pixels, tower.vision_tower, block=6)
    for c, text in enumerate(ref["text_embeds"]):
        a, g = ours(target=partial(cosine, text), norm=True)
        if c == 1:
            channels_last = [ref[n].reshape(3, 64, 196).swapaxes(1, 2) for n in
                             ("activations", "gradients_text1")]  # fmt: skip
            np.testing.assert_allclose(a, channels_last[0], atol=2e-5)
            close(g, channels_last[1], 1e-5)
        for name, cam in (("gradcam", boxes.grad_cam), ("gradcampp", boxes.grad_cam_pp)):
            weights, raw = cam(a, g)
            stem = f"{name}_text{c}"
            close(weights, ref[f"{stem}_weights"], 1e-5)
            close(raw, ref[f"{stem}_raw"].reshape(3, 196), 1e-5)
            small = boxes.unit(raw)
            np.testing.assert_allclose(small, ref[f"{stem}_norm14"].reshape(3, 196), atol=1e-4)
            if f"{stem}_final" in ref:
                final = boxes.unit(boxes.to_square(small, 224))
                np.testing.assert_allclose(final, ref[f"{stem}_final"], atol=1e-4)


@pytest.mark.parametrize("stem, cam", [("gradcam", "grad_cam"), ("gradcampp", "grad_cam_pp")])
def test_cams_of_given_gradients_meet_pytorch_grad_cam(stem, cam):
    """The formulas alone, on two images of cam_0 that every checkout holds."""
    ref = np.load(REFERENCE / "gradcam_0.npz")
    a, g = (ref[n].reshape(2, 64, 196).swapaxes(1, 2) for n in ("activations", "gradients_text1"))
    weights, raw = boxes.CAMS[cam](a, g)
    close(weights, ref[f"{stem}_text1_weights"], 1e-5)
    close(raw, ref[f"{stem}_text1_raw"].reshape(2, 196), 1e-5)
    small = boxes.unit(raw)
    np.testing.assert_allclose(small, ref[f"{stem}_text1_norm14"].reshape(2, 196), atol=1e-4)
    final = boxes.unit(boxes.to_square(small[:1], 224))
    np.testing.assert_allclose(final, ref[f"{stem}_text1_final"], atol=1e-4)


def close(got, wanted, relative):
    assert np.abs(got - wanted).max() <= relative * np.abs(wanted).max()


# --- on a small tower -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tiny):
    rng = np.random.default_rng(0)
    grey = jnp.asarray(rng.random((2, 32, 32)), jnp.float32)
    pixels = vit.normalise(grey, tiny.mean, tiny.std)
    design, frozen = design_of(tiny)
    params = model.init(jax.random.key(3), tiny, design, 2, False)
    text = model.text_features(params, frozen, design)
    patches = jax.jit(lambda f: model.forward(params, text, f, design).logit)
    features = vit.patch_features(tiny.vision, pixels, tiny.vision_tower)
    return pixels, patches, features


def pooled(patches):
    return lambda features: anomaly_map.image_score(patches(features), 0.25)


def test_a_class_token_score_does_not_reach_the_last_patches(tiny, scene):
    pixels, *_ = scene

    def first(features):
        return features.pooled[:, 0]

    with pytest.raises(boxes.NoGradientError, match=r"block 4 is exactly 0.*class-token"):
        grad_cam.through(tiny.vision, pixels, tiny.vision_tower, first, 4)
    for block, norm in ((4, True), (3, False)):
        _, g = grad_cam.through(tiny.vision, pixels, tiny.vision_tower, first, block, norm)
        assert np.abs(g).max() > 0


def test_a_patch_score_reaches_the_last_patches_as_cached_tokens_do(tiny, scene):
    """At the last block the two gradients are one; at block 1 the blocks after it add theirs."""
    pixels, patches, features = scene
    direct = grad_cam.direct(patches, features, 0.25)
    through = partial(grad_cam.through, tiny.vision, pixels, tiny.vision_tower, pooled(patches))
    a, g = through(4)
    np.testing.assert_allclose(a, features.levels[1], atol=1e-5)
    np.testing.assert_allclose(g, direct[1], atol=1e-5)
    a, g = through(1)
    np.testing.assert_allclose(a, features.levels[0], atol=1e-5)
    assert np.abs(g - direct[0]).max() > 1e-3


def test_gradients_equal_finite_differences(scene):
    _, patches, features = scene
    direct = grad_cam.direct(patches, features, 0.25)
    rng = np.random.default_rng(1)
    for level, gradient in enumerate(direct):
        way = rng.normal(size=gradient.shape).astype(np.float32)

        def at(step, level=level, way=way):
            levels = list(features.levels)
            levels[level] = levels[level] + step * way
            return float(pooled(patches)(features._replace(levels=tuple(levels))).sum())

        slope = (at(1e-2) - at(-1e-2)) / 2e-2
        assert slope == pytest.approx(float((gradient * way).sum()), rel=2e-2, abs=1e-3)


def test_through_gradient_equals_finite_differences(tiny, scene):
    """Over a change of the pixels, where every path from block 1 on is taken."""
    pixels, patches, _ = scene
    tower = tiny.vision_tower
    target = pooled(patches)
    a, g = grad_cam.through(tiny.vision, pixels, tower, target, 2)
    way = np.random.default_rng(2).normal(size=a.shape).astype(np.float32)

    def at(step):
        x = vit.embed(tiny.vision, pixels, tower)
        held = {}
        for number in range(1, 5):
            x = vit.run_block(tiny.vision, x, number, tower)
            x = x.at[:, 1:].add(step * way) if number == 2 else x
            held[number] = x[:, 1:]
        return float(target(Features(vit.pool(tiny.vision, x, tower), (held[1], held[4]))).sum())

    assert (at(1e-2) - at(-1e-2)) / 2e-2 == pytest.approx((g * way).sum(), rel=2e-2, abs=1e-3)


def test_levels_on_other_grids_meet_on_the_finest(scene):
    """As a ResNet tower hands them over: 2 x 2 cells of 8 channels and 4 x 4 of 3."""
    rng = np.random.default_rng(4)
    levels = tuple(jnp.asarray(rng.random((3, p, d)), jnp.float32) for p, d in ((4, 8), (16, 3)))

    def patches(f):
        return f.levels[1].sum(-1) + jnp.repeat(f.levels[0].sum(-1), 4, axis=1)

    made = grad_cam.cams(patches, Features(jnp.zeros((3, 1)), levels), top=1.0)
    assert made.shape == (3, 16) and made.min() >= 0 and made.max() <= 1
    coarse, fine = (boxes.unit(np.asarray(x.sum(-1), np.float64)) for x in levels)
    coarse = boxes.unit(boxes.to_square(np.asarray(levels[0].sum(-1)), 4).reshape(3, 16))
    np.testing.assert_allclose(made, (coarse + fine) / 2, atol=1e-5)


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp"])
def test_cams_of_a_resnet_tower(method):
    """Stages 2 and 4 of CLIP's ResNet: 8 x 8 cells of 32 channels, 2 x 2 of 128; by hand."""
    params, tower = resnet.read(load_file(RESNET / "tower.safetensors"))
    tower = resnet.tapped(tower, (2, 4), "float32", False)
    pixels = jnp.asarray(np.load(RESNET / "expected.npz")["pixels"])
    features = jax.jit(resnet.patch_features, static_argnames="tower")(params, pixels, tower=tower)
    fine, coarse = (np.asarray(x, np.float64) for x in features.levels)
    rng = np.random.default_rng(0)
    way = [rng.normal(size=x.shape[-1]) for x in (fine, coarse)]

    def patches(f):
        low = f.levels[1] @ jnp.asarray(way[1], jnp.float32)
        up = jnp.repeat(jnp.repeat(low.reshape(-1, 2, 2), 4, 1), 4, 2).reshape(-1, 64)
        return f.levels[0] @ jnp.asarray(way[0], jnp.float32) + up

    made = grad_cam.cams(patches, features, 1.0, method)
    each = []
    for a, w in ((fine, way[0]), (coarse, way[1])):
        # every cell counts alike in the mean of all patches
        g = np.broadcast_to(w / a.shape[1], a.shape)
        raw = boxes.CAMS[method](a, g)[1]
        each.append(boxes.unit(boxes.to_square(raw, 8).reshape(2, 64) if raw.shape[1] < 64
                                 else raw))  # fmt: skip
    np.testing.assert_allclose(made, np.mean(each, axis=0), atol=2e-3)
    for level, (a, w) in enumerate(zip((fine, coarse), way, strict=True)):
        alone = grad_cam.cams(patches, features, 1.0, method, level)
        g = np.broadcast_to(w / a.shape[1], a.shape)
        np.testing.assert_allclose(alone, boxes.unit(boxes.CAMS[method](a, g)[1]), atol=2e-3)
    assert made.shape == (2, 64) and made.std() > 0.05


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp"])
def test_cams_of_a_memory_find_what_it_has_not_seen(method):
    """One strange patch in tokens that are else the supports' own."""
    held = tokens(3)
    made = memory_bank.remember(held)
    strange = [np.array(x[:1]) for x in held.levels]
    for level in strange:
        level[0, 5] += 3 * np.random.default_rng(7).normal(size=level.shape[-1])
    features = Features(held.pooled[:1], tuple(map(jnp.asarray, strange)))
    cam = grad_cam.cams(made.patches, features, 0.05, method)
    assert cam.shape == (1, 16) and np.isfinite(cam).all() and 0 <= cam.min() <= cam.max() <= 1


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_pp"])
def test_cams_of_one_level_of_a_vit(scene, method):
    """Each tapped block for itself; a score that does not read a block is said to explain none."""
    _, patches, features = scene
    each = [grad_cam.cams(patches, features, 0.25, method, level) for level in (0, 1)]
    both = grad_cam.cams(patches, features, 0.25, method)
    np.testing.assert_allclose(both, np.mean(each, axis=0), atol=1e-6)
    assert np.abs(each[0] - each[1]).max() > 0.1

    def last(f):
        return patches(f._replace(levels=(jax.lax.stop_gradient(f.levels[0]), f.levels[1])))

    assert grad_cam.cams(last, features, 0.25, method, 1).max() > 0.9
    with pytest.raises(boxes.NoGradientError, match="tapped level 0 is exactly 0"):
        grad_cam.cams(last, features, 0.25, method, 0)


def test_randomised_weights_change_the_explanation(tiny, scene):
    pixels, patches, _ = scene
    through = partial(grad_cam.through, pixels=pixels, tower=tiny.vision_tower)
    seen = {}
    for name, blocks in (("trained", []), ("last", [4]), ("all", [1, 2, 3, 4])):
        vision = grad_cam.randomised(tiny.vision, jax.random.key(5), blocks)
        a, g = through(vision, target=pooled(patches), block=3)
        seen[name] = boxes.grad_cam(a, g)[1]
    assert boxes.agreement(seen["trained"], seen["trained"]).min() == pytest.approx(1)
    assert abs(boxes.agreement(seen["trained"], seen["all"]).mean()) < 0.7
    kept = grad_cam.randomised(tiny.vision, jax.random.key(5), [4])["blocks"]["fc1"]["kernel"]
    np.testing.assert_array_equal(kept[:3], tiny.vision["blocks"]["fc1"]["kernel"][:3])
    assert (kept[3] != tiny.vision["blocks"]["fc1"]["kernel"][3]).mean() > 0.99


def test_an_unknown_block_is_refused(tiny, scene):
    pixels, patches, _ = scene
    with pytest.raises(ValueError, match="block 5 is not one of 1 to 4"):
        grad_cam.through(tiny.vision, pixels, tiny.vision_tower, pooled(patches), 5)


def test_stages_of_a_resnet_are_drawn_anew():
    params, _ = resnet.read(load_file(RESNET / "tower.safetensors"))
    params = jax.tree.map(jnp.asarray, params)
    last = grad_cam.depth(params)
    assert last == 4
    drawn = grad_cam.randomised(params, jax.random.key(0), [last])
    for stage, (old, new) in enumerate(zip(params["stages"], drawn["stages"], strict=True), 1):
        pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        changed = {a.ndim: bool((a != b).any()) for a, b in pairs}
        assert changed == {4: stage == last, 1: False}
    old, new = (x["stages"][-1][0]["conv1"]["kernel"] for x in (params, drawn))
    assert float(new.std()) == pytest.approx(float(old.std()), rel=0.1)
