"""The program of a GPU with every kernel interpreted: a packed model in bfloat16, all of whose rows are invariant."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas import grouped_matmul, matmul, top_k_top_p, topk_softmax
from kernels_pallas.platform import override_platform
from mtpjax.config import FULL, LINEAR
from mtpjax.decoding import steps
from mtpjax.engine.request import Request
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.random_init import random_model
from mtpjax.model.cache import new_cache
from tests.helpers.models import make_engine, tiny_config


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of a GPU, interpreted."""
    inter = partial(partial, interpret=True)
    tables: list[tuple[dict[str, Any], Any]] = [
        (matmul.api.KERNELS, inter(matmul.triton.matmul_parts)),
        (grouped_matmul.api.KERNELS, inter(grouped_matmul.triton.grouped_mlp)),
        (grouped_matmul.EACH_KERNELS, inter(grouped_matmul.triton.each_expert)),
        (topk_softmax.KERNELS, inter(topk_softmax.triton.choose_experts)),
    ]
    for table, kernel in tables:
        monkeypatch.setitem(table, "cuda", kernel)


def packed_model(mtp: bool) -> LoadedModel:
    """A small MoE with eight-bit weights, computing in bfloat16."""
    sizes: Any = {
        "hidden_size": 64,
        "head_dim": 16,
        "rotary_dim": 4,
        "linear_k_dim": 16,
        "linear_v_dim": 16,
        "vocab_size": 96,
    }
    sizes |= {
        "layer_pattern": (LINEAR, FULL),
        "num_layers": 2,
        "num_experts": 4,
        "expert_size": 32,
        "shared_expert_size": 32,
    }
    cfg = tiny_config(moe=True, **sizes)
    return random_model(
        cfg if mtp else cfg.without_mtp(), quantization="int8", scale=0.3, dtype=jnp.dtype("bfloat16")
    )


def test_rows_do_not_depend_on_the_window_bit_for_bit(interpreted: None) -> None:
    """Through every kernel: logits of the first rows of a window of five, of two and of four."""
    model = packed_model(mtp=False)
    merged, rng = nnx.merge(model.graph, model.params), np.random.default_rng(2)
    with override_platform("cuda", interpret=True):
        tokens, none = jnp.asarray(rng.integers(0, 96, (2, 16)), jnp.int32), jnp.zeros(2, jnp.int32)
        cache = new_cache(model.cfg, 2, 256, dtype=jnp.bfloat16)
        _, _, cache = jax.jit(lambda t, c: steps.prefill_chunk(merged, t, t, none, c, steps.NO_ROWS))(tokens, cache)
        verify = jax.jit(lambda window, cache: steps.verify(merged, window, jnp.zeros(len(window), bool), cache)[:2])
        window = tokens[:, :5]
        whole = verify(window, cache)
        for rows in (2, 4):
            for got, want in zip(verify(window[:, :rows], cache), whole, strict=True):
                assert (np.asarray(got) == np.asarray(want[:, :rows])).all()
        assert np.isfinite(np.asarray(whole[0])).all() and len(np.unique(np.asarray(whole[0]))) > 100


@pytest.mark.slow
def test_the_text_is_the_same_with_drafts_in_bfloat16(interpreted: None) -> None:
    """Greedy, sampled from all tokens and from some, side by side: prompt, loop and all."""
    rng = np.random.default_rng(0)
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
    ]
    asked = [
        Request(i, tuple(rng.integers(0, 96, 5 + 9 * i).tolist()), 24, way.pop("temperature"), 50 + i, (), **way)
        for i, way in enumerate(ways)
    ]
    with override_platform("cuda", interpret=True):
        model = packed_model(mtp=True)
        runs = [make_engine(model, num_speculative_tokens=draft, max_model_len=100).run(asked, 3) for draft in (1, 4)]
    texts = [[result.tokens for result in run] for run in runs]
    assert texts[0] == texts[1] and len({tuple(text) for text in texts[0]}) == 3
    assert 0 < sum(r.num_accepted_tokens_per_pos[0] for r in runs[1])
