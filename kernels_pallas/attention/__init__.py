"""Gated attention over a key/value cache, and the update of the cache that comes before it."""

from kernels_pallas.attention.api import attention, norm_rope_update_cache
from kernels_pallas.attention.projections import QkvProjections
from kernels_pallas.attention.reference import KV_BLOCK
from kernels_pallas.attention.rope import CosSin, apply_rope

__all__ = ["KV_BLOCK", "CosSin", "QkvProjections", "apply_rope", "attention", "norm_rope_update_cache"]
