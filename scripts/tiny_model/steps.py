"""Training steps of the embedded model: the optimiser, the learning rate and the moving average of the weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from mtpjax.config import ModelConfig
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model import abstract_model
from scripts.tiny_model import data
from scripts.tiny_model.loss import ROWS, losses
from scripts.tiny_model.state import Plan

WEIGHT_DECAY, CLIP = 0.1, 1.0
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _name(path: tuple[Any, ...]) -> str:
    return next(name for key in reversed(path) if (name := getattr(key, "key", None)))


def decayed(params: Any) -> Any:
    """Return True for the leaves with weight decay: matrices, not norms, convolution taps or decay rates."""

    def is_matrix(path: tuple[Any, ...], leaf: Array) -> bool:
        return not (_name(path).endswith("norm") or _name(path) in ("conv", "a_log", "dt_bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def muon_axes(params: Any) -> Any:
    """Return the two axes of each matrix that Muon orthogonalises.

    The leaf is None if Adam trains it: vectors, embedding, router and gates. Each layer and each expert of a stack is a
    matrix of its own.
    """
    adam = ("embedding", "head", "router", "shared_gate", "in_a", "in_b")

    def axes(path: tuple[Any, ...], leaf: Array, decays: bool) -> Any:
        muon = decays and _name(path) not in adam
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2) if muon else None

    return jax.tree_util.tree_map_with_path(axes, params, decayed(params))


def trainable(params: Any) -> Any:
    """Return True for the leaves that learn with a frozen trunk: those of the MTP head.

    The head shares embedding and LM head with the trunk, which stay frozen.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path[0].key == "mtp", params)


@cache
def optimizer(name: str, frozen_trunk: bool) -> optax.GradientTransformation:
    """Return the optimiser "muon" or "adamw" with a learning rate of 1; `train_step` multiplies the updates by the
    rate.

    A frozen trunk gets no update at all. Muon (Jordan 2024) is scaled as in Moonlight (Liu et al. 2025), where its
    updates are as large as those of AdamW.
    """
    if name == "adamw":
        rest = optax.adamw(1.0, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY, mask=decayed)
    else:
        rest = optax.contrib.muon(
            1.0,
            muon_weight_dimension_numbers=muon_axes,
            consistent_rms=0.2,
            weight_decay=WEIGHT_DECAY,
            adam_b1=0.9,
            adam_b2=0.95,
        )
    clipped = optax.chain(optax.clip_by_global_norm(CLIP), rest)
    return optax.partition({True: clipped, False: optax.set_to_zero()}, trainable) if frozen_trunk else clipped


@cache
def computed_in(cfg: ModelConfig, dtype: str) -> tuple[Any, Any]:
    """Return graph and leaves of the model that computes in `dtype`; the trained parameters stay float32."""
    return nnx.split(abstract_model(cfg, DTYPES[dtype]))


def objective(cfg: ModelConfig, plan: Plan, params: Any, tokens: Int[Array, "B T"]) -> tuple[Array, dict[str, Array]]:
    """Return `losses` in the plan's dtype; a frozen trunk gets no gradient."""
    graph, like = computed_in(cfg, plan.dtype)
    if plan.frozen_trunk:
        params = jax.tree.map(lambda p, learns: p if learns else jax.lax.stop_gradient(p), params, trainable(params))
    return losses(graph, cfg, jax.tree.map(lambda p, to: p.astype(to.dtype), params, like), tokens, plan.mtp_steps)


@partial(jax.jit, static_argnames=("cfg", "plan"), donate_argnames=("state",))
def train_step(
    state: dict[str, Any], tokens: Int[Array, "B T"], rate: Float[Array, ""], *, cfg: ModelConfig, plan: Plan
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Make one step. Return the state (see `new_state`) and the parts of the loss."""
    params = state["params"]
    token_parts = tokens.reshape(plan.accumulate, -1, tokens.shape[1])
    gradient = jax.value_and_grad(partial(objective, cfg, plan), has_aux=True)

    def add(total: Any, token_part: Array) -> tuple[Any, None]:
        (_, parts), grads = gradient(params, token_part)
        return jax.tree.map(lambda t, new: t + new / plan.accumulate, total, (grads, parts)), None

    if plan.accumulate == 1:
        (_, parts), grads = gradient(params, tokens)
    else:
        shapes = jax.eval_shape(gradient, params, token_parts[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0][1]))
        (grads, parts), _ = jax.lax.scan(add, zeros, token_parts)
    updates, inner = optimizer(plan.optimizer, plan.frozen_trunk).update(grads, state["optimizer"], params)
    params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    # In this form the average of a weight that does not change keeps its bits.
    ema = jax.tree.map(lambda old, new: old + (1 - plan.ema) * (new - old), state["ema"], params)
    return {"params": params, "ema": ema, "optimizer": inner}, parts


def new_state(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    """Return the state of a run: "params", their moving average "ema", and the state of the "optimizer"."""
    return {
        "params": model.params,
        "ema": jax.tree.map(jnp.copy, model.params),
        "optimizer": optimizer(plan.optimizer, plan.frozen_trunk).init(model.params),
    }


def rate_at(plan: Plan, step: int, done: float) -> float:
    """Return the learning rate of a step, counted from 0; `done` is the finished share of the run, 0 … 1."""
    return plan.rate * min(1.0, (step + 1) / plan.warm_up) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * done)))


def train(
    cfg: ModelConfig,
    state: dict[str, Any],
    tokens: np.ndarray,
    plan: Plan,
    done: Callable[[int], float],
    first: int = 0,
) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Yield the state and the parts of the loss after each step from `first` on, until `done(step)` is 1.

    The given and the yielded states are donated to the next step, so a caller that keeps one must copy it.
    """
    # The step is compiled once for its static arguments; seed and length of the run do not change it.
    step_plan = replace(plan, seed=0, steps=None, minutes=None)
    width = ROWS + 1 + plan.mtp_steps
    order = data.batches(tokens, plan.batch, width, ROWS, plan.seed)
    for step, window in enumerate(itertools.islice(order, first, None), first):
        if (share := done(step)) >= 1.0:
            return
        rate = rate_at(plan, step, share)
        state, parts = train_step(state, jnp.asarray(window), jnp.float32(rate), cfg=cfg, plan=step_plan)
        yield state, {"rate": rate} | {name: float(part) for name, part in parts.items()}
