"""Decoder layers and the super-blocks that they form (one super-block = one repeat of the config's layer pattern)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from kernels_pallas.norm import add_rms_norm
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.weights.layer_view import LayerView
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax.config import FULL, ModelConfig
from mtpjax.model.attention import Attention, KVCache
from mtpjax.model.cache import Cache, PendingDeltaUpdates
from mtpjax.model.gated_deltanet import DeltaNet
from mtpjax.model.moe import Mlp, Moe
from mtpjax.model.params import ONLY_LAYER, Expert, ParamFactory
from mtpjax.model.positions import Positions

Memory = tuple[Cache, PendingDeltaUpdates | None]


class Layer(nnx.Module):
    """Pre-norm layer: `h = x + mixer(norm(x))`, `y = h + mlp(norm(h))`."""

    def __init__(self, cfg: ModelConfig, new: ParamFactory, kind: str):
        self.cfg = cfg
        self.input_norm = new.vector(cfg.hidden_size)
        self.post_norm = new.vector(cfg.hidden_size)
        self.mixer: Any = Attention(cfg, new) if kind == FULL else DeltaNet(cfg, new)
        self.mlp: Any = Moe(cfg, new) if cfg.num_experts else Mlp(cfg, new, cfg.mlp_size)

    def feed_forward(self, x: Array, parts: PartialSums, positions: Positions, next_norm: Array) -> tuple[Array, Array]:
        """What follows the mixer, which gave `parts`: the rows, and these normalised for what comes next."""
        if x.shape[1] == 0:
            return x, x
        eps, implementation = self.cfg.norm_eps, positions.implementation
        h, normed = add_rms_norm(x, parts, self.post_norm[...], eps, implementation=implementation)
        delta = self.mlp(normed, ONLY_LAYER, positions.valid, implementation)
        return add_rms_norm(h, delta, next_norm, eps, implementation=implementation)

    def attention(  # type: ignore[no-untyped-def]
        self, x: Array, normed: Array, kv: KVCache, layer: Array | int, positions: Positions,
        next_norm: Array, keep: int | None = None,
    ):  # fmt: skip
        """A full-attention layer over key/value stacks, on rows that are given normalised, too. Returns the rows, the last
        `keep` of them, these normalised by `next_norm`, and the stacks."""
        keep = x.shape[1] if keep is None else keep
        parts, kv = self.mixer(normed, kv, layer, positions, keep)
        return *self.feed_forward(_last(x, keep), parts, positions.last(keep), next_norm), kv

    def linear(  # type: ignore[no-untyped-def]
        self, x: Array, normed: Array, memory: Memory, layer: Array | int, positions: Positions,
        next_norm: Array, keep: int | None = None,
    ):  # fmt: skip
        """A DeltaNet layer, as `attention`; its memory is that which all rows enter."""
        batch, rows, size = x.shape
        keep = rows if keep is None else keep
        parts, *after = self.mixer(normed, *memory, layer, positions)
        sums = parts.parts.reshape(-1, batch, rows, size)[:, :, rows - keep :]
        kept = PartialSums(sums.reshape(len(sums), -1, size))
        return *self.feed_forward(_last(x, keep), kept, positions.last(keep), next_norm), tuple(after)


def _last(x: Float[Array, "B T D"], keep: int) -> Float[Array, "B keep D"]:
    return x[:, x.shape[1] - keep :]


class SuperBlock(nnx.Module):
    """The layers of one repeat of the pattern, every weight with a leading layer axis of size 1."""

    def __init__(self, cfg: ModelConfig, new: ParamFactory):
        self.cfg = cfg
        self.layers = nnx.List([Layer(cfg, new, kind) for kind in cfg.layer_pattern])

    def __call__(  # type: ignore[no-untyped-def]
        self, x: Array, normed: Array, memory: Memory, repeat: Array | int, positions: Positions,
        next_norm: Array, keep: int | None = None,
    ):  # fmt: skip
        """Run repeat number `repeat` of the model.

        Args:
            normed: the rows after the input norm of the first layer.
            next_norm: norm of what follows; its rows are returned, too.
            keep: rows that the last layer returns, the last ones; all unless told.
        """
        norms = [layer.input_norm[...] for layer in self.layers[1:]] + [next_norm]
        full, lin = repeat * self.cfg.full_per_block, repeat * self.cfg.linear_per_block
        for number, (layer, kind, norm) in enumerate(zip(self.layers, self.cfg.layer_pattern, norms, strict=True), 1):
            wanted = keep if number == len(self.cfg.layer_pattern) else None
            if kind == FULL:
                cache, pending = memory
                x, normed, (k, v) = layer.attention(x, normed, (cache.k, cache.v), full, positions, norm, wanted)
                memory, full = (cache.replace(k=k, v=v), pending), full + 1
            else:
                x, normed, memory = layer.linear(x, normed, memory, lin, positions, norm, wanted)
                lin = lin + 1
        return x, normed, memory


class Decoder(nnx.Module):
    """All layers, one super-block after another.

    The super-blocks are unrolled: no weight is ever sliced, and each may be stored in its own form. They are traced once
    all the same, as one function that the program calls for every block. The cache is carried whole and updated in
    place. Experts and packed weights are handed on whole, with their layer axis (see `mtpjax.model.params`): slicing a
    stack for a kernel would copy what is sliced, for experts all of a layer.
    """

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype) -> None:
        self.blocks = nnx.List(
            [SuperBlock(cfg, ParamFactory(dtype, layer_axis=True)) for _ in range(cfg.num_superblocks)]
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Memory,
        positions: Positions,
        final_norm: Float[Array, " D"],
        keep: int | None = None,
    ) -> tuple[Float[Array, "B keep D"], Float[Array, "B keep D"], Memory]:
        """All layers on all rows; returns the last `keep` rows (all unless told), these after the final norm, and the memory.

        Layers do no more than these need: of the last layer, the others leave their keys and values or their part of the
        state.
        """
        keep = x.shape[1] if keep is None else keep
        norms = [block.layers[0].input_norm[...][ONLY_LAYER] for block in self.blocks] + [final_norm]
        eps, implementation = self.blocks[0].cfg.norm_eps, positions.implementation
        normed = add_rms_norm(x, None, norms[0], eps, implementation=implementation)[1]
        for number, block in enumerate(self.blocks):
            split: Any = nnx.split(block, Expert, _packed, ...)
            graph, experts, packed, dense = split
            rows = keep if number == len(self.blocks) - 1 else None
            weights = experts, packed, jax.tree.map(lambda w: w[ONLY_LAYER], dense)
            args = memory, jnp.int32(number), positions, norms[number + 1]
            x, normed, memory = _jitted_block(weights, x, normed, *args, graph=graph, rows=rows)
        return x, normed, memory


def _block(  # type: ignore[no-untyped-def]
    weights: Any, x: Array, normed: Array, memory: Memory, repeat: Array, positions: Positions, next_norm: Array, *, graph: Any,
    rows: int | None,
):  # fmt: skip
    """One super-block."""
    experts, packed, dense = weights
    return nnx.merge(graph, experts, _layer_views(packed), dense)(x, normed, memory, repeat, positions, next_norm, rows)


# Blocks of one shape share a trace, and their kernels are lowered once.
_jitted_block = jax.jit(_block, static_argnames=("graph", "rows"))


def _packed(path: Any, variable: Any) -> bool:
    """Filter for `nnx.split`: variables that hold a packed weight."""
    return isinstance(variable.get_value() if hasattr(variable, "get_value") else variable.value, QuantizedTensor)


def _layer_views(state: Any) -> Any:
    """The packed stacks of a state, each as its one layer, not sliced."""
    index = jnp.asarray(ONLY_LAYER, jnp.int32)

    def view(leaf: Any) -> Any:
        return LayerView(leaf, index) if isinstance(leaf, QuantizedTensor) else leaf

    return jax.tree.map(view, state, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
