"""Which platform programs are traced for, and which implementation of an op that means: the one place that asks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import jax

IMPLEMENTATIONS = ("xla", "triton")
# Kinds of devices, and the names that NVIDIA's driver has for them: memory and form differ, the multiprocessors do not.
DEVICE_KINDS = {
    "H100": r"NVIDIA H100( .*)?",
    "H200": r"NVIDIA H200( .*)?",
    "A100": r"NVIDIA A100[ -].*",
    "RTX 3090": r"NVIDIA GeForce RTX 3090( Ti)?",
    "RTX 4090": r"NVIDIA GeForce RTX 4090( D)?",
    "RTX 5090": r"NVIDIA GeForce RTX 5090( D)?",
    "B200": r"NVIDIA B200( .*)?",
}
# KiB of shared memory that a block of threads gets, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"). Others count as the smallest.
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}


class _Override(NamedTuple):
    platform: str
    capability: tuple[int, int]
    device_kind: str
    interpret: bool


_override: ContextVar[_Override | None] = ContextVar("override_platform", default=None)


def platform() -> str:
    """Return "cpu", "cuda" or another platform: that of JAX's default device, or the one of `override_platform`."""
    override = _override.get()
    if override is not None:
        return override.platform
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" and jax.devices()[0].device_kind.startswith("NVIDIA") else backend


def capability() -> tuple[int, int]:
    """Return the CUDA compute capability of the platform, or (0, 0) if it has none."""
    override = _override.get()
    if override is not None:
        return override.capability
    if platform() != "cuda":
        return 0, 0
    major, minor = str(jax.devices()[0].compute_capability).split(".")
    return int(major), int(minor)


def shared_memory_bytes() -> int:
    """Return the most shared memory that a block of threads gets on the platform."""
    return SHARED_KIB.get(capability(), min(SHARED_KIB.values())) * 1024


def device_kind() -> str:
    """Return the kind of device that programs are traced for, as tile tables name it: "H100", "RTX 4090", "cpu".

    It is JAX's own name of the device where `DEVICE_KINDS` does not shorten it.
    """
    override = _override.get()
    if override is not None:
        return override.device_kind or override.platform
    if platform() != "cuda":
        return platform()
    name = jax.devices()[0].device_kind
    return next((kind for kind, pattern in DEVICE_KINDS.items() if re.fullmatch(pattern, name)), name)


@contextmanager
def override_platform(
    name: str, capability: tuple[int, int] = (0, 0), *, device_kind: str = "", interpret: bool = False
) -> Iterator[None]:
    """Trace programs for the platform `name` inside the context, on a machine that may be another one.

    JAX caches traced programs and does not know the platform they were traced for: clear its caches, or use one process
    for each platform.

    Args:
        name: "cpu", "cuda" or another platform of JAX.
        capability: the CUDA compute capability, for example (9, 0).
        device_kind: the kind of device, for example "H100"; "": one that no tile table knows.
        interpret: run Pallas kernels in interpret mode, on any device.
    """
    token = _override.set(_Override(name, capability, device_kind, interpret))
    try:
        yield
    finally:
        _override.reset(token)


def resolve_implementation(implementation: str | None, *, supported: bool = True) -> str:
    """Return the implementation that an op uses: the one that was asked for, or the best for the platform.

    Args:
        implementation: "xla" (plain JAX), "triton" (a Pallas kernel through the Triton lowering), or None: "triton" on
            a CUDA device if the kernel supports the shapes, else "xla".
        supported: whether the kernel supports the shapes of this call.

    Raises:
        ValueError: `implementation` is not one of `IMPLEMENTATIONS`.
    """
    if implementation is None:
        return "triton" if supported and platform() == "cuda" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; expected one of {IMPLEMENTATIONS} or None")
    return implementation


def interpret_kernels() -> bool:
    """Return whether Pallas kernels run in interpret mode: not on CUDA, or if `override_platform` says so."""
    override = _override.get()
    return platform() != "cuda" if override is None else override.interpret or override.platform != "cuda"


def compile_options() -> dict[str, dict[str, str | bool]]:
    """Return keyword arguments of `jax.stages.Lowered.compile` for the platform."""
    if platform() != "cuda":
        return {}
    # Rematerialization: where weights fill most of the memory, XLA recomputes small values to save kilobytes.
    # Excess precision: XLA would drop roundings to bfloat16 inside a fusion, and the text would depend on fusion
    # decisions.
    return {"compiler_options": {"xla_disable_hlo_passes": "rematerialization", "xla_allow_excess_precision": False}}
