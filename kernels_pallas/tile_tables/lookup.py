"""`tile_constants`: the constants of an op on this device, from one table for all programs of a process.

The user's own table wins over the one in this package, and that over the defaults. It is the file that the environment
variable `MTPJAX_TILE_TABLE` names, or else the device's file in the user's cache folder, where `mtpjax tune` writes
it. Ops that it does not name come from the package's table. Nothing is read twice in a process: constants fix the order
of sums, so programs with other constants would give other bits.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple, overload

from kernels_pallas.platform import device_kind, platform
from kernels_pallas.tile_tables.constants import (
    OPS,
    Constants,
    ExpertsConstants,
    GatedDeltaRuleConstants,
    MatmulConstants,
)
from kernels_pallas.tile_tables.table import TileTable, TileTableError, default_table, parse_table

ENVIRONMENT_VARIABLE = "MTPJAX_TILE_TABLE"


class _Loaded(NamedTuple):
    variable: str | None  # the value of the environment variable at that time
    table: TileTable


_loaded: dict[str, _Loaded] = {}  # by kind of device
_override: ContextVar[TileTable | None] = ContextVar("override_table", default=None)


@overload
def tile_constants(op: Literal["matmul"], outputs: int, inputs: int) -> MatmulConstants: ...
@overload
def tile_constants(op: Literal["experts"], outputs: int, inputs: int) -> ExpertsConstants: ...
@overload
def tile_constants(op: Literal["gated_delta_rule"]) -> GatedDeltaRuleConstants: ...
def tile_constants(op: str, outputs: int = 0, inputs: int = 0) -> Constants:
    """Return the constants of an op on the device that programs are traced for.

    Args:
        op: one of `constants.OPS`.
        outputs, inputs: the sizes of the weight, which with the table decide alone.

    Raises:
        TileTableError: the user's table cannot be used.
        ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"there are no tile constants for {op!r}; expected one of {', '.join(OPS)}")
    return active_table().find(op, outputs, inputs)


def active_table() -> TileTable:
    """Return the table of the device that programs are traced for. It is read once in a process.

    Raises:
        TileTableError: the user's table cannot be used, or the environment variable changed since it was read.
    """
    override = _override.get()
    if override is not None:
        return override
    kind, variable = device_kind(), os.environ.get(ENVIRONMENT_VARIABLE)
    if kind not in _loaded:
        _loaded[kind] = _Loaded(variable, _load(kind, variable))
    if _loaded[kind].variable != variable:
        raise TileTableError(
            f"{ENVIRONMENT_VARIABLE} was {_loaded[kind].variable!r} when the first program was traced and is now "
            f"{variable!r}: all programs of a process must have one tile table. Set it before the process starts."
        )
    return _loaded[kind].table


def table_fingerprint() -> str:
    """Return a hash of the active table, for keys under which compiled programs are kept."""
    return hashlib.sha256(active_table().to_json().encode()).hexdigest()[:16]


@contextmanager
def override_table(table: TileTable) -> Iterator[None]:
    """Trace programs with this table inside the context, to measure it or to test it.

    JAX caches traced programs and does not know their table: jit a function of its own for each.
    """
    token = _override.set(complete(table))
    try:
        yield
    finally:
        _override.reset(token)


def complete(table: TileTable) -> TileTable:
    """Return the table with the ops that it does not name, from the package's table for its device."""
    return replace(table, ops=packaged_table(table.device).ops | table.ops)


def packaged_table(kind: str) -> TileTable:
    """Return the package's table for a kind of device, or the defaults."""
    file = resources.files(__package__).joinpath(f"{_file_name(kind)}.json")
    return parse_table(file.read_text(), str(file), kind) if file.is_file() else default_table(kind)


def user_table_path(kind: str) -> Path:
    """Return where the user's own table for a kind of device is, if there is one."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mtpjax" / "tile_tables" / f"{_file_name(kind)}.json"


def _load(kind: str, variable: str | None) -> TileTable:
    path = Path(variable) if variable else user_table_path(kind)
    if not variable and not path.exists():
        return packaged_table(kind)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = f" named by {ENVIRONMENT_VARIABLE}" if variable else ""
        raise TileTableError(
            f"tile table {path}{why}: it cannot be read ({error}). Write it with `mtpjax tune`, or "
            + (f"unset {ENVIRONMENT_VARIABLE}." if variable else "delete it.")
        ) from error
    table = parse_table(text, str(path), kind)
    if table.is_toy and platform() != "cpu":
        raise TileTableError(
            f"tile table {path}: it was measured at toy size, which says nothing about the device {kind!r}. Delete the "
            "file, or have `mtpjax tune` write a new one."
        )
    return complete(table)


def _file_name(kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") or "default"
