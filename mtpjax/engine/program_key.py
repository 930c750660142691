"""The names under which compiled programs are kept: digests of everything that a program depends on.

What is not known to be the same in another process has no digest, and its program is not kept: a function of the
user's own, an object of an unknown type. The parts of the digest of a step, which is known before anything is traced:

* the function and its static arguments: config, structure of the model, draft length, drafter, acceptance rule, ...;
* shapes, dtypes and tree structure of the arguments, and so the form in which each weight is stored;
* compile options, and the platform that programs are traced for;
* `environment`: device, driver, runtime, versions, flags and configuration of JAX and XLA;
* `hash_of_sources`: every file of the packages that programs are traced from, so that an edited checkout never takes
  an old program.

The digest of a lowered step has the text of the program in place of the function, its static arguments and the sources.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import inspect
import json
import os
import platform as host
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from importlib.metadata import distributions, version
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kernels_pallas.platform import capability, interpret_kernels, platform
from kernels_pallas.row_tiles import uses_only_proved_row_tiles
from kernels_pallas.tile_tables import table_fingerprint

OWN_PACKAGES = ("mtpjax", "kernels_pallas", "checkpoints")
# What these define is known by its name: the digest has their versions. Types of numpy include those of ml_dtypes.
OTHER_PACKAGES = ("builtins", "jax", "jaxlib", "flax", "numpy", "ml_dtypes")
VERSIONS = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")
SOURCES = (".py", ".json")
# Variables that change what XLA compiles.
VARIABLES = ("XLA_FLAGS", "TF_XLA_FLAGS", "NVIDIA_TF32_OVERRIDE", "NPROC", "PTXAS_PATH", "XLA_FFI_FLAGS")
# Prefixes of settings of JAX that say where caches are and what is logged. All others are part of the digest.
NEUTRAL_SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache",
    "jax_persistent_cache",
    "jax_log",
    "jax_explain",
)
CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU implementer")


class UnknownValueError(Exception):
    """A value that may be another one in the next process; the message names it."""


def step_digest(fn: Callable[..., Any], static: Any, args: Any, options: Any) -> str | None:
    """Return the digest of a step before it is traced, 64 hexadecimal digits, or None if a part of it has none.

    Args:
        fn: the function that is jitted.
        static: its bound arguments.
        args: the arrays, or their shapes, that it is compiled for.
        options: compile options.
    """
    target = (platform(), capability(), interpret_kernels(), table_fingerprint(), uses_only_proved_row_tiles())
    try:
        parts = (_describe((target, options, fn, static)), _describe_arguments(args))
        return _digest(json.dumps(environment()), hash_of_sources(), *chain(*parts))
    except UnknownValueError:
        return None


def lowered_digest(lowered: Any, args: Any, options: Any) -> str | None:
    """Return the digest of a lowered step, of its text and all that XLA reads beside it; None if a part has none.

    Args:
        lowered: a `jax.stages.Lowered`.
        args, options: as for `step_digest`.
    """
    try:
        # The text has no parameters for arguments that the step does not use, so it does not say which these are.
        used = sorted(lowered._lowering.compile_args["kept_var_idx"])
        parts = (_describe((options, used)), _describe_arguments(args))
        return _digest("lowered", json.dumps(environment()), lowered.as_text(), *chain(*parts))
    except (UnknownValueError, AttributeError, KeyError):
        return None


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Return what programs depend on beside the code and its arguments, as a JSON object.

    Raises:
        UnknownValueError: the process is one of several of a distributed computation.
    """
    if jax.process_count() > 1:
        raise UnknownValueError("a process of a distributed computation")
    device = default_device()
    settings = {name: str(value) for name, value in jax.config.values.items() if not name.startswith(NEUTRAL_SETTINGS)}
    return {
        **_fixed_environment(),
        "device": [device.platform, device.device_kind, device.id, str(getattr(device, "compute_capability", ""))],
        "runtime": device.client.platform_version,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "settings": settings,
    }


def default_device() -> jax.Device:
    """Return the device that programs run on."""
    device = jax.config.values["jax_default_device"]
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


@cache
def hash_of_sources() -> str:
    """Return a hash of all source files and tables of this project's packages."""
    digest = hashlib.sha256()
    for name in OWN_PACKAGES:
        root = Path(str(importlib.import_module(name).__file__)).parent
        for file in sorted(p for p in root.rglob("*") if p.suffix in SOURCES):
            digest.update(f"{name}/{file.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@cache
def _fixed_environment() -> dict[str, Any]:
    """The part of the environment that stays as it is while the process runs."""
    found: dict[str, Any] = {"versions": {name: version(name) for name in VERSIONS}, "python": sys.version}
    found["host"] = [host.system(), host.machine()]
    if default_device().platform == "cpu":
        found["processor"] = [_processor(), _num_cores()]
    else:
        driver = Path("/proc/driver/nvidia/version")
        found["driver"] = driver.read_text() if driver.exists() else ""
        names = ((d.metadata["Name"] or "", d.version) for d in distributions())
        found["libraries"] = sorted({f"{name} {v}" for name, v in names if name.startswith(("nvidia", "jax-cuda"))})
    return found


def _processor() -> list[str]:
    """The lines of /proc/cpuinfo about the first processor that say what code it runs."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return [host.processor()]
    return [line for line in first.splitlines() if line.split(":")[0].strip() in CPU_FIELDS]


def _num_cores() -> int:
    """The cores that this process may use: XLA cuts work of a CPU into as many parts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(value: Any) -> Iterator[str]:
    """Yield texts that two values have in common only if they are equal."""
    kind: Any = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        yield f"{kind.__name__} {value!r}"
    elif isinstance(value, np.dtype):
        yield f"dtype {value.name}"
    elif isinstance(value, enum.Enum):
        yield f"{_qualified_name(kind)} {value.name}"
    elif isinstance(value, partial):
        yield "partial"
        yield from _describe((value.func, value.args, value.keywords))
    elif isinstance(value, jax.tree_util.PyTreeDef):
        yield from _describe_structure(value)
    elif isinstance(value, list | tuple):
        yield f"{_qualified_name(kind)} of {len(value)}"
        for item in value:
            yield from _describe(item)
    elif isinstance(value, Mapping):
        yield f"{_qualified_name(kind)} of {len(value)}"
        for key, item in value.items():
            yield from _describe(key)
            yield from _describe(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield _qualified_name(kind)
        for field in fields(value):
            yield field.name
            yield from _describe(getattr(value, field.name))
    elif isinstance(value, type) or callable(value):
        yield f"name {_qualified_name(value)}"
    else:
        raise UnknownValueError(f"{value!r:.80} of type {kind.__module__}.{kind.__qualname__}")


@cache
def _qualified_name(value: Hashable) -> str:
    """Return the name of a function or type of a known package, which must lead back to the same object."""
    if value is type(None):
        return "NoneType"
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str) and module.split(".")[0] in OWN_PACKAGES + OTHER_PACKAGES:
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = inspect.getattr_static(found, part, None)
        if found is value:
            return f"{module}.{name}"
    raise UnknownValueError(f"{value!r:.80}, which is not part of {', '.join(OWN_PACKAGES)}")


def _describe_structure(structure: Any) -> Iterator[str]:
    """Yield the description of a tree structure with the static data of its nodes."""
    if structure.num_nodes == structure.num_leaves == 1:
        yield "leaf"
        return
    node, children = structure.node_data(), structure.children()
    yield f"node of {len(children)}"
    yield from _describe(node)
    for child in children:
        yield from _describe_structure(child)


def _describe_arguments(args: Any) -> Iterator[str]:
    """Yield the structure of a tree of arrays, and shape and dtype of each."""
    leaves, structure = jax.tree_util.tree_flatten(args)
    yield from _describe_structure(structure)
    device = default_device()
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            if leaf.sharding.device_set != {device}:
                raise UnknownValueError(f"an array on {sorted(map(str, leaf.sharding.device_set))}")
        elif not isinstance(leaf, np.ndarray | jax.ShapeDtypeStruct):
            raise UnknownValueError(f"an argument of type {type(leaf).__name__}")
        yield f"{leaf.shape} {leaf.dtype.name} {getattr(leaf, 'weak_type', False)}"
