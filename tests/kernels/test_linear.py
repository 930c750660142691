"""`linear` on a CPU: what weights that lie `[in, out]` promise."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.matmul import embedding_lookup, fused_linears, linear
from kernels_pallas.weights.transposed import FusedPlaceholder, TransposedWeight
from tests.helpers.models import cpu_only
from tests.helpers.same_bits import FEW_OUTPUTS, MORE_OUTPUTS, rows_that_differ


def operands(rows: int, outputs: int = 200, dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    return jnp.asarray(rng.normal(size=(rows, 256)), dtype), jnp.asarray(rng.normal(size=(outputs, 256)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 9, 64])
def test_a_transposed_weight_gives_the_product_of_the_weight(rows: int, dtype: str) -> None:
    x, w = operands(rows, dtype=dtype)
    product = linear(x.reshape(1, rows, 256), TransposedWeight(w.T), out_dtype=jnp.float32)
    assert product.shape == (1, rows, 200) and TransposedWeight(w.T).shape == w.shape
    want = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T
    np.testing.assert_allclose(product[0], want, rtol=1e-5, atol=1e-4)


@cpu_only
@pytest.mark.parametrize(
    "inputs, dtype, sizes",
    [
        (256, "float32", FEW_OUTPUTS + MORE_OUTPUTS),
        (256, "bfloat16", FEW_OUTPUTS + MORE_OUTPUTS),
        (1024, "float32", (4, 24, 200)),
    ],
)
def test_a_row_has_the_same_bits_among_any_others(inputs: int, dtype: str, sizes: tuple[int, ...]) -> None:
    """From two rows on, and in bfloat16 alone too: verifying few drafts or many gives the same logits."""
    differ = {outputs: rows_that_differ(outputs, inputs, dtype) for outputs in sizes}
    assert not {outputs: rows for outputs, rows in differ.items() if rows}


@cpu_only
def test_a_row_has_the_same_bits_on_a_processor_with_avx2_alone() -> None:
    """In a process that takes this machine for an older one; the kernels of products are chosen by the processor."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX2"
    child = subprocess.run(
        [sys.executable, "-m", "tests.helpers.same_bits", "AVX2"],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    refused = [line for line in child.stderr.splitlines() if "cannot pretend" in line or "Unknown flag" in line]
    if child.returncode and refused:
        pytest.skip(refused[0])
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == ["XLA_FLAGS", flags]


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


@cpu_only
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_a_window_of_experts_of_any_size(dtype: str) -> None:
    """So a prompt's keys, values and states do not depend on what else is read beside it."""
    rng = np.random.default_rng(3)
    for outputs, inputs in ((512, 1024), (1024, 256), (384, 192), (192, 96)):
        w, x = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((outputs, inputs), (512, inputs)))
        product = jax.jit(linear)
        expected = product(x, w)
        for rows in (16, 32, 48, 64, 96, 128, 192, 320, 448):
            assert jnp.array_equal(product(x[:rows], w), expected[:rows]), (outputs, inputs, rows)


@cpu_only
def test_embedding_rows_are_read_as_bits_and_have_their_gradient() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(640, 32)), jnp.bfloat16)
    ids = jnp.array([[3, 3, 639], [0, 5, 3]])
    take = jax.jit(lambda w: embedding_lookup(w, ids, jnp.bfloat16))
    assert jnp.array_equal(take(w), w[ids])
    assert "f32[640,32]" not in str(
        take.lower(w).compile().as_text()
    )  # that would convert the whole table in every call
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 32)), jnp.bfloat16)
    actual, expected = (
        jax.grad(lambda w, f=f: jnp.sum(f(w) * cotangent).astype(jnp.float32))(w) for f in (take, lambda w: w[ids])
    )
    assert jnp.array_equal(actual, expected) and actual[3].any()
