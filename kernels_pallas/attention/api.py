"""`norm_rope_update_cache` and `attention`: the two ops of a gated attention layer between its projections."""

from __future__ import annotations

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention import reference, triton, triton_qkv
from kernels_pallas.attention.projections import QkvProjections
from kernels_pallas.attention.rope import CosSin
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import interpret_kernels, resolve_implementation


def norm_rope_update_cache(
    projections: QkvProjections,
    k_norm: Float[Array, " H"],
    q_norm: Float[Array, " H"],
    rope: CosSin,
    cache: tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    eps: float,
    dtype: DTypeLike,
    implementation: str | None = None,
) -> tuple[Float[Array, "B R Q H"] | None, tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]]]:
    """Normalise and rotate queries and keys, and write keys and values to the cache.

        k = rope(rms_norm(k, k_norm)),  q = rope(rms_norm(q, q_norm)) / sqrt(H),  rms_norm(x, w) = x / rms(x) * (1 + w)

    Norms and rotation are computed in float32 and rounded to `dtype` after each of the two, as in the published model.

    Args:
        projections: queries, keys and values of the T rows, before the norms.
        k_norm, q_norm: zero-centred norm weights.
        rope: rotation angles of the T rows; see `apply_rope`.
        cache: keys and values of all A layers, with S positions. The "triton" kernel changes them in place.
        layer: index of the layer in the cache.
        positions: cache position of each row.
        valid: rows that are written; the other rows leave the cache alone.
        eps: epsilon of the norms.
        dtype: dtype of the queries.
        implementation: "xla", "triton", or None for the best of the platform that supports the shapes.

    Returns:
        the queries of the last R rows, scaled, or None without queries; and the new cache.

    Raises:
        ValueError: `implementation` is "triton" and the kernel does not support H or S.
    """
    args = projections, k_norm, q_norm, rope, cache, layer, positions, valid
    if _resolve(implementation, *cache[0].shape[3:]) == "xla":
        return reference.norm_rope_update_cache(*args, eps=eps, dtype=dtype)
    return triton_qkv.norm_rope_update_cache(*args, eps=eps, dtype=dtype, interpret=interpret_kernels())


def attention(
    q: Float[Array, "B T Q H"],
    keys: Float[Array, "A B N S H"],
    values: Float[Array, "A B N S H"],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    gates: PartialSums,
    *,
    num_kv_blocks: Int[Array, ""] | int | None = None,
    is_prompt: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T Q H"]:
    """Causal grouped-query attention over the cache, with a sigmoid gate on the output of every head.

        y_t = sigmoid(gate_t) * sum_{s <= position_t} softmax_s(q_t . k_s) v_s

    The softmax is computed in float32. Rows that are not valid give zero.

    Args:
        q: queries, already normalised, rotated and scaled. Query head h reads key/value head `h // (Q / N)`.
        keys, values: the whole cache; `layer` selects one of its A layers.
        positions: cache position of each row; the row sees the cache positions up to and including its own.
        gates: the projection `[P, B * T, Q * 2 * H]` that the queries come from: per head the query, then the gate.
        num_kv_blocks: number of blocks of `KV_BLOCK` cache positions that hold every visible key, for "xla". A Python
            int makes the loop's trip count static and the function differentiable. None: computed from `positions` and
            `valid`.
        is_prompt: the rows are those of a prompt, however few. The kernels add them up in another order than those of a
            verify window, and a prompt has the same bits in chunks of any length.
        implementation: "xla", "triton", or None for the best of the platform that supports the shapes. "triton" has no
            gradient.

    Raises:
        ValueError: `implementation` is "triton" and the kernel does not support H or S.
    """
    if _resolve(implementation, *keys.shape[3:]) == "xla":
        return reference.attention(q, keys, values, layer, positions, valid, gates, num_kv_blocks=num_kv_blocks)
    args = q, keys, values, layer, positions, valid, gates
    return triton.attention(*args, is_prompt=is_prompt, interpret=interpret_kernels())


def _resolve(implementation: str | None, kv_len: int, head_dim: int) -> str:
    supported = triton.supports(head_dim, kv_len)
    implementation = resolve_implementation(implementation, supported=supported)
    if implementation == "triton" and not supported:
        raise ValueError(
            f"head size {head_dim} must be a power of two from {triton.MIN_HEAD_DIM} on and cache length {kv_len} "
            f"a multiple of {triton.KV_MULTIPLE}: the Triton kernels support no other shapes; use implementation='xla'"
        )
    return implementation
