"""Ready for TPU and GPU without one: what runs on a device lowers for them, and stays on it."""

import re
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from medclip_jax import build, config
from medclip_jax.clip import checkpoint
from medclip_jax.clip.layers import Features
from medclip_jax.detectors import detector
from medclip_jax.distributed import sharding
from medclip_jax.features.training_pool import Batch
from medclip_jax.models import model, similarity
from medclip_jax.training import step
from medclip_jax.training.episodes import Episodes
from medclip_jax.training.step import start

HOST = ("callback", "infeed", "outfeed", "device_put", "io_", "debug")
STABLE_HOST = ("xla_python", "xla_ffi_python", "stablehlo.infeed", "stablehlo.outfeed")
WEIGHTS = dict(focal=1.0, dice=1.0, align=0.1, prompt=0.0)
PLATFORMS = ["tpu", "cuda"]


def spec(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype), tree)


def train_step(clip, learner):
    """The training step of one params, two tasks of two rows; with its arguments."""
    c = config.base("k=4,seed=0", name="folder", anatomy="breast", conditions=("mass",))
    c.update_from_flattened_dict({"learner": learner, "prompts.context": 2})
    c = config.resolve(c)
    design, frozen = build.model_parts(c, clip)
    loss, optimizer = partial(model.loss, design=design, weights=WEIGHTS), optax.adam(1e-3)
    inner = step.Learner(c.learner).inner(1)
    objective = loss if learner == "joint" else step.meta_objective(loss, inner)
    lead = (2, 1) if learner == "joint" else (2, 1, 2)
    levels = tuple(np.zeros((*lead, clip.grid**2, clip.widths[0]), np.float32) for _ in range(2))
    batch = Batch(
        Features(np.zeros((*lead, clip.joint), np.float32), levels),
        np.zeros((*lead, clip.size, clip.size), np.float32),
        np.zeros(lead, np.int32),
        np.ones(lead, bool),
    )
    if learner != "joint":
        batch = Episodes(batch, batch, np.ones((2, 1), bool))
    state = start(build.fresh_params(c, clip, design), optimizer, 1, 0)
    return step.make_step(objective, optimizer), spec((state, frozen, batch))


def encoder(clip):
    def run(vision, grey):
        return checkpoint.encode_images(
            vision, grey, encoder=clip.image_encoder, mean=clip.mean, std=clip.std
        )

    return jax.jit(run), spec((clip.vision, np.zeros((2, clip.size, clip.size), np.float32)))


def scorer(clip):
    """Adapted tokens, patch logits, pixel map and image score, as evaluate runs them."""
    step, (state, frozen, _) = train_step(clip, "joint")
    c = config.base("k=4", name="folder", anatomy="breast", conditions=("mass",))
    c.prompts.context = 2
    design, _ = build.model_parts(config.resolve(c), clip)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.params)

    def run(params, frozen, tokens):
        text = model.text_features(params, frozen, design)
        values = model.forward(params, text, tokens, design).logit
        scores = detector.image_score(values, size=clip.size, top=0.05)
        return similarity.to_pixels(values, clip.size), scores

    levels = tuple(np.zeros((2, clip.grid**2, clip.widths[0]), np.float32) for _ in range(2))
    tokens = Features(np.zeros((2, clip.joint), np.float32), levels)
    return jax.jit(run), (params, frozen, spec(tokens))


PARTS = {
    "exact step": partial(train_step, learner="maml"),
    "joint step": partial(train_step, learner="joint"),
    "encoder": encoder,
    "scorer": scorer,
}


def is_program(value) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def primitives(jaxpr) -> set[str]:
    """Names of all primitives, those inside loops and calls too."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(value):
                found |= primitives(getattr(value, "jaxpr", value))
    return found


@pytest.mark.parametrize("part", PARTS)
def test_it_lowers_for_tpu_and_gpu_and_never_leaves_the_device(tiny, part):
    function, given = PARTS[part](tiny)
    exported = export.export(function, platforms=PLATFORMS)(*given)
    assert exported.platforms == tuple(PLATFORMS)
    text = exported.mlir_module()
    assert "stablehlo.dot_general" in text  # it is the real thing
    assert not [name for name in STABLE_HOST if name in text]


def test_the_exact_step_calls_nothing_on_the_host(tiny):
    function, given = train_step(tiny, "maml")
    names = primitives(jax.make_jaxpr(function)(*given).jaxpr)
    assert {"dot_general", "while"} & names and len(names) > 20
    assert not [name for name in names if any(word in name for word in HOST)], names


def test_a_callback_would_be_seen():
    """The two tests above can fail."""

    def talks(x):
        return jax.pure_callback(np.sin, x, x)

    one = jax.ShapeDtypeStruct((), jnp.float32)
    assert any("callback" in n for n in primitives(jax.make_jaxpr(talks)(one).jaxpr))
    text = export.export(jax.jit(talks), platforms=["cpu"])
    with pytest.raises(Exception, match="(?i)serializ|callback|keepalive"):
        text(one).serialize()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_bfloat16_encoder_lowers_and_multiplies_in_bfloat16(tiny, platform):
    clip = tiny._replace(image_encoder=tiny.image_encoder.clone(dtype="bfloat16"))
    function, given = encoder(clip)
    text = export.export(function, platforms=[platform])(*given).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    # all but the projection of one pooled embedding per image, [2, d] x [d, j]
    pooled = [line for line in products if "bf16" not in line]
    assert len(products) > 10 and len(pooled) <= 1
    assert all(re.search(r"-> tensor<2x\d+xf32>", line) for line in pooled), pooled
    assert "f32" in text  # what leaves it, and its norms


def test_one_step_makes_no_implicit_transfer(tiny):
    """Everything is placed before: the step itself moves nothing between host and device."""
    function, given = train_step(tiny, "joint")
    arrays = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), given)
    mesh = sharding.mesh(jax.devices()[:1])
    state, frozen = sharding.replicate(arrays[:2], mesh)
    batch, _ = sharding.spread(arrays[2], mesh)
    with jax.transfer_guard("disallow"):
        after, _ = function(state, frozen, batch)
    assert int(after.step) == 1
