"""What a checkpoint looks like to the rest of the program: a table of tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes, `offset` bytes into `file`; `shape` is in elements."""

    name: str  # as written in the file, prefix included
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # little-endian; BF16 and the 8-bit floats are types of `ml_dtypes`
    file: Path
    offset: int
    nbytes: int


class TensorSource(Protocol):
    """An opened checkpoint whose tensors can be read with numpy alone."""

    @property
    def path(self) -> Path:
        """The folder that was opened."""

    @property
    def kind(self) -> str:
        """The format on disk: "safetensors"."""

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` as it stands in the folder."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """`generation_config.json`, or an empty dict where the folder has none."""

    @property
    def tokenizer_file(self) -> Path | None:
        """`tokenizer.json`, or None where the folder has none."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All weights of the text model and its MTP head by canonical name (`checkpoints/names.py`)."""

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """Read tensor `name` (canonical) into `out`, in the dtype of `out`; see `checkpoints/reading.py`."""

    def read(self, name: str) -> NDArray[Any]:
        """Tensor `name` (canonical) as a new array of the file's own shape and dtype."""
