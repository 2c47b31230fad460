"""Runs of the ablations, many in one process, against the runs that a user makes."""

import numpy as np
import pytest
import switched
import trials

from medclip_jax import config, train


def settings(world, seed=0, **fields):
    c = config.base(f"k=4,seed={seed},root={world.data}", name="folder", anatomy="breast")
    plain = {"cache": str(world.base / "cache"), "clip.checkpoint": str(world.clip)}
    plain |= {"synthesis.variants": 2, "calibration.folds": 2, "steps": 6, "score.passes": 1}
    c.update_from_flattened_dict(plain | {"explained": 0, "validations": 0} | fields)
    return c


@pytest.mark.parametrize(
    "fields",
    [
        {"learner": "anil", "meta.tasks": 1, "score.top": 0.0, "synthesis.variants": 40},
        {"score.tiles": 2, "score.suppress.sigma": 1.0, "data.recipe": "clahe"},
    ],
)
def test_a_run_beside_others_equals_a_run_of_its_own(world, tmp_path, fields):
    ground = switched.Ground()
    switched.run(ground, settings(world))  # leaves behind what must not be taken for its own
    found = switched.run(ground, settings(world, **fields))
    alone = train.run(settings(world, **fields), tmp_path / "run")
    for name in ("auroc", "auprc"):
        assert found["image"][name] == pytest.approx(alone["image"][name], abs=1e-6)
    # a run keeps its maps in half precision, cut to [0, 1]
    assert found["pixel"]["auroc"] == pytest.approx(alone["pixel"]["auroc"], abs=0.02)


def test_what_only_scores_is_not_trained_again_and_a_draw_is(world, monkeypatch):
    ground, trained = switched.Ground(), []
    real = trials.trained

    def counted(c, *given):
        trained.append(c.seed)
        return real(c, *given)

    monkeypatch.setattr(trials, "trained", counted)
    first = switched.run(ground, settings(world))
    switched.run(ground, settings(world, **{"score.top": 0.0, "memory.coreset": 0.5}))
    alone = settings(world, **{"fusion.branches": ("learned",)})
    switched.run(ground, alone)
    assert trained == [0]
    switched.run(ground, settings(world, **{"loss.dice": 0.0}))
    switched.run(ground, settings(world, seed=1))
    assert trained == [0, 0, 1] and len(ground.programs) == 2
    again = switched.run(ground, settings(world))
    np.testing.assert_allclose(again["image"]["auroc"], first["image"]["auroc"])


def test_what_would_be_left_out_is_refused(world):
    for fields in ({"method": "memory"}, {"meta.data": ("phantom-mri",)}):
        with pytest.raises(ValueError, match="method ours alone"):
            switched.run(switched.Ground(), settings(world, **fields))
