"""`LoadedModel`: a model split into its structure and its parameters, and the parameter tree by path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from mtpjax.config import ModelConfig
from mtpjax.model import abstract_model

ParamPath = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedModel:
    """A split model: `graph` is static, `params` the tree of arrays; `nnx.merge(graph, params)` inside jit."""

    cfg: ModelConfig
    graph: Any
    params: Any


def flatten_params(params: Any) -> dict[ParamPath, Any]:
    """Return the variables of a parameter tree by path; `variable[...]` is the value of one."""
    state: Any = nnx.to_flat_state(params)
    return dict(state)


def map_params(params: Any, make: Callable[[ParamPath, Any], Any]) -> Any:
    """Return the same tree with the value of each variable replaced by `make(path, variable)`, one at a time."""
    replaced = [(path, variable.replace(make(path, variable))) for path, variable in flatten_params(params).items()]
    return nnx.from_flat_state(replaced)


def param_shapes(cfg: ModelConfig) -> dict[ParamPath, tuple[int, ...]]:
    """Return the shapes of all parameters of a model; nothing is allocated."""
    params = nnx.split(abstract_model(cfg))[1]
    return {path: tuple(variable.shape) for path, variable in flatten_params(params).items()}
