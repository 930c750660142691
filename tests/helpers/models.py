"""Tiny models for tests, made without random-number programs, and the golden cases."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints import SafetensorsDirectory, write_safetensors_directory
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.engine.engine import Engine
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.loading.load import load_model
from mtpjax.loading.loaded_model import LoadedModel, ParamPath, map_params
from mtpjax.model import abstract_model, make_positions
from mtpjax.model.cache import KV_BLOCK, new_cache
from tests.golden.weights import golden_config, golden_tensors

cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU backend")

GOLDEN = Path(__file__).parent.parent / "golden"


class Golden:
    """One golden case: the answers of transformers, and the model written as a checkpoint."""

    def __init__(self, case: str, folder: Path) -> None:
        self.case, self.path = case, folder / case
        with np.load(GOLDEN / f"{case}.npz") as file:
            self.answers: dict[str, np.ndarray] = dict(file)
        self.tensors = golden_tensors(case)
        entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in self.tensors.items()]
        write_safetensors_directory(self.path, golden_config(case), entries)
        assert json.loads(str(self.answers["config"])) == golden_config(case), f"{case}: config changed, run make.py"

    def __getitem__(self, name: str) -> np.ndarray:
        return self.answers[name]

    def model(self) -> LoadedModel:
        return load_model(SafetensorsDirectory(self.path))


# Sizes of `tiny_config` with which matrices consist of whole groups, so that they can be packed.
PACKABLE_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 32,
    "rotary_dim": 8,
    "linear_k_dim": 32,
    "linear_v_dim": 32,
    "expert_size": 32,
    "shared_expert_size": 32,
    "vocab_size": 128,
}


def tiny_config(
    *, moe: bool, layer_pattern: tuple[str, ...] = (LINEAR, FULL), num_superblocks: int = 2, **sizes: Any
) -> ModelConfig:
    """Make a config of a few thousand parameters with every part of the architecture; its last id is the stop token.

    `sizes` are fields of `ModelConfig`, which override these.
    """
    fields: dict[str, Any] = {
        "hidden_size": 48,
        "num_layers": len(layer_pattern) * num_superblocks,
        "layer_pattern": layer_pattern,
        "q_heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "rope_theta": 1e7,
        "linear_k_heads": 2,
        "linear_v_heads": 4,
        "linear_k_dim": 16,
        "linear_v_dim": 16,
        "conv_width": 4,
        "vocab_size": 96,
    }
    experts = {"num_experts": 8, "experts_per_token": 2, "expert_size": 16, "shared_expert_size": 24}
    fields |= experts if moe else {"mlp_size": 64}
    fields |= sizes
    return ModelConfig(stop_token_ids=(fields["vocab_size"] - 1,), **fields)


def numpy_model(cfg: ModelConfig, *, seed: int = 0, scale: float = 0.15) -> LoadedModel:
    """Make a model with random float32 weights from numpy.

    `random_model` compiles a program for each leaf, which takes longer than most tests. Here, too, matrices are normal
    with deviation `scale` and decay rates as in Mamba-2; norms are near neutral.
    """
    graph, params = nnx.split(abstract_model(cfg))
    rng = np.random.default_rng(seed)

    def make(path: ParamPath, leaf: Any) -> jax.Array:
        name, shape = str(path[-1]), leaf.shape
        if name == "a_log":
            values = np.log(rng.uniform(1.0, 16.0, shape))
        elif name == "dt_bias":
            values = np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))))
        elif name == "conv":
            values = rng.uniform(-0.5, 0.5, shape)
        elif name.endswith("norm"):
            values = float(path[-2:] == ("mixer", "norm")) + 0.1 * rng.normal(size=shape)
        else:
            values = scale * rng.normal(size=shape)
        return jnp.asarray(values, leaf.dtype)

    return LoadedModel(cfg, graph, map_params(params, make))


@partial(jax.jit, static_argnames="graph")
def whole(params: Any, tokens: jax.Array, *, graph: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute logits and hidden states of one chunk, and the MTP head's logits of its pairs (row t, token t + 1)."""
    model = nnx.merge(graph, params)
    zero, none = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    cache = new_cache(model.cfg, 1, KV_BLOCK)
    rows, cache = model.trunk(tokens[None], cache, make_positions(model.cfg, zero, len(tokens), none, kv_len=KV_BLOCK))
    hidden = model.final_norm(rows)
    pairs = make_positions(model.cfg, zero, len(tokens) - 1, none, kv_len=KV_BLOCK)
    mtp, cache = model.mtp_step(hidden[:, :-1], tokens[None, 1:], cache, pairs)
    return model.head(hidden)[0], hidden[0], model.head(mtp)[0]


def rounded_to_bfloat16(model: LoadedModel) -> LoadedModel:
    """Return the same weights, matrices rounded to bfloat16 and computed in it."""
    graph, like = nnx.split(abstract_model(model.cfg, jnp.bfloat16))
    return LoadedModel(model.cfg, graph, jax.tree.map(lambda leaf, new: leaf.astype(new.dtype), model.params, like))


def make_engine(
    model: LoadedModel,
    *,
    max_model_len: int = 250,
    prefill_buckets: tuple[int, ...] = (32,),
    max_prefill_seqs: int | None = None,
    **runner: Any,
) -> Engine:
    """Make a float32 engine; other arguments are those of `ModelRunner`."""
    settings: dict[str, Any] = {"cache_dtype": jnp.dtype("float32")} | runner
    runner_of_model = ModelRunner(model, max_model_len=max_model_len, prefill_buckets=prefill_buckets, **settings)
    return Engine(runner_of_model, max_prefill_seqs=max_prefill_seqs)
