"""Decoder layers and the super-blocks that they form (one super-block = one repeat of the config's layer pattern)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kernels_pallas.norm import add_rms_norm, rms_norm
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


class LayerState(NamedTuple):
    """State of all layers: the cache and, in a verify window, the DeltaNet updates that wait for acceptance."""

    cache: Cache
    pending: PendingDeltaUpdates | None


class Layer(nnx.Module):
    """Pre-norm layer: `h = x + mixer(norm(x))`, `y = h + mlp(norm(h))`. The token mixer is attention or a DeltaNet.

    A layer receives its rows twice, as the residual stream `x` and as `normed`, which is `x` after the layer's input
    norm: the kernel that ends one layer also computes the input norm of the next one (`next_norm`).
    """

    def __init__(self, cfg: ModelConfig, make: ParamFactory, kind: str) -> None:
        self.cfg = cfg
        self.input_norm = make.vector(cfg.hidden_size)
        self.post_norm = make.vector(cfg.hidden_size)
        self.mixer: Any = Attention(cfg, make) if kind == FULL else DeltaNet(cfg, make)
        self.mlp: Any = Moe(cfg, make) if cfg.num_experts else Mlp(cfg, make, cfg.mlp_size)

    def run_attention(
        self,
        x: Float[Array, "B T D"],
        normed: Float[Array, "B T D"],
        kv_cache: KVCache,
        layer: Int[Array, ""] | int,
        positions: Positions,
        next_norm: Float[Array, " D"],
        num_output_rows: int | None = None,
    ) -> tuple[Float[Array, "B R D"], Float[Array, "B R D"], KVCache]:
        """Run a layer whose token mixer is attention.

        Args:
            x: the residual stream.
            normed: `x` after the input norm.
            kv_cache: keys and values of all attention layers.
            layer: index of this layer in `kv_cache`.
            positions: positions of the rows.
            next_norm: weight of the norm that follows this layer.
            num_output_rows: R, how many of the last rows the layer returns. None: all. The other rows only leave their
                keys and values.

        Returns:
            the residual stream after the layer, the same after `next_norm`, and the new cache.
        """
        num_output_rows = x.shape[1] if num_output_rows is None else num_output_rows
        mixer_out, kv_cache = self.mixer(normed, kv_cache, layer, positions, num_output_rows)
        x = _last_rows(x, num_output_rows)
        return *self._feed_forward(x, mixer_out, positions.last(num_output_rows), next_norm), kv_cache

    def run_deltanet(
        self,
        x: Float[Array, "B T D"],
        normed: Float[Array, "B T D"],
        state: LayerState,
        layer: Int[Array, ""] | int,
        positions: Positions,
        next_norm: Float[Array, " D"],
        num_output_rows: int | None = None,
    ) -> tuple[Float[Array, "B R D"], Float[Array, "B R D"], LayerState]:
        """Run a layer whose token mixer is a DeltaNet. All rows enter the state.

        Arguments and results are those of `run_attention`, with the state in place of the cache; `layer` is the index
        among the DeltaNet layers.
        """
        num_output_rows = x.shape[1] if num_output_rows is None else num_output_rows
        mixer_out, *new_state = self.mixer(normed, *state, layer, positions)
        mixer_out = _last_rows_of_sums(mixer_out, x.shape[0], num_output_rows)
        x = _last_rows(x, num_output_rows)
        return *self._feed_forward(x, mixer_out, positions.last(num_output_rows), next_norm), LayerState(*new_state)

    def _feed_forward(
        self,
        x: Float[Array, "B R D"],
        mixer_out: PartialSums,
        positions: Positions,
        next_norm: Float[Array, " D"],
    ) -> tuple[Float[Array, "B R D"], Float[Array, "B R D"]]:
        """Add the token mixer's output, run the feed-forward block; return the rows, and the rows after `next_norm`."""
        if x.shape[1] == 0:
            return x, x
        eps, implementation = self.cfg.norm_eps, positions.implementation
        h, normed = add_rms_norm(x, mixer_out, self.post_norm[...], eps, implementation=implementation)
        mlp_out = self.mlp(normed, ONLY_LAYER, positions.valid, implementation)
        return add_rms_norm(h, mlp_out, next_norm, eps, implementation=implementation)


def _last_rows(x: Float[Array, "B T D"], num_rows: int) -> Float[Array, "B R D"]:
    return x[:, x.shape[1] - num_rows :]


def _last_rows_of_sums(sums: PartialSums, batch: int, num_rows: int) -> PartialSums:
    """Return the last rows of each sequence, `[P, B * R, D]`, of partial sums `[P, B * T, D]`."""
    num_sums, _, size = sums.parts.shape
    parts = sums.parts.reshape(num_sums, batch, -1, size)
    return PartialSums(parts[:, :, parts.shape[2] - num_rows :].reshape(num_sums, -1, size))


class SuperBlock(nnx.Module):
    """The layers of one repeat of the layer pattern. Every weight has a leading layer axis of size 1."""

    def __init__(self, cfg: ModelConfig, make: ParamFactory) -> None:
        self.cfg = cfg
        self.layers = nnx.List([Layer(cfg, make, kind) for kind in cfg.layer_pattern])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        normed: Float[Array, "B T D"],
        state: LayerState,
        block: Int[Array, ""] | int,
        positions: Positions,
        next_norm: Float[Array, " D"],
        num_output_rows: int | None = None,
    ) -> tuple[Float[Array, "B R D"], Float[Array, "B R D"], LayerState]:
        """Run the layers as super-block number `block` of the model.

        Arguments and results are those of `Layer.run_attention`: `normed` is `x` after the input norm of the first
        layer, `next_norm` follows the last layer, and the last layer alone returns `num_output_rows` rows.
        """
        norms = [layer.input_norm[...] for layer in self.layers[1:]] + [next_norm]
        attention_layer, deltanet_layer = block * self.cfg.full_per_block, block * self.cfg.linear_per_block
        for number, (layer, kind, norm) in enumerate(zip(self.layers, self.cfg.layer_pattern, norms, strict=True), 1):
            rows = num_output_rows if number == len(self.layers) else None
            if kind == FULL:
                cache, kv_cache = state.cache, (state.cache.k, state.cache.v)
                x, normed, (k, v) = layer.run_attention(x, normed, kv_cache, attention_layer, positions, norm, rows)
                state = state._replace(cache=cache.replace(k=k, v=v))
                attention_layer = attention_layer + 1
            else:
                x, normed, state = layer.run_deltanet(x, normed, state, deltanet_layer, positions, norm, rows)
                deltanet_layer = deltanet_layer + 1
        return x, normed, state


class Decoder(nnx.Module):
    """All layers, one super-block after another.

    The super-blocks are unrolled: no weight is ever sliced, and each may be stored in its own form. They are traced
    once all the same, as one function that the program calls for every block. The cache is carried whole and updated
    in place. Experts and quantized weights are passed on whole, with their layer axis (see `mtpjax.model.params`):
    slicing a stack for a kernel would copy the slice, which is all experts of a layer.
    """

    def __init__(self, cfg: ModelConfig, dtype: DTypeLike) -> None:
        make = ParamFactory(dtype, layer_axis=True)
        self.blocks = nnx.List([SuperBlock(cfg, make) for _ in range(cfg.num_superblocks)])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LayerState,
        positions: Positions,
        final_norm: Float[Array, " D"],
        num_output_rows: int | None = None,
    ) -> tuple[Float[Array, "B R D"], Float[Array, "B R D"], LayerState]:
        """Run all layers on all rows.

        Args:
            x: embedded tokens.
            state: state of all layers.
            positions: positions of the rows.
            final_norm: weight of the norm that follows the last layer.
            num_output_rows: R, how many of the last rows are returned. None: all. In the last layer the other rows
                only leave their keys and values or their part of the recurrent state.

        Returns:
            the last rows, the same after the final norm, and the new state.
        """
        num_output_rows = x.shape[1] if num_output_rows is None else num_output_rows
        norms = [block.layers[0].input_norm[...][ONLY_LAYER] for block in self.blocks] + [final_norm]
        eps, implementation = self.blocks[0].cfg.norm_eps, positions.implementation
        normed = rms_norm(x, norms[0], eps, implementation=implementation)
        for number, block in enumerate(self.blocks):
            graph, *weights = _split_block(block)
            rows = num_output_rows if number == len(self.blocks) - 1 else None
            args = x, normed, state, jnp.int32(number), positions, norms[number + 1]
            x, normed, state = jitted_super_block(tuple(weights), *args, graph=graph, num_output_rows=rows)
        return x, normed, state


def run_super_block(
    weights: tuple[Any, Any, Any],
    x: Float[Array, "B T D"],
    normed: Float[Array, "B T D"],
    state: LayerState,
    block: Int[Array, ""],
    positions: Positions,
    next_norm: Float[Array, " D"],
    *,
    graph: Any,
    num_output_rows: int | None,
) -> tuple[Float[Array, "B R D"], Float[Array, "B R D"], LayerState]:
    """Run a super-block whose weights are arguments.

    Args:
        weights: states of its experts, of its quantized weights, and of its other weights without the layer axis.
        graph: the static half of the split `SuperBlock`.
    """
    experts, quantized, dense = weights
    super_block = nnx.merge(graph, experts, _layer_views(quantized), dense)
    return super_block(x, normed, state, block, positions, next_norm, num_output_rows)


# Blocks of one shape share a trace, and their kernels are lowered once.
jitted_super_block = jax.jit(run_super_block, static_argnames=("graph", "num_output_rows"))


def _split_block(block: SuperBlock) -> tuple[Any, Any, Any, Any]:
    """Split a super-block into its graph, its experts, its quantized weights and its other weights.

    The other weights lose their layer axis.
    """
    split: Any = nnx.split(block, Expert, _is_quantized, ...)
    graph, experts, quantized, dense = split
    return graph, experts, quantized, jax.tree.map(lambda w: w[ONLY_LAYER], dense)


def _is_quantized(path: tuple[Any, ...], variable: Any) -> bool:
    """Filter of `nnx.split` for variables that hold a quantized weight."""
    return isinstance(variable.get_value() if hasattr(variable, "get_value") else variable.value, QuantizedTensor)


def _layer_views(state: Any) -> Any:
    """Return a state whose quantized stacks are views of their one layer. Nothing is sliced."""
    index = jnp.asarray(ONLY_LAYER, jnp.int32)

    def view(leaf: Any) -> Any:
        return LayerView(leaf, index) if isinstance(leaf, QuantizedTensor) else leaf

    return jax.tree.map(view, state, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
