"""Episodes: a function of (seed, step), never the same row on both sides, every kind as often."""

import numpy as np
import pytest

from medclip_jax.errors import ConfigError
from medclip_jax.synthesis import generate
from medclip_jax.training import episodes

SIZES = episodes.Sizes(tasks=4, k=4, shots=4)


def kinds(images: int, variants: int = 30) -> np.ndarray:
    """Kinds of each variant of each image, as the feature cache draws them."""
    return np.random.default_rng(images).integers(3, size=(images, variants))


def pairs(rows, task):
    return set(zip(rows.image[task].tolist(), rows.variant[task].tolist(), strict=True))


def draw(steps, members, known, **sizes):
    return [
        episodes.sample(step, 0, members, known, SIZES._replace(**sizes)) for step in range(steps)
    ]


def test_same_key_same_episode_and_others_differ():
    known, members = kinds(6), [np.arange(4), np.arange(4, 6)]
    one, same = (episodes.sample(3, 7, members, known, SIZES) for _ in range(2))
    for a, b in zip(
        (*one.support, *one.query, *one[2:]), (*same.support, *same.query, *same[2:]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for other in ((4, 7), (3, 8)):
        drawn = episodes.sample(*other, members, known, SIZES)
        assert not np.array_equal(drawn.support.variant, one.support.variant)


def test_a_task_does_not_depend_on_how_many_stand_beside_it():
    members, known = [np.arange(4)], kinds(4)
    few = episodes.sample(3, 7, members, known, SIZES._replace(tasks=2))
    many = episodes.sample(3, 7, members, known, SIZES._replace(tasks=6))
    np.testing.assert_array_equal(few.support.image, many.support.image[:2])
    np.testing.assert_array_equal(few.query.variant, many.query.variant[:2])


@pytest.mark.parametrize("images", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("shots", [2, 4, 64])
def test_rows_are_of_the_kind_and_sides_are_disjoint(images, shots):
    known, members = kinds(images + 2), [np.arange(2, images + 2)]
    for tasks in draw(20, members, known, shots=shots):
        assert tasks.support.image.shape == tasks.query.image.shape == (4, shots)
        for i, kind in enumerate(tasks.kind):
            support, asked = pairs(tasks.support, i), pairs(tasks.query, i)
            assert not support & asked
            for image, variant in support | asked:
                assert image in members[0]
                assert variant == -1 or known[image, variant] == kind
            clean = (tasks.support.variant[i] == -1).sum()
            assert clean == (shots if kind == episodes.IDENTITY else -(-shots // 2))
            if kind == episodes.IDENTITY:
                assert (tasks.query.variant[i] == -1).all() and images > 1
            else:
                assert (tasks.query.variant[i] >= 0).any()
            if images > SIZES.k:
                used = {image for image, _ in support}
                assert len(used) <= SIZES.k and not used & {image for image, _ in asked}


def test_four_shots_show_all_four_images():
    altered = [
        set(t.support.image[i].tolist())
        for t in draw(30, [np.arange(4)], kinds(4))
        for i in range(4)
        if t.kind[i] != episodes.IDENTITY
    ]
    assert altered and all(shown == {0, 1, 2, 3} for shown in altered)


def test_kinds_and_data_sets_are_drawn_evenly():
    members = [np.arange(4), np.arange(4, 10), np.arange(10, 13)]
    drawn = draw(400, members, kinds(13), shots=2)
    n = 1600
    for values, count in (("kind", 4), ("source", 3)):
        seen = np.bincount(np.concatenate([getattr(t, values) for t in drawn]), minlength=count)
        p = 1 / count
        assert np.abs(seen - n * p).max() < 4 * np.sqrt(n * p * (1 - p))
    for tasks in drawn[:50]:
        for i, source in enumerate(tasks.source):
            assert np.isin(tasks.support.image[i], members[source]).all()
            assert np.isin(tasks.query.image[i], members[source]).all()


def test_over_many_steps_every_variant_is_used():
    known = kinds(2, 12)
    seen = set()
    for tasks in draw(200, [np.arange(2)], known):
        for i in range(4):
            seen |= pairs(tasks.support, i) | pairs(tasks.query, i)
    assert seen == {(i, v) for i in range(2) for v in range(-1, 12)}


def test_adaptation_is_every_image_clean_and_with_each_kind():
    known, own = kinds(5), np.array([1, 4])
    rows = episodes.adaptation(own, known)
    assert rows.image.shape == (1, 8)
    shown = [
        (image, "identity" if v < 0 else generate.KINDS[known[image, v]])
        for image, v in zip(rows.image[0], rows.variant[0], strict=True)
    ]
    assert sorted(shown) == sorted((i, kind) for i in own for kind in generate.KINDS[:4])


def test_too_few_variants_are_refused():
    known, alone = kinds(3), [np.array([1])]
    episodes.check(known, alone)
    known[1][known[1] == 2] = 0
    known[1, 0] = 2
    episodes.check(known, [np.arange(3)])  # the other images have enough of that kind
    with pytest.raises(ConfigError, match="have 0 of a kind"):  # of masses, which none has
        episodes.check(known, [np.arange(3)], "masses")
    with pytest.raises(
        ConfigError, match=r"variants is 30: 1 image\(s\) that learn together have 1"
    ):
        episodes.check(known, [np.arange(3), *alone])


def test_an_image_that_lacks_a_kind_takes_part_with_the_others():
    known = kinds(3)
    known[1][known[1] == 2] = 0
    rows = episodes.adaptation(np.arange(3), known)
    assert rows.image.shape == (1, 11)
    pairs_shown = zip(rows.image[0], rows.variant[0], strict=True)
    shown = [(i, known[i, v]) for i, v in pairs_shown if v >= 0]
    assert sorted(shown) == sorted((i, k) for i in range(3) for k in range(3) if (i, k) != (1, 2))
    for tasks in draw(50, [np.arange(3)], known):
        for i in np.flatnonzero(tasks.kind == 2):
            for side in (tasks.support, tasks.query):
                assert (side.variant[i] >= 0).any() and (side.variant[i] < 0).any()
