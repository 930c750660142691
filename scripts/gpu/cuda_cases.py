"""What `check_cuda.py` compiles: every kernel in the shapes of the 35B-A3B, and the programs of the whole model. Shapes
only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.attention import CosSin, QkvProjections
from kernels_pallas.attention.triton import attention as attention_kernel
from kernels_pallas.attention.triton_qkv import norm_rope_update_cache
from kernels_pallas.gated_delta_rule import DeltaProjections, DeltaState, DeltaWeights
from kernels_pallas.gated_delta_rule.triton import recurrent_gated_delta_rule
from kernels_pallas.gated_delta_rule.triton_chunks import chunk_gated_delta_rule
from kernels_pallas.grouped_matmul.triton import fused_moe
from kernels_pallas.matmul.triton import matmul
from kernels_pallas.norm import MoeOutput
from kernels_pallas.norm.triton import add_rms_norm, gated_rms_norm
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.top_k_top_p.triton import top_k_top_p_threshold
from kernels_pallas.topk_softmax.triton import topk_softmax
from kernels_pallas.weights.quantized import QuantizedTensor
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
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
EVEN = tuple(range(16))


class Stored(NamedTuple):
    """How a weight is stored; names as in `QuantizedTensor`. `super_group`: 0 for scales of one level, in float16."""

    layout: str
    group: int = 0
    table: tuple[int, ...] | None = None
    offset: bool = False
    super_group: int = 0


FORMS = {
    "iq4_nl": Stored("codes4", 32, IQ4_NL),
    "iq4_xs": Stored("codes4", 32, IQ4_NL, super_group=256),
    "q4_k": Stored("codes4", 32, EVEN, offset=True, super_group=256),
    "q5_k": Stored("codes5", 32, tuple(range(32)), offset=True, super_group=256),
    "q6_k": Stored("codes6", 16, tuple(range(-32, 32)), super_group=256),
    "q8_0": Stored("codes8", 32),
    "mixed": Stored("codes8", 16, offset=True),  # what holds several types in one
    "nvfp4": Stored("codes4", 16, (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)),
    "int4 g128": Stored("codes4", 128, EVEN, offset=True),
    "fp8": Stored("fp8", 128),
    "bf16": Stored("plain"),
}
# Matrices that the files of quantised checkpoints keep unquantised.
UNPACKED = {"router", "shared_gate", "in_a", "in_b", "conv"}


def packed(shape: Sequence[int], form: str) -> Any:
    """A weight of shapes only."""
    stored, spec, (*lead, size) = FORMS[form], jax.ShapeDtypeStruct, shape
    if stored.layout == "plain":
        return spec(tuple(shape), jnp.bfloat16)
    if stored.layout == "fp8":
        *stack, out = lead
        scale = spec((*stack, -(-out // 128), -(-size // 128)), jnp.float32)
        return QuantizedTensor(spec(tuple(shape), jnp.float8_e4m3fn), scale, None, "fp8", stored.group)
    scale = spec((*lead, size // stored.group), jnp.int8 if stored.super_group else jnp.float16)
    outer = spec((*lead, size // stored.super_group), jnp.float16) if stored.super_group else None
    wide = {"codes5": jnp.uint8, "codes6": jnp.uint16}.get(stored.layout)
    return QuantizedTensor(
        codes=spec((*lead, size // 2), jnp.uint8) if stored.table else spec(tuple(shape), jnp.int8),
        scale=scale,
        offset=scale if stored.offset else None,
        layout=stored.layout,
        group=stored.group,
        table=stored.table,
        high=spec((*lead, size // 8), wide) if wide else None,
        super_scale=outer,
        super_offset=outer if stored.offset else None,
    )


@dataclass(frozen=True)
class KernelSizes:
    """Shapes of one layer's kernels; those of the 35B-A3B unless told."""

    hidden: int = 2048
    layers: int = 10
    experts: int = 256
    chosen: int = 8
    expert_size: int = 512
    heads: tuple[int, int, int] = (16, 2, 256)  # of queries, of keys and values, size
    linear: tuple[int, int, int] = (16, 32, 128)  # DeltaNet: key heads, value heads, size of both
    context: int = CONTEXT
    vocab: int = 248_320
    rows: tuple[tuple[str, int], ...] = (("decode", 5), ("prefill", 2048))


def kernel_cases(
    size: KernelSizes | None = None,
    forms: Sequence[str] = tuple(FORMS),
    interpret: bool = False,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Case]:
    """Every kernel, "OP FORM REGIME", for weights in these forms and rows of this dtype."""
    size, spec = size or KernelSizes(), jax.ShapeDtypeStruct
    call = partial(partial, interpret=True) if interpret else lambda fn: fn

    def linear_case(form: str, rows: int) -> tuple[Any, tuple[Any, ...]]:
        stack = packed((size.layers, size.hidden, size.hidden), form)
        return jax.jit(call(matmul)), (spec((rows, size.hidden), dtype), stack, spec((), jnp.int32))

    def experts_case(form: str, rows: int) -> tuple[Any, tuple[Any, ...]]:
        lead, d, i = (size.layers, size.experts), size.hidden, size.expert_size
        stacks = packed((*lead, 2 * i, d), form), packed((*lead, d, i), form)
        routing = (
            spec((rows, size.chosen), jnp.int32),
            spec((rows, size.chosen), jnp.float32),
            spec((rows,), jnp.bool_),
        )
        return jax.jit(call(fused_moe)), (spec((rows, d), dtype), *stacks, spec((), jnp.int32), *routing)

    def attention_case(rows: int) -> tuple[Any, tuple[Any, ...]]:
        q, kv, each = size.heads
        cache = spec((size.layers, 1, kv, size.context, each), dtype)
        where = (spec((), jnp.int32), spec((1, rows), jnp.int32), spec((1, rows), jnp.bool_))
        gates = PartialSums(spec((1, rows, 2 * q * each), dtype))
        return jax.jit(call(attention_kernel)), (spec((1, rows, q, each), dtype), cache, cache, *where, gates)

    def entering_case(rows: int) -> tuple[Any, tuple[Any, ...]]:
        (q, kv, each), f32 = size.heads, jnp.float32
        few = rows == dict(size.rows)["decode"]
        keys = spec((8, rows, kv * each), f32) if few else spec((1, rows, kv * each), dtype)
        entering = QkvProjections(
            PartialSums(keys), PartialSums(keys), PartialSums(spec((1, rows, 2 * q * each), dtype))
        )
        norm, angles = spec((each,), dtype), spec((1, rows, each // 8), f32)
        cache = spec((size.layers, 1, kv, size.context, each), dtype)
        where = (spec((), jnp.int32), spec((1, rows), jnp.int32), spec((1, rows), jnp.bool_))
        kernel = partial(call(norm_rope_update_cache), eps=1e-6, dtype=dtype)
        return jax.jit(kernel, donate_argnums=4), (entering, norm, norm, CosSin(angles, angles), (cache, cache), *where)

    def window_case() -> tuple[Any, tuple[Any, ...]]:
        (keys, values, each), rows, f32, one = (
            size.linear,
            dict(size.rows)["decode"],
            jnp.float32,
            spec((1,), jnp.int32),
        )
        channels = (2 * keys + values) * each
        gates, of_heads = PartialSums(spec((16, rows, values), f32)), spec((values,), f32)
        projections = DeltaProjections(PartialSums(spec((1, rows, channels), dtype)), gates, gates)
        weights = DeltaWeights(spec((channels, 4), dtype), of_heads, of_heads)
        conv = spec((size.layers, 1, 3, channels), dtype)
        state = DeltaState(conv, spec((size.layers, 1, values, each, each), f32))
        kernel = partial(call(recurrent_gated_delta_rule), dtype=dtype)
        return jax.jit(kernel), (projections, weights, state, spec((), jnp.int32), one, one)

    def chunks_case() -> tuple[Any, tuple[Any, ...]]:
        (keys, values, each), rows, f32 = size.linear, dict(size.rows)["prefill"], jnp.float32
        of_keys, of_values = spec((1, rows, keys, each), f32), spec((1, rows, values, each), f32)
        gates, state = spec((1, rows, values), f32), spec((size.layers, 1, values, each, each), f32)
        kernels = partial(call(chunk_gated_delta_rule), chunk=min(64, rows), dtype=dtype)
        return jax.jit(kernels), (of_keys, of_keys, of_values, gates, gates, state, spec((), jnp.int32))

    def routing_case() -> tuple[Any, tuple[Any, ...]]:
        rows, hidden = dict(size.rows)["decode"], size.expert_size
        parts = (
            spec((splits, rows, out), jnp.float32) for splits, out in ((16, size.experts), (8, hidden), (8, hidden))
        )
        kernel = partial(call(topk_softmax), k=size.chosen, dtype=dtype)
        return jax.jit(lambda *args: kernel(*map(PartialSums, args[:3]), args[3])[:3]), (
            *parts,
            spec((rows,), jnp.bool_),
        )

    def norm_case() -> tuple[Any, tuple[Any, ...]]:
        rows, f32 = dict(size.rows)["decode"], jnp.float32
        each, shared = spec((rows, size.chosen, size.hidden), f32), PartialSums(spec((2, rows, size.hidden), f32))
        mixture = MoeOutput(each, spec((rows,), jnp.bool_), shared, PartialSums(spec((16, rows, 1), f32)))
        x, w = spec((rows, size.hidden), dtype), spec((size.hidden,), f32)
        return jax.jit(partial(call(add_rms_norm), eps=1e-6)), (x, mixture, w)

    def gated_case() -> tuple[Any, tuple[Any, ...]]:
        (_, values, each), rows = size.linear, dict(size.rows)["decode"]
        x, z = spec((rows, values, each), dtype), PartialSums(spec((2, rows, values * each), jnp.float32))
        return jax.jit(partial(call(gated_rms_norm), eps=1e-6, gate="silu")), (x, z, spec((each,), jnp.float32))

    def sampling_case() -> tuple[Any, tuple[Any, ...]]:
        rows = dict(size.rows)["decode"]
        each = spec((rows,), jnp.float32)
        return jax.jit(call(top_k_top_p_threshold)), (
            spec((rows, size.vocab), jnp.float32),
            each,
            each,
            spec((rows,), jnp.int32),
            each,
        )

    single = {
        "deltanet decode": window_case, "deltanet prefill": chunks_case, "routing decode": routing_case,
        "sampling decode": sampling_case, "norm decode": norm_case, "gating decode": gated_case,
    }  # fmt: skip
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
    )


def type_of(path: Sequence[str | int], layers: int, mixed: bool) -> str:
    """The form of a matrix in an IQ4_NL file, or in a mixed one as llama.cpp's quantiser makes them under "Q4_K_M".

    There an eighth of the layers at either end and every third one between have their values and down projections in
    Q6_K (`llama_tensor_get_type` in llama-quant.cpp); fused projections of DeltaNet layers are Q5_K, the LM head Q6_K.
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
    """One of `PROGRAMS`, of the whole model: jitted step, arguments, static arguments, parameters. Draft 0: no MTP
    head.

    All are for one sequence, but "insert": there one sequence comes to four. Weights are IQ4_NL unless the name says
    more.
    """
    cfg, spec = preset(MODEL) if draft else preset(MODEL).without_mtp(), jax.ShapeDtypeStruct
    mixed = name.endswith(MIXED)
    name = name.removesuffix(MIXED)

    def store(path: tuple[Any, ...], leaf: Any) -> Any:
        plain = leaf.dtype != jnp.bfloat16 or path[-1] in UNPACKED
        return spec(leaf.shape, leaf.dtype) if plain else packed(leaf.shape, type_of(path, cfg.num_layers, mixed))

    graph, params = nnx.split(abstract_model(cfg, dtype=jnp.bfloat16))
    graph, params = nnx.split(nnx.merge(graph, map_params(params, store)))

    def ints(*shape: int) -> Any:
        return spec(shape, jnp.int32)

    def state_of(batch: int, seen: bool) -> DecodeState:
        cache = jax.eval_shape(lambda: new_cache(cfg, batch, padded_kv_length(context, draft + 1), dtype=jnp.bfloat16))
        flags, vocab = spec((batch,), jnp.bool_), (batch, cfg.vocab_size)
        return DecodeState(
            cache=cache, hidden=spec((batch, cfg.hidden_size), jnp.bfloat16), token=ints(batch), num_tokens=ints(batch),
            finished=flags, stopped=flags, num_steps=ints(batch), num_accepted_per_pos=ints(batch, draft),
            token_counts=TokenCounts(spec(vocab, jnp.bool_), ints(*vocab)) if seen else None,
        )  # fmt: skip

    state = state_of(1, seen=name == "decode with penalties")
    if name == "prefill":
        args: tuple[Any, ...] = (params, ints(1, chunk), ints(1, chunk), ints(1), state.cache)
        return prefill, args, {"graph": graph, "rows": NO_ROWS}, params
    if name == "insert":
        return insert_requests, (state_of(4, seen=False), state, ints(1), ints(1), ints()), {}, {}
    share = spec((1,), jnp.float32)
    requests = BatchSamplingParams(
        ints(1), share, spec((1,), jnp.uint32), ints(1, MAX_STOP_TOKENS), TruncationParams(ints(1), share, share),
        Penalties(share, share, share) if state.token_counts else None,
    )  # fmt: skip
    static = {
        "graph": graph, "num_speculative_tokens": draft, "max_steps": 32, "vocab_size": cfg.vocab_size,
        "drafter": mtp_drafter,
    }  # fmt: skip
    return decode, (params, state, requests, ints()), static, params


def weight_shapes(params: Any) -> tuple[set[str], set[str]]:
    """Types of what a copy of weights would be, whole stacks and single layers: (experts, other packed weights)."""
    names = {"uint8": "u8", "uint16": "u16", "int8": "s8", "float16": "f16", "bfloat16": "bf16", "float32": "f32"}
    experts, others = set(), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind, shape = names.get(leaf.dtype.name, "other"), tuple(leaf.shape)
        key = jax.tree_util.keystr(path)
        if not any(part in key for part in ("codes", "scale", "offset", "high")):
            continue
        mine = experts if len(shape) == 4 else others
        views = [(kind, shape)]
        if leaf.dtype.itemsize < 4:  # as the kernels read it
            views.append(("u32", (*shape[:-1], shape[-1] * leaf.dtype.itemsize // 4)))
        for dtype, dims in views:
            mine |= {f"{dtype}[{','.join(map(str, d))}]" for d in (dims, dims[1:]) if len(d) >= 2}
    return experts, others
