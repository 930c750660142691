"""The counter of operations: what it counts, the turns of loops that only a run knows, and what MTP adds to a prompt."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from checkpoints import TINY
from kernels_pallas.grouped_matmul.plan import choose_windows, plan_windows
from mtpjax.config import ModelConfig
from mtpjax.model import abstract_model, make_positions
from mtpjax.model.cache import KV_BLOCK
from mtpjax.presets import PRESETS
from scripts.benchmarks.count_flops import FIRST, config, flops, main, prompt_flops, table, trace
from scripts.benchmarks.flops import count_flops, expected_trips
from tests.model.test_prefill_programs import ALL, BIG, CHUNK, DENSE, LAST, MOE, NONE, loops, shape


def sync_products(cfg: ModelConfig, chunk: int) -> int:
    """Operations of the products in the MTP head's share of a chunk: fc, k and v."""
    return 2 * chunk * cfg.hidden_size * (2 * cfg.hidden_size + 2 * cfg.kv_heads * cfg.head_dim)


def logits_of_one_row(cfg: ModelConfig) -> float:
    """Operations of the LM head; a row alone is multiplied as two, so that it has the bits that it has among others."""
    graph, params = nnx.split(abstract_model(cfg, jnp.bfloat16))
    head = jax.make_jaxpr(lambda params, hidden: nnx.merge(graph, params).head(hidden))
    return count_flops(head(params, shape(1, 1, cfg.hidden_size, dtype=jnp.bfloat16))).by_primitive["dot_general"]


@pytest.mark.parametrize("rows", [NONE, LAST], ids=["none", "last"])
def test_mtp_is_free_at_prefill_of_35b(rows):
    """Against a chunk without the head whose last layer returns every row, too."""
    off, on = (trace(BIG, v, r, chunk=CHUNK, slots=262_144).jaxpr for v, r in (("off", FIRST), ("sync", rows)))
    missing = 0 if rows.count(CHUNK) else logits_of_one_row(BIG)
    for context in (CHUNK, 8192, 262_144):
        before, after = (count_flops(p, expected_trips(BIG, rows=CHUNK, context=context)) for p in (off, on))
        assert 1 < after.total / before.total <= 1.01
        extra = after.by_primitive["dot_general"] - before.by_primitive["dot_general"]
        assert extra + missing == pytest.approx(sync_products(BIG, CHUNK), rel=1e-6)


def test_all_rows_and_the_whole_layer_are_not_free():
    ratios = {(rows, variant): ratio for rows, variant, _, _, ratio in table(BIG, chunk=CHUNK, context=8192)}
    assert ratios["none", "off"] < 0.97  # without the last layer's rows, which only the MTP head reads
    assert ratios["none", "sync"] <= 1.01
    assert ratios["none", "layer"] > 1.03
    assert ratios["all", "off"] > 1.1
    assert ratios["all", "layer"] > 1.25


def test_mtp_share_of_the_tiny_model():
    """Beside so few layers the head's fc, k and v are a visible share, and nothing else is added."""
    cfg, chunk = config(str(TINY)), 512
    # The last layer returns every row, with the head or without.
    off, on = (flops(cfg, variant, FIRST, chunk=chunk, context=chunk) for variant in ("off", "sync"))
    assert on.by_primitive["dot_general"] - off.by_primitive["dot_general"] == pytest.approx(sync_products(cfg, chunk))
    assert 1 < on.total / off.total < 1.1
    whole = flops(cfg, "layer", ALL, chunk=chunk, context=chunk)
    assert whole.total / off.total > 1.5
    # An inner chunk without MTP needs only keys and values of the last of its layers; with MTP all of it.
    inner = [flops(cfg, variant, NONE, chunk=chunk, context=chunk).total for variant in ("off", "sync")]
    assert 1.1 < inner[1] / inner[0] < 1.5


@pytest.mark.parametrize("name", [str(TINY), "35b-a3b"])
def test_a_head_that_reads_the_last_tokens_is_free_at_prefill(name):
    """Of a whole prompt, against MTP off as the engine runs it: without the last layer's unread rows."""
    cfg = config(name)
    ratios = {}
    for read in (None, 64, 0):
        off, on = prompt_flops(cfg, prompt=8192, chunk=512, mtp_prompt_tokens=read)
        ratios[read] = on / off
    assert ratios[0] == 1
    assert 1 < ratios[64] <= 1.01
    assert ratios[None] > 1.03


def test_operations_of_a_dense_model_are_those_of_its_weights_and_attention():
    cfg, chunk = PRESETS["0.8b"].without_mtp(), 1024
    products = [
        flops(cfg, "off", FIRST, chunk=chunk, context=context).by_primitive["dot_general"]
        for context in (1024, 1025, 1024 + KV_BLOCK)
    ]
    block = cfg.full_layers * 4 * cfg.q_heads * cfg.head_dim * chunk * KV_BLOCK
    assert products[1] - products[0] == products[2] - products[0] == block
    leaves = jax.tree.leaves(nnx.split(abstract_model(cfg).decoder)[1])
    weights = sum(leaf.size for leaf in leaves if leaf.ndim == 3 and leaf.shape[-1] != cfg.conv_width)
    rest = products[0] - 4 * block - logits_of_one_row(cfg) - 2 * chunk * weights  # the recurrence of DeltaNet
    assert 0 < rest < 0.15 * products[0]


def test_operations_of_loops_branches_and_calls():
    m = shape(4, 5), shape(5, 6)
    product = 2 * 4 * 5 * 6

    def total(f, *args, **kwargs):
        return count_flops(jax.make_jaxpr(f)(*args), **kwargs).total

    assert total(jnp.dot, *m) == product
    assert total(lambda a, b: jnp.einsum("nij,njk->nik", a, b), shape(3, 4, 5), shape(3, 5, 6)) == 3 * product
    assert total(jax.jit(lambda a, b: jnp.exp(a @ b) * 2), *m) == product + 24 + 24
    assert total(lambda x: (jnp.sum(x), jnp.max(x), jnp.cumsum(x)), shape(9)) == 9 + 9 + 9
    assert total(lambda x: jnp.transpose(x)[::-1].astype(jnp.bfloat16), shape(2, 3)) == 0
    assert total(lambda i: i * i + 1, shape(9, dtype=jnp.int32)) == 0
    assert total(lambda x, i: x.at[i].add(1.0), shape(9), shape(3, dtype=jnp.int32)) == 3
    scan = lambda a, b: lax.scan(lambda c, _: (jnp.tanh(c), c @ b), a, None, length=7)  # noqa: E731
    assert total(scan, *m) == 7 * (product + 20)
    assert total(lambda a, b: scan(a, b)[0], *m) == 7 * 20  # the products go nowhere
    assert total(jax.checkpoint(jnp.sin), shape(3)) == 3
    branches = lambda x: lax.cond(x[0] > 0, lambda y: y * 2, lambda y: y * 2 + 1, x)  # noqa: E731
    assert total(branches, shape(8)) == 1 + 16
    loop = lambda x, n: lax.fori_loop(0, n, lambda i, y: y * x, x)  # noqa: E731
    assert total(loop, shape(8), shape(dtype=jnp.int32), while_trips=lambda eqn: 2.5) == 20
    with pytest.raises(ValueError, match="while loop that carries .*float32.*give while_trips"):
        total(loop, shape(8), shape(dtype=jnp.int32))
    with pytest.raises(ValueError, match="'erf_inv_'|'igamma'.*not known"):
        total(jax.scipy.special.gammainc, shape(2), shape(2))


# The loops whose number of turns is known only when they run


@pytest.mark.parametrize("rows", [1, 20, 40, 300])
def test_expected_expert_windows_are_the_mean_of_random_routing(rows):
    experts, k, draws = 6, 2, 400
    sizes = choose_windows(rows, k, experts)
    chosen = np.argsort(np.random.default_rng(0).random((draws, rows, experts)), axis=-1)[..., :k]
    first = jax.jit(jax.vmap(lambda c: plan_windows(c, jnp.ones(rows, bool), experts, sizes).first))(chosen)
    cfg = replace(MOE, num_experts=experts, experts_per_token=k)
    found = [e for e in loops(cfg, rows) if len(e.outvars[-1].aval.shape) == 2]
    assert len(found) > len(sizes)  # those of the first layer, whose rows are all read, and of the second
    trips = expected_trips(cfg, rows=rows, context=1)
    assert [trips(e) for e in found[: len(sizes)]] == pytest.approx(np.mean(np.diff(first), axis=0), rel=0.02, abs=0.05)


def test_attention_turns_are_the_blocks_that_placement_asks_for():
    at = jax.jit(
        lambda start: make_positions(DENSE, start[None], 100, jnp.zeros(1, jnp.int32), kv_len=2048).num_kv_blocks
    )
    loop = next(e for e in loops(DENSE, 100) if len(e.outvars[-1].aval.shape) == 5)
    for start in (0, 155, 156, 157, 900):
        assert expected_trips(DENSE, rows=100, context=start + 100)(loop) == at(start)


def test_trip_counts_are_not_guessed():
    expert = next(e for e in loops(MOE, 40) if len(e.outvars[-1].aval.shape) == 2)
    with pytest.raises(ValueError, match="neither attention nor the experts of 400 rows"):
        expected_trips(MOE, rows=400, context=1)(expert)
    with pytest.raises(ValueError, match="neither attention nor the experts"):
        expected_trips(DENSE, rows=40, context=1)(expert)


# The script


def test_script_prints_the_table(monkeypatch, capsys):
    def run(*args: str) -> None:
        monkeypatch.setattr("sys.argv", ["count_flops.py", *args])
        main()

    run("--model", str(TINY), "--chunk", "64", "--context", "64")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 12
    assert lines[8].endswith("| 1.0000 | 1.0000 |")
    for args, error in (
        (["--model", "35b"], "no preset '35b'; there are: 0.8b"),
        (["--chunk", "64", "--context", "63"], "--chunk is 64; expected 1 ... --context = 63"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*args)
        assert error in capsys.readouterr().err
