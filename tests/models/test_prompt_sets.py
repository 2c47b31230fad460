"""Several data sets in one run: each with its own prompts, preprocessing and augmentation."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax import config, train
from medclip_jax.clip.outputs import Features
from medclip_jax.data.catalog import PRESETS, RECIPES
from medclip_jax.data.preprocessing import RECIPES as STEPS
from medclip_jax.data.records import Split
from medclip_jax.errors import ConfigError
from medclip_jax.features import auxiliary, training_pool
from medclip_jax.features.batch import Batch
from medclip_jax.models import model, prompt_sets
from medclip_jax.prompts import tokenize
from medclip_jax.training import step
from tests.support.checkpoints import tiny_checkpoint

WEIGHTS = dict(focal=1.0, dice=1.0, align=0.5, prompt=0.5)


def words_of(tower, conditions, anatomy="breast", modality="ultrasound"):
    return tokenize.build(
        tower.tokenizer,
        tower.eos_id,
        phrases="templates",
        anatomy=anatomy,
        conditions=conditions,
        modality=modality,
        context=4,
        position="end",
    )


TARGET = ("mass",)
MORE = ("nodule", "opacity", "fluid")


def setting(tower, conditions, target=TARGET, form="softmax", shared=False, causal=True):
    """Design of a target beside a set with other conditions, params, frozen and a batch."""
    sets = [words_of(tower, target), words_of(tower, conditions, "lung")]
    static = tower.text_tower, tower.size, tower.grid, form, causal, True, 0.0
    design = model.Design(sets[0], *static, sets=prompt_sets.stack(sets))
    params = model.init(jax.random.key(0), tower, design, 4, shared)
    rng = np.random.default_rng(0)
    tokens = tuple(
        jnp.asarray(rng.normal(size=(4, tower.grid**2, tower.widths[0])), jnp.float32)
        for _ in range(2)
    )
    pooled = jnp.asarray(rng.normal(size=(4, tower.joint)), jnp.float32)
    mask = jnp.zeros((4, tower.size, tower.size)).at[2:, 6:20, 10:24].set(1.0)
    batch = Batch(Features(pooled, tokens), mask, jnp.array([0, 0, 1, 1]), jnp.array([True] * 4))
    frozen = {"text": tower.text, "logit_scale": jnp.asarray(tower.logit_scale)}
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


def episode_losses(design, params, frozen, episodes):
    """The query loss of every task after its inner step, task by task."""
    loss = partial(model.loss, design=design, weights=WEIGHTS)
    objective = step.meta_objective(loss, step.inner("maml", 1, 0.05, False))

    def one(task):
        only = jnp.arange(len(episodes.valid)) == task
        batch = jax.tree.map(lambda x: x[:, 0], episodes)._replace(valid=only)
        return objective(params, frozen, batch, jax.random.key(0))[0]

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(len(episodes.valid))))


def test_swapping_the_words_of_one_set_changes_its_episodes_alone(tiny):
    sets, design, params, frozen, batch = setting(tiny, MORE)
    pool = pool_of(batch, (2, 3))
    assert pool.source.tolist() == [0, 0, 1, 1, 1]
    members = batches.members(2, [], (3,), target=True)
    sizes = dict(tasks=6, k=2, shots=2, query=2)
    episodes = episodes.episodes_batch(0, pool, members, 0, **sizes)
    source = episodes.support.source[:, 0]
    assert episodes.support.source.shape == (6, 1) and set(source.tolist()) == {0, 1}
    np.testing.assert_array_equal(episodes.query.source, episodes.support.source)

    before = episode_losses(design, params, frozen, episodes)
    # as many prompts and as long, so that nothing but the words differs
    other = words_of(tiny, MORE[::-1], "brain")
    swapped = design._replace(sets=prompt_sets.stack([sets[0], other]))
    after = episode_losses(swapped, params, frozen, episodes)
    np.testing.assert_array_equal(after[source == 0], before[source == 0])
    assert np.abs(after - before)[source == 1].min() > 1e-6


def test_one_data_set_carries_no_source(tiny):
    *_, batch = setting(tiny, MORE)
    pool = pool_of(batch, (2,))
    assert pool.source is None
    drawn = batches.joint_batch(0, pool, [np.arange(2)], 2, 0)
    assert drawn.source is None and len(jax.tree.leaves(drawn)) == 6
    joined = pool_of(batch, (2, 3))
    assert batches.joint_batch(0, joined, [np.arange(5)], 5, 0).source.shape == (5, 1)
    assert episodes.adaptation_batch(joined, [np.arange(2)]).source is None


# --- which words, preprocessing and augmentation each data set gets ------------------------------


def settings(*data, **fields):
    c = config.base("k=4", name="phantom-ultrasound", **PRESETS["phantom-ultrasound"])
    c.update_from_flattened_dict({"meta.data": data} | fields)
    return config.resolve(c)


def test_every_preset_has_the_recipe_of_its_modality():
    assert set(RECIPES) == set(PRESETS)
    for name, recipe in RECIPES.items():
        words = PRESETS[name]["modality"].lower().replace("-", "")
        assert recipe in STEPS and recipe in words


def test_each_set_has_its_own_words_and_the_target_is_left_out():
    found = auxiliary.read(settings("phantom-mri", "phantom-ultrasound", "chest_xray=/films"))
    assert [x.name for x in found] == ["phantom-mri", "chest_xray"]
    assert [x.words for x in found] == [PRESETS["phantom-mri"], PRESETS["chest_xray"]]
    assert [str(x.root) for x in found] == ["None", "/films"]
    assert all(x.recipe == () for x in found)


def test_recipes_are_the_targets_or_their_own():
    c = settings("phantom-mri", "phantom-xray", **{"data.recipe": "ultrasound"})
    assert {x.recipe for x in auxiliary.read(c)} == {STEPS["ultrasound"]}
    c.meta.recipe = "own"
    assert [x.recipe for x in auxiliary.read(c)] == [STEPS["mri"], STEPS["xray"]]


def test_a_folder_takes_the_targets_words_and_says_so(caplog):
    (found,) = auxiliary.read(settings("folder=/mine", **{"meta.recipe": "own"}))
    target = PRESETS["phantom-ultrasound"]
    assert found.words == {n: target[n] for n in ("modality", "anatomy", "conditions")}
    assert found.recipe == () and "folder=/mine of config.meta.data has no words" in caplog.text


def test_elastic_deformation_is_refused_set_by_set(caplog):
    c = settings("phantom-mri", "phantom-xray", **{"augment.elastic": 0.02, "augment.flip": 0.5})
    mri, xray = auxiliary.read(c)
    assert (mri.strengths.elastic, mri.strengths.flip) == (0.02, 0.5)
    assert (xray.strengths.elastic, xray.strengths.flip) == (0.0, 0.5)
    assert "config.augment.elastic is off for phantom-xray" in caplog.text
    assert "phantom-mri" not in caplog.text


def test_settings_that_cannot_be_used():
    with pytest.raises(ConfigError, match=r"^config.meta.data has 'knees': give any of busi, "):
        auxiliary.read(settings("knees"))
    with pytest.raises(ConfigError, match=r"^config.meta.recipe is 'mine': give one of target, "):
        settings(**{"meta.recipe": "mine"})


def test_chexpert_takes_its_policy(monkeypatch, tmp_path):
    seen = {}

    def load(name, root, cache, **given):
        seen.update(given, name=name)
        return ()

    monkeypatch.setattr(auxiliary.datasets, "load", load)
    monkeypatch.setattr(auxiliary.datasets, "healthy", lambda *given: ())
    c = settings("chexpert", **{"data.uncertain": "positive", "data.window": "lung"})
    auxiliary.records(auxiliary.read(c)[0], c, Split((), ()))
    assert seen == {"name": "chexpert", "uncertain": "positive", "window": ""}


# --- end to end ----------------------------------------------------------------------------------


def test_two_phantoms_in_one_run(tmp_path, monkeypatch):
    """Each set's images meet its own preprocessing and words; the target's test set is scored."""
    folder, *_ = tiny_checkpoint(tmp_path / "clip")
    monkeypatch.setattr(
        "medclip_jax.data.datasets.PHANTOMS",
        {f"phantom-{m}": (m, 4, 2, 2) for m in ("ultrasound", "mri")},
    )
    opened, built, recipes = training_pool.open, [], []
    monkeypatch.setattr(
        training_pool,
        "open_pool",
        lambda feature_cache, *x: recipes.append(feature_cache.recipe) or opened(feature_cache, *x),
    )
    run = train.loop.run

    def watched(c, workdir, tower, design, *rest):
        built.append(design)
        return run(c, workdir, tower, design, *rest)

    monkeypatch.setattr(train.loop, "run", watched)
    c = config.base("k=2", name="phantom-ultrasound", **PRESETS["phantom-ultrasound"])
    c.update_from_flattened_dict(
        {
            "meta.data": ("phantom-ultrasound", "phantom-mri"),
            "meta.recipe": "own",
            "meta.images": 2,
            "learner": "fomaml",
            "meta.adapt_steps": 0,
            "clip.checkpoint": str(folder),
            "cache": str(tmp_path / "cache"),
            "synthesis.variants": 16,
            "calibration.folds": 2,
            "steps": 1,
            "score.passes": 1,
        }
    )
    result = train.run(c, tmp_path / "run")
    assert 0 <= result["image"]["auroc"] <= 1
    assert recipes == [(), STEPS["mri"]]
    (design,) = built
    assert design.sets.real.sum(1).tolist() == [len(design.prompts.ids)] * 2
    assert not np.array_equal(design.sets.ids[0], design.sets.ids[1])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(x)["loss"]) for x in lines) and lines
