"""Prompt programs, traced on shapes alone: the arrays that they hold, and the weights that they read."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import Array
from jax.extend.core import Literal

from kernels_pallas.grouped_matmul.plan import choose_window_sizes, num_places
from mtpjax.config import FULL, ModelConfig
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.engine.prompt_chunks import PREFILL_BUCKETS
from mtpjax.model import abstract_model, commit, make_positions
from mtpjax.model.cache import KV_BLOCK, Cache, new_cache
from scripts.benchmarks.count_flops import FIRST, trace
from scripts.benchmarks.dataflow import ArrayInfo, arrays
from tests.helpers.models import cpu_only
from tests.helpers.programs import (
    ALL,
    BIG,
    BIG_CHUNK,
    DENSE,
    LAST,
    MOE,
    NONE,
    VOCAB,
    abstract,
    computed_arrays,
    parameters_read,
    trace_prefill,
    while_loops,
)

dense_and_moe = pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])


def count_primitives(traced: Any) -> Counter[str]:
    return Counter(a.made_by for a in computed_arrays(traced) if a.size)


# No logits for prompt rows


def logits_of_all_rows(traced: Any, chunk: int) -> list[ArrayInfo]:
    """Return the arrays with a row of the vocabulary for every row of the chunk."""
    return [a for a in computed_arrays(traced) if VOCAB in a.shape and (chunk in a.shape or 2 * chunk in a.shape)]


@pytest.mark.parametrize("mtp", [1, 0])
@pytest.mark.parametrize("tied", [False, True])
@dense_and_moe
def test_prompt_chunk_holds_nothing_of_the_size_of_the_vocabulary(cfg: ModelConfig, tied: bool, mtp: int) -> None:
    cfg = replace(cfg, tied_embeddings=tied, mtp_layers=mtp)
    for chunk in (*PREFILL_BUCKETS, 37):
        traced = trace_prefill(cfg, NONE, chunk)
        assert not [a for a in computed_arrays(traced) if a.size and a.size % VOCAB == 0]
        with_vocab = {a.shape for a in arrays(traced.jaxpr) if VOCAB in a.shape and a.size}
        assert with_vocab == {(VOCAB, cfg.hidden_size)}  # embedding and LM head, as they came


@pytest.mark.parametrize("mtp", [1, 0])
@dense_and_moe
def test_logits_are_found_in_programs_that_have_them(cfg: ModelConfig, mtp: int) -> None:
    cfg = replace(cfg, mtp_layers=mtp)
    for chunk in (37, 64):
        every_row = logits_of_all_rows(trace_prefill(cfg, ALL, chunk), chunk)
        assert (2, chunk, VOCAB) in {a.shape for a in every_row}
        last = trace_prefill(cfg, LAST, chunk)
        assert not logits_of_all_rows(last, chunk)
        logits = [a for a in computed_arrays(last) if VOCAB in a.shape]
        assert (2, 1, VOCAB) in {a.shape for a in logits} and max(a.size for a in logits) == 2 * VOCAB


def test_compiled_prompt_chunk_has_no_head_and_without_mtp_no_last_layer() -> None:
    """What the jaxpr says is true of the program that XLA makes of it."""
    cfg, num_loops = replace(DENSE, num_layers=2), {}
    for mtp in (1, 0):
        traced = trace_prefill(replace(cfg, mtp_layers=mtp), NONE, 64)
        text = traced.lower().compile().as_text()
        with_vocab = {s for s in re.findall(r"\w+\[([\d,]+)\]", text) if str(VOCAB) in s.split(",")}
        # The weights, and the empty array of logits that the program returns.
        assert with_vocab == {f"{VOCAB},{cfg.hidden_size}", f"2,0,{VOCAB}"}
        num_loops[mtp] = len(re.findall(rf"\[2,2,2,64,{cfg.head_dim}\].* while\(", text))
    # The only attention layer of this model is its last layer, whose output only the MTP head reads.
    assert num_loops == {1: 1, 0: 0}


# What the MTP head adds to a prompt chunk

MTP_PARAMETERS_READ = {
    "embed_norm",
    "hidden_norm",
    "fc",
    "layer.input_norm",
    "layer.mixer.k",
    "layer.mixer.v",
    "layer.mixer.k_norm",
}
MTP_PARAMETERS_NOT_READ = {
    "mtp.layer.mixer.q",
    "mtp.layer.mixer.o",
    "mtp.layer.mixer.q_norm",
    "mtp.layer.post_norm",
    "mtp.norm",
}


def split_parameters(cfg: ModelConfig, rows: OutputRows) -> tuple[set[str], set[str]]:
    """Return the parameters that a chunk of 64 rows reads, and the others."""
    read = parameters_read(trace_prefill(cfg, rows, 64))
    return {name for name, r in read.items() if r}, {name for name, r in read.items() if not r}


@dense_and_moe
def test_mtp_share_of_an_inner_chunk_is_keys_and_values(cfg: ModelConfig) -> None:
    for rows, unread_head in ((NONE, {"lm_head"}), (LAST, set())):
        read, unread = split_parameters(cfg, rows)
        assert {p.removeprefix("mtp.") for p in read if p.startswith("mtp.")} == MTP_PARAMETERS_READ
        unread_mtp = {p for p in unread if p.startswith("mtp.")}
        assert unread_mtp > MTP_PARAMETERS_NOT_READ
        assert any(p.startswith("mtp.layer.mlp.") for p in unread_mtp)
        # Every layer of the trunk and its final norm are read, because the MTP head needs all hidden states.
        assert unread - unread_mtp == unread_head


@dense_and_moe
def test_without_mtp_an_inner_chunk_reads_neither_the_final_norm_nor_the_head(cfg: ModelConfig) -> None:
    cfg = cfg.without_mtp()
    read, unread = split_parameters(cfg, LAST)
    assert unread == set()
    # Of the last layer only keys and values are needed.
    layer = "decoder.blocks.1.layers.1."
    needed = {layer + name for name in ("input_norm", "mixer.k", "mixer.v", "mixer.k_norm")}
    rest_of_layer = {p for p in read if p.startswith(layer)} - needed
    assert split_parameters(cfg, NONE)[1] == {"norm", "lm_head"} | rest_of_layer


@dense_and_moe
def test_mtp_adds_three_products_and_no_attention_or_expert_to_a_chunk(cfg: ModelConfig) -> None:
    inner, on = (count_primitives(trace_prefill(cfg, rows, 64)) for rows in (NONE, FIRST))
    off = count_primitives(trace_prefill(cfg.without_mtp(), FIRST, 64))  # its last layer returns every row, too
    assert on["dot_general"] - off["dot_general"] == 3  # fc, k, v
    assert on["dot_general"] - inner["dot_general"] == 1  # the LM head of the output row
    assert on["while"] > 0
    for name in ("while", "scan", "exp", "logistic", "top_k", "sort", "custom_vjp_call"):
        assert inner[name] == on[name] == off[name], name
    inner = count_primitives(trace_prefill(cfg, NONE, 64, batch=1))
    whole_layer = count_primitives(trace(cfg, "layer", NONE, chunk=64, kv_len=KV_BLOCK))
    assert whole_layer["while"] > inner["while"] and whole_layer["exp"] > inner["exp"]


@dense_and_moe
def test_a_chunk_that_the_head_does_not_read_is_that_of_a_model_without_one(cfg: ModelConfig) -> None:
    def describe(cfg: ModelConfig, mtp_rows: int | None = None) -> tuple[Counter[str], set[str]]:
        """Return the primitives of a chunk and the parameters that it reads."""
        variant = "sync" if cfg.mtp_layers else "off"
        traced = trace(cfg, variant, NONE, chunk=64, kv_len=KV_BLOCK, mtp_rows=mtp_rows)
        primitives = count_primitives(traced)
        # A call of a function, which XLA inlines, returns all that it was given: the cache, with or without the head's.
        del primitives["jit"]
        return primitives, {name for name, r in parameters_read(traced).items() if r}

    assert describe(cfg, mtp_rows=0) == describe(cfg.without_mtp())
    primitives, read = describe(cfg, mtp_rows=7)
    assert primitives["dot_general"] > describe(cfg, mtp_rows=0)[0]["dot_general"]
    assert any(name.startswith("mtp.fc") for name in read)


# The state of DeltaNet


@cpu_only
@pytest.mark.parametrize("rows", [1, 3])
def test_a_committed_row_is_not_computed_anew_for_every_element_of_the_state(rows: int) -> None:
    """XLA computes what it fuses into the pass over the state once per element, so the pass may have few operands."""
    cfg = replace(MOE, num_layers=6, mtp_layers=0)
    graph, params = nnx.split(abstract_model(cfg))

    def step(params: Any, tokens: Array, cache: Cache) -> Cache:
        positions = make_positions(cfg, cache.length, rows, jnp.zeros(1, jnp.int32), kv_len=cache.kv_len)
        _, cache, pending = nnx.merge(graph, params).trunk_pending(tokens, cache, positions)
        return commit(cache, pending, jnp.ones(1, jnp.int32))

    cache = jax.eval_shape(lambda: new_cache(cfg, 1, KV_BLOCK))
    text = jax.jit(step).lower(params, abstract(1, rows, dtype=jnp.int32), cache).compile().as_text() or ""
    state_shape = ",".join(map(str, cache.state.shape))
    passes = re.findall(rf"= f32\[{state_shape}\]\S* fusion\(([^)]*)\)", text)
    assert passes and max(operands.count("%") for operands in passes) <= 4 + 2 * rows


# Memory


def test_temporary_memory_of_35b_does_not_grow_with_the_context() -> None:
    def temporaries(kv_len: int) -> tuple[Counter[Any], list[ArrayInfo]]:
        """Return all arrays with `kv_len` as "S" in their shapes, counted, and those that do not have its size."""
        computed = computed_arrays(trace(BIG, "sync", NONE, chunk=BIG_CHUNK, kv_len=kv_len))
        cache = {(n, 1, BIG.kv_heads, kv_len, BIG.head_dim) for n in (1, BIG.full_layers)}
        of_cache_size = [a for a in computed if kv_len in a.shape]
        assert {a.shape for a in of_cache_size} == cache
        assert {a.made_by for a in of_cache_size} <= {"scatter", "jit"}  # updated in place, not converted or computed
        shapes = Counter((tuple("S" if n == kv_len else n for n in a.shape), a.dtype, a.made_by) for a in computed)
        return shapes, [a for a in computed if kv_len not in a.shape]

    small, _ = temporaries(33 * KV_BLOCK)
    large, others = temporaries(262_144)
    assert small == large  # the same program but for the cache that it is given
    attention = [a for a in others if "while" in a.scope and "custom_vjp_call" not in a.scope]
    assert max(a.size for a in attention) == BIG.q_heads * BIG_CHUNK * KV_BLOCK  # scores of one block
    sizes = choose_window_sizes(BIG_CHUNK, BIG.experts_per_token, BIG.num_experts)
    places = num_places(BIG.experts_per_token * BIG_CHUNK, BIG.num_experts, sizes)
    stored = [a for a in others if a.made_by != "bitcast_convert_type"]  # which only names the same bits anew
    assert max(a.nbytes for a in stored) == places * BIG.hidden_size * 2  # 79 MiB: the rows of all windows


def test_one_program_serves_every_context() -> None:
    """Attention is a loop whose end is computed: the chunk's position is a value of the cache, not of the program."""
    found = while_loops(replace(DENSE, layer_pattern=(FULL,)), 64)
    assert len(found) == 2
    for loop in found:
        start, end = loop.invars[loop.params["cond_nconsts"] + loop.params["body_nconsts"] :][:2]
        assert isinstance(start, Literal) and not isinstance(end, Literal)
        assert len(loop.outvars[-1].aval.shape) == 5
