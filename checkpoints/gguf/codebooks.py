"""The GGUF types of one to three bits whose elements come in fours and eights from a list of points, read exactly.

Each element is one of at most 16 numbers, so they are repacked as `codes4`. The lists are those of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.gguf.block_types import BlockType, Bytes, half, joined
from checkpoints.packed_array import PackedArray, pack4


@cache
def points(name: str) -> NDArray[np.float32]:
    """The points of a type, `[N, 4 or 8]`. Raises ImportError without the `gguf` package."""
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    return np.asarray(kind.grid, np.float32).reshape(kind.grid_shape)


@cache
def _table(name: str) -> tuple[tuple[int, ...], NDArray[np.uint8]]:
    """Of points without signs: the table of all values with both signs, in order, and for each point the number of its
    magnitudes."""
    sizes, which = np.unique(points(name), return_inverse=True)
    values = tuple(int(v) for v in (*-sizes[::-1], *sizes))
    return values + (0,) * (16 - len(values)), which.reshape(points(name).shape).astype(np.uint8)


def _bits(raw: Bytes) -> NDArray[np.uint8]:
    """Eight a byte, the lowest first: `[..., n]` -> `[..., n, 8]`."""
    return np.unpackbits(raw[..., None], axis=-1, bitorder="little")


def _sevenths(words: NDArray[Any], count: int) -> NDArray[np.uint8]:
    """`count` times seven sign bits, the lowest first; the eighth makes their number even. `[..., n]` -> `[..., n, count, 8]`."""
    seven = ((words[..., None] >> (7 * np.arange(count)).astype(words.dtype)) & 127).astype(np.uint8)
    bits = _bits(seven)
    bits[..., 7] = bits[..., :7].sum(axis=-1) & 1
    return bits


def _nibble_pairs(raw: Bytes) -> NDArray[np.uint8]:
    """The low, then the high nibble of every byte."""
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)


def _signed(
    name: str,
    number: NDArray[Any],
    negative: NDArray[np.uint8],
    odd: NDArray[Any],
    d: NDArray[Any],
    eighths: int,
    group: int,
) -> PackedArray:
    """Points by number with a sign for every element, times (2 s + 1) d / eighths.

    Args:
        number: `[R, N, points a block]`.
        negative: 1 for a minus, any shape of as many elements.
        odd: s of every group, `[R, N, groups a block]`.
        d: `[R, N, 1]` float16; a fraction of it need not be one.
    """
    table, magnitudes = _table(name)
    which = magnitudes[number].reshape(*number.shape[:2], -1)
    half_way = np.uint8(len(np.unique(points(name))))
    signs = negative.reshape(which.shape).astype(bool)
    codes = np.where(signs, half_way - 1 - which, half_way + which)
    scale = (2 * odd.astype(np.int8) + 1).astype(np.int8)
    outer = d if eighths == 1 else d.astype(np.float32) / np.float32(eighths)
    return PackedArray(pack4(joined(codes)), joined(scale), None, "codes4", group, table, super_scale=joined(outer))


def _iq2_xxs(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 2:]).view("<u4").reshape(*raw.shape[:-1], 8, 2)
    number = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    return _signed("IQ2_XXS", number, _sevenths(words[..., 1], 4), words[..., 1] >> 28, half(raw[..., :2]), 8, 32)


def _iq2_xs(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 2:66]).view("<u2")
    signs = _sevenths(words >> 9, 1)
    return _signed("IQ2_XS", words & 511, signs, _nibble_pairs(raw[..., 66:]), half(raw[..., :2]), 8, 16)


def _iq2_s(raw: Bytes) -> PackedArray:
    high = (raw[..., 66:74, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    number = raw[..., 2:34] | high.reshape(*raw.shape[:-1], 32).astype(np.uint16) << 8
    return _signed("IQ2_S", number, _bits(raw[..., 34:66]), _nibble_pairs(raw[..., 74:]), half(raw[..., :2]), 8, 16)


def _iq3_xxs(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 66:]).view("<u4")
    return _signed("IQ3_XXS", raw[..., 2:66], _sevenths(words, 4), words >> 28, half(raw[..., :2]), 4, 32)


def _iq3_s(raw: Bytes) -> PackedArray:
    number = raw[..., 2:66] | _bits(raw[..., 66:74]).reshape(*raw.shape[:-1], 64).astype(np.uint16) << 8
    return _signed("IQ3_S", number, _bits(raw[..., 74:106]), _nibble_pairs(raw[..., 106:]), half(raw[..., :2]), 1, 32)


_SHIFTED = (-9, -7, -1, 1, 7, 9) + (0,) * 10  # eight times -1, 0 and 1, each less or more an eighth


def _shifted(number: NDArray[Any], up: NDArray[Any], odd: NDArray[Any], d: NDArray[Any], group: int) -> PackedArray:
    """Points of -1, 0 and 1 by number, an eighth added (`up`, for every point) or taken away, times (2 s + 1) d."""
    codes = 2 * (points("IQ1_S").astype(np.int8)[number] + 1) + up[..., None]
    scale = (2 * odd + 1).astype(np.int8)
    return PackedArray(
        pack4(joined(codes.reshape(*number.shape[:2], -1))), joined(scale), None, "codes4", group, _SHIFTED,
        super_scale=joined(d.astype(np.float32) / np.float32(8)),
    )  # fmt: skip


def _iq1_s(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 34:]).view("<u2")
    high = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & 7
    number = raw[..., 2:34] | high.reshape(*raw.shape[:-1], 32) << 8
    up = (words >> 15 == 0).repeat(4, axis=-1)
    return _shifted(number, up, (words >> 12) & 7, half(raw[..., :2]), 32)


def _iq1_m(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 48:]).view("<u2")
    d = (
        (words >> 12 << np.array([0, 4, 8, 12], np.uint16))
        .sum(axis=-1, keepdims=True)
        .astype(np.uint16)
        .view(np.float16)
    )
    odd = ((words[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & 7).reshape(*raw.shape[:-1], 16)
    nibbles = _nibble_pairs(raw[..., 32:48])
    return _shifted(raw[..., :32] | (nibbles & 7).astype(np.uint16) << 8, nibbles >> 3 == 0, odd, d, 16)


def _block(name: str, size: int, repack: Callable[[Bytes], PackedArray]) -> BlockType:
    return BlockType(name, 256, size, repack=repack, points="IQ1_S" if name.startswith("IQ1") else name)


POINTS: dict[int, BlockType] = {
    16: _block("IQ2_XXS", 66, _iq2_xxs),
    17: _block("IQ2_XS", 74, _iq2_xs),
    22: _block("IQ2_S", 82, _iq2_s),
    18: _block("IQ3_XXS", 98, _iq3_xxs),
    21: _block("IQ3_S", 110, _iq3_s),
    19: _block("IQ1_S", 50, _iq1_s),
    29: _block("IQ1_M", 56, _iq1_m),
}
