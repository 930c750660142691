"""The run-time check of annotations of `make test-types`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int serves as a float


def check_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's annotations at run time.

    Constructors are left alone: JAX rebuilds the structs of flax with shape specs, tracers and placeholders in the
    place of arrays.
    """
    constructors = ("__init__", "check_single_arg", "check_params")  # the last two are jaxtyping's, for dataclasses
    if isinstance(function, type) or function.__name__ in constructors:
        return function
    return _check(function)
