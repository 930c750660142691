"""Parameter trees on disk as Orbax checkpoints, written and read a few leaves at a time.

Orbax, given a whole model, takes three times the model's size in host memory. This takes a few leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray

from checkpoints import CheckpointError
from mtpjax.loading.loaded_model import ParamPath

BATCH_BYTES = 64 << 20  # bytes of small leaves that go through Orbax in one call, which costs some 10 ms


@dataclass(frozen=True)
class LazyLeaf:
    """A leaf that `make` computes when its turn to be written comes."""

    make: Callable[[], NDArray[Any]]


def _to_nested_dict(leaves: Mapping[ParamPath, Any]) -> dict[str, Any]:
    """Return Orbax's form of a tree, which has dictionaries for lists, too."""
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
        async def serialize(
            self, values: Sequence[LazyLeaf], infos: Sequence[Any], args: Sequence[Any] | None = None
        ) -> Sequence[Any]:
            batch: list[tuple[NDArray[Any], Any, Any]] = []
            for leaf, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                batch.append((leaf.make(), info, arg))
                if info is infos[-1] or sum(array.nbytes for array, _, _ in batch) >= BATCH_BYTES:
                    for future in await super().serialize(*map(list, zip(*batch, strict=True))):
                        future.result()
                    batch.clear()
            return []

    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyLeaf, LazyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # never used, but Orbax warns if it cannot write these
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(_to_nested_dict(leaves)))


class OrbaxReader:
    """The leaves of an Orbax checkpoint; opening it reads their shapes.

    Attributes:
        shapes: by path; all parts of a path are strings here.

    Raises:
        CheckpointError: not an Orbax checkpoint, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        import orbax.checkpoint as ocp

        self.path, self._ocp = path.absolute(), ocp
        self._checkpointer = ocp.PyTreeCheckpointer()
        try:
            tree = self._checkpointer.metadata(self.path).item_metadata.tree
            leaves: list[tuple[Any, Any]] = jax.tree_util.tree_leaves_with_path(tree)
            self.shapes: dict[tuple[str, ...], tuple[int, ...]] = {
                tuple(str(part.key) for part in path): tuple(leaf.shape) for path, leaf in leaves
            }
        except Exception as error:  # Orbax and TensorStore raise many types
            raise CheckpointError(f"{self.path}: is not a readable Orbax checkpoint ({_brief(error)})") from error

    def reader(self, dtypes: Mapping[ParamPath, DTypeLike | None]) -> Callable[[ParamPath], NDArray[Any]]:
        """Return a function that reads the leaf at a path of `dtypes`, in its dtype there (None: as stored).

        Leaves are read in groups, so paths are best asked for in the order of `dtypes`. The function keeps the last two
        groups, because experts that were published one by one alternate between two leaves.
        """
        groups: list[dict[ParamPath, DTypeLike | None]] = []
        group_of: dict[ParamPath, int] = {}
        room = 0
        for path, dtype in dtypes.items():
            size = 4 * math.prod(self.shapes[tuple(map(str, path))])
            if size > room:
                groups.append({})
                room = BATCH_BYTES
            groups[-1][path], group_of[path], room = dtype, len(groups) - 1, room - size
        read_group = lru_cache(maxsize=2)(lambda number: self._read(groups[number]))
        return lambda path: read_group(group_of[path])[path]

    def _read(self, group: Mapping[ParamPath, DTypeLike | None]) -> dict[ParamPath, NDArray[Any]]:
        restore_args = {
            path: self._ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype) for path, dtype in group.items()
        }
        item = _to_nested_dict(dict.fromkeys(group, 0))
        args = self._ocp.args.PyTreeRestore(item, restore_args=_to_nested_dict(restore_args), partial_restore=True)
        try:
            tree = self._checkpointer.restore(self.path, args=args)
        except Exception as error:
            names = [".".join(map(str, path)) for path in group]
            which = f"'{names[0]}'" + (f"...'{names[-1]}'" if len(names) > 1 else "")
            raise CheckpointError(f"{self.path}: damaged, {which} cannot be read ({_brief(error)})") from error
        return {path: _lookup(tree, path) for path in group}


def _brief(error: Exception) -> str:
    """Return the first line of a message of Orbax or TensorStore, which can be pages long."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
