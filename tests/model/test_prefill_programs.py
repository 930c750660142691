"""Prompt programs, traced on shapes alone: the arrays they hold, the weights they read."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import Jaxpr, Literal

from kernels_pallas.grouped_matmul.plan import choose_windows, window_places
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.steps import prefill
from mtpjax.engine.prompt_chunks import PREFILL_BUCKETS
from mtpjax.model import abstract_model, commit, make_positions
from mtpjax.model.cache import KV_BLOCK, new_cache, padded_kv_length
from mtpjax.presets import PRESETS
from scripts.benchmarks.count_flops import FIRST, trace
from scripts.benchmarks.flops import Held, arrays, inputs_read
from tests.helpers.models import cpu_only

NONE, LAST, ALL = OutputRows.none(), OutputRows.last(), OutputRows.all()
VOCAB = 1009  # a prime: an array of whole rows of logits has a multiple of it in elements, whatever its shape
DENSE = ModelConfig(
    hidden_size=48, num_layers=4, layer_pattern=(LINEAR, FULL), q_heads=4, kv_heads=2, head_dim=24, rotary_dim=8,
    rope_theta=1e7, linear_k_heads=2, linear_v_heads=4, linear_k_dim=20, linear_v_dim=28, conv_width=4, vocab_size=VOCAB, mlp_size=72,
)  # fmt: skip
MOE = replace(DENSE, mlp_size=0, num_experts=6, experts_per_token=2, expert_size=36, shared_expert_size=44)
BIG, CHUNK = PRESETS["35b-a3b"], 2048


def shape(*axes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)


def program(cfg: ModelConfig, rows: OutputRows, chunk: int, *, batch: int = 2) -> Any:
    """`prefill` of `batch` sequences, traced."""
    graph, params = nnx.split(abstract_model(cfg))
    cache = jax.eval_shape(lambda: new_cache(cfg, batch, padded_kv_length(600, 1)))
    ids, pad = shape(batch, chunk, dtype=jnp.int32), shape(batch, dtype=jnp.int32)
    return prefill.trace(params, ids, ids, pad, cache, graph=graph, rows=rows)


def parameters_read(traced: Any) -> dict[str, bool]:
    """For each parameter, the first argument of the program, whether an output depends on it."""
    inputs = jax.tree.leaves_with_path(traced.args_info)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in inputs]
    read = dict(zip(names, inputs_read(traced.jaxpr), strict=True))
    first = "0.0."  # positional arguments, the first of them
    return {n.removeprefix(first).removesuffix(".value"): r for n, r in read.items() if n.startswith(first)}


def made(traced) -> list[Held]:
    """The arrays that the program computes: not its inputs, nor those of a program inside, which were made outside."""
    return [a for a in arrays(traced.jaxpr) if a.made_by not in ("input", "constant")]


def by_rows_and_vocab(traced, chunk: int) -> list[Held]:
    """Arrays with a row of the vocabulary for every row of the chunk."""
    return [a for a in made(traced) if VOCAB in a.shape and (chunk in a.shape or 2 * chunk in a.shape)]


# No logits for prompt rows


@pytest.mark.parametrize("mtp", [1, 0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_prompt_chunk_holds_nothing_of_the_size_of_the_vocabulary(cfg, tied, mtp):
    cfg = replace(cfg, tied_embeddings=tied, mtp_layers=mtp)
    for chunk in (*PREFILL_BUCKETS, 37):
        traced = program(cfg, NONE, chunk)
        assert not [a for a in made(traced) if a.size and a.size % VOCAB == 0]
        read = [a for a in arrays(traced.jaxpr) if VOCAB in a.shape and a.size]
        assert {a.shape for a in read} == {(VOCAB, cfg.hidden_size)}  # embedding and LM head, as they came


@pytest.mark.parametrize("mtp", [1, 0])
@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_the_walk_finds_logits_where_they_are_asked_for(cfg, mtp):
    cfg = replace(cfg, mtp_layers=mtp)
    for chunk in (37, 64):
        whole = by_rows_and_vocab(program(cfg, ALL, chunk), chunk)
        assert (2, chunk, VOCAB) in {a.shape for a in whole}
        last = program(cfg, LAST, chunk)
        assert not by_rows_and_vocab(last, chunk)
        logits = [a for a in made(last) if VOCAB in a.shape]
        assert (2, 1, VOCAB) in {a.shape for a in logits} and max(a.size for a in logits) == 2 * VOCAB


@pytest.mark.parametrize("wrap", ["scan", "while", "cond", "jit", "remat", "custom_vjp"])
def test_the_walk_looks_into_programs_inside(wrap):
    @jax.custom_vjp
    def custom(x):
        return inner(x)

    def inner(x):
        with jax.named_scope("deep"):
            return jnp.sum(x[:, None] * jnp.ones((1, 7)))

    custom.defvjp(lambda x: (inner(x), x), lambda x, g: (x * g,))
    ways = {
        "scan": lambda x: lax.scan(lambda c, _: (c + inner(x), None), 0.0, None, length=3)[0],
        "while": lambda x: lax.while_loop(lambda c: c < 9.0, lambda c: c + inner(x), 0.0),
        "cond": lambda x: lax.cond(x[0] > 0, inner, lambda y: y[0], x),
        "jit": jax.jit(inner),
        "remat": jax.checkpoint(inner),
        "custom_vjp": custom,
    }
    found = [a for a in arrays(jax.make_jaxpr(ways[wrap])(shape(5))) if a.shape == (5, 7) and a.made_by == "mul"]
    assert len(found) == 1
    assert any(wrap in around for around in found[0].where)
    assert "deep" in found[0].where[-1]


def test_compiled_prompt_chunk_has_no_head_and_without_mtp_no_last_layer():
    """What the walk says about the program is true of what XLA makes of it."""
    cfg, loops = replace(DENSE, num_layers=2), {}
    for mtp in (1, 0):
        traced = program(replace(cfg, mtp_layers=mtp), NONE, 64)
        text = traced.lower().compile().as_text()
        with_vocab = {s for s in re.findall(r"\w+\[([\d,]+)\]", text) if str(VOCAB) in s.split(",")}
        # The weights, and the empty array of logits that the program returns.
        assert with_vocab == {f"{VOCAB},{cfg.hidden_size}", f"2,0,{VOCAB}"}
        loops[mtp] = len(re.findall(rf"\[2,2,2,64,{cfg.head_dim}\].* while\(", text))
    # The only attention layer of this model is its last layer: just the MTP head reads what it puts out.
    assert loops == {1: 1, 0: 0}


# What the MTP head adds to a prompt chunk

SYNC = {"embed_norm", "hidden_norm", "fc", "layer.input_norm", "layer.mixer.k", "layer.mixer.v", "layer.mixer.k_norm"}


def unread(cfg: ModelConfig, rows: OutputRows) -> tuple[set[str], set[str]]:
    """Parameters that the program does not read, and those that it does."""
    read = parameters_read(program(cfg, rows, 64))
    return {n for n, r in read.items() if not r}, {n for n, r in read.items() if r}


@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_mtp_share_of_an_inner_chunk_is_keys_and_values(cfg):
    for rows, head in ((NONE, {"lm_head"}), (LAST, set())):
        idle, read = unread(cfg, rows)
        mtp = {p.removeprefix("mtp.") for p in read if p.startswith("mtp.")}
        assert mtp == SYNC
        idle_mtp = {p for p in idle if p.startswith("mtp.")}
        assert {
            "mtp.layer.mixer.q",
            "mtp.layer.mixer.o",
            "mtp.layer.mixer.q_norm",
            "mtp.layer.post_norm",
            "mtp.norm",
        } < idle_mtp
        assert any(p.startswith("mtp.layer.mlp.") for p in idle_mtp)
        assert (
            idle - idle_mtp == head
        )  # every layer of the trunk and its norm are read: the head needs all hidden states


@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_without_mtp_an_inner_chunk_reads_neither_the_final_norm_nor_the_head(cfg):
    cfg = cfg.without_mtp()
    assert unread(cfg, LAST)[0] == set()
    # Of the last layer only keys and values are needed, and XLA drops the rest.
    last = "decoder.blocks.1.layers.1."
    rest = {p for p in unread(cfg, LAST)[1] if p.startswith(last)}
    rest -= {last + name for name in ("input_norm", "mixer.k", "mixer.v", "mixer.k_norm")}
    assert unread(cfg, NONE)[0] == {"norm", "lm_head"} | rest


@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_mtp_adds_three_products_and_no_attention_or_expert_to_a_chunk(cfg):
    def primitives(traced) -> Counter:
        return Counter(a.made_by for a in made(traced) if a.size)

    inner, on = (primitives(program(cfg, rows, 64)) for rows in (NONE, FIRST))
    off = primitives(program(cfg.without_mtp(), FIRST, 64))  # its last layer returns every row, too
    assert on["dot_general"] - off["dot_general"] == 3  # fc, k, v
    assert on["dot_general"] - inner["dot_general"] == 1  # the LM head of the output row
    assert on["while"] > 0
    for name in ("while", "scan", "exp", "logistic", "top_k", "sort", "custom_vjp_call"):
        assert inner[name] == on[name] == off[name], name
    inner = primitives(program(cfg, NONE, 64, batch=1))
    layer = primitives(trace(cfg, "layer", NONE, chunk=64, slots=KV_BLOCK))
    assert layer["while"] > inner["while"] and layer["exp"] > inner["exp"]


@pytest.mark.parametrize("cfg", [DENSE, MOE], ids=["dense", "moe"])
def test_a_chunk_that_the_head_does_not_read_is_that_of_a_model_without_one(cfg):
    def program_of(cfg: ModelConfig, **rows) -> tuple[Counter, set[str]]:
        traced = trace(cfg, "sync" if cfg.mtp_layers else "off", NONE, chunk=64, slots=KV_BLOCK, **rows)
        read = {n for n, r in parameters_read(traced).items() if r}
        # A call of a function, which XLA inlines, puts out what it was given: the cache, with the head's part or without it.
        return Counter(a.made_by for a in made(traced) if a.size and a.made_by != "jit"), read

    assert program_of(cfg, mtp_rows=0) == program_of(cfg.without_mtp())
    some = program_of(cfg, mtp_rows=7)
    assert some[0]["dot_general"] > program_of(cfg, mtp_rows=0)[0]["dot_general"]
    assert any(name.startswith("mtp.fc") for name in some[1])


def test_dead_values_of_loops_are_not_read():
    def body(carry):
        used, counter, dead, feeds = carry
        return used + counter, counter + 1, dead * feeds, feeds

    def f(used, counter, dead, feeds, consts):
        used, counter, dead, feeds = lax.while_loop(lambda c: c[1] < 4, body, (used, counter, dead, feeds))
        return used, (dead * consts)[:0]

    closed = jax.make_jaxpr(f)(*[shape(3), shape(), shape(3), shape(3), shape(3)])
    assert inputs_read(closed) == [True, True, False, False, False]

    def until(x, n, step):  # only the test reads n, and only n reads step
        return lax.while_loop(lambda c: c[1] < 4, lambda c: (c[0] * 2, c[1] + c[2], c[2]), (x, n, step))[0]

    assert inputs_read(jax.make_jaxpr(until)(shape(3), shape(), shape())) == [True, True, True]

    def g(a, b, c, xs):
        carry = lambda state, x: ((state[0] + state[1], state[1] * c[0], state[2] + x), state[2])  # noqa: E731
        (first, _, third), ys = lax.scan(carry, (a, b, a), xs)
        return {"first": first, "both": ys}

    def wanted(pick):
        return inputs_read(jax.make_jaxpr(lambda *args: g(*args)[pick])(shape(), shape(), shape(2), shape(5)))

    assert wanted("first") == [True, True, True, False]
    assert wanted("both") == [True, False, False, True]


@cpu_only
@pytest.mark.parametrize("rows", [1, 3])
def test_a_committed_row_is_not_computed_anew_for_every_element_of_the_state(rows):
    """What a compiler fuses into the pass over the state is computed once an element: operands of it, no more."""
    cfg = replace(MOE, num_layers=6, mtp_layers=0)
    graph, params = nnx.split(abstract_model(cfg))

    def step(params, tokens, cache):
        where = make_positions(cfg, cache.length, rows, jnp.zeros(1, jnp.int32), kv_len=cache.kv_len)
        _, cache, pending = nnx.merge(graph, params).trunk_pending(tokens, cache, where)
        return commit(cache, pending, jnp.ones(1, jnp.int32))

    cache = jax.eval_shape(lambda: new_cache(cfg, 1, KV_BLOCK))
    text = jax.jit(step).lower(params, shape(1, rows, dtype=jnp.int32), cache).compile().as_text()
    of = ",".join(map(str, cache.state.shape))
    passes = re.findall(rf"= f32\[{of}\]\S* fusion\(([^)]*)\)", text)
    assert passes and max(operands.count("%") for operands in passes) <= 4 + 2 * rows


def loops(cfg: ModelConfig, rows: int) -> list:
    """The `while` equations of a chunk program."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            found.extend([eqn] if eqn.primitive.name == "while" else [])
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if isinstance(inner, Jaxpr):
                    walk(inner)

    walk(program(replace(cfg, num_layers=2, mtp_layers=0), LAST, rows, batch=1).jaxpr.jaxpr)
    return found


# Memory


def test_temporary_memory_of_35b_does_not_grow_with_the_context():
    def temporaries(slots: int) -> tuple[Counter, list[Held]]:
        traced = trace(BIG, "sync", NONE, chunk=CHUNK, slots=slots)
        held = made(traced)
        cache = {(n, 1, BIG.kv_heads, slots, BIG.head_dim) for n in (1, BIG.full_layers)}
        whole = [a for a in held if slots in a.shape]
        assert {a.shape for a in whole} == cache
        assert {a.made_by for a in whole} <= {"scatter", "scan", "jit"}  # updated in place, never converted or computed
        seen = Counter((tuple("S" if n == slots else n for n in a.shape), a.dtype, a.made_by) for a in held)
        return seen, [a for a in held if slots not in a.shape]

    small, _ = temporaries(33 * KV_BLOCK)
    large, held = temporaries(262_144)
    assert small == large  # the same program but for the cache it is given
    attention = [a for a in held if "while" in a.where and "custom_vjp_call" not in a.where]
    assert max(a.size for a in attention) == BIG.q_heads * CHUNK * KV_BLOCK  # scores of one block
    assigned = BIG.experts_per_token * CHUNK
    places = window_places(assigned, BIG.num_experts, choose_windows(CHUNK, BIG.experts_per_token, BIG.num_experts))
    stored = [a for a in held if a.made_by != "bitcast_convert_type"]  # which only gives bits another name
    assert max(a.nbytes for a in stored) == places * BIG.hidden_size * 2  # 79 MiB: the rows of all windows


def test_one_program_serves_every_context():
    """Attention is a loop whose end is computed: where the chunk stands is a value of the cache, not of the program."""
    found = loops(replace(DENSE, layer_pattern=(FULL,)), 64)
    assert len(found) == 2
    for loop in found:
        start, end = loop.invars[loop.params["cond_nconsts"] + loop.params["body_nconsts"] :][:2]
        assert isinstance(start, Literal) and not isinstance(end, Literal)
        assert len(loop.outvars[-1].aval.shape) == 5
