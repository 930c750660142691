"""The loss of the embedded model: the trunk's next token, the drafts of the MTP head, and the balance of the experts.

The MTP head is trained in the way it drafts. Step 1 reads the trunk's hidden states, each further step the head's own
output, and all steps read the true next token. The target is the trunk's own distribution, because a draft counts if it
is the trunk's choice, whatever the text says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.topk_softmax import ExpertChoice
from mtpjax.config import ModelConfig
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model import Positions, decoder, make_positions
from mtpjax.model.cache import KV_BLOCK, new_cache
from mtpjax.model.moe import Moe

ROWS = KV_BLOCK  # tokens of a training window: one block of attention
MTP_WEIGHTS = (0.4, 0.2, 0.15, 0.1)  # of the losses of MTP steps 1, 2, 3, 4
GAIN_SPREAD = 0.7  # standard deviation of log(1 + w) in the norms before the LM head, at the start
BALANCE_WEIGHT = 0.01


def cross_entropy(logits: Float[Array, "B T V"], target: Int[Array, "B T"]) -> Float[Array, ""]:
    """Return the mean over rows, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, target))


def distillation(logits: Float[Array, "B T V"], target: Float[Array, "B T V"]) -> Float[Array, ""]:
    """Return the mean over rows of the cross entropy with `softmax(target)`, in nats; the target gets no gradient."""
    return jnp.mean(optax.softmax_cross_entropy(logits, jax.nn.softmax(jax.lax.stop_gradient(target))))


def spread_gains(model: LoadedModel, seed: int) -> LoadedModel:
    """Give log-normal gains to the two norms whose output the MTP head reads: the final norm and its own.

    Gains of published checkpoints are far from uniform. Training starts with uniform gains, which hardly change in a
    model of this size. Then no measurement could tell whether the head is fed before or after the norms, because it
    normalises its input itself.
    """
    norms = ("norm", "mtp.norm")

    def spread(path: tuple[Any, ...], leaf: Array) -> Array:
        name = ".".join(str(getattr(key, "key", "")) for key in path).strip(".")
        if name not in norms:
            return leaf
        rng = np.random.default_rng([seed, norms.index(name)])
        return jnp.asarray(np.expm1(rng.normal(0.0, GAIN_SPREAD, leaf.shape)), leaf.dtype)

    return replace(model, params=jax.tree_util.tree_map_with_path(spread, model.params))


def balance(p: Float[Array, "N E"], topk_ids: Int[Array, "N K"]) -> Float[Array, ""]:
    """Return the load-balancing loss of Switch Transformer (Fedus et al. 2021, eq. 4).

    It is 1 if all experts get equally many rows. `p` are the router's probabilities, `topk_ids` the chosen experts.
    """
    num_experts = p.shape[1]
    share = jnp.mean(jax.nn.one_hot(topk_ids, num_experts), axis=(0, 1))
    return num_experts * jnp.sum(share * jnp.mean(p, axis=0))


@contextmanager
def recording(seen: list[Array]) -> Iterator[None]:
    """While these patches are on, `Moe.route` leaves its balance loss in `seen`: the model itself returns none.

    The super-blocks are then no jitted calls of their own, so the values belong to the trace that calls the model.
    """
    route = Moe.route

    def recorded(self: Moe, *args: Any) -> ExpertChoice:
        choice = route(self, *args)
        assert choice.probs is not None  # training asks for implementation "xla", which returns them
        seen.append(balance(choice.probs, choice.topk_ids))
        return choice

    with (
        mock.patch.object(Moe, "route", recorded),
        mock.patch.object(decoder, "jitted_super_block", decoder.run_super_block),
    ):
        yield


def fresh(cfg: ModelConfig, batch: int) -> tuple[Any, Positions]:
    """Return an empty cache and positions of `ROWS` rows in it; a static block count makes attention differentiable."""
    zeros = jnp.zeros(batch, jnp.int32)
    return new_cache(cfg, batch, ROWS), make_positions(
        cfg, zeros, ROWS, zeros, kv_len=ROWS, static_kv_blocks=1, implementation="xla"
    )


def losses(
    graph: Any, cfg: ModelConfig, params: Any, tokens: Int[Array, "B T"], steps: int
) -> tuple[Array, dict[str, Array]]:
    """Return the loss of windows of `ROWS + 1 + steps` tokens, and its parts: "lm", "mtp1", ..., "balance"."""
    balance_losses: list[Array] = []
    model = nnx.merge(graph, params)
    cache, where = fresh(cfg, tokens.shape[0])
    with recording(balance_losses):
        y, cache = model.trunk(tokens[:, :ROWS], cache, where)
        hidden = model.final_norm(y, "xla")
        logits = model.head(hidden)
        parts = {"lm": cross_entropy(logits, tokens[:, 1 : ROWS + 1])}
        for step in range(1, steps + 1):
            # The hidden state of row t of step s knows the tokens up to t + s - 1; the row reads token t + s and
            # predicts token t + s + 1. RoPE depends on distances only, so the rows may stay at position t. The trunk
            # predicts the same token at row t + s, which does not exist for the last s rows of a window. Each further
            # step has half as many windows.
            windows = max(1, tokens.shape[0] >> step - 1)
            cache, where = fresh(cfg, windows)
            hidden, _ = model.mtp_step(hidden[:windows], tokens[:windows, step : ROWS + step], cache, where)
            parts[f"mtp{step}"] = distillation(model.head(hidden[:, :-step]), logits[:windows, step:])
    parts["balance"] = jnp.mean(jnp.stack(balance_losses))
    weights = {"lm": 1.0, "balance": BALANCE_WEIGHT} | {f"mtp{s + 1}": w for s, w in enumerate(MTP_WEIGHTS)}
    return sum((weights[name] * part for name, part in parts.items()), jnp.zeros(())), parts


def window_loss(graph: Any, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Return the sum over the rows of -log p(next token), in nats, each window read from an empty cache."""
    model = nnx.merge(graph, params)
    batch, rows = tokens.shape[0], tokens.shape[1] - 1
    zeros = jnp.zeros(batch, jnp.int32)
    where = make_positions(model.cfg, zeros, rows, zeros, kv_len=KV_BLOCK, static_kv_blocks=1, implementation="xla")
    y, _ = model.trunk(tokens[:, :rows], new_cache(model.cfg, batch, KV_BLOCK), where)
    logits = model.head(model.final_norm(y, "xla"))
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))
