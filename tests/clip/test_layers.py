"""Products of the towers: what they compute, and in which number format."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medclip_jax.clip.layers import Features, attend, joined, product, widened

CPU = Path("/proc/cpuinfo")
FLAGS = CPU.read_text() if CPU.exists() else ""


def drawn(*shape: int, seed: int = 0, dtype: str = "float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_jax(causal):
    q, k, v = (drawn(2, 5, 3, 4, seed=i) for i in range(3))
    mask = jnp.tril(jnp.ones((5, 5), bool))[None, None] if causal else None
    want = jax.nn.dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(attend(q, k, v, mask), want, atol=1e-6)


def test_attention_of_one_query_of_each_row():
    q, k, v = drawn(2, 1, 3, 4), drawn(2, 5, 3, 4, seed=1), drawn(2, 5, 3, 4, seed=2)
    mask = jnp.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], bool)[:, None, None]
    for i, seen in enumerate((2, 4)):
        want = attend(q[i : i + 1], k[i : i + 1, :seen], v[i : i + 1, :seen], None)
        np.testing.assert_allclose(attend(q, k, v, mask)[i : i + 1], want, atol=1e-6)


def test_a_product_keeps_the_format_of_its_left_side_and_sums_in_float32():
    a, b = drawn(2, 300, dtype="bfloat16"), drawn(300, 4, seed=1)
    built = product("na,ab->nb", a, b)
    assert built.dtype == jnp.bfloat16
    exact = np.asarray(a, np.float64) @ np.asarray(b.astype("bfloat16"), np.float64)
    np.testing.assert_allclose(built.astype("float32"), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.skipif("avx512_bf16" not in FLAGS, reason="a processor without bfloat16 products")
def test_bfloat16_factors_reach_the_processor_as_they_are():
    """The compiled program widens neither factor: the product takes bfloat16, gives float32."""
    a, b = drawn(64, 128, dtype="bfloat16"), drawn(128, 256, dtype="bfloat16")
    text = jax.jit(lambda a, b: product("na,ab->nb", a, b)).lower(a, b).compile().as_text()
    assert "bf16[64,128]" in text and "f32[64,256]" in text
    assert "f32[64,128]" not in text and "f32[128,256]" not in text


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_joined_rows_are_those_of_each_in_the_format_that_is_computed_in(dtype):
    made = (np.asarray(drawn(n, 3, 4, seed=n, dtype=dtype)) for n in (1, 2))
    each = [Features(x[:, 0], (x, 2 * x), ()) for x in made]
    whole = widened(jax.tree.map(lambda *x: np.concatenate(x), *each))
    assert whole.pooled.dtype == (jnp.bfloat16 if dtype == "bfloat16" else np.float32)
    jax.tree.map(np.testing.assert_array_equal, joined(each), whole)
    assert [x.dtype for x in jax.tree.leaves(joined(each))] == [whole.pooled.dtype] * 3
