"""Fusion: weights from evidence, the arithmetic of the mix, and what may change its values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.detectors import detector, ensemble, memory_bank
from medclip_jax.synthesis import probes
from tests.support.ensembles import moved_scores
from tests.support.models import tokens


def evidence(rng, shift, k=400, v=4, p=9) -> ensemble.Evidence:
    """Normal values; those of probes are `shift` standard deviations higher."""
    draw = rng.normal
    return ensemble.Evidence(
        draw(2, 3, (k, p)), draw(5, 2, k), draw(2 + 3 * shift, 3, (k, v, p)),
        draw(5 + 2 * shift, 2, (k, v)),
    )  # fmt: skip


def test_the_weight_is_the_distance_of_two_normals():
    rng = np.random.default_rng(0)
    healthy = rng.normal(3, 2, 4000)
    for distance in (0.5, 1.0, 2.0):
        altered = rng.normal(3 + 2 * distance, 2, 4000)
        assert ensemble.weight(healthy, [altered]) == pytest.approx(distance, abs=0.1)


def test_the_worst_kind_decides_and_a_blind_branch_counts_nothing():
    healthy = np.linspace(0, 1, 100)
    assert ensemble.weight(healthy, [healthy + 5, healthy]) == pytest.approx(0, abs=1e-12)
    assert ensemble.weight(healthy, [healthy - 1]) == 0
    assert ensemble.weight(healthy, [healthy + 5]) == ensemble.FINEST


def test_the_image_weight_is_the_shift_in_standard_deviations():
    healthy = np.array([1.0, 2.0, 3.0])  # standard deviation 1
    moved = healthy[:, None] + np.array([[1.0, 2.0]])
    assert ensemble.image_weight(healthy, [moved]) == pytest.approx(1.5)
    assert ensemble.image_weight(healthy, [moved, healthy[:, None] + 0.5]) == pytest.approx(0.5)
    assert ensemble.image_weight(healthy, [moved, healthy[:, None] - 0.5]) == 0
    assert ensemble.image_weight(healthy, [moved + 100]) == ensemble.FINEST


def test_auroc_counts_ties_half():
    assert ensemble.auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0])) == (0.5 + 1 + 1 + 1) / 4


def test_gains_standardise_and_weigh():
    rng = np.random.default_rng(1)
    found = {"a": evidence(rng, 2.0), "b": evidence(rng, 1.0), "blind": evidence(rng, -0.2)}
    inside = np.ones((400, 4, 9), bool)
    made = ensemble.mix(found, inside, 1)
    np.testing.assert_allclose(made.patch_weight, [2 / 3, 1 / 3, 0], atol=0.03)
    np.testing.assert_allclose(made.image_weight, [2 / 3, 1 / 3, 0], atol=0.06)
    raw = [ensemble.image_weight(e.image, [e.probe_image]) for e in found.values()]
    np.testing.assert_allclose(made.image_weight, np.array(raw) / sum(raw))
    spread = found["a"].image.std(ddof=1), found["a"].patch.std(ddof=1)
    assert made.image_gain[0] == pytest.approx(1 / spread[0])
    of_map = ensemble.weight(found["a"].patch.ravel(), [found["a"].probe_patch])
    assert made.patch_gain[0] == pytest.approx(of_map / spread[1])
    assert made.patch_centre[1] == found["b"].patch.mean()


def test_only_patches_under_a_probe_speak_for_the_map():
    rng = np.random.default_rng(2)
    e = evidence(rng, 0.0)
    inside = np.zeros((400, 4, 9), bool)
    inside[:, :, 4] = True
    e.probe_patch[inside] += 6  # two standard deviations
    made = ensemble.mix({"a": e, "b": evidence(rng, 1.0)}, inside, 1)
    assert made.patch_weight[0] == pytest.approx(2 / 3, abs=0.03)


def test_all_blind_is_all_equal():
    rng = np.random.default_rng(3)
    found = {"a": evidence(rng, -1.0), "b": evidence(rng, -1.0)}
    made = ensemble.mix(found, np.ones((400, 4, 9), bool), 1)
    np.testing.assert_array_equal(made.patch_weight, [0.5, 0.5])


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_a_branch_of_images_alone_has_no_share_in_the_map(shift):
    rng = np.random.default_rng(4)
    found = {"learned": evidence(rng, shift), "zero_shot_image": evidence(rng, shift)}
    for made in (
        ensemble.weighed(found, np.ones((2, 2))),
        ensemble.mix(found, np.ones((400, 4, 9), bool), 1),
    ):
        np.testing.assert_array_equal(made.patch_weight, [1, 0])
        assert made.patch_gain[1] == 0 and (made.image_weight > 0.4).all()


def test_plain_prompts_for_images_leave_the_map_as_it_is(fused):
    made, settings, _, feature_cache, supports = fused
    settings = settings | {"weights": "equal"}
    two = {name: made[name] for name in ("learned", "memory")}
    three = two | {"zero_shot_image": made["zero_shot"]}
    without, _ = ensemble.fuse(two, feature_cache, supports, **settings)
    joined, _ = ensemble.fuse(three, feature_cache, supports, **settings)
    batch = tokens(3)
    np.testing.assert_array_equal(joined.patches(batch), without.patches(batch))
    np.testing.assert_array_equal(joined.held_out, without.held_out)
    zero, held = made["zero_shot"], made["zero_shot"].held_out_image
    z = np.arcsinh((zero.image(batch) - held.mean()) / held.std(ddof=1))
    np.testing.assert_allclose(3 * joined.image(batch) - 2 * without.image(batch), z, atol=1e-4)


def test_a_branch_runs_once_on_a_batch_and_is_never_remembered_inside_a_gradient():
    calls = []

    def square(batch):
        calls.append(batch)
        return batch * batch

    once = memory_bank.once(square)
    one, two = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    assert once(one) is once(one)
    assert len(calls) == 1
    np.testing.assert_array_equal(once(two), [9, 16])
    np.testing.assert_array_equal(jax.grad(lambda x: once(x).sum())(two), [6, 8])
    np.testing.assert_array_equal(once(two), [9, 16])  # still the array, not what was traced
    np.testing.assert_array_equal(once(one), [1, 4])
    assert len(calls) == 4


def test_fused_values_are_the_sum_of_the_branches(fused):
    made, _, (whole, mix), _, _ = fused
    new = tokens(3)
    values = [made[n].patches(new) for n in mix.names]
    wanted = sum(
        g * (v - c) for v, c, g in zip(values, mix.patch_centre, mix.patch_gain, strict=True)
    )
    np.testing.assert_allclose(whole.patches(new), wanted, rtol=1e-5, atol=1e-5)
    held = sum(
        g * (made[n].held_out - c)
        for n, c, g in zip(mix.names, mix.patch_centre, mix.patch_gain, strict=True)
    )
    np.testing.assert_allclose(whole.held_out, held, rtol=1e-5, atol=1e-5)
    assert whole.held_out.shape == (4, 16) and whole.held_out_image.shape == (4,)
    peaks = [made[n].held_out.max(1) for n in mix.names]
    peaks[2] = made["zero_shot"].held_out_image
    wanted = sum(
        w * np.arcsinh((v - v.mean()) / v.std(ddof=1))
        for w, v in zip(mix.image_weight, peaks, strict=True)
    )
    np.testing.assert_allclose(whole.held_out_image, wanted, atol=1e-4)
    shares = mix.shares()
    assert sum(shares["map"].values()) == pytest.approx(1, abs=1e-3)


def test_a_fused_pass_differs_by_the_random_branch_alone(fused):
    made, _, (whole, mix), _, _ = fused
    keys, new = jax.random.split(jax.random.key(3), 5), tokens(2)
    drawn = made["learned"].passes(new, keys)
    moved = mix.patch_gain[0] * (drawn - made["learned"].patches(new)[None])
    np.testing.assert_allclose(whole.passes(new, keys), whole.patches(new)[None] + moved, atol=2e-4)
    scores = moved_scores(mix, drawn, made["learned"].patches(new))
    np.testing.assert_allclose(
        whole.image_passes(new, keys), whole.image(new)[None] + scores, atol=2e-4
    )


def test_a_branch_far_from_its_healthy_values_does_not_drown_the_rest():
    """Two branches that agree beat a third that is forty of its narrow deviations away."""
    rng = np.random.default_rng(6)
    found = {name: evidence(rng, 0.0) for name in ("a", "b", "narrow")}
    made = ensemble.weighed(found, np.ones((3, 2)))

    def score(*deviations):
        values = made.image_centre + np.array(deviations) / made.image_gain
        return sum(float(ensemble.image_part(made, i, v)) for i, v in enumerate(values))

    assert score(0, 0, 0) == 0
    assert score(5, 5, 0) > score(0, 0, 40)  # a plain sum says 10 against 40
    assert score(0.1, 0, 0) == pytest.approx(0.1 / 3, rel=0.01)  # near the healthy: the sum itself


def test_fusing_again_gives_the_same(fused):
    made, settings, (whole, mix), feature_cache, supports = fused
    _, again = ensemble.fuse(made, feature_cache, supports, **settings)
    for a, b in zip(mix, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_evidence_holds_each_support_out(fused):
    made, *_ = fused
    seen = tokens(4)
    for name in ("learned", "memory"):
        each = [made[name].without(i, seen) for i in range(4)]
        assert np.abs(np.asarray(each[0]) - np.asarray(each[1])).max() > 1e-4
    copies = made["learned"]
    np.testing.assert_array_equal(copies.without(0, seen), copies.without(2, seen))  # one fold


# --- probes --------------------------------------------------------------------------------------


def pictures(n=2, size=64):
    rng = np.random.default_rng(5)
    return (0.2 + 0.5 * rng.random((n, size, size))).astype(np.float32)


def test_probes_stay_in_range_and_change_what_they_mark():
    images = pictures()
    made = probes.paint(images, probes.KINDS, 6, 0)
    assert made.images.shape == made.masks.shape == (2, 6, 64, 64)
    assert made.images.min() >= 0 and made.images.max() <= 1
    away = made.images - images[:, None]
    for v in range(6):
        kind, inside = probes.KINDS[v % 3], made.masks[:, v]
        assert 0.002 < inside.mean() < 0.6
        change = away[:, v][inside].mean()
        assert (change < -0.05) if kind == "dark_mass" else (change > 0.02)
        assert np.abs(away[:, v][inside]).mean() > 3 * np.abs(away[:, v][~inside]).mean()


def test_probes_are_a_function_of_seed_and_place():
    images = pictures()
    first = probes.paint(images, ("haze",), 3, 1)
    np.testing.assert_array_equal(first.images, probes.paint(images, ("haze",), 3, 1).images)
    more = probes.paint(images, ("haze",), 5, 1)
    np.testing.assert_array_equal(first.images, more.images[:, :3])
    assert np.abs(first.images - probes.paint(images, ("haze",), 3, 2).images).max() > 0.01


@pytest.mark.parametrize(
    "modality, kinds",
    [
        ("breast ultrasound", ("dark_mass",)),
        ("brain MRI", ("bright_mass", "dark_mass")),
        ("chest X-ray", ("haze",)),
        ("photograph", probes.KINDS),
    ],
)
def test_the_modality_names_its_kinds(modality, kinds):
    assert probes.kinds_of(modality) == kinds


def test_a_black_image_can_be_probed():
    made = probes.paint(np.zeros((1, 32, 32), np.float32), probes.KINDS, 3, 0)
    assert np.isfinite(made.images).all()


def test_equal_weights_are_the_mean_of_standardised_values(fused):
    feature_cache = fused[3]
    rng = np.random.default_rng(4)
    held = {
        "a": rng.normal(2, 3, (6, 9)).astype(np.float32),
        "b": rng.normal(-1, 0.5, (6, 9)).astype(np.float32),
    }
    new = {"a": rng.normal(4, 3, (2, 9)), "b": rng.normal(0, 0.5, (2, 9))}
    branches = {
        name: detector.Detector(lambda batch, n=name: jnp.asarray(new[n]), held[name], None, k=6)
        for name in held
    }
    both, made = ensemble.fuse(
        branches, feature_cache, (), weights="equal", modality="", variants=1, seed=0,
        image_scores=lambda values: values.max(1),
    )  # fmt: skip
    wanted = sum((new[n] - held[n].mean()) / held[n].std(ddof=1) for n in held)
    np.testing.assert_allclose(both.patches(None), wanted, rtol=1e-5)
    peaks = {n: held[n].max(1) for n in held}
    image = [(new[n].max(1) - peaks[n].mean()) / peaks[n].std(ddof=1) for n in held]
    np.testing.assert_allclose(both.image(None), np.arcsinh(image).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(made.image_weight, [0.5, 0.5])
