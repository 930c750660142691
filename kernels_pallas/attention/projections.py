"""`QkvProjections`: the inputs of an attention layer, before norm, rotation and cache update."""

from __future__ import annotations

from typing import NamedTuple

from kernels_pallas.partial_sums import PartialSums


class QkvProjections(NamedTuple):
    """Query, key and value projections of the rows of a step, as partial sums.

    Keys and values belong to all T rows of each of the B sequences, queries to the last R rows of each. There are N
    key/value heads and Q query heads of size H.
    """

    k: PartialSums  # [P, B * T, N * H]
    v: PartialSums  # [P, B * T, N * H]
    q_gate: PartialSums | None  # [P, B * R, Q * 2 * H]: for each head the query, then the gate; None if R is 0
