"""The `mediclip` preset beside MediCLIP's own code: image scores of the same supports and images.

The reference holds no code: one file per set, draw and CLIP, with the image scores of the released
program (largest pixel) after its 400 steps at K = 16. The CLIP is the first small one, which lies
beside the reference; runs on the checkpoint that version 0.1 embedded need that one from its wheel.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medclip_jax import build, config, train
from medclip_jax.data.catalog import PRESETS
from medclip_jax.features import cache
from medclip_jax.models import model, similarity
from medclip_jax.training import loop
from tests.support.paths import ROOT
from tests.support.reference import reference_files

# Of anomalies and training, per draw. Runs that differ in both have standard deviations of .013 on
# BUSI and .04 on brain MRI, and the peer has one run a draw: see `limit`.
SEEDS = 2
SETS = {"busi": "busi", "brain_mri": "brain"}
LAYERS = (3, 5, 8)  # that the reference tapped


def scores(prepared, encoded, workdir) -> np.ndarray:
    """Largest pixel of the anomaly probability of each test image; no fold is held out."""
    c, design = prepared.config, prepared.design
    params = build.fresh_params(c, prepared.clip, design)
    how = {"workdir": workdir, "mesh": prepared.mesh, **build.training(c, prepared.clip, design)}
    stacked = loop.fit(params, prepared.frozen, encoded.pools, [], **how)
    params = jax.tree.map(lambda x: x[0], stacked)

    @jax.jit
    def score(params, features):
        text = model.text_features(params, prepared.frozen, design)
        logit = model.forward(params, text, features, design).logit
        return jax.nn.sigmoid(similarity.to_pixels(logit, design.size, design.corners)).max((1, 2))

    groups = cache.load_images(encoded.feature_cache, prepared.split.test, 32)
    return np.concatenate([np.asarray(score(params, x)) for x in groups])


def limit(ours: np.ndarray) -> float:
    """Largest difference of the means that is agreement: .02, or two standard errors if larger.

    Args:
      ours: image AUROC [draw, seed]; the peer's single runs are taken to vary as these do.
    """
    draws, seeds = ours.shape
    spread = np.sqrt(ours.var(axis=1, ddof=1).mean())
    return max(0.02, 2 * spread * np.sqrt((1 + 1 / seeds) / draws))


def test_the_limit_follows_from_what_runs_of_a_draw_differ_by():
    steady, noisy = np.full((3, 2), 0.8), np.array([[0.78, 0.84], [0.84, 0.8], [0.8, 0.74]])
    assert limit(steady) == 0.02
    # variances .0018, .0008, .0018: a spread of .0383; the mean's error is that times sqrt(1.5 / 3)
    assert limit(noisy) == pytest.approx(2 * 0.038297 * 0.70711, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_mean_image_auroc_is_the_peers(name, tmp_path):
    data = Path(os.environ.get("MEDCLIP_DATA", ROOT.parent / "shared" / "data"))
    files = [x for x in reference_files("mediclip_runs/*_first_358.npz") if SETS[name] in x.name]
    weights = data.parent / "models" / "compact_clip"
    if len(files) != 3 or not data.is_dir() or not weights.is_dir():
        pytest.skip("no runs of the peer, or no weights, beside the checkout")
    ours: list[list[float]] = []
    peers = []
    for path in files:
        draw = int(path.stem.split("_")[0][-1])
        with np.load(path) as reference:
            ids, labels, peer, support = (
                reference[x] for x in ("ids", "labels", "score_max", "support")
            )
        peers.append(roc_auc_score(labels, peer))
        arguments = f"k=16,seed={draw},method=mediclip,root={data}"
        c = config.base(arguments, name=name, **PRESETS[name])
        c.cache, c.validations = str(tmp_path / "cache"), 0
        c.clip.checkpoint, c.clip.layers = str(weights), LAYERS
        prepared = train.prepare(c)
        assert [r.id for r in prepared.split.support] == support.tolist()
        assert [r.id for r in prepared.split.test] == ids.tolist()
        ours.append([])
        for seed in range(SEEDS):
            prepared.config.seed = 10 + 10 * seed + draw  # of anomalies and training
            found = scores(prepared, train.encode(prepared), tmp_path / f"{draw}-{seed}")
            ours[-1].append(roc_auc_score(labels, found))
    got, most = np.array(ours), limit(np.array(ours))
    found = (
        f"ours {got.round(3).tolist()}, the peer {np.round(peers, 3).tolist()}, limit {most:.3f}"
    )
    print(found)
    assert got.mean() == pytest.approx(np.mean(peers), abs=most), found
