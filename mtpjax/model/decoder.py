"""Decoder layers and the stack of super-blocks (one super-block = one repeat of the config's layer pattern)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from kernels_pallas.quantized import QuantizedTensor
from kernels_pallas.stacked import StackedTensor
from mtpjax.cache import Cache, Pending
from mtpjax.config import FULL, ModelConfig
from mtpjax.model.attention import KV, Attention
from mtpjax.model.deltanet import DeltaNet
from mtpjax.model.moe import Mlp, Moe
from mtpjax.model.norm import rms_norm
from mtpjax.model.params import Expert, Shapes
from mtpjax.model.placement import Placement

Memory = tuple[Cache, Pending | None]


class Layer(nnx.Module):
    """Pre-norm layer: `h = x + mixer(norm(x))`, `y = h + mlp(norm(h))`."""

    def __init__(self, cfg: ModelConfig, new: Shapes, kind: str):
        self.cfg = cfg
        self.input_norm = new.vector(cfg.hidden_size)
        self.post_norm = new.vector(cfg.hidden_size)
        self.mixer: Any = Attention(cfg, new) if kind == FULL else DeltaNet(cfg, new)
        self.mlp: Any = Moe(cfg, new) if cfg.experts else Mlp(cfg, new, cfg.mlp_size)

    def feed_forward(self, h: Float[Array, "B T D"], expert_layer: Array | int, where: Placement) -> Array:
        if h.shape[1] == 0:
            return h
        return h + self.mlp(rms_norm(h, self.post_norm[...], self.cfg.norm_eps), expert_layer, where.live)

    def attention(  # type: ignore[no-untyped-def]
        self, x: Array, kv: KV, layer: Array | int, expert_layer: Array | int, where: Placement, keep: int | None = None
    ):
        """A full-attention layer over key/value stacks. Returns the rows, the last `keep` of them, and the stacks."""
        keep = x.shape[1] if keep is None else keep
        y, kv = self.mixer(rms_norm(x, self.input_norm[...], self.cfg.norm_eps), kv, layer, where, keep)
        return self.feed_forward(_last(x, keep) + y, expert_layer, where.last(keep)), kv

    def linear(  # type: ignore[no-untyped-def]
        self, x: Array, memory: Memory, layer: Array | int, expert_layer: Array | int, where: Placement, keep: int | None = None
    ):
        """A DeltaNet layer. Returns the rows, the last `keep` of them, and the memory, which all rows enter."""
        keep = x.shape[1] if keep is None else keep
        y, *after = self.mixer(rms_norm(x, self.input_norm[...], self.cfg.norm_eps), *memory, layer, where)
        return self.feed_forward(_last(x + y, keep), expert_layer, where.last(keep)), tuple(after)


def _last(x: Float[Array, "B T D"], keep: int) -> Float[Array, "B keep D"]:
    return x[:, x.shape[1] - keep :]


class SuperBlock(nnx.Module):
    """The layers of one repeat of the pattern, every weight with a leading axis of `new.stack` repeats."""

    def __init__(self, cfg: ModelConfig, new: Shapes):
        self.cfg = cfg
        self.layers = nnx.List([Layer(cfg, new, kind) for kind in cfg.pattern])

    def __call__(  # type: ignore[no-untyped-def]
        self, x: Array, memory: Memory, repeat: Array | int, inside: Array | int, where: Placement, keep: int | None = None
    ):
        """Run repeat number `repeat` of the model, which is number `inside` of this stack (for its experts).

        `keep`: rows that the last layer returns, the last ones; all unless told.
        """
        full, lin = repeat * self.cfg.full_per_block, repeat * self.cfg.linear_per_block
        for number, (layer, kind) in enumerate(zip(self.layers, self.cfg.pattern, strict=True), 1):
            wanted = keep if number == len(self.cfg.pattern) else None
            if kind == FULL:
                cache, pending = memory
                x, (k, v) = layer.attention(x, (cache.k, cache.v), full, inside, where, wanted)
                memory, full = (cache.replace(k=k, v=v), pending), full + 1
            else:
                x, memory = layer.linear(x, memory, lin, inside, where, wanted)
                lin = lin + 1
        return x, memory


class Decoder(nnx.Module):
    """All layers, as `repeats / stack` stacks of super-blocks.

    With `stack = 1` they are unrolled: no weight is ever sliced, and each may be stored in its own form. They are traced
    once all the same, as one function that the program calls for every block. With `stack = repeats` one `lax.scan` runs
    them all; that is the smaller program to look at. Either way the cache is carried whole and updated in place. Experts
    and packed weights are handed on whole, with the number of the repeat: slicing a stack for a kernel would copy what is
    sliced, for experts all of a layer.
    """

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, stack: int):
        if cfg.repeats % stack:
            raise ValueError(f"stack {stack} does not divide the {cfg.repeats} repeats of the layer pattern")
        self.stack = stack
        self.blocks = nnx.List([SuperBlock(cfg, Shapes(dtype, stack)) for _ in range(cfg.repeats // stack)])

    def __call__(
        self, x: Float[Array, "B T D"], memory: Memory, where: Placement, keep: int | None = None
    ) -> tuple[Float[Array, "B keep D"], Memory]:
        """All layers on all rows; returns the last `keep` rows (all unless told) and the memory.

        Unrolled layers do no more than these need: of the last layer, the others leave their keys and values or their part
        of the state. In a scan all layers are alike, so there the rows are only cut off.
        """
        keep = x.shape[1] if keep is None else keep
        for number, block in enumerate(self.blocks):
            split: Any = nnx.split(block, Expert, _packed, ...)
            graph, experts, packed, dense = split
            first = number * self.stack
            if self.stack == 1:
                rows = keep if number == len(self.blocks) - 1 else None
                weights = experts, packed, jax.tree.map(lambda w: w[0], dense)
                # With a plain number of blocks attention's loop is differentiable, which inside a call it would not be.
                run = _run if where.differentiable else _shared
                x, memory = run(weights, x, memory, jnp.int32(first), where, graph=graph, rows=rows)
                continue

            def body(carry: tuple[Array, Memory], at: Any, first=first, g=graph, e=experts, p=packed):  # type: ignore[no-untyped-def]
                inside, weights = at
                run = nnx.merge(g, e, _layer_of(p, inside), weights)
                return run(*carry, first + inside, inside, where), None

            (x, memory), _ = lax.scan(body, (x, memory), (jnp.arange(self.stack), dense))
        return _last(x, keep), memory


def _run(  # type: ignore[no-untyped-def]
    weights: Any, x: Array, memory: Memory, repeat: Array, where: Placement, *, graph: Any, rows: int | None
):
    """One unrolled super-block."""
    experts, packed, dense = weights
    return nnx.merge(graph, experts, _layer_of(packed, 0), dense)(x, memory, repeat, 0, where, rows)


# Blocks of one shape share a trace, and their kernels are lowered once.
_shared = jax.jit(_run, static_argnames=("graph", "rows"))


def _packed(path: Any, variable: Any) -> bool:
    """Filter for `nnx.split`: variables that hold a packed weight."""
    return isinstance(variable.get_value() if hasattr(variable, "get_value") else variable.value, QuantizedTensor)


def _layer_of(state: Any, layer: Array | int) -> Any:
    """The packed stacks of a state, each as its one layer, not sliced."""
    index = jnp.asarray(layer, jnp.int32)

    def view(leaf: Any) -> Any:
        return StackedTensor(leaf, index) if isinstance(leaf, QuantizedTensor) else leaf

    return jax.tree.map(view, state, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
