"""Tile constants of the kernels by kind of device: measured where a card was at hand, predicted elsewhere."""

from kernels_pallas.tile_tables.constants import (
    ExpertsConstants,
    GatedDeltaRuleConstants,
    MatmulConstants,
)
from kernels_pallas.tile_tables.lookup import (
    ENVIRONMENT_VARIABLE,
    active_table,
    override_table,
    packaged_table,
    table_fingerprint,
    tile_constants,
    user_table_path,
)
from kernels_pallas.tile_tables.table import Entry, TileTable, TileTableError, default_table, parse_table

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Entry",
    "ExpertsConstants",
    "GatedDeltaRuleConstants",
    "MatmulConstants",
    "TileTable",
    "TileTableError",
    "active_table",
    "default_table",
    "override_table",
    "packaged_table",
    "parse_table",
    "table_fingerprint",
    "tile_constants",
    "user_table_path",
]
