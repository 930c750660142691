"""Where the rows of one step lie: positions, which rows are padding, and how far attention must look back."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from mtpjax.config import ModelConfig
from mtpjax.model.cache import KV_BLOCK
from mtpjax.model.rope import Rotary, rotary


class Positions(NamedTuple):
    """Rows of a step. The first `pad[b]` rows of sequence b are padding: exact no-ops everywhere.

    `blocks` is how many blocks of cache slots attention reads. As a plain int the loop over them is differentiable.
    """

    positions: Int[Array, "B T"]
    live: Bool[Array, "B T"]
    pad: Int[Array, " B"]
    blocks: Array | int
    turn: Rotary

    @property
    def differentiable(self) -> bool:
        """Whether gradients may be wanted, which kernels do not have."""
        return isinstance(self.blocks, int)

    def last(self, rows: int) -> Positions:
        """The last `rows` rows of the step, where they were."""
        first = self.positions.shape[1] - rows
        return self._replace(
            positions=self.positions[:, first:],
            live=self.live[:, first:],
            pad=jnp.maximum(self.pad - first, 0),
            turn=Rotary(*(angle[:, first:] for angle in self.turn)),
        )


def place(
    cfg: ModelConfig,
    start: Int[Array, " B"],
    rows: int,
    pad: Int[Array, " B"],
    *,
    slots: int,
    blocks: int | None = None,
) -> Positions:
    """Rows `start - pad ... start - pad + rows - 1` of each sequence in a cache of `slots` slots."""
    steps = jnp.arange(rows)
    positions = start[:, None] - pad[:, None] + steps
    live = (steps >= pad[:, None]) & (positions >= 0) & (positions < slots)
    read: Array | int
    if blocks is None:
        read = jnp.max(jnp.where(live, positions, -1)) // KV_BLOCK + 1
    else:
        read = blocks
    return Positions(positions, live, pad, read, rotary(positions, cfg.rotary_dim, cfg.rope_theta))
