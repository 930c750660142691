"""`linear` on a CPU: what weights that lie `[in, out]` promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.matmul import fused_linears, linear
from kernels_pallas.weights.transposed import FusedPlaceholder, TransposedWeight
from tests.helpers.models import cpu_only


def operands(rows: int, outputs: int = 200, dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    return jnp.asarray(rng.normal(size=(rows, 256)), dtype), jnp.asarray(rng.normal(size=(outputs, 256)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 9, 64])
def test_a_turned_weight_gives_the_product_of_the_weight(rows: int, dtype: str) -> None:
    x, w = operands(rows, dtype=dtype)
    turned = linear(x.reshape(1, rows, 256), TransposedWeight(w.T), out_dtype=jnp.float32)
    assert turned.shape == (1, rows, 200) and TransposedWeight(w.T).shape == w.shape
    want = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
    np.testing.assert_allclose(turned[0], want, rtol=1e-5, atol=1e-4)


@cpu_only
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outputs", [4, 200, 768])
def test_a_row_has_the_same_bits_among_any_others(outputs: int, dtype: str) -> None:
    """From two rows on, and in bfloat16 alone too: verifying few drafts or many gives the same logits."""
    x, w = operands(16, outputs, dtype)
    product = jax.jit(lambda x: linear(x, TransposedWeight(w.T), out_dtype=jnp.float32))
    whole = np.asarray(product(x))
    for rows in (2, 3, 5, 9) + ((1,) if dtype == "bfloat16" else ()):
        np.testing.assert_array_equal(np.asarray(product(x[:rows])), whole[:rows])


def test_weights_side_by_side_are_one_product() -> None:
    x, w = operands(3)
    parts = (120, 1, 79)
    joined = TransposedWeight(w.T, parts)
    each = fused_linears(x, *(w[start : start + size] for start, size in ((0, 120), (120, 1), (121, 79))))
    one = fused_linears(x, joined, FusedPlaceholder(), FusedPlaceholder())
    assert [a.shape[-1] for a in one] == list(parts)
    for a, b in zip(one, each, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    assert (
        str(jax.make_jaxpr(lambda x: fused_linears(x, joined, FusedPlaceholder(), FusedPlaceholder()))(x)).count(
            "dot_general"
        )
        == 1
    )
