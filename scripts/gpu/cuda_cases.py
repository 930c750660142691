"""What `check_cuda` compiles: every kernel in the shapes of the 35B-A3B, and the programs of the whole model,
abstractly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.attention.shapes import AttentionShape, attention_inputs, norm_rope_update_cache_inputs
from kernels_pallas.attention.triton import attention as attention_kernel
from kernels_pallas.attention.triton_qkv import norm_rope_update_cache
from kernels_pallas.gated_delta_rule.shapes import DeltaShape, gated_delta_rule_inputs, with_updates
from kernels_pallas.gated_delta_rule.triton import recurrent_gated_delta_rule
from kernels_pallas.gated_delta_rule.triton_chunks import gated_delta_rule
from kernels_pallas.grouped_matmul.reference import combine_experts
from kernels_pallas.grouped_matmul.shapes import MoeShape, fused_moe_inputs, shared_expert_inputs
from kernels_pallas.grouped_matmul.triton import fused_moe, fused_moe_unreduced
from kernels_pallas.matmul.shapes import LinearShape, matmul_inputs
from kernels_pallas.matmul.triton import matmul
from kernels_pallas.norm.shapes import NormShape, add_rms_norm_inputs, gated_rms_norm_inputs
from kernels_pallas.norm.triton import add_rms_norm, gated_rms_norm
from kernels_pallas.packed.formats import abstract_weight
from kernels_pallas.top_k_top_p.shapes import LogitsShape, threshold_inputs
from kernels_pallas.top_k_top_p.triton import top_k_top_p_threshold
from kernels_pallas.topk_softmax.shapes import RouterShape, topk_softmax_inputs
from kernels_pallas.topk_softmax.triton import topk_softmax
from mtpjax.decoding.logits_processors import TextState
from mtpjax.decoding.output_rows import NO_ROWS
from mtpjax.decoding.penalties import Penalties, TokenCounts
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams, TruncationParams
from mtpjax.decoding.speculative import DecodeState, mtp_drafter
from mtpjax.loading.loaded_model import map_params
from mtpjax.model import abstract_model
from mtpjax.model.cache import new_cache, padded_kv_length
from mtpjax.presets import preset
from scripts.benchmarks.jitted_steps import decode, insert_requests, prefill

Case = Callable[[], tuple[Any, tuple[Any, ...]]]  # a jitted function and its arguments

MODEL, DRAFT, CONTEXT, CHUNK = "35b-a3b", 4, 32768, 512
PROGRAMS = ("prefill", "decode", "decode with penalties", "insert", "prefill q4_k_m", "decode q4_k_m")
MIXED = " q4_k_m"
# The formats of `kernels_pallas.packed.formats` that are compiled.
FORMS = ("iq4_nl", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0", "mixed", "nvfp4", "int4 g128", "fp8", "bf16")
# Matrices that the files of quantised checkpoints keep unquantised.
UNPACKED = {"router", "shared_gate", "in_a", "in_b", "conv"}


@dataclass(frozen=True)
class KernelSizes:
    """Sizes of one layer's kernels; the defaults are those of the 35B-A3B."""

    hidden: int = 2048
    layers: int = 10
    experts: int = 256
    experts_per_token: int = 8
    expert_size: int = 512
    heads: tuple[int, int, int] = (16, 2, 256)  # query heads, key/value heads, head size
    linear: tuple[int, int, int] = (16, 32, 128)  # DeltaNet: key heads, value heads, size of both
    context: int = CONTEXT
    vocab: int = 248_320
    rows: tuple[tuple[str, int], ...] = (("decode", 5), ("prefill", 2048))


def kernel_cases(
    size: KernelSizes | None = None,
    forms: Sequence[str] = FORMS,
    interpret: bool = False,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Case]:
    """Return a case for every kernel, "OP FORM REGIME", with weights in these forms and rows of this dtype.

    "joined" are the experts with the shared expert in the launch of their down projection, which packed weights have.
    """
    size = size or KernelSizes()
    rows_of = dict(size.rows)
    decode_rows = rows_of["decode"]
    q_heads, kv_heads, head_dim = size.heads
    key_heads, value_heads, delta_size = size.linear
    attention_shape = AttentionShape(size.layers, q_heads, kv_heads, head_dim, head_dim // 4, size.context)
    delta_shape = DeltaShape(size.layers, value_heads, key_heads, delta_size, delta_size)
    norm_shape = NormShape(size.hidden, value_heads, size.experts_per_token, delta_size)
    moe_shape = MoeShape(size.hidden, size.expert_size, size.experts, size.experts_per_token, size.layers)
    linear_shape = LinearShape(size.hidden, size.hidden, size.layers)
    router_shape = RouterShape(size.experts, size.experts_per_token, size.expert_size)

    def kernel(fn: Callable[..., Any], **static: Any) -> Any:
        return partial(fn, interpret=True, **static) if interpret else partial(fn, **static)

    def linear_case(form: str, rows: int) -> tuple[Any, tuple[Any, ...]]:
        return jax.jit(kernel(matmul)), matmul_inputs(linear_shape, rows, form, dtype)

    def experts_case(form: str, rows: int) -> tuple[Any, tuple[Any, ...]]:
        return jax.jit(kernel(fused_moe)), fused_moe_inputs(moe_shape, rows, form, dtype)

    def joined_case(form: str) -> tuple[Any, tuple[Any, ...]]:
        *args, valid = fused_moe_inputs(moe_shape, decode_rows, form, dtype)
        run = kernel(fused_moe_unreduced)

        def both(*args: Any) -> Any:
            """Return the routed experts and the shared one, float32 `[rows, 2, D]`."""
            valid = args[-1]
            outputs, shared = run(*args[:-1])
            if shared is None:
                raise ValueError(f"the down kernel does not take the shared expert of {decode_rows} rows")
            return jnp.stack([combine_experts(outputs, valid, jnp.float32), shared], axis=1)

        return jax.jit(both), (*args, shared_expert_inputs(moe_shape, decode_rows, form, dtype), valid)

    def attention_case(rows: int) -> tuple[Any, tuple[Any, ...]]:
        return jax.jit(kernel(attention_kernel)), attention_inputs(attention_shape, rows, dtype)

    def entering_case(rows: int) -> tuple[Any, tuple[Any, ...]]:
        sums = 8 if rows == decode_rows else 1
        args = norm_rope_update_cache_inputs(attention_shape, rows, dtype, num_partial_sums=sums)
        return jax.jit(kernel(norm_rope_update_cache, eps=1e-6, dtype=dtype), donate_argnums=4), args

    def window_case() -> tuple[Any, tuple[Any, ...]]:
        *args, pad, _ = with_updates(gated_delta_rule_inputs(delta_shape, decode_rows, dtype, num_partial_sums=16))
        return jax.jit(kernel(recurrent_gated_delta_rule, dtype=dtype)), (*args, pad, pad)

    def chunks_case() -> tuple[Any, tuple[Any, ...]]:
        rows = rows_of["prefill"]
        *args, pad, _ = gated_delta_rule_inputs(delta_shape, rows, dtype)
        return jax.jit(kernel(gated_delta_rule, chunk=min(64, rows), dtype=dtype)), (*args, pad, pad)

    def routing_case() -> tuple[Any, tuple[Any, ...]]:
        route = kernel(topk_softmax, k=size.experts_per_token, dtype=dtype)
        return jax.jit(lambda *args: route(*args)[:3]), topk_softmax_inputs(router_shape, decode_rows)

    def norm_case() -> tuple[Any, tuple[Any, ...]]:
        return jax.jit(kernel(add_rms_norm, eps=1e-6)), add_rms_norm_inputs(norm_shape, decode_rows, dtype)

    def gated_case() -> tuple[Any, tuple[Any, ...]]:
        args = gated_rms_norm_inputs(norm_shape, decode_rows, dtype)
        return jax.jit(kernel(gated_rms_norm, eps=1e-6, gate="silu")), args

    def sampling_case() -> tuple[Any, tuple[Any, ...]]:
        return jax.jit(kernel(top_k_top_p_threshold)), threshold_inputs(LogitsShape(decode_rows, size.vocab))

    single = {
        "deltanet decode": window_case,
        "deltanet prefill": chunks_case,
        "routing decode": routing_case,
        "sampling decode": sampling_case,
        "norm decode": norm_case,
        "gating decode": gated_case,
    }
    attention = {
        f"{op} {regime}": partial(make, rows)
        for op, make in (("attention", attention_case), ("entering", entering_case))
        for regime, rows in size.rows
    }
    return (
        single
        | attention
        | {
            f"{op} {form} {regime}": partial(make, form, rows)
            for op, make in (("linear", linear_case), ("experts", experts_case))
            for form in forms
            for regime, rows in size.rows
        }
        | {f"joined {form} decode": partial(joined_case, form) for form in forms if form != "bf16"}
    )


def format_of(path: Sequence[str | int], layers: int, mixed: bool) -> str:
    """Return the format of a matrix in an IQ4_NL file, or in a mixed one as llama.cpp's quantiser makes it for
    "Q4_K_M".

    In the mixed one, an eighth of the layers at either end and every third one between have their values and down
    projections in Q6_K (`llama_tensor_get_type` in llama-quant.cpp); fused projections of DeltaNet layers are Q5_K, the
    LM head Q6_K.
    """
    if not mixed:
        return "iq4_nl"
    name, inside = path[-1], path[0] == "decoder"
    layer = 4 * int(path[2]) + int(path[4]) if inside else layers
    eighth = (layers + 1) // 8
    more = layer < eighth or layer >= 7 * (layers + 1) // 8 or (layer - eighth) % 3 == 2
    if name == "lm_head" or name in ("down", "v") and more:
        return "q6_k"
    return "q5_k" if name == "in_qkv" else "q4_k"


def program_case(
    name: str, *, context: int = CONTEXT, draft: int = DRAFT, chunk: int = CHUNK
) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """Return one of `PROGRAMS`, of the whole model: jitted step, arguments, static arguments, parameters.

    All programs are for one sequence, except "insert": there one sequence is inserted into four slots. Weights are
    IQ4_NL unless the name ends with `MIXED`.

    Args:
        name: one of `PROGRAMS`.
        context: tokens of the cache.
        draft: drafts of a step; 0 leaves the MTP head out.
        chunk: rows of a prompt chunk.
    """
    cfg = preset(MODEL) if draft else preset(MODEL).without_mtp()
    spec = cast(Any, jax.ShapeDtypeStruct)
    mixed = name.endswith(MIXED)
    name = name.removesuffix(MIXED)

    def store(path: tuple[Any, ...], leaf: Any) -> Any:
        plain = leaf.dtype != jnp.bfloat16 or path[-1] in UNPACKED
        return (
            spec(leaf.shape, leaf.dtype)
            if plain
            else abstract_weight(leaf.shape, format_of(path, cfg.num_layers, mixed))
        )

    graph, params = nnx.split(abstract_model(cfg, dtype=jnp.bfloat16))
    graph, params = nnx.split(nnx.merge(graph, map_params(params, store)))

    def ints(*shape: int) -> Any:
        return spec(shape, jnp.int32)

    def state_of(batch: int, with_token_counts: bool) -> DecodeState:
        cache = jax.eval_shape(lambda: new_cache(cfg, batch, padded_kv_length(context, draft + 1), dtype=jnp.bfloat16))
        flags, vocab = spec((batch,), jnp.bool_), (batch, cfg.vocab_size)
        return DecodeState(
            cache=cache,
            hidden=spec((batch, cfg.hidden_size), jnp.bfloat16),
            token=ints(batch),
            num_tokens=ints(batch),
            finished=flags,
            stopped=flags,
            num_steps=ints(batch),
            num_accepted_per_pos=ints(batch, draft),
            text_state=TextState(TokenCounts(spec(vocab, jnp.bool_), ints(*vocab)) if with_token_counts else None),
        )

    state = state_of(1, with_token_counts=name == "decode with penalties")
    if name == "prefill":
        args: tuple[Any, ...] = (params, ints(1, chunk), ints(1, chunk), ints(1), state.cache)
        return prefill, args, {"graph": graph, "rows": NO_ROWS}, params
    if name == "insert":
        return insert_requests, (state_of(4, with_token_counts=False), state, ints(1), ints(1), ints()), {}, {}
    floats = spec((1,), jnp.float32)
    requests = BatchSamplingParams(
        ints(1),
        floats,
        spec((1,), jnp.uint32),
        ints(1, MAX_STOP_TOKENS),
        TruncationParams(ints(1), floats, floats),
        Penalties(floats, floats, floats) if state.text_state.token_counts else None,
    )
    static = {
        "graph": graph,
        "num_speculative_tokens": draft,
        "max_steps": 32,
        "vocab_size": cfg.vocab_size,
        "drafter": mtp_drafter,
    }
    return decode, (params, state, requests, ints()), static, params


def weight_shapes(params: Any) -> tuple[set[str], set[str]]:
    """Return the HLO types that a copy of weights would have, of whole stacks and of single layers.

    Returns:
        the types of experts, and those of other packed weights.
    """
    names = {"uint8": "u8", "uint16": "u16", "int8": "s8", "float16": "f16", "bfloat16": "bf16", "float32": "f32"}
    experts: set[str] = set()
    others: set[str] = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind, shape = names.get(leaf.dtype.name, "other"), tuple(leaf.shape)
        key = jax.tree_util.keystr(path)
        if not any(part in key for part in ("codes", "scale", "offset", "high")):
            continue
        types = experts if len(shape) == 4 else others
        views = [(kind, shape)]
        if leaf.dtype.itemsize < 4:  # as the kernels read it, in words
            views.append(("u32", (*shape[:-1], shape[-1] * leaf.dtype.itemsize // 4)))
        for dtype, dims in views:
            types |= {f"{dtype}[{','.join(map(str, d))}]" for d in (dims, dims[1:]) if len(d) >= 2}
    return experts, others
