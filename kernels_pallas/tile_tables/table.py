"""`TileTable`: the constants of all ops for one kind of device, read from JSON and written to it.

    {"version": 1, "device": "H100", "source": "...", "ops": {"matmul": [
        {"max_outputs": 2048, "basis": "measured", "note": "...", "constants": {"programs": 256, ...}},
        {"basis": "measured", "note": "...", "constants": {"programs": 512, ...}}]}}

A weight `[outputs, inputs]` gets the constants of the first entry of its op that it is not too large for; the last
entry takes all sizes. How many rows there are does not count: constants fix the order of sums.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from kernels_pallas.tile_tables.constants import OPS, Constants, parse_constants

VERSION = 1  # of the tables; grows when a constant gets another meaning
BASES = ("measured", "predicted", "default", "toy")


class TileTableError(ValueError):
    """A table is wrong, unreadable, old, or not for this device."""


@dataclass(frozen=True)
class Entry:
    """The constants of an op for weights of at most these sizes.

    Attributes:
        max_outputs, max_inputs: None: of any size.
        basis: one of `BASES`.
        note: how the constants were found.
    """

    constants: Constants
    basis: str
    note: str = ""
    max_outputs: int | None = None
    max_inputs: int | None = None

    def takes(self, outputs: int, inputs: int) -> bool:
        """Return whether the entry is for a weight of these sizes."""
        fits = self.max_outputs is None or outputs <= self.max_outputs
        return fits and (self.max_inputs is None or inputs <= self.max_inputs)


@dataclass(frozen=True)
class TileTable:
    """Constants for one kind of device.

    Attributes:
        device: the kind, as `kernels_pallas.platform.device_kind` names it; "" for the defaults.
        source: what the constants come from.
        ops: the entries of each op, the smallest weights first.
    """

    device: str
    source: str
    ops: dict[str, tuple[Entry, ...]]

    def find(self, op: str, outputs: int = 0, inputs: int = 0) -> Constants:
        """Return the constants of an op for a weight of these sizes."""
        return next(entry for entry in self.ops[op] if entry.takes(outputs, inputs)).constants

    @property
    def is_toy(self) -> bool:
        """Whether it was measured at toy size, which says nothing about a real device."""
        return any(entry.basis == "toy" for entries in self.ops.values() for entry in entries)

    def to_json(self) -> str:
        """Return the text of the table's file."""

        def described(entry: Entry) -> dict[str, Any]:
            sizes = {"max_outputs": entry.max_outputs, "max_inputs": entry.max_inputs}
            given = {name: size for name, size in sizes.items() if size is not None}
            return {**given, "basis": entry.basis, "note": entry.note, "constants": asdict(entry.constants)}

        ops = {op: [described(entry) for entry in entries] for op, entries in self.ops.items()}
        table = {"version": VERSION, "device": self.device, "source": self.source, "ops": ops}
        return json.dumps(table, indent=1) + "\n"


def default_table(device: str = "") -> TileTable:
    """Return the table for devices that none was made for."""
    entries: dict[str, tuple[Entry, ...]] = {op: (Entry(kind(), "default"),) for op, kind in OPS.items()}
    return TileTable(device, "defaults for devices without a table", entries)


def parse_table(text: str, where: str, device: str) -> TileTable:
    """Read the text of a table's file.

    Args:
        where: the path, for messages.
        device: the kind of device that the table must be for.

    Raises:
        TileTableError: the text is no table, of another version, for another device, or has a wrong entry.
    """
    try:
        return _parse(json.loads(text), device)
    except (ValueError, TypeError, AttributeError) as error:  # a JSONDecodeError is a ValueError
        raise TileTableError(
            f"tile table {where}: {error}. Correct or delete the file, or have `mtpjax tune` write a new one."
        ) from error


def _parse(content: Any, device: str) -> TileTable:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected an object")
    if content.get("version") != VERSION:
        raise ValueError(f"its version is {content.get('version')!r}, expected {VERSION}")
    _check_keys(content, ("version", "device", "source", "ops"), "the table")
    if content["device"] != device:
        raise ValueError(f"it is for the device {content['device']!r}, and this one is {device!r}")
    if not isinstance(content["ops"], dict):
        raise ValueError(f"its ops are a {type(content['ops']).__name__}, expected an object")
    for op in content["ops"]:
        if op not in OPS:
            raise ValueError(f"unknown op {op!r}, expected {', '.join(OPS)}")
    ops = {op: _parse_entries(op, entries) for op, entries in content["ops"].items()}
    return TileTable(device, str(content["source"]), ops)


def _parse_entries(op: str, entries: Any) -> tuple[Entry, ...]:
    if not isinstance(entries, list):
        raise ValueError(f"{op} is a {type(entries).__name__}, expected a list")
    found = []
    for number, values in enumerate(entries):
        try:
            _check_keys(values, ("basis", "note", "constants"), "the entry", optional=("max_outputs", "max_inputs"))
            if values["basis"] not in BASES:
                raise ValueError(f"basis is {values['basis']!r}, expected one of {', '.join(BASES)}")
            for name in ("max_outputs", "max_inputs"):
                if name in values and (type(values[name]) is not int or values[name] < 1):
                    raise ValueError(f"{name} is {values[name]!r}, expected a positive integer")
            found.append(Entry(**{**values, "constants": parse_constants(op, values["constants"])}))
        except ValueError as error:
            raise ValueError(f"{op}, entry {number}: {error}") from error
    if not found or (found[-1].max_outputs, found[-1].max_inputs) != (None, None):
        raise ValueError(f"{op}: the last entry must take weights of all sizes: no max_outputs, no max_inputs")
    return tuple(found)


def _check_keys(values: Any, expected: tuple[str, ...], what: str, optional: tuple[str, ...] = ()) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{what} is a {type(values).__name__}, expected an object")
    for key in values.keys() - {*expected, *optional}:
        raise ValueError(f"{what} has the unknown key {key!r}, expected {', '.join(expected + optional)}")
    for key in expected:
        if key not in values:
            raise ValueError(f"{what} has no {key!r}")
