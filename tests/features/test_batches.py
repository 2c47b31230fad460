"""Rows of the joint learner: folds, schedule, members, views, and the batch that they become."""

from functools import partial

import numpy as np
import pytest

from medclip_jax.features import training_pool
from medclip_jax.features.training_pool import Views, joint_rows
from medclip_jax.training import episodes


def schedule(own, size, steps, seed=0, variants=5):
    rows = [joint_rows(i, np.asarray(own), size, seed, variants) for i in range(steps)]
    support, variant = (np.concatenate(x) for x in zip(*rows, strict=True))
    return support, variant


@pytest.mark.parametrize("k, size", [(1, 1), (4, 4), (10, 4), (5, 8)])
def test_every_support_comes_once_per_epoch(k, size):
    own = 100 + np.arange(k)
    support, _ = schedule(own, size, steps=k * 6)
    epochs = support.reshape(-1, k)
    assert len(epochs) == 6 * size
    assert (np.sort(epochs, axis=1) == own).all()
    if k >= 4:
        assert len({tuple(e) for e in epochs}) > 1  # in another order


def test_rows_are_a_function_of_the_position_alone():
    support, variant = schedule(range(10), 4, steps=9)
    again = joint_rows(7, np.arange(10), 4, 0, 5)
    assert np.array_equal(again[0], support[28:32]) and np.array_equal(again[1], variant[28:32])
    halves = schedule(range(10), 2, steps=18)
    assert np.array_equal(halves[0], support) and np.array_equal(halves[1], variant)
    assert not np.array_equal(schedule(range(10), 4, steps=9, seed=1)[0], support)


def test_a_quarter_is_identity_and_variants_take_turns():
    support, variant = schedule(range(16), 8, steps=2 * 400, variants=7)
    epoch = np.arange(len(variant)) // 16
    assert (variant < 0).mean() == pytest.approx(0.25, abs=0.02)  # 6400 draws: sd 0.0054
    used = variant >= 0
    assert (variant[used] == epoch[used] % 7).all()
    share = [(variant[support == s] < 0).mean() for s in range(16)]
    assert max(share) < 0.35 and min(share) > 0.15  # 400 draws each: sd 0.022


def test_without_variants_all_rows_are_identity():
    assert (schedule(range(4), 4, steps=5, variants=0)[1] == -1).all()


@pytest.mark.parametrize(
    "k, parts, sizes", [(8, 4, [2] * 4), (5, 4, [2, 1, 1, 1]), (3, 4, [1] * 3)]
)
def test_folds_partition_the_supports(k, parts, sizes):
    folds = training_pool.folds(k, parts)
    assert [len(f) for f in folds] == sizes
    assert sorted(np.concatenate(folds)) == list(range(k))


def test_one_support_or_one_part_has_no_folds():
    assert [training_pool.folds(*x) for x in ((1, 4), (8, 0), (8, 1))] == [[], [], []]


def test_images_of_auxiliary_datasets_follow_the_supports():
    folds = [np.array([0, 2]), np.array([1])]
    both = training_pool.members(3, folds, (4, 2))
    assert [[x.tolist() for x in sets] for sets in both] == [
        [[0, 1, 2], [3, 4, 5, 6], [7, 8]],
        [[1], [3, 4, 5, 6], [7, 8]],
        [[0, 2], [3, 4, 5, 6], [7, 8]],
    ]
    without = training_pool.members(3, folds, (4, 2), on_target=False)
    assert [[x.tolist() for x in sets] for sets in without] == [[[3, 4, 5, 6], [7, 8]]] * 3


# --- batches ----------------------------------------------------------------------------------


def tensor(name: str, image: int):
    """Row v of the variants (or the image itself): numbers that tell where they are from."""
    level = np.zeros((8, 4, 3), np.float32) + image + np.arange(8)[:, None, None] / 10
    mask = np.zeros((8, 8), np.uint8) + 255
    return {"pooled": level[:, 0], "level0": level, "mask": mask}[name]


@pytest.fixture
def numbered():
    rows = tuple(partial(tensor, image=i) for i in range(4))
    return training_pool.TrainingPool(rows, rows, 1, 8, 8, np.zeros((len(rows), 8), int))


def test_a_batch_holds_the_rows_of_every_params(numbered):
    members = [np.arange(4), np.array([1, 2, 3])]
    batch = training_pool.joint_batch(3, numbered, members, 2, seed=0)
    assert batch.features.levels[0].shape == (2, 2, 4, 3)  # row, 1 + folds, patch, width
    assert batch.mask.shape == (2, 2, 8, 8) and batch.label.shape == (2, 2)
    for i, own in enumerate(members):
        image, variant = joint_rows(3, own, 2, 0, 8)
        expected = image + np.maximum(variant, 0) / 10
        np.testing.assert_allclose(batch.features.levels[0][:, i, 0, 0], expected, rtol=1e-6)
        assert (batch.label[:, i] == (variant >= 0)).all()
        assert (batch.mask[:, i].mean((1, 2)) == (variant >= 0)).all()


def test_a_share_of_the_rows_is_part_of_the_batch(numbered):
    whole = training_pool.joint_batch(3, numbered, [np.arange(4)], 4, seed=0)
    share = training_pool.joint_batch(3, numbered, [np.arange(4)], 4, 0, np.array([1, 3]))
    np.testing.assert_array_equal(share.features.pooled, whole.features.pooled[[1, 3]])


def test_views_are_two_different_ones_and_a_function_of_the_step():
    one, two = training_pool.sample_views(0, 3, (400,), 3)
    assert set(one) == set(two) == {-1, -2, -3, -4} and (one != two).all()
    again = training_pool.sample_views(0, 3, (400,), 3)
    assert (one == again[0]).all() and (two == again[1]).all()
    assert (one != training_pool.sample_views(0, 4, (400,), 3)[0]).any()


def test_views_beside_episodes_are_of_the_params_own_images(pool):
    pool = pool._replace(variants=pool.variants - 3, copies=3, kinds=pool.kinds[:, :-3])
    sizes, members = episodes.Sizes(tasks=3, k=4, shots=4), [[np.arange(4)], [np.array([0, 2])]]
    plain, viewed = (
        episodes.episodes_batch(2, pool, members, sizes, 0, views=views) for views in (False, True)
    )
    assert plain.views is None and plain.query.views is None and viewed.support.views is None
    image = viewed.views.image
    assert image.shape == (3, 2, 2) and set(image[:, 0].ravel()) == {0, 1, 2, 3}
    assert set(image[:, 1].ravel()) == {0, 2}
    share = episodes.episodes_batch(2, pool, members, sizes, 0, np.array([2]), True)
    np.testing.assert_array_equal(share.views.image, image[2:])
    for view in viewed.views[:2]:
        for i in np.ndindex(image.shape):
            own = [pool.clean[image[i]]("level0")[0], *pool.anomalous[image[i]]("level0")[-3:]]
            assert any(np.array_equal(view.levels[0][i], x) for x in own)


def test_rows_carry_views_of_their_image_only_with_views(pool):
    # the last three variants become augmented copies
    pool = pool._replace(variants=pool.variants - 3, copies=3, kinds=pool.kinds[:, :-3])
    own = np.arange(4)

    plain, viewed = (
        training_pool.joint_batch(2, pool, [own, own[:3]], 4, 0, views=x) for x in (False, True)
    )
    assert plain.views is None and isinstance(viewed.views, Views)
    np.testing.assert_array_equal(plain.features.levels[0], viewed.features.levels[0])
    image = viewed.views.image
    assert image.shape == viewed.valid.shape
    for view in viewed.views[:2]:
        for i in np.ndindex(image.shape):
            own = [pool.clean[image[i]]("level0")[0], *pool.anomalous[image[i]]("level0")[-3:]]
            assert any(np.array_equal(view.levels[0][i], x) for x in own)
