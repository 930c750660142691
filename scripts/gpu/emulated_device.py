"""`mtpjax` on a card that is not here: its programs are compiled for it, and run by emulation."""

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
from scripts.gpu.cuda_target import Card, Target
from scripts.ptx_emulator.program import Program


class EmulatedCard:
    """Make it before jax is first used.

    Attributes:
        launched: kernels that it has run.
    """

    def __init__(self, card: Card):
        self._folder = tempfile.TemporaryDirectory()
        self.card, self.target = card, Target(card, Path(self._folder.name))
        self.launched = 0

    def compile(self, fn: Any, args: tuple[Any, ...]) -> Callable[..., Any]:
        """A jitted function as one that computes, on numpy arrays, what the card would.

        A function without arguments has nothing to compute on: its result comes from the host.
        """
        leaves, tree = jax.tree.flatten(args)
        if not leaves:
            return fn
        shapes = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in leaves])
        folder = Path(self._folder.name)
        shutil.rmtree(folder)
        folder.mkdir()
        made = self.target.compile(fn, *shapes)
        program, results = Program(folder), jax.tree.structure(made.out_info)
        # jax leaves out the arrays that the program does not read, and tells nobody else of it.
        kept = sorted(made._executable._kept_var_idx)

        def run(*args: Any) -> Any:
            before = program.launched
            leaves = jax.tree.leaves(args)
            out = program.run([np.asarray(leaves[n]) for n in kept])
            self.launched += program.launched - before
            return jax.tree.unflatten(results, out)

        return run

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, `LLM(compile_fn=self.compile)` runs on this card."""
        with override_platform("cuda", self.card.capability):
            yield
