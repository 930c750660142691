"""Errors for arguments that do not exist: they name the one that is alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


def names_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that is called with an unknown keyword name the argument that is alike, or else all of them.

    The error is a TypeError, as Python's own.
    """
    parameters = inspect.signature(function).parameters
    names = [name for name in parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in parameters:
                alike = get_close_matches(name, names, 1, 0.6)
                hint = f"did you mean {alike[0]!r}?" if alike else f"it has {', '.join(names)}"
                owner = type(args[0]).__name__ if args and "self" in parameters else ""
                called = f"{owner}.{function.__name__}".removeprefix(".").removesuffix(".__init__")
                raise TypeError(f"{called} has no argument {name!r}; {hint}")
        return function(*args, **kwargs)

    return checked


def names_fields(cls: C) -> C:
    """Let the constructor of a dataclass name its arguments as `names_arguments` does."""
    initialize: Any = cls.__init__  # type: ignore[misc]
    cls.__init__ = names_arguments(initialize)  # type: ignore[misc]
    return cls
