"""The learned modules: context of the prompts, visual adapters, SimCLR's head, token refinement.

TextAdapter has a module of its own. Parameters start from given keys, not from those that Flax
derives from names, so that their first values do not depend on nesting.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medclip_jax.clip import layers

CHUNK = 16  # images whose tokens are refined at a time, fewer where they have more than
ATTENTION = 2**21  # attention weights in all


class PromptLearner(nn.Module):
    """Context vectors of the prompts (equation 4), N(0, 0.02^2) at first."""

    rows: int  # one per prompt, or 1: all share it
    vectors: int  # per prompt
    width: int  # of the text encoder
    context_init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, prompts: int) -> Float[Array, "c k d"]:
        """The context of so many prompts."""
        context = self.param("context", self.context_init, (self.rows, self.vectors, self.width))
        return jnp.broadcast_to(context, (prompts, *context.shape[1:]))


class VisualAdapter(nn.Module):
    """Patch tokens of one level in the joint space; inverted dropout in training.

    Dropout leaves out columns, the same of all patches of an image: each image sees one thinned
    adapter.
    """

    features: int  # width of the joint space
    rate: float = 0.0  # of dropout
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "n p d"], key: jax.Array | None = None
    ) -> Float[Array, "n p j"]:
        """Adapted tokens; without a key nothing is dropped."""
        kernel = self.param("kernel", self.kernel_init, (tokens.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        y = tokens.astype(jnp.float32) @ kernel + bias[None, None]
        if key is None or self.rate == 0:
            return y
        mask = dropout_mask(key, self.rate, (y.shape[0], 1, y.shape[2]))
        return jnp.where(mask, y / (1 - self.rate), 0.0)


class ProjectionHead(nn.Module):
    """Adapted patch tokens of each level -> one vector per image, half as wide, not normalised.

    Chen et al. 2020. An image is the mean over patches and levels, so that what is learned reaches
    the adapters; the head is dropped when scoring.
    """

    hidden_init: Callable = nn.initializers.lecun_normal()
    out_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, levels: Sequence[Float[Array, "n p j"]]) -> Float[Array, "n m"]:
        x: Any = sum(level.mean(1) for level in levels) / len(levels)
        width = x.shape[-1]
        hidden = nn.Dense(width, kernel_init=self.hidden_init, name="hidden")(x)
        narrow = max(width // 2, 1)
        return nn.Dense(narrow, kernel_init=self.out_init, name="out")(jax.nn.relu(hidden))


class DeviationHead(nn.Module):
    """Weighs deviations from the supports (detectors/deviation.py); fresh, it weighs all alike."""

    levels: int  # whose directions stand side by side
    top: float  # share of an image's patches that its score is the mean of

    @nn.compact
    def __call__(
        self, patch: Float[Array, "n p f"], image: Float[Array, " n"]
    ) -> tuple[Float[Array, "n p"], Float[Array, " n"]]:
        """Anomaly logits of the patches and of the images."""
        count, zeros = patch.shape[-1], nn.initializers.zeros
        direction = self.param("direction", zeros, (count,))
        scale = self.param("scale", nn.initializers.constant(-1.0), ())
        whole = self.param("image", zeros, ())
        offset = self.param("offset", nn.initializers.constant(-1.0), ())
        # a direction is one of many, so that its step is as large as the others' together
        weight = (1 + (count / self.levels) ** 0.5 * direction) / self.levels
        logit = jnp.exp(scale) * (patch.astype(jnp.float32) @ weight)
        best = jax.lax.top_k(logit, max(1, round(self.top * logit.shape[1])))[0].mean(-1)
        return logit + offset, best + whole * image + offset


def dropout_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> Bool[Array, "*_"]:
    """True where dropout at `rate` leaves a value."""
    return jax.random.bernoulli(key, 1 - rate, shape)


def init_context(
    key: jax.Array,
    rows: int,
    vectors: int,
    tokens: Float[Array, "v d"],
    start: Int[np.ndarray, " k"] | None = None,
) -> dict[str, jax.Array]:
    """Fresh parameters of a PromptLearner.

    tokens: the text encoder's token embeddings, of which vector i starts from number start[i], or
    at random where that is -1.
    """

    def initialise(key, shape, dtype):
        random = nn.initializers.normal(0.02)(key, shape, dtype)
        if start is None or (start < 0).all():
            return random
        embedded = tokens[jnp.maximum(start, 0)][None]
        return jnp.where((jnp.asarray(start) >= 0)[None, :, None], embedded, random)

    learner = PromptLearner(rows, vectors, tokens.shape[1], from_key(key, initialise))
    return learner.init(key, rows)["params"]


def init_adapter(key: jax.Array, width: int, features: int) -> dict[str, jax.Array]:
    """Fresh parameters of a VisualAdapter, U(+-1/sqrt(width)) as MediCLIP's."""
    adapter = VisualAdapter(features, 0.0, *_uniform(key, width))
    return adapter.init(key, jnp.zeros((1, 1, width)))["params"]


def init_head(key: jax.Array, width: int) -> dict:
    """Fresh parameters of a ProjectionHead: kernels as those of the adapters, biases 0."""
    return ProjectionHead(*_uniform(key, width)).init(key, (jnp.zeros((1, 1, width)),))["params"]


def _uniform(key: jax.Array, width: int) -> list[Callable]:
    """Two initialisers U(+-1/sqrt(width)) with keys of their own."""
    bound = width**-0.5

    def initialise(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return [from_key(k, initialise) for k in jax.random.split(key)]


def from_key(key: jax.Array, initialise: Callable) -> Callable:
    """The initialiser with a key of its own, in place of the one Flax derives from the name."""
    return lambda _, shape, dtype=jnp.float32: initialise(key, shape, dtype)


class FrozenBlocks(NamedTuple):
    """The frozen parts of the tapped blocks; the model's design holds them."""

    heads: int
    eps: float
    blocks: tuple[dict[str, Any], ...]  # per level: layer_norm1 and self_attn
    prefix: int  # tokens before the patches


def frozen_blocks(params: Mapping, encoder: Any) -> FrozenBlocks:
    """What stays of the tapped blocks; params: Clip.params, encoder: a ViT."""
    layers_of = params["vision_model"]["encoder"]["layers"]
    parts = "layer_norm1", "self_attn"
    blocks = tuple({x: layers_of[str(l - 1)][x] for x in parts} for l in encoder.levels)
    return FrozenBlocks(encoder.heads, encoder.eps, blocks, encoder.prefix)


class TokenRefiner(nn.Module):
    """Refines the patch tokens of one level (equation 6): a learned query attends to them.

    z + gate Out(Attention(Q y, K y, V y)), where y is what the block's first norm hands to its
    attention, K, V and Out are the block's frozen projections, and Q and the gate are learned. Q
    starts as the block's V: each token then queries with its value, not with CLIP's query, which
    attends to far tokens. The gate starts at 0: a fresh refinement is exactly the identity. It has
    a learning rate of its own (training.loop.GATE_RATE), or it would hardly open.
    """

    heads: int
    eps: float
    prefix: int = 1  # tokens before the patches

    @nn.compact
    def __call__(
        self, block: Mapping, tokens: Float[Array, "n p d"], inputs: Float[Array, "n s d"]
    ) -> Float[Array, "n p d"]:
        """Refined `tokens`, which come after the frozen `block`; `inputs` are what it reads."""
        attention = block["self_attn"]
        value = attention["v_proj"]
        query = {name: self.param(name, lambda _, n=name: value[n]) for name in ("kernel", "bias")}
        gate = self.param("gate", lambda _: jnp.zeros(()))
        n, s, d = inputs.shape
        norm = {"params": block["layer_norm1"]}
        y: Any = layers.LayerNorm(self.eps, parent=None).apply(norm, inputs.astype(jnp.float32))
        parts = query, attention["k_proj"], value
        q, k, v = (_dense(y, p).reshape(n, s, self.heads, d // self.heads) for p in parts)
        mixed = layers.attend(q, k, v, None).reshape(n, s, d)
        refined = _dense(mixed, attention["out_proj"])[:, self.prefix :]
        return tokens.astype(jnp.float32) + gate * refined


def _dense(x: Float[Array, "n s d"], p: Mapping) -> Float[Array, "n s e"]:
    return x @ p["kernel"] + p["bias"][None, None]


def init_refiners(key: jax.Array, frozen_parts: FrozenBlocks) -> tuple[dict, ...]:
    """Fresh parameters of a TokenRefiner per level: {kernel, bias, gate}."""
    refiner = TokenRefiner(frozen_parts.heads, frozen_parts.eps, frozen_parts.prefix)

    def fresh(block: Mapping) -> dict:
        width = block["layer_norm1"]["scale"].shape[0]
        return refiner.init(key, block, jnp.zeros((1, 1, width)), jnp.zeros((1, 2, width)))[
            "params"
        ]

    return tuple(map(fresh, frozen_parts.blocks))


def refine(
    params: tuple[Mapping, ...],
    frozen_parts: FrozenBlocks,
    levels: tuple[Float[Array, "n p d"], ...],
    inputs: tuple[Float[Array, "n s d"], ...],
) -> tuple[Float[Array, "n p d"], ...]:
    """Refined patch tokens of every tapped level; ValueError if `inputs` are missing.

    Of many images, or large ones, a few at a time, and going back their attention is computed
    anew, so that memory does not grow with it.
    """
    refiner: Any = TokenRefiner(frozen_parts.heads, frozen_parts.eps, frozen_parts.prefix)
    weights = [frozen_parts.heads * x.shape[1] ** 2 for x in inputs]  # of one image
    chunk = max(1, min(CHUNK, ATTENTION // max(weights, default=1)))

    def one(own: Mapping, block: Mapping, tokens: Any, x: Any) -> Any:
        n = len(tokens)
        if not isinstance(n, int) or n <= chunk:  # an exported program has any number of images
            return refiner.apply({"params": own}, block, tokens, x)

        @jax.checkpoint
        def of_image(row):
            return refiner.apply({"params": own}, block, row[0][None], row[1][None])[0]

        return jax.lax.map(of_image, (tokens, x), batch_size=chunk)

    each = zip(params, frozen_parts.blocks, levels, inputs, strict=True)
    return tuple(one(*level) for level in each)
