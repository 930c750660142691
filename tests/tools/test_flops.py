"""The counter of operations: what it counts, loops whose trip count only a run knows, and what MTP adds to a prompt."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from checkpoints import TINY
from kernels_pallas.grouped_matmul.plan import align_windows, choose_window_sizes
from mtpjax.config import ModelConfig
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.model import abstract_model, make_positions
from mtpjax.model.cache import KV_BLOCK
from mtpjax.presets import PRESETS
from scripts.benchmarks.count_flops import FIRST, config, flops, main, prompt_flops, table, trace
from scripts.benchmarks.flops import count_flops
from scripts.benchmarks.while_trip_counts import while_trip_counts
from tests.helpers.programs import ALL, BIG, BIG_CHUNK, DENSE, LAST, MOE, NONE, abstract, while_loops


def mtp_products(cfg: ModelConfig, chunk: int) -> int:
    """Return the operations of the products in the MTP head's share of a chunk: fc, k and v."""
    return 2 * chunk * cfg.hidden_size * (2 * cfg.hidden_size + 2 * cfg.kv_heads * cfg.head_dim)


def logits_of_one_row(cfg: ModelConfig) -> float:
    """Return the operations of the LM head for one row, which `linear` multiplies as two rows."""
    graph, params = nnx.split(abstract_model(cfg, jnp.bfloat16))
    head = jax.make_jaxpr(lambda params, hidden: nnx.merge(graph, params).head(hidden))
    hidden = abstract(1, 1, cfg.hidden_size, dtype=jnp.bfloat16)
    return count_flops(head(params, hidden)).by_primitive["dot_general"]


@pytest.mark.parametrize("rows", [NONE, LAST], ids=["none", "last"])
def test_mtp_is_free_at_prefill_of_35b(rows: OutputRows) -> None:
    """Compared with a chunk without the head whose last layer runs on every row, too."""
    off, on = (
        trace(BIG, variant, output_rows, chunk=BIG_CHUNK, kv_len=262_144).jaxpr
        for variant, output_rows in (("off", FIRST), ("sync", rows))
    )
    fewer_logits = 0 if rows.count(BIG_CHUNK) else logits_of_one_row(BIG)
    for context in (BIG_CHUNK, 8192, 262_144):
        trip_counts = while_trip_counts(BIG, rows=BIG_CHUNK, context=context)
        before, after = (count_flops(program, trip_counts) for program in (off, on))
        assert 1 < after.total / before.total <= 1.01
        extra = after.by_primitive["dot_general"] - before.by_primitive["dot_general"]
        assert extra + fewer_logits == pytest.approx(mtp_products(BIG, BIG_CHUNK), rel=1e-6)


def test_all_rows_and_the_whole_layer_are_not_free() -> None:
    ratios = {(rows, variant): ratio for rows, variant, _, _, ratio in table(BIG, chunk=BIG_CHUNK, context=8192)}
    assert ratios["none", "off"] < 0.97  # without the rows of the last layer that only the MTP head reads
    assert ratios["none", "sync"] <= 1.01
    assert ratios["none", "layer"] > 1.03
    assert ratios["all", "off"] > 1.1
    assert ratios["all", "layer"] > 1.25


def test_mtp_share_of_the_tiny_model() -> None:
    """Beside so few layers the head's fc, k and v are a visible share, and nothing else is added."""
    cfg, chunk = config(str(TINY)), 512
    off, on = (flops(cfg, variant, FIRST, chunk=chunk, context=chunk) for variant in ("off", "sync"))
    assert on.by_primitive["dot_general"] - off.by_primitive["dot_general"] == pytest.approx(mtp_products(cfg, chunk))
    assert 1 < on.total / off.total < 1.1
    whole_layer = flops(cfg, "layer", ALL, chunk=chunk, context=chunk)
    assert whole_layer.total / off.total > 1.5
    # An inner chunk without MTP needs only keys and values of the last of its layers; with MTP all of it.
    inner_off, inner_on = (flops(cfg, v, NONE, chunk=chunk, context=chunk).total for v in ("off", "sync"))
    assert 1.1 < inner_on / inner_off < 1.5


@pytest.mark.parametrize("name", [str(TINY), "35b-a3b"], ids=["tiny", "35b-a3b"])
def test_a_head_that_reads_the_last_tokens_is_free_at_prefill(name: str) -> None:
    """Of a whole prompt, compared with MTP off as the engine runs it: without the last layer's unread rows."""
    ratios = {}
    for tokens in (None, 64, 0):
        off, on = prompt_flops(config(name), prompt=8192, chunk=512, mtp_prompt_tokens=tokens)
        ratios[tokens] = on / off
    assert ratios[0] == 1
    assert 1 < ratios[64] <= 1.01
    assert ratios[None] > 1.03


def test_operations_of_a_dense_model_are_those_of_its_weights_and_attention() -> None:
    """Every layer counts, although all super-blocks share one traced function."""
    cfg, chunk = PRESETS["0.8b"].without_mtp(), 1024
    products = [
        flops(cfg, "off", FIRST, chunk=chunk, context=context).by_primitive["dot_general"]
        for context in (1024, 1025, 1024 + KV_BLOCK)
    ]
    attention_block = cfg.full_layers * 4 * cfg.q_heads * cfg.head_dim * chunk * KV_BLOCK
    assert products[1] - products[0] == products[2] - products[0] == attention_block
    leaves = jax.tree.leaves(nnx.split(abstract_model(cfg).decoder)[1])
    weights = sum(leaf.size for leaf in leaves if leaf.ndim == 3 and leaf.shape[-1] != cfg.conv_width)
    recurrence = products[0] - 4 * attention_block - logits_of_one_row(cfg) - 2 * chunk * weights
    assert 0 < recurrence < 0.15 * products[0]


def total(f: Callable[..., Any], *args: Any, **options: Any) -> float:
    return count_flops(jax.make_jaxpr(f)(*args), **options).total


MATRICES = abstract(4, 5), abstract(5, 6)
PRODUCT = 2 * 4 * 5 * 6


def test_operations_of_equations() -> None:
    integers = abstract(9, dtype=jnp.int32)
    assert total(jnp.dot, *MATRICES) == PRODUCT
    batched = abstract(3, 4, 5), abstract(3, 5, 6)
    assert total(lambda a, b: jnp.einsum("nij,njk->nik", a, b), *batched) == 3 * PRODUCT
    assert total(lambda x: (jnp.sum(x), jnp.max(x), jnp.cumsum(x)), abstract(9)) == 9 + 9 + 9
    assert total(lambda x: jnp.transpose(x)[::-1].astype(jnp.bfloat16), abstract(2, 3)) == 0
    assert total(lambda i: i * i + 1, integers) == 0
    assert total(lambda x, i: x.at[i].add(1.0), abstract(9), abstract(3, dtype=jnp.int32)) == 3
    with pytest.raises(ValueError, match="'erf_inv_'|'igamma'.*not known"):
        total(jax.scipy.special.gammainc, abstract(2), abstract(2))


def test_operations_of_loops_branches_and_calls() -> None:
    function = jax.jit(lambda a, b: jnp.exp(a @ b) * 2)
    assert total(function, *MATRICES) == PRODUCT + 24 + 24
    assert total(lambda a, b: (function(a, b), function(a, b)), *MATRICES) == 2 * (PRODUCT + 24 + 24)
    assert total(jax.checkpoint(jnp.sin), abstract(3)) == 3
    scan = lambda a, b: lax.scan(lambda c, _: (jnp.tanh(c), c @ b), a, None, length=7)  # noqa: E731
    assert total(scan, *MATRICES) == 7 * (PRODUCT + 20)
    assert total(lambda a, b: scan(a, b)[0], *MATRICES) == 7 * 20  # no output depends on the products
    branches = lambda x: lax.cond(x[0] > 0, lambda y: y * 2, lambda y: y * 2 + 1, x)  # noqa: E731
    assert total(branches, abstract(8)) == 1 + 16
    loop = lambda x, n: lax.fori_loop(0, n, lambda i, y: y * x, x)  # noqa: E731
    n = abstract(dtype=jnp.int32)
    assert total(loop, abstract(8), n, while_trip_counts=lambda eqn: 2.5) == 20
    with pytest.raises(ValueError, match="while loop that carries .*float32.*give while_trip_counts"):
        total(loop, abstract(8), n)


# Loops whose trip count is known only at run time


@pytest.mark.parametrize("rows", [1, 20, 40, 300])
def test_expected_expert_windows_are_the_mean_of_random_routing(rows: int) -> None:
    experts, k, draws = 6, 2, 400
    sizes = choose_window_sizes(rows, k, experts)
    chosen = np.argsort(np.random.default_rng(0).random((draws, rows, experts)), axis=-1)[..., :k]
    first = jax.jit(jax.vmap(lambda c: align_windows(c, experts, sizes).first))(chosen)
    cfg = replace(MOE, num_experts=experts, experts_per_token=k)
    loops = [e for e in while_loops(cfg, rows) if len(e.outvars[-1].aval.shape) == 2]
    assert len(loops) > len(sizes)  # those of the first layer, whose rows are all read, and of the second
    trip_count = while_trip_counts(cfg, rows=rows, context=1)
    expected = np.mean(np.diff(first), axis=0)
    assert [trip_count(e) for e in loops[: len(sizes)]] == pytest.approx(expected, rel=0.02, abs=0.05)


def test_attention_iterates_over_the_blocks_that_positions_ask_for() -> None:
    no_padding = jnp.zeros(1, jnp.int32)
    num_blocks = jax.jit(lambda start: make_positions(DENSE, start[None], 100, no_padding, kv_len=2048).num_kv_blocks)
    loop = next(e for e in while_loops(DENSE, 100) if len(e.outvars[-1].aval.shape) == 5)
    for start in (0, 155, 156, 157, 900):
        assert while_trip_counts(DENSE, rows=100, context=start + 100)(loop) == num_blocks(start)


def test_trip_counts_of_unknown_loops_are_an_error() -> None:
    experts = next(e for e in while_loops(MOE, 40) if len(e.outvars[-1].aval.shape) == 2)
    with pytest.raises(ValueError, match="neither attention nor the experts of 400 rows"):
        while_trip_counts(MOE, rows=400, context=1)(experts)
    with pytest.raises(ValueError, match="neither attention nor the experts"):
        while_trip_counts(DENSE, rows=40, context=1)(experts)


# The script


def test_script_prints_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> None:
        monkeypatch.setattr("sys.argv", ["count_flops.py", *args])
        main()

    run("--model", str(TINY), "--chunk", "64", "--context", "64")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 12
    assert lines[2 + 9].split(" | ")[1:3] == ["first", "off"] and lines[2 + 9].endswith("| 1.0000 | 1.0000 |")
    for args, error in (
        (["--model", "35b"], "no preset '35b'; there are: 0.8b"),
        (["--chunk", "64", "--context", "63"], "--chunk is 64; expected 1 ... --context = 63"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*args)
        assert error in capsys.readouterr().err
