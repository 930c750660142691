"""How published checkpoints hold quantised matrices: which tensors stand for one weight, told by their `quantization_config`.

A `Format` takes the tensors of one weight `[O, D]` apart. FP8 (Qwen's own), GPTQ, AutoRound, AWQ, compressed-tensors, modelopt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from checkpoints.hf_quantized import decode as codes
from checkpoints.hf_quantized.decode import Arrays, Decoded, Unsupported, held_group
from checkpoints.packed_array import FP8_BLOCK

Shapes = Mapping[str, tuple[int, ...]]
Dtypes = tuple[str, ...]  # safetensors' names
FLOATS = ("F16", "BF16", "F32")
_ACTIVATIONS = (
    "input_scale", "input_global_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale", "q_scale",
    "k_scale", "v_scale",
)  # fmt: skip
_BY_GROUPS = "one for each row, or for each 16, 32, 64 or a multiple of 128 elements of one"
_BY_BLOCKS = "one for each 128 x 128 elements, each row, each 32 elements of one, or one for all"


class Misfit(ValueError):
    """Says what scales would fit a weight of `rows` x `size`."""

    def __init__(self, rows: int, size: int, expected: str) -> None:
        super().__init__(f"scales do not fit a weight of {rows} x {size}", expected)


@dataclass(frozen=True)
class Format:
    """One way to hold a weight: its tensors are named `WEIGHT` with ".weight" replaced by one of `parts`.

    Attributes:
        parts: needed suffixes and their dtypes; the first one tells that a matrix is held so, if it has that dtype.
        optional: suffixes that may be there and are read.
        ignored: suffixes of tensors that the weight does not need (scales of activations).
        shape: `[O, D]` from the shapes of the parts; raises Misfit if they do not belong together.
        decode: the weight from the parts.
    """

    parts: Mapping[str, Dtypes]
    shape: Callable[[Shapes], tuple[int, int]]
    decode: Callable[[Arrays], Decoded]
    optional: Mapping[str, Dtypes]
    ignored: tuple[str, ...]

    @property
    def mark(self) -> str:
        return next(iter(self.parts))


def _format(
    parts: Mapping[str, Dtypes],
    shape: Callable[[Shapes], tuple[int, int]],
    decode: Callable[[Arrays], Decoded],
    optional: Mapping[str, Dtypes] | None = None,
    ignored: tuple[str, ...] = (),
) -> Format:
    return Format(parts, shape, decode, optional or {}, (*_ACTIVATIONS, *ignored))


def _count(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """A shape without axes of length one behind `axes` of them; all of length one where it is shorter."""
    return (*shape, *(1,) * axes)[: max(axes, len(shape))]


def _transposed(shapes: Shapes, along_rows: bool = False) -> tuple[int, int]:
    """GPTQ, or with `along_rows` AWQ."""
    if any(len(shapes[part]) != 2 for part in ("qweight", "qzeros", "scales")):
        raise Unsupported("or its scales are no matrices")
    weight, zeros, (groups, rows) = shapes["qweight"], shapes["qzeros"], shapes["scales"]
    bits = 32 * zeros[1] // max(rows, 1)
    size = weight[0] if along_rows else 32 * weight[0] // max(bits, 1)
    columns = rows * bits // 32 if along_rows else rows
    if zeros != (groups, -(-rows * bits // 32)) or weight[1] != columns or not held_group(size, groups):
        raise Misfit(rows, size, _BY_GROUPS)
    if bits not in ((4,) if along_rows else (4, 8)):
        raise Unsupported(f"holds {bits} bits, expected 4{'' if along_rows else ' or 8'}; others are not supported yet")
    return rows, size


def _rows(shapes: Shapes, mark: str, size: int, group: int | None = None) -> tuple[int, int]:
    """`weight_scale` for rows, groups of them, or all; `group`: what it must be where the config tells, 0 for a whole row."""
    rows, scale, zero = shapes[mark][0], shapes["weight_scale"], shapes.get("weight_zero_point")
    groups = 1 if scale in ((), (1,), (1, 1)) else _count(scale, 2)[1]
    fits = group is None or (groups == 1 if group == 0 else groups * group == size)
    if not fits or not held_group(size, groups) or scale not in ((), (1,), (1, 1), (rows,), (rows, groups)):
        raise Misfit(rows, size, _BY_GROUPS if not group else f"one for each {group} elements of a row")
    if zero is not None and mark == "weight" and zero != scale:
        raise Misfit(rows, size, "zeros like scales")
    return rows, size


def _words(shapes: Shapes, bits: int, group: int | None) -> tuple[int, int]:
    rows, size = _rows(shapes, "weight_packed", 32 // bits * shapes["weight_packed"][1], group)
    zero = shapes.get("weight_zero_point")
    if zero is not None and zero != (-(-rows * bits // 32), _count(shapes["weight_scale"], 2)[1]):
        raise Misfit(rows, size, "zeros packed along the rows")
    return rows, size


def _blocks(shapes: Shapes, scales: str) -> tuple[int, int]:
    (rows, size), scale = shapes["weight"], shapes[scales]
    grid = -(-rows // FP8_BLOCK), -(-size // FP8_BLOCK)
    by_rows = ((rows,), (rows, 1), *([(rows, size // 32)] if size % 32 == 0 else []))
    if scale not in ((), (1,), (1, 1), *by_rows, grid, (grid[0], 1, grid[1], 1)):
        raise Misfit(rows, size, _BY_BLOCKS)
    return rows, size


def _pairs(shapes: Shapes, mark: str, group: int) -> tuple[int, int]:
    rows, size = shapes[mark][0], 2 * shapes[mark][1]
    if any(shapes.get(whole, ()) not in ((), (1,)) for whole in ("weight_scale_2", "weight_global_scale")):
        raise Misfit(rows, size, "one factor for all beside them")
    if shapes["weight_scale"] != (rows, size // group) or size % 32:
        raise Misfit(rows, size, f"one for each {group} elements of a row")
    return rows, size


def _fp8(scales: str = "weight_scale", dtypes: Dtypes = (*FLOATS, "F8_E8M0", "U8")) -> Format:
    parts = {"weight": ("F8_E4M3",), scales: dtypes}
    return _format(
        parts, partial(_blocks, scales=scales), partial(codes.fp8, scales=scales), ignored=("weight_zero_point",)
    )


def _modelopt_fp4() -> Format:
    parts = {"weight": ("U8",), "weight_scale": ("F8_E4M3",), "weight_scale_2": FLOATS}
    return _format(parts, partial(_pairs, mark="weight", group=16), codes.nvfp4)


def _int8(group: int | None, zero: Mapping[str, Dtypes] | None = None, ignored: tuple[str, ...] = ()) -> Format:
    parts = {"weight": ("I8",), "weight_scale": FLOATS, **(zero or {})}
    return _format(parts, lambda s: _rows(s, "weight", s["weight"][1], group), codes.bytes8, ignored=ignored)


def _expect(settings: Mapping[str, Any], where: str = "", **wanted: tuple[Any, ...]) -> None:
    for key, values in wanted.items():
        if settings.get(key) not in values:
            expected = " or ".join(repr(v) for v in values if v is not None or len(values) == 1)
            raise Unsupported(
                f"{where}{key} is {settings.get(key)!r}, expected {expected}; anything else is not supported yet"
            )


def _gptq(settings: Mapping[str, Any], first_zero: int) -> Format:
    """Bits are told by the shapes of each weight: `dynamic` and `extra_config` may give some more than others."""
    _expect(settings, bits=(4, 8))
    parts, order = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}, {"g_idx": ("I32", "I64")}
    moved = bool(settings.get("desc_act"))  # then the order must be there, and `decode` refuses all but the plain one
    decode = partial(codes.gptq, first_zero=first_zero)
    return _format(parts | order if moved else parts, _transposed, decode, None if moved else order)


def _awq(settings: Mapping[str, Any]) -> Format:
    _expect(settings, bits=(4,), version=("gemm", "GEMM", None))
    parts = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}
    return _format(parts, partial(_transposed, along_rows=True), codes.awq)


_AUTO_ROUND = {  # packing -> what is added to stored zeros
    "auto_round:auto_gptq": 1, "auto_round:gptqmodel": 0, "auto_round:exllamav2": 0, "auto_round:tritonv2": 0, "auto_round": 0,
}  # fmt: skip


def _auto_round(settings: Mapping[str, Any]) -> Format:
    _expect(settings, data_type=("int", None), packing_format=(*_AUTO_ROUND, "auto_round:auto_awq"))
    packing = settings["packing_format"]
    return _awq(settings) if packing == "auto_round:auto_awq" else _gptq(settings, _AUTO_ROUND[packing])


_NO_TRANSFORM: tuple[Any, ...] = (None, {}, {"config_groups": {}})


def _compressed(settings: Mapping[str, Any]) -> tuple[Format, ...]:
    """A format for each of `config_groups`; those with zeros first, so that none is overlooked."""
    _expect(settings, transform_config=_NO_TRANSFORM)
    sparse = settings.get("sparsity_config") or {}
    _expect(sparse, "sparsity_config: ", format=("dense", None))
    found = [
        _compressed_group(f"config_groups: {name}: ", group, group.get("format") or settings.get("format"))
        for name, group in (settings.get("config_groups") or {}).items()
        if group.get("weights")
    ]
    if not found:
        raise Unsupported("config_groups names no weights, expected at least one group with 'weights'")
    return tuple(sorted(found, key=lambda format: -len(format.parts)))


_WHOLE = ("channel", "tensor")


def _compressed_group(where: str, group: Mapping[str, Any], kind: Any) -> Format:
    weights = group["weights"]
    if kind == "naive-quantized":
        kind = f"{weights.get('type')}-quantized"
    kinds = (
        "pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized",
    )  # fmt: skip
    _expect({"format": kind}, where, format=kinds)
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if kind in ("pack-quantized", "int-quantized"):
        _expect(weights, where, type=("int",), num_bits=(4, 8) if kind == "pack-quantized" else (8,))
        _expect(weights, where, strategy=("group", *_WHOLE, None))
        size = 0 if strategy in _WHOLE or size == -1 else size
        words = kind == "pack-quantized"
        zero = {} if weights.get("symmetric", True) else {"weight_zero_point": ("I32",) if words else ("I8",)}
        ignored = ("weight_shape",) if zero else ("weight_shape", "weight_zero_point")
        if not words:
            return _int8(size, zero, ignored)
        parts = {"weight_packed": ("I32",), "weight_scale": FLOATS, **zero}
        bits, order = weights["num_bits"], {"weight_g_idx": ("I32", "I64")}
        return _format(parts, partial(_words, bits=bits, group=size), partial(codes.words, bits=bits), order, ignored)
    _expect(weights, where, type=("float",), symmetric=(True, None))
    if kind in ("float-quantized", "mxfp8-quantized"):
        _expect(weights, where, num_bits=(8,), strategy=("block", "group", *_WHOLE, None))
        _expect(weights, where, block_structure=([FP8_BLOCK, FP8_BLOCK],) if strategy == "block" else (None,))
        return _fp8()
    _expect(weights, where, num_bits=(4,), group_size=(16,) if kind == "nvfp4-pack-quantized" else (32,))
    shape = partial(_pairs, mark="weight_packed", group=size)
    if kind == "mxfp4-pack-quantized":
        return _format({"weight_packed": ("U8",), "weight_scale": ("U8", "F8_E8M0")}, shape, codes.mxfp4)
    parts = {"weight_packed": ("U8",), "weight_scale": ("F8_E4M3",), "weight_global_scale": FLOATS}
    return _format(parts, shape, codes.nvfp4_divided)


_MODELOPT: dict[str, Callable[[], Format]] = {
    "NVFP4": _modelopt_fp4, "W4A16_NVFP4": _modelopt_fp4, "FP8": _fp8, "FP8_PER_CHANNEL_PER_TOKEN": _fp8, "FP8_PB_WO": _fp8,
    "MXFP8": _fp8, "W8A16": lambda: _int8(0),
}  # fmt: skip


def _modelopt(settings: Mapping[str, Any]) -> tuple[Format, ...]:
    algo = str(settings.get("quant_algo")).upper()  # modelopt 0.47 writes "fp8_pb_wo"
    _expect({"quant_algo": algo}, quant_algo=(*_MODELOPT, "MIXED_PRECISION"))
    if algo != "MIXED_PRECISION":
        return (_MODELOPT[algo](),)
    for layer, each in (settings.get("quantized_layers") or {}).items():
        _expect(
            {"quant_algo": str(each.get("quant_algo")).upper()},
            f"quantized_layers: {layer}: ",
            quant_algo=tuple(_MODELOPT),
        )
    return _modelopt_fp4(), _fp8(), _int8(0)


def formats_of(settings: Mapping[str, Any]) -> tuple[Format, ...]:
    """The formats that a checkpoint's `quantization_config` describes; the first that fits a weight's tensors is meant.

    Raises:
        Unsupported: another method, or settings of it that are not read; names the key, what was found and expected.
    """
    method = settings.get("quant_method")
    _expect(settings, rotation_config=(None, {}))  # weights that are turned need their inputs turned, too
    if method == "fp8":
        _expect(settings, weight_block_size=([FP8_BLOCK, FP8_BLOCK], None))
        return (_fp8("weight_scale_inv"),)  # a factor, whatever its name says
    if method == "gptq":
        _expect(settings, checkpoint_format=("gptq", "gptq_v2", None))
        return (_gptq(settings, 0 if settings.get("checkpoint_format") == "gptq_v2" else 1),)
    if method == "auto-round":
        return (_auto_round(settings),)
    if method == "awq":
        return (_awq(settings),)
    if method == "compressed-tensors":
        return _compressed(settings)
    if method == "modelopt":
        return _modelopt(settings)
    raise Unsupported(
        "this quant_method is not supported yet; expected fp8, gptq, auto-round, awq, compressed-tensors or modelopt"
    )
