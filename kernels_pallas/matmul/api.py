"""`linear` and its kin: the calls by which a model multiplies rows with weights."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kernels_pallas.matmul import reference, triton
from kernels_pallas.matmul.grad import take_rows_as_bits
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import interpret_kernels, platform, resolve_implementation
from kernels_pallas.weights import LayerView, QuantizedTensor, Weight


def linear(
    x: Float[Array, "*rows F"],
    w: Weight,
    *,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*rows O"]:
    """Return `x @ w.T`, accumulated in float32.

    Args:
        x: rows, in the compute dtype.
        w: the weight `[O, F]`, plain or stored in any form; it is read in the dtype of `x`.
        out_dtype: the dtype of the result; None: that of `x`.
        implementation: "xla", "triton", or None: "triton" for a packed weight on a CUDA device, else "xla".

    Raises:
        ValueError: "triton" was asked for, and the kernel does not support the weight.
    """
    return fused_linears(x, w, out_dtypes=[out_dtype], implementation=implementation)[0]


def fused_linears(
    x: Float[Array, "*rows F"],
    *weights: Weight,
    out_dtypes: Sequence[DTypeLike | None] | None = None,
    implementation: str | None = None,
) -> list[Float[Array, "*rows O"]]:
    """Return `linear` of the same rows with each weight, each result in a dtype of its own.

    The kernel multiplies all weights in one launch, plain ones among packed ones included. "xla" makes one product of
    weights that lie side by side in the first one; see `TransposedWeight.output_sizes`.

    Args:
        out_dtypes: the dtype of each result; None: that of `x`.
        implementation: as in `linear`. None: "triton" on a CUDA device if any weight is packed.
    """
    dtypes = _result_dtypes(x, weights, out_dtypes)
    if not _uses_kernel(weights, implementation):
        return reference.fused_linears(x, weights, dtypes)
    products = linears_split_k(x, *weights, out_dtypes=dtypes, implementation="triton")
    return [y.sum(dtype).reshape(*x.shape[:-1], y.parts.shape[-1]) for y, dtype in zip(products, dtypes, strict=True)]


def linears_split_k(
    x: Float[Array, "*rows F"],
    *weights: Weight,
    out_dtypes: Sequence[DTypeLike | None] | None = None,
    implementation: str | None = None,
) -> list[PartialSums]:
    """Return the split-K partial sums `[P, B*T, O]` of `fused_linears`, for a reader that adds them itself.

    The leading axes of `x` are flattened. The partial sums are float32, or, where P = 1, in the dtype of the result.

    Args:
        out_dtypes, implementation: as in `fused_linears`.
    """
    dtypes = _result_dtypes(x, weights, out_dtypes)
    if not _uses_kernel(weights, implementation):
        products = reference.fused_linears(x, weights, dtypes)
        return [PartialSums(y.reshape(1, -1, y.shape[-1])) for y in products]
    if x.size == 0:
        return [PartialSums(jnp.zeros((1, 0, w.shape[-2]), dtype)) for w, dtype in zip(weights, dtypes, strict=True)]
    operands = [(w.stack, w.layer) if isinstance(w, LayerView) else (w, None) for w in weights]
    return triton.matmul_split_k(x.reshape(-1, x.shape[-1]), operands, dtypes, interpret=interpret_kernels())


def _result_dtypes(
    x: Float[Array, "*rows F"], weights: Sequence[Weight], out_dtypes: Sequence[DTypeLike | None] | None
) -> list[DTypeLike]:
    return [dtype or x.dtype for dtype in out_dtypes or [None] * len(weights)]


def _uses_kernel(weights: Sequence[Weight], implementation: str | None) -> bool:
    """Return whether the Triton kernel multiplies rows with these weights.

    It is for packed weights; without any of those, cuBLAS is the best on a GPU, and XLA elsewhere.
    """
    supported = all(map(triton.supports, weights))
    if implementation == "triton" and not supported:
        found = ", ".join(f"{type(w).__name__} {list(w.shape)}" for w in weights)
        raise ValueError(
            "implementation 'triton' multiplies plain weights and packed weights whose last axis is a multiple of 32; "
            f"found {found}"
        )
    any_packed = any(isinstance(w, QuantizedTensor | LayerView) for w in weights)
    return resolve_implementation(implementation, supported=supported and any_packed) == "triton"


def embedding_lookup(
    w: Array | QuantizedTensor, rows: Int[Array, "*rows"], dtype: DTypeLike
) -> Float[Array, "*rows F"]:
    """Return rows of a weight `[O, F]` in `dtype`. Of a packed weight only these rows are dequantised.

    Raises:
        ValueError: the weight is FP8, whose rows share scales.
    """
    if isinstance(w, QuantizedTensor):
        return w[rows].dequantize(dtype)
    if w.dtype == jnp.bfloat16 and platform() == "cpu":
        return take_rows_as_bits(w, rows).astype(dtype)
    return w[rows].astype(dtype)
