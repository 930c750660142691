"""One training step of the embedded model, and the steps in order: the optimiser, the rate, the moving average."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
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
    """True for the leaves that decay: matrices, not norms, taps or decay rates."""

    def is_matrix(path: tuple[Any, ...], leaf: Array) -> bool:
        return not (_name(path).endswith("norm") or _name(path) in ("conv", "a_log", "dt_bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def orthogonalised(params: Any) -> Any:
    """The two axes of each matrix that Muon orthogonalises; None for what Adam trains: vectors, embedding, router, gates.

    Stacked layers and experts are matrices of their own.
    """
    adam = ("embedding", "head", "router", "shared_gate", "in_a", "in_b")

    def axes(path: tuple[Any, ...], leaf: Array, decays: bool) -> Any:
        muon = decays and _name(path) not in adam
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2) if muon else None

    return jax.tree_util.tree_map_with_path(axes, params, decayed(params))


def learning(params: Any) -> Any:
    """True for the leaves that learn under a frozen trunk: those of the MTP head. It shares embedding and LM head: frozen."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path[0].key == "mtp", params)


@cache
def optimizer(name: str, frozen_trunk: bool) -> optax.GradientTransformation:
    """ "muon" or "adamw", without the rate, which each step is given. A frozen trunk gets no update at all.

    Muon (Jordan 2024) in the scaling of Moonlight (Liu et al. 2025), whose updates are as large as AdamW's.
    """
    if name == "adamw":
        rest = optax.adamw(1.0, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY, mask=decayed)
    else:
        rest = optax.contrib.muon(
            1.0, muon_weight_dimension_numbers=orthogonalised, consistent_rms=0.2, weight_decay=WEIGHT_DECAY,
            adam_b1=0.9, adam_b2=0.95,
        )  # fmt: skip
    clipped = optax.chain(optax.clip_by_global_norm(CLIP), rest)
    return optax.partition({True: clipped, False: optax.set_to_zero()}, learning) if frozen_trunk else clipped


@cache
def computed_in(cfg: ModelConfig, dtype: str) -> tuple[Any, Any]:
    """Graph and leaves of the model that computes in `dtype`; the parameters that are trained stay float32."""
    return nnx.split(abstract_model(cfg, DTYPES[dtype]))


def objective(cfg: ModelConfig, plan: Plan, params: Any, tokens: Int[Array, "B T"]) -> tuple[Array, dict[str, Array]]:
    """`losses` in the plan's dtype; no gradient enters a frozen trunk."""
    graph, like = computed_in(cfg, plan.dtype)
    if plan.frozen_trunk:
        params = jax.tree.map(lambda p, learns: p if learns else jax.lax.stop_gradient(p), params, learning(params))
    return losses(graph, cfg, jax.tree.map(lambda p, to: p.astype(to.dtype), params, like), tokens, plan.mtp_steps)


@partial(jax.jit, static_argnames=("cfg", "plan"), donate_argnames=("state",))
def train_step(
    state: dict[str, Any], tokens: Int[Array, "B T"], rate: Float[Array, ""], *, cfg: ModelConfig, plan: Plan
) -> tuple[dict[str, Any], dict[str, Array]]:
    """One step. `state` has "params", their moving average "ema" and "optimizer". Returns it and the parts of the loss."""
    params = state["params"]
    parts_of = tokens.reshape(plan.accumulate, -1, tokens.shape[1])
    gradient = jax.value_and_grad(partial(objective, cfg, plan), has_aux=True)

    def add(total: Any, some: Array) -> tuple[Any, None]:
        (_, parts), grads = gradient(params, some)
        return jax.tree.map(lambda t, new: t + new / plan.accumulate, total, (grads, parts)), None

    if plan.accumulate == 1:
        (_, parts), grads = gradient(params, tokens)
    else:
        shapes = jax.eval_shape(gradient, params, parts_of[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0][1]))
        (grads, parts), _ = jax.lax.scan(add, zeros, parts_of)
    updates, inner = optimizer(plan.optimizer, plan.frozen_trunk).update(grads, state["optimizer"], params)
    params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    # So that the average of what does not change is what it was, to the last bit.
    ema = jax.tree.map(lambda old, new: old + (1 - plan.ema) * (new - old), state["ema"], params)
    return {"params": params, "ema": ema, "optimizer": inner}, parts


def new_state(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    return {
        "params": model.params,
        "ema": jax.tree.map(jnp.copy, model.params),
        "optimizer": optimizer(plan.optimizer, plan.frozen_trunk).init(model.params),
    }


def rate_at(plan: Plan, step: int, done: float) -> float:
    """The learning rate of a step (counted from 0) when `done` of the run, 0...1, is over."""
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

    The given and the yielded states are donated to the next step: what is to be kept must be copied.
    """
    width = ROWS + 1 + plan.mtp_steps
    order = data.batches(tokens, plan.batch, width, ROWS, plan.seed)
    for step, window in enumerate(itertools.islice(order, first, None), first):
        if (share := done(step)) >= 1.0:
            return
        rate = rate_at(plan, step, share)
        state, parts = train_step(state, jnp.asarray(window), jnp.float32(rate), cfg=cfg, plan=plan)
        yield state, {"rate": rate} | {name: float(part) for name, part in parts.items()}
