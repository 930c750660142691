"""The gated delta rule, the recurrence of Gated DeltaNet (arXiv:2412.06464): verify windows, prompts, and replay."""

from kernels_pallas.gated_delta_rule.api import (
    accept_updates,
    chunk_gated_delta_rule,
    recurrent_gated_delta_rule,
    replay_updates,
    updates_between_windows,
)
from kernels_pallas.gated_delta_rule.inputs import DeltaProjections, DeltaWeights, GatedNorm
from kernels_pallas.gated_delta_rule.reference import CHUNK
from kernels_pallas.gated_delta_rule.state import DeltaState, PendingDeltaUpdates, no_updates

__all__ = [
    "CHUNK",
    "DeltaProjections",
    "DeltaState",
    "DeltaWeights",
    "GatedNorm",
    "PendingDeltaUpdates",
    "accept_updates",
    "chunk_gated_delta_rule",
    "no_updates",
    "recurrent_gated_delta_rule",
    "replay_updates",
    "updates_between_windows",
]
