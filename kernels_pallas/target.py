"""Which platform programs are being made for. The one place that asks, so that a machine without a GPU can compile for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_target: ContextVar[str | None] = ContextVar("target", default=None)


def target() -> str:
    """"cpu", "cuda" or another platform: that of the default device, unless `compiling_for` says otherwise."""
    chosen = _target.get()
    if chosen is not None:
        return chosen
    found = jax.default_backend()
    return "cuda" if found == "gpu" and jax.devices()[0].device_kind.startswith("NVIDIA") else found


@contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Trace programs for `platform` inside the context.

    jax keeps traced programs without asking which platform they were meant for: clear its caches, or use a process for
    each platform.
    """
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def compile_options() -> dict[str, dict[str, str | bool]]:
    """Keyword arguments of `jax.stages.Lowered.compile` that suit the target."""
    if target() != "cuda":
        return {}
    # Where weights fill most of the memory, XLA computes small things again and again to save kilobytes nobody needs. And it
    # would leave out roundings to bfloat16 between operations that it happens to fuse, so that texts hung on what it fuses.
    return {"compiler_options": {"xla_disable_hlo_passes": "rematerialization", "xla_allow_excess_precision": False}}
