"""What a table may say about each op. The defaults are for devices that no table knows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _power_of_2(default: int, least: int, most: int) -> Any:
    return field(default=default, metadata={"least": least, "most": most, "power_of_2": True})


def _count(default: int, least: int, most: int) -> Any:
    return field(default=default, metadata={"least": least, "most": most, "power_of_2": False})


@dataclass(frozen=True)
class MatmulConstants:
    """Products of rows with dense weights.

    Attributes:
        programs: programs to aim at with few rows; the sum over F is split until there are so many.
        stages_few, stages_many: iterations of the loop that are under way at once, with few rows and with many. Cards
            with less shared memory than that takes get fewer.
        row_tile_many: the most rows of a tile with many rows of bfloat16; limited by shared memory, too.
        out_tile: outputs of a tile with few rows. Wide tiles of many rows have twice as many.
    """

    programs: int = _power_of_2(512, 16, 8192)
    stages_few: int = _count(2, 2, 8)
    stages_many: int = _count(3, 2, 8)
    row_tile_many: int = _power_of_2(128, 16, 256)
    out_tile: int = _power_of_2(64, 64, 128)


@dataclass(frozen=True)
class ExpertsConstants:
    """Products of rows with the experts that they chose.

    Attributes:
        gate_up_parts: parts into which the sum over D of gate and up is cut, fewer where they would not have two steps
            each. With few rows a part is a program of its own.
        stages_few, stages_many: as in `MatmulConstants`, where each assignment has a block of its own and where not.
        block_tile: the most rows of a block of bfloat16; 64 at most on cards without `wgmma` or `tcgen05`.
    """

    gate_up_parts: int = _power_of_2(2, 1, 16)
    stages_few: int = _count(3, 2, 8)
    stages_many: int = _count(3, 2, 8)
    block_tile: int = _power_of_2(128, 8, 128)


@dataclass(frozen=True)
class GatedDeltaRuleConstants:
    """The recurrence of Gated DeltaNet for few rows.

    Attributes:
        state_columns: columns of a head's state that a warp of the kernel holds side by side.
    """

    state_columns: int = _power_of_2(8, 8, 64)


Constants = MatmulConstants | ExpertsConstants | GatedDeltaRuleConstants

OPS: dict[str, type[Constants]] = {
    "matmul": MatmulConstants,
    "experts": ExpertsConstants,
    "gated_delta_rule": GatedDeltaRuleConstants,
}


def parse_constants(op: str, values: Any) -> Constants:
    """Return the constants of an op from JSON, every one of them named.

    Raises:
        ValueError: a name is missing or unknown, or a value is out of range or, where it must be, no power of two.
    """
    if not isinstance(values, dict):
        raise ValueError(f"constants are a {type(values).__name__}, expected an object")
    kind = OPS[op]
    known = {each.name: each for each in fields(kind)}
    for name in values.keys() - known.keys():
        raise ValueError(f"unknown key {name!r}, expected {', '.join(known)}")
    for name, each in known.items():
        if name not in values:
            raise ValueError(f"{name!r} is missing")
        value, limits = values[name], each.metadata
        if type(value) is not int or not limits["least"] <= value <= limits["most"]:
            raise ValueError(f"{name} is {value!r}, expected an integer from {limits['least']} to {limits['most']}")
        if limits["power_of_2"] and value & (value - 1):
            raise ValueError(f"{name} is {value}, expected a power of two")
    return kind(**values)
