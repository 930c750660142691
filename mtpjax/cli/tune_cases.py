"""What `mtpjax tune` measures: products of the shapes of a 35B-A3B, each with several tile constants.

Another op is tuned by adding its cases to `tune_cases`: a program, the prefix of its kernels' names, and candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.matmul import linears_split_k
from kernels_pallas.packed.formats import abstract_weight
from kernels_pallas.platform import compile_options
from kernels_pallas.tile_tables import Entry, MatmulConstants, TileTable, override_table
from kernels_pallas.tile_tables.constants import Constants
from kernels_pallas.weights import LayerView

# Of each stack of weights: what was read a moment ago would come from a cache that decoding does not have.
LAYERS, TOY_LAYERS = 8, 1


@dataclass(frozen=True)
class TuneCase:
    """One kernel, to be measured with several constants.

    Attributes:
        name: what is printed.
        op: the op in tile tables.
        size_class: (max_outputs, max_inputs) of the entry that this case decides.
        kernels: how the names of its kernels begin.
        tuned: the constants that it decides; cases of one op and size class with the same names decide together.
        candidates: the cheapest first: of equals, the first is taken.
        run: the program, a function of `args`.
        args: abstract arguments.
    """

    name: str
    op: str
    size_class: tuple[int | None, int | None]
    kernels: str
    tuned: tuple[str, ...]
    candidates: tuple[Constants, ...]
    run: Callable[..., Any]
    args: tuple[Any, ...]

    def values(self, constants: Constants) -> dict[str, int]:
        """Return the constants that this case decides."""
        return {name: getattr(constants, name) for name in self.tuned}

    def describe(self, constants: Constants) -> str:
        """Return the same in words."""
        return ", ".join(f"{name} {value}" for name, value in self.values(constants).items())


@dataclass(frozen=True)
class Trial:
    """A case with one candidate: one program, one figure."""

    number: int
    case: TuneCase
    constants: Constants

    @property
    def program_name(self) -> str:
        """The name of the compiled program, by which a trace knows its kernels."""
        return f"tune_{self.number:03}"

    def compile(self, device: str) -> jax.stages.Compiled:
        """Compile the program with these constants."""
        entry = Entry(self.constants, "toy" if device == "cpu" else "measured")

        def run(*args: Any) -> Any:
            return self.case.run(*args)

        run.__name__ = run.__qualname__ = self.program_name
        with override_table(TileTable(device, "a trial", {self.case.op: (entry,)})):
            options: dict[str, Any] = compile_options()
            return jax.jit(run).lower(*self.case.args).compile(**options)


def all_trials(toy: bool) -> list[Trial]:
    """Return every candidate of every case, numbered."""
    pairs = [(case, constants) for case in tune_cases(toy) for constants in case.candidates]
    return [Trial(number, case, constants) for number, (case, constants) in enumerate(pairs)]


def tune_cases(toy: bool) -> Iterator[TuneCase]:
    """Yield the cases. The toy ones have the same kinds of candidates for weights of some kilobytes."""
    shapes = {
        "DeltaNet in": (None, [(8192, 2048, "iq4_nl"), (4096, 2048, "iq4_nl"), (32, 2048, "bf16"), (32, 2048, "bf16")]),
        "q, k, v": (None, [(8192, 2048, "iq4_nl"), (512, 2048, "iq4_nl"), (512, 2048, "iq4_nl")]),
        "out": (2048, [(2048, 4096, "iq4_nl")]),
        "router": (2048, [(256, 2048, "bf16"), (1, 2048, "bf16"), (512, 2048, "iq4_nl"), (512, 2048, "iq4_nl")]),
    }
    programs: tuple[int, ...] = (128, 256, 512, 1024)
    few_rows: tuple[int, ...] = (1, 5)
    many_rows = 2048
    if toy:
        shapes = {"in": (None, [(136, 512, "iq4_nl"), (32, 512, "bf16")]), "out": (64, [(64, 512, "iq4_nl")])}
        programs, few_rows, many_rows = (16, 32), (3,), 72
    layers = TOY_LAYERS if toy else LAYERS
    base = MatmulConstants()
    few = tuple(replace(base, programs=p, stages_few=s) for p in programs for s in ((2,) if toy else (2, 3)))
    many = tuple(replace(base, stages_many=s, row_tile_many=r) for r in (64, 128) for s in ((3,) if toy else (2, 3)))
    for name, (max_outputs, weights) in shapes.items():
        for rows in few_rows:
            yield _matmul_case(
                f"{name}, {rows} rows", max_outputs, weights, rows, layers, ("programs", "stages_few"), few
            )
        if name != "router":
            tuned = ("stages_many", "row_tile_many")
            yield _matmul_case(f"{name}, {many_rows} rows", max_outputs, weights, many_rows, layers, tuned, many)


def _matmul_case(
    name: str,
    max_outputs: int | None,
    weights: list[tuple[int, int, str]],
    rows: int,
    layers: int,
    tuned: tuple[str, ...],
    candidates: tuple[MatmulConstants, ...],
) -> TuneCase:
    """Return a case that multiplies the same rows with all weights in one launch, for each of so many layers."""
    stacks = tuple(abstract_weight((layers, outputs, inputs), form) for outputs, inputs, form in weights)
    x = jax.ShapeDtypeStruct((rows, weights[0][1]), jnp.bfloat16)
    is_packed = [form != "bf16" for _, _, form in weights]

    def run(x: Any, *stacks: Any) -> Any:
        results = []
        for layer in range(layers):
            pairs = zip(stacks, is_packed, strict=True)
            views = [LayerView(w, jnp.int32(layer)) if packed else w[layer] for w, packed in pairs]
            results.append([y.parts for y in linears_split_k(x, *views, implementation="triton")])
        return results

    return TuneCase(name, "matmul", (max_outputs, None), "matmul_", tuned, candidates, run, (x, *stacks))
