"""What `check_cuda.py` compiles: every kernel in the shapes of the 35B-A3B, and the programs of the whole model. Shapes only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.attention.triton import attend_cache
from kernels_pallas.deltanet.triton import delta_window
from kernels_pallas.grouped_matmul.triton import grouped_mlp
from kernels_pallas.matmul.triton import matmul
from kernels_pallas.quantized import QuantizedTensor
from mtpjax.cache import new_cache, slots_for
from mtpjax.config import preset
from mtpjax.model import abstract_model
from mtpjax.penalties import Penalties, Seen
from mtpjax.rows import NO_ROWS
from mtpjax.sampling import STOPS, Kept, Requests
from mtpjax.speculative import LoopState, decode, insert, mtp_drafter
from mtpjax.steps import prefill
from mtpjax.weights import fill

Case = Callable[[], tuple[Any, tuple[Any, ...]]]  # a jitted function and its arguments

MODEL, DRAFT, CONTEXT, CHUNK = "35b-a3b", 4, 32768, 512
PROGRAMS = ("prefill", "decode", "decode with penalties", "insert")
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
EVEN = tuple(range(16))
# name: layout, group, table, offset
FORMS: dict[str, tuple[str, int, tuple[int, ...] | None, bool]] = {
    "iq4_nl": ("codes4", 32, IQ4_NL, False),
    "q4_k": ("codes4", 32, EVEN, True),
    "nvfp4": ("codes4", 16, (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), False),
    "int4 g128": ("codes4", 128, EVEN, True),
    "q8_0": ("codes8", 32, None, False),
    "q6_k": ("codes8", 16, None, False),
    "fp8": ("fp8", 128, None, False),
    "bf16": ("plain", 0, None, False),
}
# Matrices that the files of quantised checkpoints keep unquantised.
UNPACKED = {"router", "shared_gate", "in_a", "in_b", "conv"}


def packed(shape: Sequence[int], form: str) -> Any:
    """A weight of shapes only."""
    layout, group, table, offset = FORMS[form]
    *lead, size = shape
    spec = jax.ShapeDtypeStruct
    if layout == "plain":
        return spec(tuple(shape), jnp.bfloat16)
    if layout == "fp8":
        *stack, out = lead
        scale = spec((*stack, -(-out // 128), -(-size // 128)), jnp.float32)
        codes = spec(tuple(shape), jnp.float8_e4m3fn)
    else:
        scale = spec((*lead, size // group), jnp.float16)
        codes = spec((*lead, size // 2), jnp.uint8) if layout == "codes4" else spec(tuple(shape), jnp.int8)
    return QuantizedTensor(
        codes=codes, scale=scale, offset=scale if offset else None, layout=layout, group=group, table=table
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
    rows: tuple[tuple[str, int], ...] = (("decode", 5), ("prefill", 2048))


def kernel_cases(
    size: KernelSizes | None = None, forms: Sequence[str] = tuple(FORMS), interpret: bool = False
) -> dict[str, Case]:
    """Every kernel, "OP FORM REGIME", for weights in these forms."""
    size, spec = size or KernelSizes(), jax.ShapeDtypeStruct
    call = partial(partial, interpret=True) if interpret else lambda fn: fn

    def linear_case(form: str, rows: int) -> tuple[Any, tuple[Any, ...]]:
        return jax.jit(call(matmul)), (spec((rows, size.hidden), jnp.bfloat16), packed((size.hidden, size.hidden), form))

    def experts_case(form: str, rows: int) -> tuple[Any, tuple[Any, ...]]:
        lead, d, i = (size.layers, size.experts), size.hidden, size.expert_size
        stacks = packed((*lead, 2 * i, d), form), packed((*lead, d, i), form)
        routing = (spec((rows, size.chosen), jnp.int32), spec((rows, size.chosen), jnp.float32), spec((rows,), jnp.bool_))
        return jax.jit(call(grouped_mlp)), (spec((rows, d), jnp.bfloat16), *stacks, spec((), jnp.int32), *routing)

    def attention_case(rows: int) -> tuple[Any, tuple[Any, ...]]:
        q, kv, each = size.heads
        cache = spec((size.layers, 1, kv, size.context, each), jnp.bfloat16)
        where = (spec((), jnp.int32), spec((1, rows), jnp.int32), spec((1, rows), jnp.bool_))
        return jax.jit(call(attend_cache)), (spec((1, rows, q, each), jnp.bfloat16), cache, cache, *where)

    def window_case() -> tuple[Any, tuple[Any, ...]]:
        (keys, values, each), rows, f32 = size.linear, dict(size.rows)["decode"], jnp.float32
        qk, v, gates = spec((1, rows, keys, each), f32), spec((1, rows, values, each), f32), spec((1, rows, values), f32)
        state = spec((size.layers, 1, values, each, each), f32)
        return jax.jit(call(delta_window)), (qk, qk, v, gates, gates, state, spec((), jnp.int32))

    attention = {f"attention {regime}": partial(attention_case, rows) for regime, rows in size.rows}
    return {"deltanet decode": window_case} | attention | {
        f"{op} {form} {regime}": partial(make, form, rows)
        for op, make in (("linear", linear_case), ("experts", experts_case))
        for form in forms
        for regime, rows in size.rows
    }


def program_case(
    name: str, *, context: int = CONTEXT, draft: int = DRAFT, chunk: int = CHUNK
) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """One of `PROGRAMS`, of the whole model: jitted step, arguments, static arguments, parameters. Draft 0: no MTP head.

    All are for one sequence, but "insert": there one sequence comes to four.
    """
    cfg, spec = preset(MODEL) if draft else preset(MODEL).without_mtp(), jax.ShapeDtypeStruct

    def store(path: tuple[Any, ...], leaf: Any) -> Any:
        plain = leaf.dtype != jnp.bfloat16 or path[-1] in UNPACKED
        return spec(leaf.shape, leaf.dtype) if plain else packed(leaf.shape, "iq4_nl")

    graph, params = nnx.split(abstract_model(cfg, jnp.bfloat16, stack=cfg.repeats))
    graph, params = nnx.split(nnx.merge(graph, fill(params, store)))

    def ints(*shape: int) -> Any:
        return spec(shape, jnp.int32)

    def state_of(batch: int, seen: bool) -> LoopState:
        cache = jax.eval_shape(lambda: new_cache(cfg, batch, slots_for(context, draft + 1), dtype=jnp.bfloat16))
        flags, vocab = spec((batch,), jnp.bool_), (batch, cfg.vocab_size)
        return LoopState(
            cache=cache, hidden=spec((batch, cfg.hidden_size), jnp.bfloat16), token=ints(batch), count=ints(batch),
            done=flags, stopped=flags, rounds=ints(batch), accepted=ints(batch, draft),
            seen=Seen(spec(vocab, jnp.bool_), ints(*vocab)) if seen else None,
        )  # fmt: skip

    state = state_of(1, seen=name == "decode with penalties")
    if name == "prefill":
        args: tuple[Any, ...] = (params, ints(1, chunk), ints(1, chunk), ints(1), state.cache)
        return prefill, args, {"graph": graph, "rows": NO_ROWS}, params
    if name == "insert":
        return insert, (state_of(4, seen=False), state, ints(1), ints(1), ints()), {}, {}
    share = spec((1,), jnp.float32)
    requests = Requests(
        ints(1), share, spec((1,), jnp.uint32), ints(1, STOPS), Kept(ints(1), share, share),
        Penalties(share, share, share) if state.seen else None,
    )  # fmt: skip
    static = {"graph": graph, "k": draft, "rounds": 32, "vocab": cfg.vocab_size, "drafter": mtp_drafter}
    return decode, (params, state, requests, ints()), static, params


def weight_shapes(params: Any) -> tuple[set[str], set[str]]:
    """Types of what a copy of weights would be, whole stacks and single layers: (experts, other packed weights)."""
    names = {"uint8": "u8", "float16": "f16", "bfloat16": "bf16", "float32": "f32"}
    experts, others = set(), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind, shape = names.get(leaf.dtype.name, "other"), tuple(leaf.shape)
        key = jax.tree_util.keystr(path)
        if "codes" not in key and "scale" not in key:
            continue
        mine = experts if len(shape) == 4 else others
        views = [(kind, shape)] + ([("u32", (*shape[:-1], shape[-1] // 4))] if kind == "u8" else [])
        for dtype, dims in views:
            mine |= {f"{dtype}[{','.join(map(str, d))}]" for d in (dims, dims[1:]) if len(d) >= 2}
    return experts, others
