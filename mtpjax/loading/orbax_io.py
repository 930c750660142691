"""Parameter trees on disk as Orbax checkpoints, written and read a few leaves at a time.

Handing Orbax a whole model takes three times the model's size in host memory; this takes a few leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints import CheckpointError

BATCH_BYTES = 64 << 20  # bytes of small leaves that go through Orbax in one call, which costs some 10 ms

ParamPath = tuple[str | int, ...]


@dataclass(frozen=True)
class LazyLeaf:
    """A leaf still to be made; asked for when its turn to be written comes."""

    make: Callable[[], np.ndarray]


def _nested(leaves: Mapping[ParamPath, Any]) -> dict[str, Any]:
    """Orbax's form of a tree: dictionaries, also for lists."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = map(str, path)
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def _lookup(tree: Any, path: ParamPath) -> Any:
    for name in map(str, path):
        tree = tree[name]
    return tree


def write_tree(path: Path, leaves: Mapping[ParamPath, LazyLeaf]) -> None:
    """Write all leaves as one Orbax checkpoint in the new folder `path` (absolute)."""
    import orbax.checkpoint as ocp

    class LazyHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
        async def serialize(self, values, infos, args=None):  # type: ignore[no-untyped-def]
            waiting: list[tuple] = []
            for leaf, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                waiting.append((leaf.make(), info, arg))
                if info is infos[-1] or sum(array.nbytes for array, _, _ in waiting) >= BATCH_BYTES:
                    for written in await super().serialize(*map(list, zip(*waiting, strict=True))):
                        written.result()
                    waiting.clear()
            return []

    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyLeaf, LazyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # there is none, but Orbax warns where it cannot write one
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(_nested(leaves)))


class OrbaxReader:
    """The leaves of an Orbax checkpoint; opening reads their shapes.

    Attributes:
        shapes: by path, whose parts are all strings here.

    Raises:
        CheckpointError: not an Orbax checkpoint, or a damaged one.
    """

    def __init__(self, path: Path):
        import orbax.checkpoint as ocp

        self.path, self._ocp = path.absolute(), ocp
        self._checkpointer = ocp.PyTreeCheckpointer()
        try:
            tree = self._checkpointer.metadata(self.path).item_metadata.tree
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            self.shapes = {tuple(str(part.key) for part in path): tuple(leaf.shape) for path, leaf in leaves}
        except Exception as error:  # orbax and tensorstore raise many types
            raise CheckpointError(f"{self.path}: is not a readable Orbax checkpoint ({_brief(error)})") from error

    def reader(self, wanted: Mapping[ParamPath, Any]) -> Callable[[ParamPath], np.ndarray]:
        """A function that reads the leaves of `wanted` (path -> dtype; None: as stored), best asked in this order.

        It keeps the last of them, since experts that were published one by one alternate between two leaves.
        """
        groups: list[dict[ParamPath, Any]] = []
        group_of: dict[ParamPath, int] = {}
        room = 0
        for path, dtype in wanted.items():
            size = 4 * math.prod(self.shapes[tuple(map(str, path))])
            if size > room:
                groups.append({})
                room = BATCH_BYTES
            groups[-1][path], group_of[path], room = dtype, len(groups) - 1, room - size
        load = lru_cache(maxsize=2)(lambda number: self._read(groups[number]))
        return lambda path: load(group_of[path])[path]

    def _read(self, group: Mapping[ParamPath, Any]) -> dict[ParamPath, np.ndarray]:
        each = {path: self._ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype) for path, dtype in group.items()}
        item = _nested(dict.fromkeys(group, 0))
        args = self._ocp.args.PyTreeRestore(item, restore_args=_nested(each), partial_restore=True)
        try:
            tree = self._checkpointer.restore(self.path, args=args)
        except Exception as error:
            names = [".".join(map(str, path)) for path in group]
            which = f"'{names[0]}'" + (f"...'{names[-1]}'" if len(names) > 1 else "")
            raise CheckpointError(f"{self.path}: damaged, {which} cannot be read ({_brief(error)})") from error
        return {path: _lookup(tree, path) for path in group}


def _brief(error: Exception) -> str:
    """The first line of what orbax and tensorstore say, which can be pages."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
