"""The loss of the embedded model: the trunk's next token, the MTP head as it drafts, the balance of the experts.

The MTP head is trained as it drafts: step 1 reads the trunk's hidden states, each further step its own output, all with
the true next token. Its target is the trunk's own distribution, because a draft counts when it is the trunk's choice,
whatever the text says.
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
    """Mean over rows, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, target))


def distillation(logits: Float[Array, "B T V"], target: Float[Array, "B T V"]) -> Float[Array, ""]:
    """Mean over rows of the cross entropy with `softmax(target)`, in nats; no gradient enters the target."""
    return jnp.mean(optax.softmax_cross_entropy(logits, jax.nn.softmax(jax.lax.stop_gradient(target))))


def spread_gains(model: LoadedModel, seed: int) -> LoadedModel:
    """Log-normal gains in the two norms whose output the MTP head reads, the final one and its own.

    Those of published checkpoints are far from uniform. Uniform gains, where training starts and nearly stays at this
    size, would hide from every measurement whether the head is fed before or after them: it normalises what it reads.
    """

    places = ("norm", "mtp.norm")

    def spread(path: tuple[Any, ...], leaf: Array) -> Array:
        place = ".".join(str(getattr(key, "key", "")) for key in path).strip(".")
        if place not in places:
            return leaf
        rng = np.random.default_rng([seed, places.index(place)])
        return jnp.asarray(np.expm1(rng.normal(0.0, GAIN_SPREAD, leaf.shape)), leaf.dtype)

    return replace(model, params=jax.tree_util.tree_map_with_path(spread, model.params))


def balance(p: Float[Array, "N E"], chosen: Int[Array, "N K"]) -> Float[Array, ""]:
    """The load-balancing loss of Switch Transformer (Fedus et al. 2021, eq. 4): 1 when every expert gets as much."""
    experts = p.shape[1]
    share = jnp.mean(jax.nn.one_hot(chosen, experts), axis=(0, 1))
    return experts * jnp.sum(share * jnp.mean(p, axis=0))


@contextmanager
def recording(seen: list[Array]) -> Iterator[None]:
    """While these patches are on, `Moe.route` leaves its balance loss in `seen`: the model itself returns none.

    The blocks of layers are then no jitted calls of their own, so the values belong to the trace that calls the model.
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
    """An empty cache and the placement of `ROWS` rows in it; the static block count makes attention differentiable."""
    zeros = jnp.zeros(batch, jnp.int32)
    return new_cache(cfg, batch, ROWS), make_positions(
        cfg, zeros, ROWS, zeros, kv_len=ROWS, static_kv_blocks=1, implementation="xla"
    )


def losses(
    graph: Any, cfg: ModelConfig, params: Any, tokens: Int[Array, "B T"], steps: int
) -> tuple[Array, dict[str, Array]]:
    """The loss of windows of `ROWS + 1 + steps` tokens, and its parts: "lm", "mtp1"..., "balance"."""
    seen: list[Array] = []
    model = nnx.merge(graph, params)
    cache, where = fresh(cfg, tokens.shape[0])
    with recording(seen):
        y, cache = model.trunk(tokens[:, :ROWS], cache, where)
        hidden = model.final_norm(y)
        trunk = model.head(hidden)
        parts = {"lm": cross_entropy(trunk, tokens[:, 1 : ROWS + 1])}
        for step in range(1, steps + 1):
            # Row t of step s: its hidden state knows the tokens up to t + s - 1, reads t + s and predicts t + s + 1.
            # RoPE counts distances only, so the rows may stay at position t. Each further step has half the windows.
            # The trunk predicts that token at row t + s, which the last s rows of a window lack.
            some = max(1, tokens.shape[0] >> step - 1)
            cache, where = fresh(cfg, some)
            hidden, _ = model.mtp_step(hidden[:some], tokens[:some, step : ROWS + step], cache, where)
            parts[f"mtp{step}"] = distillation(model.head(hidden[:, :-step]), trunk[:some, step:])
    parts["balance"] = jnp.mean(jnp.stack(seen))
    weights = {"lm": 1.0, "balance": BALANCE_WEIGHT} | {f"mtp{s + 1}": w for s, w in enumerate(MTP_WEIGHTS)}
    return sum((weights[name] * part for name, part in parts.items()), jnp.zeros(())), parts


def window_loss(graph: Any, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Sum over the rows of -log p(next token), in nats, each window read from nothing."""
    model = nnx.merge(graph, params)
    batch, rows = tokens.shape[0], tokens.shape[1] - 1
    zeros = jnp.zeros(batch, jnp.int32)
    where = make_positions(model.cfg, zeros, rows, zeros, kv_len=KV_BLOCK, static_kv_blocks=1, implementation="xla")
    y, _ = model.trunk(tokens[:, :rows], new_cache(model.cfg, batch, KV_BLOCK), where)
    logits = model.head(model.final_norm(y))
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))
