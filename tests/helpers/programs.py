"""Prompt programs, traced on shapes alone: small models of distinct sizes, and ways to look into a program."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr
from jax.typing import DTypeLike

from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.steps import PREFILL_DONATED, PREFILL_STATIC, prefill
from mtpjax.model import abstract_model
from mtpjax.model.cache import new_cache, padded_kv_length
from mtpjax.presets import PRESETS
from scripts.benchmarks.dataflow import ArrayInfo, arrays, inputs_read

NONE, LAST, ALL = OutputRows.none(), OutputRows.last(), OutputRows.all()
VOCAB = 1009  # a prime: an array of whole rows of logits has a multiple of it in elements, whatever its shape
DENSE = ModelConfig(
    hidden_size=48,
    num_layers=4,
    layer_pattern=(LINEAR, FULL),
    q_heads=4,
    kv_heads=2,
    head_dim=24,
    rotary_dim=8,
    rope_theta=1e7,
    linear_k_heads=2,
    linear_v_heads=4,
    linear_k_dim=20,
    linear_v_dim=28,
    conv_width=4,
    vocab_size=VOCAB,
    mlp_size=72,
)
MOE = replace(DENSE, mlp_size=0, num_experts=6, experts_per_token=2, expert_size=36, shared_expert_size=44)
BIG, BIG_CHUNK = PRESETS["35b-a3b"], 2048


def abstract(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def trace_prefill(cfg: ModelConfig, rows: OutputRows, chunk: int, *, batch: int = 2) -> Any:
    """Trace `prefill` of one chunk of `batch` sequences."""
    graph, params = nnx.split(abstract_model(cfg))
    cache = jax.eval_shape(lambda: new_cache(cfg, batch, padded_kv_length(600, 1)))
    ids, pad = abstract(batch, chunk, dtype=jnp.int32), abstract(batch, dtype=jnp.int32)
    step = jax.jit(prefill, static_argnames=PREFILL_STATIC, donate_argnames=PREFILL_DONATED)
    return step.trace(params, ids, ids, pad, cache, graph=graph, rows=rows)


def computed_arrays(traced: Any) -> list[ArrayInfo]:
    """Return the arrays that a program computes: not its inputs, nor those of inner programs, made outside of them."""
    return [a for a in arrays(traced.jaxpr) if a.made_by not in ("input", "constant")]


def parameters_read(traced: Any) -> dict[str, bool]:
    """Return for each parameter, all of which are the first argument of a program, whether an output depends on it."""
    inputs = jax.tree.leaves_with_path(traced.args_info)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in inputs]
    read = dict(zip(names, inputs_read(traced.jaxpr), strict=True))
    first = "0.0."  # of the positional arguments, the first
    return {n.removeprefix(first).removesuffix(".value"): r for n, r in read.items() if n.startswith(first)}


def while_loops(cfg: ModelConfig, rows: int) -> list[Any]:
    """Return the `while` equations of a chunk of one sequence in a model of two layers without MTP head."""
    traced = trace_prefill(replace(cfg, num_layers=2, mtp_layers=0), LAST, rows, batch=1)
    return list(_while_equations(traced.jaxpr.jaxpr))


def _while_equations(jaxpr: Jaxpr) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, Jaxpr):
                yield from _while_equations(inner)
