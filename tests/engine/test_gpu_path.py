"""The programs of a GPU with every kernel interpreted: a packed model in bfloat16, all of whose rows are invariant."""

from collections.abc import Iterator

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
from mtpjax.model.cache import Cache, new_cache
from tests.helpers.models import make_engine, tiny_config

VOCAB = 96


@pytest.fixture(autouse=True)
def interpreted_gpu() -> Iterator[None]:
    """Trace programs for a CUDA device and interpret every kernel in them."""
    with override_platform("cuda", (9, 0), interpret=True):
        yield


def packed_model(mtp: bool) -> LoadedModel:
    """Make a small MoE with eight-bit weights that computes in bfloat16: one DeltaNet layer and one of attention."""
    cfg = tiny_config(
        moe=True,
        hidden_size=64,
        head_dim=16,
        rotary_dim=4,
        linear_k_dim=16,
        linear_v_dim=16,
        vocab_size=VOCAB,
        layer_pattern=(LINEAR, FULL),
        num_superblocks=1,
        num_experts=4,
        expert_size=32,
        shared_expert_size=32,
    )
    if not mtp:
        cfg = cfg.without_mtp()
    return random_model(cfg, quantization="int8", scale=0.3, dtype=jnp.bfloat16)


def random_cache(model: LoadedModel, lengths: list[int]) -> Cache:
    """Make a cache as prompts of these lengths might leave it."""
    rng = np.random.default_rng(1)
    cache = new_cache(model.cfg, len(lengths), 256, dtype=jnp.bfloat16)
    filled = jax.tree.map(lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), cache)
    return filled.replace(length=jnp.asarray(lengths, jnp.int32))


@pytest.mark.slow
def test_rows_do_not_depend_on_the_window_bit_for_bit() -> None:
    """Through every decoding kernel: logits of the first two rows of a window of five, and of a window of two."""
    model = packed_model(mtp=False)
    merged, cache = nnx.merge(model.graph, model.params), random_cache(model, [16, 70])
    window = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, (2, 5)), jnp.int32)
    verify = jax.jit(lambda window, cache: steps.verify(merged, window, jnp.zeros(2, bool), cache)[:2])
    five, two = verify(window, cache), verify(window[:, :2], cache)
    for got, want in zip(two, five, strict=True):
        assert (np.asarray(got) == np.asarray(want[:, :2])).all()
    logits = np.asarray(five[0])
    assert np.isfinite(logits).all() and len(np.unique(logits)) > 100


@pytest.mark.slow
def test_the_text_is_the_same_with_drafts_in_bfloat16() -> None:
    """Greedy, sampled from all tokens and from some, side by side: prompt and loop, with four drafts and without."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, VOCAB, 5 + 9 * i).tolist()) for i in range(3)]
    requests = [
        Request(0, prompts[0], 24, temperature=0.0, seed=50),
        Request(1, prompts[1], 24, temperature=0.9, seed=51),
        Request(2, prompts[2], 24, temperature=0.8, seed=52, top_k=9, top_p=0.9),
    ]
    model = packed_model(mtp=True)
    runs = [make_engine(model, num_speculative_tokens=k, max_model_len=100).run(requests, 3) for k in (0, 4)]
    texts = [[state.tokens for state in run] for run in runs]
    assert texts[0] == texts[1] and len({tuple(text) for text in texts[0]}) == 3
    assert 0 < sum(state.num_accepted_tokens_per_pos[0] for state in runs[1])
