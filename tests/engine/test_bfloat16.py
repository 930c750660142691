"""What bfloat16 must not cost on a CPU, whose XLA backend computes and slices it in float32; and that it still agrees."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.grouped_matmul import expert_mlp
from mtpjax import LLM, SamplingParams
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.load import cache_dtype
from mtpjax.loading.weight_map import LoadedModel
from mtpjax.model import abstract_model
from tests.helpers.models import cpu_only, numpy_model, tiny_config

EXPERTS, CHOSEN, SIZE, HIDDEN, ROWS = 8, 2, 24, 40, 56


def arguments(rows: int = ROWS):  # type: ignore[no-untyped-def]
    """Rows and both stacks in bfloat16, chosen experts and weights."""
    rng = np.random.default_rng(0)
    x, gate_up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((rows, HIDDEN), (1, EXPERTS, 2 * SIZE, HIDDEN), (1, EXPERTS, HIDDEN, SIZE))
    )
    chosen = jnp.asarray(np.argsort(rng.random((rows, EXPERTS)), axis=1)[:, :CHOSEN])
    return x, gate_up, down, chosen, jnp.asarray(rng.random((rows, CHOSEN)), jnp.float32)


@jax.jit
def run(x, gate_up, down, chosen, weights):  # type: ignore[no-untyped-def]
    return expert_mlp(x, gate_up, down, jnp.int32(0), chosen, weights, jnp.ones(len(x), bool))


def bfloat16(model: LoadedModel) -> LoadedModel:
    """The same weights, matrices rounded to bfloat16 and computed in it."""
    graph, like = nnx.split(abstract_model(model.cfg, jnp.bfloat16))
    return LoadedModel(model.cfg, graph, jax.tree.map(lambda leaf, new: leaf.astype(new.dtype), model.params, like))


def bits(stack):  # type: ignore[no-untyped-def]
    return jnp.asarray(np.asarray(stack).view(np.uint16))


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

    def types(*stacks_given):  # type: ignore[no-untyped-def]
        return set(stacks.findall(run.lower(x, *stacks_given, *rest).compile().as_text()))

    assert types(bits(gate_up), bits(down)) == {"u16"}
    plain = types(gate_up, down)  # what happens otherwise, and that this test would see it
    assert "bf16" in plain and ("f32" in plain) == (jax.__version_info__ < (0, 11))  # XLA stopped converting with 0.11


@cpu_only
def test_the_engine_holds_experts_as_bits_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtpjax.loading.cpu_layout.SMALL_WEIGHT", 0)
    model = bfloat16(numpy_model(tiny_config(moe=True, num_superblocks=1)))
    held = optimize_for_cpu(model)
    stacks = [leaf for leaf in jax.tree.leaves(held.params) if leaf.dtype == jnp.uint16]
    layers = model.cfg.num_layers + model.cfg.mtp_layers
    assert len(stacks) == 2 * layers and all(leaf.ndim == 4 for leaf in stacks)
    assert not any(leaf.dtype == jnp.uint16 for leaf in jax.tree.leaves(model.params))
    assert cache_dtype(jnp.bfloat16) == jnp.float32


def test_bfloat16_follows_float32() -> None:
    """The same weights in both dtypes: logits agree to bfloat16's rounding, prompts of one token and of many generate."""
    cfg = tiny_config(moe=True, num_superblocks=1)
    model = numpy_model(cfg)
    llms = [
        LLM(model, num_speculative_tokens=2, max_model_len=96),
        LLM(bfloat16(model), num_speculative_tokens=2, dtype="bfloat16", max_model_len=96),
    ]
    prompts = [[5], np.random.default_rng(1).integers(0, cfg.vocab_size, 40).tolist()]
    exact, rounded = (llm.logits(prompts[1]) for llm in llms)
    assert np.abs(exact - rounded).max() <= 0.1 * np.abs(exact).max()
    outputs = llms[1].generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
    assert [len(o.token_ids) for o in outputs] == [8, 8]
    assert nnx.merge(llms[1].engine.model.graph, llms[1].engine.model.params).compute_dtype == jnp.bfloat16
