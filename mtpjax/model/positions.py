"""`Positions`: where the rows of a step are in the cache, which of them are padding, and how ops compute them."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Int

from kernels_pallas.attention import CosSin
from mtpjax.config import ModelConfig
from mtpjax.model.cache import KV_BLOCK
from mtpjax.model.rope import rope_angles


class Positions(struct.PyTreeNode):
    """Positions of the T rows of a step for each of B sequences.

    The first `pad[b]` rows of sequence b are padding. Padding is an exact no-op everywhere.
    """

    __no_type_check__ = True  # JAX also builds pytrees of shapes and of placeholders, which jaxtyping would refuse
    positions: Int[Array, "B T"]  # in the sequence, which is also the position in the cache
    valid: Bool[Array, "B T"]  # False for padding and for rows beyond the cache
    pad: Int[Array, " B"]
    num_kv_blocks: Int[Array, ""]  # blocks of cache positions that hold every visible key
    rope: CosSin
    static_kv_blocks: int | None = struct.field(pytree_node=False, default=None)
    implementation: str | None = struct.field(pytree_node=False, default=None)
    is_prompt: bool = struct.field(pytree_node=False, default=False)  # not a verify window or a draft step

    @property
    def kv_blocks(self) -> Int[Array, ""] | int:
        """Blocks that attention reads: the static number if there is one, else `num_kv_blocks`."""
        return self.num_kv_blocks if self.static_kv_blocks is None else self.static_kv_blocks

    def last(self, rows: int) -> Positions:
        """Return the positions of the last `rows` rows of the step."""
        first = self.positions.shape[1] - rows
        return self.replace(
            positions=self.positions[:, first:],
            valid=self.valid[:, first:],
            pad=jnp.maximum(self.pad - first, 0),
            rope=CosSin(self.rope.cos[:, first:], self.rope.sin[:, first:]),
        )


def make_positions(
    cfg: ModelConfig,
    start: Int[Array, " B"],
    rows: int,
    pad: Int[Array, " B"],
    *,
    kv_len: int,
    static_kv_blocks: int | None = None,
    implementation: str | None = None,
    is_prompt: bool = False,
) -> Positions:
    """Return the positions `start - pad ... start - pad + rows - 1` of each sequence.

    Args:
        cfg: its rotary sizes.
        start: position of the first row that is not padding, in each sequence.
        rows: rows of the step, padding included.
        pad: rows of padding in front of each sequence, 0...rows.
        kv_len: length of the cache. Rows beyond it are not valid.
        static_kv_blocks: a number of cache blocks that attention always reads. The trip count of its loop is then
            static, so the step is differentiable. None: as many blocks as the positions need.
        implementation: implementation of the ops that have more than one; see `kernels_pallas.platform`. Training
            needs "xla", because kernels have no gradient.
        is_prompt: the rows are those of a prompt; see `kernels_pallas.attention.attention`.
    """
    steps = jnp.arange(rows)
    positions = start[:, None] - pad[:, None] + steps
    valid = (steps >= pad[:, None]) & (positions >= 0) & (positions < kv_len)
    return Positions(
        positions=positions,
        valid=valid,
        pad=pad,
        num_kv_blocks=jnp.max(jnp.where(valid, positions, -1)) // KV_BLOCK + 1,
        rope=rope_angles(positions, cfg.rotary_dim, cfg.rope_theta, cfg.rope_scaling),
        static_kv_blocks=static_kv_blocks,
        implementation=implementation,
        is_prompt=is_prompt,
    )
