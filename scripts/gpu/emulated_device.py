"""`mtpjax` on a card that this machine lacks: programs are compiled for the card, and the PTX emulator runs them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kernels_pallas.platform import override_platform
from scripts.gpu.cuda_target import Card, CompileTarget
from scripts.ptx_emulator.program import EmulatedProgram


class EmulatedDevice:
    """A card whose programs the emulator runs. Create it before jax is first used.

    Attributes:
        num_launched: kernels run so far.
    """

    def __init__(self, card: Card):
        self._folder = tempfile.TemporaryDirectory()
        self.card, self.target = card, CompileTarget(card, Path(self._folder.name), only_ptx=True)
        self.num_launched = 0

    def compile(self, fn: Any, args: tuple[Any, ...], *, find_races: bool = True) -> Callable[..., Any]:
        """Compile a jitted function for arguments like these; the result computes on numpy arrays what the card would.

        A function without arguments is returned as it is, and runs on the host.

        Args:
            find_races: look for races in the first run of each kernel, which doubles its time.
        """
        leaves, tree = jax.tree.flatten(args)
        if not leaves:
            return fn
        shapes = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in leaves])
        folder = Path(self._folder.name)
        shutil.rmtree(folder)
        folder.mkdir()
        compiled = self.target.compile(fn, *shapes)
        program, results = EmulatedProgram(folder, find_races), jax.tree.structure(compiled.out_info)
        # jax drops the arguments that a program does not read: it reports None as their sharding.
        is_used = jax.tree.map(lambda _, sharding: sharding is not None, compiled.args_info, compiled.input_shardings)
        used = [number for number, read in enumerate(jax.tree.leaves(is_used)) if read]

        def run(*args: Any) -> Any:
            before, leaves = program.num_launched, jax.tree.leaves(args)
            outputs = program.run([np.asarray(leaves[number]) for number in used])
            self.num_launched += program.num_launched - before
            return jax.tree.unflatten(results, outputs)

        return run

    @contextmanager
    def active(self) -> Iterator[None]:
        """Trace programs for this card. Inside, `LLM(compile_fn=device.compile)` runs on it."""
        with override_platform("cuda", self.card.capability, device_kind=self.card.name):
            yield
