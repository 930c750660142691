"""bfloat16 on a CPU: XLA computes and slices it in float32, which must not copy weights; and it follows float32."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import fused_moe
from kernels_pallas.weights import BitcastBfloat16
from mtpjax import LLM, SamplingParams
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.load import cache_dtype
from tests.helpers.models import cpu_only, numpy_model, rounded_to_bfloat16, tiny_config

EXPERTS, CHOSEN, SIZE, HIDDEN, ROWS = 8, 2, 24, 40, 56


def arguments(rows: int = ROWS) -> tuple[jax.Array, ...]:
    """Return rows and both stacks of experts in bfloat16, the chosen experts and their weights."""
    rng = np.random.default_rng(0)
    x, gate_up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((rows, HIDDEN), (1, EXPERTS, 2 * SIZE, HIDDEN), (1, EXPERTS, HIDDEN, SIZE))
    )
    chosen = jnp.asarray(np.argsort(rng.random((rows, EXPERTS)), axis=1)[:, :CHOSEN])
    return x, gate_up, down, chosen, jnp.asarray(rng.random((rows, CHOSEN)), jnp.float32)


@jax.jit
def run(x: Any, gate_up: Any, down: Any, chosen: Any, weights: Any) -> jax.Array:
    return fused_moe(x, gate_up, down, jnp.int32(0), chosen, weights, jnp.ones(len(x), bool))


def bits(stack: jax.Array) -> BitcastBfloat16:
    return BitcastBfloat16(jnp.asarray(np.asarray(stack).view(np.uint16)))


@pytest.mark.parametrize("rows", [1, 3, ROWS])
def test_experts_as_bits_give_the_same_rows(rows: int) -> None:
    x, gate_up, down, *rest = arguments(rows)
    plain, packed = run(x, gate_up, down, *rest), run(x, bits(gate_up), bits(down), *rest)
    assert packed.dtype == jnp.bfloat16 and np.array_equal(plain, packed) and np.asarray(plain, np.float32).any()


@cpu_only
def test_experts_as_bits_are_never_converted_whole() -> None:
    """No array of the compiled program is a stack of experts in another type than it came in."""
    x, gate_up, down, *rest = arguments()
    stacks = re.compile(rf"(\w+)\[1,{EXPERTS},(?:{2 * SIZE},{HIDDEN}|{HIDDEN},{SIZE})\]")

    def types(*stacks_given: jax.Array | BitcastBfloat16) -> set[str]:
        return set(stacks.findall(str(run.lower(x, *stacks_given, *rest).compile().as_text())))

    assert types(bits(gate_up), bits(down)) == {"u16"}
    plain = types(gate_up, down)  # without bits the copy is there, and this test sees it
    assert "bf16" in plain and ("f32" in plain) == (jax.__version_info__ < (0, 11))  # XLA stopped converting with 0.11


@cpu_only
def test_the_engine_holds_experts_as_bits_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtpjax.loading.cpu_layout.MAX_WEIGHT_ELEMENTS", 0)
    model = rounded_to_bfloat16(numpy_model(tiny_config(moe=True, num_superblocks=1)))
    held = optimize_for_cpu(model)
    stacks = [leaf for leaf in jax.tree.leaves(held.params) if leaf.dtype == jnp.uint16]
    layers = model.cfg.num_layers + model.cfg.mtp_layers
    assert len(stacks) == 2 * layers and all(leaf.ndim == 4 for leaf in stacks)
    assert not any(leaf.dtype == jnp.uint16 for leaf in jax.tree.leaves(model.params))
    assert cache_dtype(jnp.bfloat16) == jnp.float32


@pytest.mark.slow
def test_bfloat16_follows_float32_and_drafts_do_not_change_its_text() -> None:
    """The same weights in both dtypes, and prompts of one token and of many."""
    model = numpy_model(tiny_config(moe=True, num_superblocks=1))
    rounded = rounded_to_bfloat16(model)
    sizes: dict[str, Any] = {"max_model_len": 96, "prefill_buckets": (64,)}
    exact = LLM(model, num_speculative_tokens=0, **sizes)
    plain, drafting = (LLM(rounded, num_speculative_tokens=k, **sizes) for k in (0, 2))
    assert {llm.engine.runner.compute_dtype for llm in (plain, drafting)} == {jnp.dtype(jnp.bfloat16)}
    prompts = [[5], np.random.default_rng(1).integers(0, model.cfg.vocab_size, 40).tolist()]
    want, got = (llm.logits(prompts[1]) for llm in (exact, plain))
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))  # 1.6 %: a few of the 2^-9 that a rounding may cost
    assert 1e-3 < error < 3e-2
    params = SamplingParams(max_tokens=40, temperature=0.9, ignore_eos=True)
    without, with_drafts = (llm.generate(prompts, params) for llm in (plain, drafting))
    assert [output.token_ids for output in with_drafts] == [output.token_ids for output in without]
    assert sum(output.metrics.num_accepted_tokens for output in with_drafts) > 0
