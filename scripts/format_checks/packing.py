"""Weights that a library has packed, and helpers to pack the matrices of a model one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Tensors = dict[str, torch.Tensor]
IsMatrix = Callable[[str], bool]  # name of a weight -> whether it is a matrix that is to be quantised
GROUP = 128


class Packed(NamedTuple):
    """A quantised checkpoint as its library makes it.

    Attributes:
        config: the `quantization_config` of config.json.
        tensors: all tensors of the folder.
        values: what the library itself makes of the quantised tensors, float32, by the name of the plain weight.
    """

    config: dict[str, Any]
    tensors: Tensors
    values: Tensors


@dataclass(frozen=True)
class Case:
    """One format of one library.

    Attributes:
        library: name of its distribution.
        make: packs bfloat16 weights; raises ImportError if the library is not installed.
    """

    name: str
    library: str
    make: Callable[[Tensors, IsMatrix], Packed]


def linear_layer(weight: torch.Tensor) -> torch.nn.Linear:
    """Return a linear layer with this weight `[O, D]`."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def pack_each(
    weights: Tensors,
    is_matrix: IsMatrix,
    config: dict[str, Any],
    pack: Callable[[torch.Tensor], tuple[Tensors, Any]],
) -> Packed:
    """Pack every matrix by itself: `pack` returns its tensors by suffix, and the value `[O, D]`."""
    tensors, values = {}, {}
    for name, weight in weights.items():
        if not is_matrix(name):
            tensors[name] = weight
            continue
        packed, values[name] = pack(weight.float())
        tensors |= {name.removesuffix("weight") + suffix: tensor.contiguous() for suffix, tensor in packed.items()}
    return Packed(json.loads(json.dumps(config, default=str)), tensors, values)
