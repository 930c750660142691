"""The program of a GPU with every kernel interpreted: a packed model in bfloat16, all of whose rows are invariant."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.platform import override_platform
from mtpjax.config import FULL, LINEAR
from mtpjax.decoding import steps
from mtpjax.engine.request import Request
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.random_init import random_model
from mtpjax.model.cache import new_cache
from tests.helpers.models import make_engine, tiny_config


def packed_model(mtp: bool) -> LoadedModel:
    """Return a small MoE with eight-bit weights that computes in bfloat16."""
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
    return random_model(cfg if mtp else cfg.without_mtp(), quantization="int8", scale=0.3, dtype=jnp.dtype("bfloat16"))


@pytest.mark.slow
def test_rows_do_not_depend_on_the_window_bit_for_bit() -> None:
    """Through every kernel, the logits of the first rows of a window of five are those of shorter windows."""
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
            for actual, expected in zip(verify(window[:, :rows], cache), whole, strict=True):
                assert (np.asarray(actual) == np.asarray(expected[:, :rows])).all()
        assert np.isfinite(np.asarray(whole[0])).all() and len(np.unique(np.asarray(whole[0]))) > 100


@pytest.mark.slow
def test_the_text_is_the_same_with_drafts_in_bfloat16() -> None:
    """Requests are greedy, sampled from all tokens, and sampled from some; prompt and loop run through every kernel."""
    rng = np.random.default_rng(0)
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
    ]
    requests = [
        Request(i, tuple(rng.integers(0, 96, 5 + 9 * i).tolist()), 24, option.pop("temperature"), 50 + i, (), **option)
        for i, option in enumerate(options)
    ]
    with override_platform("cuda", interpret=True):
        model = packed_model(mtp=True)
        runs = [
            make_engine(model, num_speculative_tokens=draft, max_model_len=100).run(requests, 3) for draft in (1, 4)
        ]
    texts = [[result.tokens for result in run] for run in runs]
    assert texts[0] == texts[1] and len({tuple(text) for text in texts[0]}) == 3
    assert 0 < sum(r.num_accepted_tokens_per_pos[0] for r in runs[1])
