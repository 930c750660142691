"""Which numbers of token rows a product of tensor cores may have, so that a row has the same bits in each.

A matrix product in a kernel becomes tensor-core instructions of some shape, and a row of tokens is a column there. One
instruction gives a column the same bits whatever the other columns are. Whether instructions of two shapes do, only the
hardware can tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kernels_pallas.platform import capability

# By the first compute capability that it holds for: the rows of products that are proved to give a row the same bits.
# 8.0: `mma.m16n8k16` serves them all, with more rows by several instructions of eight rows each (counted in the PTX).
# 9.0: `wgmma` has a shape for every multiple of eight rows, and no card has been asked yet whether they agree.
PROVED_ROW_TILES = {(8, 0): (8, 16, 32, 64, 128), (9, 0): (16,)}

ENVIRONMENT_VARIABLE = "MTPJAX_ONLY_PROVED_ROW_TILES"  # "1": the strict mode, for the whole process

_only_proved: ContextVar[bool] = ContextVar("only_proved_row_tiles", default=False)


def uses_only_proved_row_tiles() -> bool:
    """Return whether kernels are traced in the strict mode; see `only_proved_row_tiles`."""
    return _only_proved.get() or os.environ.get(ENVIRONMENT_VARIABLE) == "1"


def proved_row_tiles() -> tuple[int, ...]:
    """Return the rows of products that are proved to give a row the same bits on the platform, ascending."""
    known = [tiles for since, tiles in sorted(PROVED_ROW_TILES.items()) if since <= max(capability(), (8, 0))]
    return known[-1]


@contextmanager
def only_proved_row_tiles() -> Iterator[None]:
    """Trace kernels whose products have proved numbers of rows only: larger blocks become several products.

    A strict mode, for texts that must be the same in every batch before a card has been asked. It costs time where many
    rows are read. The environment variable MTPJAX_ONLY_PROVED_ROW_TILES=1 turns it on for a whole process. JAX caches
    traced programs and does not know the mode they were traced in: clear its caches, or use one process for each.
    """
    token = _only_proved.set(True)
    try:
        yield
    finally:
        _only_proved.reset(token)


def product_rows(rows: int) -> int:
    """Return the rows of one product in a tile of `rows` rows: all, or in the strict mode the most that are proved.

    The tile is a multiple of it, as both are powers of two.
    """
    if not uses_only_proved_row_tiles() or rows in proved_row_tiles():
        return rows
    return max(tile for tile in proved_row_tiles() if tile <= max(rows, proved_row_tiles()[0]))
