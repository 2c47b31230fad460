"""Loss terms against closed forms and the peers' fixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.models import losses, similarity
from tests.support.reference import reference_params

FILES = reference_params("losses_*.npz")


def rel(a, b) -> float:
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


@pytest.mark.parametrize("path", FILES)
def test_segmentation_terms_equal_the_peer(path):
    ref = np.load(path)
    logits = jnp.asarray(ref["seg_logits"])
    mask = jnp.asarray(ref["seg_mask"], jnp.float32)
    valid = jnp.ones(len(mask), bool)

    def both(two_channels):  # softmax of two is the sigmoid of their difference
        logit = two_channels[:, 1] - two_channels[:, 0]
        return losses.focal(logit, mask, valid), losses.dice(logit, mask, valid)

    focal, dice = both(logits)
    assert rel(focal, ref["mediclip_focal"]) < 2e-6
    assert rel(dice, ref["mediclip_dice"]) < 2e-6
    assert rel(dice, ref["dice_per_sample_smooth1"]) < 2e-6
    grad = jax.grad(lambda x: sum(both(x)))(logits)
    assert rel(grad, ref["mediclip_focal_plus_dice_grad_logits"]) < 1e-5
    three = losses.focal(logits[:, 1] - logits[:, 0], mask, valid, gamma=3.0)
    assert rel(three, ref["mediclip_focal_gamma3"]) < 2e-6


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_infonce_equals_brute_force(path, tau):
    ref = np.load(path)
    v, t = jnp.asarray(ref["align_v"]), jnp.asarray(ref["align_t"])
    positives = jnp.asarray(ref["align_positives"])

    def value(v, t):
        return losses.infonce(similarity.cosine(v, t) / tau, positives)

    prefix = f"align_tau{tau}_in"
    assert rel(value(v, t).mean(), ref[f"{prefix}_loss"]) < 2e-6
    grads = jax.grad(lambda v, t: value(v, t).mean(), argnums=(0, 1))(v, t)
    assert rel(grads[0], ref[f"{prefix}_grad_v"]) < 1e-5
    assert rel(grads[1], ref[f"{prefix}_grad_t"]) < 1e-5


def test_peer_check_values():
    """MediCLIP's released losses give focal .0480447, dice .2173913."""
    p = np.array([0.8, 0.2, 0.5, 0.1], np.float32)
    logit = jnp.asarray(np.log(p / (1 - p)).reshape(1, 2, 2))
    mask = jnp.asarray([[[1.0, 0.0], [1.0, 0.0]]])
    valid = jnp.array([True])
    assert abs(float(losses.focal(logit, mask, valid)) - 0.0480447) < 2e-6
    assert abs(float(losses.dice(logit, mask, valid)) - 0.2173913) < 1e-6


def test_align_by_hand():
    """Two patches, three prompts: a healthy patch picks prompt 1, an anomalous one prompt 2."""
    similarity = jnp.array([[[0.1, 0.4, 0.3], [0.9, 0.2, 0.5]]])
    label = jnp.array([0, 0, 1])
    share = jnp.array([[0.0, 0.9]])
    scale = jnp.asarray(2.0)
    got = losses.align(similarity, share, label, jnp.array([True]), scale)
    z = 2 * np.asarray(similarity)[0]
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, -(log_p[0, 1] + log_p[1, 2]) / 2, rtol=1e-6)
    # a patch that is neither is left out
    alone = losses.align(similarity, jnp.array([[0.0, 0.3]]), label, jnp.array([True]), scale)
    np.testing.assert_allclose(alone, -log_p[0, 1], rtol=1e-6)


def test_prompt_loss_counts_healthy_images_only():
    logits = jnp.array([[0.0, 0.0], [5.0, -5.0], [1.0, 3.0]])
    got = losses.prompt(logits, jnp.array([0, 1, 0]), jnp.array([True, True, True]))
    np.testing.assert_allclose(got, (np.log(2) + np.log(1 + np.exp(2.0))) / 2, rtol=1e-6)


def test_patch_share_is_the_mean_of_each_tile():
    mask = jnp.zeros((1, 6, 6)).at[0, :3, 3:].set(1.0).at[0, 3, 0].set(1.0)
    np.testing.assert_allclose(losses.patch_share(mask, 2), [[0, 1, 1 / 9, 0]], rtol=1e-6)


def test_total_is_the_weighted_sum():
    parts = {"focal": jnp.asarray(2.0), "align": jnp.asarray(3.0)}
    loss, named = losses.total(parts, {"focal": 1.0, "align": 0.5, "dice": 9.0})
    assert float(loss) == 3.5 and set(named) == {"loss", "focal", "align"}
