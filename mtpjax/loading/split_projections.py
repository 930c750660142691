"""Qwen3-Next's fused projections of a DeltaNet, presented as the four tensors that Qwen3.5 has.

`in_proj_qkvz` holds for each key head its query rows, key rows, and the value and gate rows of the value heads that
belong to it; `in_proj_ba` the same for the logits of beta and of the decay. Source: `fix_query_key_value_ordering` in
transformers' modeling_qwen3_next.py. A part is a choice of rows, so packed weights stay packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import CheckpointError, TensorInfo, TensorSource
from checkpoints.packed_array import FP8_BLOCK, PackedArray
from mtpjax.config import ModelConfig

QKVZ, BA = "linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"
FUSED = (QKVZ, BA)


@dataclass(frozen=True)
class _Part:
    """One of the four tensors: the rows `rows` of the tensor `fused`."""

    fused: str
    rows: NDArray[np.int64]


class SplitProjections:
    """A `TensorSource` over another one, whose fused projections are split.

    Raises:
        CheckpointError: a fused projection has another number of rows than the config says, or its parts are there too.
    """

    def __init__(self, source: TensorSource, cfg: ModelConfig) -> None:
        self.source = source
        self._parts: dict[str, _Part] = {}
        self._last_read: tuple[str, Any] | None = None  # the parts of a tensor are read one after the other
        rows_of = {QKVZ: _rows_of_qkvz(cfg), BA: _rows_of_ba(cfg)}
        tensors = dict(source.tensors)
        for fused in [name for name in tensors if name.endswith(FUSED)]:
            kind = next(kind for kind in FUSED if fused.endswith(kind))
            info = tensors.pop(fused)
            expected = sum(len(rows) for rows in rows_of[kind].values())
            if info.shape != (expected, cfg.hidden_size):
                raise CheckpointError(
                    f"{info.file}: {info.name!r} has shape {list(info.shape)}, expected {[expected, cfg.hidden_size]}. "
                    "Do config.json and the weights belong together?"
                )
            for part, rows in rows_of[kind].items():
                name = fused.removesuffix(kind) + part
                if name in tensors:
                    raise CheckpointError(
                        f"{info.file}: has {info.name!r} and also {tensors[name].name!r}, expected one of the two."
                    )
                self._parts[name] = _Part(fused, rows)
                tensors[name] = replace(
                    info,
                    name=info.name.removesuffix(kind) + part,
                    shape=(len(rows), *info.shape[1:]),
                    nbytes=info.nbytes // expected * len(rows),
                )
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    @property
    def path(self) -> Path:
        """That of the source, as are the three below."""
        return self.source.path

    @property
    def config(self) -> dict[str, Any]:
        return self.source.config

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.source.generation_config

    @property
    def tokenizer_file(self) -> Path | None:
        return self.source.tokenizer_file

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """Read tensor `name` (canonical) into `out`; raises as the source's `read_into`."""
        if name not in self._parts:
            self.source.read_into(name, out, check_finite)
            return
        info, part = self.tensors[name], self._parts[name]
        if out.shape != info.shape:
            raise CheckpointError(f"{info.file}: {name!r} has shape {list(info.shape)}, expected {list(out.shape)}.")
        out[...] = self._fused(part.fused)[part.rows]  # which the source has checked for NaN and infinity

    def read(self, name: str) -> NDArray[Any]:
        """Return tensor `name` (canonical) as a new array; raises as `read_into`."""
        if name not in self._parts:
            return self.source.read(name)
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_into(name, out)
        return out

    def read_packed(self, name: str) -> PackedArray | None:
        """Return tensor `name` (canonical) packed, exactly; None if the source has it unpacked.

        Also None for FP8 whose blocks of 128 rows, which share scales, do not stay together.
        """
        source: Any = self.source
        if not hasattr(source, "read_packed"):
            return None
        if name not in self._parts:
            return source.read_packed(name)
        part = self._parts[name]
        packed = source.read_packed(part.fused)
        return None if packed is None else _take_rows(packed, part.rows)

    def _fused(self, name: str) -> NDArray[Any]:
        if self._last_read is None or self._last_read[0] != name:
            self._last_read = name, self.source.read(name)
        return self._last_read[1]


def split_projections(source: TensorSource, cfg: ModelConfig) -> TensorSource:
    """Return the source with its fused projections split; the source itself if it has none."""
    return SplitProjections(source, cfg) if any(name.endswith(FUSED) for name in source.tensors) else source


def _rows_of_qkvz(cfg: ModelConfig) -> dict[str, NDArray[np.int64]]:
    """Return for each part of `in_proj_qkvz` the rows of it, in Qwen3.5's order: all queries, all keys, all values."""
    value_rows = cfg.value_size // cfg.linear_k_heads  # of one key head
    sizes = (cfg.linear_k_dim, cfg.linear_k_dim, value_rows, value_rows)
    q, k, v, z = _rows_by_part(cfg.linear_k_heads, sizes)
    return {"linear_attn.in_proj_qkv.weight": np.concatenate([q, k, v]), "linear_attn.in_proj_z.weight": z}


def _rows_of_ba(cfg: ModelConfig) -> dict[str, NDArray[np.int64]]:
    repeat = cfg.linear_v_heads // cfg.linear_k_heads
    b, a = _rows_by_part(cfg.linear_k_heads, (repeat, repeat))
    return {"linear_attn.in_proj_b.weight": b, "linear_attn.in_proj_a.weight": a}


def _rows_by_part(num_groups: int, sizes: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """Return the row numbers of each part of a matrix that consists of groups of `sizes` rows."""
    rows = np.arange(num_groups * sum(sizes)).reshape(num_groups, -1)
    borders = np.cumsum((0, *sizes))
    return [rows[:, start:stop].reshape(-1) for start, stop in zip(borders[:-1], borders[1:], strict=True)]


def _take_rows(packed: PackedArray, rows: NDArray[np.int64]) -> PackedArray | None:
    """Return the chosen rows of a packed matrix; None if they tear blocks of FP8 apart."""
    if packed.layout != "fp8":
        return packed.map_arrays(lambda array: np.ascontiguousarray(array[rows]))
    blocks = rows[::FP8_BLOCK] // FP8_BLOCK
    whole = (blocks[:, None] * FP8_BLOCK + np.arange(FP8_BLOCK)).reshape(-1)
    if not np.array_equal(whole, rows):
        return None
    return replace(packed, codes=packed.codes[rows], scale=packed.scale[blocks])
