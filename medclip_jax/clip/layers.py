"""What every image encoder returns and offers, and the blocks of all transformers.

Blocks are flax.linen modules under the names that transformers' CLIP uses. Readers bring the others
to them: LayerScale is folded into the layer before it, a bias that is lacking is 0.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medclip_jax.clip import stacked

ACTIVATIONS: dict[str, Any] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
LARGEST_GRID = 512  # patches per side: 4096 pixels, 8 of them a patch
GATED = "gated_"  # before an activation: of the first half of fc1, times the second half
# The gradient of a block computes attention and activation anew: keeping less is faster.
SAVED = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def product(equation: str, a: Any, b: Any) -> Float[Array, "*_"]:
    """einsum of two arrays (of NumPy or JAX) in the format of `a`, summed in float32, then rounded.

    Asked for a bfloat16 result, XLA on a CPU widens both factors to float32 and gains nothing;
    asked for a float32 one, it multiplies in bfloat16, at about twice the rate.
    """
    c = jnp.einsum(equation, a, b.astype(a.dtype), preferred_element_type=jnp.float32)
    return c.astype(a.dtype)


def _dot_general(a, b, dimensions, precision=None, **_):
    """lax.dot_general for nn.Dense, with sums as in `product`."""
    given = dict(precision=precision, preferred_element_type=jnp.float32)
    return jax.lax.dot_general(a, b, dimensions, **given).astype(a.dtype)


Dense = partial(nn.Dense, dot_general=_dot_general)


def attend(
    q: Float[Array, "n t h d"], k: Float[Array, "n s h d"], v: Float[Array, "n s h d"], mask
) -> Float[Array, "n t h d"]:
    """Scaled dot-product attention, softmax in float32; mask True where a query may look.

    Heads are moved beside the rows first: left to einsum, XLA on a CPU lays every product out anew,
    which makes the attention of a ViT-B/16 in float32 half as slow again.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    weight = jnp.einsum("nhtd,nhsd->nhts", q, k, preferred_element_type=jnp.float32)
    weight = weight * q.shape[-1] ** -0.5
    if mask is not None:
        weight = jnp.where(mask, weight, jnp.finfo(jnp.float32).min)
    mixed = product("nhts,nhsd->nhtd", jax.nn.softmax(weight).astype(q.dtype), v)
    return mixed.transpose(0, 2, 1, 3)


class LayerNorm(nn.Module):
    """In float32 whatever the encoder computes in."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale, bias = (
            self.param(name, start, x.shape[-1:]).reshape((1,) * (x.ndim - 1) + (-1,))
            for name, start in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros))
        )
        y = jax.nn.standardize(x.astype(jnp.float32), epsilon=self.eps)
        return (y * scale + bias).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention."""

    heads: int
    dtype: str
    rope: tuple = ()  # base and number of tokens before the patches; (): none

    @nn.compact
    def __call__(self, x: Float[Array, "n s d"], mask=None, position=None):
        n, s, d = x.shape

        def dense(name, y):
            return Dense(d, dtype=self.dtype, name=name)(y)

        queries = x if position is None else x[jnp.arange(n), position][:, None]
        if position is not None and mask is not None:
            mask = mask[0, 0][position][:, None, None]
        q, k, v = dense("q_proj", queries), dense("k_proj", x), dense("v_proj", x)
        q, k, v = (y.reshape(n, -1, self.heads, d // self.heads) for y in (q, k, v))
        if self.rope:
            q, k = (rotate(y, *self.rope) for y in (q, k))
        return dense("out_proj", attend(q, k, v, mask).reshape(n, -1, d))


def rotate(x: Float[Array, "n s h d"], base: float, prefix: int) -> Float[Array, "n s h d"]:
    """Queries or keys of a square grid's patches turned by their place (RoPE as in DINOv3).

    Simeoni et al. 2025. The `prefix` tokens before them stay.
    """
    side, d = round((x.shape[1] - prefix) ** 0.5), x.shape[-1]
    if side > LARGEST_GRID:
        raise ValueError(f"{side} patches per side where at most {LARGEST_GRID} are read")
    centres = 2 * (np.arange(side) + 0.5) / side - 1
    place = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1).reshape(-1, 2, 1)
    angle = 2 * np.pi * place * base ** -np.arange(0, 1, 4 / d)
    angle = np.tile(angle.reshape(1, -1, 1, d // 2), 2)
    patches = x[:, prefix:]
    half = jnp.concatenate([-patches[..., d // 2 :], patches[..., : d // 2]], -1)
    turned = patches * jnp.asarray(np.cos(angle), x.dtype) + half * jnp.asarray(
        np.sin(angle), x.dtype
    )
    return jnp.concatenate([x[:, :prefix], turned], 1)


class Mlp(nn.Module):
    hidden: int  # of fc1
    activation: str  # of ACTIVATIONS, with GATED before it or not
    dtype: str

    @nn.compact
    def __call__(self, x):
        y = Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
        activate = ACTIVATIONS[self.activation.removeprefix(GATED)]
        if self.activation.startswith(GATED):
            gate, y = jnp.split(y, 2, -1)
            y = activate(gate) * y
        else:
            y = activate(y)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(y)


class Block(nn.Module):
    """One block, of tokens x [n, s, d].

    mask [1, 1, s, s] is True where a query may look; None: everywhere. With `position` [n] only
    that token of each row is computed: [n, 1, d].
    """

    heads: int
    hidden: int
    activation: str
    eps: float
    dtype: str = "float32"
    rope: tuple = ()  # see Attention
    post: bool = False  # norms come after the sums, as in BERT

    def setup(self):
        self.layer_norm1, self.layer_norm2 = LayerNorm(self.eps), LayerNorm(self.eps)
        self.self_attn = Attention(self.heads, self.dtype, self.rope)
        self.mlp = Mlp(self.hidden, self.activation, self.dtype)

    def __call__(self, x, mask=None, position=None):
        if self.post:
            x = self.layer_norm1(x + self.self_attn(x, mask))
            return self.layer_norm2(x + self.mlp(x))
        y = self.layer_norm1(x)
        x = x if position is None else x[jnp.arange(x.shape[0]), position][:, None]
        x = x + self.self_attn(y, mask, position)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The blocks of an encoder, under `layers`: "0", "1", ...; of int8 stacked (stacked.py)."""

    depth: int
    width: int
    heads: int
    hidden: int
    activation: str
    eps: float
    dtype: str = "float32"
    rope: tuple = ()
    post: bool = False

    def setup(self):
        kinds = self.heads, self.hidden, self.activation, self.eps, self.dtype
        self.one = Block(*kinds, self.rope, self.post, parent=None)
        if self.is_initializing():
            self.layers = self.param("layers", self._fresh)
        else:  # of either layout
            self.layers = self.get_variable("params", "layers")

    def _fresh(self, key):
        keys = jax.random.split(key, self.depth)
        before = self.rope[1] if self.rope else 0
        x = jnp.zeros((1, before + 1, self.width), self.dtype)
        return {str(i): self.one.init(k, x)["params"] for i, k in enumerate(keys)}

    def params_of(self, number):
        """Parameters of block `number`, from 1; of stacked blocks it may be traced."""
        if "0" in self.layers:
            return self.layers[str(number - 1)]
        return stacked.decompress(jax.tree.map(lambda x: x[number - 1], self.layers))

    def run(self, x, start: int, stop: int):
        """Blocks start + 1 to stop.

        By a loop: a scan copies the parameters of every block, a third of the time of one image.
        Stacked ones by a scan: of a loop, XLA widens the kernels of all blocks at once.
        """

        def step(y, number):
            return self.one.apply({"params": self.params_of(number)}, y), None

        if "0" not in self.layers:
            return jax.lax.scan(step, x, jnp.arange(start + 1, stop + 1))[0]
        for number in range(start + 1, stop + 1):
            x, _ = step(x, number)
        return x

    def lean(self, x, mask, position):
        """All blocks by a loop that keeps little for its gradient, which beats scan's.

        Of the last block, the tokens at `position` [n] alone: [n, 1, d]; None: all of them.
        """
        block = jax.checkpoint(lambda p, y: self.one.apply({"params": p}, y, mask), policy=SAVED)
        for number in range(1, self.depth):
            x = block(self.params_of(number), x)
        last = {"params": self.params_of(self.depth)}
        return self.one.apply(last, x, mask, position=position)


class Features(NamedTuple):
    """Tokens of n images, as every image encoder returns them."""

    pooled: Float[Array, "n d"]  # joint space, not normalised
    levels: tuple[Float[Array, "n p _"], ...]  # patch tokens of each tapped level, no class token
    # what each tapped block reads, class token first; only where refinement is on
    inputs: tuple[Float[Array, "n s d"], ...] = ()


def widened(features: Features) -> Features:
    """On the host, what was kept as float16 as float32, in which everything is computed."""
    return Features(
        *(
            jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float16 else x, part)
            for part in features
        )
    )


def joined(each: Sequence[Features]) -> Features:
    """The rows of several, `widened`, on the host: of one array after another."""

    def rows(*x: Any) -> np.ndarray:
        return np.concatenate(x, dtype=np.float32 if x[0].dtype == np.float16 else x[0].dtype)

    return jax.tree.map(rows, *each)


def narrowed(features: Features, dtype: str) -> Features:
    """As they are stored. A few tokens of a large CLIP are huge: float16 takes its largest."""
    most = float(np.finfo(np.float16).max)

    def cast(x: Any) -> Any:
        return (x.clip(-most, most) if dtype == "float16" else x).astype(dtype)

    return jax.tree.map(cast, features)


@runtime_checkable
class ImageEncoder(Protocol):
    """A hashable flax.linen module: `encoder.apply({"params": vision}, pixels) -> Features`.

    `method="project"` maps patch tokens of the last level into the joint space. A ViT also has the
    fields `heads` and `eps`, which refinement needs.
    """

    levels: tuple[int, ...]  # tapped blocks or stages, counted from 1
    dtype: str  # of the computation: float32 | bfloat16; int8: of the weights, see stacked.py
    implementation: ClassVar[str]  # config.clip.implementation

    @property
    def inputs(self) -> bool:
        """Whether features hold what the tapped blocks read."""

    @property
    def depth(self) -> int:
        """Number of blocks or stages."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...

    def prepare(self, params: Any) -> Any:
        """A checkpoint's parameters -> the encoder's own, laid out as `apply` reads them."""

    def restore(self, vision: Any) -> Any:
        """The image part of a checkpoint's parameters; undoes `prepare`."""
