"""The interface of an opened checkpoint: a table of tensors, which are read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TensorInfo:
    """The location of one tensor: `nbytes` bytes from byte `offset` of `file` on; `shape` counts elements."""

    name: str  # as written in the file, prefix included
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # little-endian; BF16 and the 8-bit floats are types of `ml_dtypes`
    file: Path
    offset: int
    nbytes: int


@runtime_checkable
class TensorSource(Protocol):
    """An opened checkpoint whose tensors can be read with numpy alone."""

    @property
    def path(self) -> Path:
        """The opened folder or file."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`. A GGUF file has none; its metadata is translated into one."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """The content of `generation_config.json`, or an empty dict if the folder has no such file."""

    @property
    def tokenizer_file(self) -> Path | None:
        """The path of `tokenizer.json`, or None if the folder has no such file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All weights of the text model and its MTP head by canonical name (`checkpoints/names.py`)."""

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """Read tensor `name` (canonical) into `out`, in the dtype of `out`; see `checkpoints/read_tensor.py`."""

    def read(self, name: str) -> NDArray[Any]:
        """Return tensor `name` (canonical) as a new array with the shape and dtype in `tensors`."""
