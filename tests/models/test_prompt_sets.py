"""Several data sets in one run: each with its own prompts, preprocessing and augmentation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip.layers import Features
from medclip_jax.features import training_pool
from medclip_jax.features.training_pool import Batch
from medclip_jax.models import model, similarity
from medclip_jax.prompts import tokenize
from medclip_jax.training import episodes, step

WEIGHTS = dict(focal=1.0, dice=1.0, align=0.5, prompt=0.5)


def words_of(clip, conditions, anatomy="breast", modality="ultrasound"):
    return tokenize.build(
        clip.tokenizer,
        clip.eos_id,
        phrases="templates",
        words=tokenize.Words((anatomy,), conditions, (modality,)),
        context=4,
        position="end",
    )


TARGET = ("mass",)
MORE = ("nodule", "opacity", "fluid")


def setting(clip, conditions, target=TARGET, form="softmax", shared=False, causal=True):
    """Design of a target beside a set with other conditions, params, frozen and a batch."""
    sets = [words_of(clip, target), words_of(clip, conditions, "lung")]
    static = clip.text_encoder, clip.size, clip.grid, form, causal, True, 0.0
    design = model.Design(sets[0], *static, sets=similarity.stack_prompts(sets))
    params = model.init(jax.random.key(0), clip, design, 4, shared)
    rng = np.random.default_rng(0)
    tokens = tuple(
        jnp.asarray(rng.normal(size=(4, clip.grid**2, clip.widths[0])), jnp.float32)
        for _ in range(2)
    )
    pooled = jnp.asarray(rng.normal(size=(4, clip.joint)), jnp.float32)
    mask = jnp.zeros((4, clip.size, clip.size)).at[2:, 6:20, 10:24].set(1.0)
    batch = Batch(Features(pooled, tokens), mask, jnp.array([0, 0, 1, 1]), jnp.array([True] * 4))
    frozen = {"text": clip.text, "logit_scale": jnp.asarray(clip.logit_scale)}
    return sets, design, params, frozen, batch


def gradient(design, params, frozen, batch, source):
    source = None if source is None else jnp.asarray(source)
    loss = partial(model.loss, design=design, weights=WEIGHTS)
    run = jax.jit(jax.grad(lambda t, b: loss(t, frozen, b, None), has_aux=True))
    return run(params, batch._replace(source=source))


def close(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(np.abs(y).max()) + 1e-12)


def test_sets_are_laid_out_alike(tiny):
    sets, design, *_ = setting(tiny, MORE)
    few, more = sets
    held = design.sets
    assert held.label.tolist() == [0] * 6 + [1] * 8  # the longest of each class
    assert held.real.sum(1).tolist() == [len(few.ids), len(more.ids)] == [8, 14]
    for i, own in enumerate(sets):
        for name in ("ids", "slots", "eos"):
            np.testing.assert_array_equal(
                getattr(held, name)[i][held.real[i]], getattr(own, name), err_msg=name
            )
        np.testing.assert_array_equal(held.label[held.real[i]], own.label)
    # healthy prompts take the target's healthy context, abnormal ones its abnormal context
    assert held.row[0][held.real[0]].tolist() == list(range(8))
    assert held.row[1].tolist() == [0, 1, 2, 3, 0, 1, *(4, 5, 6, 7, 4, 5, 6, 7)]


@pytest.mark.parametrize(("form", "causal"), [("softmax", True), ("distance", False)])
def test_what_fills_the_shape_is_neutral_for_the_target(tiny, form, causal):
    """Loss and every gradient are those of the target alone, though its prompts are filled up."""
    _, design, params, frozen, batch = setting(tiny, MORE, form=form, causal=causal)
    alone = gradient(design._replace(sets=None), params, frozen, batch, None)
    assert (~design.sets.real[0]).sum() == 6
    close(gradient(design, params, frozen, batch, 0 if causal else [0] * 4), alone)


def test_the_other_set_is_compared_with_its_own_prompts(tiny):
    """As a run of that set alone would be, on the same shared context; here it is filled up."""
    sets, design, params, frozen, batch = setting(tiny, TARGET, MORE, "distance", shared=True)
    assert (~design.sets.real[1]).any()
    alone = gradient(design._replace(prompts=sets[1], sets=None), params, frozen, batch, None)
    close(gradient(design, params, frozen, batch, 1), alone)


def test_rows_of_one_batch_may_be_of_different_sets(tiny):
    """The mean over rows of a mixed batch is that of its rows alone, each with its own prompts."""
    _, design, params, frozen, batch = setting(tiny, MORE)
    loss = jax.jit(
        lambda valid, source: model.loss(
            params,
            frozen,
            batch._replace(valid=valid, source=source),
            None,
            design=design,
            weights=WEIGHTS,
        )[1]
    )
    own = jnp.array([0, 1, 1, 0])
    mixed = loss(batch.valid, own)
    each = [loss(jnp.arange(4) == row, own[row]) for row in range(4)]
    for name in ("focal", "dice", "align"):
        mean = np.mean([float(parts[name]) for parts in each])
        np.testing.assert_allclose(mixed[name], mean, rtol=1e-5)
    wrong = loss(jnp.arange(4) == 1, jnp.array(0))
    assert abs(float(each[1]["focal"] - wrong["focal"])) > 1e-6


def pool_of(batch: Batch, sizes) -> training_pool.TrainingPool:
    """Pools in memory whose images are all rows of the batch, joined as those of several sets."""

    def one(count):
        level = {f"level{i}": np.asarray(x) for i, x in enumerate(batch.features.levels)}
        bits = np.packbits(np.asarray(batch.mask).reshape(4, -1) > 0.5, axis=1)[[2, 3] * 6]
        held = {"pooled": np.asarray(batch.features.pooled), **level}
        altered = {name: x[[2, 3] * 6] for name, x in held.items()} | {"mask": bits}
        rows = (held.__getitem__,) * count, (altered.__getitem__,) * count
        kinds = np.tile(np.arange(12) % 3, (count, 1))
        return training_pool.TrainingPool(*rows, len(level), batch.mask.shape[1], 12, kinds)

    return training_pool.join([one(n) for n in sizes])


def episode_losses(design, params, frozen, tasks):
    """The query loss of every task after its inner step, task by task."""
    loss = partial(model.loss, design=design, weights=WEIGHTS)
    objective = step.meta_objective(loss, step.Learner("maml").inner(1))

    def one(task):
        only = jnp.arange(len(tasks.valid)) == task
        batch = jax.tree.map(lambda x: x[:, 0], tasks)._replace(valid=only)
        return objective(params, frozen, batch, jax.random.key(0))[0]

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(len(tasks.valid))))


def test_swapping_the_words_of_one_set_changes_its_episodes_alone(tiny):
    sets, design, params, frozen, batch = setting(tiny, MORE)
    pool = pool_of(batch, (2, 3))
    assert pool.source.tolist() == [0, 0, 1, 1, 1]
    members = training_pool.members(2, [], (3,))
    tasks = episodes.episodes_batch(0, pool, members, episodes.Sizes(tasks=6, k=2, shots=2), 0)
    source = tasks.support.source[:, 0]
    assert tasks.support.source.shape == (6, 1) and set(source.tolist()) == {0, 1}
    np.testing.assert_array_equal(tasks.query.source, tasks.support.source)

    before = episode_losses(design, params, frozen, tasks)
    # as many prompts and as long, so that nothing but the words differs
    other = words_of(tiny, MORE[::-1], "brain")
    swapped = design._replace(sets=similarity.stack_prompts([sets[0], other]))
    after = episode_losses(swapped, params, frozen, tasks)
    np.testing.assert_array_equal(after[source == 0], before[source == 0])
    assert np.abs(after - before)[source == 1].min() > 1e-6


def test_one_data_set_carries_no_source(tiny):
    *_, batch = setting(tiny, MORE)
    pool = pool_of(batch, (2,))
    assert pool.source is None
    drawn = training_pool.joint_batch(0, pool, [np.arange(2)], 2, 0)
    assert drawn.source is None and len(jax.tree.leaves(drawn)) == 6
    joined = pool_of(batch, (2, 3))
    assert training_pool.joint_batch(0, joined, [np.arange(5)], 5, 0).source.shape == (5, 1)
