"""Inside kernels: columns of a DeltaNet state as a tile, and the accepted rows of a window that enter them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Int

from kernels_pallas.gated_delta_rule.state import page_offsets
from kernels_pallas.tiles import index_grid

LANES = 32  # of a warp


class StateTile(NamedTuple):
    """Columns of a state `[Dk, Dv]` as a tile `[high, groups, low, columns]`, where key = high * low keys + low.

    Triton gives a thread four columns, the lanes of a warp `columns` and the low keys, and the warps the groups.
    """

    key_size: int
    columns: int
    groups: int

    @property
    def low(self) -> int:
        """The keys that the lanes of a warp hold."""
        return min(self.key_size, max(1, LANES // max(1, self.columns // 4)))

    def keys(self) -> Int[Array, "high low"]:
        """Return the key of each place."""
        high, low = index_grid(jnp.arange(self.key_size // self.low), jnp.arange(self.low))
        return high * self.low + low

    def values(self, first: Array | int) -> Int[Array, "groups columns"]:
        """Return the column of the state of each place, counted from `first`."""
        group, column = index_grid(jnp.arange(self.groups), jnp.arange(self.columns))
        return first + group * self.columns + column

    def grid(self, first: Array | int) -> tuple[Array, Array]:
        """Return key and column of every element of the tile."""
        key, column = self.keys(), self.values(first)
        shape = key.shape[0], self.groups, self.low, self.columns
        return jnp.broadcast_to(key[:, None, :, None], shape), jnp.broadcast_to(column[None, :, None, :], shape)

    def outer(self, k: Float[Array, "high low"], v: Float[Array, "groups columns"]) -> Array:
        """Return `k v^T`."""
        return k[:, None, :, None] * v[None, :, None, :]

    def sum_keys(self, state: Array, k: Float[Array, "high low"]) -> Float[Array, "groups columns"]:
        """Return `state^T k`."""
        return jnp.sum(jnp.sum(state * k[:, None, :, None], axis=0), axis=1)


class UpdateRefs(NamedTuple):
    """Refs of the updates of the window before, in stacks of layers."""

    accepted: Any
    page: Any  # [1], of the window before; None: there is one page
    k: Any
    delta: Any
    decay: Any

    def layers(self, layer: Array, num_layers: int) -> tuple[Array, Array]:
        """Return the index of a layer on the page of the window before, and on the page of this window."""
        read, write = page_offsets(None if self.page is None else self.page[0], num_layers)
        return read + layer, write + layer


def add_accepted(
    state: Float[Array, "high groups low columns"],
    updates: UpdateRefs,
    at: tuple[Array, Array, Array, Array],
    tile: StateTile,
    first: Array | int,
) -> Float[Array, "high groups low columns"]:
    """Inside a kernel: add the accepted rows to a state, one after the other, as a window steps through its rows.

    Args:
        at: index of the layer on its page, the sequence, value head and key head.
        tile, first: what part of the state it is.
    """
    layer, b, m, j = at
    channel, column = tile.keys(), tile.values(first)

    def load(i: Array) -> tuple[Array, Array, Array]:
        k = plt.load(updates.k.at[layer, b, i, j, channel])
        return k, plt.load(updates.delta.at[layer, b, i, m, column]), plt.load(updates.decay.at[layer, b, i, m])

    def step(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        state, (k, delta, g) = carry
        following = load(jnp.minimum(i + 1, updates.k.shape[2] - 1))  # on its way while this row is added
        return state * jnp.exp(g) + tile.outer(k, delta), following

    return lax.fori_loop(jnp.int32(0), updates.accepted[b], step, (state, load(jnp.int32(0))))[0]
