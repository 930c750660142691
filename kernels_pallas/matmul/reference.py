"""The product of rows with a weight in plain JAX: the "xla" implementation, and the oracle of the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from kernels_pallas.platform import platform
from kernels_pallas.weights import TransposedWeight, Weight, dense_matrix
from kernels_pallas.weights.transposed import FIXED_ORDER_OUTPUTS, padded_outputs

# The most inputs that YNNPACK adds up in one order, whatever the number of rows.
MAX_INPUTS_PER_SUM = 512


def linear(x: Float[Array, "*rows F"], w: Weight, out_dtype: DTypeLike) -> Float[Array, "*rows O"]:
    """Return `y[..., o] = sum_f x[..., f] * w[o, f]`, accumulated in float32 and rounded once to `out_dtype`.

    The weight is rounded to the dtype of `x` first; a packed one is dequantised whole.
    """
    array, input_axis = dense_matrix(w, x.dtype)
    # float32 rows ask for float32 products: a GPU would otherwise round the operands to TF32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    lead = x.shape[:-1]
    single_row = x.dtype == jnp.bfloat16 and math.prod(lead) == 1 and platform() == "cpu"
    if single_row:
        # For a single bfloat16 row XLA's CPU backend first converts the whole weight to float32, twenty times the cost
        # of the product; for two rows it multiplies bfloat16 as it is.
        x = jnp.concatenate([x.reshape(1, -1), jnp.zeros((1, x.shape[-1]), x.dtype)])
    if input_axis == 0:
        y = dot_in_fixed_order(x, array, precision)[..., : w.shape[-2]]
    else:
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        y = lax.dot_general(x, array, contract, precision=precision, preferred_element_type=jnp.float32)
    if single_row:
        y = y[:1].reshape(*lead, y.shape[-1])
    return y.astype(out_dtype)


def dot_in_fixed_order(
    x: Float[Array, "*rows F"], w: Float[Array, "F O"], precision: lax.Precision | None = None
) -> Float[Array, "*rows O"]:
    """Return `x @ w` in float32, summed in an order that does not depend on the number of rows.

    `kernels_pallas.weights.transposed` states the conditions. XLA's CPU backend hands products to YNNPACK, which
    chooses a kernel by the numbers of rows and outputs and by the processor. Outputs beyond the last whole vector go to
    kernels with or without fused multiply-add, and products of fewer than 64 outputs to kernels that sum every second,
    fourth or eighth input apart; columns of zeros rule both out. A sum over many inputs is cut where the kernel's cache
    ends; here it is cut beforehand, and the pieces are added in order. A single row is another product in XLA and has
    an order of its own.
    """
    inputs, outputs = w.shape
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    if math.prod(x.shape[:-1]) == 1:
        return lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)
    w = jnp.pad(w, ((0, 0), (0, padded_outputs(outputs) - outputs)))
    pieces = num_pieces(inputs, outputs)
    if pieces == 1:
        y = lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)
        return y[..., :outputs]
    x = x.reshape(*x.shape[:-1], pieces, inputs // pieces)
    w = w.reshape(pieces, inputs // pieces, -1)
    contract_pieces = (((x.ndim - 1,), (1,)), ((x.ndim - 2,), (0,)))
    y = lax.dot_general(x, w, contract_pieces, precision=precision, preferred_element_type=jnp.float32)
    return reduce(jnp.add, list(y))[..., :outputs]


def num_pieces(inputs: int, outputs: int) -> int:
    """Return the pieces into which `dot_in_fixed_order` cuts a sum over so many inputs."""
    piece = min(MAX_INPUTS_PER_SUM, inputs & -inputs)  # a power of two: the blocks of outputs have one size, too
    is_one_sum = inputs <= MAX_INPUTS_PER_SUM and padded_outputs(outputs) == FIXED_ORDER_OUTPUTS
    return 1 if piece < 128 or is_one_sum else inputs // piece


def fused_linears(
    x: Float[Array, "*rows F"], weights: Sequence[Weight], out_dtypes: Sequence[DTypeLike]
) -> list[Float[Array, "*rows O"]]:
    """Return `linear` of the rows with each weight. Weights that lie side by side in the first one are one product."""
    first = weights[0]
    if not (isinstance(first, TransposedWeight) and first.output_sizes):
        return [linear(x, w, dtype) for w, dtype in zip(weights, out_dtypes, strict=True)]
    count = len(first.output_sizes)
    joined = jnp.split(linear(x, first, jnp.float32), np.cumsum(first.output_sizes)[:-1].tolist(), axis=-1)
    results = [y.astype(dtype) for y, dtype in zip(joined, out_dtypes[:count], strict=True)]
    return results + (fused_linears(x, weights[count:], out_dtypes[count:]) if weights[count:] else [])
