"""Which platform programs are being made for. The one place that asks, so that a machine without a GPU can compile for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_target: ContextVar[tuple[str, tuple[int, int]] | None] = ContextVar("target", default=None)


def target() -> str:
    """ "cpu", "cuda" or another platform: that of the default device, unless `compiling_for` says otherwise."""
    chosen = _target.get()
    if chosen is not None:
        return chosen[0]
    found = jax.default_backend()
    return "cuda" if found == "gpu" and jax.devices()[0].device_kind.startswith("NVIDIA") else found


def capability() -> tuple[int, int]:
    """Compute capability of the target, or (0, 0) if it has none."""
    chosen = _target.get()
    if chosen is not None:
        return chosen[1]
    if target() != "cuda":
        return 0, 0
    major, minor = str(jax.devices()[0].compute_capability).split(".")
    return int(major), int(minor)


@contextmanager
def compiling_for(platform: str, capability: tuple[int, int] = (0, 0)) -> Iterator[None]:
    """Trace programs for `platform` inside the context, and for a GPU of this compute capability.

    jax keeps traced programs without asking which platform they were meant for: clear its caches, or use a process for
    each platform.
    """
    token = _target.set((platform, capability))
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
