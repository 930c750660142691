"""The Qwen3.5 text model as `flax.nnx` modules that hold weights only; every step is a pure function."""

from mtpjax.model.cache import commit
from mtpjax.model.model import Model, abstract_model
from mtpjax.model.params import Dense, Expert
from mtpjax.model.positions import Positions, make_positions

__all__ = ["Dense", "Expert", "Model", "Positions", "abstract_model", "commit", "make_positions"]
