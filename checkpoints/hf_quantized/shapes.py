"""Check the shapes of the tensors of one quantised weight, and derive the shape `(O, D)` of the weight.

Every function raises ScaleShapeError if scales or zero points do not fit, and UnsupportedQuantizationError if the
tensors are not understood at all.
"""

from __future__ import annotations

from collections.abc import Mapping

from checkpoints.hf_quantized.decode import supported_group_size
from checkpoints.hf_quantized.errors import ScaleShapeError, UnsupportedQuantizationError
from checkpoints.packed_array import FP8_BLOCK

Shapes = Mapping[str, tuple[int, ...]]  # of the tensors of a weight, by suffix

_ONE_FOR_ALL: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))  # shapes of a single scale
_GROUP_SCALES = "one for each row, or for each 16, 32, 64 or a multiple of 128 elements of one"
_FP8_SCALES = "one for each 128 x 128 elements, each row, each 32 elements of one, or one for all"


def gptq_or_awq_shape(shapes: Shapes, words_along_rows: bool = False) -> tuple[int, int]:
    """Return the weight's shape for GPTQ, or for AWQ (`words_along_rows`: its words hold eight rows, not columns)."""
    if any(len(shapes[suffix]) != 2 for suffix in ("qweight", "qzeros", "scales")):
        raise UnsupportedQuantizationError("or its scales are not matrices")
    qweight, qzeros, (num_groups, rows) = shapes["qweight"], shapes["qzeros"], shapes["scales"]
    bits = 32 * qzeros[1] // max(rows, 1)
    columns = qweight[0] if words_along_rows else 32 * qweight[0] // max(bits, 1)
    qweight_width = rows * bits // 32 if words_along_rows else rows
    fits = qzeros == (num_groups, -(-rows * bits // 32)) and qweight[1] == qweight_width
    if not fits or not supported_group_size(columns, num_groups):
        raise ScaleShapeError(rows, columns, _GROUP_SCALES)
    if bits not in ((4,) if words_along_rows else (4, 8)):
        expected = "4" if words_along_rows else "4 or 8"
        raise UnsupportedQuantizationError(f"holds {bits} bits, expected {expected}; others are not supported yet")
    return rows, columns


def int8_shape(shapes: Shapes, group: int | None) -> tuple[int, int]:
    """Return the weight's shape for int8; `group` as in `_check_row_scales`."""
    rows, columns = shapes["weight"][0], shapes["weight"][1]
    _check_row_scales(shapes, rows, columns, group)
    zero_shape = shapes.get("weight_zero_point")
    if zero_shape is not None and zero_shape != shapes["weight_scale"]:
        raise ScaleShapeError(rows, columns, "zeros like scales")
    return rows, columns


def packed_int32_shape(shapes: Shapes, bits: int, group: int | None) -> tuple[int, int]:
    """Return the weight's shape for int32 words along D; `group` as in `_check_row_scales`."""
    rows, columns = shapes["weight_packed"][0], 32 // bits * shapes["weight_packed"][1]
    _check_row_scales(shapes, rows, columns, group)
    zero_shape, num_groups = shapes.get("weight_zero_point"), _num_groups(shapes["weight_scale"])
    if zero_shape not in (None, (-(-rows * bits // 32), num_groups), (rows, num_groups)):
        raise ScaleShapeError(rows, columns, "zeros packed along the rows")
    return rows, columns


def _check_row_scales(shapes: Shapes, rows: int, columns: int, group: int | None) -> None:
    """Check `weight_scale`: one for each row, for each group of a row, or for all.

    `group` is the group size in the config: 0 for a whole row, None if the config does not say.
    """
    scale_shape = shapes["weight_scale"]
    num_groups = 1 if scale_shape in _ONE_FOR_ALL else _num_groups(scale_shape)
    fits_config = group is None or (num_groups == 1 if group == 0 else num_groups * group == columns)
    fits_weight = scale_shape in (*_ONE_FOR_ALL, (rows,), (rows, num_groups))
    if not fits_config or not fits_weight or not supported_group_size(columns, num_groups):
        raise ScaleShapeError(rows, columns, f"one for each {group} elements of a row" if group else _GROUP_SCALES)


def _num_groups(scale_shape: tuple[int, ...]) -> int:
    """Return the size of the second axis, which may be missing if it is 1."""
    return scale_shape[1] if len(scale_shape) > 1 else 1


def fp8_shape(shapes: Shapes, scale_suffix: str) -> tuple[int, int]:
    """Return the weight's shape for FP8: a scale for blocks, rows, groups of 32 (MXFP8), or the whole weight."""
    (rows, columns), scale_shape = shapes["weight"], shapes[scale_suffix]
    blocks = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    row_shapes = ((rows,), (rows, 1), *([(rows, columns // 32)] if columns % 32 == 0 else []))
    if scale_shape not in (*_ONE_FOR_ALL, *row_shapes, blocks, (blocks[0], 1, blocks[1], 1)):
        raise ScaleShapeError(rows, columns, _FP8_SCALES)
    return rows, columns


def fp4_shape(shapes: Shapes, weight_suffix: str, group: int) -> tuple[int, int]:
    """Return the weight's shape for NVFP4 (`group` 16) and MXFP4 (`group` 32): two elements to a byte."""
    rows, columns = shapes[weight_suffix][0], 2 * shapes[weight_suffix][1]
    if any(shapes.get(suffix, ()) not in ((), (1,)) for suffix in ("weight_scale_2", "weight_global_scale")):
        raise ScaleShapeError(rows, columns, "one factor for all beside them")
    if shapes["weight_scale"] != (rows, columns // group) or columns % 32:
        raise ScaleShapeError(rows, columns, f"one for each {group} elements of a row")
    return rows, columns
